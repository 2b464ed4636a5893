package metrics

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quietline/quietline/cmd/internal/control"
)

// metric is one family: its name, type, help and the names of its labels.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// families lists every metric, for Describe.
var families []*metric

func gauge(name, help string, labels ...string) *metric {
	return family(prometheus.GaugeValue, name, help, labels)
}

func counter(name, help string, labels ...string) *metric {
	return family(prometheus.CounterValue, name, help, labels)
}

func family(kind prometheus.ValueType, name, help string, labels []string) *metric {
	m := &metric{prometheus.NewDesc("quietline_"+name, help, labels, nil), kind}
	families = append(families, m)
	return m
}

// Of every daemon.
var (
	buildInfo = gauge("build_info", "Always 1; labels tell what runs.", "daemon", "id", "version")
	simulated = gauge("simulated", "1 if keys come from a simulated link and protect nothing.")
	certLeft  = gauge("pki_certificate_left_seconds",
		"Time until the certificate ends; negative when it is past.", "file")
	certFault = gauge("pki_certificate_fault", "1 if the certificate could not be renewed.", "file")
)

// Of the key manager.
var (
	kmsServing       = gauge("kms_serving", "1 if the key manager hands out keys.")
	kmsSealed        = gauge("kms_sealed", "1 while nobody has given the passphrase.")
	kmsPeerUp        = gauge("kms_peer_up", "1 if a session with the peer stands.", "peer_kme")
	kmsPeerRTT       = gauge("kms_peer_rtt_seconds", "Round trip to the peer.", "peer_kme")
	kmsLinkUp        = gauge("kms_link_up", "1 if the device makes blocks.", "link")
	kmsLinkQBER      = gauge("kms_link_qber_ratio", "Quantum bit error ratio, 0 to 0.5.", "link")
	kmsLinkSimulated = gauge("kms_link_simulated", "1 if no photon is sent on the link.", "link")
	kmsStored        = gauge("kms_stored_bytes", "Key bytes stored here.", "link")
	kmsDrawable      = gauge("kms_drawable_bytes", "Key bytes this side could draw now.", "link")
	kmsBytes         = counter("kms_key_bytes_total",
		"Key bytes by fate; ingested is the sum of the others and what is stored.", "link", "fate")
	kmsKeys    = counter("kms_keys_total", "Keys handed out: drawn or fetched.", "role")
	kmsRefused = counter("kms_refused_calls_total", "Calls refused at the door.")
	doorCalls  = counter("etsi014_requests_total", "Answers of the door.", "call", "code")
	doorTime   = counter("etsi014_request_seconds_total",
		"Time that answers took together.", "call", "code")
	kmsAlarms = gauge("kms_alarms", "Conditions that a person should look at.")
)

// Of a line.
var (
	tunnelLevel   = gauge("tunnel_level", "1 for the level the line rests on.", "line", "level")
	tunnelPolicy  = gauge("tunnel_policy_info", "Always 1; the label is the policy.", "line", "policy")
	tunnelPeer    = gauge("tunnel_peer_alive", "1 if the other end was heard lately.", "line")
	tunnelEpoch   = gauge("tunnel_epoch", "Number of the sending epoch.", "line")
	tunnelAge     = gauge("tunnel_epoch_age_seconds", "Age of the sending epoch.", "line")
	tunnelLastKey = gauge("tunnel_last_key_age_seconds",
		"Time since an epoch with a fresh QKD key began.", "line")
	tunnelStock    = gauge("tunnel_stock_keys", "Keys in stock for the line.", "line")
	tunnelRekeys   = counter("tunnel_rekeys_total", "Epochs begun.", "line")
	tunnelFailures = counter("tunnel_rekey_failures_total", "Handshakes failed.", "line")
	tunnelKeyFails = counter("tunnel_key_failures_total",
		"Calls to the key manager that failed.", "line", "reason")
	tunnelAlarms  = counter("tunnel_alarms_total", "Alarms raised.", "line")
	tunnelKeys    = counter("tunnel_keys_total", "QKD keys drawn or collected.", "line", "role")
	tunnelPackets = counter("tunnel_packets_total", "Inner packets.", "line", "dir")
	tunnelBytes   = counter("tunnel_bytes_total", "Bytes of inner packets.", "line", "dir")
	tunnelOuter   = counter("tunnel_outer_bytes_total", "Bytes of UDP payloads.", "line", "dir")
	tunnelPath    = gauge("tunnel_path_mtu_bytes", "Largest outer packet.", "line")
	tunnelProven  = gauge("tunnel_path_proven", "1 if the other end answered a probe of it.", "line")
	tunnelMoves   = counter("tunnel_peer_moves_total", "Changes of the other end's address.", "line")
	tunnelDrops   = counter("tunnel_drops_total", "Packets and datagrams dropped.", "line", "reason")
	tunnelPadLeft = gauge("tunnel_pad_left_bytes", "One-time pad ready for sending.", "line")
	tunnelPadHold = gauge("tunnel_pad_hold_bytes", "One-time pad that counts as full.", "line")
	tunnelPadTime = gauge("tunnel_pad_left_seconds",
		"How long the pad lasts at the present rates; absent = for ever.", "line")
	tunnelPadBytes = counter("tunnel_pad_bytes_total",
		"One-time pad drawn, collected or lost.", "line", "what")
	tunnelPadPackets = counter("tunnel_pad_packets_total",
		"Packets of a line with pad: padded, plain, demoted or refused.", "line", "class", "outcome")
)

