package boltstore

import (
	"fmt"
	"os"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// OpenRead opens the store of a KME that does not run, to read its audit log:
// it makes and writes nothing, so that what is found stays as it was. Only
// Scan and Close may be called. Errors are Open's, or fs.ErrNotExist.
func OpenRead(path string, self etsi014.KMEID) (s *Store, err error) {
	s = &Store{self: self, now: time.Now}
	s.stopped.Store(true)
	defer func() {
		if err != nil {
			s, err = nil, s.abandon(path, err)
		}
	}()
	defer guard(&err)()
	s.db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, ReadOnly: true,
		OpenFile: s.keepFile(whole(os.OpenFile))})
	if err != nil {
		return s, openError(err)
	}
	return s, s.openRead(path)
}

// openRead finds the log's end, and the names of SAEs wherever they stand.
func (s *Store) openRead(path string) error {
	fresh, after, err := s.prepare()
	if err != nil {
		return err
	}
	if fresh {
		return fmt.Errorf("%w: it was never used", kms.ErrCorrupt)
	}
	if err := s.replay(path, os.OpenFile, os.O_RDONLY, after); err != nil {
		return err
	}
	if err := s.db.View(func(tx *bolt.Tx) (err error) {
		s.names, err = readNames(tx)
		return err
	}); err != nil {
		return err
	}
	for _, w := range s.waiting.writes {
		if w.at[0] == inNames {
			if s.names[etsi014.SAEID(w.at[1:])], err = parseName(w.value); err != nil {
				return err
			}
		}
	}
	return nil
}
