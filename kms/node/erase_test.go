package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
)

// TestDeliveredKeysAreErased: one turn after delivery, nothing in the state
// folder of either site opens a delivered key, whatever old pages the store
// kept: every wrapping that is still in the files is tried under every epoch
// key that still is (I10).
func TestDeliveredKeysAreErased(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 300)
	var taken []etsi014.KeyID
	plain := map[string]bool{}
	draw := func(n int) {
		t.Helper()
		got, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
			etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: n})
		if err != nil {
			t.Fatal(err)
		}
		taken = taken[:0]
		for _, k := range got.Keys {
			taken = append(taken, k.ID)
			plain[string(k.Bits.Expose())] = true
		}
	}
	fetch := func() {
		t.Helper()
		if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b"},
			etsi014.IDRequest{Initiator: "sae-a", IDs: taken}); err != nil {
			t.Fatal(err)
		}
	}
	copies := map[kms.SegmentID][]kms.Sealed{} // what a thief of the disk had before
	keep(t, a, copies)
	draw(40) // part of a segment
	fetch()
	draw(50)
	fetch()
	draw(10) // drawn here, not yet fetched there
	wait := taken
	keep(t, a, copies)
	keep(t, b, copies)
	if n := openable(t, a.cfg, copies, plain); n < len(plain)/2 {
		t.Fatalf("positive control: only %d of %d delivered keys open before the turn", n, len(plain))
	}
	for _, s := range []*site{a, b} {
		if err := s.owner.ask(t.Context(), func(*peer.Machine) {
			if err := s.owner.turn(t.Context()); err != nil {
				t.Errorf("turn: %v", err)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	keep(t, a, copies)
	keep(t, b, copies)
	if n := openable(t, a.cfg, copies, plain); n != 0 {
		t.Errorf("%d delivered keys open at the initiator's site after a turn", n)
	}
	if n := openable(t, b.cfg, copies, plain); n != len(wait) {
		t.Errorf("%d keys open at the target's site after a turn, want the %d not yet fetched", n,
			len(wait))
	}
	taken = wait
	fetch() // what was kept is still there
	draw(20)
	fetch()
}

// keep copies the sealed slots of all live segments, as the disk shows them.
func keep(t *testing.T, s *site, copies map[kms.SegmentID][]kms.Sealed) {
	t.Helper()
	for number := range uint64(10) {
		id := kms.SegmentID{Link: "link", Generation: 1, Number: number}
		if sealed, _, err := s.store.Load(t.Context(), id); err == nil {
			copies[id] = append(copies[id], sealed)
		}
	}
}

// openable counts the keys of want that a thief could read with the state
// folder, the root key, and copies of all slots that ever stood on the disk.
func openable(t *testing.T, cfg Config, copies map[kms.SegmentID][]kms.Sealed,
	want map[string]bool) int {
	t.Helper()
	db, err := os.ReadFile(filepath.Join(cfg.Dir, StoreFile))
	if err != nil {
		t.Fatal(err)
	}
	journal, err := os.ReadFile(filepath.Join(cfg.Dir, "kms.journal"))
	if err != nil {
		t.Fatal(err)
	}
	db = append(db, journal...)
	root, err := keyring.ReadRootKey(cfg.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	for k := range want {
		if bytes.Contains(db, []byte(k)) {
			t.Errorf("a key stands in the store in clear")
		}
	}
	// Work on a copy of the epoch file, for opening it would tidy it up.
	keys, err := os.ReadFile(filepath.Join(cfg.Dir, epochFile))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for epoch := uint64(1); epoch < 5; epoch++ {
		path := filepath.Join(t.TempDir(), "epoch.keys")
		if err := os.WriteFile(path, keys, 0o600); err != nil {
			t.Fatal(err)
		}
		if ring, err := keyring.Open(path, root, epoch, false); err == nil {
			tryWrappings(ring, db, epoch, copies, want, found)
		}
	}
	return len(found)
}

// tryWrappings takes every byte string of the file that has the form of a
// wrapped data key and tries it on every copy of its segment's slots.
func tryWrappings(ring *keyring.Ring, db []byte, epoch uint64,
	copies map[kms.SegmentID][]kms.Sealed, want, found map[string]bool) {
	const wrapped = 12 + keyring.KeySize + keyring.TagSize
	head := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, epoch), wrapped)
	for at := 0; ; {
		i := bytes.Index(db[at:], head)
		if i < 0 || at+i+len(head)+wrapped > len(db) {
			return
		}
		at += i + len(head)
		w := kms.Wrapped{Epoch: epoch, Bytes: db[at : at+wrapped]}
		for id, all := range copies {
			for _, sealed := range all {
				o, err := ring.Opener(id, kms.Sealed{Key: w, Slots: sealed.Slots}, peer.SlotBytes)
				if err != nil {
					break // another segment's
				}
				for slot := range len(sealed.Slots) / (peer.SlotBytes + keyring.TagSize) {
					if k, err := o.Key(slot, 1, 256); err == nil && want[string(k.Expose())] {
						found[string(k.Expose())] = true
					}
				}
			}
		}
	}
}

// TestTurnsUnderLoad: epochs turn every few milliseconds while keys are drawn
// and fetched and blocks come in, and over a restart.
func TestTurnsUnderLoad(t *testing.T) {
	a, b := newPair(t, 4096)
	a.cfg.EpochTurn, b.cfg.EpochTurn = 3*time.Millisecond, 5*time.Millisecond
	startPair(t, a, b)
	a.driver.allow(60)
	b.driver.allow(60)
	a.stored(t, "sae-a", "sae-b", 2000)
	exchange := func(n int) {
		t.Helper()
		for range n {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			got, err := a.KME().Keys(ctx, etsi014.Caller{SAE: "sae-a"},
				etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 10})
			if err != nil {
				t.Fatal(err)
			}
			req := etsi014.IDRequest{Initiator: "sae-a"}
			for _, k := range got.Keys {
				req.IDs = append(req.IDs, k.ID)
			}
			twin, err := b.KME().KeysByID(ctx, etsi014.Caller{SAE: "sae-b"}, req)
			if err != nil {
				t.Fatal(err)
			}
			for i := range twin.Keys {
				if !bytes.Equal(twin.Keys[i].Bits.Expose(), got.Keys[i].Bits.Expose()) {
					t.Fatal("keys differ")
				}
			}
			cancel()
		}
	}
	exchange(60)
	if e := a.owner.ring.Epoch(); e < 5 {
		t.Errorf("only %d turns: the test means little", e)
	}
	addr := b.ListenAddr().String()
	b.stop(t)
	eventually(t, "a sees b go", func() bool { return !a.Stats().Peers[0].Up })
	b.cfg.Listen, b.driver = addr, newStream(1, 60, 4096)
	b.cfg.Links[0].Driver = b.driver
	b.start(t)
	a.stored(t, "sae-a", "sae-b", 500)
	exchange(20)
}

// TestRemovedLink: stock of a link that is no longer configured is void, and
// epochs turn without it.
func TestRemovedLink(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 300)
	a.stop(t)
	a.cfg.Links = nil
	a.start(t)
	for range 2 {
		if err := a.owner.ask(t.Context(), func(*peer.Machine) {
			if err := a.owner.turn(t.Context()); err != nil {
				t.Errorf("turn: %v", err)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	lease, err := a.store.Lease(t.Context(), "link", -1)
	if err != nil || len(lease.Segments) != 0 || lease.Ledger.Stored != 0 || lease.Ledger.Void == 0 {
		t.Errorf("%d segments left, ledger %+v, %v", len(lease.Segments), lease.Ledger, err)
	}
}
