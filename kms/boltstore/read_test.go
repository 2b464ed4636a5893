package boltstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
	"github.com/quietline/quietline/kms/storetest"
)

// logOf makes a store whose log has n records and returns its path.
func logOf(t *testing.T, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	defer s.Close()
	lease, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if _, err := s.Commit(context.Background(), lease.Fence, []kms.Change{{Op: kms.OpNote,
			SAE: "sae-a", Reason: "quota", Count: uint64(i + 1)}}); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// TestVerifyFindsEveryDamage: a changed, missing, added or moved record is
// found and named, on a store that nothing writes to.
func TestVerifyFindsEveryDamage(t *testing.T) {
	entry := func(b *bolt.Bucket, n uint64) []byte { return append([]byte(nil), b.Get(logKey(n))...) }
	for name, c := range map[string]struct {
		spoil func(log, meta *bolt.Bucket) error
		good  uint64
		text  string
	}{
		"nothing": {func(_, _ *bolt.Bucket) error { return nil }, 9, ""},
		"a byte changed": {func(log, _ *bolt.Bucket) error {
			v := entry(log, 4)
			v[9] ^= 1
			return log.Put(logKey(4), v)
		}, 3, "record 4"},
		"a hash changed": {func(log, _ *bolt.Bucket) error {
			v := entry(log, 4)
			v[len(v)-1] ^= 1
			return log.Put(logKey(4), v)
		}, 3, "record 4"},
		"cut short": {func(log, _ *bolt.Bucket) error { return log.Put(logKey(5), entry(log, 5)[:20]) },
			4, "record 5"},
		"removed": {func(log, _ *bolt.Bucket) error { return log.Delete(logKey(6)) },
			5, "record 6: stored bytes are damaged: it is missing"},
		"the last removed": {func(log, _ *bolt.Bucket) error { return log.Delete(logKey(9)) },
			8, "record 9"},
		"removed and closed up": {func(log, meta *bolt.Bucket) error {
			for n := uint64(6); n < 9; n++ {
				if err := log.Put(logKey(n), entry(log, n+1)); err != nil {
					return err
				}
			}
			return log.Delete(logKey(9))
		}, 5, "record 6"},
		"two swapped": {func(log, _ *bolt.Bucket) error {
			a, b := entry(log, 3), entry(log, 4)
			return errors.Join(log.Put(logKey(3), b), log.Put(logKey(4), a))
		}, 2, "record 3"},
		"one added at the end": {func(log, _ *bolt.Bucket) error {
			return log.Put(logKey(10), entry(log, 9))
		}, 9, "record 10"},
		"the position is of an older log": {func(_, meta *bolt.Bucket) error {
			v, err := get(meta.Tx(), inMeta, kPosition)
			if err != nil {
				return err
			}
			return putMeta(meta.Tx(), kPosition, append(binary.BigEndian.AppendUint64(nil, 7), v[8:]...))
		}, 7, "record 7: stored bytes are damaged: the last record is another"},
	} {
		t.Run(name, func(t *testing.T) {
			path := logOf(t, 9)
			s := openAt(t, path, Options{})
			if err := s.db.Update(func(tx *bolt.Tx) error {
				return c.spoil(tx.Bucket(bLog), tx.Bucket(bMeta))
			}); err != nil {
				t.Fatal(err)
			}
			s.Close()
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			r, err := OpenRead(path, storetest.Self)
			if err != nil {
				t.Fatal(err)
			}
			at, err := audit.Verify(r.Scan(t.Context(), 0))
			if at.Length != c.good || (err == nil) != (c.text == "") {
				t.Errorf("%d records are good, want %d; %v", at.Length, c.good, err)
			}
			if err != nil && (!errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), c.text)) {
				t.Errorf("%v\nwant %q", err, c.text)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Errorf("reading changed the file, or %v", err)
			}
		})
	}
}

func TestOpenReadRefuses(t *testing.T) {
	path := logOf(t, 1)
	if _, err := OpenRead(path, "kme-else"); !errors.Is(err, kms.ErrForeign) {
		t.Errorf("another KME's: %v", err)
	}
	gone := filepath.Join(t.TempDir(), "none.db")
	if _, err := OpenRead(gone, storetest.Self); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made: %v", err)
	}
	s, err := OpenRead(path, storetest.Self)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Commit(t.Context(), 1, []kms.Change{{Op: kms.OpNote}}); err == nil {
		t.Error("a store opened for reading takes a commit")
	}
}

// TestVerifyNamesEachRecord: whichever record of a log is changed, missing,
// moved, doubled or cut, and the log's end too, that record is named and all
// before it are good.
func TestVerifyNamesEachRecord(t *testing.T) {
	const records = 20
	path := logOf(t, records)
	s := openAt(t, path, Options{})
	defer s.Close()
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	saved := map[uint64][]byte{}
	if err := s.db.View(func(tx *bolt.Tx) error {
		for n := uint64(1); n <= records; n++ {
			saved[n] = bytes.Clone(tx.Bucket(bLog).Get(logKey(n)))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	changed := func(n uint64) []byte {
		v := bytes.Clone(saved[n])
		v[rng.IntN(len(v))] ^= 1 << rng.IntN(8)
		return v
	}
	mutations := map[string]func(log *bolt.Bucket, n uint64) error{
		"changed": func(log *bolt.Bucket, n uint64) error { return log.Put(logKey(n), changed(n)) },
		"missing": func(log *bolt.Bucket, n uint64) error { return log.Delete(logKey(n)) },
		"moved": func(log *bolt.Bucket, n uint64) error {
			other := 1 + (n-1+1+uint64(rng.IntN(records-1)))%records
			if other < n {
				return log.Put(logKey(n), saved[other]) // that one is named, not the earlier
			}
			return errors.Join(log.Put(logKey(n), saved[other]), log.Put(logKey(other), saved[n]))
		},
		"cut short": func(log *bolt.Bucket, n uint64) error {
			return log.Put(logKey(n), saved[n][:rng.IntN(len(saved[n]))])
		},
		"lengthened": func(log *bolt.Bucket, n uint64) error {
			return log.Put(logKey(n), append(bytes.Clone(saved[n]), 0))
		},
		"the end": func(log *bolt.Bucket, n uint64) error {
			var errs []error
			for ; n <= records; n++ {
				errs = append(errs, log.Delete(logKey(n)))
			}
			return errors.Join(errs...)
		},
	}
	for name, mutate := range mutations {
		for n := uint64(1); n <= records; n++ {
			if err := s.db.Update(func(tx *bolt.Tx) error {
				return mutate(tx.Bucket(bLog), n)
			}); err != nil {
				t.Fatal(err)
			}
			at, err := audit.Verify(s.Scan(t.Context(), 0))
			if at.Length != n-1 || !errors.Is(err, kms.ErrCorrupt) ||
				!strings.Contains(err.Error(), fmt.Sprintf("record %d:", n)) {
				t.Errorf("seed %d, record %d %s: %d are good, %v", seed, n, name, at.Length, err)
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
	if at, err := audit.Verify(s.Scan(t.Context(), 0)); at.Length != records || err != nil {
		t.Errorf("the log as it was: %d are good, %v", at.Length, err)
	}
}
