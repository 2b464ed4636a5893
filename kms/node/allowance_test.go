package node

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
)

// TestReserveHolds: over a real pair, whatever a hungry SAE asks for at once,
// the line's SAE gets all the keys that are reserved for it; and a target with
// a re-read window gets them a second time, under its certificate alone.
func TestReserveHolds(t *testing.T) {
	const reserve = 100
	a, b := newPair(t, 4096)
	a.cfg.Limits.Allowances = map[etsi014.SAEID]kms.Allowance{"sae-a": {Reserve: reserve}}
	b.cfg.Limits.Allowances = map[etsi014.SAEID]kms.Allowance{"sae-b": {Reread: time.Minute}}
	startPair(t, a, b)
	for _, s := range []*site{a, b} {
		s.driver.allow(9)
	}
	a.stored(t, "sae-a", "sae-b", 400)
	draw := func(who etsi014.SAEID, n, bits int) (etsi014.Container, error) {
		return a.KME().Keys(t.Context(), etsi014.Caller{SAE: who},
			etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: n, SizeBits: bits})
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	var wg sync.WaitGroup
	for range 6 {
		n, bits := 1+r.IntN(64), 64*(1+r.IntN(16))
		wg.Go(func() {
			for ; n > 0; n /= 2 {
				for {
					keys, err := draw("sae-a2", n, bits)
					keys.Clear()
					if errors.Is(err, kms.ErrReserve) {
						break
					} else if err != nil {
						t.Errorf("seed %d: hungry: %v", seed, err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if st := a.Stats(); st.KeysDrawn == 0 || st.Refused == 0 {
		t.Errorf("seed %d: the hungry drew %d keys and was refused %d times", seed, st.KeysDrawn,
			st.Refused)
	}
	req := etsi014.IDRequest{Initiator: "sae-a"}
	for i := range reserve {
		keys, err := draw("sae-a", 1, 256)
		if err != nil {
			t.Fatalf("seed %d: key %d of the reserve: %v", seed, i, err)
		}
		req.IDs = append(req.IDs, keys.Keys[0].ID)
	}
	fetch := func(cert byte) ([]string, error) {
		got, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b", Cert: [32]byte{cert}}, req)
		var keys []string
		for _, k := range got.Keys {
			keys = append(keys, string(k.Bits.Expose()))
		}
		got.Clear()
		return keys, err
	}
	first, err := fetch(1)
	if err != nil {
		t.Fatal(err)
	}
	again, err := fetch(1)
	if err != nil {
		t.Fatalf("within the window: %v", err)
	}
	for i := range first {
		if first[i] != again[i] {
			t.Errorf("key %d has other bytes the second time", i)
		}
	}
	if _, err := fetch(2); !errors.Is(err, etsi014.ErrUnknownKey) {
		t.Errorf("another certificate: %v, want ErrUnknownKey", err)
	}
	b.KME().Forget()
	if _, err := fetch(1); !errors.Is(err, etsi014.ErrUnknownKey) {
		t.Errorf("after the end: %v, want ErrUnknownKey", err)
	}
}

// TestRemarksAreAudited: refused calls and keys given again stand in the audit
// log as counts, at the end of the KME at the latest.
func TestRemarksAreAudited(t *testing.T) {
	a, b := newPair(t, 4096)
	b.cfg.Limits.Allowances = map[etsi014.SAEID]kms.Allowance{"sae-b": {Reread: time.Minute}}
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 2)
	got, err := a.drawOne(t)
	if err != nil {
		t.Fatal(err)
	}
	who := etsi014.Caller{SAE: "sae-b", Cert: [32]byte{1}}
	for range 3 {
		if _, err := b.KME().KeysByID(t.Context(), who, etsi014.IDRequest{Initiator: "sae-a",
			IDs: []etsi014.KeyID{got.Keys[0].ID}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b2"}, etsi014.IDRequest{
		Initiator: "sae-a", IDs: []etsi014.KeyID{got.Keys[0].ID}}); err == nil {
		t.Fatal("a stranger got the key")
	}
	b.KME().Forget()
	b.stop(t)
	store, err := boltstore.Open(filepath.Join(b.cfg.Dir, StoreFile), "kme-b", boltstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	notes := map[string]uint64{}
	for rec, err := range store.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			if c.Op == kms.OpNote && c.Count > 0 {
				notes[c.Reason] += c.Count
			}
		}
	}
	if notes[kms.NoteReread] != 2 {
		t.Errorf("notes of keys given again: %d, want 2", notes[kms.NoteReread])
	}
	refused := uint64(0)
	for reason, n := range notes {
		if strings.HasPrefix(reason, "refused: ") {
			refused += n
		}
	}
	if refused != 1 {
		t.Errorf("%v: %d refused calls, want 1", notes, refused)
	}
}
