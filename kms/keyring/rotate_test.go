package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

var errDisk = errors.New("disk fails")

// tired is an epoch file of which the call with the number at fails: before it
// had any effect, or after.
type tired struct {
	calls  int
	at     int
	stored bool
}

func (d *tired) fails() bool { d.calls++; return d.calls == d.at }

func (d *tired) open(path string) (file, error) {
	if d.fails() {
		return nil, errDisk
	}
	f, err := openFile(path)
	return &tiredFile{f, d}, err
}

type tiredFile struct {
	file
	d *tired
}

func (f *tiredFile) WriteAt(b []byte, off int64) (int, error) {
	if !f.d.fails() {
		return f.file.WriteAt(b, off)
	}
	if f.d.stored {
		_, _ = f.file.WriteAt(b, off)
	}
	return 0, errDisk
}

func (f *tiredFile) Sync() error {
	if f.d.fails() {
		return errDisk
	}
	return f.file.Sync()
}

func (f *tiredFile) Close() error {
	err := f.file.Close()
	if f.d.fails() {
		return errDisk
	}
	return err
}

func rootOf(b byte) secret.Bytes { return secret.Copy(bytes.Repeat([]byte{b}, KeySize)) }

// life is one KME's key ring with what its store holds: the epoch and a key
// wrapped under it.
type life struct {
	t     *testing.T
	path  string
	epoch uint64
	key   kms.Wrapped
	old   []kms.Wrapped // from before turns
	ring  *Ring
}

var use, material = []byte("use"), []byte("a key to be kept, 32 bytes long!")

