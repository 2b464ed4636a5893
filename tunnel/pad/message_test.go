package pad

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/tunnel"
)

func messages() []message {
	b, other := boot{1, 2}, boot{3}
	return []message{
		{kind: kindHello, boot: b},
		{kind: kindReady, boot: b, of: other, block: 7},
		{kind: kindRefuse, boot: b, of: other, block: 7, reason: noKeys},
		{kind: kindAnnounce, boot: b, block: 1<<32 - 1, part: 2, parts: 3, keyLen: 32,
			ids: []tunnel.KeyID{{1}, {2}}},
		{kind: kindAnnounce, boot: b, block: 1, parts: 1, keyLen: 4096,
			ids: make([]tunnel.KeyID, maxIDs)},
	}
}

func TestMessages(t *testing.T) {
	for _, want := range messages() {
		b := want.append(nil)
		var got message
		if err := got.parse(b); err != nil {
			t.Errorf("%+v: %v", want, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(message{})); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if len(b) > 1184 {
			t.Errorf("%d bytes do not fit a path of 1280", len(b))
		}
		for n := range b {
			if err := got.parse(b[:n]); !errors.Is(err, ErrMessage) {
				t.Errorf("cut to %d: %v", n, err)
			}
		}
		if err := got.parse(append(b, 0)); !errors.Is(err, ErrMessage) {
			t.Errorf("longer: %v", err)
		}
	}
}

func TestMessagesRefused(t *testing.T) {
	good := messages()
	for name, bad := range map[string][]byte{
		"type 1": {1}, "type 20": append([]byte{20}, good[0].append(nil)[1:]...),
		"zero boot":    (&message{kind: kindHello}).append(nil),
		"zero block":   (&message{kind: kindReady, boot: boot{1}}).append(nil),
		"reason":       (&message{kind: kindRefuse, boot: boot{1}, block: 1, reason: 3}).append(nil),
		"part":         (&message{kind: kindAnnounce, boot: boot{1}, block: 1, parts: 2, part: 2, keyLen: 1, ids: good[3].ids}).append(nil),
		"no parts":     (&message{kind: kindAnnounce, boot: boot{1}, block: 1, keyLen: 1, ids: good[3].ids}).append(nil),
		"no key bytes": (&message{kind: kindAnnounce, boot: boot{1}, block: 1, parts: 1, ids: good[3].ids}).append(nil),
		"no keys":      (&message{kind: kindAnnounce, boot: boot{1}, block: 1, parts: 1, keyLen: 1}).append(nil),
	} {
		var m message
		if err := m.parse(bad); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, m := range messages() {
		f.Add(m.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		if err := m.parse(b); err != nil {
			return
		}
		if again := m.append(nil); !bytes.Equal(again, b) {
			t.Errorf("%x reads as %+v and prints as %x", b, m, again)
		}
	})
}
