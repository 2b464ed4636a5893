//go:build race

package daemon

// raced tells that the race detector is in.
const raced = true
