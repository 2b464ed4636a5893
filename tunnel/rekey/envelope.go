package rekey

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"net/netip"
	"time"

	"github.com/quietline/quietline/secret"
)

// Every handshake datagram (handshake.md 4.3):
//
//	 0  type      1   1..4 = M1..M4
//	 1  version   1   1
//	 2  suite     1
//	 3  fragment  1   index in the high, count-1 in the low four bits
//	 4  msg_id    8   random, the same in all fragments of a message
//	12  receiver  4   index chosen by the receiver; 0 in M1
//	16  payload
//	    mac1     16   HMAC-SHA-256 over all before it, cut
//	    mac2     16   the same under a cookie, or zero; see cookie.go
//
// A datagram has at most 1232 bytes, so that with IPv6 and UDP headers it
// passes every path of the least IPv6 MTU of 1280 (RFC 8200 section 5).
const (
	headerSize   = 16
	macSize      = 16
	maxDatagram  = 1280 - 40 - 8
	maxFragment  = maxDatagram - headerSize - 2*macSize
	maxMessage   = 4096 // handshake.md 4.3: reassembly buffers of 4 KiB
	maxFragments = (maxMessage + maxFragment - 1) / maxFragment
	wireVersion  = 1
	// dataTypes is the first type byte of data records (handshake.md 4.8).
	dataTypes = 0x10
)

const (
	buffers     = 2               // reassembly buffers per line, handshake.md 4.3
	bufferLives = 2 * time.Second // handshake.md 4.3
)

// Owns tells whether a datagram of a line belongs to the handshake rather
// than to the data records, by its first byte.
func Owns(datagram []byte) bool { return len(datagram) > 0 && datagram[0] < dataTypes }

// message is one whole handshake message.
type message struct {
	kind     byte // 1..4
	receiver uint32
	payload  []byte
}

// digest names a message in the store of replies.
func (m *message) digest() [sha256.Size]byte {
	d := sha256.New()
	var head [5]byte
	head[0] = m.kind
	binary.BigEndian.PutUint32(head[1:], m.receiver)
	_, _ = d.Write(head[:])
	_, _ = d.Write(m.payload)
	return [sha256.Size]byte(d.Sum(nil))
}

// macKey is K_mac of handshake.md 4.3 for datagrams towards the end whose
// static public key has the hash receiver. Another label gives another key.
func macKey(link secret.Bytes, label string, direction byte, receiver [hashSize]byte) secret.Bytes {
	info := "QLE1 " + label + string([]byte{direction}) + string(receiver[:])
	key, err := hkdf.Key(sha256.New, link.Expose(), nil, info, sha256.Size)
	must(err)
	return secret.Own(key)
}

func mac1(key secret.Bytes, datagram []byte) []byte {
	h := hmac.New(sha256.New, key.Expose())
	_, _ = h.Write(datagram)
	return h.Sum(nil)[:macSize]
}

// envelope cuts messages into datagrams and puts them together again. It does
// nothing for a datagram whose mac1 is wrong: a stranger is not answered and
// costs one hash.
type envelope struct {
	suite  Suite
	out    secret.Bytes // mac1 key towards the peer
	in     secret.Bytes // mac1 key towards us
	bake   secret.Bytes // key of cookie replies towards the peer
	eat    secret.Bytes // key of cookie replies towards us
	rand   io.Reader
	jar    jar    // cookies we give
	cookie cookie // the one we have
	pieces [buffers]assembly
}

type assembly struct {
	id       [8]byte
	kind     byte
	receiver uint32
	count    int
	parts    [maxFragments][]byte
	until    time.Time // zero = free
}

// wrap cuts a message into datagrams. Sending the same datagrams again lets
// the receiver complete a message from fragments of both copies.
func (e *envelope) wrap(now time.Time, m message) ([][]byte, error) {
	var id [8]byte
	if _, err := io.ReadFull(e.rand, id[:]); err != nil {
		return nil, err
	}
	count := max(1, (len(m.payload)+maxFragment-1)/maxFragment)
	var out [][]byte
	for i := range count {
		part := m.payload[i*maxFragment : min(len(m.payload), (i+1)*maxFragment)]
		d := make([]byte, 0, headerSize+len(part)+2*macSize)
		d = append(d, m.kind, wireVersion, byte(e.suite), byte(i<<4|(count-1)))
		d = append(d, id[:]...)
		d = binary.BigEndian.AppendUint32(d, m.receiver)
		d = append(d, part...)
		d = append(d, mac1(e.out, d)...)
		d = append(d, make([]byte, macSize)...)
		out = append(out, d)
	}
	e.stamp(now, out)
	return out, nil
}

// fault says why a datagram was dropped; drops are counted, never answered.
type fault uint8

const (
	faultNone fault = iota
	faultForm
	faultMAC
	faultLoad // no cookie under load
)

// unwrap checks a datagram and returns the message it completes, or nil. The
// payload does not alias the datagram. Under load an M1 needs a cookie.
func (e *envelope) unwrap(now time.Time, d []byte, from netip.AddrPort,
	load bool) (*message, fault) {
	if len(d) < headerSize+2*macSize || len(d) > maxDatagram ||
		d[0] < kindM1 || d[0] > kindCookie || d[1] != wireVersion || d[2] != byte(e.suite) {
		return nil, faultForm
	}
	body := d[:len(d)-2*macSize]
	if !hmac.Equal(mac1(e.in, body), d[len(body):len(body)+macSize]) {
		return nil, faultMAC
	}
	if load && d[0] == kindM1 && !e.jar.knows(now, d, from) {
		return nil, faultLoad
	}
	index, count := int(d[3]>>4), int(d[3]&15)+1
	part := append([]byte(nil), body[headerSize:]...)
	last := index == count-1
	if index >= count || count > maxFragments || !last && len(part) != maxFragment ||
		count > 1 && len(part) == 0 {
		return nil, faultForm
	}
	receiver := binary.BigEndian.Uint32(d[12:])
	if count == 1 {
		return &message{kind: d[0], receiver: receiver, payload: part}, faultNone
	}
	a := e.assembly(now, d[0], [8]byte(d[4:12]), receiver, count)
	a.parts[index] = part
	return a.whole(), faultNone
}

// assembly finds the buffer of a message, or takes the free or oldest one.
func (e *envelope) assembly(now time.Time, kind byte, id [8]byte, receiver uint32,
	count int) *assembly {
	oldest := &e.pieces[0]
	for i := range e.pieces {
		a := &e.pieces[i]
		if a.until.Before(now) {
			*a = assembly{}
		} else if a.id == id && a.kind == kind && a.receiver == receiver && a.count == count {
			return a
		}
		if a.until.Before(oldest.until) {
			oldest = a
		}
	}
	*oldest = assembly{id: id, kind: kind, receiver: receiver, count: count,
		until: now.Add(bufferLives)}
	return oldest
}

// whole returns the message when all parts are there, and frees the buffer.
func (a *assembly) whole() *message {
	var payload []byte
	for _, p := range a.parts[:a.count] {
		if p == nil {
			return nil
		}
		payload = append(payload, p...)
	}
	m := &message{kind: a.kind, receiver: a.receiver, payload: payload}
	*a = assembly{}
	if len(payload) > maxMessage {
		return nil
	}
	return m
}
