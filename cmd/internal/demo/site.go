package demo

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/rekey"
)

// The demo's addresses. Outer ones are documentation ranges (RFC 5737): no
// packet leaves the namespaces.
const (
	linkID   = "tokyo-kochi"
	lineID   = "tokyo-kochi"
	doorPort = 8443
	linePort = 51820
)

// plan is what differs between the two sites.
type plan struct {
	name, role           string
	wan, fibre, tunInner netip.Prefix
}

var plans = [2]plan{
	{"tokyo", "alice", prefix("192.0.2.1/30"), prefix("198.51.100.1/30"), prefix("10.77.0.1/30")},
	{"kochi", "bob", prefix("192.0.2.2/30"), prefix("198.51.100.2/30"), prefix("10.77.0.2/30")},
}

var prefix = netip.MustParsePrefix

// site is one hospital: its namespace, folder, daemons and second application.
type site struct {
	plan
	ns             *lab.Namespace
	dir, file      string
	kme, sim, line *daemon
}

func (s *site) kmeID() string      { return "kme-" + s.name }
func (s *site) lineSAE() string    { return s.name + "-line" }
func (s *site) recordsSAE() string { return s.name + "-records" }
func (s *site) door() string       { return fmt.Sprintf("127.0.0.1:%d", doorPort) }
func (s *site) path(name string) string {
	return filepath.Join(s.dir, name)
}

// newSites makes two namespaces joined by a wide-area veth and a fibre veth.
func newSites(dir string) (a, b *site, err error) {
	both := [2]*site{}
	for i, p := range plans {
		s := &site{plan: p, dir: filepath.Join(dir, p.name)}
		s.file = s.path("site.yaml")
		if err := os.Mkdir(s.dir, 0o700); err != nil {
			return nil, nil, err
		}
		if s.ns, err = lab.NewNamespace(p.name); err != nil {
			return nil, nil, err
		}
		both[i] = s
	}
	a, b = both[0], both[1]
	for _, veth := range []struct {
		name string
		of   func(*site) netip.Prefix
	}{
		{"wan", func(s *site) netip.Prefix { return s.wan }},
		{"fibre", func(s *site) netip.Prefix { return s.fibre }},
	} {
		end := func(s *site) lab.End {
			return lab.End{Namespace: s.ns, Name: veth.name, Addresses: []netip.Prefix{veth.of(s)}, MTU: 1500}
		}
		if err := lab.Veth(end(a), end(b)); err != nil {
			return nil, nil, err
		}
	}
	return a, b, nil
}

// certificates are made on the spot and live as long as the demo.
const certLife = 24 * time.Hour

// enrol gives both sites their certificates, secrets and bundles, as two
// operators would with a person carrying the files.
func enrol(a, b *site) error {
	for _, root := range []string{"sae-ca", "peer-ca"} {
		ca, err := pki.NewCA("Quietline demo "+root, certLife)
		if err != nil {
			return err
		}
		for _, s := range []*site{a, b} {
			if err := issue(ca, root, s); err != nil {
				return err
			}
		}
	}
	for _, s := range []*site{a, b} {
		if err := keyring.NewRootKey(s.path("root.key")); err != nil {
			return err
		}
	}
	// Pre-shared bits authenticate the classical channel until the link's own
	// key takes over.
	seed, err := distill.NewAuthSeed(rand.Reader)
	if err != nil {
		return err
	}
	if err := writeSecret(seed, a.path("auth.seed"), b.path("auth.seed")); err != nil {
		return err
	}
	return enrolLine(a, b)
}

// issue makes one site's certificates under one root.
func issue(ca *pki.CA, root string, s *site) error {
	if err := ca.SaveCertificate(s.path(root + ".pem")); err != nil {
		return err
	}
	requests := map[string]pki.Request{"peer": {KME: s.kmeID(), Server: true, Client: true}}
	if root == "sae-ca" {
		requests = map[string]pki.Request{
			"door": {
				KME: s.kmeID(), Server: true, DNS: []string{"localhost"},
				IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
			},
			s.lineSAE():    {SAE: s.lineSAE(), Client: true},
			s.recordsSAE(): {SAE: s.recordsSAE(), Client: true},
		}
	}
	for name, r := range requests {
		r.CommonName, r.Life = name, certLife
		issued, err := ca.Issue(r)
		if err != nil {
			return err
		}
		if err := issued.Save(s.path(name+".pem"), s.path(name+".key")); err != nil {
			return err
		}
	}
	return nil
}

// writeSecret writes a secret to each path and clears it.
func writeSecret(s secret.Bytes, paths ...string) error {
	defer s.Clear()
	for _, p := range paths {
		if err := secret.WriteFile(p, s.Expose()); err != nil {
			return err
		}
	}
	return nil
}

