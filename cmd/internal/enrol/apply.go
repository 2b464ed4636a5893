package enrol

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/rekey"
)

// Roles of the two sites in an enrolment.
const (
	inviter = "inviter"
	joiner  = "joiner"
)

// card makes this site's card of one enrolment. static is the public key of
// its end of the line, port its UDP port.
func (h *Home) card(t *Token, role string, static []byte, port uint16) (*Card, error) {
	root, err := os.ReadFile(h.rootFile(pki.PeerRoot))
	if err != nil {
		return nil, err
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.plan.Address, port) }
	b := &bundle.Bundle{Version: bundle.Version, LinkID: t.ID, Site: h.plan.Site, Suite: rekey.XWing,
		Static: static, EpochSAE: lineSAE(h.plan.Site), Endpoint: at(port).String()}
	if err := b.Sign(h.sign); err != nil {
		return nil, err
	}
	text, err := b.Marshal()
	if err != nil {
		return nil, err
	}
	light := lightPort + 2*(port-linePort)
	return &Card{Version: cardVersion, Invitation: t.Number(), Role: role, Site: h.plan.Site,
		KME: kmeID(h.plan.Site), PeerRoot: string(root), PeerAddress: at(peerPort),
		SAE: lineSAE(h.plan.Site), Endpoint: at(port), Bundle: string(text),
		Simulated: h.plan.Device == Simulated, Fibre: at(light), Classical: at(light + 1),
	}, nil
}

// fit holds the other site's card against the token and this site.
func (h *Home) fit(t *Token, c *Card, role, site string) error {
	switch {
	case c.Invitation != t.Number() || c.Role != role:
		return fmt.Errorf("%w: it is the %s's of invitation %s, expected the %s's of %s", ErrCard,
			c.Role, c.Invitation, role, t.Number())
	case c.Site != site:
		return fmt.Errorf("%w: the token is for %q, the card of %q; run quietline pki invite %s",
			ErrName, site, c.Site, c.Site)
	case c.Site == h.plan.Site:
		return fmt.Errorf("%w: both sites are called %q; one needs another name", ErrName, c.Site)
	case c.Simulated != (h.plan.Device == Simulated):
		return fmt.Errorf("%w: one of %s and %s has a simulated device and the other a real one; "+
			"run quietline init again at one of them", ErrCard, c.Site, h.plan.Site)
	}
	return nil
}

// bond is all that a site needs to work with another.
type bond struct {
	mine, theirs *Card // of them the inviter's holds link, policy, inner
	link         secret.Bytes
	seed         secret.Bytes // empty for a real device
}

// apply writes what the site's daemons read: roots, bundle, secrets, and last
// the site file. It can be repeated.
func (h *Home) apply(b *bond) error {
	site := b.theirs.Site
	dir := h.lineDir(site)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	files := []struct {
		path string
		text []byte
	}{
		{h.Path("pki", "peers", site+".crt"), []byte(b.theirs.PeerRoot)},
		{h.Path("lines", site, "peer.bundle"), []byte(b.theirs.Bundle)},
	}
	for _, f := range files {
		if err := writeFile(f.path, f.text); err != nil {
			return err
		}
	}
	if err := writeSecret(h.Path("lines", site, bundle.LinkFile), b.link); err != nil {
		return err
	}
	if b.seed.Len() > 0 {
		if err := h.keepSeed(b); err != nil {
			return err
		}
	}
	if err := h.writePeers(); err != nil {
		return err
	}
	return h.amend(b)
}

func (h *Home) lineDir(site string) string { return h.Path("lines", site) }

// authSeed is the file of a simulated link's seed, one for each invitation: its
// name in the site file tells a running simulator that there is a new one.
func (h *Home) authSeed(b *bond) string {
	return h.Path("lines", b.theirs.Site, "auth-"+b.mine.Invitation[:8]+".seed")
}

// keepSeed writes the seed of a simulated link, once: after that the simulator
// has it, and what it made of an older one goes.
func (h *Home) keepSeed(b *bond) error {
	mark := h.Path("lines", b.theirs.Site, "auth.invitation")
	if done, err := os.ReadFile(mark); err == nil && string(done) == b.mine.Invitation {
		return nil
	}
	if err := writeFile(h.authSeed(b), b.seed.Expose()); err != nil {
		return err
	}
	return writeFile(mark, []byte(b.mine.Invitation))
}

// authPools are what simulators made of the seeds of a link.
func (h *Home) authPools(link string) ([]string, error) {
	return filepath.Glob(h.Path("state", "sim-"+link, "auth*"))
}

// amend adds the other site to the site file.
func (h *Home) amend(b *bond) error {
	path := h.SiteFile()
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	now, err := config.Parse(path, text)
	if err != nil {
		return err
	}
	add, err := h.addition(b, now)
	if err != nil {
		return err
	}
	if text, err = config.Amend(path, text, add); err != nil {
		return err
	}
	return writeFile(path, text)
}

