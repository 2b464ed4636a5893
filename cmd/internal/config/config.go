// Package config reads the one YAML file that describes a site to all of its
// daemons.
//
// The main type is [Site]; its comments are the manual of the file. [Load]
// refuses unknown keys and reports every fault of a file at once, each with
// its line, the key, what was found and what to do. It opens the file itself
// and nothing else: no socket, no device, no file that the site names.
//
// A caller must keep in mind that relative paths count from the folder of the
// file, and that secrets stand in the file by path only.
package config

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Site is the whole file. In the comments below, "required" means that the key
// must stand in the file; all other keys have the default that is named.
type Site struct {
	// version of this file's layout. Required; 1.
	Version int `yaml:"version" check:"required"`
	// site is the name of this site: letters, digits, dot, dash, underscore,
	// at most 63. Required.
	Site string `yaml:"site" check:"required,name"`
	// lab accepts links that are simulated. Their keys protect nothing, so a
	// site with patients' data leaves it out. Default false.
	Lab bool `yaml:"lab,omitempty"`
	// state is the folder in which the daemons keep what must survive a
	// restart, and their control sockets. It is created with mode 0700.
	// Required.
	State string `yaml:"state" check:"required,path"`
	// kme is the key manager of this site. Left out on a machine that runs
	// only lines or simulators.
	KME *KME `yaml:"kme,omitempty"`
	// peers are the key managers at the other ends of the links.
	Peers []Peer `yaml:"peers,omitempty"`
	// links are the QKD links that end here.
	Links []Link `yaml:"links,omitempty"`
	// saes are the applications that may draw keys, and those at other sites
	// with which they share them.
	SAEs []SAE `yaml:"saes,omitempty"`
	// lines are the encrypted lines that end here.
	Lines []Line `yaml:"lines,omitempty"`
}

// KME is the key manager of the site.
type KME struct {
	// id names this key manager (KME ID of ETSI GS QKD 014). Required.
	ID string `yaml:"id" check:"required,name"`
	// listen is the address of the ETSI GS QKD 014 door, host:port. Required.
	Listen string `yaml:"listen" check:"required,address"`
	// certificate and key are what the door shows, PEM. The key file has mode
	// 0600. Required.
	Certificate string `yaml:"certificate" check:"required,path"`
	Key         string `yaml:"key" check:"required,path"`
	// second_certificate and second_key are another pair of the door, of the
	// other kind: ECDSA beside RSA, for SAEs that can do only one of them.
	// Default: none.
	SecondCertificate string `yaml:"second_certificate,omitempty" check:"path"`
	SecondKey         string `yaml:"second_key,omitempty" check:"path"`
	// client_ca is the root that signs the certificates of SAEs, PEM. It must
	// not be the root of peer key managers. Required.
	ClientCA string `yaml:"client_ca" check:"required,path"`
	// client_crl is the revocation list of client_ca, PEM or DER. It is read
	// again when it changes; a connection that it forbids is cut at once.
	// Default: none.
	ClientCRL string `yaml:"client_crl,omitempty" check:"path"`
	// client_deny is a text file of SAEs' certificates that are refused
	// whatever else is true: the SHA-256 of one a line, as in identity.pin; a
	// line that begins with # is a remark. It is read again when it changes; a
	// connection that it forbids is cut at once. Default: none.
	ClientDeny string `yaml:"client_deny,omitempty" check:"path"`
	// max_keys is how many keys one request may draw or fetch, 1 to 1024.
	// Default 128.
	MaxKeys int `yaml:"max_keys,omitempty"`
	// max_connections is how many connections of SAEs the door holds, 16 to
	// 65536; when they are all there, the one idle longest is closed for a new
	// one. Default 16384, or what the limit of open files leaves.
	MaxConnections int `yaml:"max_connections,omitempty"`
	// max_connection_age ends a connection after the answer that finds it
	// older, so that a renewed certificate is shown some day: 1m to 24h.
	// Default 1h.
	MaxConnectionAge time.Duration `yaml:"max_connection_age,omitempty"`
	// peer_listen is where other key managers reach this one, host:port.
	// Required.
	PeerListen string `yaml:"peer_listen" check:"required,address"`
	// peer_certificate and peer_key are what this key manager shows to its
	// peers, PEM; the certificate names urn:quietline:kme:<id>. Required.
	PeerCertificate string `yaml:"peer_certificate" check:"required,path"`
	PeerKey         string `yaml:"peer_key" check:"required,path"`
	// peer_ca is the root that signs the certificates of peers, PEM. Required.
	PeerCA string `yaml:"peer_ca" check:"required,path"`
	// peer_crl is a file of revocation lists of peers' roots, PEM or DER. It is
	// read again when it changes; a peer that it names is cut off at once.
	// Default: none.
	PeerCRL string `yaml:"peer_crl,omitempty" check:"path"`
	// root_key is the file of the key under which stored keys are wrapped; mode
	// 0600 or 0400: 32 random bytes, or such bytes under a passphrase, with
	// which the key manager starts sealed; `quietline kme new-root` makes
	// either. Keep it away from the state folder's backups. Required, or
	// root_credential.
	RootKey string `yaml:"root_key,omitempty" check:"path"`
	// root_credential is the name of the systemd credential that holds these 32
	// bytes instead of a file: the service's unit has
	// LoadCredentialEncrypted=<name>. Default: none.
	RootCredential string `yaml:"root_credential,omitempty" check:"name"`
	// control is the Unix socket of status and commands, mode 0600.
	// Default <state>/kme.sock.
	Control string `yaml:"control,omitempty" check:"socket"`
	// metrics is where Prometheus scrapes: a loopback host:port or unix:/path.
	// Default: none.
	Metrics string `yaml:"metrics,omitempty" check:"metrics"`
}

