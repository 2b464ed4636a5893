package enrol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func sampleToken() *Token {
	t := newToken("tokyo", "kochi", time.Unix(1795000000, 0))
	t.Address = netip.MustParseAddrPort("[2001:db8::1]:8447")
	t.Pin[3], t.Fingerprint[5] = 1, 2
	return t
}

func TestToken(t *testing.T) {
	tok := sampleToken()
	got, err := ParseToken(tok.Text())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(*tok, *got, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
		t.Error(d)
	}
	text := tok.Text()
	for i := range text {
		bad := []byte(text)
		bad[i] ^= 1
		if _, err := ParseToken(string(bad)); !errors.Is(err, ErrToken) {
			t.Errorf("character %d changed: %v", i, err)
		}
	}
	for _, bad := range []string{"", tokenPrefix, text[1:], text + "A", text[:len(text)-4], text + "\n", strings.Repeat("q", 9999)} {
		if _, err := ParseToken(bad); !errors.Is(err, ErrToken) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
	js, _ := json.Marshal(struct{ T fmt.Stringer }{tok})
	for _, shown := range []string{fmt.Sprintf("%v %+v %#v %x %s %q", tok, tok, tok, tok, tok, tok), tok.LogValue().String()} {
		if strings.Contains(shown, fmt.Sprintf("%x", tok.Secret[:4])) || strings.Contains(shown, fmt.Sprint(tok.Secret[:4])) {
			t.Errorf("the secret is shown: %s %s", shown, js)
		}
	}
}

func TestFingerprintByTelephone(t *testing.T) {
	tok := sampleToken()
	for _, heard := range []string{tok.Groups(), strings.ToUpper(tok.Groups()), strings.ReplaceAll(tok.Groups(), " ", ":"),
		" " + strings.ReplaceAll(tok.Groups(), " ", "") + "\n"} {
		if err := tok.CheckFingerprint(heard); err != nil {
			t.Errorf("%q: %v", heard, err)
		}
	}
	for _, heard := range []string{"", "yes", tok.Groups()[:38], tok.Groups() + " 00"} {
		if err := tok.CheckFingerprint(heard); !errors.Is(err, ErrFingerprint) {
			t.Errorf("%q: %v", heard, err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(sampleToken().Text())
	f.Add(newToken("a", "b", time.Unix(0, 0)).Text())
	f.Add(tokenPrefix + "AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ParseToken(text)
		if err != nil {
			if !errors.Is(err, ErrToken) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if tok.Text() != text {
			t.Fatal("a token of two forms")
		}
	})
}

func FuzzCard(f *testing.F) {
	h := newHome(f, "tokyo")
	inv := invite(f, h, terms)
	c, err := inv.card()
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		sig, err := h.sign.Sign(cardPurpose, text) // a site that may sign what it likes
		if err != nil {
			t.Fatal(err)
		}
		c, err := (&signedCard{Card: text, Signer: h.sign.Public(), Sig: sig}).open()
		if err != nil {
			if !errors.Is(err, ErrCard) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if strings.ContainsAny(c.Site+c.KME+c.SAE, "/\\ \n") {
			t.Fatalf("a name that becomes a path: %+v", c)
		}
	})
}

// FuzzFrame: whatever a stranger sends is a frame or an error, of bounded size.
func FuzzFrame(f *testing.F) {
	good := []byte(`{"kind":"join","body":"e30=","mac":"AA=="}`)
	f.Add(append([]byte{0, 0, 0, byte(len(good))}, good...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 'x'})
	f.Add([]byte{0, 0, 0, 2, '{', '}', '{', '}'})
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := readFrame(bytes.NewReader(text))
		if err != nil {
			return
		}
		if len(m.Body) > len(text) || strings.ContainsFunc(printable(m.Body), func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Fatal("a frame of more than was sent, or one that commands a terminal")
		}
		_ = m.into(kindJoin, &joinBody{})
	})
}

// FuzzUnseal: a file from a stick is opened whole or not at all.
func FuzzUnseal(f *testing.F) {
	tok := sampleToken()
	file, err := seal(tok, replyKind, &signedCard{Card: []byte("{}")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte("-----BEGIN QUIETLINE REPLY-----\n-----END QUIETLINE REPLY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var s signedCard
		err := unseal(tok, replyKind, text, &s)
		if err == nil && string(s.Card) != "{}" {
			t.Fatal("a file opens that nobody sealed")
		}
		if err != nil && !errors.Is(err, ErrCard) && !errors.Is(err, ErrSecret) {
			t.Fatalf("error of another kind: %v", err)
		}
	})
}