func newLife(t *testing.T, root secret.Bytes) *life {
	l := &life{t: t, path: filepath.Join(t.TempDir(), "epoch.keys"), epoch: 1}
	var err error
	if l.ring, err = Open(l.path, root, 0, true); err == nil {
		l.key, err = l.ring.Wrap(use, material)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// turn is a whole turn as the KME makes it. Its error leaves the ring usable.
func (l *life) turn() error {
	next, err := l.ring.Next()
	if err != nil {
		return err
	}
	moved, err := l.ring.Rewrap(use, l.key, next)
	if err != nil {
		l.t.Fatal(err)
	}
	l.old = append(l.old, l.key)
	l.key, l.epoch = moved, next // the commit
	return l.ring.Finish(next)
}

// opens tells whether a process that starts with this root reads the key.
func (l *life) opens(root secret.Bytes) error {
	data, err := os.ReadFile(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	path := filepath.Join(l.t.TempDir(), "copy") // opening tidies up
	if err := os.WriteFile(path, data, 0o600); err != nil {
		l.t.Fatal(err)
	}
	r, err := Open(path, root, l.epoch, false)
	if err != nil {
		return err
	}
	defer r.Close()
	key, err := r.Unwrap(use, l.key)
	if err == nil && !bytes.Equal(key.Expose(), material) {
		err = errors.New("another key")
	}
	for _, w := range l.old {
		if _, err := r.Unwrap(use, w); err == nil {
			l.t.Errorf("an old wrapping of epoch %d opens", w.Epoch)
		}
	}
	return err
}

func TestRootChanges(t *testing.T) {
	a, b := rootOf(1), rootOf(2)
	l := newLife(t, a)
	want := func(step string, first, second error) {
		t.Helper()
		if err := l.opens(a); !errors.Is(err, first) {
			t.Errorf("%s: the root key before: %v, want %v", step, err, first)
		}
		if err := l.opens(b); !errors.Is(err, second) {
			t.Errorf("%s: the root key after: %v, want %v", step, err, second)
		}
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want("at first", nil, kms.ErrRootKey)
	if _, err := l.ring.Adopt(b); !errors.Is(err, kms.ErrRootKey) {
		t.Errorf("Adopt of a root key that was not admitted: %v", err)
	}
	check(l.ring.Admit(b))
	check(l.ring.Admit(b))
	if err := l.ring.Admit(rootOf(3)); !errors.Is(err, kms.ErrRotation) {
		t.Errorf("a third root key: %v", err)
	}
	want("admitted", nil, nil)
	check(l.turn()) // turns go on under the old one
	check(l.turn())
	want("two turns later", nil, nil)
	changed, err := l.ring.Adopt(b)
	if err != nil || !changed || !l.ring.Crossed() {
		t.Fatalf("Adopt: %v, %v", changed, err)
	}
	want("adopted", nil, nil)
	if err := l.ring.Admit(rootOf(3)); !errors.Is(err, kms.ErrRotation) {
		t.Errorf("a third root key before the turn: %v", err)
	}
	if err := l.ring.Abandon(); !errors.Is(err, kms.ErrRotation) {
		t.Errorf("Abandon of one that is in use: %v", err)
	}
	check(l.turn())
	want("a turn after", kms.ErrRootKey, nil)
	if l.ring.Crossed() {
		t.Error("the change is not over after a turn")
	}
	if changed, err = l.ring.Adopt(b); err != nil || changed {
		t.Errorf("Adopt once more: %v, %v", changed, err)
	}
	check(l.ring.Admit(a)) // and back
	check(l.ring.Abandon())
	want("abandoned", kms.ErrRootKey, nil)
	if data, err := os.ReadFile(l.path); err != nil || !bytes.Equal(data[2*slotSize:], make([]byte, slotSize)) {
		t.Errorf("something is left of the bridge: %v", err)
	}
}

// TestRootChangesAtAStart: the new root key is used for the first time when the
// KME starts anew; a start with the old one before that changes nothing.
func TestRootChangesAtAStart(t *testing.T) {
	a, b := rootOf(1), rootOf(2)
	l := newLife(t, a)
	if err := l.ring.Admit(b); err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		root    secret.Bytes
		crossed bool
		turn    bool
		a, b    error
	}{
		{a, false, true, nil, nil}, {b, true, false, nil, nil}, {a, false, true, nil, nil},
		{b, true, true, kms.ErrRootKey, nil}, {b, false, true, kms.ErrRootKey, nil},
	} {
		l.ring.Close()
		var err error
		if l.ring, err = Open(l.path, s.root, l.epoch, false); err != nil {
			t.Fatal(err)
		}
		if l.ring.Crossed() != s.crossed {
			t.Errorf("%+v: crossed %v", s, l.ring.Crossed())
		}
		if s.turn {
			if err := l.turn(); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.opens(a); !errors.Is(err, s.a) {
			t.Errorf("%+v: the root key before: %v", s, err)
		}
		if err := l.opens(b); !errors.Is(err, s.b) {
			t.Errorf("%+v: the root key after: %v", s, err)
		}
	}
}

// TestRootChangeSurvivesEveryFailure: each call to the epoch file fails once,
// in both forms. After it the process goes on, or starts again with either root
// key that may be in its place, and the change ends.
func TestRootChangeSurvivesEveryFailure(t *testing.T) {
	for _, stored := range []bool{false, true} {
		failed := true
		for at := 1; failed; at++ {
			for _, restart := range []bool{false, true} {
				name := fmt.Sprintf("stored %v, call %d, restart %v", stored, at, restart)
				failed = changeRootTired(t, name, at, stored, restart)
			}
			if at > 100 {
				t.Fatal("the change does not end")
			}
		}
	}
}

// changeRootTired tells whether call at was reached.
func changeRootTired(t *testing.T, name string, at int, stored, restart bool) bool {
	a, b := rootOf(1), rootOf(2)
	l := newLife(t, a)
	disk := &tired{at: at, stored: stored}
	l.ring.open = disk.open
	inPlace := a // the root key that a start would find
	failures := 0
	step := func(do func() error) {
		for do() != nil {
			failures++
			if failures > 1 {
				t.Fatalf("%s: fails again", name)
			}
			if err := l.opens(inPlace); err != nil {
				t.Fatalf("%s: the root key in place does not open: %v", name, err)
			}
			if restart {
				l.ring.Close()
				var err error
				if l.ring, err = Open(l.path, inPlace, l.epoch, false); err != nil {
					t.Fatalf("%s: start: %v", name, err)
				}
				l.ring.open = disk.open
			}
		}
		if err := l.opens(inPlace); err != nil {
			t.Fatalf("%s: the root key in place does not open: %v", name, err)
		}
	}
	step(l.turn)
	step(func() error { return l.ring.Admit(b) })
	step(l.turn)
	step(func() error { return l.ring.Admit(b) }) // as the verb does when it is repeated
	inPlace = b
	step(func() error { _, err := l.ring.Adopt(b); return err })
	step(l.turn)
	step(l.turn)
	if err := l.opens(a); !errors.Is(err, kms.ErrRootKey) {
		t.Errorf("%s: the root key before, at the end: %v", name, err)
	}
	return failures > 0
}

// TestNextGoesOnAfterAFailure: a turn that cannot begin leaves everything as it
// was; one whose old key could not be destroyed is made good by the next.
func TestNextGoesOnAfterAFailure(t *testing.T) {
	for _, stored := range []bool{false, true} {
		for at := 1; at <= 8; at++ {
			l := newLife(t, rootOf(1))
			l.ring.open = (&tired{at: at, stored: stored}).open
			failures := 0
			for range 4 {
				before := l.epoch
				if err := l.turn(); err != nil {
					failures++
					if !errors.Is(err, errDisk) || at <= 4 && l.epoch != before {
						t.Errorf("call %d: %v, epoch %d after %d", at, err, l.epoch, before)
					}
					if w, err := l.ring.Wrap(use, material); err != nil || w.Epoch != l.epoch {
						t.Errorf("call %d: the ring does not go on: epoch %d, %v", at, w.Epoch, err)
					}
				}
			}
			if failures != 1 {
				t.Errorf("call %d: %d failures, want 1", at, failures)
			}
			if err := l.opens(rootOf(1)); err != nil {
				t.Errorf("call %d: %v", at, err)
			}
		}
	}
}
