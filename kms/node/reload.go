package node

import (
	"context"
	"fmt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/peer"
)

// Reload takes over other SAEs of all sites, and other limits, while the KME
// runs; on an error the old ones stay. Requests under way end by the old ones.
// A new SAE draws for an SAE of another site once both KMEs know both.
func (n *Node) Reload(ctx context.Context, saes []SAE, limits kms.Limits) error {
	next := n.cfg
	next.SAEs, next.Limits = saes, limits
	if err := next.Validate(); err != nil {
		return fmt.Errorf("reload KME: %w", err)
	}
	at := make(map[etsi014.SAEID]etsi014.KMEID, len(saes))
	for _, s := range saes {
		at[s.ID] = s.KME
	}
	if err := n.kme.Reload(at, limits); err != nil {
		return fmt.Errorf("reload KME: %w", err)
	}
	if err := n.owner.ask(ctx, func(m *peer.Machine) {
		m.Direct(at)
		m.Reserve(reserved(limits))
	}); err != nil {
		return fmt.Errorf("reload KME: %w", err)
	}
	return nil
}

// reserved is what all SAEs together have reserved of the stock with a peer,
// default-size keys.
func reserved(limits kms.Limits) (keys int) {
	for _, a := range limits.Allowances {
		keys += a.Reserve
	}
	return keys
}
