// Package clients holds clients of ETSI GS QKD 014 in other languages, each a
// single file that needs nothing but its language's standard library.
//
// [Python] and [JavaScript] are the files' texts, so that a command can hand
// them out. Both may be copied into any program.
//
// A caller must keep in mind the rule that all clients share: keys are asked
// by POST and never asked again behind the caller's back, because an answer
// that was lost may have taken its keys along. Only an address that cannot be
// connected to is passed over for the next.
package clients

import _ "embed" // for the two texts

//go:embed python/quietline014.py
var python string

//go:embed javascript/quietline014.mjs
var javaScript string

// Python is the text of quietline014.py, for Python 3.9 or later.
func Python() string { return python }

// JavaScript is the text of quietline014.mjs, for Node.js.
func JavaScript() string { return javaScript }
