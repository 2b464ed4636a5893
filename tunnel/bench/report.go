package bench

import (
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Figures are what one round of one contender gave, by the keys below. What
// does not apply is absent.
type Figures map[string]float64

// Keys of [Figures], each with its unit. Transfers are counted at the receiver.
const (
	TCP1         = "tcp1_gbit_s"
	TCP4         = "tcp4_gbit_s"
	CPUPerGB     = "cpu_s_per_gb" // both ends, during the one stream; GB = 10^9 bytes
	UDP64        = "udp64_packets_s"
	PingIdle50   = "ping_idle_p50_us"
	PingIdle99   = "ping_idle_p99_us"
	PingLoad50   = "ping_load_p50_us" // during the one stream
	PingLoad99   = "ping_load_p99_us"
	Retransmits1 = "retransmits_tcp1"
	Retransmits4 = "retransmits_tcp4"
)

// columns are the figures in the order of the table.
var columns = []struct {
	key, title, format string
}{
	{TCP1, "TCP1 Gbit/s", "%.2f"}, {TCP4, "TCP4 Gbit/s", "%.2f"}, {CPUPerGB, "CPU s/GB", "%.2f"},
	{UDP64, "UDP64 pkt/s", "%.0f"},
	{PingIdle50, "idle p50 us", "%.0f"}, {PingIdle99, "p99 us", "%.0f"},
	{PingLoad50, "loaded p50 us", "%.0f"}, {PingLoad99, "p99 us", "%.0f"},
	{Retransmits1, "rtx 1", "%.0f"}, {Retransmits4, "rtx 4", "%.0f"},
}

// Report is the outcome of a run.
type Report struct {
	Machine    Machine  `json:"machine"`
	Rounds     int      `json:"rounds"`
	Seconds    int      `json:"seconds"` // of each transfer
	MTU        int      `json:"mtu"`     // of the cable
	PlainCable bool     `json:"plain_cable"`
	Loss       int      `json:"loss"`               // packets in 100,000
	Baseline   string   `json:"baseline,omitempty"` // whom ratios compare with
	Results    []Result `json:"results"`
}

// Machine is where it ran. Load is the average of the last minute, before and
// after: a load that was there before is somebody else's.
type Machine struct {
	CPUs       int     `json:"cpus"`
	Model      string  `json:"model"`
	Kernel     string  `json:"kernel"`
	Go         string  `json:"go"`
	LoadBefore float64 `json:"load_before"`
	LoadAfter  float64 `json:"load_after"`
}

// Result is one contender's.
type Result struct {
	Name    string `json:"name"`
	What    string `json:"what,omitempty"`
	Install string `json:"install,omitempty"` // of one that is not here
	// Rounds has one entry a round; nil where it failed.
	Rounds []Figures `json:"rounds,omitempty"`
	Faults []string  `json:"faults,omitempty"`
	// Median is over the rounds. Ratio is the median of each round's figure
	// divided by the baseline's in that round.
	Median Figures `json:"median,omitempty"`
	Ratio  Figures `json:"ratio,omitempty"`
}

func newReport(opt Options, list []contender) *Report {
	r := &Report{Machine: thisMachine(), Rounds: opt.Rounds, Seconds: int(opt.Time / time.Second),
		MTU: opt.MTU, PlainCable: opt.PlainCable, Loss: opt.Loss}
	for _, c := range list {
		res := Result{Name: c.name, What: c.what}
		if c.start == nil {
			res.Install = c.install
		} else {
			res.Rounds = make([]Figures, opt.Rounds)
		}
		r.Results = append(r.Results, res)
	}
	return r
}

// note takes the outcome of one round of contender number i.
func (r *Report) note(round, i int, f Figures, err error) {
	r.Results[i].Rounds[round] = f
	if err != nil {
		r.Results[i].Faults = append(r.Results[i].Faults,
			fmt.Sprintf("round %d: %v", round+1, err))
	}
}

// finish computes medians and ratios.
func (r *Report) finish() {
	r.Machine.LoadAfter = loadAverage()
	for i := range r.Results {
		r.Results[i].Median = medians(r.Results[i].Rounds)
	}
	base := r.baseline()
	if base == nil {
		return
	}
	r.Baseline = base.Name
	for i := range r.Results {
		var ratios []Figures
		for round, f := range r.Results[i].Rounds {
			ratios = append(ratios, ratio(f, base.Rounds[round]))
		}
		r.Results[i].Ratio = medians(ratios)
	}
}

// baseline is the first of baselines that has figures.
func (r *Report) baseline() *Result {
	for _, name := range baselines {
		for i := range r.Results {
			if r.Results[i].Name == name && len(r.Results[i].Median) > 0 {
				return &r.Results[i]
			}
		}
	}
	return nil
}

// ratio divides figure by figure; what either lacks, or what would be divided
// by nought, is left out.
func ratio(f, base Figures) Figures {
	out := Figures{}
	for key, v := range f {
		if b := base[key]; b > 0 {
			out[key] = v / b
		}
	}
	return out
}

// medians are taken over the rounds that have a figure.
func medians(rounds []Figures) Figures {
	out := Figures{}
	for _, c := range columns {
		var all []float64
		for _, f := range rounds {
			if v, ok := f[c.key]; ok {
				all = append(all, v)
			}
		}
		if len(all) > 0 {
			out[c.key] = median(all)
		}
	}
	return out
}

// median is the middle one, or the mean of the two in the middle. It sorts v.
func median(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// Print writes the report for a person.
func (r *Report) Print(w io.Writer) error {
	m := r.Machine
	cable := "as the kernel makes it"
	if r.PlainCable {
		cable = "without segmentation"
	}
	if r.Loss > 0 {
		cable = fmt.Sprintf("without segmentation, loses %.3g %% of packets",
			float64(r.Loss)*100/lossOf)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d CPUs, %s, Linux %s, %s; load %.2f before, %.2f after\n", m.CPUs, m.Model,
		m.Kernel, m.Go, m.LoadBefore, m.LoadAfter)
	fmt.Fprintf(&b, "%d rounds, %d s a transfer, MTU %d, cable %s\n\n", r.Rounds, r.Seconds, r.MTU,
		cable)
	for _, c := range r.Results {
		switch {
		case c.Install != "":
			fmt.Fprintf(&b, "%-13s not here: %s\n", c.Name, c.Install)
		default:
			fmt.Fprintf(&b, "%-13s %s\n", c.Name, c.What)
		}
		for _, fault := range c.Faults {
			fmt.Fprintf(&b, "%-13s failed in %s\n", "", fault)
		}
	}
	b.WriteString("\nmedians\n")
	r.table(&b, func(c Result) Figures { return c.Median }, "")
	if r.Baseline != "" {
		fmt.Fprintf(&b, "\ntimes %s in the same round, medians\n", r.Baseline)
		r.table(&b, func(c Result) Figures { return c.Ratio }, "%.2f")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// table writes a row a contender that ran.
func (r *Report) table(w io.Writer, of func(Result) Figures, format string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, c := range columns {
		fmt.Fprintf(t, "\t%s", c.title)
	}
	fmt.Fprint(t, "\t\n")
	for _, res := range r.Results {
		if len(of(res)) == 0 {
			continue
		}
		fmt.Fprint(t, res.Name)
		for _, c := range columns {
			cell := "–"
			if v, ok := of(res)[c.key]; ok && !math.IsNaN(v) {
				how := format
				if how == "" {
					how = c.format
				}
				cell = fmt.Sprintf(how, v)
			}
			fmt.Fprintf(t, "\t%s", cell)
		}
		fmt.Fprint(t, "\t\n")
	}
	_ = t.Flush() // into memory
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), Model: "unknown processor",
		LoadBefore: loadAverage()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.Model = strings.TrimSpace(value)
			break
		}
	}
	return m
}

// loadAverage is that of the last minute; 0 where the kernel does not tell.
func loadAverage() float64 {
	var load float64
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(b), &load)
	}
	return load
}
