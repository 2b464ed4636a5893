package control

import "time"

// Status is what a daemon tells of itself. The JSON names are stable: scripts
// read them. Durations are seconds, rates are bits per second, ratios are 0 to
// 1; null means not known. Exactly one of KME, Line and Sim is set.
type Status struct {
	// Daemon is kme, line or sim.
	Daemon string `json:"daemon"`
	// ID is the KME ID, the line's id or the link's id.
	ID string `json:"id"`
	// Site is the name in the site file.
	Site string `json:"site"`
	// Version of the program.
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Simulated is true when any key of this daemon comes from a simulated
	// link: it protects nothing.
	Simulated bool `json:"simulated"`
	// Certificates are those that the daemon shows.
	Certificates []Certificate `json:"certificates,omitempty"`

	KME  *KME  `json:"kme,omitempty"`
	Line *Line `json:"line,omitempty"`
	Sim  *Sim  `json:"sim,omitempty"`
}

// Certificate is one that a daemon shows, and renews by itself.
type Certificate struct {
	File string `json:"file"`
	// Subject is its common name.
	Subject string `json:"subject"`
	// NotAfter is its end, Due when it will be renewed; Left is the time to
	// NotAfter, seconds, negative when it is past; null when it cannot be read.
	NotAfter time.Time `json:"not_after"`
	Due      time.Time `json:"due"`
	Left     *float64  `json:"left_seconds"`
	// Fault is why the last renewal failed, or what is wrong with the clock.
	Fault string `json:"fault,omitempty"`
}

// KME is the part of a key manager.
type KME struct {
	// Serving is false when the door answers 503 to everything; Reason says why.
	Serving bool   `json:"serving"`
	Reason  string `json:"reason,omitempty"`
	// Sealed: nobody has given the passphrase of the root key since SealedSince; the
	// door answers 503, peers are not answered and devices not read. Tries is
	// how many wrong passphrases were given since then.
	Sealed      bool       `json:"sealed"`
	SealedSince *time.Time `json:"sealed_since,omitempty"`
	Tries       uint64     `json:"unseal_tries,omitempty"`
	// Warnings are what weakens a promise here and does not change by itself,
	// such as a file system that keeps old copies.
	Warnings []string `json:"warnings,omitempty"`
	// Listen and PeerListen are the addresses bound.
	Listen     string `json:"listen"`
	PeerListen string `json:"peer_listen,omitempty"`
	// KeysDrawn were handed to initiators (enc_keys), KeysFetched to targets
	// (dec_keys), since the start. Refused counts refused calls.
	KeysDrawn   uint64 `json:"keys_drawn"`
	KeysFetched uint64 `json:"keys_fetched"`
	Refused     uint64 `json:"refused"`
	// Calls counts answers of the ETSI 014 door since the start.
	Calls []Calls `json:"calls"`

	Peers []Peer `json:"peers"`
	Links []Link `json:"links"`
	// Alarms are conditions that a person should look at.
	Alarms []string `json:"alarms"`
}

// Calls counts the answers to one call with one HTTP status.
type Calls struct {
	// Call is status, enc_keys, dec_keys, or other for a path that is none.
	Call  string `json:"call"`
	Code  int    `json:"code"`
	Count uint64 `json:"count"`
	// Seconds is the time all of them took together.
	Seconds float64 `json:"seconds"`
}

// Peer is another key manager as seen from this one.
type Peer struct {
	KME string `json:"kme"`
	// Connected: the channel stands. Up: the protocol agreed on a session.
	Connected bool   `json:"connected"`
	Up        bool   `json:"up"`
	Reason    string `json:"reason,omitempty"`
	// RTT is the round trip between the two.
	RTT *float64 `json:"rtt_seconds"`
}

