package enrol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// Simulated is the Device of a site without a QKD device.
const Simulated = "simulated"

// Plan is what a person decides about a site.
type Plan struct {
	Site    string     `json:"site"`    // letters, digits, - and _, at most 40
	Address netip.Addr `json:"address"` // as other sites reach this one
	// Device is the socket of the QKD device, unix:///path, or [Simulated].
	Device string `json:"device"`
	// CA is who signs the site's certificates: empty = its own roots, or
	// [External].
	CA string `json:"ca,omitempty"`
}

// External is the CA of a site whose certificates somebody else signs.
const External = "external"

// Check tells the first fault of a plan.
func (p *Plan) Check() error {
	switch {
	case !siteForm.MatchString(p.Site):
		return fmt.Errorf("site %q: %w: expected letters, digits, - and _, at most 40", p.Site, ErrName)
	case !p.Address.IsValid() || p.Address.IsUnspecified() || p.Address.IsMulticast():
		return fmt.Errorf("address %q is none that another site could reach", p.Address)
	case p.Device != Simulated && !strings.HasPrefix(p.Device, "unix:///"):
		return fmt.Errorf("device %q is neither %q nor unix:///path", p.Device, Simulated)
	case p.CA != "" && p.CA != External:
		return fmt.Errorf("CA %q is not %q; leave it out for the site's own", p.CA, External)
	}
	return nil
}

// Ports of a site.
const (
	doorPort  = 8443 // ETSI GS QKD 014, loopback
	peerPort  = 8444 // KME to KME
	joinPort  = 8447 // enrolment, only while an invitation is open
	linePort  = 4500 // first line; the next has the next number
	lightPort = 8500 // first simulated link; two ports each, the next has the next two
)

func kmeID(site string) string   { return "kme-" + site }
func lineSAE(site string) string { return "line-" + site }

// Home is the folder of one site. One process at a time changes it.
type Home struct {
	dir  string
	plan Plan
	auth *pki.Authority // nil under an external CA
	sign *bundle.Signer
}

// Path is a file in the site's folder.
func (h *Home) Path(parts ...string) string {
	return filepath.Join(append([]string{h.dir}, parts...)...)
}

// SiteFile is the site's YAML file.
func (h *Home) SiteFile() string { return h.Path("site.yaml") }

// Plan is what was decided about the site.
func (h *Home) Plan() Plan { return h.plan }

// Authority is the site's CA; nil if another signs its certificates.
func (h *Home) Authority() *pki.Authority { return h.auth }

// Fingerprint is that of the site's enrolment key.
func (h *Home) Fingerprint() string { return bundle.FingerprintOf(h.sign.Public()) }

// Names of pairs in the authority's folder.
const (
	doorPair = "kme-door"
	peerPair = "kme-peer"
	linePair = "line"
)

// Create makes a site in a folder: authority, certificates, secrets, and last
// the site file, so that a site file means a whole site. A folder that holds
// one is [ErrExists]; one in which Create was interrupted is completed. Under
// an external CA there are requests in place of certificates, and the site
// file waits for [Take]: the error is then [*Pending].
func Create(dir string, plan Plan) (*Home, error) {
	if err := plan.Check(); err != nil {
		return nil, fmt.Errorf("make site: %w", err)
	}
	h := &Home{dir: dir, plan: plan}
	if _, err := os.Lstat(h.SiteFile()); err == nil {
		return nil, fmt.Errorf("make site: %w: %s", ErrExists, h.SiteFile())
	}
	if err := h.roomForSockets(); err != nil {
		return nil, fmt.Errorf("make site: %w", err)
	}
	for _, d := range []string{"", "secrets", "enrol", "lines", "pki", "pki/peers"} {
		if err := os.MkdirAll(h.Path(d), 0o700); err != nil {
			return nil, fmt.Errorf("make site: %w", err)
		}
	}
	err := h.keepPlan()
	if err == nil {
		err = h.make()
	}
	if err == nil {
		err = h.writeSite()
	}
	if err != nil {
		return nil, fmt.Errorf("make site: %w", err)
	}
	return h, nil
}

// socketMost is the longest path of a socket, bytes: sun_path of unix(7).
const socketMost = 107

// roomForSockets refuses a folder so deep that the control socket of a line to
// a site with as long a name would not fit: better now than in an enrolment.
func (h *Home) roomForSockets() error {
	dir, err := filepath.Abs(h.dir)
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "state", "line-"+linkName(h.plan.Site, h.plan.Site)+".sock")
	if len(socket) > socketMost {
		return pki.Advise(fmt.Errorf("folder %s is too deep: sockets in it would have paths of %d bytes, "+
			"the kernel takes %d", dir, len(socket), socketMost), "choose a shorter --dir")
	}
	return nil
}

// writeSite writes what hangs on the roots, and last the site file.
func (h *Home) writeSite() error {
	if err := h.writePeers(); err != nil {
		return err
	}
	text := h.siteText()
	if _, err := config.Parse(h.SiteFile(), text); err != nil {
		return err
	}
	return writeFile(h.SiteFile(), text)
}

