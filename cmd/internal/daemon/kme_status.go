package daemon

import (
	"time"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms"
)

// status puts the node's numbers into the words of status.
func (m *keyManager) status() control.Status {
	n := m.gate.node.Load()
	if n == nil {
		return m.sealedStatus()
	}
	st := n.Stats()
	k := &control.KME{Serving: true, Listen: m.listener.Addr().String(), KeysDrawn: st.KeysDrawn,
		KeysFetched: st.KeysFetched, Refused: st.Refused, Peers: []control.Peer{},
		Calls: m.door.calls.list(), Links: []control.Link{}, Alarms: append([]string{}, st.Alarms...),
		Warnings: m.warnings}
	if err := n.Health(); err != nil {
		k.Serving, k.Reason = false, err.Error()
	}
	if a := n.ListenAddr(); a != nil {
		k.PeerListen = a.String()
	}
	for _, p := range st.Peers {
		peer := control.Peer{KME: string(p.ID), Connected: p.Connected, Up: p.Up, Reason: p.Reason}
		if p.RTT > 0 {
			peer.RTT = known(p.RTT.Seconds())
		}
		k.Peers = append(k.Peers, peer)
	}
	out := control.Status{Daemon: "kme", KME: k, Certificates: certificateStatus(m.keeper)}
	for _, l := range st.Links {
		k.Links = append(k.Links, linkStatus(l))
		out.Simulated = out.Simulated || l.Simulated
	}
	return out
}

func linkStatus(l kms.LinkStats) control.Link {
	return control.Link{
		ID: string(l.ID), Peer: string(l.Peer), Simulated: l.Simulated, Up: l.DeviceUp,
		Reason: l.DeviceReason, QBER: known(l.QBER), SecretRate: known(l.SecretBPS),
		Drawable: l.DrawableBits, Stored: l.Ledger.Stored, Ingested: l.Ledger.Ingested,
		Delivered: l.Ledger.Delivered, Void: l.Ledger.Void, Expired: l.Ledger.Expired,
		Burnt: l.Ledger.Burnt, Tag: l.Ledger.Tag,
	}
}

// sealedStatus is all that a key manager without its root key tells.
func (m *keyManager) sealedStatus() control.Status {
	k := &control.KME{Listen: m.listener.Addr().String(), Peers: []control.Peer{},
		Calls: m.door.calls.list(), Links: []control.Link{}, Alarms: []string{},
		Warnings: m.warnings, Reason: "it is being opened"}
	sealed, since, tries := m.vault.state()
	if sealed {
		k.Sealed, k.SealedSince, k.Tries = true, &since, tries
		k.Reason = "sealed since " + since.Local().Format(time.DateTime) +
			"; quietline kme unseal opens it"
	}
	return control.Status{Daemon: "kme", KME: k, Certificates: certificateStatus(m.keeper)}
}
