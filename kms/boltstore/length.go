package boltstore

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"

	"github.com/quietline/quietline/kms"
)

// The head of a store file, as in bbolt's internal/common/meta.go: a page header,
// then magic (4), version (4), page size (4), flags (4), root bucket (16),
// free list (8), pages (8), transaction (8), FNV-1a of all before (8), in the
// machine's byte order. There are two, on pages 0 and 1; the newer sound one
// counts. Pages have 1 KiB to 16 MiB.
const (
	headMagic   = 0xED0CDAED
	headAt      = 16 // after the page header
	headLen     = 64
	headSumAt   = headLen - 8
	pageLeast   = 1 << 10
	pageMost    = 16 << 20
	headPageAt  = 8
	headPagesAt = 40
	headTxAt    = 48
)

type openFile func(string, int, os.FileMode) (*os.File, error)

// whole opens as open does, but not a file that is shorter than its head
// promises: the engine maps the file, and a process that reads a mapping
// behind the file's end is killed with SIGBUS.
func whole(open openFile) openFile {
	return func(path string, flag int, mode os.FileMode) (*os.File, error) {
		f, err := open(path, flag, mode)
		if err != nil {
			return nil, err
		}
		if err := checkLength(f); err != nil {
			_ = f.Close()
			return nil, err
		}
		return f, nil
	}
}

// checkLength compares a file's length with its head. A file without a sound
// head is left to the engine, which reads heads before it maps.
func checkLength(f *os.File) error {
	first, least, txid := readHead(f, 0)
	pageSize := int64(pageLeast)
	if first > 0 {
		pageSize = first
	}
	for ; pageSize <= pageMost; pageSize *= 2 {
		size, length, tx := readHead(f, pageSize)
		if size == pageSize && tx > txid {
			least = length
		}
		if size == pageSize || first > 0 {
			break
		}
	}
	// The length comes after the heads: a file that another process writes
	// may grow between.
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < least {
		return fmt.Errorf("%w: the file has %d bytes and its head promises %d: it was cut short; "+
			"keep it for inspection and start with an empty folder", kms.ErrCorrupt, info.Size(), least)
	}
	return nil
}

// readHead reads the head at an offset: page size, length of the file in
// bytes, and transaction, all zero if it is not sound.
func readHead(f *os.File, at int64) (pageSize, length int64, txid uint64) {
	var b [headLen]byte
	if _, err := f.ReadAt(b[:], at+headAt); err != nil {
		return 0, 0, 0
	}
	sum := fnv.New64a()
	_, _ = sum.Write(b[:headSumAt])
	order := binary.NativeEndian
	if order.Uint32(b[:]) != headMagic || order.Uint64(b[headSumAt:]) != sum.Sum64() {
		return 0, 0, 0
	}
	pageSize = int64(order.Uint32(b[headPageAt:]))
	return pageSize, pageSize * int64(order.Uint64(b[headPagesAt:])), order.Uint64(b[headTxAt:])
}
