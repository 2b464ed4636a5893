//go:build linux

package boltstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
	"github.com/quietline/quietline/kms/powercut"
	"github.com/quietline/quietline/kms/storetest"
)

func TestMain(m *testing.M) {
	powercut.Main()
	os.Exit(m.Run())
}

// TestPowerCut cuts one disk again and again under load: what was acknowledged
// is claimed and in the log, whatever the disk made of its last writes.
func TestPowerCut(t *testing.T) {
	cuts := 10
	if os.Getenv("QUIETLINE_LONG") != "" {
		cuts = 500
	}
	if lost, loss := cutAgain(t, cuts, Options{}); lost != 0 || loss.Unflushed == 0 {
		t.Errorf("%d acknowledged claims lost; blocks in the caches %+v", lost, loss)
	}
}

// TestPowerCutFindsMissingFlush: the same test catches a journal that is not
// flushed.
func TestPowerCutFindsMissingFlush(t *testing.T) {
	if lost, _ := cutAgain(t, 3, Options{noFlush: true}); lost == 0 {
		t.Error("no claim was lost without a flush: the test cannot fail")
	}
}

// cutAgain returns how many acknowledged claims were lost.
func cutAgain(t *testing.T, cuts int, opts Options) (lost int, total powercut.Loss) {
	d := powercut.New(t, 128<<20, time.Millisecond)
	path := filepath.Join(d.Dir(), "kms.db")
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	all := 0
	for cut := range cuts {
		s := openAt(t, path, opts)
		id := kms.SegmentID{Link: drawn, Generation: 1, Number: uint64(cut + 1)}
		acked, cutNow := claimUntilError(t, s, id, 1+rng.IntN(100))
		<-cutNow
		time.Sleep(time.Duration(rng.Int64N(int64(4 * time.Millisecond)))) // any moment of a commit
		loss, err := d.Cut([]float64{0, 0.25, 0.5, 0.75, 1}[rng.IntN(5)], rng.Uint64())
		if err != nil {
			t.Fatalf("seed %d, cut %d: %v", seed, cut, err)
		}
		slots := acked()
		_ = s.Close()
		s, err = Open(path, storetest.Self, opts)
		if err != nil {
			if opts.noFlush { // that is a way of finding it, too
				return len(slots), total
			}
			t.Fatalf("seed %d, cut %d: %v", seed, cut, err)
		}
		if _, err := audit.Verify(s.Scan(t.Context(), 0)); err != nil {
			t.Errorf("seed %d, cut %d: %v", seed, cut, err)
		}
		_, claims, err := s.Load(t.Context(), id)
		if err != nil {
			t.Errorf("seed %d, cut %d: %v", seed, cut, err)
		}
		for _, slot := range slots {
			if len(claims) == 0 || !claims[0].Get(slot) {
				lost++
			}
		}
		if err := s.Close(); err != nil {
			t.Errorf("seed %d, cut %d: %v", seed, cut, err)
		}
		all += len(slots)
		total.Unflushed += loss.Unflushed
		total.Written += loss.Written
		total.Torn += loss.Torn
	}
	t.Logf("%d cuts, %d acknowledged claims, %d lost; blocks in the caches %+v", cuts, all, lost,
		total)
	return lost, total
}

// claimUntilError draws the slots of a new segment one by one from several
// goroutines until the disk fails. The channel closes after enough answers;
// the function waits and tells the slots that were acknowledged.
func claimUntilError(t *testing.T, s *Store, id kms.SegmentID, enough int) (func() []int,
	<-chan struct{}) {
	t.Helper()
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), l.Fence, openedSegment(id)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var acked []int
	var next atomic.Int64
	done := make(chan struct{})
	end := sync.OnceFunc(func() { close(done) })
	for range 4 {
		wg.Go(func() {
			defer end() // a store that stops early ends the wait too
			for {
				slot := int(next.Add(1)) - 1
				if slot >= 1024 {
					return
				}
				if _, err := s.Commit(context.Background(), l.Fence,
					[]kms.Change{drawOf(id, slot)}); err != nil {
					return
				}
				mu.Lock()
				if acked = append(acked, slot); len(acked) == enough {
					end()
				}
				mu.Unlock()
			}
		})
	}
	return func() []int { wg.Wait(); return acked }, done
}

