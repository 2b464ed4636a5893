package boltstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

func TestStore(t *testing.T) {
	paths := map[*testing.T]string{}
	storetest.Run(t, func(t *testing.T, fresh bool) kms.Store {
		if fresh || paths[t] == "" {
			paths[t] = filepath.Join(t.TempDir(), "kms.db")
		}
		s, err := Open(paths[t], storetest.Self, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func openAt(t *testing.T, path string, opts Options) *Store {
	t.Helper()
	s, err := Open(path, storetest.Self, opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOpenedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	_, err := Open(path, storetest.Self, Options{LockWait: time.Millisecond})
	if !errors.Is(err, kms.ErrLocked) {
		t.Errorf("second Open: %v, want ErrLocked", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := openAt(t, path, Options{}).Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, path string)
		want  error
	}{
		"a newer schema": {func(t *testing.T, path string) {
			s := openAt(t, path, Options{})
			defer s.Close()
			if err := s.db.Update(func(tx *bolt.Tx) error {
				return tx.Bucket(bMeta).Put(kSchema, binary.BigEndian.AppendUint64(nil, Schema+1))
			}); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrNewer},
		"an older schema": {func(t *testing.T, path string) {
			s := openAt(t, path, Options{})
			defer s.Close()
			if err := s.db.Update(func(tx *bolt.Tx) error {
				return tx.Bucket(bMeta).Put(kSchema, binary.BigEndian.AppendUint64(nil, Schema-1))
			}); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrOlder},
		"another KME's store": {func(t *testing.T, path string) {
			s, err := Open(path, "kme-else", Options{})
			if err != nil {
				t.Fatal(err)
			}
			s.Close()
		}, kms.ErrForeign},
		"a missing bucket": {func(t *testing.T, path string) {
			s := openAt(t, path, Options{})
			defer s.Close()
			if err := s.db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket(bClaims) }); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrCorrupt},
		"another file": {func(t *testing.T, path string) {
			if err := os.WriteFile(path, bytes.Repeat([]byte("key "), 4096), 0o600); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrCorrupt},
		"both head pages flipped": {func(t *testing.T, path string) {
			openAt(t, path, Options{}).Close()
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			data[20] ^= 1
			data[os.Getpagesize()+20] ^= 1
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kms.db")
			c.spoil(t, path)
			s, err := Open(path, storetest.Self, Options{})
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("Open: %v, want %v", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error is more than one line: %v", err)
			}
		})
	}
}

// TestWriteErrorStops: the file cannot be written; the store says so once and
// then stays stopped, and what was acknowledged before is still there.
func TestWriteErrorStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	note := []kms.Change{{Op: kms.OpNote, Reason: "one"}}
	want, err := s.Commit(t.Context(), l.Fence, note)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openAt(t, path, Options{OpenFile: func(name string, flag int, mode os.FileMode) (*os.File,
		error) {
		return os.OpenFile(name, os.O_RDONLY, mode) // every write to it fails
	}})
	for range 3 {
		_, err := s.Commit(t.Context(), l.Fence, note)
		if !errors.Is(err, kms.ErrStopped) || kms.Refused(err) {
			t.Errorf("Commit: %v, want ErrStopped", err)
		}
	}
	if _, err := s.Lease(t.Context(), "", 0); !errors.Is(err, kms.ErrStopped) {
		t.Errorf("Lease: %v, want ErrStopped", err)
	}
	s.Close()
	s = openAt(t, path, Options{})
	defer s.Close()
	got, err := s.Lease(t.Context(), "", 0)
	if err != nil || got.Position != want {
		t.Errorf("after the restart the log stands at %v (%v), want %v", got.Position.Length, err, want)
	}
}

func TestScanFindsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := s.Commit(t.Context(), l.Fence, []kms.Change{{Op: kms.OpNote, SAE: "a",
			Count: uint64(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	s.Close() // moves the log into the database
	s = openAt(t, path, Options{})
	defer s.Close()
	for name, spoil := range map[string]func(b *bolt.Bucket) error{
		"changed": func(b *bolt.Bucket) error {
			v := bytes.Clone(b.Get(logKey(5)))
			v[20] ^= 1
			return b.Put(logKey(5), v)
		},
		"missing": func(b *bolt.Bucket) error { return b.Delete(logKey(5)) },
		"swapped": func(b *bolt.Bucket) error {
			five, six := bytes.Clone(b.Get(logKey(5))), bytes.Clone(b.Get(logKey(6)))
			return errors.Join(b.Put(logKey(5), six), b.Put(logKey(6), five))
		},
	} {
		tx, err := s.db.Begin(true)
		if err != nil {
			t.Fatal(err)
		}
		saved := map[uint64][]byte{}
		for i := uint64(4); i < 8; i++ {
			saved[i] = bytes.Clone(tx.Bucket(bLog).Get(logKey(i)))
		}
		if err := spoil(tx.Bucket(bLog)); err != nil {
			t.Fatal(err)
		}
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		var got error
		n := 0
		for _, err := range s.Scan(t.Context(), 0) {
			if err != nil {
				got = err
				break
			}
			n++
		}
		if !errors.Is(got, kms.ErrCorrupt) || n != 4 || !strings.Contains(got.Error(), "record 5") {
			t.Errorf("%s: %d good records, then %v; want record 5 named", name, n, got)
		}
		if err := s.db.Update(func(tx *bolt.Tx) error {
			for i, v := range saved {
				if err := tx.Bucket(bLog).Put(logKey(i), v); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzRecords: no stored bytes make a reader panic, and what a reader takes it
// writes back the same.
func FuzzRecords(f *testing.F) {
	f.Add(appendSegment(nil, &kms.Segment{ID: kms.SegmentID{Link: "l"}, Owner: "o"}))
	f.Add(appendGrant(nil, &kms.Grant{Initiator: "a", Targets: []etsi014.SAEID{"b"}}))
	f.Add((&linkRecord{idKey: kms.Wrapped{Bytes: []byte{1}}}).append(nil))
	f.Add(appendMemory(nil, kms.Memory{Incarnation: 3}))
	f.Fuzz(func(t *testing.T, v []byte) {
		if s, err := parseSegment(v); err == nil && !bytes.Equal(appendSegment(nil, &s), v) {
			t.Error("segment changed")
		}
		if g, err := parseGrant(v); err == nil && !bytes.Equal(appendGrant(nil, &g), v) {
			t.Error("grant changed")
		}
		if l, err := parseLink(v); err == nil && v != nil && !bytes.Equal(l.append(nil), v) {
			t.Error("link changed")
		}
		if m, err := parseMemory("p", v); err == nil && !bytes.Equal(appendMemory(nil, m), v) {
			t.Error("memory changed")
		}
	})
}
