package boltstore

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
	"github.com/quietline/quietline/kms/storetest"
)

// image is what the disk holds of a store at some moment.
type image struct{ db, journal []byte }

func takeImage(t *testing.T, path string) (im image) {
	t.Helper()
	var err error
	if im.db, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if im.journal, err = os.ReadFile(journalPath(path)); err != nil {
		t.Fatal(err)
	}
	return im
}

// put writes the image into a folder of its own and returns the database.
func (im image) put(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kms.db")
	im.write(t, path)
	return path
}

func (im image) write(t *testing.T, path string) {
	t.Helper()
	for name, data := range map[string][]byte{path: im.db, journalPath(path): im.journal} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

const drawn = kms.LinkID("l")

var (
	drawnID = kms.SegmentID{Link: drawn, Generation: 1, Number: 1}
	session = kms.Session{5}
)

// openedSegment are the changes that make one of 1,024 slots, granted whole.
func openedSegment(id kms.SegmentID) []kms.Change {
	return []kms.Change{
		{Op: kms.OpIngest, Segment: id, Meta: kms.Segment{ID: id, State: kms.StateNew,
			BlockBytes: 32816, SlotBytes: 32, Slots: 1024, Owner: storetest.Self},
			Sealed: kms.Sealed{Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}},
				Slots: bytes.Repeat([]byte{7}, 1024*48)}},
		{Op: kms.OpConfirm, Segment: id}, {Op: kms.OpOpen, Segment: id, Session: session},
		{Op: kms.OpGrant, Segment: id, Session: session, Grant: kms.Grant{Slots: 1024, SizeBits: 256,
			Initiator: "sae-a", Targets: []etsi014.SAEID{"sae-b"}}}}
}

func drawOf(id kms.SegmentID, slot int) kms.Change {
	return kms.Change{Op: kms.OpClaim, Segment: id, Session: session, First: slot, Slots: 1,
		Role: kms.RoleInitiator, SAE: "sae-a"}
}

// journalOf makes a store with n claims in its journal and returns it open,
// with the fence.
func journalOf(t *testing.T, path string, n int) (*Store, kms.Fence) {
	t.Helper()
	s := openAt(t, path, Options{})
	t.Cleanup(func() { _ = s.Close() })
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	commit := func(changes ...kms.Change) {
		t.Helper()
		if _, err := s.Commit(t.Context(), l.Fence, changes); err != nil {
			t.Fatal(err)
		}
	}
	commit(openedSegment(drawnID)...)
	for i := range n {
		commit(drawOf(drawnID, i))
	}
	return s, l.Fence
}

// drawnAt opens a store, checks its log, and counts the slots drawn; the log
// must tell of the same ones.
func drawnAt(t *testing.T, path string) int {
	t.Helper()
	s := openAt(t, path, Options{})
	defer s.Close()
	logged := map[int]bool{}
	for rec, err := range s.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			for i := range c.Slots * btoi(c.Op == kms.OpClaim) {
				logged[c.First+i] = true
			}
		}
	}
	_, claims, err := s.Load(t.Context(), drawnID)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := range 1024 {
		claimed := len(claims) > 0 && claims[0].Get(i)
		if claimed != logged[i] {
			t.Fatalf("slot %d: claimed %v, in the log %v", i, claimed, logged[i])
		}
		n += btoi(claimed)
	}
	return n
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestKilled: a process that ends without Close has everything it committed,
// and may end so again and again.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	journalOf(t, path, 20)
	im := takeImage(t, path)
	for range 3 {
		again := im.put(t)
		if n := drawnAt(t, again); n != 20 {
			t.Errorf("%d of 20 claims are there", n)
		}
		if n := drawnAt(t, again); n != 20 {
			t.Errorf("%d of 20 claims are there after a second start", n)
		}
	}
}

// join is the first file up to a byte and the second from there on.
func join(first, second []byte, at int) []byte {
	return append(bytes.Clone(first[:at]), second[at:]...)
}

