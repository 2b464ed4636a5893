package daemon

import (
	"net"
	"net/netip"
	"net/url"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/tunnel/line"
)

// padStatus puts the one-time pad into the words of status; nil = none.
func (e *lineEnd) padStatus(p *line.PadStats, cfg *config.Line) *control.Pad {
	if p == nil {
		return nil
	}
	s := &control.Pad{Mark: p.Mark.String(), Left: p.Left, Hold: p.Target, In: 8 * p.In,
		Out: 8 * p.Out, Drawn: p.Drawn, Collected: p.Collected, Lost: p.Lost, Sealed: p.Sealed,
		Opened: p.Opened}
	if p.SecondsLeft >= 0 {
		s.LeftFor = known(p.SecondsLeft)
	}
	for _, c := range p.Classes {
		s.Classes = append(s.Classes, control.PadClass(c))
	}
	s.NotBecause = assumptions(p.Simulated || e.simulated.Load(), cfg.Keys)
	s.InformationTheoretic = len(s.NotBecause) == 0
	return s
}

// assumptions are the legs of the pad's way that rest on more than physics, or
// of which this end cannot know. Pad and tag of the payload do not; the rest is
// the key manager's, and ETSI GS QKD 014 has no word for it.
func assumptions(simulated bool, keys *config.Keys) (why []string) {
	if simulated {
		why = append(why, "the QKD link is simulated")
	}
	if keys != nil {
		for _, door := range keys.KMEs {
			if !onThisMachine(door) {
				why = append(why, "TLS protects the way from the key manager, which is another machine")
				break
			}
		}
	}
	return append(why, "the key manager does not say what its devices, their randomness, "+
		"their authentication and relays on the way rest on")
}

// onThisMachine tells whether a door is reached without leaving the machine.
func onThisMachine(door string) bool {
	u, err := url.Parse(door)
	if err != nil {
		return false
	}
	host := u.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
