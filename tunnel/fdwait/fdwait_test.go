package fdwait

import (
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is a pipe that does not block, read by a descriptor.
func pipe(t *testing.T) (r *Descriptor, w int) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, err := Own(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r, fds[1]
}

// waiting waits in another goroutine; began is closed when that has begun.
func waiting(d *Descriptor, wait func() bool) (began chan bool, got chan bool) {
	began, got = make(chan bool), make(chan bool, 1)
	go func() {
		_, open := d.Enter()
		close(began)
		if !open {
			got <- false
			return
		}
		defer d.Leave()
		got <- wait()
	}()
	return began, got
}

func put(t *testing.T, w int) {
	t.Helper()
	if _, err := unix.Write(w, []byte("x")); err != nil {
		t.Fatal(err)
	}
}

func TestReadable(t *testing.T) {
	r, w := pipe(t)
	began, got := waiting(r, r.Readable)
	<-began
	put(t, w)
	if !<-got {
		t.Error("something to read is taken for the end")
	}
	n := testing.AllocsPerRun(100, func() {
		if _, open := r.Enter(); open {
			r.Readable()
			r.Leave()
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestWritable(t *testing.T) {
	r, fd := pipe(t)
	w, err := Own(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	for err == nil {
		_, err = unix.Write(fd, make([]byte, 4096)) // until the pipe is full
	}
	began, got := waiting(w, w.Writable)
	<-began
	in, _ := r.Enter()
	buf := make([]byte, 1<<20)
	if _, err := unix.Read(int(in), buf); err != nil {
		t.Fatal(err)
	}
	r.Leave()
	if !<-got {
		t.Error("room to write is taken for the end")
	}
}

func TestClose(t *testing.T) {
	r, _ := pipe(t)
	began, got := waiting(r, r.Readable)
	<-began
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if <-got {
		t.Error("closed, but something is readable")
	}
	if _, open := r.Enter(); open {
		t.Error("closed, but open to enter")
	}
	if err := r.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}

// What comes after Patience is seen as well, whether a processor may be kept or
// not, and ends the keeping.
func TestReadableLater(t *testing.T) {
	was := limit.Load()
	defer limit.Store(was)
	for _, most := range []int32{0, 1, 64} {
		limit.Store(most)
		r, w := pipe(t)
		for round := range 3 {
			r.read.setBusy(round == 1)
			_, got := waiting(r, r.Readable)
			select {
			case <-got:
				t.Fatalf("limit %d: readable, but nothing has come", most)
			case <-time.After(4 * Patience):
			}
			put(t, w)
			if !<-got {
				t.Errorf("limit %d: something to read is taken for the end", most)
			}
			if r.read.busy.Load() || active.Load() != 0 {
				t.Errorf("limit %d: busy after a long wait, %d in all", most, active.Load())
			}
			drain(t, r)
		}
	}
}

// A wait that was short makes the next keep its processor; Close ends that.
func TestBusy(t *testing.T) {
	r, w := pipe(t)
	put(t, w)
	_, got := waiting(r, r.Readable)
	<-got
	if !r.read.busy.Load() || active.Load() != 1 {
		t.Errorf("not busy after a short wait, %d in all", active.Load())
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if active.Load() != 0 {
		t.Errorf("%d are busy after Close", active.Load())
	}
}

// With more readers than processors each gives way, and Close takes one out.
func TestGiveWay(t *testing.T) {
	was := limit.Load()
	defer limit.Store(was)
	a, w := pipe(t)
	put(t, w)
	_, got := waiting(a, a.Readable)
	<-got
	for _, most := range []int32{0, 1} {
		limit.Store(most)
		var ran atomic.Bool
		procs := runtime.GOMAXPROCS(1) // so that only giving way lets another run
		go ran.Store(true)
		GiveWay()
		if ran.Load() != (most == 0) {
			t.Errorf("one reader, %d may be: another has run %v", most, ran.Load())
		}
		runtime.GOMAXPROCS(procs)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if n := readers.Load(); n != 0 {
		t.Errorf("%d readers after Close", n)
	}
}

// drain reads what is there.
func drain(t *testing.T, r *Descriptor) {
	t.Helper()
	fd, _ := r.Enter()
	defer r.Leave()
	if _, err := unix.Read(int(fd), make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
}

// A waiter that holds its processor does not keep the collector waiting, and
// what the collector's signals interrupt goes on.
func TestCollectionWhileWaiting(t *testing.T) {
	r, w := pipe(t)
	r.read.setBusy(true)
	_, got := waiting(r, r.Readable)
	for range 20 {
		runtime.GC()
	}
	put(t, w)
	if !<-got {
		t.Error("something to read is taken for the end")
	}
}

func TestMakeRoom(t *testing.T) {
	was := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(was)
	t.Setenv("GOMAXPROCS", "1")
	MakeRoom(100)()
	if n := runtime.GOMAXPROCS(0); n != was {
		t.Errorf("%d processors, the environment says otherwise", n)
	}
	if err := os.Unsetenv("GOMAXPROCS"); err != nil {
		t.Fatal(err)
	}
	done := MakeRoom(2)
	if n := runtime.GOMAXPROCS(0); n <= processors {
		t.Errorf("%d processors, as many as at the start", n)
	}
	MakeRoom(10 * maxRoom)()
	if n := runtime.GOMAXPROCS(0); n != max(maxRoom, was, processors+1) {
		t.Errorf("%d processors for a multitude", n)
	}
	done()
	done()
	if room.waiters != 0 {
		t.Errorf("%d waiters have left no trace", room.waiters)
	}
}
