// Package storebench measures the key manager's store beside two stores
// written the plain way: bbolt with a row per key, and SQLite. It has tests
// only. Each contender does the same work: keys come sealed, a claim removes
// or marks them and appends one hash-chained audit record to the same
// transaction, and one committer gathers the callers that wait.
//
// TestTable prints the table: QUIETLINE_BENCH=1 go test -v -run TestTable
// ./kms/storebench; with QUIETLINE_FLUSH=1ms on a modelled disk whose flush
// takes that long. -run TestTable/0_0 measures the first contender alone, as
// for a profile. BenchmarkClaim is one commit without callers.
package storebench

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"path/filepath"
	"slices"

	"go.etcd.io/bbolt"
	_ "modernc.org/sqlite"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
)

const (
	slotBytes    = 32
	sealedBytes  = slotBytes + 16 // with its AES-256-GCM tag
	segmentSlots = 1024
)

// contender is a store under measurement, used by one goroutine.
type contender interface {
	// Ingest makes the sealed keys, whole segments of them, durable.
	Ingest(sealed []byte) error
	// Claim takes counts[i] keys for caller i, all in one durable commit with
	// its audit record, and returns each caller's sealed keys.
	Claim(counts []int) ([][]byte, error)
	Close() error
}

var errEmpty = errors.New("no keys left")

// opener opens a contender in a folder, empty or as Close left it.
type opener struct {
	name string
	open func(dir string) (contender, error)
}

var contenders = []opener{
	{"segments (ours)", openSegments},
	{"bbolt row per key", openRows},
	{"SQLite", openSQLite},
}

// record makes an audit record of claims in a chain: the hash before, then the
// SAE, first key and number. The keys that callers of one SAE take in a commit
// adjoin, so all three contenders tell of them as one range.
func record(before [32]byte, first uint64, counts []int) ([]byte, [32]byte) {
	total := 0
	for _, n := range counts {
		total += n
	}
	entry := append(slices.Clone(before[:]), "sae-a"...)
	entry = binary.BigEndian.AppendUint64(entry, first)
	entry = binary.BigEndian.AppendUint32(entry, uint32(total))
	return entry, sha256.Sum256(entry)
}

// segments is our store, driven as a KME drives it: a segment is confirmed,
// opened and granted in the commit that first needs it, and its bytes loaded.
type segments struct {
	s       *boltstore.Store
	fence   kms.Fence
	next    uint64 // number of the segment ingested next
	from    uint64 // of the one drawn from
	slot    int    // next slot in it
	sealed  []byte
	session kms.Session
	changes []kms.Change // memory of the last claim
}

const link = kms.LinkID("tokyo-kochi")

func openSegments(dir string) (contender, error) {
	s, err := boltstore.Open(filepath.Join(dir, "kms.db"), "kme-tokyo", boltstore.Options{})
	if err != nil {
		return nil, err
	}
	l, err := s.Lease(context.Background(), "", 0)
	if err != nil {
		return nil, err
	}
	c := &segments{s: s, fence: l.Fence, session: kms.Session{1}, slot: segmentSlots}
	if l, err = s.Lease(context.Background(), link, -1); err != nil {
		return nil, err
	}
	if n := len(l.Segments); n > 0 {
		c.next = l.Segments[n-1].ID.Number + 1
	}
	c.from = c.next
	for _, seg := range l.Segments { // one drawn from before a restart is not drawn from again
		if seg.State == kms.StateNew {
			c.from = seg.ID.Number
			break
		}
	}
	c.from-- // the next claim steps on
	return c, nil
}

func (c *segments) id(n uint64) kms.SegmentID {
	return kms.SegmentID{Link: link, Generation: 1, Number: n}
}

func (c *segments) commit(changes []kms.Change) error {
	_, err := c.s.Commit(context.Background(), c.fence, changes)
	return err
}