// Peer is a key manager at the other end of one or more links.
type Peer struct {
	// kme is its KME ID. Required.
	KME string `yaml:"kme" check:"required,name"`
	// address is its peer_listen as seen from here, host:port. Required.
	Address string `yaml:"address" check:"required,address"`
	// ca is the root that may sign for this peer and for no other, PEM, so that
	// one site cannot pass for another. Default: kme.peer_ca, any of whose roots
	// may sign for any peer without a ca of its own.
	CA string `yaml:"ca,omitempty" check:"path"`
}

// Link is one QKD link that ends here.
type Link struct {
	// id names the link; both ends use the same. Required.
	ID string `yaml:"id" check:"required,name"`
	// peer is the KME ID at the other end, one of peers. Required.
	Peer string `yaml:"peer" check:"required,name"`
	// driver is the door of the device as a URL: unix:///path of the socket
	// at which the device, or the simulator, hands out secret blocks.
	// Required.
	Driver string `yaml:"driver" check:"required,driver"`
	// simulator makes `quietline sim` play the device behind driver. Needs
	// lab: true. Default: none, the device is real.
	Simulator *Simulator `yaml:"simulator,omitempty"`
}

// Simulator is this site's end of a simulated link.
type Simulator struct {
	// role of this end: alice sends photons, bob detects them. Required.
	Role string `yaml:"role" check:"required"`
	// preset names source, fibre, detectors and block size. Required.
	Preset string `yaml:"preset" check:"required,preset"`
	// fibre carries what photons carry, so it is never the wide-area network.
	// One end listens, the other connects. Required.
	Fibre Channel `yaml:"fibre" check:"required"`
	// classical carries sifting and reconciliation, authenticated. Required.
	Classical Channel `yaml:"classical" check:"required"`
	// auth_seed is a file of random bytes, equal at both ends, that begins the
	// authentication of the classical channel: 2 KiB at least, 64 KiB is
	// plenty; mode 0600. At its first start the simulator takes them over into
	// the state folder and removes the file, so that no bit is used twice.
	// Required.
	AuthSeed string `yaml:"auth_seed" check:"required,path"`
	// eve is the fraction of pulses that an eavesdropper intercepts and
	// resends, 0 to 1; only at alice, where the pulses leave. Default 0.
	Eve float64 `yaml:"eve,omitempty"`
	// control is the Unix socket of status and commands, mode 0600.
	// Default <state>/sim-<link>.sock.
	Control string `yaml:"control,omitempty" check:"socket"`
	// metrics is where Prometheus scrapes: a loopback host:port or unix:/path.
	// Default: none.
	Metrics string `yaml:"metrics,omitempty" check:"metrics"`
}

// Channel is one connection of the simulator: exactly one of the two is set.
// Each is host:port or unix:/path.
type Channel struct {
	Listen  string `yaml:"listen,omitempty" check:"channel"`
	Connect string `yaml:"connect,omitempty" check:"channel"`
}

