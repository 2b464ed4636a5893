package main

import (
	"encoding/binary"
	"errors"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	bolt "go.etcd.io/bbolt"
)

// spoilAudit damages the audit log in a store: `spoilAudit file how record`,
// where how is change (a bit of it), remove, or swap (with the next). Change
// and swap undo themselves when done again.
func spoilAudit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: spoilAudit file change|remove|swap record")
	}
	n, err := strconv.ParseUint(args[2], 10, 64)
	ts.Check(err)
	db, err := bolt.Open(ts.MkAbs(args[0]), 0o600, &bolt.Options{Timeout: 10 * time.Second})
	ts.Check(err)
	key := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	ts.Check(errors.Join(db.Update(func(tx *bolt.Tx) error {
		log := tx.Bucket([]byte("log"))
		get := func(n uint64) []byte { return append([]byte(nil), log.Get(key(n))...) }
		this, next := get(n), get(n+1)
		switch {
		case len(this) == 0:
			return errors.New("there is no such record")
		case args[1] == "change":
			this[9] ^= 1
			return log.Put(key(n), this)
		case args[1] == "remove":
			return log.Delete(key(n))
		case args[1] == "swap" && len(next) > 0:
			return errors.Join(log.Put(key(n), next), log.Put(key(n+1), this))
		}
		return errors.New("there is no such damage")
	}), db.Close()))
}
