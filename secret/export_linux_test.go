package secret

// The two forms behind NewLocked, to be tested one by one.
var (
	MapSecret = mapSecret
	MapPinned = mapPinned
)

// Unmap gives back what they mapped.
var Unmap = unmap
