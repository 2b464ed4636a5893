package daemon

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014"
)

// callCounter counts what the door answered. It is safe for concurrent use.
type callCounter struct {
	mu     sync.Mutex
	counts map[callKey]control.Calls
}

type callKey struct {
	call string
	code int
}

// observe has the form that [etsi014.HandlerConfig] wants.
func (c *callCounter) observe(o etsi014.Observation) {
	key := callKey{cmp.Or(o.Call, "other"), o.Code}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[callKey]control.Calls)
	}
	n := c.counts[key]
	c.counts[key] = control.Calls{Call: key.call, Code: key.code, Count: n.Count + 1,
		Seconds: n.Seconds + o.Took.Seconds()}
}

// list is what was counted, in a fixed order.
func (c *callCounter) list() []control.Calls {
	c.mu.Lock()
	list := slices.AppendSeq([]control.Calls{}, maps.Values(c.counts))
	c.mu.Unlock()
	slices.SortFunc(list, func(a, b control.Calls) int {
		return cmp.Or(strings.Compare(a.Call, b.Call), a.Code-b.Code)
	})
	return list
}