// SAE is one application that draws keys.
type SAE struct {
	// id is its SAE ID, 1 to 291 characters. Required.
	ID string `yaml:"id" check:"required,sae"`
	// kme is the key manager it asks: kme.id, or one of peers. Required.
	KME string `yaml:"kme" check:"required,name"`
	// identity says which certificate is this SAE. Exactly one is set;
	// required for the SAEs of this site's key manager, refused for others.
	Identity Identity `yaml:"identity,omitempty"`
	// profile says how far the door bends to what this SAE's box sends:
	// strict, default, fortigate, junos, strongswan or arnika; for the SAEs of
	// this site's key manager only. Default default.
	Profile string `yaml:"profile,omitempty" check:"profile"`
	// reread_window is how long this SAE may fetch a key by its ID once more,
	// if the answer was lost: the same bytes for the same certificate, 1s to
	// 1m. Until it ends the bytes are held in memory; erasure counts from its
	// end. For the SAEs of this site's key manager only. Default 0s: each key
	// is answered once.
	RereadWindow time.Duration `yaml:"reread_window,omitempty"`
	// limits bound what this SAE may take, so that one hungry client cannot
	// starve a line; for the SAEs of this site's key manager only. A refused
	// call is answered 503 with Retry-After and counted in the audit log.
	// Default: no bounds, nothing reserved.
	Limits SAELimits `yaml:"limits,omitempty"`
}

// SAELimits are the bounds of one SAE.
type SAELimits struct {
	// requests_per_second bounds calls of any kind; fractions are fine, above
	// 0 to 1000000. Default: no bound but 64 calls at a time.
	RequestsPerSecond float64 `yaml:"requests_per_second,omitempty"`
	// keys_per_second bounds new keys in the long run, above 0 to 1000000. One
	// request may ask for more than a second's worth; the next ones wait.
	// Default: no bound.
	KeysPerSecond float64 `yaml:"keys_per_second,omitempty"`
	// share is the largest part of the stock with one peer, above 0 to 1, that
	// the SAE may draw within share_window. Default: no bound.
	Share float64 `yaml:"share,omitempty"`
	// share_window is the time after which the share counts anew, 1s to 24h.
	// Default 1m.
	ShareWindow time.Duration `yaml:"share_window,omitempty"`
	// reserve is how many keys of 256 bits all other SAEs together leave for
	// this one, 1 to 1048576: they are refused while the stock with the peer
	// that they ask for, as this key manager owns it, is not a third larger.
	// Default: none.
	Reserve int `yaml:"reserve,omitempty"`
}

// Identity is how a certificate shows who it is.
type Identity struct {
	// uri is a URI in its subject alternative names, e.g. urn:quietline:sae:x.
	URI string `yaml:"uri,omitempty"`
	// dns is a DNS name in its subject alternative names.
	DNS string `yaml:"dns,omitempty"`
	// cn is the common name of its subject, for old clients.
	CN string `yaml:"cn,omitempty"`
	// pin is the SHA-256 of the certificate (DER), 64 hexadecimal digits.
	Pin string `yaml:"pin,omitempty" check:"pin"`
}