// Link is one QKD link as the key manager sees it.
type Link struct {
	ID        string `json:"id"`
	Peer      string `json:"peer"`
	Simulated bool   `json:"simulated"`
	// Up: the device makes blocks. Reason says why not.
	Up     bool     `json:"up"`
	Reason string   `json:"reason,omitempty"`
	QBER   *float64 `json:"qber"`
	// SecretRate is bits per second, as the device says.
	SecretRate *float64 `json:"secret_bps"`
	// Drawable is what this side's initiators could draw now, bits; Stored is
	// all that is here, bits. The other four are the ledger, bits, of which
	// ingested = delivered + void + expired + burnt + tag + stored.
	Drawable  uint64 `json:"drawable_bits"`
	Stored    uint64 `json:"stored_bits"`
	Ingested  uint64 `json:"ingested_bits"`
	Delivered uint64 `json:"delivered_bits"`
	Void      uint64 `json:"void_bits"`
	Expired   uint64 `json:"expired_bits"`
	Burnt     uint64 `json:"burnt_bits"`
	Tag       uint64 `json:"tag_bits"`
}

// Line is the part of a line encryptor.
type Line struct {
	// Policy is the site file's.
	Policy string `json:"policy"`
	// Level is what the line rests on now: OTP, QKD, CHAINED, PQC or BLOCKED.
	Level string `json:"level"`
	// Since is when the level began; Reason is why it is not higher.
	Since  time.Time `json:"since"`
	Reason string    `json:"reason,omitempty"`
	// Epoch is the number of the sending epoch, Age its age, Keys the QKD keys
	// mixed into it. LastKey is the age of the last epoch with a fresh QKD key.
	Epoch   uint64   `json:"epoch"`
	Age     *float64 `json:"epoch_age_seconds"`
	Keys    int      `json:"epoch_keys"`
	LastKey *float64 `json:"last_key_age_seconds"`
	// Rekeys counts epochs begun since the start.
	Rekeys uint64 `json:"rekeys"`
	// RekeyFailures counts handshakes that failed; Failure is why the last one
	// did, empty when it did not. Handshake is what the one under way waits for.
	RekeyFailures uint64 `json:"rekey_failures"`
	Failure       string `json:"failure,omitempty"`
	Handshake     string `json:"handshake,omitempty"`
	// Stock is what the key manager holds for this line, keys; null when it
	// does not answer or the policy draws none.
	Stock *int `json:"stock_keys"`
	// KeysDrawn and KeysCollected count QKD keys since the start.
	KeysDrawn     uint64 `json:"keys_drawn"`
	KeysCollected uint64 `json:"keys_collected"`
	// KeyFailures counts calls to the key manager that failed, by reason:
	// empty, unknown, denied or down. KeyManager is what the last one showed.
	KeyFailures map[string]uint64 `json:"key_failures"`
	KeyManager  string            `json:"key_manager,omitempty"`
	// Peer: the other end has been heard lately. PeerPolicy is the policy it
	// proved, empty before the first handshake.
	Peer       bool   `json:"peer_alive"`
	PeerPolicy string `json:"peer_policy,omitempty"`
	// PeerLevel is what the other end says its line rests on, PeerReason why,
	// PeerSince since when; empty before it has said so.
	PeerLevel  string     `json:"peer_level,omitempty"`
	PeerReason string     `json:"peer_reason,omitempty"`
	PeerSince  *time.Time `json:"peer_since,omitempty"`
	// Fresh is the age of the youngest QKD key that the epoch rests on, Chained
	// the epochs since. BlockAt is when the line blocks unless a new epoch
	// comes.
	Fresh   *float64   `json:"fresh_key_age_seconds"`
	Chained int        `json:"chained_epochs"`
	BlockAt *time.Time `json:"block_at,omitempty"`
	// Pad is the one-time pad; null for policies without.
	Pad *Pad `json:"pad,omitempty"`
	// Alarms counts what a person should look at; LastAlarm is the latest;
	// Standing are those that have not cleared.
	Alarms    uint64   `json:"alarms"`
	LastAlarm string   `json:"last_alarm,omitempty"`
	Standing  []string `json:"standing_alarms,omitempty"`

	Sent     Traffic `json:"sent"`
	Received Traffic `json:"received"`
	// Drops counts packets and datagrams that were dropped, by reason.
	Drops map[string]uint64 `json:"drops"`
	// Device is the TUN device in use.
	Device Device `json:"device"`
	// Socket is the line's UDP socket.
	Socket Socket `json:"socket"`
}