func (c *segments) Ingest(sealed []byte) error {
	var changes []kms.Change
	for one := range slices.Chunk(sealed, segmentSlots*sealedBytes) {
		id := c.id(c.next)
		c.next++
		changes = append(changes, kms.Change{Op: kms.OpIngest, Segment: id,
			Meta: kms.Segment{ID: id, State: kms.StateNew, BlockBytes: segmentSlots*slotBytes + 48,
				SlotBytes: slotBytes, Slots: segmentSlots, Owner: "kme-tokyo"},
			Sealed: kms.Sealed{Key: kms.Wrapped{Epoch: 1, Bytes: make([]byte, 60)}, Slots: one}})
	}
	return c.commit(changes)
}

// step gives the changes by which the next segment is drawn from.
func (c *segments) step() ([]kms.Change, error) {
	var changes []kms.Change
	if c.sealed != nil {
		changes = append(changes, kms.Change{Op: kms.OpClose, Segment: c.id(c.from)})
	}
	if c.from+1 == c.next {
		return nil, errEmpty
	}
	c.from++
	sealed, _, err := c.s.Load(context.Background(), c.id(c.from))
	if err != nil {
		return nil, err
	}
	c.sealed, c.slot = sealed.Slots, 0
	return append(changes, kms.Change{Op: kms.OpConfirm, Segment: c.id(c.from)},
		kms.Change{Op: kms.OpOpen, Segment: c.id(c.from), Session: c.session},
		kms.Change{Op: kms.OpGrant, Segment: c.id(c.from), Session: c.session,
			Grant: kms.Grant{Slots: segmentSlots, SizeBits: 8 * slotBytes,
				Initiator: "sae-a", Targets: []etsi014.SAEID{"sae-b"}}}), nil
}

func (c *segments) Claim(counts []int) ([][]byte, error) {
	changes := c.changes[:0]
	out := make([][]byte, len(counts))
	for i, n := range counts {
		for n > 0 {
			if c.slot == segmentSlots {
				steps, err := c.step()
				if err != nil {
					return nil, err
				}
				changes = append(changes, steps...)
			}
			k := min(n, segmentSlots-c.slot)
			changes = append(changes, kms.Change{Op: kms.OpClaim, Segment: c.id(c.from),
				Session: c.session, First: c.slot, Slots: k, Role: kms.RoleInitiator, SAE: "sae-a"})
			out[i] = append(out[i], c.sealed[c.slot*sealedBytes:(c.slot+k)*sealedBytes]...)
			c.slot += k
			n -= k
		}
	}
	c.changes = changes
	return out, c.commit(changes)
}

func (c *segments) Close() error { return c.s.Close() }

// rows is bbolt with one row a key, deleted by its claim.
type rows struct {
	db  *bbolt.DB
	end [32]byte // of the audit chain
}

var (
	bKeys  = []byte("keys")
	bAudit = []byte("audit")
)

func openRows(dir string) (contender, error) {
	db, err := bbolt.Open(filepath.Join(dir, "rows.db"), 0o600, nil)
	if err != nil {
		return nil, err
	}
	c := &rows{db: db}
	return c, db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bKeys, bAudit} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		if _, last := tx.Bucket(bAudit).Cursor().Last(); last != nil {
			c.end = sha256.Sum256(last)
		}
		return nil
	})
}

