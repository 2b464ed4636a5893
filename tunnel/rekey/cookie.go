package rekey

import (
	"crypto/hmac"
	"crypto/sha256"
	"io"
	"net/netip"
	"time"

	"github.com/quietline/quietline/secret"
)

// A cookie proves that the sender of M1 receives at the address it sends from
// (handshake.md 4.3, after WireGuard). Under load the responder does no KEM
// work for an M1 without one; it sends a cookie reply, which is shorter than
// the M1 and costs no KEM work:
//
//	header, type 5
//	salt    24   random
//	box     32   the cookie under Expand(K_cookie, salt), AD = mac1 of the datagram
//	mac1, mac2
//
// Who replays recorded M1s from a false address never sees the cookie, and who
// sees the reply cannot open it without the link secret.
const (
	cookieSize = 16
	cookieLife = 120 * time.Second // handshake.md 4.3
	saltSize   = 24
	replySize  = saltSize + cookieSize + tagSize
	// loadPending is the number of pending handshakes above which cookies are
	// asked for (handshake.md 4.3).
	loadPending = 4
)

// cookie is what we have from the peer.
type cookie struct {
	value secret.Bytes
	until time.Time
}

// stamp writes mac2 under the cookie we have, or zeros.
func (e *envelope) stamp(now time.Time, datagrams [][]byte) {
	for _, d := range datagrams {
		tail := d[len(d)-macSize:]
		clear(tail)
		if now.Before(e.cookie.until) {
			copy(tail, mac1(e.cookie.value, d[:len(d)-macSize]))
		}
	}
}

// jar gives cookies and knows them again. Its secret turns every cookieLife;
// the one before is good for as long again.
type jar struct {
	secrets [2]secret.Bytes // newest first
	turned  time.Time
}

func (j *jar) turn(now time.Time, rand io.Reader) error {
	if !j.turned.IsZero() && now.Sub(j.turned) < cookieLife {
		return nil
	}
	fresh := secret.New(sha256.Size)
	if _, err := io.ReadFull(rand, fresh.Expose()); err != nil {
		return err
	}
	j.secrets[1].Clear()
	j.secrets[1] = j.secrets[0]
	if now.Sub(j.turned) >= 2*cookieLife {
		j.secrets[1].Clear()
	}
	j.secrets[0], j.turned = fresh, now
	return nil
}

func bake(key secret.Bytes, from netip.AddrPort) secret.Bytes {
	h := hmac.New(sha256.New, key.Expose())
	addr, _ := from.MarshalBinary() // its error is always nil
	_, _ = h.Write(addr)
	return secret.Own(h.Sum(nil)[:cookieSize])
}

// knows tells whether mac2 was made with a cookie of ours for this address.
func (j *jar) knows(now time.Time, d []byte, from netip.AddrPort) bool {
	body, got := d[:len(d)-macSize], d[len(d)-macSize:]
	for age, s := range j.secrets {
		if s.Len() == 0 || now.Sub(j.turned) >= time.Duration(2-age)*cookieLife {
			continue
		}
		c := bake(s, from)
		good := hmac.Equal(mac1(c, body), got)
		c.Clear()
		if good {
			return true
		}
	}
	return false
}

// cookieReply answers a datagram that needs a cookie.
func (e *envelope) cookieReply(now time.Time, d []byte, from netip.AddrPort) ([][]byte, error) {
	if err := e.jar.turn(now, e.rand); err != nil {
		return nil, err
	}
	payload := make([]byte, saltSize, replySize)
	if _, err := io.ReadFull(e.rand, payload); err != nil {
		return nil, err
	}
	c := bake(e.jar.secrets[0], from)
	defer c.Clear()
	key := expand(e.bake.Expose(), "QLE1 cookie "+string(payload), keySize)
	defer key.Clear()
	box := newGCM(key).Seal(nil, make([]byte, nonceSize), c.Expose(), mac1Of(d))
	return e.wrap(now, message{kind: kindCookie, payload: append(payload, box...)})
}

func mac1Of(d []byte) []byte { return d[len(d)-2*macSize : len(d)-macSize] }

// taste opens a cookie reply to one of the datagrams we sent. It tells whether
// the cookie is new to us.
func (e *envelope) taste(now time.Time, m *message, sent [][]byte) bool {
	if len(m.payload) != replySize || m.receiver != 0 {
		return false
	}
	salt, box := m.payload[:saltSize], m.payload[saltSize:]
	key := expand(e.eat.Expose(), "QLE1 cookie "+string(salt), keySize)
	defer key.Clear()
	for _, d := range sent {
		plain, err := newGCM(key).Open(nil, make([]byte, nonceSize), box, mac1Of(d))
		if err != nil {
			continue
		}
		if hmac.Equal(plain, e.cookie.value.Expose()) && now.Before(e.cookie.until) {
			return false
		}
		e.cookie.value.Clear()
		e.cookie = cookie{secret.Own(plain), now.Add(cookieLife)}
		return true
	}
	return false
}

// needCookie answers an M1 that came without a cookie while we are under
// load: once a message, for its first fragment.
func (m *Machine) needCookie(d []byte, from netip.AddrPort) {
	m.stats.Cookies++
	if d[3]>>4 != 0 {
		return
	}
	reply, err := m.env.cookieReply(m.now, d, from)
	if err != nil {
		return // without randomness there is no answer
	}
	m.out.Datagrams = append(m.out.Datagrams, reply...)
}

// takeCookie sends our M1 again, with the cookie.
func (m *Machine) takeCookie(msg *message) error {
	if m.init == nil || m.init.phase != sentM1 || !m.env.taste(m.now, msg, m.init.datagrams) {
		return errStray
	}
	m.resend()
	return nil
}
