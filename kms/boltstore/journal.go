package boltstore

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

// The journal is a file of fixed size beside the database. It holds what was
// committed since the database was written last, so that a claim costs one
// write and one flush of blocks that the disk has given us before. A record
// begins at a sector:
//
//	magic (4) number (8) sum before (32) length (4) body SHA-256 of all before (32)
//
// Numbers count up for the life of the store. The database names number and
// sum of the last record that it holds (see mark); the next record follows
// these, at the journal's beginning. So records of an earlier round, of another
// store, or torn by a power cut follow nothing and do not count. A sound record
// with a later number behind one that is not sound tells of damage.
const (
	journalMagic = "QLJ1"
	journalSize  = 1 << 20 // bounds what Open replays and what one write-back moves
	journalHead  = 4 + 8 + 32 + 4
	journalOver  = journalHead + sha256.Size
	// sector is the least that a disk writes whole: no record shares one with
	// the record before, which is acknowledged.
	sector = 512
)

// mark names a record of the journal by its number and sum.
type mark struct {
	number uint64
	sum    [sha256.Size]byte
}

func (m mark) append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint64(b, m.number), m.sum[:]...)
}

func parseMark(v []byte) (m mark, err error) {
	if len(v) != 8+len(m.sum) {
		return m, fmt.Errorf("parse mark of the journal: %w", kms.ErrCorrupt)
	}
	m.number = binary.BigEndian.Uint64(v)
	copy(m.sum[:], v[8:])
	return m, nil
}

// journal is the open file and where its next record goes.
type journal struct {
	f    *os.File
	last mark
	at   int64
	buf  []byte
	sync func(*os.File) error
}

// journalPath is where the journal of a database lies.
func journalPath(path string) string {
	return strings.TrimSuffix(path, filepath.Ext(path)) + ".journal"
}

// makeJournal writes an empty journal, every block of it, so that records find
// their space on a full disk and a flush has no allocation to write.
func makeJournal(open openFile, path string) (err error) {
	f, err := open(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(make([]byte, journalSize)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return secret.SyncDir(filepath.Dir(path))
}

// openJournal opens the journal and returns the bodies of the records after
// the mark.
func openJournal(open openFile, path string, flag int, after mark) (*journal, [][]byte, error) {
	f, err := open(path, flag, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: its journal %s is missing and may hold the newest claims; "+
			"put it back or start with an empty folder", kms.ErrCorrupt, path)
	}
	if err != nil {
		return nil, nil, err
	}
	j := &journal{f: f, last: after, sync: syncData}
	bodies, err := j.read()
	if err != nil {
		_ = f.Close()
		return nil, nil, fmt.Errorf("journal %s: %w", path, err)
	}
	return j, bodies, nil
}

func (j *journal) read() (bodies [][]byte, err error) {
	data := make([]byte, journalSize)
	if n, err := j.f.ReadAt(data, 0); n < len(data) {
		return nil, fmt.Errorf("%w: %d of %d bytes can be read: %v; keep it for inspection and start "+
			"with an empty folder", kms.ErrCorrupt, n, len(data), err)
	}
	for {
		before, m, body, ok := parseJournal(data[j.at:])
		if !ok || before != j.last.sum || m.number != j.last.number+1 {
			break
		}
		bodies = append(bodies, body)
		j.last, j.at = m, j.at+sectors(len(body))
	}
	for at := j.at; at < journalSize; at += sector {
		if _, m, _, ok := parseJournal(data[at:]); ok && m.number > j.last.number {
			return nil, fmt.Errorf("%w: record %d is missing and record %d is there; keep it for "+
				"inspection and start with an empty folder", kms.ErrCorrupt, j.last.number+1, m.number)
		}
	}
	return bodies, nil
}

// parseJournal reads a record and checks it by itself.
func parseJournal(b []byte) (before [sha256.Size]byte, m mark, body []byte, ok bool) {
	if len(b) < journalOver || string(b[:4]) != journalMagic {
		return before, m, nil, false
	}
	n := int64(binary.BigEndian.Uint32(b[journalHead-4:]))
	if n > int64(len(b)-journalOver) {
		return before, m, nil, false
	}
	end := journalHead + int(n)
	m.number = binary.BigEndian.Uint64(b[4:])
	m.sum = sha256.Sum256(b[:end])
	copy(before[:], b[12:])
	return before, m, b[journalHead:end:end], bytes.Equal(m.sum[:], b[end:end+sha256.Size])
}

// sectors is how many bytes a record with a body of n takes in the file.
func sectors(n int) int64 { return (int64(n) + journalOver + sector - 1) / sector * sector }

// fits tells whether a record with a body of n bytes has room.
func (j *journal) fits(n int) bool { return j.at+sectors(n) <= journalSize }

// begin starts a record; the body is appended to what it returns.
func (j *journal) begin() []byte {
	b := append(j.buf[:0], journalMagic...)
	b = binary.BigEndian.AppendUint64(b, j.last.number+1)
	b = append(b, j.last.sum[:]...)
	return append(b, 0, 0, 0, 0)
}

// keep takes the memory of a record back for the next one.
func (j *journal) keep(b []byte) {
	if cap(b) <= journalSize {
		j.buf = b
	}
}

// write ends a record and makes it durable. After an error nothing is certain.
func (j *journal) write(b []byte) error {
	n := len(b) - journalHead
	binary.BigEndian.PutUint32(b[journalHead-4:], uint32(n))
	m := mark{j.last.number + 1, sha256.Sum256(b)}
	b = append(b, m.sum[:]...)
	b = append(b, make([]byte, sectors(n)-int64(len(b)))...)
	j.keep(b)
	if _, err := j.f.WriteAt(b, j.at); err != nil {
		return err
	}
	if err := j.sync(j.f); err != nil {
		return err
	}
	j.last, j.at = m, j.at+int64(len(b))
	return nil
}

// next is the mark of a database that holds all up to m. It is another than m,
// so that no record follows the state that the database had before.
func (m mark) next() mark { return mark{m.number + 1, sha256.Sum256(m.append(nil))} }

// empty lets the next record stand at the beginning, after the database's mark.
func (j *journal) empty(after mark) { j.last, j.at = after, 0 }