func (c *rows) Ingest(sealed []byte) error {
	return c.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bKeys)
		b.FillPercent = 1 // keys come in order
		for one := range slices.Chunk(sealed, sealedBytes) {
			n, err := b.NextSequence()
			if err != nil {
				return err
			}
			if err := b.Put(binary.BigEndian.AppendUint64(nil, n), one); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *rows) Claim(counts []int) ([][]byte, error) {
	out := make([][]byte, len(counts))
	end := c.end
	err := c.db.Update(func(tx *bbolt.Tx) error {
		b, log := tx.Bucket(bKeys), tx.Bucket(bAudit)
		cursor := b.Cursor()
		k, v := cursor.First()
		if k == nil {
			return errEmpty
		}
		first := binary.BigEndian.Uint64(k)
		var taken [][]byte // a cursor that deletes as it goes would skip rows
		for i, n := range counts {
			for range n {
				if k == nil {
					return errEmpty
				}
				out[i] = append(out[i], v...)
				taken = append(taken, k)
				k, v = cursor.Next()
			}
		}
		for _, k := range taken {
			if err := b.Delete(slices.Clone(k)); err != nil {
				return err
			}
		}
		var entry []byte
		entry, end = record(c.end, first, counts)
		n, err := log.NextSequence()
		if err != nil {
			return err
		}
		return log.Put(binary.BigEndian.AppendUint64(nil, n), entry)
	})
	if err == nil {
		c.end = end
	}
	return out, err
}

func (c *rows) Close() error { return c.db.Close() }

// sqlite is one table of keys and one of audit records, in WAL mode with a
// sync at each commit.
type sqlite struct {
	db  *sql.DB
	end [32]byte
}

func openSQLite(dir string) (contender, error) {
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "keys.sqlite")+
		"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	for _, s := range []string{
		"CREATE TABLE IF NOT EXISTS keys (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL)",
		"CREATE TABLE IF NOT EXISTS audit (id INTEGER PRIMARY KEY, entry BLOB NOT NULL)",
	} {
		if _, err := db.Exec(s); err != nil {
			return nil, err
		}
	}
	c := &sqlite{db: db}
	var last []byte
	switch err := db.QueryRow("SELECT entry FROM audit ORDER BY id DESC LIMIT 1").Scan(&last); {
	case err == nil:
		c.end = sha256.Sum256(last)
	case !errors.Is(err, sql.ErrNoRows):
		return nil, err
	}
	return c, nil
}

// update runs f in a transaction.
func (c *sqlite) update(f func(*sql.Tx) error) error {
	tx, err := c.db.Begin()
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

func (c *sqlite) Ingest(sealed []byte) error {
	return c.update(func(tx *sql.Tx) error {
		insert, err := tx.Prepare("INSERT INTO keys (sealed) VALUES (?)")
		if err != nil {
			return err
		}
		defer insert.Close()
		for one := range slices.Chunk(sealed, sealedBytes) {
			if _, err := insert.Exec(one); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *sqlite) Claim(counts []int) ([][]byte, error) {
	total := 0
	for _, n := range counts {
		total += n
	}
	out := make([][]byte, len(counts))
	end := c.end
	err := c.update(func(tx *sql.Tx) error {
		first, last, taken, err := take(tx, total)
		if err != nil {
			return err
		}
		for i, n := range counts {
			out[i], taken = taken[:n*sealedBytes:n*sealedBytes], taken[n*sealedBytes:]
		}
		if _, err := tx.Exec("DELETE FROM keys WHERE id BETWEEN ? AND ?", first, last); err != nil {
			return err
		}
		var entry []byte
		entry, end = record(c.end, uint64(first), counts)
		_, err = tx.Exec("INSERT INTO audit (entry) VALUES (?)", entry)
		return err
	})
	if err == nil {
		c.end = end
	}
	return out, err
}

// take reads the oldest total keys.
func take(tx *sql.Tx, total int) (first, last int64, taken []byte, err error) {
	list, err := tx.Query("SELECT id, sealed FROM keys ORDER BY id LIMIT ?", total)
	if err != nil {
		return 0, 0, nil, err
	}
	defer list.Close()
	for list.Next() {
		var sealed sql.RawBytes
		if err := list.Scan(&last, &sealed); err != nil {
			return 0, 0, nil, err
		}
		if taken == nil {
			first = last
		}
		taken = append(taken, sealed...)
	}
	if err := list.Err(); err != nil {
		return 0, 0, nil, err
	}
	if len(taken) < total*sealedBytes {
		return 0, 0, nil, errEmpty
	}
	return first, last, taken, nil
}

func (c *sqlite) Close() error { return c.db.Close() }
