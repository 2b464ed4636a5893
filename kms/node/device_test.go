package node

import (
	"errors"
	"testing"

	"github.com/quietline/quietline/hw"
)

// TestBlockIsAcknowledgedWhenStored: the device forgets a block that was
// acknowledged to it, so nothing may be said before the commit. The test
// stands in for the owner, and its commit fails.
func TestBlockIsAcknowledgedWhenStored(t *testing.T) {
	a, _ := newPair(t, 4096)
	acked := make(chan uint64, 2)
	a.driver.acked = func(seq uint64) { acked <- seq }
	n, err := Open(a.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	a.driver.allow(2)
	var b hw.Block
	if err := a.driver.ReadBlock(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	took := make(chan error, 1)
	go func() { took <- n.devices[0].take(t.Context(), &b) }()
	select {
	case req := <-n.owner.in:
		if len(acked) > 0 {
			t.Error("a block was acknowledged before it was stored")
		}
		broken := errors.New("disk is broken")
		req.reply <- reply{err: broken}
		if err := <-took; !errors.Is(err, broken) {
			t.Errorf("take: %v, want %v", err, broken)
		}
	case err := <-took:
		t.Fatalf("block was taken without the owner: %v", err)
	}
	if len(acked) > 0 {
		t.Error("a block that was not stored was acknowledged")
	}
}