// TestEveryCallFails lets each single call that writes either of the two files
// fail, in both forms: the store says so and stops, and after a restart the log
// verifies and nothing acknowledged is lost.
func TestEveryCallFails(t *testing.T) {
	files := map[string]*powercut.File{"kms.db": powercut.NewFile(t),
		"kms.journal": powercut.NewFile(t)}
	opts := Options{OpenFile: func(path string, flag int, mode os.FileMode) (*os.File, error) {
		return os.OpenFile(files[filepath.Base(path)].Path(), flag, mode)
	}}
	fresh := func() string {
		for _, f := range files {
			arm(t, f, powercut.Fault{})
			if err := os.Truncate(f.Path(), 0); err != nil {
				t.Fatal(err)
			}
		}
		return filepath.Join(t.TempDir(), "kms.db")
	}
	met := 0
	for name, f := range files {
		for _, stored := range []bool{false, true} {
			for n := 1; ; n++ {
				path := fresh()
				arm(t, f, powercut.Fault{At: n, Stored: stored})
				acked, err := useOnce(t, path, opts)
				calls, cerr := f.Calls()
				if cerr != nil {
					t.Fatal(cerr)
				}
				failed := false
				for _, c := range calls {
					failed = failed || c.Failed
				}
				if !failed {
					if err != nil {
						t.Errorf("%s: no call failed, and yet: %v", name, err)
					}
					break
				}
				met++
				if err == nil {
					t.Errorf("%s, call %d, stored %v: the failure was not told", name, n, stored)
				}
				arm(t, f, powercut.Fault{})
				again, err := Open(path, storetest.Self, opts)
				if acked < 0 && err != nil {
					continue // a store that was never opened whole holds nothing
				}
				if err != nil {
					t.Errorf("%s, call %d, stored %v: open again: %v", name, n, stored, err)
					continue
				}
				if _, err := audit.Verify(again.Scan(t.Context(), 0)); err != nil {
					t.Errorf("%s, call %d, stored %v: %v", name, n, stored, err)
				}
				_, claims, _ := again.Load(t.Context(), drawnID)
				for slot := range acked {
					if len(claims) == 0 || !claims[0].Get(slot) {
						t.Errorf("%s, call %d, stored %v: claim %d of %d is lost", name, n, stored,
							slot, acked)
					}
				}
				if err := again.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if met < 20 {
		t.Errorf("only %d calls were met: the test cannot fail", met)
	}
	t.Logf("%d calls failed", met)
}

func arm(t *testing.T, f *powercut.File, fault powercut.Fault) {
	t.Helper()
	if err := f.Arm(fault); err != nil {
		t.Fatal(err)
	}
}

// useOnce opens a store, uses it and closes it. It returns how many claims
// were acknowledged, -1 if it could not be opened, and the first error. After
// an error the store must have stopped.
func useOnce(t *testing.T, path string, opts Options) (acked int, err error) {
	s, err := Open(path, storetest.Self, opts)
	if err != nil {
		return -1, err
	}
	defer func() {
		if cerr := s.Close(); err == nil {
			err = cerr
		}
	}()
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		return 0, err
	}
	commit := func(changes ...kms.Change) bool {
		if err != nil {
			return false
		}
		if _, err = s.Commit(t.Context(), l.Fence, changes); err == nil {
			return true
		}
		if kms.Refused(err) {
			t.Errorf("a failing disk is told as a refusal: %v", err)
		}
		if _, serr := s.Commit(t.Context(), l.Fence, changes); !errors.Is(serr, kms.ErrStopped) {
			t.Errorf("the store goes on after %v: %v", err, serr)
		}
		return false
	}
	commit(openedSegment(drawnID)...)
	for slot := range 3 {
		acked += btoi(commit(drawOf(drawnID, slot)))
	}
	commit(openedSegment(kms.SegmentID{Link: drawn, Generation: 1, Number: 2})...)
	acked += btoi(commit(drawOf(drawnID, 3)))
	return acked, err
}

// TestFullDisk: on a file system without a free block, blocks are refused with
// what to do, and claims, voids and turns go on; with room again, all does.
func TestFullDisk(t *testing.T) {
	dir := tmpfs(t, 32<<20)
	path := filepath.Join(dir, "kms.db")
	s := openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	commit := func(changes ...kms.Change) error {
		_, err := s.Commit(t.Context(), l.Fence, changes)
		return err
	}
	must := func(changes ...kms.Change) {
		t.Helper()
		if err := commit(changes...); err != nil {
			t.Fatal(err)
		}
	}
	id := func(n int) kms.SegmentID {
		return kms.SegmentID{Link: drawn, Generation: 1, Number: uint64(n)}
	}
	for n := 1; n <= 20; n++ {
		if err := s.Room(1024 * 48); err != nil {
			t.Fatal(err)
		}
		must(openedSegment(id(n))...)
	}
	ballast := fill(t, filepath.Join(dir, "ballast"))
	n := 21
	for ; s.Room(1024*48) == nil && n < 1000; n++ {
		must(openedSegment(id(n))...)
	}
	if err := s.Room(1024 * 48); !errors.Is(err, kms.ErrSpace) ||
		!strings.Contains(err.Error(), "KiB") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("Room on a full disk: %v, want ErrSpace in one line", err)
	}
	for ; commit(openedSegment(id(n))...) == nil && n < 1000; n++ { // who does not ask
	}
	if err := commit(openedSegment(id(n))...); !errors.Is(err, kms.ErrSpace) || !kms.Refused(err) {
		t.Fatalf("a block on a full disk: %v, want the refusal ErrSpace", err)
	}
	for slot := range 1000 { // more than the journal holds
		for seg := 1; seg <= 4; seg++ {
			must(drawOf(id(seg), slot))
		}
	}
	must(kms.Change{Op: kms.OpVoid, Segment: id(5), Reason: "test"})
	turn := []kms.Change{}
	for seg := 1; seg < n; seg++ {
		c := kms.Change{Op: kms.OpRewrap, Segment: id(seg),
			Key: kms.Wrapped{Epoch: 2, Bytes: []byte{2}}}
		if seg <= 4 {
			c = kms.Change{Op: kms.OpReseal, Segment: id(seg), Sealed: kms.Sealed{
				Key: kms.Wrapped{Epoch: 2, Bytes: []byte{2}}, Slots: make([]byte, 1024*48)}}
		}
		if seg != 5 {
			turn = append(turn, c)
		}
	}
	must(append(turn, kms.Change{Op: kms.OpTurn, Epoch: 2})...)
	if err := commit(openedSegment(id(n))...); !kms.Refused(err) {
		t.Errorf("a block after all that: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := s.Room(1024 * 48); err != nil {
		t.Errorf("Room with room: %v", err)
	}
	next := openedSegment(id(n))
	next[0].Sealed.Key.Epoch = 2
	must(next...)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, path, Options{})
	defer s.Close()
	if _, err := audit.Verify(s.Scan(t.Context(), 0)); err != nil {
		t.Error(err)
	}
}

// tmpfs is a small file system of its own.
func tmpfs(t *testing.T, size int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes every free block.
func fill(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for buf := make([]byte, 64<<10); ; {
		if _, err := f.Write(buf); errors.Is(err, syscall.ENOSPC) {
			return path
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