// TestTornRecord: the last record reached the disk in part. It does not count,
// all before it do, and the store goes on.
func TestTornRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s, fence := journalOf(t, path, 9)
	before := takeImage(t, path)
	at := s.journal.at
	if _, err := s.Commit(t.Context(), fence, []kms.Change{drawOf(drawnID, 9)}); err != nil {
		t.Fatal(err)
	}
	after := takeImage(t, path)
	length := int(s.journal.at - at)
	for cut := 0; cut <= length; cut += 41 {
		for name, torn := range map[string][]byte{
			"its end missing":   join(after.journal, before.journal, int(at)+cut),
			"its start missing": join(before.journal, after.journal, int(at)+cut),
		} {
			im := image{after.db, torn}
			want := 9 + btoi(bytes.Equal(torn, after.journal))
			again := im.put(t)
			if n := drawnAt(t, again); n != want {
				t.Errorf("%s at byte %d: %d claims, want %d", name, cut, n, want)
			}
			s := openAt(t, again, Options{})
			l, err := s.Lease(t.Context(), "", 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Commit(t.Context(), l.Fence, []kms.Change{drawOf(drawnID, 20)}); err != nil {
				t.Errorf("claim afterwards: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestDamagedRecord: a byte of a record that others follow is another. That is
// no torn write, and what it told may not be forgotten.
func TestDamagedRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s, _ := journalOf(t, path, 9)
	im := takeImage(t, path)
	first := sectors(int(s.journal.at)/9 - sector) // about one record
	for at := int64(0); at < first-sector; at += 13 {
		bad := image{im.db, bytes.Clone(im.journal)}
		bad.journal[at] ^= 4
		again := bad.put(t)
		s, err := Open(again, storetest.Self, Options{})
		if err == nil { // only what fills the sector up
			s.Close()
			if n := drawnAt(t, again); n != 9 {
				t.Errorf("byte %d: %d claims of 9, and no error", at, n)
			}
			continue
		}
		if !errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), journalPath(again)) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("byte %d: %v, want one line with the journal's name", at, err)
		}
	}
}

// TestParted: database and journal belong together.
func TestParted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s, fence := journalOf(t, path, 3)
	early := takeImage(t, path)
	if _, err := s.Lease(t.Context(), "", 0); err != nil { // empties the journal
		t.Fatal(err)
	}
	fence++
	for i := range 3 {
		if _, err := s.Commit(t.Context(), fence, []kms.Change{drawOf(drawnID, 3+i)}); err != nil {
			t.Fatal(err)
		}
	}
	late := takeImage(t, path)
	other := filepath.Join(t.TempDir(), "kms.db")
	journalOf(t, other, 3)
	strange := takeImage(t, other)
	for name, c := range map[string]struct {
		im   image
		text string
	}{
		"an older database":        {image{early.db, late.journal}, "is missing and record"},
		"no database":              {image{nil, late.journal}, "its journal stands"},
		"a journal cut short":      {image{late.db, late.journal[:journalSize-1]}, "can be read"},
		"an empty journal":         {image{late.db, nil}, "can be read"},
		"another store's journal":  {image{late.db, strange.journal}, ""},
		"an older journal":         {image{late.db, early.journal}, ""},
		"both of them, both older": {early, ""},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			again := c.im.put(t)
			s, err := Open(again, storetest.Self, Options{})
			if err == nil {
				s.Close()
			}
			if c.text == "" && err == nil {
				drawnAt(t, again) // whole in itself, but older: peers tell
				return
			}
			if c.text == "" || !errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), c.text) ||
				strings.Contains(err.Error(), "\n") {
				t.Errorf("Open: %v, want one line with %q", err, c.text)
			}
		})
	}
	for _, name := range []string{path, journalPath(path)} {
		again := late.put(t)
		gone := filepath.Join(filepath.Dir(again), filepath.Base(name))
		if err := os.Remove(gone); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(again, storetest.Self, Options{}); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("without %s: %v, want ErrCorrupt", filepath.Base(name), err)
		}
		if _, err := os.Stat(gone); err == nil {
			t.Errorf("%s was made anew", filepath.Base(name))
		}
	}
}

