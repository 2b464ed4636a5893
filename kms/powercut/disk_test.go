//go:build linux

package powercut_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms/powercut"
)

func TestMain(m *testing.M) {
	powercut.Main()
	os.Exit(m.Run())
}

const diskBytes = 64 << 20

var fractions = []float64{0, 0.25, 0.5, 0.75, 1}

var bucket = []byte("acknowledged")

func open(t *testing.T, path string, noSync bool) *bbolt.DB {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, NoSync: noSync})
	if err != nil {
		t.Fatal(err)
	}
	db.MaxBatchDelay = 0 // one commit after the other, so that cuts meet some under way
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// load commits row after row from several goroutines until a commit fails, and
// counts what was acknowledged.
type load struct {
	workers sync.WaitGroup
	enough  chan struct{} // closed at the wanted number of acknowledged rows

	mu    sync.Mutex
	acked map[uint64]bool
}

func startLoad(db *bbolt.DB, round uint64, enough int) *load {
	l := &load{enough: make(chan struct{}), acked: map[uint64]bool{}}
	for w := range uint64(8) {
		l.workers.Go(func() {
			for n := uint64(0); ; n++ {
				row := round<<40 | w<<32 | n
				if err := db.Batch(func(tx *bbolt.Tx) error { return put(tx, row) }); err != nil {
					return
				}
				l.mu.Lock()
				l.acked[row] = true
				if len(l.acked) == enough {
					close(l.enough)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

func put(tx *bbolt.Tx, row uint64) error {
	b, err := tx.CreateBucketIfNotExists(bucket)
	if err != nil {
		return err
	}
	key := binary.BigEndian.AppendUint64(nil, row)
	value := make([]byte, 64)
	copy(value, key)
	return b.Put(key, value)
}

// missing counts the acknowledged rows that the store at path has not, and
// fails the test if the store is inconsistent.
func missing(db *bbolt.DB, acked map[uint64]bool) (lost int, err error) {
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			return err
		}
		b := tx.Bucket(bucket)
		for row := range acked {
			key := binary.BigEndian.AppendUint64(nil, row)
			if b == nil || !strings.HasPrefix(string(b.Get(key)), string(key)) {
				lost++
			}
		}
		return nil
	})
	return lost, err
}

// TestAcknowledgedCommitsSurviveEachCut cuts one disk again and again under
// load, so that later rounds start from what the earlier ones left.
func TestAcknowledgedCommitsSurviveEachCut(t *testing.T) {
	cuts := 10
	if os.Getenv("QUIETLINE_LONG") != "" {
		cuts = 500
	}
	d := powercut.New(t, diskBytes, time.Millisecond)
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(d.Dir(), "store.db")
	var total powercut.Loss
	acked := 0
	for i := range cuts {
		db := open(t, path, false)
		l := startLoad(db, uint64(i), 1+rng.IntN(60))
		<-l.enough
		time.Sleep(time.Duration(rng.Int64N(int64(8 * time.Millisecond)))) // any moment of a commit
		loss, err := d.Cut(fractions[rng.IntN(len(fractions))], rng.Uint64())
		if err != nil {
			t.Fatalf("seed %d, cut %d: %v", seed, i, err)
		}
		l.workers.Wait()
		_ = db.Close()
		db = open(t, path, false)
		lost, err := missing(db, l.acked)
		if lost != 0 || err != nil {
			t.Fatalf("seed %d, cut %d: %d of %d acknowledged commits lost, check: %v (%+v)",
				seed, i, lost, len(l.acked), err, loss)
		}
		_ = db.Close()
		acked += len(l.acked)
		total.Unflushed += loss.Unflushed
		total.Written += loss.Written
		total.Torn += loss.Torn
	}
	t.Logf("%d cuts, %d acknowledged commits, 0 lost; blocks in the caches %+v", cuts, acked, total)
	if total.Unflushed == 0 {
		t.Errorf("seed %d: no cut met an unflushed block: the test cannot fail", seed)
	}
}

// TestStoreWithoutSyncLosesCommits: a store that acknowledges before its sync
// must be caught.
func TestStoreWithoutSyncLosesCommits(t *testing.T) {
	d := powercut.New(t, diskBytes, 0)
	path := filepath.Join(d.Dir(), "store.db")
	db := open(t, path, false)
	if err := db.Update(func(tx *bbolt.Tx) error { return put(tx, 1) }); err != nil {
		t.Fatal(err)
	}
	db.NoSync = true
	acked := map[uint64]bool{}
	for row := range uint64(100) {
		if err := db.Update(func(tx *bbolt.Tx) error { return put(tx, 2+row) }); err != nil {
			t.Fatal(err)
		}
		acked[2+row] = true
	}
	if _, err := d.Cut(0, 1); err != nil {
		t.Fatal(err)
	}
	_ = db.Close()
	db = open(t, path, false)
	if lost, _ := missing(db, map[uint64]bool{1: true}); lost != 0 {
		t.Error("the synced commit is lost: the disk loses what a flush covered")
	}
	if lost, err := missing(db, acked); lost == 0 {
		t.Errorf("no commit lost without a sync (check: %v): the disk has no volatile cache", err)
	}
}

// TestCutEndsDurability: what is open at the cut cannot be synced afterwards.
func TestCutEndsDurability(t *testing.T) {
	d := powercut.New(t, diskBytes, 0)
	path := filepath.Join(d.Dir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("before"); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Cut(1, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("afters"), 0); err == nil {
		if err := f.Sync(); err == nil {
			t.Error("a sync after the cut succeeded")
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "before" {
		t.Errorf("after the cut the file holds %q, %v", got, err)
	}
	for _, bad := range []float64{-0.1, 1.1} {
		if _, err := d.Cut(bad, 1); err == nil {
			t.Errorf("fraction %v was taken", bad)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "before" {
		t.Errorf("after refused cuts the file holds %q, %v", got, err)
	}
}

func TestFlushTakesItsTime(t *testing.T) {
	const flush = 20 * time.Millisecond
	d := powercut.New(t, diskBytes, flush)
	f, err := os.Create(filepath.Join(d.Dir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 3 {
		if _, err := f.WriteString("x"); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < flush {
			t.Errorf("sync took %v, a flush takes %v", took, flush)
		}
	}
}

func TestFullDisk(t *testing.T) {
	d := powercut.New(t, 16<<20, 0)
	f, err := os.Create(filepath.Join(d.Dir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for i := 0; ; i++ {
		if _, err = f.Write(buf); err != nil || i > 32 {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("writing 32 MiB to a 16 MiB disk: %v", err)
	}
}

// TestNothingStaysBehind kills a test process that has a disk and looks for
// its loop device.
func TestNothingStaysBehind(t *testing.T) {
	if dir := os.Getenv("QUIETLINE_POWERCUT_VICTIM"); dir != "" {
		d := powercut.New(t, diskBytes, 0)
		f, err := os.Create(filepath.Join(d.Dir(), "open"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("\nDIR %s\n", d.Dir())
		_, _ = f.WriteString("unsynced")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until killed
		return
	}
	powercut.New(t, diskBytes, 0) // or skip
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestNothingStaysBehind$")
	cmd.Env = append(os.Environ(), "QUIETLINE_POWERCUT_VICTIM=1", "TMPDIR="+t.TempDir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	for lines := bufio.NewScanner(out); dir == "" && lines.Scan(); {
		dir, _ = strings.CutPrefix(lines.Text(), "DIR ")
		if dir == lines.Text() {
			dir = ""
		}
	}
	server := strings.TrimSuffix(dir[:strings.Index(dir, "/root/")], "/")
	loop := loopOf(t, server)
	if _, err := os.Stat(loop); err != nil {
		t.Fatalf("the disk's loop device: %v", err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "the disk's process ends", func() bool {
		_, err := os.Stat(server)
		return errors.Is(err, os.ErrNotExist)
	})
	eventually(t, "its loop device is free", func() bool {
		_, err := os.Stat(loop)
		return errors.Is(err, os.ErrNotExist)
	})
}

// loopOf finds what sysfs shows of the loop device that a process has mounted,
// as long as it is set up.
func loopOf(t *testing.T, proc string) string {
	t.Helper()
	mounts, err := os.ReadFile(filepath.Join(proc, "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(mounts), "/dev/loop")
	number, _, found := strings.Cut(after, " ")
	if !found {
		t.Fatalf("no loop device in\n%s", mounts)
	}
	return "/sys/block/loop" + number + "/loop"
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(10 * time.Millisecond) // polls the kernel, which tells nobody
	}
}
