package daemon

import (
	"errors"
	"log/slog"
	"net/netip"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/tunnel/guard"
)

// GuardOf is what keeps a line's networks from being reached without it: those
// behind the other end, and the one between the two devices.
func GuardOf(l *config.Line) guard.Config {
	c := guard.Config{Line: l.ID, Interface: l.TUN.Name}
	if len(l.Endpoints) > 0 {
		c.Outer = l.Endpoints[0].Remote
	}
	for _, p := range append(append([]netip.Prefix(nil), l.TUN.Routes...), l.TUN.Addresses...) {
		if !p.IsSingleIP() {
			c.Networks = append(c.Networks, p.Masked())
		}
	}
	for _, p := range l.TUN.Routes {
		if p.IsSingleIP() {
			c.Networks = append(c.Networks, p)
		}
	}
	return c
}

// guardLine installs the guard before anything of the line can fail. A host
// without nftables is guarded by routes alone, which is worth a warning.
func guardLine(l *config.Line, log *slog.Logger) error {
	if l.Unguarded {
		log.Warn("line is not guarded: what the host does while it is down is up to its routes")
		return nil
	}
	c := GuardOf(l)
	if len(c.Networks) == 0 {
		return nil
	}
	err := guard.Install(c)
	if errors.Is(err, guard.ErrRules) {
		log.Warn("line is guarded by routes alone; a better route would lead around it", "err", err)
		return nil
	}
	return err
}