// Line is one encrypted line to another site.
type Line struct {
	// id names the line here, in logs and metrics. Required.
	ID string `yaml:"id" check:"required,name"`
	// policy says what an epoch must rest on, and is never lowered by the
	// peer: qkd-strict (a fresh QKD key in every epoch, else the line holds
	// and blocks), qkd-required (fresh, or chained from one for an hour at
	// most), qkd-preferred (QKD while there is any, else post-quantum alone,
	// with an alarm) or pqc-only (no QKD on this line); otp-strict (as
	// qkd-strict, and every packet under one-time pad or dropped) or
	// otp-preferred (as qkd-required, with pad while there is any, else an
	// alarm). On both ends the same. Default qkd-preferred.
	Policy string `yaml:"policy,omitempty"`
	// link_secret is the file of 32 random bytes, in base64, that both ends
	// share; mode 0600. Required.
	LinkSecret string `yaml:"link_secret" check:"required,path"`
	// static_key is the file of the 32 random bytes, in base64, that this
	// end's static key is made of; mode 0600. Required.
	StaticKey string `yaml:"static_key" check:"required,path"`
	// peer_bundle is the file that says who the other end is: its static key,
	// its SAE, and the line's number in the handshake. Required.
	PeerBundle string `yaml:"peer_bundle" check:"required,path"`
	// peer_fingerprint is that of the other site's enrolment key, as it was
	// read over the telephone: eight groups of four hexadecimal digits. The
	// bundle must be signed by that key. Default: any key.
	PeerFingerprint string `yaml:"peer_fingerprint,omitempty" check:"fingerprint"`
	// endpoints are the UDP addresses of the two ends. Required; exactly one,
	// more are refused.
	Endpoints []Endpoint `yaml:"endpoints" check:"required"`
	// tun is the network device that plain packets enter and leave. Required.
	TUN TUN `yaml:"tun" check:"required"`
	// outer is how the line's own packets look and behave between the sites.
	Outer Outer `yaml:"outer,omitempty"`
	// epoch_life is the time between two rekeyings, 1s to 1h. Default 120s.
	EpochLife time.Duration `yaml:"epoch_life,omitempty"`
	// hold_max is how long an epoch may carry traffic when no newer one comes,
	// before the line blocks: longer than epoch_life, at most 24h. Default
	// 600s, or twice epoch_life if that is longer.
	HoldMax time.Duration `yaml:"hold_max,omitempty"`
	// unguarded leaves the host's routes and nftables alone. Otherwise the
	// networks of tun are guarded from the first start on, whether the line runs
	// or not: packets for them leave through the line or not at all, until
	// `quietline line guard --remove`. Default false.
	Unguarded bool `yaml:"unguarded,omitempty"`
	// pad_hold is how much one-time pad is held ready for sending, bytes, 65536
	// to 67108864; alarms come at 25, 10 and 2 % of it. For policies with pad.
	// Default 1048576.
	PadHold int `yaml:"pad_hold,omitempty"`
	// classes say which traffic goes under one-time pad; the first that fits a
	// packet counts. Under otp-preferred what none fits goes without pad; under
	// otp-strict everything has pad and classes say only what is urgent.
	// Default: everything goes under pad, nothing is urgent.
	Classes []Class `yaml:"classes,omitempty"`
	// keys is where the line draws QKD keys. Required unless the policy is
	// pqc-only.
	Keys *Keys `yaml:"keys,omitempty"`
	// control is the Unix socket of status and commands, mode 0600.
	// Default <state>/line-<id>.sock.
	Control string `yaml:"control,omitempty" check:"socket"`
	// metrics is where Prometheus scrapes: a loopback host:port or unix:/path.
	// Default: none.
	Metrics string `yaml:"metrics,omitempty" check:"metrics"`
}

// Class is traffic of a line that is treated alike. A key left out fits
// everything.
type Class struct {
	// name of the class, in status and metrics. Required.
	Name string `yaml:"name" check:"required,name"`
	// to are the networks that packets go to.
	To []netip.Prefix `yaml:"to,omitempty"`
	// ports of TCP or UDP, of either end of a connection, 1 to 65535.
	Ports []int `yaml:"ports,omitempty"`
	// dscp values of the packets, 0 to 63.
	DSCP []int `yaml:"dscp,omitempty"`
	// pad puts the class under one-time pad. Default false.
	Pad bool `yaml:"pad,omitempty"`
	// urgent traffic is admitted longest when pad runs low. Default false.
	Urgent bool `yaml:"urgent,omitempty"`
}

// Endpoint is one UDP path between the two ends.
type Endpoint struct {
	// local is the address and port datagrams leave from. Required.
	Local netip.AddrPort `yaml:"local" check:"required"`
	// remote is the address and port of the other end. Required.
	Remote netip.AddrPort `yaml:"remote" check:"required"`
	// roaming lets the other end come from another address: it is where its
	// newest authentic record came from. Default false: the address is fixed,
	// and what comes from others is dropped by the kernel.
	Roaming bool `yaml:"roaming,omitempty"`
}

// TUN is the network device of a line.
type TUN struct {
	// name of the interface, 1 to 15 characters. Required.
	Name string `yaml:"name" check:"required,interface"`
	// addresses of the interface with prefix length, e.g. 10.9.0.1/30.
	Addresses []netip.Prefix `yaml:"addresses,omitempty"`
	// routes are the networks behind the other end.
	Routes []netip.Prefix `yaml:"routes,omitempty"`
	// mtu is the largest packet taken in, bytes, 1280 to 9000. Default: what
	// a path of 1500 bytes outside leaves room for.
	MTU int `yaml:"mtu,omitempty"`
	// queues are what the device has, each read by a thread of its own, 1 to 16.
	// Default: one for each four processors, four at most.
	Queues int `yaml:"queues,omitempty"`
	// without are offloads of the device not to use: tso (super-frames of TCP,
	// and UDP's with them), uso (of UDP) and checksum (all). Default none; what
	// a kernel refuses is left out anyway.
	Without []string `yaml:"without,omitempty"`
}

