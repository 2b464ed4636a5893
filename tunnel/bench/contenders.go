package bench

import (
	"debug/buildinfo"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
)

// contender is what is measured.
type contender struct {
	name    string
	what    string // for a person: what it is, of which version
	install string // how to get it, where it is not here
	// streams says that it is not flooded.
	streams bool
	// start brings up both ends between the namespaces of p; nil = not here.
	start func(p *pair) error
}

// Names of contenders that others are compared with, the first that ran.
var baselines = []string{"wireguard-go", "plain"}

// contenders are all of them, found or not.
func contenders() []contender {
	return []contender{
		{name: "quietline", what: "our line, AES-256-GCM, policy pqc-only", start: ours("line")},
		wireguardGo(), nebula(), openVPN(),
		{name: "copy", what: "our line with a copy in place of the cipher", start: ours("copy")},
		// A flood takes all pad there is, and what is refused then are iperf3's
		// own connections too.
		{name: "pad", what: "our line, all under one-time pad made in memory, inside AES-256-GCM",
			start: ours("pad"), streams: true},
		{name: "plain", what: "our forwarder: one packet a call, no cipher", start: ours("plain")},
		{name: "veth", what: "the cable itself, no tunnel", start: func(p *pair) error {
			p.target = cableAddr[1].Addr()
			return nil
		}},
	}
}

// find is the first program of these names in PATH.
func find(names ...string) (string, bool) {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, true
		}
	}
	return "", false
}

// wireguardVersion is the revision that our figures name. Its program is called
// after the last element of the module's path.
const wireguardVersion = "v0.0.0-20260522210424-ecfc5a8d5446"

func wireguardGo() contender {
	const module = "golang.zx2c4.com/wireguard"
	c := contender{name: "wireguard-go",
		install: "go install " + module + "@" + wireguardVersion + ", and its folder into PATH"}
	path, ok := find("wireguard-go", "wireguard")
	if !ok {
		return c
	}
	// Something else may be called wireguard.
	info, err := buildinfo.ReadFile(path)
	if err != nil || info.Main.Path != module {
		c.install = fmt.Sprintf("%s is not built from %s; %s", path, module, c.install)
		return c
	}
	c.what = fmt.Sprintf("%s (%s), ChaCha20-Poly1305", info.Main.Version, info.GoVersion)
	c.start = func(p *pair) error { return p.wireguard(path) }
	return c
}

func nebula() contender {
	c := contender{name: "nebula",
		install: "go install github.com/slackhq/nebula/cmd/nebula@latest and .../cmd/nebula-cert" +
			"@latest, and their folder into PATH; or apt-get install nebula, an old one"}
	path, ok := find("nebula")
	cert, okCert := find("nebula-cert")
	if !ok || !okCert {
		return c
	}
	version, err := output(path, "-version")
	if err != nil {
		c.install = err.Error()
		return c
	}
	version = strings.TrimSpace(strings.TrimPrefix(version, "Version:"))
	c.what = version + ", AES-256-GCM, offloads on if it has any"
	c.start = func(p *pair) error { return p.nebula(path, cert) }
	return c
}

func openVPN() contender {
	c := contender{name: "openvpn", install: "apt-get install openvpn"}
	path, ok := find("openvpn", "/usr/sbin/openvpn") // not everybody's PATH has sbin
	if !ok {
		return c
	}
	version, err := output(path, "--version")
	words := strings.Fields(version)
	if len(words) < 2 || words[0] != "OpenVPN" { // some releases exit 1 here
		c.install = fmt.Sprintf("%s tells no version: %v", path, err)
		return c
	}
	c.what = words[1] + ", AES-256-GCM, without kernel offload (DCO)"
	c.start = func(p *pair) error { return p.openVPN(path) }
	return c
}

// raise gives an interface of an end address and MTU, and brings it up.
func (p *pair) raise(end int, name string, addr netip.Prefix) error {
	return p.ns[end].Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkSetMTU(link, p.opt.MTU-peerOverhead); err != nil {
			return fmt.Errorf("set MTU of %s: %w", name, err)
		}
		a, err := netlink.ParseAddr(addr.String())
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add address of %s: %w", name, err)
		}
		return netlink.LinkSetUp(link)
	})
}

// nebula makes a CA, two certificates and a configuration an end.
func (p *pair) nebula(path, cert string) error {
	ca, caKey := p.dir+"/ca.crt", p.dir+"/ca.key"
	if _, err := output(cert, "ca", "-name", "bench", "-out-crt", ca, "-out-key", caKey); err != nil {
		return err
	}
	for i := range p.ns {
		name := fmt.Sprintf("%s/end%d", p.dir, i)
		_, err := output(cert, "sign", "-name", fmt.Sprint("end", i), "-ip", innerAddr[i].String(),
			"-ca-crt", ca, "-ca-key", caKey, "-out-crt", name+".crt", "-out-key", name+".key")
		if err != nil {
			return err
		}
		file, err := p.write(fmt.Sprintf("end%d.yml", i), fmt.Sprintf(nebulaConfig, ca, name, name,
			innerAddr[1-i].Addr(), cableAddr[1-i].Addr(), outerPort, outerPort, p.opt.MTU-peerOverhead))
		if err != nil {
			return err
		}
		if err := p.run(i, &p.tunnels, path, "-config", file); err != nil {
			return err
		}
	}
	return nil
}

// nebulaConfig: an older nebula passes over keys that it does not know.
const nebulaConfig = `
pki: {ca: %s, cert: %s.crt, key: %s.key}
static_host_map: {"%s": ["%s:%d"]}
lighthouse: {am_lighthouse: false, hosts: []}
listen: {host: 0.0.0.0, port: %d, udp_offloads: true}
tun: {dev: neb0, mtu: %d, use_offloads: true}
cipher: aes
logging: {level: error, format: text}
firewall:
  outbound: [{port: any, proto: any, host: any}]
  inbound: [{port: any, proto: any, host: any}]
`

// openVPN makes two self-signed certificates, each pinned by the other end.
func (p *pair) openVPN(path string) error {
	var print [2]string
	for i := range p.ns {
		certPEM, keyPEM, fingerprint, err := selfSigned(fmt.Sprint("end", i))
		if err != nil {
			return err
		}
		print[i] = fingerprint
		for name, text := range map[string]string{"crt": certPEM, "key": keyPEM} {
			if _, err := p.write(fmt.Sprintf("end%d.%s", i, name), text); err != nil {
				return err
			}
		}
	}
	role := [2][]string{{"--tls-client"}, {"--tls-server", "--dh", "none"}}
	for i := range p.ns {
		file := fmt.Sprintf("%s/end%d", p.dir, i)
		port := fmt.Sprint(outerPort)
		args := append(role[i], "--mode", "p2p", "--dev", "ovpn0", "--dev-type", "tun",
			"--proto", "udp4", "--local", cableAddr[i].Addr().String(), "--lport", port,
			"--remote", cableAddr[1-i].Addr().String(), "--rport", port,
			"--ifconfig", innerAddr[i].Addr().String(), innerAddr[1-i].Addr().String(),
			"--cert", file+".crt", "--key", file+".key", "--peer-fingerprint", print[1-i],
			"--data-ciphers", "AES-256-GCM", "--cipher", "AES-256-GCM", "--disable-dco",
			"--tun-mtu", fmt.Sprint(p.opt.MTU-peerOverhead), "--mssfix", "0", "--verb", "1")
		if err := p.run(i, &p.tunnels, path, args...); err != nil {
			return err
		}
	}
	return nil
}
