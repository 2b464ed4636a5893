package node

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// exchange draws n keys at a and fetches them at b, which must give the same.
func exchange(t *testing.T, a, b *site, n int) {
	t.Helper()
	got, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: n})
	if err != nil {
		t.Fatal(err)
	}
	req := etsi014.IDRequest{Initiator: "sae-a"}
	for _, k := range got.Keys {
		req.IDs = append(req.IDs, k.ID)
	}
	twin, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b"}, req)
	if err != nil {
		t.Fatal(err)
	}
	for i := range twin.Keys {
		if !bytes.Equal(twin.Keys[i].Bits.Expose(), got.Keys[i].Bits.Expose()) {
			t.Fatal("keys differ")
		}
	}
}

// notes are the reasons of the audit log's notes, in order.
func notes(t *testing.T, s *site) (all []string) {
	t.Helper()
	for rec, err := range s.Audit(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			if c.Op == kms.OpNote {
				all = append(all, c.Reason)
			}
		}
	}
	return all
}

// TestMissedTurns: while the epoch file cannot be written the KME first calls
// for a person and then delivers nothing; both end with the next whole turn,
// and nothing is lost.
func TestMissedTurns(t *testing.T) {
	a, b := newPair(t, 4096)
	a.cfg.EpochTurn = 20 * time.Millisecond
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 300)
	exchange(t, a, b, 5)
	path := filepath.Join(a.cfg.Dir, epochFile)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	alarmed := func() bool {
		return slices.ContainsFunc(a.Stats().Alarms, func(s string) bool {
			return strings.Contains(s, "epoch does not turn")
		})
	}
	eventually(t, "alarm", alarmed)
	eventually(t, "stop of deliveries", func() bool {
		return errors.Is(a.Health(), kms.ErrErasure)
	})
	_, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 1})
	if !errors.Is(err, etsi014.ErrDown) || !errors.Is(err, kms.ErrErasure) {
		t.Errorf("draw: %v", err)
	}
	_, err = a.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.IDRequest{Initiator: "sae-b", IDs: make([]etsi014.KeyID, 1)})
	if !errors.Is(err, kms.ErrErasure) {
		t.Errorf("fetch: %v", err)
	}
	if n := strings.Count(strings.Join(a.Stats().Alarms, "\n"), "epoch does not turn"); n != 1 {
		t.Errorf("%d alarms, want 1", n)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "deliveries again", func() bool { return a.Health() == nil })
	exchange(t, a, b, 5)
}

// TestRootRotates: with keys in stock and turns going on, over a start with
// either root key, to the end where the one before opens nothing.
func TestRootRotates(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 300)
	before := a.cfg.RootKey
	after := before + ".next"
	if err := keyring.NewRootKey(after); err != nil {
		t.Fatal(err)
	}
	next, err := keyring.ReadRootKey(after)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Clear()
	if adopted, err := a.AdoptRoot(t.Context(), next); adopted || !errors.Is(err, kms.ErrRootKey) {
		t.Errorf("AdoptRoot before it was admitted: %v, %v", adopted, err)
	}
	if err := a.AdmitRoot(t.Context(), next, false); err != nil {
		t.Fatal(err)
	}
	other := secret.Copy(bytes.Repeat([]byte{9}, keyring.KeySize))
	if err := a.AdmitRoot(t.Context(), other, false); !errors.Is(err, kms.ErrRotation) {
		t.Errorf("AdmitRoot of a third: %v", err)
	}
	if err := a.AdmitRoot(t.Context(), other, true); err != nil {
		t.Errorf("AdmitRoot of a third instead: %v", err)
	}
	if err := a.AdmitRoot(t.Context(), next, true); err != nil {
		t.Error(err)
	}
	exchange(t, a, b, 5)
	if adopted, err := a.AdoptRoot(t.Context(), next); err != nil || !adopted {
		t.Fatal(adopted, err)
	}
	exchange(t, a, b, 5)
	eventually(t, "record", func() bool { return slices.Contains(notes(t, a), kms.NoteRootRotated) })
	if all := notes(t, a); !slices.Contains(all, kms.NoteRootAdmitted) {
		t.Errorf("notes %q", all)
	}
	a.stop(t)
	a.cfg.Links[0].Driver = newStream(1, 1, 4096)
	if n, err := Open(a.cfg); !errors.Is(err, kms.ErrRootKey) {
		if err == nil {
			n.Close()
		}
		t.Fatalf("the root key before: %v", err)
	}
	a.cfg.RootKey = after
	a.cfg.Links[0].Driver = newStream(1, 9, 4096)
	a.start(t)
	a.stored(t, "sae-a", "sae-b", 100)
	exchange(t, a, b, 5)
}

// TestRootGivenAtOpen: the key itself instead of a file.
func TestRootGivenAtOpen(t *testing.T) {
	a, _ := newPair(t, 4096)
	root, err := keyring.ReadRootKey(a.cfg.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	a.cfg.Root, a.cfg.RootKey = root, "nowhere"
	a.start(t)
	root.Clear()
	if err := a.Note(t.Context(), kms.NoteUnsealed, 1); err != nil {
		t.Fatal(err)
	}
	if all := notes(t, a); !slices.Contains(all, kms.NoteUnsealed) {
		t.Errorf("notes %q, want the one that was said to be durable", all)
	}
}

// TestWrongRootDestroysNothing: a start with another root key is refused in one
// line and leaves the epoch keys alone; with the right one the stock is there.
func TestWrongRootDestroysNothing(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 300)
	exchange(t, a, b, 5)
	a.stop(t)
	read := func() []byte {
		epochs, err := os.ReadFile(filepath.Join(a.cfg.Dir, epochFile))
		if err != nil {
			t.Fatal(err)
		}
		return epochs
	}
	epochs := read()
	right := a.cfg.RootKey
	a.cfg.RootKey += ".other"
	if err := keyring.NewRootKey(a.cfg.RootKey); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		a.cfg.Links[0].Driver = newStream(1, 1, 4096)
		_, err := Open(a.cfg)
		if !errors.Is(err, kms.ErrRootKey) || !strings.Contains(err.Error(), "the stock is as it was") ||
			strings.Contains(err.Error(), "\n") {
			t.Fatalf("another root key: %v", err)
		}
	}
	if !bytes.Equal(read(), epochs) {
		t.Error("the epoch keys changed")
	}
	a.cfg.RootKey = right
	a.cfg.Links[0].Driver = newStream(1, 9, 4096)
	a.start(t)
	a.stored(t, "sae-a", "sae-b", 200)
	exchange(t, a, b, 5)
}
