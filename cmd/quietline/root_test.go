package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/simulator"
)

func TestRoot(t *testing.T) { script(t, "root") }

// TestHintsForNewerState: whichever file a newer program wrote, the way out is
// told.
func TestHintsForNewerState(t *testing.T) {
	for _, err := range []error{daemon.ErrNewerState, simulator.ErrNewerState, kms.ErrNewer} {
		if got := hint(fmt.Errorf("open: %w", err)); !strings.Contains(got, "newer quietline") {
			t.Errorf("%v: hint %q", err, got)
		}
	}
}