// TestMustExist: a store that other files tell of is not made anew.
func TestMustExist(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	_, err := Open(path, storetest.Self, Options{MustExist: true})
	if !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("Open of nothing: %v, want ErrCorrupt", err)
	}
	openAt(t, path, Options{}).Close()
	openAt(t, path, Options{MustExist: true}).Close()
}

// TestFirstOpenInterrupted: power went before the journal was whole.
func TestFirstOpenInterrupted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	openAt(t, path, Options{}).Close()
	for _, size := range []int64{-1, 0, 4096} {
		if err := os.Truncate(journalPath(path), max(size, 0)); err != nil {
			t.Fatal(err)
		}
		if size < 0 {
			if err := os.Remove(journalPath(path)); err != nil {
				t.Fatal(err)
			}
		}
		openAt(t, path, Options{}).Close()
	}
}

// TestJournalFills: commits go on over many rounds, small ones and ones that
// are larger than the whole journal, and the log stays whole for readers
// before and after a restart.
func TestJournalFills(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	note := kms.Change{Op: kms.OpNote, SAE: "sae-a", Reason: strings.Repeat("r", 60_000)}
	rounds, at := 0, int64(0)
	var want kms.Position
	for i := range 60 {
		n := 1 + i%3
		if i == 30 {
			n = 20 // 1.2 MB
		}
		changes := make([]kms.Change, n)
		for j := range changes {
			changes[j] = note
			changes[j].Count = uint64(j)
		}
		if want, err = s.Commit(t.Context(), l.Fence, changes); err != nil {
			t.Fatal(err)
		}
		if s.journal.at <= at {
			rounds++
		}
		at = s.journal.at
		if i%7 == 0 {
			if end, err := audit.Verify(s.Scan(t.Context(), 0)); err != nil || end != want {
				t.Fatalf("commit %d: the log ends at %d of %d: %v", i, end.Length, want.Length, err)
			}
			for from := range want.Length {
				for rec, err := range s.Scan(t.Context(), from) {
					if err != nil || rec.Position.Length != from+1 {
						t.Fatalf("scan from %d begins at %d: %v", from, rec.Position.Length, err)
					}
					break
				}
			}
		}
	}
	if rounds < 4 {
		t.Errorf("the journal was emptied %d times: the test cannot fail", rounds)
	}
	s.Close()
	s = openAt(t, path, Options{})
	defer s.Close()
	if end, err := audit.Verify(s.Scan(t.Context(), 0)); err != nil || end != want {
		t.Errorf("the log ends at %d of %d: %v", end.Length, want.Length, err)
	}
}

// TestOpenReadSeesTheJournal: a log is read whole from what a killed KME left,
// names too, and nothing is written.
func TestOpenReadSeesTheJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s, _ := journalOf(t, path, 5)
	im := takeImage(t, path)
	want := s.position
	again := im.put(t)
	r, err := OpenRead(again, storetest.Self)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for rec, err := range r.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			if c.Op == kms.OpClaim && c.SAE != "sae-a" {
				t.Errorf("record %d does not name its SAE", rec.Position.Length)
			}
		}
		if n++; rec.Position.Length == want.Length && rec.Position != want {
			t.Error("the last record is another")
		}
	}
	if n != int(want.Length) {
		t.Errorf("%d records, want %d", n, want.Length)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if now := takeImage(t, again); !bytes.Equal(now.db, im.db) ||
		!bytes.Equal(now.journal, im.journal) {
		t.Error("reading changed a file")
	}
}

// FuzzJournal: no bytes make the reader panic or read a record that was not
// written.
func FuzzJournal(f *testing.F) {
	j := journal{last: mark{number: 4}}
	for _, body := range []string{"", "one", strings.Repeat("x", 600)} {
		b := append(j.begin(), body...)
		b[journalHead-1], b[journalHead-2] = byte(len(body)), byte(len(body)>>8)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, body, ok := parseJournal(b); ok && len(body)+journalOver > len(b) {
			t.Error("a body longer than what it was read from")
		}
		for w, err := range writes(b) {
			if err == nil && len(w.at) == 0 {
				t.Error("a write to nowhere")
			}
		}
	})
}
