//go:build !race

package boltstore

// raced tells that the race detector is in.
const raced = false
