package control

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"time"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// AuditRecord is one record of a key manager's audit log. In JSON it is one
// line of what GET /v1/audit answers.
type AuditRecord struct {
	Record uint64       `json:"record"` // its number, from 1
	Hash   string       `json:"hash"`   // of the chain up to and with it, hexadecimal
	Lines  []audit.Line `json:"changes"`
}

// AuditLog yields a log's records until the first fault, which ends it.
type AuditLog = iter.Seq2[AuditRecord, error]

// auditLine is a record, or the end of the log: Fault or End.
type auditLine struct {
	AuditRecord
	Fault string `json:"fault,omitempty"`
	// Damaged: the fault is in the log, not in the reading of it.
	Damaged bool `json:"damaged,omitempty"`
	// End tells an answer that is whole from one that broke off.
	End bool `json:"end,omitempty"`
}

// AuditRecords are a store's records as this package's.
func AuditRecords(log iter.Seq2[kms.Record, error]) AuditLog {
	return func(yield func(AuditRecord, error) bool) {
		for rec, err := range log {
			if !yield(AuditRecord{Record: rec.Position.Length, Lines: audit.Lines(rec),
				Hash: hex.EncodeToString(rec.Position.Hash[:])}, err) || err != nil {
				return
			}
		}
	}
}

// auditStall is how long a reader may take for one part of a log.
const auditStall = 30 * time.Second

// auditFlush is after how many records the reader gets more time.
const auditFlush = 256

func (d Door) audit(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	n := 0
	for rec, err := range AuditRecords(d.Audit(r.Context())) {
		if err != nil {
			_ = enc.Encode(auditLine{Fault: err.Error(), Damaged: errors.Is(err, kms.ErrCorrupt)})
			return
		}
		if n++; n%auditFlush == 1 {
			_ = rc.SetWriteDeadline(time.Now().Add(auditStall))
		}
		if enc.Encode(auditLine{AuditRecord: rec}) != nil {
			return
		}
	}
	_ = enc.Encode(auditLine{End: true})
}

// damage is kms.ErrCorrupt in the words of the daemon that met it.
type damage string

func (d damage) Error() string { return string(d) }
func (damage) Unwrap() error   { return kms.ErrCorrupt }

// maxAuditLine bounds a record: a commit has at most some thousand changes.
const maxAuditLine = 16 << 20

// Audit reads the log of a key manager that runs; the first record is asked
// for when the log is ranged over. A damaged log wraps kms.ErrCorrupt.
func (c *Client) Audit(ctx context.Context) AuditLog {
	return func(yield func(AuditRecord, error) bool) {
		res, err := c.send(ctx, http.MethodGet, "audit", nil)
		if err != nil {
			yield(AuditRecord{}, err)
			return
		}
		defer res.Body.Close()
		lines := bufio.NewScanner(res.Body)
		lines.Buffer(nil, maxAuditLine)
		for lines.Scan() {
			var l auditLine
			err := json.Unmarshal(lines.Bytes(), &l)
			switch {
			case err != nil:
				err = fmt.Errorf("ask audit: read answer: %w", err)
			case l.Damaged:
				err = damage(l.Fault)
			case l.Fault != "":
				err = fmt.Errorf("ask audit: %w: %s", ErrRefused, l.Fault)
			case l.End:
				return
			}
			if !yield(l.AuditRecord, err) || err != nil {
				return
			}
		}
		if err = lines.Err(); err == nil {
			err = errors.New("the answer broke off")
		}
		yield(AuditRecord{}, fmt.Errorf("ask audit: %w at %s: %w", ErrDown, c.path, err))
	}
}
