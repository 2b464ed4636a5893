package twosites

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/tunnel/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }

// Bounds of the promise.
const (
	mostCommands = 6 // per site
	mostTime     = time.Minute
)

// site is one machine: a namespace and a folder, empty at first.
type site struct {
	t        *testing.T
	name     string
	ns       *lab.Namespace
	dir, bin string
	commands []string
	running  []*process
}

// process is a command that runs, with what it printed.
type process struct {
	cmd   *exec.Cmd
	mu    sync.Mutex
	out   bytes.Buffer
	ended chan struct{}
	in    io.Writer // what a person types meanwhile; nil if all was typed before
}

// typed stands for an input that a person types later.
const typed = "typed later"

// types is a person at the keyboard.
func (p *process) types(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(p.in, text+"\n"); err != nil {
		t.Fatal(err)
	}
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start runs one command line at the site and counts it.
func (s *site) start(line, stdin string) *process {
	s.t.Helper()
	args := strings.Fields(line)
	if len(args) == 0 || args[0] != "quietline" {
		s.t.Fatalf("%s: not a command: %q", s.name, line)
	}
	s.commands = append(s.commands, line)
	p := &process{cmd: exec.Command(s.bin, args[1:]...), ended: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = s.dir, p, p
	if stdin == typed {
		in, err := p.cmd.StdinPipe()
		if err != nil {
			s.t.Fatal(err)
		}
		p.in = in
	} else {
		p.cmd.Stdin = strings.NewReader(stdin)
	}
	if err := s.ns.Start(p.cmd); err != nil {
		s.t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.ended) }()
	s.running = append(s.running, p)
	return p
}

// finish runs a command line to its end, which must be good.
func (s *site) finish(line, stdin string) string {
	s.t.Helper()
	p := s.start(line, stdin)
	select {
	case <-p.ended:
	case <-time.After(mostTime):
		s.t.Fatalf("%s: %s does not end\n%s", s.name, line, p.said())
	}
	if !p.cmd.ProcessState.Success() {
		s.t.Fatalf("%s: %s: %v\n%s", s.name, line, p.cmd.ProcessState, p.said())
	}
	return p.said()
}

func (s *site) stop() {
	for _, p := range s.running {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range s.running {
		select {
		case <-p.ended:
		case <-time.After(5 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.ended
		}
		if s.t.Failed() {
			s.t.Logf("%s: %s\n%s", s.name, strings.Join(p.cmd.Args[1:], " "), p.said())
		}
	}
}

// printed finds a command in what a program printed.
func printed(t *testing.T, text, begin string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, begin) {
			return line
		}
	}
	t.Fatalf("no command %q is printed:\n%s", begin, text)
	return ""
}

// printedAll finds every command of that kind.
func printedAll(text, begin string) (list []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, begin) {
			list = append(list, line)
		}
	}
	return list
}

var fingerprint = regexp.MustCompile(`(?m)^  ((?:[0-9a-f]{4} ){7}[0-9a-f]{4})$`)

// await waits until what a process printed matches.
func await(t *testing.T, p *process, re *regexp.Regexp) string {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(mostTime)
	for {
		if m := re.FindStringSubmatch(p.said()); m != nil {
			return m[1]
		}
		select {
		case <-tick.C:
		case <-p.ended:
			t.Fatalf("ended: %v\n%s", p.cmd.ProcessState, p.said())
		case <-limit:
			t.Fatalf("nothing matches %v:\n%s", re, p.said())
		}
	}
}

// build makes the program.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "quietline")
	out, err := exec.Command("go", "build", "-o", bin,
		"github.com/quietline/quietline/cmd/quietline").CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// machines makes two empty machines with one cable between them.
