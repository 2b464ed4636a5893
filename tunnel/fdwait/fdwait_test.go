package fdwait

import (
	"os"
	"runtime"
	"testing"
	"time"
)

// pipe is a pipe and a waiter for its reading end.
func pipe(t *testing.T) (r, w *os.File, wait *Waiter) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if wait, err = New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		wait.Close()
		_, _ = r.Close(), w.Close()
	})
	return r, w, wait
}

func TestReadable(t *testing.T) {
	r, w, wait := pipe(t)
	fd := r.Fd()
	began, got := make(chan bool), make(chan bool)
	go func() {
		close(began)
		got <- wait.Readable(fd)
	}()
	<-began
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if !<-got {
		t.Error("something to read is taken for the end")
	}
	if n := testing.AllocsPerRun(100, func() { wait.Readable(fd) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	_ = w.Close()
	if !wait.Readable(fd) {
		t.Error("the end of the pipe is not for the reader to see")
	}
}

func TestEnd(t *testing.T) {
	r, _, wait := pipe(t)
	fd := r.Fd()
	began, got := make(chan bool), make(chan bool)
	go func() {
		close(began)
		got <- wait.Readable(fd)
	}()
	<-began
	wait.End()
	wait.End()
	if <-got || wait.Readable(fd) {
		t.Error("ended, but something is readable")
	}
}

// What comes after Patience is seen as well, with and without a processor to
// hold.
func TestReadableLater(t *testing.T) {
	was := limit.Load()
	defer limit.Store(was)
	for _, most := range []int32{0, 1, 64} {
		limit.Store(most)
		r, w, wait := pipe(t)
		fd, got := r.Fd(), make(chan bool)
		go func() { got <- wait.Readable(fd) }()
		select {
		case <-got:
			t.Fatalf("limit %d: readable, but nothing has come", most)
		case <-time.After(4 * Patience):
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if !<-got {
			t.Errorf("limit %d: something to read is taken for the end", most)
		}
		if n := holders.Load(); n != 0 {
			t.Errorf("limit %d: %d processors are held by nobody", most, n)
		}
	}
}

// A waiter that holds its processor does not keep the collector waiting, and
// what the collector's signals interrupt goes on.
func TestCollectionWhileWaiting(t *testing.T) {
	r, w, wait := pipe(t)
	fd, got := r.Fd(), make(chan bool)
	go func() { got <- wait.Readable(fd) }()
	for range 20 {
		runtime.GC()
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if !<-got {
		t.Error("something to read is taken for the end")
	}
}

func TestMakeRoom(t *testing.T) {
	was := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(was)
	t.Setenv("GOMAXPROCS", "1")
	MakeRoom()
	if n := runtime.GOMAXPROCS(0); n != was {
		t.Errorf("%d processors, the environment says otherwise", n)
	}
	if err := os.Unsetenv("GOMAXPROCS"); err != nil {
		t.Fatal(err)
	}
	MakeRoom()
	if n := runtime.GOMAXPROCS(0); n <= runtime.NumCPU() || int(limit.Load()) >= n {
		t.Errorf("%d processors of which %d may be held, on a machine of %d", n, limit.Load(),
			runtime.NumCPU())
	}
}