// Of one end of a simulated link.
var (
	simUp       = gauge("simulator_up", "1 if secret blocks can be made.", "link")
	simFibre    = gauge("simulator_fibre_up", "0 while the fibre is cut.", "link")
	simEve      = gauge("simulator_eve_ratio", "Fraction of pulses intercepted.", "link")
	simQBER     = gauge("simulator_qber_ratio", "Quantum bit error ratio, 0 to 0.5.", "link")
	simBlocks   = counter("simulator_blocks_total", "Secret blocks made.", "link")
	simSecret   = counter("simulator_secret_bytes_total", "Secret bytes made.", "link")
	simAuthUsed = counter("simulator_auth_used_bytes_total", "Authentication bytes used.", "link")
	simAuthLeft = gauge("simulator_auth_left_bytes", "Authentication bytes left.", "link")
)

// levels a line can rest on, as tunnel/rekey names them.
var levels = []string{"BLOCKED", "PQC", "CHAINED", "QKD", "OTP"}

// collector turns one status into metrics at each scrape.
type collector struct{ status func() control.Status }

// Describe implements [prometheus.Collector].
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range families {
		ch <- m.desc
	}
}

// Collect implements [prometheus.Collector].
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.status()
	e := emitter{ch}
	e.put(buildInfo, 1, s.Daemon, s.ID, s.Version)
	e.put(simulated, truth(s.Simulated))
	for _, c := range s.Certificates {
		e.known(certLeft, c.Left, c.File)
		e.put(certFault, truth(c.Fault != ""), c.File)
	}
	switch {
	case s.KME != nil:
		e.kme(s.KME)
	case s.Line != nil:
		e.line(s.ID, s.Line)
	case s.Sim != nil:
		e.sim(s.ID, s.Sim)
	}
}

type emitter struct{ ch chan<- prometheus.Metric }

func (e emitter) put(m *metric, value float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(m.desc, m.kind, value, labels...)
}

// known emits what is known; a gap in a graph is more honest than a zero.
func (e emitter) known(m *metric, value *float64, labels ...string) {
	if value != nil {
		e.put(m, *value, labels...)
	}
}

