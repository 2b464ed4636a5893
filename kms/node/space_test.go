package node

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
)

// crowded is a store on a disk that may be full.
type crowded struct {
	*boltstore.Store
	full atomic.Bool
}

func (c *crowded) Room(bytes int) error {
	if c.full.Load() {
		return fmt.Errorf("%w: 4242 KiB are needed", kms.ErrSpace)
	}
	return c.Store.Room(bytes)
}

// TestFullDisk: blocks wait at the device, which is told with what is short,
// while keys are drawn from what is there; with room again the blocks come.
func TestFullDisk(t *testing.T) {
	a, b := newPair(t, 4096)
	b.start(t)
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	disk, err := boltstore.Open(filepath.Join(t.TempDir(), "kms.db"), "kme-a", boltstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	store := &crowded{Store: disk}
	a.startOver(t, store)
	a.driver.allow(5) // blocks 1 to 4
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 100)
	ingested := func() uint64 { return a.Stats().Links[0].Ledger.Ingested }
	eventually(t, "four blocks", func() bool { return ingested() == 4*8*4096 })
	store.full.Store(true)
	a.driver.allow(9)
	eventually(t, "the shortage is told", func() bool {
		return strings.Contains(a.Stats().Links[0].DeviceReason, "4242 KiB")
	})
	if n := ingested(); n != 4*8*4096 {
		t.Errorf("%d bits were taken on a full disk", n-4*8*4096)
	}
	for range 3 {
		if _, err := a.drawOne(t); err != nil {
			t.Errorf("draw on a full disk: %v", err)
		}
	}
	a.turnNow(t)
	store.full.Store(false)
	eventually(t, "the other blocks", func() bool { return ingested() == 8*8*4096 })
	if st := a.Stats().Links[0]; strings.Contains(st.DeviceReason, "KiB") {
		t.Errorf("the device is still told to wait: %q", st.DeviceReason)
	}
}