func machines(t *testing.T) (a, b *site) {
	t.Helper()
	lab.Need(t)
	bin := build(t)
	var both [2]*site
	var ends [2]lab.End
	for i, name := range []string{"tokyo", "kochi"} {
		ns, err := lab.NewNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		// Short: the paths of the control sockets lie below it.
		dir, err := os.MkdirTemp("/tmp", "ql")
		if err != nil {
			t.Fatal(err)
		}
		both[i] = &site{t: t, name: name, ns: ns, dir: dir, bin: bin}
		ends[i] = lab.End{Namespace: ns, Name: "wan", MTU: 1500,
			Addresses: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/30", i+1))}}
		t.Cleanup(func() { both[i].stop(); _ = ns.Close(); _ = os.RemoveAll(dir) })
	}
	if err := lab.Veth(ends[0], ends[1]); err != nil {
		t.Fatal(err)
	}
	return both[0], both[1]
}

// enrol makes two sites and joins them, with printed commands only. It returns
// what the last command of each printed.
func enrol(t *testing.T, a, b *site) (atA, atB string) {
	t.Helper()
	told := a.finish("quietline init --site tokyo --address 192.0.2.1 --device simulated", "")
	b.finish("quietline init", "kochi\n192.0.2.2\nsimulated\n")
	line := strings.Replace(printed(t, told, "quietline pki invite"), "OTHER-SITE", "kochi", 1)
	return join(t, a, b, line)
}

// join lets b join a with the commands that are printed, and two people on the
// telephone. It returns what both printed.
func join(t *testing.T, a, b *site, line string) (atA, atB string) {
	t.Helper()
	inviting := a.start(line, typed)
	heard := await(t, inviting, fingerprint) // the person at Tokyo reads it out
	await(t, inviting, regexp.MustCompile(`(?m)^(waiting for kochi)`))
	joining := b.start(printed(t, inviting.said(), "quietline pki join"), heard+"\n")
	back := await(t, joining, fingerprint) // the person at Kochi reads back
	await(t, inviting, regexp.MustCompile(`(Fingerprint that kochi reads out)`))
	inviting.types(t, back)
	for _, p := range []*process{inviting, joining} {
		select {
		case <-p.ended:
		case <-time.After(20 * time.Second):
			t.Fatalf("it does not end\n%s", p.said())
		}
		if !p.cmd.ProcessState.Success() {
			t.Fatalf("%v: %v\n%s", p.cmd.Args, p.cmd.ProcessState, p.said())
		}
	}
	return inviting.said(), joining.said()
}

// TestPrintedCommandsOnly goes from nothing to packets inside the line.
func TestPrintedCommandsOnly(t *testing.T) {
	a, b := machines(t)
	begun := time.Now()
	atA, atB := enrol(t, a, b)
	a.daemons(atA)
	b.daemons(atB)
	inner := addresses(t, a, b)
	got := talk(t, a, b, inner)
	took := time.Since(begun)
	if want := "through the line"; got != want {
		t.Errorf("%q came through, want %q", got, want)
	}
	if took > mostTime {
		t.Errorf("it took %v, at most %v is promised", took, mostTime)
	}
	for _, s := range []*site{a, b} {
		t.Logf("%s: %d commands:\n  %s", s.name, len(s.commands), strings.Join(s.commands, "\n  "))
		if len(s.commands) > mostCommands {
			t.Errorf("%s: %d commands, at most %d are promised", s.name, len(s.commands), mostCommands)
		}
	}
	onlyPrinted(t, a, b)
	t.Logf("from two empty machines to encrypted traffic in %v", took.Round(time.Millisecond))
}

// onlyPrinted holds every command that was run against what was printed before
// it, word for word: only the first of each site comes from the manual, and in
// one the name of the other site is put in.
func onlyPrinted(t *testing.T, sites ...*site) {
	t.Helper()
	lines := map[string]bool{}
	for _, s := range sites {
		for _, p := range s.running {
			for line := range strings.Lines(p.said()) {
				lines[strings.TrimSpace(line)] = true
			}
		}
	}
	for _, s := range sites {
		if first := s.commands[0]; !strings.HasPrefix(first, "quietline init") {
			t.Errorf("%s begins with %s", s.name, first)
		}
		for _, c := range s.commands[1:] {
			if !lines[c] && !lines[strings.Replace(c, " kochi", " OTHER-SITE", 1)] {
				t.Errorf("%s: nobody printed: %s", s.name, c)
			}
		}
	}
}

// daemons starts what was printed.
func (s *site) daemons(told string) {
	s.t.Helper()
	for _, daemon := range []string{"quietline sim", "quietline kme", "quietline line"} {
		for _, line := range printedAll(told, daemon) {
			s.start(line, "")
		}
	}
}

// addresses are those inside the line.
func addresses(t *testing.T, sites ...*site) (list []netip.Addr) {
	t.Helper()
	for _, s := range sites {
		file, err := config.Load(filepath.Join(s.dir, s.name, "site.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, file.Lines[0].TUN.Addresses[0].Addr())
	}
	return list
}

// talk sends a line of text from b to a by TCP through the tunnel, as soon as
// it stands.
func talk(t *testing.T, a, b *site, inner []netip.Addr) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*mostTime)
	defer cancel()
	var ln net.Listener
	retry(t, ctx, func() (err error) {
		ln, err = a.ns.Listen("tcp", netip.AddrPortFrom(inner[0], 7).String())
		return err
	})
	defer ln.Close()
	heard := make(chan string, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			heard <- err.Error()
			return
		}
		defer conn.Close()
		text, _ := bufio.NewReader(conn).ReadString('\n')
		heard <- strings.TrimSpace(text)
	}()
	retry(t, ctx, func() error {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		conn, err := b.ns.Dial(short, "tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = io.WriteString(conn, "through the line\n")
		return err
	})
	select {
	case text := <-heard:
		return text
	case <-ctx.Done():
		t.Fatal("nothing came through")
	}
	return ""
}

// retry calls f until it returns nil.
func retry(t *testing.T, ctx context.Context, f func() error) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}
