package daemon

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// TestAllowances: every limit of the commented example reaches the key manager,
// and the key manager takes it.
func TestAllowances(t *testing.T) {
	s, err := config.Load("../../../docs/examples/site-tokyo.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s.SAEs[0].RereadWindow = 2 * time.Second // off in the example
	got := allowances(s)
	want := map[etsi014.SAEID]kms.Allowance{"line-tokyo": {Calls: 50, Keys: 200, Share: 0.9,
		Window: time.Minute, Reserve: 1000, Reread: 2 * time.Second}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("allowances (-want +got):\n%s", diff)
	}
	if err := (kms.Limits{Allowances: got}).Validate(); err != nil {
		t.Error(err)
	}
}
