package control

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/kms"
)

// logOf yields n records and then err, if there is one.
func logOf(n int, err error) func(context.Context) iter.Seq2[kms.Record, error] {
	return func(context.Context) iter.Seq2[kms.Record, error] {
		return func(yield func(kms.Record, error) bool) {
			for i := range n {
				if !yield(kms.Record{At: time.Unix(int64(i), 0).UTC(),
					Position: kms.Position{Length: uint64(i + 1), Hash: [32]byte{byte(i)}},
					Changes:  []kms.Change{{Op: kms.OpNote, SAE: "sae-a", Reason: "quota", Count: 3}}},
					nil) {
					return
				}
			}
			if err != nil {
				yield(kms.Record{}, err)
			}
		}
	}
}

// TestAuditComesBackEqual: the log over the socket is the store's log, and a
// fault keeps its meaning.
func TestAuditComesBackEqual(t *testing.T) {
	for name, err := range map[string]error{
		"whole":   nil,
		"damaged": fmt.Errorf("scan log: record 701: %w: it is missing", kms.ErrCorrupt),
		"stopped": errors.New("store is closed"),
	} {
		t.Run(name, func(t *testing.T) {
			log := logOf(700, err)
			client := Dial(serve(t, Door{Status: func() Status { return Status{} }, Audit: log}))
			next, stop := iter.Pull2(AuditRecords(log(t.Context())))
			defer stop()
			n := 0
			for got, gotErr := range client.Audit(t.Context()) {
				want, wantErr, ok := next()
				if !ok {
					t.Fatalf("one too many: %v, %v", got, gotErr)
				}
				if n++; wantErr != nil {
					if gotErr == nil || errors.Is(gotErr, kms.ErrCorrupt) != errors.Is(wantErr, kms.ErrCorrupt) {
						t.Errorf("fault %v, want %v", gotErr, wantErr)
					}
					continue
				}
				if gotErr != nil {
					t.Fatalf("record %d: %v", n, gotErr)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("record %d (-want +got):\n%s", n, diff)
				}
			}
			if _, _, more := next(); more || n < 700 {
				t.Errorf("the log ended after %d records", n)
			}
		})
	}
}

func TestAuditRefused(t *testing.T) {
	socket := serve(t, Door{Status: func() Status { return Status{} }})
	for _, c := range []struct {
		socket string
		want   error
	}{{socket, ErrRefused}, {socket + "x", ErrDown}} {
		for _, err := range Dial(c.socket).Audit(t.Context()) {
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		}
	}
}
