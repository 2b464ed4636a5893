package boltstore

import (
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/audit"
)

// OpenRead opens the store of a KME that does not run, to read its audit log:
// it makes and writes nothing, so that what is found stays as it was. Only
// Scan, Load and Close may be called. Errors are Open's, or fs.ErrNotExist.
func OpenRead(path string, self etsi014.KMEID) (s *Store, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store %s: %w", path, err)
		}
	}()
	defer guard(&err)()
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, ReadOnly: true,
		OpenFile: whole(nil)})
	if err != nil {
		return nil, openError(err)
	}
	s = &Store{db: db, self: self, now: time.Now, names: map[etsi014.SAEID]audit.Commitment{}}
	s.stopped.Store(true)
	if err = s.prepare(); err != nil {
		_ = db.Close()
		return nil, err
	}
	return s, nil
}
