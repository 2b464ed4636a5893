package enrol

import (
	"fmt"
	"net/netip"
)

// siteText is the site file of a new site. It is secure as it stands: mutual
// TLS on every door, the door for applications on loopback only, no password
// anywhere, and simulated links refused unless the person asked for them.
func (h *Home) siteText() []byte {
	lab := "# A simulated link would be refused: its keys protect nothing.\nlab: false\n"
	if h.plan.Device == Simulated {
		lab = "# This site takes keys of SIMULATED links: they protect nothing. Take the next\n" +
			"# line out before patients' data passes here.\nlab: true\n"
	}
	gone := "  client_crl: pki/sae.crl   # those taken back; read again when it changes\n"
	if h.plan.CA == External {
		gone = "  # Those taken back, by SHA-256; read again when it changes. A revocation list of\n" +
			"  # your CA goes to client_crl.\n  client_deny: pki/deny.txt\n"
	}
	at := func(port uint16) string { return netip.AddrPortFrom(h.plan.Address, port).String() }
	return fmt.Appendf(nil, `# Quietline at site %[1]s, made by quietline init.
#
#   quietline check site.yaml            validate, start nothing
#   quietline pki invite SITE            let another site join this one
#   quietline kme  --config site.yaml    the key manager
#   quietline line --config site.yaml    the line encryptor
#   quietline status --config site.yaml
#
# docs/examples/site-tokyo.yaml explains every key. Relative paths count from
# the folder of this file. Secrets stand here by path only.

version: 1
site: %[1]s
%[2]sstate: state

kme:
  id: %[3]s
  # The door for applications: ETSI GS QKD 014 over mutual TLS. Loopback, for
  # the line on this machine; give it an address for applications elsewhere,
  # and a certificate with that address: quietline pki issue door.
  listen: 127.0.0.1:%[4]d
  certificate: pki/%[5]s.pem # certificate and key in one file: renewed in one step
  key: pki/%[5]s.pem
  client_ca: pki/sae-ca.crt # who signs applications' certificates
%[9]s  # The door for the key managers of other sites. Another root: no application
  # can pass for a key manager.
  peer_listen: "%[6]s"
  peer_certificate: pki/%[7]s.pem
  peer_key: pki/%[7]s.pem
  peer_ca: pki/peers.crt # this site's root and those of the sites enrolled
  root_key: secrets/root.key # wraps every stored key; keep a copy elsewhere
  metrics: 127.0.0.1:9461

# The following lists are filled by quietline pki invite and pki join.
peers: []
links: []
saes:
  - id: %[8]s # the line encryptor of this site
    kme: %[3]s
    identity:
      uri: urn:quietline:sae:%[8]s
lines: []
`, h.plan.Site, lab, kmeID(h.plan.Site), doorPort, doorPair, at(peerPort), peerPair,
		lineSAE(h.plan.Site), gone)
}