// Pad is the one-time pad of a line.
type Pad struct {
	// Mark says how full the pad for sending is: good, low (below 25 %),
	// critical (10 %) or empty (2 %). Left is what is ready, Hold what counts
	// as full, bytes.
	Mark string `json:"mark"`
	Left int    `json:"left_bytes"`
	Hold int    `json:"hold_bytes"`
	// In and Out are the rates at which pad comes and goes, over the last half
	// minute; LeftFor is how long it lasts at these rates, null = for ever.
	In      float64  `json:"in_bps"`
	Out     float64  `json:"out_bps"`
	LeftFor *float64 `json:"left_seconds"`
	// Drawn and Collected are bytes of keys taken for this direction and the
	// other; Lost is what hid nothing. Records were sealed and opened.
	Drawn     uint64 `json:"drawn_bytes"`
	Collected uint64 `json:"collected_bytes"`
	Lost      uint64 `json:"lost_bytes"`
	Sealed    uint64 `json:"sealed_records"`
	Opened    uint64 `json:"opened_records"`
	// InformationTheoretic is true only where no leg of the pad's way rests on
	// a computational assumption; NotBecause says which do, or are not known.
	InformationTheoretic bool     `json:"information_theoretic"`
	NotBecause           []string `json:"not_because,omitempty"`
	// Classes count packets sent; the last is what fits no other.
	Classes []PadClass `json:"classes"`
}

// PadClass counts the packets of a class that went out under pad, under the
// epoch's keys as the class says (plain) or for want of pad (demoted), or were
// refused for want of pad.
type PadClass struct {
	Name    string `json:"name"`
	Padded  uint64 `json:"padded"`
	Plain   uint64 `json:"plain"`
	Demoted uint64 `json:"demoted"`
	Refused uint64 `json:"refused"`
}

// Traffic counts one direction since the start. Bytes are those of the inner
// packets, OuterBytes those of the UDP payloads.
type Traffic struct {
	Packets    uint64 `json:"packets"`
	Bytes      uint64 `json:"bytes"`
	Datagrams  uint64 `json:"datagrams"`
	OuterBytes uint64 `json:"outer_bytes"`
}

// Socket is a line's UDP socket and the path outside.
type Socket struct {
	// Remote is where the other end is, Moves how often it has changed.
	Remote string `json:"remote"`
	Moves  uint64 `json:"moves"`
	// SendOffload and ReceiveOffload: bursts cross the kernel in one call now.
	SendOffload    bool `json:"send_offload"`
	ReceiveOffload bool `json:"receive_offload"`
	// SendBuffer and ReceiveBuffer are what the kernel has granted, bytes.
	SendBuffer    int `json:"send_buffer"`
	ReceiveBuffer int `json:"receive_buffer"`
	// PathMTU is the largest outer packet, bytes; PathProven: the other end has
	// answered a probe of that size.
	PathMTU    int  `json:"path_mtu"`
	PathProven bool `json:"path_proven"`
}

// Device is a line's TUN device.
type Device struct {
	Name    string `json:"name"`
	Backend string `json:"backend"`
	Offload bool   `json:"offload"`
	MTU     int    `json:"mtu"`
	Reason  string `json:"reason,omitempty"`
}

// Sim is the part of one end of a simulated link.
type Sim struct {
	// Role is alice or bob; Preset is the site file's.
	Role   string `json:"role"`
	Preset string `json:"preset"`
	// FibreUp is false while the fibre is cut at this end.
	FibreUp bool `json:"fibre_up"`
	// Eve is the fraction of pulses that an eavesdropper intercepts.
	Eve float64 `json:"eve"`
	// Up: secret blocks can be made. Reason says why not.
	Up     bool     `json:"up"`
	Reason string   `json:"reason,omitempty"`
	QBER   *float64 `json:"qber"`
	// SiftedRate and SecretRate are bits per second.
	SiftedRate *float64 `json:"sifted_bps"`
	SecretRate *float64 `json:"secret_bps"`
	// Blocks and SecretBits were made since the start.
	Blocks     uint64 `json:"blocks"`
	SecretBits uint64 `json:"secret_bits"`
	// AuthBits are pre-shared authentication bits left, null if not known;
	// AuthUsed were consumed since the start.
	AuthBits *int64 `json:"auth_bits_left"`
	AuthUsed uint64 `json:"auth_bits_used"`
}