// enrolLine makes the line's secrets and tells each end who the other is.
func enrolLine(a, b *site) error {
	link := bundle.NewLinkID()
	var shared secret.Bytes // the first end's link secret is the second's too
	defer func() { shared.Clear() }()
	for _, s := range []*site{a, b} {
		other := b
		if s == b {
			other = a
		}
		secrets, public, err := bundle.Generate(rekey.XWing, shared)
		if err != nil {
			return err
		}
		defer secrets.Clear()
		if shared.Len() == 0 {
			shared = secret.Copy(secrets.Link.Expose())
		}
		if err := bundle.WriteSecrets(s.dir, secrets); err != nil {
			return err
		}
		about := bundle.Bundle{
			Version: bundle.Version, LinkID: link, Site: s.name, Suite: rekey.XWing,
			Static: public, EpochSAE: s.lineSAE(),
			Endpoint: netip.AddrPortFrom(s.wan.Addr(), linePort).String(),
		}
		if err := sign(&about); err != nil {
			return err
		}
		text, err := about.Marshal()
		if err != nil {
			return err
		}
		if err := secret.WriteFile(other.path("peer.bundle"), text); err != nil {
			return err
		}
	}
	return nil
}

// sign signs a bundle with an enrolment key that lives for this call: the demo
// carries bundles itself, so nobody compares fingerprints.
func sign(b *bundle.Bundle) error {
	seed := bundle.NewSignerSeed()
	defer seed.Clear()
	signer, err := bundle.NewSigner(seed)
	if err != nil {
		return err
	}
	return b.Sign(signer)
}

// configure writes the site file that all daemons of the site read.
func configure(s, other *site, opt Options) error {
	simulator := &config.Simulator{
		Role: s.role, Preset: preset, AuthSeed: s.path("auth.seed"),
		Fibre:     config.Channel{Connect: netip.AddrPortFrom(other.fibre.Addr(), 7700).String()},
		Classical: config.Channel{Connect: netip.AddrPortFrom(other.wan.Addr(), 7600).String()},
	}
	if s.role == "alice" {
		simulator.Eve = opt.Eve
		simulator.Fibre = config.Channel{Listen: netip.AddrPortFrom(s.fibre.Addr(), 7700).String()}
		simulator.Classical = config.Channel{Listen: netip.AddrPortFrom(s.wan.Addr(), 7600).String()}
	}
	file := config.Site{
		Version: 1, Site: s.name, Lab: true, State: s.path("state"),
		KME: &config.KME{
			ID: s.kmeID(), Listen: s.door(),
			Certificate: s.path("door.pem"), Key: s.path("door.key"), ClientCA: s.path("sae-ca.pem"),
			PeerListen:      netip.AddrPortFrom(s.wan.Addr(), 7443).String(),
			PeerCertificate: s.path("peer.pem"), PeerKey: s.path("peer.key"), PeerCA: s.path("peer-ca.pem"),
			RootKey: s.path("root.key"), Metrics: "127.0.0.1:9101",
		},
		Peers: []config.Peer{{
			KME: other.kmeID(), Address: netip.AddrPortFrom(other.wan.Addr(), 7443).String(),
		}},
		Links: []config.Link{{
			ID: linkID, Peer: other.kmeID(), Driver: "unix://" + s.path("qkd.sock"), Simulator: simulator,
		}},
		Lines: []config.Line{{
			ID: lineID, Policy: "qkd-strict",
			LinkSecret: s.path(bundle.LinkFile), StaticKey: s.path(bundle.SeedFile), PeerBundle: s.path("peer.bundle"),
			Endpoints: []config.Endpoint{{
				Local:  netip.AddrPortFrom(s.wan.Addr(), linePort),
				Remote: netip.AddrPortFrom(other.wan.Addr(), linePort),
			}},
			TUN:       config.TUN{Name: "ql0", Addresses: []netip.Prefix{s.tunInner}},
			EpochLife: epochLife, HoldMax: holdMax,
			Keys: &config.Keys{
				KMEs: []string{"https://" + s.door()}, KME: s.kmeID(), CA: s.path("sae-ca.pem"),
				Certificate: s.path(s.lineSAE() + ".pem"), Key: s.path(s.lineSAE() + ".key"),
				SAE: s.lineSAE(), PeerSAE: other.lineSAE(),
			},
			Metrics: "127.0.0.1:9102",
		}},
	}
	for _, of := range []*site{s, other} {
		for _, sae := range []string{of.lineSAE(), of.recordsSAE()} {
			entry := config.SAE{ID: sae, KME: of.kmeID()}
			if of == s {
				entry.Identity.URI = "urn:quietline:sae:" + sae
			}
			file.SAEs = append(file.SAEs, entry)
		}
	}
	text, err := file.YAML()
	if err != nil {
		return err
	}
	return secret.WriteFile(s.file, text)
}
