// Package boltstore is a kms.Store in one bbolt file.
//
// The main type is [Store]. One record per segment, one claim bitmap per
// role, and the chained audit log stand in the same file, so that claim and
// audit are one transaction. Buckets and keys:
//
//	meta      schema, kme, fence, boot (incarnation), epoch, position,
//	          peer/<KME ID>
//	links     <link> → generation, floor, ID key, ledger
//	segments  <segment> → what is known of it
//	keys      <segment> → its data key, wrapped
//	slots     <segment> → its sealed slots
//	grants    <segment> slot after its last (4) → grant
//	claims    <segment> role+1 (1) → bitmap
//	log       length (8) → audit entry
//	names     SAE → salt and commitment
//
// where <segment> is the link's name with its length, generation (8) and
// number (8), so that a link's segments stand in order.
//
// A caller must keep in mind: the file is locked while open; deleted pages
// keep their old bytes, so that nothing here erases: slots are sealed, and
// erasure is the destruction of keys outside this file. After a failed write
// the store answers ErrStopped until it is opened again: a second fsync after
// a failed one may report success over lost data.
package boltstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// Schema is the version of the layout above. A file with a newer one is not
// touched.
const Schema = 1

// lockWait is how long Open waits for another process to let the file go:
// enough for a service restart that overlaps, short enough for a person.
const lockWait = 2 * time.Second

var (
	bMeta     = []byte("meta")
	bLinks    = []byte("links")
	bSegments = []byte("segments")
	bKeys     = []byte("keys")
	bSlots    = []byte("slots")
	bGrants   = []byte("grants")
	bClaims   = []byte("claims")
	bLog      = []byte("log")
	bNames    = []byte("names")

	buckets = [][]byte{bMeta, bLinks, bSegments, bKeys, bSlots, bGrants, bClaims, bLog, bNames}

	kSchema   = []byte("schema")
	kKME      = []byte("kme")
	kFence    = []byte("fence")
	kBoot     = []byte("boot")
	kEpoch    = []byte("epoch")
	kPosition = []byte("position")
	pPeer     = "peer/"
)

// Store is a kms.Store in one file. Its methods may be called from several
// goroutines.
type Store struct {
	db   *bolt.DB
	self etsi014.KMEID
	now  func() time.Time

	stopped atomic.Bool

	mu    sync.Mutex // one commit at a time; guards names
	names map[etsi014.SAEID]audit.Commitment
}

var _ kms.Store = (*Store)(nil)

// Options are what tests need to set. The zero value is right for a KME.
type Options struct {
	// Now is the wall clock of audit records; nil = time.Now.
	Now func() time.Time
	// OpenFile replaces os.OpenFile, to put a failing file underneath.
	OpenFile func(string, int, os.FileMode) (*os.File, error)
	// LockWait replaces the time that Open waits for the file's lock.
	LockWait time.Duration
}

// Open opens or makes the store of one KME. Errors: kms.ErrLocked,
// kms.ErrNewer, kms.ErrForeign, kms.ErrCorrupt, or the file system's.
func Open(path string, self etsi014.KMEID, opts Options) (s *Store, err error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.LockWait == 0 {
		opts.LockWait = lockWait
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store %s: %w", path, err)
		}
	}()
	defer guard(&err)()
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		Timeout:        opts.LockWait,
		OpenFile:       whole(opts.OpenFile),
		FreelistType:   bolt.FreelistMapType, // a large free list makes the array form slow
		NoFreelistSync: true,                 // one page fewer per commit; rebuilt at open
	})
	if err != nil {
		return nil, openError(err)
	}
	s = &Store{db: db, self: self, now: opts.Now, names: map[etsi014.SAEID]audit.Commitment{}}
	if err = s.prepare(); err != nil {
		_ = db.Close()
		return nil, err
	}
	return s, nil
}

// openError names what the engine's error means for the operator.
func openError(err error) error {
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("%w; stop the other KME or choose another state folder", kms.ErrLocked)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum),
		errors.Is(err, berrors.ErrVersionMismatch):
		return fmt.Errorf("%w: %w; restore it from its disk or start with an empty folder",
			kms.ErrCorrupt, err)
	}
	return err
}

// guard turns the engine's panic over damaged pages into an error. So it does a
// fault while mapped pages are read: the file was cut short under a running
// KME, or the disk cannot read a sector.
func guard(err *error) func() {
	before := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(before)
		if p := recover(); p != nil {
			*err = fmt.Errorf("%w: %v; keep the file for inspection and start with an empty folder",
				kms.ErrCorrupt, p)
		}
	}
}

func (s *Store) prepare() error {
	fresh := false
	err := s.db.View(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bMeta)
		if meta == nil {
			fresh = true
			return nil
		}
		if v := getUint64(meta, kSchema); v > Schema {
			return fmt.Errorf("%w: version %d, this program knows %d; use the newer program",
				kms.ErrNewer, v, Schema)
		}
		if kme := etsi014.KMEID(meta.Get(kKME)); kme != s.self {
			return fmt.Errorf("%w: it is %q's, this is %q", kms.ErrForeign, kme, s.self)
		}
		for _, name := range buckets {
			if tx.Bucket(name) == nil {
				return fmt.Errorf("%w: no bucket %s", kms.ErrCorrupt, name)
			}
		}
		return s.loadNames(tx)
	})
	if err != nil || !fresh {
		return err
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bMeta)
		if err := putUint64(meta, kSchema, Schema); err != nil {
			return err
		}
		return meta.Put(kKME, []byte(s.self))
	})
}

func (s *Store) loadNames(tx *bolt.Tx) error {
	return tx.Bucket(bNames).ForEach(func(k, v []byte) error {
		if len(v) != len(audit.Salt{})+len(audit.Commitment{}) {
			return fmt.Errorf("%w: salt of a name", kms.ErrCorrupt)
		}
		s.names[etsi014.SAEID(k)] = audit.Commitment(v[len(audit.Salt{}):])
		return nil
	})
}

// Close waits for the commit under way and lets the file go.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped.Store(true)
	return s.db.Close()
}

// Load implements kms.Store.
func (s *Store) Load(ctx context.Context, id kms.SegmentID) (sealed kms.Sealed,
	claims []kms.Bitmap, err error) {
	if err := ctx.Err(); err != nil {
		return sealed, nil, err
	}
	defer guard(&err)()
	err = s.db.View(func(tx *bolt.Tx) error {
		key := segmentKey(id)
		slots := tx.Bucket(bSlots).Get(key)
		if slots == nil {
			return kms.ErrNoSegment
		}
		var err error
		if sealed.Key, err = parseWrapped(tx.Bucket(bKeys).Get(key)); err != nil {
			return err
		}
		sealed.Slots = append([]byte(nil), slots...)
		c := tx.Bucket(bClaims).Cursor()
		for k, v := c.Seek(key); len(k) == len(key)+1 && hasPrefix(k, key); k, v = c.Next() {
			for len(claims) <= int(k[len(key)]) {
				claims = append(claims, nil)
			}
			claims[k[len(key)]] = append(kms.Bitmap(nil), v...)
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("load segment %s: %w", id, err)
	}
	return sealed, claims, err
}

func getUint64(b *bolt.Bucket, key []byte) uint64 {
	if v := b.Get(key); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func putUint64(b *bolt.Bucket, key []byte, v uint64) error {
	return b.Put(key, binary.BigEndian.AppendUint64(nil, v))
}

func hasPrefix(b, prefix []byte) bool {
	return len(b) >= len(prefix) && string(b[:len(prefix)]) == string(prefix)
}