func (e emitter) kme(k *control.KME) {
	e.put(kmsServing, truth(k.Serving))
	e.put(kmsSealed, truth(k.Sealed))
	for _, p := range k.Peers {
		e.put(kmsPeerUp, truth(p.Up), p.KME)
		e.known(kmsPeerRTT, p.RTT, p.KME)
	}
	for _, l := range k.Links {
		e.put(kmsLinkUp, truth(l.Up), l.ID)
		e.put(kmsLinkSimulated, truth(l.Simulated), l.ID)
		e.known(kmsLinkQBER, l.QBER, l.ID)
		e.put(kmsStored, bytes(l.Stored), l.ID)
		e.put(kmsDrawable, bytes(l.Drawable), l.ID)
		for fate, bits := range map[string]uint64{"ingested": l.Ingested, "delivered": l.Delivered,
			"void": l.Void, "expired": l.Expired, "burnt": l.Burnt, "tag": l.Tag} {
			e.put(kmsBytes, bytes(bits), l.ID, fate)
		}
	}
	e.put(kmsKeys, float64(k.KeysDrawn), "drawn")
	e.put(kmsKeys, float64(k.KeysFetched), "fetched")
	e.put(kmsRefused, float64(k.Refused))
	for _, c := range k.Calls {
		e.put(doorCalls, float64(c.Count), c.Call, strconv.Itoa(c.Code))
		e.put(doorTime, c.Seconds, c.Call, strconv.Itoa(c.Code))
	}
	e.put(kmsAlarms, float64(len(k.Alarms)))
}

func (e emitter) line(id string, l *control.Line) {
	for _, level := range levels {
		e.put(tunnelLevel, truth(level == l.Level), id, level)
	}
	e.put(tunnelPolicy, 1, id, l.Policy)
	e.put(tunnelPeer, truth(l.Peer), id)
	e.put(tunnelEpoch, float64(l.Epoch), id)
	e.known(tunnelAge, l.Age, id)
	e.known(tunnelLastKey, l.LastKey, id)
	if l.Stock != nil {
		e.put(tunnelStock, float64(*l.Stock), id)
	}
	e.put(tunnelRekeys, float64(l.Rekeys), id)
	e.put(tunnelFailures, float64(l.RekeyFailures), id)
	e.put(tunnelAlarms, float64(l.Alarms), id)
	for reason, n := range l.KeyFailures {
		e.put(tunnelKeyFails, float64(n), id, reason)
	}
	e.put(tunnelKeys, float64(l.KeysDrawn), id, "drawn")
	e.put(tunnelKeys, float64(l.KeysCollected), id, "collected")
	for dir, t := range map[string]control.Traffic{"sent": l.Sent, "received": l.Received} {
		e.put(tunnelPackets, float64(t.Packets), id, dir)
		e.put(tunnelBytes, float64(t.Bytes), id, dir)
		e.put(tunnelOuter, float64(t.OuterBytes), id, dir)
	}
	if l.Socket.PathMTU > 0 {
		e.put(tunnelPath, float64(l.Socket.PathMTU), id)
		e.put(tunnelProven, truth(l.Socket.PathProven), id)
	}
	e.put(tunnelMoves, float64(l.Socket.Moves), id)
	if l.Pad != nil {
		e.pad(id, l.Pad)
	}
	for reason, n := range l.Drops {
		e.put(tunnelDrops, float64(n), id, reason)
	}
}

func (e emitter) pad(id string, p *control.Pad) {
	e.put(tunnelPadLeft, float64(p.Left), id)
	e.put(tunnelPadHold, float64(p.Hold), id)
	e.known(tunnelPadTime, p.LeftFor, id)
	e.put(tunnelPadBytes, float64(p.Drawn), id, "drawn")
	e.put(tunnelPadBytes, float64(p.Collected), id, "collected")
	e.put(tunnelPadBytes, float64(p.Lost), id, "lost")
	for _, c := range p.Classes {
		for outcome, n := range map[string]uint64{"padded": c.Padded, "plain": c.Plain,
			"demoted": c.Demoted, "refused": c.Refused} {
			e.put(tunnelPadPackets, float64(n), id, c.Name, outcome)
		}
	}
}

func (e emitter) sim(link string, s *control.Sim) {
	e.put(simUp, truth(s.Up), link)
	e.put(simFibre, truth(s.FibreUp), link)
	e.put(simEve, s.Eve, link)
	e.known(simQBER, s.QBER, link)
	e.put(simBlocks, float64(s.Blocks), link)
	e.put(simSecret, bytes(s.SecretBits), link)
	e.put(simAuthUsed, bytes(s.AuthUsed), link)
	if s.AuthBits != nil {
		e.put(simAuthLeft, float64(*s.AuthBits)/8, link)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func bytes(bits uint64) float64 { return float64(bits) / 8 }
