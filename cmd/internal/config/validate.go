package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// defaultPolicy never stops a hospital's traffic for want of QKD.
const defaultPolicy = "qkd-preferred"

// policies that the design names, strongest first; the first two have pad.
var policies = []string{"otp-strict", "otp-preferred", "qkd-strict", "qkd-required",
	"qkd-preferred", "pqc-only"}

// Bounds of the pad held ready, as tunnel/pad.
const (
	defaultPadHold = 1 << 20
	minPadHold     = 64 << 10
	maxPadHold     = 64 << 20
)

// Bounds of a line. 1280 is the least MTU of IPv6 (RFC 8200 section 5), 9000
// the usual jumbo frame; the times and their defaults are those of tunnel/rekey.
const (
	defaultEpochLife = 2 * time.Minute
	minEpochLife     = time.Second
	maxEpochLife     = time.Hour
	defaultHoldMax   = 10 * time.Minute
	maxHoldMax       = 24 * time.Hour
	minMTU           = 1280
	maxMTU           = 9000
)

// Bounds of the door. Fewer connections than one SAE's rekeying and its
// watchers need are no service; 65,536 take 3 GiB (docs/performance.md). A
// connection younger than a minute costs more in handshakes than in keys.
const (
	maxKeys          = 1024 // as etsi014.Limits
	minConnections   = 16
	maxConnections   = 1 << 16
	minConnectionAge = time.Minute
	maxConnectionAge = 24 * time.Hour
	minReread        = time.Second
	maxReread        = time.Minute // as kms.Allowance
	maxPerSecond     = 1e6         // more than the key manager can do
	minShareWindow   = time.Second
	maxShareWindow   = 24 * time.Hour
	maxReserve       = 1 << 20 // as kms.Allowance
)

// setDefaults fills what the file leaves out.
func (d *decoder) setDefaults(s *Site) {
	or := func(path *string, name string) {
		if *path == "" && s.State != "" {
			*path = filepath.Join(s.State, name)
		}
	}
	if s.KME != nil {
		or(&s.KME.Control, "kme.sock")
	}
	for i := range s.Links {
		if sim := s.Links[i].Simulator; sim != nil {
			or(&sim.Control, "sim-"+s.Links[i].ID+".sock")
		}
	}
	for i := range s.Lines {
		l := &s.Lines[i]
		or(&l.Control, "line-"+l.ID+".sock")
		if !d.set(fmt.Sprintf("lines[%d].pad_hold", i)) {
			l.PadHold = defaultPadHold
		}
		if !d.set(fmt.Sprintf("lines[%d].policy", i)) {
			l.Policy = defaultPolicy
		}
		if !d.set(fmt.Sprintf("lines[%d].epoch_life", i)) {
			l.EpochLife = defaultEpochLife
		}
		if !d.set(fmt.Sprintf("lines[%d].hold_max", i)) {
			l.HoldMax = max(defaultHoldMax, 2*l.EpochLife)
		}
	}
}

// validate checks what one key alone cannot show.
func (d *decoder) validate(s *Site) {
	if s.Version != 1 && d.set("version") {
		d.fault("version", "%d is not a version this program reads; expected 1", s.Version)
	}
	d.sockets(s)
	d.kme(s)
	d.peers(s)
	d.saes(s)
	d.links(s)
	for i := range s.Lines {
		d.policy(s, i)
		d.oneLine(s, i)
	}
	d.unique(s)
}

// sockets checks the paths that setDefaults made.
func (d *decoder) sockets(s *Site) {
	check := func(key, path string) {
		if _, err := checkSocket(d, path); !d.set(key) && err != nil && s.State != "" {
			d.fault("state", "is too long a path: %q %v", path, err)
		}
	}
	if s.KME != nil {
		check("kme.control", s.KME.Control)
	}
	for i, l := range s.Links {
		if l.Simulator != nil {
			check(fmt.Sprintf("links[%d].simulator.control", i), l.Simulator.Control)
		}
	}
	for i, l := range s.Lines {
		check(fmt.Sprintf("lines[%d].control", i), l.Control)
	}
}

// set tells whether a key stands in the file.
func (d *decoder) set(key string) bool {
	_, ok := d.lines[key]
	return ok
}