// keepPlan writes the plan, or finds the same one.
func (h *Home) keepPlan() error {
	text, err := json.Marshal(h.plan)
	if err != nil {
		return err
	}
	path := h.Path("enrol", "site.json")
	old, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return writeFile(path, text)
	case err != nil:
		return err
	case !bytes.Equal(old, text):
		return fmt.Errorf("%w: %s was begun with %s, now it is %s; repeat the first one, or remove "+
			"the folder", ErrExists, h.dir, old, text)
	}
	return nil
}

// wanted is one certificate that a site's daemons show.
type wanted struct {
	name string
	root pki.Root
	req  pki.Request
	use  pki.Use
}

func (h *Home) wanted() []wanted {
	kme, sae := kmeID(h.plan.Site), lineSAE(h.plan.Site)
	return []wanted{
		{doorPair, pki.SAERoot, pki.Request{CommonName: doorPair, KME: kme, Server: true,
			Life: pki.LeafLife, DNS: []string{"localhost"}, IPs: []netip.Addr{loopback}},
			pki.Use{Server: true}},
		{peerPair, pki.PeerRoot, pki.Request{CommonName: kme, KME: kme, Server: true, Client: true,
			Life: pki.LeafLife}, pki.Use{URI: pki.KMEURI(kme), Server: true, Client: true}},
		{linePair, pki.SAERoot, pki.Request{CommonName: sae, SAE: sae, Client: true,
			Life: pki.LeafLife}, pki.Use{URI: pki.SAEURI(sae), Client: true}},
	}
}

// loopback is where the door for applications listens.
var loopback = netip.MustParseAddr("127.0.0.1")

// make makes all but the site file; what is there stays.
func (h *Home) make() (err error) {
	if err := h.makeSecrets(); err != nil {
		return err
	}
	if h.plan.CA == External {
		return h.request()
	}
	if h.auth, err = pki.Init(h.Path("pki"), h.plan.Site); err != nil {
		return err
	}
	for _, c := range h.wanted() {
		if _, err := h.auth.Make(c.root, c.name, c.req); err != nil && !errors.Is(err, pki.ErrExists) {
			return err
		}
		step()
	}
	return nil
}

func (h *Home) makeSecrets() error {
	if err := keyring.NewRootKey(h.Path("secrets", "root.key")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	step()
	if _, err := os.Lstat(h.seedFile()); errors.Is(err, fs.ErrNotExist) {
		seed := bundle.NewSignerSeed()
		defer seed.Clear()
		if err := writeFile(h.seedFile(), seed.Expose()); err != nil {
			return err
		}
	}
	return h.openSigner()
}

// rootFile is the path of the root, or roots, that sign the site's
// certificates of one kind.
func (h *Home) rootFile(root pki.Root) string { return h.Path("pki", string(root)+"-ca.crt") }

func (h *Home) seedFile() string { return h.Path("secrets", "site.seed") }

func (h *Home) openSigner() error {
	seed, err := secret.ReadFile(h.seedFile(), bundle.SignerSeedSize)
	if err != nil {
		return err
	}
	defer seed.Clear()
	h.sign, err = bundle.NewSigner(seed)
	return err
}

// writePeers writes the roots of all key managers that this one trusts: its
// own and one file per enrolled site.
func (h *Home) writePeers() error {
	files, err := filepath.Glob(h.Path("pki", "peers", "*.crt"))
	if err != nil {
		return err
	}
	slices.Sort(files)
	list, err := pki.ReadCertificates(h.rootFile(pki.PeerRoot))
	if err != nil {
		return err
	}
	for _, f := range files {
		more, err := pki.ReadCertificates(f)
		if err != nil {
			return err
		}
		list = append(list, more...)
	}
	return secret.WriteFileMode(h.Path("pki", "peers.crt"), pki.EncodeCertificates(list), 0o644)
}

// OpenHome opens the site whose file is siteFile.
func OpenHome(siteFile string) (*Home, error) {
	if _, err := os.Stat(siteFile); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open site %s: %w", siteFile, ErrNoSite)
	} else if err != nil {
		return nil, fmt.Errorf("open site: %w", err)
	}
	h, err := openPlan(filepath.Dir(siteFile))
	if err == nil && h.plan.CA != External {
		h.auth, err = pki.Open(h.Path("pki"))
	}
	if err != nil {
		return nil, fmt.Errorf("open site: %w", err)
	}
	return h, nil
}

// openPlan reads what was decided about the site in a folder, and its seed.
func openPlan(dir string) (*Home, error) {
	h := &Home{dir: dir}
	path := h.Path("enrol", "site.json")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoSite, dir)
	} else if err != nil {
		return nil, err
	}
	if err := strict(text, &h.plan); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return h, h.openSigner()
}

// strict decodes one JSON value with known fields and nothing behind it.
func strict(text []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value")
	}
	return nil
}