// Keys is a line's access to the key manager.
type Keys struct {
	// kmes are the doors of the key manager, https://host:port: one, or a second
	// one that is asked while the first cannot be reached. Required.
	KMEs []string `yaml:"kmes" check:"required,https"`
	// kme is the KME ID that must answer at each of them: certificate and status
	// must name it. Without it whoever holds a certificate of ca for that host
	// may.
	KME string `yaml:"kme,omitempty" check:"name"`
	// certificate and key identify this line's SAE, PEM; the key file has
	// mode 0600. Required.
	Certificate string `yaml:"certificate" check:"required,path"`
	Key         string `yaml:"key" check:"required,path"`
	// ca is the root that signs the key manager's certificate, PEM. Required.
	CA string `yaml:"ca" check:"required,path"`
	// sae and peer_sae are the SAE IDs of the two ends of the line. Required.
	SAE     string `yaml:"sae" check:"required,sae"`
	PeerSAE string `yaml:"peer_sae" check:"required,sae"`
	// pad is the SAE that draws one-time pad at the same key manager. Required
	// for policies with pad.
	Pad *PadKeys `yaml:"pad,omitempty"`
}

// PadKeys is a line's second SAE: raw pad never passes a key derivation, so it
// is never drawn by the one of epoch keys.
type PadKeys struct {
	// certificate and key identify the SAE, PEM; the key file has mode 0600.
	// Required.
	Certificate string `yaml:"certificate" check:"required,path"`
	Key         string `yaml:"key" check:"required,path"`
	// sae and peer_sae are the pad's SAE IDs of the two ends. Required.
	SAE     string `yaml:"sae" check:"required,sae"`
	PeerSAE string `yaml:"peer_sae" check:"required,sae"`
}

// maxFile bounds a site file, bytes: a thousand lines of config need a tenth.
const maxFile = 1 << 20

// Load reads and checks a site file. A faulty file is refused with [*Faults].
func Load(path string) (*Site, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse is [Load] with the bytes at hand. The name stands in faults, and
// relative paths count from its folder.
func Parse(name string, data []byte) (*Site, error) {
	site := new(Site)
	d := newDecoder(name)
	if root := d.document(data); root != nil {
		d.decode(root, site)
		d.setDefaults(site)
		d.validate(site)
	}
	if err := d.err(); err != nil {
		return nil, err
	}
	return site, nil
}

// YAML renders the site as a file that [Parse] reads back equal. Comments are
// lost; what is written by hand stays written by hand.
func (s *Site) YAML() ([]byte, error) { return yaml.Marshal(s) }

// SimulatedLink finds a link with a simulator by its id, or the only one when
// id is empty.
func (s *Site) SimulatedLink(id string) (*Link, error) {
	var found []*Link
	for i := range s.Links {
		if s.Links[i].Simulator != nil {
			found = append(found, &s.Links[i])
		}
	}
	return pick(found, id, "simulated link", func(l *Link) string { return l.ID })
}

// Line finds a line by its id, or the only one when id is empty.
func (s *Site) Line(id string) (*Line, error) {
	var found []*Line
	for i := range s.Lines {
		found = append(found, &s.Lines[i])
	}
	return pick(found, id, "line", func(l *Line) string { return l.ID })
}

func pick[T any](list []*T, id, what string, name func(*T) string) (*T, error) {
	var names []string
	for _, item := range list {
		if name(item) == id || (id == "" && len(list) == 1) {
			return item, nil
		}
		names = append(names, name(item))
	}
	switch {
	case len(list) == 0:
		return nil, fmt.Errorf("the site file has no %s", what)
	case id == "":
		return nil, fmt.Errorf("the site file has more than one %s: %s", what,
			strings.Join(names, ", "))
	}
	return nil, fmt.Errorf("the site file has no %s %q; it has %s", what, id,
		strings.Join(names, ", "))
}
