package kms_test

import (
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/peer"
)

// TestSlot: reserves and shares are counted in the slots that are granted.
func TestSlot(t *testing.T) {
	if kms.SlotBytes != peer.SlotBytes {
		t.Errorf("a slot is %d bytes here and %d in the protocol", kms.SlotBytes, peer.SlotBytes)
	}
}
