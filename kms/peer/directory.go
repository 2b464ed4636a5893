package peer

import "github.com/quietline/quietline/etsi014"

// Direct takes over which KME serves which SAE, between two steps; the caller
// does not change the map afterwards. What is granted stays granted: whether an
// SAE that left may still collect is for the door to say, and what it leaves
// expires. A peer that does not know a new SAE yet refuses its grants.
func (m *Machine) Direct(saes map[etsi014.SAEID]etsi014.KMEID) { m.cfg.SAEs = saes }

// Reserve takes over another Config.Reserve, between two steps.
func (m *Machine) Reserve(keys int) { m.cfg.Reserve = keys }
