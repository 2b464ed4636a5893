package boltstore

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// Lease implements kms.Store. The database's lock lets in one process at a
// time; within it a lease of the KME's own state moves the fence.
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
	if link != "" {
		s.leaseLink(link, n, &l)
		return l, nil
	}
	if err := s.leaseKME(&l); err != nil {
		return kms.Lease{}, fmt.Errorf("lease store: %w", err)
	}
	return l, nil
}

func (s *Store) leaseKME(l *kms.Lease) error {
	fence := s.fence + 1
	err := s.writeBack(appendPut(nil, inMeta, kFence,
		binary.BigEndian.AppendUint64(nil, uint64(fence))), s.position)
	if err != nil {
		s.stopped.Store(true)
		return fmt.Errorf("write: %w: %w", kms.ErrStopped, err)
	}
	s.fence = fence
	*l = kms.Lease{Fence: fence, Incarnation: s.incarnation, Epoch: s.epoch, Position: s.position,
		Links: slices.Sorted(maps.Keys(s.links))}
	for _, peer := range slices.Sorted(maps.Keys(s.memories)) {
		l.Memories = append(l.Memories, s.memories[peer])
	}
	return nil
}

func (s *Store) leaseLink(link kms.LinkID, n int, l *kms.Lease) {
	rec := s.links[link]
	*l = kms.Lease{Generation: rec.generation, Floor: rec.floor, IDKey: rec.idKey,
		Ledger: rec.ledger}
	l.IDKey.Bytes = slices.Clone(l.IDKey.Bytes)
	for id, seg := range s.segments {
		switch {
		case id.Link != link:
		case seg.bad != nil:
			l.Unreadable = append(l.Unreadable, seg.Segment)
		default:
			l.Segments = append(l.Segments, seg.Segment)
		}
	}
	older := func(a, b kms.Segment) int {
		if a.ID.Less(b.ID) {
			return -1
		}
		return 1
	}
	slices.SortFunc(l.Segments, older)
	slices.SortFunc(l.Unreadable, older)
	if n >= 0 && len(l.Segments) > n {
		l.Segments = l.Segments[:n]
	}
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
	s.mu.Lock()
	end, entries := s.position, s.waiting.entries
	reveal := s.reveal()
	s.mu.Unlock()
	base := end.Length - uint64(len(entries)) // what the database has at least
	prev := kms.Position{Length: from}
	if from > base && from <= end.Length {
		prev.Hash, _ = audit.HashOf(entries[from-base-1])
	} else if batch, prev, err = s.stored(prev, base, reveal); err != nil {
		return batch, err
	}
	for prev.Length >= base && prev.Length < end.Length && len(batch) < scanBatch {
		rec, err := audit.Parse(prev, entries[prev.Length-base], reveal)
		if err != nil {
			return batch, err
		}
		batch, prev = append(batch, rec), rec.Position
	}
	return batch, nil
}

// stored reads records out of the database, which has base of them or, when
// the journal was moved meanwhile, more.
func (s *Store) stored(prev kms.Position, base uint64, reveal audit.Reveal) (batch []kms.Record,
	end kms.Position, err error) {
	defer guard(&err)()
	from := prev.Length
	err = s.db.View(func(tx *bolt.Tx) error {
		v, err := get(tx, inMeta, kPosition)
		if err != nil {
			return err
		}
		last, err := parsePosition(v)
		if err != nil {
			return err
		}
		c := tx.Bucket(bLog).Cursor()
		if from > 0 && from <= base {
			_, v := c.Seek(logKey(from))
			prev.Hash, _ = audit.HashOf(v)
		}
		for prev.Length < base && len(batch) < scanBatch {
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
		if prev.Length == last.Length && from < last.Length && prev != last {
			return fmt.Errorf("record %d: %w: the last record is another", last.Length, kms.ErrCorrupt)
		}
		if k, _ := c.Seek(logKey(last.Length + 1)); k != nil && len(batch) == 0 {
			return fmt.Errorf("record %d: %w: it stands after the last", last.Length+1, kms.ErrCorrupt)
		}
		return nil
	})
	return batch, prev, err
}

// reveal finds names as far as they are known now.
func (s *Store) reveal() audit.Reveal {
	known := make(map[audit.Commitment]etsi014.SAEID, len(s.names))
	for name, c := range s.names {
		known[c] = name
	}
	return func(c audit.Commitment) (etsi014.SAEID, bool) { n, ok := known[c]; return n, ok }
}

func logKey(length uint64) []byte { return binary.BigEndian.AppendUint64(nil, length) }
