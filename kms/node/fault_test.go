//go:build linux

package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/powercut"
)

// failing is a pair of KMEs of which the state files of a can fail: each is a
// link to a file whose calls are counted.
type failing struct {
	a, b  *site
	files map[string]*powercut.File
	next  uint64 // block number that a's device has not been rid of yet
	*journal
}

func newFailing(t *testing.T) *failing {
	t.Helper()
	f := &failing{files: map[string]*powercut.File{}, next: 1, journal: newJournal()}
	f.a, f.b = newPair(t, 4096)
	f.a.cfg.EpochTurn = 20 * time.Millisecond
	if err := os.MkdirAll(f.a.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f.b.start(t)
	f.a.cfg.Peers[0].Addr = f.b.ListenAddr().String()
	if err := f.live(t); err != nil { // it makes its files
		t.Fatal(err)
	}
	for _, name := range []string{StoreFile, "kms.journal", epochFile} {
		path := filepath.Join(f.a.cfg.Dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		f.files[name] = powercut.NewFile(t)
		if err := os.WriteFile(f.files[name].Path(), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(f.files[name].Path(), path); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// live lets a live for a number of deliveries, or until it stops; it returns
// why it did not open or why it stopped.
func (f *failing) live(t *testing.T) error {
	t.Helper()
	f.a.driver = newStream(1, f.next, 4096)
	f.a.driver.acked = func(seq uint64) { f.next = seq + 1 }
	f.a.cfg.Links[0].Driver = f.a.driver
	n, err := Open(f.a.cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	next := f.next // from now on the driver's
	go func() { ended <- n.Run(ctx) }()
	f.a.driver.allow(next + 3)
	f.b.driver.allow(next + 3)
	for i := range 8 {
		from, to, at := n.KME(), f.b.KME(), "a"
		if i%2 == 1 {
			from, to, at = to, from, "b"
		}
		if !f.deliver(t, n, from, to, at) {
			break
		}
	}
	// Let the epoch turn once more, so that each life has all that there is.
	for until := time.Now().Add(3 * f.a.cfg.EpochTurn); n.Health() == nil && time.Now().Before(until); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	err = <-ended
	if h := n.Health(); err != nil && !errors.Is(h, kms.ErrStopped) {
		t.Errorf("Run ended with %v and Health says %v", err, h)
	}
	if cerr := n.Close(); err == nil {
		err = cerr
	}
	return err
}

// deliver draws a key at one end and fetches it at the other; false: a is no
// longer there.
func (f *failing) deliver(t *testing.T, a *Node, from, to *kms.KME, at string) bool {
	t.Helper()
	draws, fetches := etsi014.SAEID("sae-a"), etsi014.SAEID("sae-b")
	if at == "b" {
		draws, fetches = fetches, draws
	}
	for until := time.Now().Add(20 * time.Second); ; {
		got, err := from.Keys(t.Context(), etsi014.Caller{SAE: draws},
			etsi014.KeyRequest{Targets: []etsi014.SAEID{fetches}, Number: 2})
		if err == nil {
			f.draw(etsi014.KMEID("kme-"+at), got.Keys)
			twin, err := to.KeysByID(t.Context(), etsi014.Caller{SAE: fetches},
				etsi014.IDRequest{Initiator: draws, IDs: []etsi014.KeyID{got.Keys[0].ID, got.Keys[1].ID}})
			if err == nil {
				f.fetch(twin.Keys)
			}
			return a.Health() == nil
		}
		if errors.Is(a.Health(), kms.ErrStopped) {
			return false
		}
		if time.Now().After(until) {
			t.Fatalf("no key at %s: %v; %+v", at, err, a.Stats().Peers)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestEveryCallFails lets each single call of a life of the KME fail, from its
// start on, in both forms: not done and done. A failed call on the store stops
// the KME with a line that names the cause, or keeps it from starting; one on
// the epoch keys may be made up for by the next turn. Whatever was acknowledged
// stands, nothing comes twice, and the next life serves. QUIETLINE_LONG=1 goes
// through all calls, else every third.
func TestEveryCallFails(t *testing.T) {
	stride := long(3, 1)
	f := newFailing(t)
	for name, file := range f.files {
		t.Run(name, func(t *testing.T) {
			stopped, went := 0, 0
			for at := 1; ; at += stride {
				fault := powercut.Fault{At: at, Stored: at/stride%2 == 1}
				hit := f.fail(t, file, fault, func(err error) {
					if err != nil {
						stopped++
						oneLine(t, name, fault, err)
					} else if went++; name != epochFile && fault.At <= f.calls(t, file) {
						t.Errorf("%s: call %d failed and the KME goes on", name, at)
					}
				})
				if !hit {
					break
				}
			}
			t.Logf("%d lives that stopped, %d that went on", stopped, went)
			if stopped+went < 3 {
				t.Error("too few calls to tell anything")
			}
		})
	}
	for _, fault := range f.faults {
		t.Error(fault)
	}
}

// fail runs one life with a fault and one without, which must serve. It tells
// whether the life came as far as the fault.
func (f *failing) fail(t *testing.T, file *powercut.File, fault powercut.Fault, see func(error)) bool {
	t.Helper()
	if err := file.Arm(fault); err != nil {
		t.Fatal(err)
	}
	err := f.live(t)
	see(err)
	hit := f.calls(t, file) >= fault.At
	if err := file.Arm(powercut.Fault{}); err != nil {
		t.Fatal(err)
	}
	before := len(f.drawn)
	if err := f.live(t); err != nil {
		t.Fatalf("life after %+v (%v): %v", fault, err, err)
	}
	if len(f.drawn) < before+8 {
		t.Fatalf("life after %+v: %d keys", fault, len(f.drawn)-before)
	}
	return hit
}

// calls counts those that a fault counts.
func (f *failing) calls(t *testing.T, file *powercut.File) (n int) {
	t.Helper()
	calls, err := file.Calls()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range calls {
		if c.Kind != powercut.Read {
			n++
		}
	}
	return n
}

func oneLine(t *testing.T, name string, fault powercut.Fault, err error) {
	t.Helper()
	if strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "input/output error") &&
		!strings.Contains(err.Error(), "no space left") {
		t.Errorf("%s, %+v: want one line with the disk's cause: %v", name, fault, err)
	}
}

// TestFullDisk: the disk of one KME is full from some call on, for all its
// files at once. It stops, or does without; nothing acknowledged is lost; with
// room again it serves.
func TestFullDiskUnderTheKME(t *testing.T) {
	f := newFailing(t)
	for at := 1; at <= long(21, 100); at += 4 {
		fault := powercut.Fault{At: at, Kinds: powercut.Write | powercut.Truncate,
			Errno: syscall.ENOSPC, Lasting: true}
		for _, file := range f.files {
			if err := file.Arm(fault); err != nil {
				t.Fatal(err)
			}
		}
		err := f.live(t)
		if err != nil {
			oneLine(t, "full disk", fault, err)
		}
		for _, file := range f.files {
			if err := file.Arm(powercut.Fault{}); err != nil {
				t.Fatal(err)
			}
		}
		if again := f.live(t); again != nil {
			t.Fatalf("life after a full disk (%v): %v", err, again)
		}
	}
	for _, fault := range f.faults {
		t.Error(fault)
	}
	t.Log(fmt.Sprint(len(f.drawn), " keys"))
}
