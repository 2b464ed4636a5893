package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/lab"
)

// Addresses of documentation (RFC 5737): the cable's and, inside the tunnels,
// the two hosts'.
var (
	cableAddr = [2]netip.Prefix{
		netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")}
	innerAddr = [2]netip.Prefix{
		netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")}
)

// outerPort is where tunnels listen; the namespaces are ours alone.
const outerPort = 51820

// peerOverhead is what the peers' interfaces have less than the cable. It is
// WireGuard's figure (20 to 40 IP, 8 UDP, 32 its own), and more than the others
// need.
const peerOverhead = 80

// pair is two joined namespaces and what runs in them.
type pair struct {
	opt     *Options
	dir     string // of our own, for files of this contender
	ns      [2]*lab.Namespace
	target  netip.Addr // the far end, as traffic reaches it
	tunnels []*process // whose processor time counts
	helpers []*process
}

// process is one program and the last it said.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	said  bytes.Buffer // to be read after Wait
}

// newPair makes namespaces, cable and folder.
func newPair(opt *Options, dir string) (*pair, error) {
	p := &pair{opt: opt, target: innerAddr[1].Addr()}
	var ends [2]lab.End
	for i, name := range []string{"near", "far"} {
		ns, err := lab.NewNamespace(name)
		if err != nil {
			p.close()
			return nil, err
		}
		p.ns[i] = ns
		ends[i] = lab.End{Namespace: ns, Name: "wan0", Addresses: cableAddr[i : i+1],
			MTU: opt.MTU, NoSegmentation: opt.PlainCable || opt.Loss > 0,
			GRO: opt.PlainCable && opt.Loss == 0}
	}
	err := lab.Veth(ends[0], ends[1])
	if err == nil && opt.Loss > 0 {
		err = p.lose(opt.Loss)
	}
	if err == nil {
		p.dir, err = os.MkdirTemp(dir, "contender")
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// lossRules drop packets of the cable at random where they arrive.
const lossRules = `table inet bench {
	chain input {
		type filter hook prerouting priority raw;
		iifname "wan0" numgen random mod %d < %d drop
	}
}
`

// lose makes both ends lose packets that arrive by the cable.
func (p *pair) lose(of int) error {
	for _, ns := range p.ns {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(fmt.Sprintf(lossRules, lossOf, of))
		var said bytes.Buffer
		cmd.Stderr = &said
		err := ns.Start(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			return fmt.Errorf("make the cable lose packets: nft: %w: %s", err,
				bytes.TrimSpace(said.Bytes()))
		}
	}
	return nil
}

// run starts a program at one end, with its output kept.
func (p *pair) run(end int, list *[]*process, name string, args ...string) error {
	return p.start(end, list, exec.Command(name, args...))
}

func (p *pair) start(end int, list *[]*process, cmd *exec.Cmd) error {
	pr := &process{cmd: cmd}
	cmd.Stdout, cmd.Stderr = &pr.said, &pr.said
	if cmd.Stdin == nil {
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		pr.stdin = stdin
	}
	if err := p.ns[end].Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	*list = append(*list, pr)
	return nil
}

// close ends what runs, in whatever state it is.
func (p *pair) close() {
	for _, pr := range append(p.helpers, p.tunnels...) {
		_ = pr.cmd.Process.Kill()
		if pr.stdin != nil {
			_ = pr.stdin.Close()
		}
	}
	for _, pr := range append(p.helpers, p.tunnels...) {
		_ = pr.cmd.Wait()
	}
	for _, ns := range p.ns {
		if ns != nil {
			_ = ns.Close()
		}
	}
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

// explain adds to an error the last lines of the tunnels; after close.
func (p *pair) explain(err error) error {
	const lines = 3
	for i, pr := range p.tunnels {
		said := strings.Split(strings.TrimSpace(pr.said.String()), "\n")
		said = said[max(0, len(said)-lines):]
		if text := strings.Join(said, "; "); text != "" {
			err = fmt.Errorf("%w (end %d said: %s)", err, i, text)
		}
	}
	return err
}

// cpu is the processor time that the tunnels have taken so far, user and
// system, of all threads. What the kernel does for them in interrupts is not
// in it.
func (p *pair) cpu() time.Duration {
	const schedClock = 2 // CPUCLOCK_SCHED of the kernel's posix-timers_types.h
	var sum time.Duration
	for _, pr := range p.tunnels {
		var ts unix.Timespec
		clock := int32(^pr.cmd.Process.Pid<<3 | schedClock) // clock_getcpuclockid(3)
		if err := unix.ClockGettime(clock, &ts); err == nil {
			sum += time.Duration(ts.Nano())
		}
	}
	return sum
}

// write makes a file in the pair's folder and returns its path.
func (p *pair) write(name, text string) (string, error) {
	path := filepath.Join(p.dir, name)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// output runs a program to its end.
func output(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, bytes.TrimSpace(out))
	}
	return string(out), err
}
