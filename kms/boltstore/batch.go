package boltstore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"iter"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
)

// A batch is what a commit writes, as it stands in the journal: for each write
//
//	length of what follows (2) bucket (1) key, length of the value (4) value
//
// where the bucket is its place in buckets, and a value's length of all ones
// deletes the key. The audit entry is a write to the log.
const deleted = 1<<32 - 1

// Places in buckets.
const (
	inMeta = iota
	inLinks
	inSegments
	inKeys
	inSlots
	inGrants
	inClaims
	inLog
	inNames
)

var buckets = [][]byte{bMeta, bLinks, bSegments, bKeys, bSlots, bGrants, bClaims, bLog, bNames}

func appendPut(b []byte, bucket byte, key, value []byte) []byte {
	b = appendAt(b, bucket, key)
	b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
	return append(b, value...)
}

func appendDelete(b []byte, bucket byte, key []byte) []byte {
	return binary.BigEndian.AppendUint32(appendAt(b, bucket, key), deleted)
}

func appendAt(b []byte, bucket byte, key []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(1+len(key)))
	return append(append(b, bucket), key...)
}

// write is one of a batch.
type write struct {
	at    []byte // bucket and key
	value []byte // nil deletes; none is empty
}

// writes yields those of a batch; they point into it.
func writes(batch []byte) iter.Seq2[write, error] {
	return func(yield func(write, error) bool) {
		r := codec.NewReader(batch)
		for r.Len() > 0 {
			w := write{at: r.Bytes()}
			if n := r.Uint32(); n != deleted {
				w.value = r.Take(int(n))
			}
			if r.Err() != nil || len(w.at) == 0 || int(w.at[0]) >= len(buckets) {
				yield(w, fmt.Errorf("parse journal record: %w", kms.ErrCorrupt))
				return
			}
			if !yield(w, nil) {
				return
			}
		}
	}
}

// waiting is what the journal holds and the database does not.
type waiting struct {
	writes  map[string]*write
	entries [][]byte // of the log, the newest last
}

// add takes a batch in, copying it.
func (w *waiting) add(batch []byte) error {
	for one, err := range writes(batch) {
		if err != nil {
			return err
		}
		if one.at[0] == inLog {
			w.entries = append(w.entries, bytes.Clone(one.value))
			continue
		}
		have := w.writes[string(one.at)]
		if have == nil {
			have = &write{at: bytes.Clone(one.at)}
			w.writes[string(one.at)] = have
		}
		if one.value == nil {
			have.value = nil
		} else {
			have.value = append(have.value[:0], one.value...)
		}
	}
	return nil
}

// writeBack moves what waits into the database, with a further batch and the
// log's position after it, in one transaction. The journal is empty then.
func (s *Store) writeBack(batch []byte, end kms.Position) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := s.waiting.writeTo(tx, s.position); err != nil {
		return err
	}
	for one, err := range writes(batch) {
		if err == nil {
			err = put(tx, one)
		}
		if err != nil {
			return err
		}
	}
	next := s.journal.last.next()
	if err := putMeta(tx, kPosition, appendPosition(nil, end)); err != nil {
		return err
	}
	if err := putMeta(tx, kJournal, next.append(nil)); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	if err := s.db.View(func(tx *bolt.Tx) error {
		if tx.Size() > s.allocated { // the engine grew the file, which allocates nothing
			s.allocated = 0
		}
		return nil
	}); err != nil {
		return err
	}
	s.waiting = waiting{writes: map[string]*write{}} // readers may hold the old entries
	s.journal.empty(next)
	return nil
}

// writeTo writes what waits; the last entry is the one at that position.
func (w *waiting) writeTo(tx *bolt.Tx, end kms.Position) error {
	for _, at := range slices.Sorted(maps.Keys(w.writes)) {
		if err := put(tx, *w.writes[at]); err != nil {
			return err
		}
	}
	number := end.Length - uint64(len(w.entries))
	for _, e := range w.entries {
		number++
		if err := put(tx, write{append([]byte{inLog}, logKey(number)...), e}); err != nil {
			return err
		}
	}
	return nil
}

func putMeta(tx *bolt.Tx, key, value []byte) error {
	return put(tx, write{append([]byte{inMeta}, key...), value})
}

func put(tx *bolt.Tx, w write) error {
	b := tx.Bucket(buckets[w.at[0]])
	if w.value == nil {
		return b.Delete(w.at[1:])
	}
	if w.at[0] == inLog || w.at[0] == inSegments || w.at[0] == inSlots {
		b.FillPercent = 1 // these come in order
	}
	if checked(w.at[0]) {
		return b.Put(w.at[1:], binary.BigEndian.AppendUint32(bytes.Clone(w.value),
			sumOf(w.at[0], w.at[1:], w.value)))
	}
	return b.Put(w.at[1:], w.value)
}

// checked tells whether records of a bucket end with a checksum. Slots have
// their own tags, and entries of the log are chained.
func checked(bucket byte) bool { return bucket != inSlots && bucket != inLog }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumOf is CRC-32C over bucket, key and value.
func sumOf(bucket byte, key, value []byte) uint32 {
	sum := crc32.Update(crc32.Checksum([]byte{bucket}, castagnoli), castagnoli, key)
	return crc32.Update(sum, castagnoli, value)
}

// sound is a stored record without its checksum; nil stays nil.
func sound(bucket byte, key, stored []byte) ([]byte, error) {
	if stored == nil {
		return nil, nil
	}
	n := len(stored) - crc32.Size
	if n < 0 || binary.BigEndian.Uint32(stored[n:]) != sumOf(bucket, key, stored[:n]) {
		return nil, fmt.Errorf("record %q in %s: %w", key, buckets[bucket], kms.ErrCorrupt)
	}
	return stored[:n:n], nil
}

// get reads a record; nil is none.
func get(tx *bolt.Tx, bucket byte, key []byte) ([]byte, error) {
	return sound(bucket, key, tx.Bucket(buckets[bucket]).Get(key))
}

// each calls f for every record of a bucket.
func each(tx *bolt.Tx, bucket byte, f func(key, value []byte) error) error {
	return tx.Bucket(buckets[bucket]).ForEach(func(k, v []byte) error {
		v, err := sound(bucket, k, v)
		if err != nil {
			return err
		}
		return f(k, v)
	})
}

// number reads one of meta's numbers.
func number(tx *bolt.Tx, key []byte) (uint64, error) {
	v, err := get(tx, inMeta, key)
	if err != nil || v == nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("%s: %w", key, kms.ErrCorrupt)
	}
	return binary.BigEndian.Uint64(v), nil
}
