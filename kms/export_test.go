package kms

// SlotBytes is for the test that compares it with the protocol's.
const SlotBytes = slotBytes