// addition is what the other site means for this one's file.
func (h *Home) addition(b *bond, now *config.Site) (*config.Site, error) {
	first := b.mine // the inviter's card holds the choices of both
	if b.mine.Role == joiner {
		first = b.theirs
	}
	theirs, err := bundle.Unmarshal([]byte(b.theirs.Bundle))
	if err != nil {
		return nil, err
	}
	site := b.theirs.Site
	own, other := first.Inner.Addr(), first.Inner.Addr().Next()
	if b.mine.Role == joiner {
		own, other = other, own
	}
	link := config.Link{ID: first.Link, Peer: b.theirs.KME, Driver: h.plan.Device}
	if b.mine.Simulated {
		link.Driver = "unix:state/qkd-" + site + ".sock"
		link.Simulator = h.simulator(b)
	}
	line := config.Line{ID: first.Link, Policy: first.Policy,
		LinkSecret: "lines/" + site + "/" + bundle.LinkFile,
		StaticKey:  "lines/" + site + "/" + bundle.SeedFile,
		PeerBundle: "lines/" + site + "/peer.bundle", PeerFingerprint: theirs.Fingerprint(),
		Endpoints: []config.Endpoint{{Local: b.mine.Endpoint, Remote: b.theirs.Endpoint}},
		TUN: config.TUN{Name: freeTUN(now, first.Link),
			Addresses: []netip.Prefix{netip.PrefixFrom(own, first.Inner.Bits())}},
		EpochLife: 2 * time.Minute, HoldMax: 10 * time.Minute,
		Keys: &config.Keys{KMEs: []string{h.doorURL()},
			Certificate: "pki/" + linePair + ".pem", Key: "pki/" + linePair + ".pem",
			CA: "pki/sae-ca.crt", SAE: b.mine.SAE, PeerSAE: b.theirs.SAE}}
	return &config.Site{
		Peers: []config.Peer{{KME: b.theirs.KME, Address: b.theirs.PeerAddress.String(),
			CA: "pki/peers/" + site + ".crt"}},
		Links: []config.Link{link}, Lines: []config.Line{line},
		SAEs: []config.SAE{{ID: b.theirs.SAE, KME: b.theirs.KME}},
	}, nil
}

// simulator is this site's end of a simulated link: the inviter is alice.
func (h *Home) simulator(b *bond) *config.Simulator {
	s := &config.Simulator{Role: "alice", Preset: "metro",
		AuthSeed:  "lines/" + b.theirs.Site + "/auth-" + b.mine.Invitation[:8] + ".seed",
		Fibre:     config.Channel{Listen: b.mine.Fibre.String()},
		Classical: config.Channel{Listen: b.mine.Classical.String()}}
	if b.mine.Role == joiner {
		s.Role = "bob"
		s.Fibre = config.Channel{Connect: b.theirs.Fibre.String()}
		s.Classical = config.Channel{Connect: b.theirs.Classical.String()}
	}
	return s
}

// freeTUN is the interface that the line has already, or the first free one.
func freeTUN(now *config.Site, line string) string {
	var taken []string
	for _, l := range now.Lines {
		if l.ID == line {
			return l.TUN.Name
		}
		taken = append(taken, l.TUN.Name)
	}
	for i := 0; ; i++ {
		if name := fmt.Sprintf("ql%d", i); !slices.Contains(taken, name) {
			return name
		}
	}
}

// freePort is the UDP port that the line to a site has, or the first free one.
func (h *Home) freePort(line string) (uint16, error) {
	now, err := config.Load(h.SiteFile())
	if err != nil {
		return 0, err
	}
	taken := map[uint16]bool{}
	for _, l := range now.Lines {
		if l.ID == line && len(l.Endpoints) == 1 {
			return l.Endpoints[0].Local.Port(), nil
		}
		for _, e := range l.Endpoints {
			taken[e.Local.Port()] = true
		}
	}
	for port := uint16(linePort); port < linePort+1000; port++ {
		if !taken[port] {
			return port, nil
		}
	}
	return 0, errors.New("no free UDP port for a line")
}

// staticKey makes or finds the static key of this end of a line and returns
// its public key.
func (h *Home) staticKey(site string) ([]byte, error) {
	dir := h.lineDir(site)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := h.Path("lines", site, bundle.SeedFile)
	seed, err := bundle.ReadSecret(path)
	if errors.Is(err, os.ErrNotExist) {
		var fresh *bundle.Secrets
		if fresh, _, err = bundle.Generate(rekey.XWing, secret.Bytes{}); err != nil {
			return nil, err
		}
		defer fresh.Clear()
		if err := writeSecret(path, fresh.Seed); err != nil {
			return nil, err
		}
		return rekey.Public(rekey.XWing, fresh.Seed)
	}
	if err != nil {
		return nil, err
	}
	defer seed.Clear()
	return rekey.Public(rekey.XWing, seed)
}
