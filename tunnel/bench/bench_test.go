package bench

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel/lab"
)

// endArg makes this test binary one end of our own.
const endArg = "be-one-end"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == endArg {
		if err := End(context.Background(), os.Stdin); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(lab.Main(m))
}

func good() Options {
	return Options{Rounds: 1, Time: time.Second, Self: []string{"/proc/self/exe", endArg}}
}

// TestRound measures everything of ours once, through two kernels. How fast it
// is no test can say on a machine that others use.
func TestRound(t *testing.T) {
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes a quarter of a minute; set QUIETLINE_LONG=1 to run it (CI does)")
	}
	lab.Need(t)
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Fatalf("%v; apt-get install iperf3", err)
	}
	opt := good()
	opt.Only = []string{"quietline", "copy", "pad", "plain", "veth"}
	told := 0
	opt.Progress = func(_ int, name string, f Figures, err error) {
		if told++; err != nil || f[TCP1] <= 0 {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
	rep, err := Run(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	if told != len(opt.Only) || rep.Baseline != "plain" {
		t.Errorf("%d outcomes told, baseline %q", told, rep.Baseline)
	}
	for _, res := range rep.Results {
		for _, key := range []string{TCP1, TCP4, UDP64, PingIdle50, PingLoad99} {
			if key == UDP64 && res.Name == "pad" {
				continue // it is not flooded
			}
			if res.Median[key] <= 0 {
				t.Errorf("%s: %s is %v", res.Name, key, res.Median[key])
			}
		}
		if spent := res.Median[CPUPerGB]; (spent > 0) != (res.Name != "veth") {
			t.Errorf("%s: processor time %v s/GB", res.Name, spent)
		}
	}
	for _, res := range rep.Results {
		if res.Name == rep.Baseline && res.Ratio[TCP1] != 1 {
			t.Errorf("the baseline is %v times itself", res.Ratio[TCP1])
		}
	}
}

// A contender that carries nothing is told with what it said, and one whose
// program is gone with that.
func TestContenderThatFails(t *testing.T) {
	lab.Need(t)
	opt := good()
	opt.MTU = defaultMTU
	p, err := newPair(&opt, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.run(0, &p.tunnels, "/nonexistent"); err == nil {
		t.Error("a program that is not there was started")
	}
	if err := p.run(0, &p.tunnels, "sh", "-c", "echo no such cipher >&2"); err != nil {
		t.Fatal(err)
	}
	err = p.await(t.Context(), 50*time.Millisecond)
	if !errors.Is(err, ErrDown) {
		t.Errorf("await: %v", err)
	}
	_ = p.tunnels[0].cmd.Wait()
	p.close()
	if err := p.explain(err); !errors.Is(err, ErrDown) ||
		!strings.Contains(err.Error(), "no such cipher") {
		t.Errorf("explained: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err = newPair(&opt, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if err := p.await(ctx, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("await after cancel: %v", err)
	}
}

// Pings over the bare cable: all come back, and the clock of a process counts.
func TestPingAndProcessorTime(t *testing.T) {
	lab.Need(t)
	opt := good()
	opt.MTU = defaultMTU
	p, err := newPair(&opt, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	p.target = cableAddr[1].Addr()
	if err := p.await(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	d, err := p.ping(0, func(n int) bool { return n < 20 })
	if err != nil || len(d) != 20 {
		t.Fatalf("%d pings, %v", len(d), err)
	}
	for _, took := range d {
		if took <= 0 || took >= lostAfter {
			t.Errorf("a ping over a cable took %s", took)
		}
	}
	if p.cpu() != 0 {
		t.Error("processor time without a process")
	}
	if err := p.run(1, &p.tunnels, "sh", "-c", "while :; do :; done"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); p.cpu() < 20*time.Millisecond; {
		if time.Now().After(deadline) {
			t.Fatal("the processor time of a busy process does not grow")
		}
	}
}

// A cable that loses packets is noticed, and not carried across rounds.
func TestLoss(t *testing.T) {
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes six seconds; set QUIETLINE_LONG=1 to run it (CI does)")
	}
	lab.Need(t)
	opt := good()
	opt.Only, opt.Loss = []string{"quietline"}, 1000 // 1 %
	if err := opt.Check(); err != nil {
		t.Skip(err)
	}
	rep, err := Run(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	f := rep.Results[0].Median
	if f[TCP1] <= 0 || f[Retransmits1] < 1 {
		t.Errorf("%.3f Gbit/s with %.0f retransmits; one packet in 100 was lost", f[TCP1],
			f[Retransmits1])
	}
	var b strings.Builder
	if err := rep.Print(&b); err != nil || !strings.Contains(b.String(), "loses 1 % of packets") {
		t.Errorf("%s, %v", b.String(), err)
	}
}

func TestOptions(t *testing.T) {
	if err := good().Check(); err != nil && !errors.Is(err, ErrNeeds) {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no round":      func(o *Options) { o.Rounds = 0 },
		"many rounds":   func(o *Options) { o.Rounds = 1001 },
		"no time":       func(o *Options) { o.Time = 0 },
		"half a second": func(o *Options) { o.Time = 1500 * time.Millisecond },
		"a long time":   func(o *Options) { o.Time = 2 * time.Hour },
		"small MTU":     func(o *Options) { o.MTU = 1359 },
		"large MTU":     func(o *Options) { o.MTU = 9217 },
		"negative loss": func(o *Options) { o.Loss = -1 },
		"a cut cable":   func(o *Options) { o.Loss = maxLoss + 1 },
		"no command":    func(o *Options) { o.Self = nil },
		"a stranger":    func(o *Options) { o.Only = []string{"quietline", "carrier-pigeon"} },
	} {
		opt := good()
		change(&opt)
		if err := opt.Check(); !errors.Is(err, ErrOptions) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Run(t.Context(), opt); !errors.Is(err, ErrOptions) {
			t.Errorf("run with %s: %v", name, err)
		}
	}
}

// A machine without iperf3 or a peer is told how to get them.
func TestNeedsSayHow(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if err := good().Check(); !errors.Is(err, ErrNeeds) ||
		!strings.Contains(err.Error(), "apt-get install iperf3") {
		t.Errorf("no iperf3: %v", err)
	}
	opt := good()
	opt.Only = []string{"wireguard-go"}
	if err := opt.Check(); !errors.Is(err, ErrNeeds) ||
		!strings.Contains(err.Error(), "go install golang.zx2c4.com/wireguard@"+wireguardVersion) {
		t.Errorf("no wireguard-go: %v", err)
	}
	for _, c := range []contender{wireguardGo(), nebula()} {
		if c.start != nil || c.install == "" {
			t.Errorf("%s is here, or nobody says how to get it", c.name)
		}
	}
}

func TestChooseKeepsTheOrderAskedFor(t *testing.T) {
	start := func(*pair) error { return nil }
	all := []contender{{name: "a", start: start}, {name: "b"}, {name: "c", start: start}}
	got, err := choose(all, []string{"c", "a"})
	if err != nil || len(got) != 2 || got[0].name != "c" || got[1].name != "a" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := choose(all, nil); err != nil || len(got) != 3 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := choose(all, []string{"b"}); !errors.Is(err, ErrNeeds) {
		t.Errorf("one that is not here: %v", err)
	}
}

func TestEndRefuses(t *testing.T) {
	if !lab.Inside() {
		if err := End(t.Context(), strings.NewReader("{}")); !errors.Is(err, lab.ErrOutside) {
			t.Errorf("outside: %v", err)
		}
		return
	}
	for name, in := range map[string]string{"nothing": "", "no JSON": "line", "no kind": "{}",
		"a stranger": `{"Kind":"aes-ecb"}`, "a line without keys": `{"Kind":"line"}`} {
		if err := End(t.Context(), strings.NewReader(in)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The copier has the shape of a cipher, and none of its promises.
func TestCopier(t *testing.T) {
	buf := []byte("....hello................")
	sealed := copier{}.Seal(buf[:4], nil, buf[4:9], nil)
	if len(sealed) != 4+5+16 || string(sealed[4:9]) != "hello" {
		t.Errorf("sealed %q", sealed)
	}
	opened, err := copier{}.Open(sealed[4:4], nil, sealed[4:], nil)
	if err != nil || string(opened) != "hello" {
		t.Errorf("opened %q, %v", opened, err)
	}
	if _, err := (copier{}).Open(nil, nil, make([]byte, 15), nil); err == nil {
		t.Error("a record shorter than its tag was opened")
	}
}
