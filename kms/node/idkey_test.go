package node

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
)

// spoiledName is a store whose ID keys came back damaged.
type spoiledName struct{ kms.Store }

func (s spoiledName) Lease(ctx context.Context, link kms.LinkID, n int) (kms.Lease, error) {
	l, err := s.Store.Lease(ctx, link, n)
	for i := range l.IDKey.Bytes {
		l.IDKey.Bytes[i] ^= 1
	}
	return l, err
}

// TestUnreadableIDKey: the KME starts with an alarm, agrees a new ID key with
// its peer, turns its epoch, and keys flow, whichever of the two draws the key.
func TestUnreadableIDKey(t *testing.T) {
	for _, which := range []int{0, 1} {
		a, b := newPair(t, 4096)
		startPair(t, a, b)
		a.driver.allow(9)
		b.driver.allow(9)
		a.stored(t, "sae-a", "sae-b", 100)
		hit := []*site{a, b}[which]
		addr := ""
		if hit == b {
			addr = b.ListenAddr().String()
		}
		hit.stop(t)
		store, err := boltstore.Open(filepath.Join(hit.cfg.Dir, StoreFile), hit.cfg.KME,
			boltstore.Options{})
		if err != nil {
			t.Fatal(err)
		}
		hit.cfg.Links[0].Driver = newStream(1, 9, 4096)
		if addr != "" {
			hit.cfg.Listen = addr
		}
		hit.startOver(t, spoiledName{store})
		a.stored(t, "sae-a", "sae-b", 100)
		keys, ids := a.draws(t, "sae-a", 3, 256, "sae-b")
		b.fetches(t, "sae-b", ids, keys)
		hit.turnNow(t)
		if alarms := strings.Join(hit.Stats().Alarms, "\n"); !strings.Contains(alarms,
			"ID key cannot be read: link") {
			t.Errorf("no alarm: %q", alarms)
		}
		a.stop(t)
		b.stop(t)
	}
}