func (d *decoder) kme(s *Site) {
	k := s.KME
	if k == nil {
		return
	}
	if k.ClientCA != "" && k.ClientCA == k.PeerCA {
		d.fault("kme.peer_ca", "is the same file as client_ca; with one root every SAE "+
			"could pass for a key manager, use two")
	}
	for i, p := range s.Peers {
		if p.CA != "" && p.CA == k.ClientCA {
			d.fault(fmt.Sprintf("peers[%d].ca", i), "is the same file as kme.client_ca; with one root "+
				"every SAE could pass for a key manager, use two")
		}
	}
	// Port 0 lets the kernel choose, which gives two.
	if k.Listen != "" && k.Listen == k.PeerListen && !strings.HasSuffix(k.Listen, ":0") {
		d.fault("kme.peer_listen", "is the same address as listen; use another port")
	}
	switch {
	case !d.set("kme.root_key") && !d.set("kme.root_credential"):
		d.fault("kme.root_key", "is missing; one of root_key and root_credential is required")
	case k.RootKey != "" && k.RootCredential != "":
		d.fault("kme.root_credential", "stands beside root_key; expected one of the two")
	}
	switch {
	case k.SecondCertificate != "" && k.SecondKey == "":
		d.fault("kme.second_certificate", "has no second_key; expected both or none")
	case k.SecondCertificate == "" && k.SecondKey != "":
		d.fault("kme.second_key", "has no second_certificate; expected both or none")
	}
	if n := k.MaxKeys; d.set("kme.max_keys") && (n < 1 || n > maxKeys) {
		d.fault("kme.max_keys", "%d is outside 1 to %d", n, maxKeys)
	}
	if n := k.MaxConnections; d.set("kme.max_connections") &&
		(n < minConnections || n > maxConnections) {
		d.fault("kme.max_connections", "%d is outside %d to %d", n, minConnections, maxConnections)
	}
	if age := k.MaxConnectionAge; d.set("kme.max_connection_age") &&
		(age < minConnectionAge || age > maxConnectionAge) {
		d.fault("kme.max_connection_age", "%v is outside 1m to 24h", age)
	}
}

func (d *decoder) peers(s *Site) {
	for i, p := range s.Peers {
		key := fmt.Sprintf("peers[%d].kme", i)
		if s.KME == nil {
			d.fault(key, "a peer needs a kme at this site; add kme or leave peers out")
		} else if p.KME != "" && p.KME == s.KME.ID {
			d.fault(key, "%q is this site's own key manager; name the other one", p.KME)
		}
	}
}

func (s *Site) hasPeer(kme string) bool {
	return slices.ContainsFunc(s.Peers, func(p Peer) bool { return p.KME == kme })
}

func (d *decoder) saes(s *Site) {
	for i, a := range s.SAEs {
		key := fmt.Sprintf("saes[%d]", i)
		forms := 0
		for _, form := range []string{a.Identity.URI, a.Identity.DNS, a.Identity.CN, a.Identity.Pin} {
			if form != "" {
				forms++
			}
		}
		local := s.KME != nil && a.KME == s.KME.ID
		if w := a.RereadWindow; w != 0 && !local {
			d.fault(key+".reread_window", "is a matter of the SAE's own key manager %q; "+
				"leave it out here", a.KME)
		} else if w != 0 && (w < minReread || w > maxReread) {
			d.fault(key+".reread_window", "%v is outside 1s to 1m; leave it out for none", w)
		}
		d.limits(key+".limits", a, local)
		if !local && a.Profile != "" {
			d.fault(key+".profile", "is a matter of the SAE's own key manager %q; "+
				"leave it out here", a.KME)
		}
		switch {
		case a.KME == "": // already said
		case !local && !s.hasPeer(a.KME):
			d.fault(key+".kme", "%q is neither kme.id nor one of peers", a.KME)
		case local && forms != 1:
			d.fault(key+".identity", "names %d of uri, dns, cn, pin; expected exactly one, "+
				"e.g. uri: urn:quietline:sae:%s", forms, a.ID)
		case !local && forms != 0:
			d.fault(key+".identity", "is checked only by the SAE's own key manager %q; "+
				"leave it out here", a.KME)
		}
	}
}

func (d *decoder) limits(key string, a SAE, local bool) {
	if !d.set(key) {
		return
	}
	if !local {
		d.fault(key, "is a matter of the SAE's own key manager %q; leave it out here", a.KME)
		return
	}
	positive := func(name string, v, most float64) {
		if d.set(key+name) && !(v > 0 && v <= most) {
			d.fault(key+name, "%v is not above 0 to %v; leave it out for no bound", v, most)
		}
	}
	l := a.Limits
	positive(".requests_per_second", l.RequestsPerSecond, maxPerSecond)
	positive(".keys_per_second", l.KeysPerSecond, maxPerSecond)
	positive(".share", l.Share, 1)
	if d.set(key+".reserve") && (l.Reserve < 1 || l.Reserve > maxReserve) {
		d.fault(key+".reserve", "%d is outside 1 to %d", l.Reserve, maxReserve)
	}
	if w := l.ShareWindow; d.set(key + ".share_window") {
		switch {
		case !d.set(key + ".share"):
			d.fault(key+".share_window", "has no share; expected both, or share alone")
		case w < minShareWindow || w > maxShareWindow:
			d.fault(key+".share_window", "%v is outside 1s to 24h", w)
		}
	}
}

