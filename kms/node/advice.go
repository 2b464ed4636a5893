package node

import (
	"strings"

	"github.com/quietline/quietline/kms/peer"
)

// advice is what a person can do about an alarm of the machine, by its text.
var advice = map[string]string{
	"blocks differ": "this block is void at both ends; if it goes on, the two devices do not make " +
		"one key: check that they are joined to each other, and their error correction",
	"device repeated a block number with other bits": "the first block counts and the second is " +
		"dropped; have the device's counter looked at, or give the link a new generation",
	skipped: "what the other end has of them becomes void; look why this end lost them: " +
		"the device's buffer, or a consumer beside us",
	"our disk is old or copied": "what is in doubt is void and nothing comes twice; never restore " +
		"or clone the state folder",
	"peer's disk is old": "what is in doubt is void and nothing comes twice; ask that site whether " +
		"somebody restored its state folder or runs a copy of it",
	"segment cannot be read": "it is void at both ends; check this machine's disk",
}

// skipped is the alarm of a device that left out block numbers.
const skipped = "device skipped block numbers"

// refusalAdvice is the same of "peer is refused", by the beginning of its reason.
var refusalAdvice = []struct{ reason, advice string }{
	{"peer does not know link", "give the link one name in both site files, or take it out of ours"},
	{"peer has link", "give the link one name in both site files, or take it out of the peer's"},
	{"weights of link", "set the same weights in both site files"},
	{"peer calls itself", "every KME needs its own ID: correct kme.id or peers[].kme"},
	{"a second live incarnation", "two processes run with that KME's state; stop one of them"},
	{"peer shows", "that site's state folder was restored or copied; it takes a new number by itself"},
}

// advise is what to do about an event; empty if the event says it.
func advise(e peer.Event) string {
	if a := advice[e.Text]; a != "" {
		return a
	}
	if e.Text == "peer is refused" {
		for _, r := range refusalAdvice {
			if strings.HasPrefix(e.Reason, r.reason) {
				return r.advice
			}
		}
	}
	return ""
}
