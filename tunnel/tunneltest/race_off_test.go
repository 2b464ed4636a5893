//go:build !race

package tunneltest

// raced is how many times longer the race detector may make things last.
const raced = 1
