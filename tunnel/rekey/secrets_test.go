package rekey

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// TestLateAnswersAreWiped: the machine ignores an answer that nobody waits
// for and wipes its keys.
func TestLateAnswersAreWiped(t *testing.T) {
	w := upLine(t, QKDStrict, nil)
	for _, id := range []uint64{0, 1, 99} {
		key := tunnel.Key{Bits: secret.Copy([]byte("0123456789abcdef0123456789abcdef"))}
		raw := key.Bits.Expose()
		out := w.ends[0].m.Step(w.now, Input{Keys: &KeyAnswer{ID: id, Keys: []tunnel.Key{key}}})
		if !allZero(raw) || key.Bits.Len() != 0 || out.Install != nil {
			t.Errorf("answer %d is kept", id)
		}
	}
}

// TestSecretsAreHidden prints everything exported in every way and looks for
// the bytes.
func TestSecretsAreHidden(t *testing.T) {
	w := newWorld(1)
	var installed []*Epoch
	w.bent = func(e *end) {
		e.bend = func(o *Output) {
			if o.Install != nil {
				installed = append(installed, o.Install)
			}
		}
	}
	w.start(QKDStrict, nil)
	w.mustBeUp(t, time.Second)
	cfg := w.config(0, QKDStrict)
	secrets := [][]byte{cfg.LinkSecret.Expose(), cfg.StaticSeed.Expose()}
	for _, e := range installed {
		secrets = append(secrets, e.RecvKey.Expose(), e.SendKey.Expose(), e.RecvIV.Expose())
	}
	secrets = append(secrets, w.ends[0].m.chains[0].rk.Expose())
	things := []any{cfg, &cfg, w.ends[0].m, *w.ends[0].m, installed[0], *installed[0],
		Output{Install: installed[0]}, w.ends[0].m.State(), w.ends[0].m.Stats(),
		KeyAnswer{Keys: []tunnel.Key{{Bits: cfg.LinkSecret}}}}
	for _, x := range things {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
			text := fmt.Sprintf(verb, x)
			for _, s := range secrets {
				for _, form := range []string{string(s), fmt.Sprintf("%x", s), fmt.Sprint(s),
					strings.Trim(fmt.Sprintf("%#v", s), "[]byte{}")} {
					if strings.Contains(text, form) {
						t.Fatalf("%s of %T shows a secret", verb, x)
					}
				}
			}
		}
	}
	m := w.ends[0].m
	raw := [][]byte{m.cfg.LinkSecret.Expose(), m.cfg.StaticSeed.Expose(), m.chains[0].rk.Expose(),
		m.env.in.Expose()}
	m.Clear()
	for i, b := range raw {
		if len(b) == 0 || !allZero(b) {
			t.Errorf("Clear leaves secret %d", i)
		}
	}
	if out := m.Step(w.now.Add(time.Hour), Input{Rekey: true}); len(out.Datagrams) > 0 {
		t.Error("a cleared machine speaks")
	}
}

// TestSecretsAreCleared: when a handshake is over nothing of it is left.
func TestSecretsAreCleared(t *testing.T) {
	w := newWorld(1)
	w.start(QKDStrict, nil)
	e := w.scheduled()
	eph, ck := e.m.init.eph.Expose(), e.m.init.t.ck.Expose()
	var bits [][]byte
	w.mustBeUp(t, time.Second)
	if !allZero(eph) || !allZero(ck) {
		t.Error("ephemeral seed or chaining key of M1 is left")
	}
	for _, e := range w.ends {
		a := w.kme.answer(w, e.id, KeyRequest{New: 1, SizeBits: 256})
		bits = append(bits, a.Keys[0].Bits.Expose())
		e.m.answered(&a)
		if e.m.init != nil || len(e.m.pending) != 0 {
			t.Errorf("end %d holds a handshake that is over", e.id)
		}
	}
	for _, b := range bits {
		if !allZero(b) {
			t.Error("QKD key is left")
		}
	}
}
