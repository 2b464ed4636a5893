// Package boltstore is a kms.Store in one bbolt file and a journal beside it.
//
// The main type is [Store]. One record per segment, one claim bitmap per
// role, and the chained audit log stand in the same database, and a commit is
// one record of the journal, so that claim and audit are one write. Buckets
// and keys of the database (kms.db):
//
//	meta      schema, kme, fence, boot (incarnation), epoch, position, journal,
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
// number (8), so that a link's segments stand in order. Every record ends with
// a CRC-32C (4) over the bucket's number, key and value, but for slots, which
// have their own tags, entries of the log, which are chained, and the schema.
//
// The journal (kms.journal, 1 MiB) holds the commits since the database was
// written last, each as what it writes into these buckets. It is one write and
// one flush a commit where the database needs two flushes and a page for each
// bucket. What it holds moves to the database when a commit brings slots or
// data keys, when it is full, and at Open and Close.
//
// A caller must keep in mind: the two files belong together, and the database
// is locked while open; deleted pages keep their old bytes, so that nothing
// here erases: slots are sealed, and erasure is the destruction of keys outside
// these files. Neither slots nor data keys go through the journal. After a failed write
// the store answers ErrStopped until it is opened again: a second fsync after
// a failed one may report success over lost data.
package boltstore

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
	"github.com/quietline/quietline/secret"
)

// Schema is the version of the layout above. A file with another one is not
// touched: 1 had no journal.
const Schema = 2

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

	kSchema   = []byte("schema")
	kKME      = []byte("kme")
	kFence    = []byte("fence")
	kBoot     = []byte("boot")
	kEpoch    = []byte("epoch")
	kPosition = []byte("position")
	kJournal  = []byte("journal")
	pPeer     = "peer/"
)

// Store is a kms.Store in one file. Its methods may be called from several
// goroutines.
type Store struct {
	db   *bolt.DB
	self etsi014.KMEID
	now  func() time.Time

	stopped atomic.Bool

	mu      sync.Mutex // one commit at a time; guards the rest
	file    *os.File   // the database's
	journal *journal
	waiting waiting
	// allocated is how far the file is known to have blocks of the disk.
	allocated int64
	state
	names map[etsi014.SAEID]audit.Commitment
}

var _ kms.Store = (*Store)(nil)

// Options are mostly what tests need to set. The zero value is right for a
// new KME.
type Options struct {
	// Now is the wall clock of audit records; nil = time.Now.
	Now func() time.Time
	// OpenFile replaces os.OpenFile, to put a failing file underneath.
	OpenFile func(string, int, os.FileMode) (*os.File, error)
	// LockWait replaces the time that Open waits for the file's lock.
	LockWait time.Duration
	// MustExist refuses to make a new store: other files tell that there was one.
	MustExist bool

	noFlush bool // plants a journal that is not flushed
}

// Open opens or makes the store of one KME. Errors: kms.ErrLocked,
// kms.ErrNewer, kms.ErrOlder, kms.ErrForeign, kms.ErrCorrupt, or the file
// system's.
func Open(path string, self etsi014.KMEID, opts Options) (s *Store, err error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.LockWait == 0 {
		opts.LockWait = lockWait
	}
	if opts.OpenFile == nil {
		opts.OpenFile = os.OpenFile
	}
	defer func() {
		if err != nil {
			s, err = nil, s.abandon(path, err)
		}
	}()
	defer guard(&err)()
	if err := checkMade(path, opts.MustExist); err != nil {
		return s, err
	}
	if info, err := os.Stat(path); err == nil && info.Size() > 0 {
		if err := checkPages(path, opts.OpenFile, opts.LockWait); err != nil {
			return s, err
		}
	}
	s = &Store{self: self, now: opts.Now}
	s.db, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout:        opts.LockWait,
		OpenFile:       s.keepFile(whole(opts.OpenFile)),
		FreelistType:   bolt.FreelistMapType, // a large free list makes the array form slow
		NoFreelistSync: true,                 // one page fewer per commit; rebuilt at open
	})
	if err != nil {
		return s, openError(err)
	}
	s.db.AllocSize = growBy
	return s, s.open(path, opts.OpenFile, opts.noFlush)
}

// abandon lets go of a store that could not be opened. Where the engine
// panicked it has left its file mapped, and a mapping keeps the lock.
func (s *Store) abandon(path string, err error) error {
	if s != nil && s.journal != nil {
		_ = s.journal.f.Close()
	}
	if s != nil && s.db != nil {
		_ = s.db.Close()
	}
	if s != nil && s.file != nil {
		unlock(s.file)
		_ = s.file.Close()
	}
	return fmt.Errorf("open store %s: %w", path, err)
}

// growBy is by how much the file grows at a time, bytes: the engine's 16 MiB
// would stand empty on most sites.
const growBy = 1 << 20

// checkMade refuses to take what is left of a store for an empty folder: its
// claims would be forgotten.
func checkMade(path string, must bool) error {
	if info, err := os.Stat(path); err == nil && info.Size() > 0 || err != nil &&
		!errors.Is(err, fs.ErrNotExist) {
		return err
	}
	left := "other files of this KME stand"
	if _, err := os.Stat(journalPath(path)); err == nil {
		left = "its journal stands"
	} else if !must {
		return nil
	}
	return fmt.Errorf("%w: it is missing or empty while %s in the folder; put it back or start with "+
		"an empty folder", kms.ErrCorrupt, left)
}

