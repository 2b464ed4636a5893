package fdwait

import (
	"os"
	"testing"
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
