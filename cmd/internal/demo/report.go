package demo

// Report is the summary, and the last object that --json prints.
type Report struct {
	Seconds   float64 `json:"seconds"`
	Simulated bool    `json:"simulated"`
	Eve       float64 `json:"eve"`
	Verdict   string  `json:"verdict"`

	Preset          string  `json:"preset"`
	SetQBER         float64 `json:"set_qber"`
	QBER            float64 `json:"qber"`
	FirstKeySeconds float64 `json:"first_key_seconds,omitempty"`
	SiftedBPS       float64 `json:"sifted_bit_per_s"`
	SecretBPS       float64 `json:"secret_bit_per_s"`
	AuthBitsUsed    int64   `json:"auth_bits_used"`
	Stored          [2]int  `json:"keys_stored"`
	Delivered       [2]int  `json:"keys_delivered"`

	File    transfer      `json:"file"`
	Latency probe         `json:"latency"`
	UDP     probe         `json:"udp"`
	Capture captureReport `json:"capture"`
	Cut     cutReport     `json:"cut"`
	Rekeys  uint64        `json:"rekeys"`
	Restore float64       `json:"restore_seconds"`
}

// captureReport is what the same search found outside and, as positive
// control, inside.
type captureReport struct {
	Outer recordingReport `json:"outer"`
	Inner recordingReport `json:"inner"`
}

// recordingReport counts packets recorded, packets that the recorder missed,
// and pieces of the file found in them.
type recordingReport struct {
	Packets uint64 `json:"packets"`
	Missed  uint64 `json:"missed"`
	Found   int    `json:"pieces_found"`
}

// cutReport is what happened between the cut and the mending.
type cutReport struct {
	Drawn          int     `json:"keys_drawn_by_second_sae"`
	BlockedSeconds float64 `json:"blocked_after_seconds"`
	Reason         string  `json:"reason"`
	LeakedPackets  int     `json:"packets_through_blocked_line"`
}
