package boltstore

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms"
)

// On a full disk blocks are refused first: claims, voids and epoch turns go on
// in space that is kept for them. The journal's is its own. The database's is
// free pages and blocks behind its end, allocated and not only promised.
const (
	// spare is what a block must leave free for the others, bytes: the pages of
	// some seventy segments that a turn seals anew, or a hundred thousand
	// claims' entries of the log.
	spare = 4 << 20
	// run is how much of it lies in one piece, for free pages may lie apart.
	run = 512 << 10
)

// Room tells whether a block whose sealed slots have so many bytes finds room
// beside what is kept for claims, voids and turns; if not, it is kms.ErrSpace.
// Whoever stores blocks asks before each of them.
func (s *Store) Room(bytes int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped.Load() {
		return kms.ErrStopped
	}
	return s.room(bytes, spare)
}

// room allocates until bytes and spare fit.
func (s *Store) room(bytes, spare int) (err error) {
	defer guard(&err)()
	var used int64
	if err := s.db.View(func(tx *bolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		return err
	}
	page := s.db.Info().PageSize
	bytes += bytes/8 + 16*page // what fills pages up, and the records beside it
	need := used + int64(bytes) + int64(max(spare-s.db.Stats().FreePageN*page, min(spare, run)))
	if need <= s.allocated {
		return nil
	}
	switch err := allocate(s.file, used, need-used+growBy); {
	case err == nil:
		s.allocated = need + growBy
		return nil
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, syscall.EOPNOTSUPP):
		return nil // then the disk tells when it is too late, and the store stops
	case !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("allocate %d bytes: %w: %w", need-used, kms.ErrStopped, err)
	}
	if err := allocate(s.file, used, need-used); err == nil {
		s.allocated = need
		return nil
	}
	return fmt.Errorf("%w: the file needs %d KiB; make room on its disk: until then blocks wait at "+
		"the device, and keys are still delivered", kms.ErrSpace, (need-used+1023)>>10)
}

// keepFile opens as open does and remembers the database's file.
func (s *Store) keepFile(open openFile) openFile {
	return func(path string, flag int, mode os.FileMode) (*os.File, error) {
		f, err := open(path, flag, mode)
		s.file = f
		return f, err
	}
}