// open prepares the database and takes over what the journal holds.
func (s *Store) open(path string, open openFile, noFlush bool) error {
	fresh, after, err := s.prepare()
	if err != nil {
		return err
	}
	if fresh {
		if after, err = s.format(); err != nil {
			return err
		}
		if err := secret.SyncDir(filepath.Dir(path)); err != nil {
			return err
		}
	}
	// Before the first lease there was no commit: the first Open did not come
	// to an end.
	if fresh || s.fence == 0 {
		if err := makeJournal(open, journalPath(path)); err != nil {
			return err
		}
	}
	if err := s.replay(path, open, os.O_RDWR, after); err != nil {
		return err
	}
	if noFlush {
		s.journal.sync = func(*os.File) error { return nil }
	}
	if len(s.waiting.writes)+len(s.waiting.entries) > 0 {
		if err := s.writeBack(nil, s.position); err != nil {
			return err
		}
	}
	return s.db.View(func(tx *bolt.Tx) (err error) {
		if s.names, err = readNames(tx); err == nil {
			s.state, err = readState(tx)
		}
		return err
	})
}

// replay reads the journal: what it holds waits from now on, and position is
// that of its last entry.
func (s *Store) replay(path string, open openFile, flag int, after mark) error {
	j, batches, err := openJournal(open, journalPath(path), flag, after)
	if err != nil {
		return err
	}
	s.journal, s.waiting = j, waiting{writes: map[string]*write{}}
	for _, b := range batches {
		if err := s.waiting.add(b); err != nil {
			return err
		}
	}
	for _, e := range s.waiting.entries {
		rec, err := audit.Parse(s.position, e, nil)
		if err != nil {
			return err
		}
		s.position = rec.Position
	}
	return nil
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

// prepare checks whose file it is, and reads where the log and the journal
// stand.
func (s *Store) prepare() (fresh bool, after mark, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bMeta)
		if meta == nil {
			fresh = true
			return nil
		}
		if err := s.whose(tx); err != nil {
			return err
		}
		for _, name := range buckets {
			if tx.Bucket(name) == nil {
				return fmt.Errorf("%w: no bucket %s", kms.ErrCorrupt, name)
			}
		}
		fence, err := number(tx, kFence)
		if err != nil {
			return err
		}
		s.fence = kms.Fence(fence)
		v, err := get(tx, inMeta, kPosition)
		if err == nil {
			s.position, err = parsePosition(v)
		}
		if err != nil {
			return err
		}
		if v, err = get(tx, inMeta, kJournal); err == nil {
			after, err = parseMark(v)
		}
		return err
	})
	return fresh, after, err
}

// whose refuses a store of another schema or another KME. The schema has no
// checksum, as in every other schema.
func (s *Store) whose(tx *bolt.Tx) error {
	var v uint64
	if b := tx.Bucket(bMeta).Get(kSchema); len(b) == 8 {
		v = binary.BigEndian.Uint64(b)
	}
	switch {
	case v > Schema:
		return fmt.Errorf("%w: version %d, this program knows %d; use the newer program",
			kms.ErrNewer, v, Schema)
	case v < Schema:
		return fmt.Errorf("%w: version %d, this program knows %d; start with an empty folder",
			kms.ErrOlder, v, Schema)
	}
	kme, err := get(tx, inMeta, kKME)
	if err == nil && etsi014.KMEID(kme) != s.self {
		err = fmt.Errorf("%w: it is %q's, this is %q", kms.ErrForeign, kme, s.self)
	}
	return err
}

// format makes an empty store. Its mark is random: no other store's journal
// follows it.
func (s *Store) format() (first mark, err error) {
	if _, err := rand.Read(first.sum[:]); err != nil {
		return first, err
	}
	return first, s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return errors.Join(
			tx.Bucket(bMeta).Put(kSchema, binary.BigEndian.AppendUint64(nil, Schema)),
			putMeta(tx, kKME, []byte(s.self)), putMeta(tx, kJournal, first.append(nil)))
	})
}

// Close waits for the commit under way, moves what the journal holds to the
// database and lets both go.
func (s *Store) Close() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped.Swap(true) && len(s.waiting.writes)+len(s.waiting.entries) > 0 {
		err = s.finish(nil)
	}
	if cerr := s.closeFiles(); err == nil {
		err = cerr
	}
	return err
}

// finish is writeBack under a guard.
func (s *Store) finish(batch []byte) (err error) {
	defer guard(&err)()
	return s.writeBack(batch, s.position)
}

func (s *Store) closeFiles() error {
	err := s.db.Close()
	if s.journal != nil {
		err = errors.Join(err, s.journal.f.Close())
	}
	return err
}

// Load implements kms.Store.
func (s *Store) Load(ctx context.Context, id kms.SegmentID) (sealed kms.Sealed,
	claims []kms.Bitmap, err error) {
	if err := ctx.Err(); err != nil {
		return sealed, nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("load segment %s: %w", id, err)
		}
	}()
	defer guard(&err)()
	s.mu.Lock()
	defer s.mu.Unlock()
	seg := s.segments[id]
	switch {
	case seg != nil && seg.bad != nil:
		return sealed, nil, seg.bad
	case seg == nil || !seg.hasBytes():
		return sealed, nil, kms.ErrNoSegment
	}
	for _, b := range seg.claims {
		claims = append(claims, slices.Clone(b))
	}
	err = s.db.View(func(tx *bolt.Tx) (err error) {
		slots := tx.Bucket(bSlots).Get(seg.key)
		if len(slots) == 0 || len(slots)%seg.Slots != 0 {
			return fmt.Errorf("%w: %d bytes for %d slots", kms.ErrCorrupt, len(slots), seg.Slots)
		}
		key, err := get(tx, inKeys, seg.key)
		if err == nil {
			sealed.Key, err = parseWrapped(key)
		}
		if err == nil {
			sealed.Slots = slices.Clone(slots)
		}
		return err
	})
	return sealed, claims, err
}

func hasPrefix(b, prefix []byte) bool {
	return len(b) >= len(prefix) && string(b[:len(prefix)]) == string(prefix)
}
