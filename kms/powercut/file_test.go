//go:build linux

package powercut_test

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms/powercut"
)

func arm(t *testing.T, f *powercut.File, fault powercut.Fault) {
	t.Helper()
	if err := f.Arm(fault); err != nil {
		t.Fatal(err)
	}
}

// commits runs the load: each row a commit. It returns the acknowledged rows
// and the first error.
func commits(path string, first, rows uint64) (map[uint64]bool, error) {
	acked := map[uint64]bool{}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return acked, err
	}
	defer db.Close()
	for row := first; row < first+rows; row++ {
		if err := db.Update(func(tx *bbolt.Tx) error { return put(tx, row) }); err != nil {
			return acked, err
		}
		acked[row] = true
	}
	return acked, nil
}

// TestEveryCallCanFail makes each single call of a store's load fail, in turn
// and in both forms, and looks whether a commit acknowledged before or after
// is lost, and whether the failure was reported.
func TestEveryCallCanFail(t *testing.T) {
	const rows = 4
	probe := powercut.NewFile(t)
	if _, err := commits(probe.Path(), 0, rows); err != nil {
		t.Fatal(err)
	}
	all, err := probe.Calls()
	if err != nil {
		t.Fatal(err)
	}
	counted := 0
	seen := map[string]bool{}
	for _, c := range all {
		seen[c.Kind.String()] = true
		if c.Kind != powercut.Read {
			counted++
		}
	}
	if !seen["write"] || !seen["sync"] || !seen["truncate"] || counted < 3*rows {
		t.Fatalf("%d calls of %v recorded for %d commits", counted, seen, rows)
	}
	for _, stored := range []bool{false, true} {
		for at := 1; at <= counted; at++ {
			f := powercut.NewFile(t)
			arm(t, f, powercut.Fault{At: at, Stored: stored})
			acked, err := commits(f.Path(), 0, rows)
			if err == nil {
				t.Errorf("call %d failed (stored %v) and nobody said so", at, stored)
			}
			arm(t, f, powercut.Fault{})
			db, err := bbolt.Open(f.Path(), 0o600, nil)
			if err != nil { // allowed while nothing was acknowledged
				if len(acked) > 0 {
					t.Errorf("call %d (stored %v): %d acknowledged commits, then: %v",
						at, stored, len(acked), err)
				}
				continue
			}
			if lost, err := missing(db, acked); lost != 0 || err != nil {
				t.Errorf("call %d (stored %v): %d commits lost, check: %v", at, stored, lost, err)
			}
			_ = db.Close()
		}
	}
}

func TestFaultsByKind(t *testing.T) {
	f := powercut.NewFile(t)
	for _, c := range []struct {
		name  string
		fault powercut.Fault
		want  []error // of write, sync, truncate, write
	}{
		{"none", powercut.Fault{}, []error{nil, nil, nil, nil}},
		{"second write", powercut.Fault{At: 2, Kinds: powercut.Write},
			[]error{nil, nil, nil, syscall.EIO}},
		{"sync only", powercut.Fault{At: 1, Kinds: powercut.Sync},
			[]error{nil, syscall.EIO, nil, nil}},
		{"full disk", powercut.Fault{At: 1, Kinds: powercut.Write | powercut.Truncate,
			Errno: syscall.ENOSPC, Lasting: true},
			[]error{syscall.ENOSPC, nil, syscall.ENOSPC, syscall.ENOSPC}},
		{"from the second on", powercut.Fault{At: 2, Lasting: true},
			[]error{nil, syscall.EIO, syscall.EIO, syscall.EIO}},
	} {
		file, err := os.OpenFile(f.Path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		arm(t, f, c.fault)
		write := func() error { _, err := file.WriteAt([]byte("bytes"), 0); return err }
		for i, err := range []error{write(), file.Sync(), file.Truncate(100), write()} {
			if !errors.Is(err, c.want[i]) {
				t.Errorf("%s: call %d: %v, want %v", c.name, i+1, err, c.want[i])
			}
		}
		_ = file.Close()
	}
}

func TestStoredFaultLeavesTheBytes(t *testing.T) {
	for _, stored := range []bool{false, true} {
		f := powercut.NewFile(t)
		file, err := os.OpenFile(f.Path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		arm(t, f, powercut.Fault{At: 1, Stored: stored})
		if _, err := file.WriteAt([]byte("bytes"), 0); !errors.Is(err, syscall.EIO) {
			t.Errorf("write: %v, want EIO", err)
		}
		got, err := f.Calls()
		if err != nil {
			t.Fatal(err)
		}
		want := []powercut.Call{{Kind: powercut.Write, Bytes: 5, Failed: true}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("calls (-want +got):\n%s", diff)
		}
		_ = file.Close()
		if file, err = os.Open(f.Path()); err != nil { // a fresh look, past the page cache
			t.Fatal(err)
		}
		buf := make([]byte, 5)
		n, _ := file.Read(buf)
		if kept := string(buf[:n]) == "bytes"; kept != stored {
			t.Errorf("stored %v: the file holds %q", stored, buf[:n])
		}
		_ = file.Close()
	}
}

func TestReadsCanFail(t *testing.T) {
	f := powercut.NewFile(t)
	if err := os.WriteFile(f.Path(), make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	arm(t, f, powercut.Fault{At: 1, Kinds: powercut.Read, Lasting: true})
	if _, err := os.ReadFile(f.Path()); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	arm(t, f, powercut.Fault{})
	if b, err := os.ReadFile(f.Path()); err != nil || len(b) != 8192 {
		t.Errorf("read after the fault: %d bytes, %v", len(b), err)
	}
}