func (d *decoder) links(s *Site) {
	for i, l := range s.Links {
		key := fmt.Sprintf("links[%d]", i)
		if l.Peer != "" && s.KME != nil && !s.hasPeer(l.Peer) {
			d.fault(key+".peer", "%q is not one of peers; add it there", l.Peer)
		}
		if l.Simulator == nil {
			continue
		}
		if !s.Lab {
			d.fault(key+".simulator", "a simulated link protects nothing; set lab: true at "+
				"the top if this site is a laboratory, else remove simulator")
		}
		d.simulator(key+".simulator", l.Simulator)
	}
}

func (d *decoder) simulator(key string, sim *Simulator) {
	if sim.Role != "alice" && sim.Role != "bob" && d.set(key+".role") {
		d.fault(key+".role", "%q is not an end of a link; expected alice or bob", sim.Role)
	}
	if !(sim.Eve >= 0 && sim.Eve <= 1) {
		d.fault(key+".eve", "%v is not a fraction; expected 0 to 1", sim.Eve)
	} else if sim.Eve > 0 && sim.Role == "bob" {
		d.fault(key+".eve", "is set at bob; set it at alice, where the pulses leave")
	}
	d.channel(key+".fibre", sim.Fibre)
	d.channel(key+".classical", sim.Classical)
}

func (d *decoder) channel(key string, c Channel) {
	if d.set(key) && (c.Listen == "") == (c.Connect == "") {
		d.fault(key, "expected exactly one of listen and connect")
	}
}

func (d *decoder) policy(s *Site, i int) {
	l, key := &s.Lines[i], fmt.Sprintf("lines[%d].policy", i)
	if !slices.Contains(policies, l.Policy) {
		d.fault(key, "%q is not a policy; known are %s", l.Policy, strings.Join(policies, ", "))
	}
}

func (d *decoder) oneLine(s *Site, i int) {
	l, key := &s.Lines[i], fmt.Sprintf("lines[%d]", i)
	if len(l.Endpoints) > 1 {
		d.fault(key+".endpoints[1]", "more than one path is not built yet; keep the first")
	}
	for j, e := range l.Endpoints {
		d.endpoint(fmt.Sprintf("%s.endpoints[%d]", key, j), e)
	}
	if l.EpochLife < minEpochLife || l.EpochLife > maxEpochLife {
		d.fault(key+".epoch_life", "%v is outside 1s to 1h", l.EpochLife)
	}
	if l.HoldMax > maxHoldMax {
		d.fault(key+".hold_max", "%v is more than 24h", l.HoldMax)
	} else if l.HoldMax <= l.EpochLife {
		d.fault(key+".hold_max", "%v is not longer than epoch_life %v, so the line would "+
			"block before it rekeys; raise it", l.HoldMax, l.EpochLife)
	}
	if mtu := l.TUN.MTU; d.set(key+".tun.mtu") && (mtu < minMTU || mtu > maxMTU) {
		d.fault(key+".tun.mtu", "%d is outside %d to %d bytes", l.TUN.MTU, minMTU, maxMTU)
	}
	d.oneOuter(key, l)
	d.pad(key, l)
	if l.Keys == nil {
		if slices.Contains(policies, l.Policy) && l.Policy != "pqc-only" {
			d.fault(key+".keys", "is missing; policy %s draws QKD keys", l.Policy)
		}
		return
	}
	d.keys(s, key+".keys", l.Keys)
}

// pad checks what only policies with one-time pad look at.
func (d *decoder) pad(key string, l *Line) {
	if n := l.PadHold; n < minPadHold || n > maxPadHold {
		d.fault(key+".pad_hold", "%d is outside %d to %d bytes", n, minPadHold, maxPadHold)
	}
	if slices.Contains(policies[:2], l.Policy) && l.Keys != nil && l.Keys.Pad == nil {
		d.fault(key+".keys.pad", "is missing; policy %s draws one-time pad by an SAE of its own",
			l.Policy)
	}
	for i, c := range l.Classes {
		within := func(name string, list []int, least, most int) {
			for j, v := range list {
				if v < least || v > most {
					d.fault(fmt.Sprintf("%s.classes[%d].%s[%d]", key, i, name, j),
						"%d is outside %d to %d", v, least, most)
				}
			}
		}
		within("ports", c.Ports, 1, 65535)
		within("dscp", c.DSCP, 0, 63)
	}
}

