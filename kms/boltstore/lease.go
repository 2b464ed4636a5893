package boltstore

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// Lease implements kms.Store. One file has one writer, so a lease of the
// KME's own state (empty link) takes the whole store and moves the fence; a
// link's lease is under the fence that stands.
func (s *Store) Lease(ctx context.Context, link kms.LinkID, n int) (l kms.Lease, err error) {
	if err := ctx.Err(); err != nil {
		return l, err
	}
	if s.stopped.Load() {
		return l, kms.ErrStopped
	}
	defer guard(&err)()
	s.mu.Lock()
	defer s.mu.Unlock()
	if link == "" {
		err = s.leaseKME(&l)
	} else {
		err = s.db.View(func(tx *bolt.Tx) error { return leaseLink(tx, link, n, &l) })
	}
	if err != nil {
		return l, fmt.Errorf("lease %q: %w", link, err)
	}
	return l, nil
}

func (s *Store) leaseKME(l *kms.Lease) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	meta := tx.Bucket(bMeta)
	l.Fence = kms.Fence(getUint64(meta, kFence) + 1)
	l.Incarnation, l.Epoch = getUint64(meta, kBoot), getUint64(meta, kEpoch)
	if l.Position, err = parsePosition(meta.Get(kPosition)); err != nil {
		return err
	}
	c := meta.Cursor()
	for k, v := c.Seek([]byte(pPeer)); hasPrefix(k, []byte(pPeer)); k, v = c.Next() {
		m, err := parseMemory(etsi014.KMEID(k[len(pPeer):]), v)
		if err != nil {
			return err
		}
		l.Memories = append(l.Memories, m)
	}
	if err := tx.Bucket(bLinks).ForEach(func(k, _ []byte) error {
		l.Links = append(l.Links, kms.LinkID(k))
		return nil
	}); err != nil {
		return err
	}
	if err := putUint64(meta, kFence, uint64(l.Fence)); err != nil {
		return err
	}
	return s.finish(tx)
}

func leaseLink(tx *bolt.Tx, link kms.LinkID, n int, l *kms.Lease) error {
	l.Fence = kms.Fence(getUint64(tx.Bucket(bMeta), kFence))
	rec, err := parseLink(tx.Bucket(bLinks).Get([]byte(link)))
	if err != nil {
		return err
	}
	l.Generation, l.Floor, l.IDKey, l.Ledger = rec.generation, rec.floor, rec.idKey, rec.ledger
	if n < 0 {
		n = math.MaxInt
	}
	prefix := linkPrefix(link)
	c := tx.Bucket(bSegments).Cursor()
	for k, v := c.Seek(prefix); hasPrefix(k, prefix) && len(l.Segments) < n; k, v = c.Next() {
		seg, err := parseSegment(v)
		if err != nil {
			return err
		}
		l.Segments = append(l.Segments, seg)
	}
	return nil
}

// finish commits and stops the store for good when that fails.
func (s *Store) finish(tx *bolt.Tx) error {
	if err := tx.Commit(); err != nil {
		s.stopped.Store(true)
		return fmt.Errorf("write: %w: %w", kms.ErrStopped, err)
	}
	return nil
}

// Scan implements kms.Store.
func (s *Store) Scan(ctx context.Context, from uint64) iter.Seq2[kms.Record, error] {
	return func(yield func(kms.Record, error) bool) {
		for {
			batch, err := s.records(ctx, from)
			for _, rec := range batch {
				if !yield(rec, nil) {
					return
				}
				from = rec.Position.Length
			}
			if err != nil {
				yield(kms.Record{}, fmt.Errorf("scan log: %w", err))
				return
			}
			if len(batch) == 0 {
				return
			}
		}
	}
}

// scanBatch records are read in one transaction, so that a slow reader does
// not keep old pages alive.
const scanBatch = 1024

func (s *Store) records(ctx context.Context, from uint64) (batch []kms.Record, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	defer guard(&err)()
	err = s.db.View(func(tx *bolt.Tx) error {
		end, err := parsePosition(tx.Bucket(bMeta).Get(kPosition))
		if err != nil {
			return err
		}
		reveal := revealFrom(tx)
		c := tx.Bucket(bLog).Cursor()
		prev := kms.Position{Length: from}
		if from > 0 && from <= end.Length {
			_, v := c.Seek(logKey(from))
			prev.Hash, _ = audit.HashOf(v)
		}
		for prev.Length < end.Length && len(batch) < scanBatch {
			k, v := c.Seek(logKey(prev.Length + 1))
			if k == nil || binary.BigEndian.Uint64(k) != prev.Length+1 {
				return fmt.Errorf("record %d: %w: it is missing", prev.Length+1, kms.ErrCorrupt)
			}
			rec, err := audit.Parse(prev, v, reveal)
			if err != nil {
				return err
			}
			batch, prev = append(batch, rec), rec.Position
		}
		if prev.Length == end.Length && from < end.Length && prev != end {
			return fmt.Errorf("record %d: %w: the last record is another", end.Length, kms.ErrCorrupt)
		}
		if k, _ := c.Seek(logKey(end.Length + 1)); k != nil && len(batch) == 0 {
			return fmt.Errorf("record %d: %w: it stands after the last", end.Length+1, kms.ErrCorrupt)
		}
		return nil
	})
	return batch, err
}

func revealFrom(tx *bolt.Tx) audit.Reveal {
	known := map[audit.Commitment]etsi014.SAEID{}
	_ = tx.Bucket(bNames).ForEach(func(k, v []byte) error {
		if len(v) > len(audit.Salt{}) {
			known[audit.Commitment(v[len(audit.Salt{}):])] = etsi014.SAEID(k)
		}
		return nil
	})
	return func(c audit.Commitment) (etsi014.SAEID, bool) { n, ok := known[c]; return n, ok }
}

func logKey(length uint64) []byte { return binary.BigEndian.AppendUint64(nil, length) }
