package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// transfer is what iperf3 has measured, at the receiver.
type transfer struct {
	bits        float64 // a second, TCP
	bytes       float64 // TCP
	retransmits float64 // TCP, of all streams
	packets     float64 // received a second, UDP
}

// parseIperf reads the client's report of iperf3 -J, of 3.1 and later.
func parseIperf(report []byte) (transfer, error) {
	type sum struct {
		Seconds     float64 `json:"seconds"`
		Bytes       float64 `json:"bytes"`
		Bits        float64 `json:"bits_per_second"`
		Retransmits float64 `json:"retransmits"`
		Packets     float64 `json:"packets"`
		Lost        float64 `json:"lost_packets"`
	}
	var r struct {
		Error string `json:"error"`
		End   struct {
			UDP      *sum `json:"sum"` // as the server has told; of TCP there is none
			Sent     *sum `json:"sum_sent"`
			Received *sum `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(report, &r); err != nil {
		return transfer{}, fmt.Errorf("%w: read report: %w", ErrIperf, err)
	}
	switch u, s, v := r.End.UDP, r.End.Sent, r.End.Received; {
	case r.Error != "":
		return transfer{}, fmt.Errorf("%w: %s", ErrIperf, r.Error)
	case u != nil && u.Packets > u.Lost && u.Seconds > 0:
		return transfer{packets: (u.Packets - u.Lost) / u.Seconds}, nil
	case u == nil && s != nil && v != nil && v.Bytes > 0:
		return transfer{bits: v.Bits, bytes: v.Bytes, retransmits: s.Retransmits}, nil
	}
	return transfer{}, fmt.Errorf("%w: report without a transfer", ErrIperf)
}

// notYet tells whether iperf3's server was not ready, or not yet done with the
// client before.
func notYet(err error) bool {
	if !errors.Is(err, ErrIperf) {
		return false
	}
	s := err.Error()
	return strings.Contains(s, "connect to server: Connection refused") ||
		strings.Contains(s, "connect to server: Connection reset") ||
		strings.Contains(s, "server is busy")
}

// Of a server that is not ready: asked again so often, so long apart.
const (
	iperfTries = 100
	iperfPause = 50 * time.Millisecond
	// iperfGrace is what a transfer may take beyond its time.
	iperfGrace = 20 * time.Second
)

// serve starts iperf3's server at the far end; it serves one client after the
// other.
func (p *pair) serve() error {
	return p.run(1, &p.helpers, "iperf3", "-s", "-B", p.target.String())
}

// iperf runs one client at the near end.
func (p *pair) iperf(ctx context.Context, args ...string) (t transfer, err error) {
	ctx, cancel := context.WithTimeout(ctx, p.opt.Time+iperfGrace)
	defer cancel()
	args = append([]string{"-J", "-c", p.target.String()}, args...)
	for range iperfTries {
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, "iperf3", args...)
		cmd.Stdout = &out
		if err := p.ns[0].Start(cmd); err != nil {
			return transfer{}, fmt.Errorf("start iperf3: %w", err)
		}
		werr := cmd.Wait() // 1 after an error, which the report names
		if ctx.Err() != nil {
			return transfer{}, fmt.Errorf("%w: not done in time: %w", ErrIperf, ctx.Err())
		}
		if t, err = parseIperf(out.Bytes()); !notYet(err) {
			if err == nil && werr != nil {
				err = fmt.Errorf("%w: %w", ErrIperf, werr)
			}
			return t, err
		}
		time.Sleep(iperfPause)
	}
	return transfer{}, err
}

func (p *pair) seconds() string { return fmt.Sprint(int(p.opt.Time / time.Second)) }