func (d *decoder) endpoint(key string, e Endpoint) {
	if !e.Local.IsValid() || !e.Remote.IsValid() {
		return // already said
	}
	if e.Local.Addr().Is4() != e.Remote.Addr().Is4() {
		d.fault(key+".remote", "%v and local %v are not of the same IP version", e.Remote, e.Local)
	}
	if e.Remote.Port() == 0 || e.Remote.Addr().IsUnspecified() {
		d.fault(key+".remote", "%v is no address to send to", e.Remote)
	}
}

func (d *decoder) keys(s *Site, key string, k *Keys) {
	if len(k.KMEs) > 2 {
		d.fault(key+".kmes[2]", "a key manager has at most two doors here; keep two")
	}
	if k.SAE != "" && k.SAE == k.PeerSAE {
		d.fault(key+".peer_sae", "%q is this end's own SAE; name the other end's", k.PeerSAE)
	}
	if s.KME != nil && k.KME != "" && k.KME != s.KME.ID {
		d.fault(key+".kme", "%q is not this site's key manager %s", k.KME, s.KME.ID)
	}
	d.ids(s, key, k.SAE, k.PeerSAE)
	p := k.Pad
	if p == nil {
		return
	}
	if p.SAE != "" && p.SAE == p.PeerSAE {
		d.fault(key+".pad.peer_sae", "%q is this end's own SAE; name the other end's", p.PeerSAE)
	}
	if p.SAE != "" && (p.SAE == k.SAE || p.PeerSAE == k.PeerSAE) {
		d.fault(key+".pad.sae", "%q: pad and epoch keys are drawn by different SAEs at both ends; "+
			"use another", p.SAE)
	}
	d.ids(s, key+".pad", p.SAE, p.PeerSAE)
}

// ids looks the SAEs of a line up.
func (d *decoder) ids(s *Site, key, own, peer string) {
	if s.KME == nil {
		return // the SAEs stand in the file of the machine that runs the KME
	}
	find := func(id string) int {
		return slices.IndexFunc(s.SAEs, func(a SAE) bool { return a.ID == id })
	}
	if i := find(own); own != "" && (i < 0 || s.SAEs[i].KME != s.KME.ID) {
		d.fault(key+".sae", "%q is not an SAE of %s; add it to saes", own, s.KME.ID)
	}
	if peer != "" && find(peer) < 0 {
		d.fault(key+".peer_sae", "%q is not one of saes; add it with the other site's kme", peer)
	}
}

// unique refuses names and sockets that stand twice.
func (d *decoder) unique(s *Site) {
	type use struct{ what, value string }
	first := make(map[use]string)
	note := func(what, value, key string) {
		u := use{what, value}
		if prev, ok := first[u]; ok && value != "" {
			d.fault(key, "%q is taken by %s in line %d; each %s is used once",
				value, prev, d.line(prev), what)
			return
		}
		first[u] = key
	}
	for i, p := range s.Peers {
		note("peer", p.KME, fmt.Sprintf("peers[%d].kme", i))
	}
	for i, a := range s.SAEs {
		note("SAE ID", a.ID, fmt.Sprintf("saes[%d].id", i))
		note("certificate URI", a.Identity.URI, fmt.Sprintf("saes[%d].identity.uri", i))
		note("certificate DNS name", a.Identity.DNS, fmt.Sprintf("saes[%d].identity.dns", i))
		note("common name", a.Identity.CN, fmt.Sprintf("saes[%d].identity.cn", i))
		note("certificate pin", a.Identity.Pin, fmt.Sprintf("saes[%d].identity.pin", i))
	}
	if s.KME != nil {
		note("socket", s.KME.Control, "kme.control")
	}
	for i, l := range s.Links {
		key := fmt.Sprintf("links[%d]", i)
		note("link", l.ID, key+".id")
		_, path := Network(l.Driver)
		note("socket", path, key+".driver")
		if l.Simulator != nil {
			note("socket", l.Simulator.Control, key+".simulator.control")
		}
	}
	for i, l := range s.Lines {
		key := fmt.Sprintf("lines[%d]", i)
		note("line", l.ID, key+".id")
		note("interface", l.TUN.Name, key+".tun.name")
		note("socket", l.Control, key+".control")
	}
}
