//go:build linux

package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// freeze copies the state folders of processes as a snapshot of their machines
// would: all are stopped at one moment, whatever they are about.
func freeze(t *testing.T, victims ...*process) (copies map[*process]string) {
	t.Helper()
	copies = map[*process]string{}
	for _, p := range victims {
		if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = p.cmd.Process.Signal(syscall.SIGCONT) }()
	}
	for _, p := range victims {
		eventually(t, "stopped", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
			return err == nil && strings.Contains(string(stat), ") T ")
		})
	}
	for _, p := range victims {
		copies[p] = filepath.Join(t.TempDir(), "state")
		if err := os.CopyFS(copies[p], os.DirFS(p.cfg.Dir)); err != nil {
			t.Fatal(err)
		}
	}
	return copies
}

// putBack puts an older copy in the place of a state folder.
func putBack(t *testing.T, p *process, old string) {
	t.Helper()
	if err := os.RemoveAll(p.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(p.cfg.Dir, os.DirFS(old)); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(p.cfg.Dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			return os.Chmod(path, 0o600)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestRestoredUnderLoad: the machine of one KME is put back to a snapshot, again
// and again, while both deliver keys. The peer remembers more of it than its
// disk has: it says so, gives up what is in doubt, delivers nothing a second
// time, and keys flow again. QUIETLINE_LONG=1 restores 200 times.
func TestRestoredUnderLoad(t *testing.T) {
	restores := long(6, 200)
	c := newCrew(t, 40, nil)
	var copies map[*process]string
	noticed := 0
	for i := range restores {
		c.flow(t, 300, fmt.Sprintf("after %d restores", i))
		p, other := c.a, c.b
		if i%2 == 1 {
			p, other = other, p
		}
		time.Sleep(time.Duration(c.rng.IntN(50)) * time.Millisecond)
		if i < 2 || c.rng.IntN(3) > 0 { // else the copy of two restores ago once more
			copies = merge(copies, freeze(t, p))
		}
		c.flow(t, 600, "after the snapshot") // segments are opened that the copy has too
		// Both tell each other every 100 ms how long their logs are. A copy that
		// is younger looks like a crash, and is as harmless.
		told := c.rng.IntN(4) > 0
		if told {
			time.Sleep(500 * time.Millisecond)
			c.flow(t, 10, "after the snapshot")
		}
		p.kill(t)
		putBack(t, p, copies[p])
		said := len(other.errs.String())
		p.start(t)
		c.flow(t, 300, fmt.Sprintf("after restore %d", i+1))
		if !told {
			continue
		}
		noticed++
		if text := p.errs.String(); !strings.Contains(text, "our disk is old or copied") {
			t.Errorf("seed %d, restore %d: %s does not notice: %s", c.seed, i, p.cfg.KME, text)
		}
		if text := other.errs.String()[said:]; !strings.Contains(text, "peer's disk is old") {
			t.Errorf("seed %d, restore %d: %s does not notice: %s", c.seed, i, other.cfg.KME, text)
		}
	}
	c.end(t)
	t.Logf("%d restores, %d of them old enough to be noticed", restores, noticed)
}

// TestBothRestoredUnderLoad: both machines are put back to snapshots of one
// moment, so that neither remembers more than the other has. What came from the
// disks is void, for nobody can say what was delivered since; new key flows.
// QUIETLINE_LONG=1 restores 100 times.
func TestBothRestoredUnderLoad(t *testing.T) {
	restores := long(3, 100)
	c := newCrew(t, 40, nil)
	for i := range restores {
		c.flow(t, 300, fmt.Sprintf("after %d restores", i))
		time.Sleep(time.Duration(c.rng.IntN(50)) * time.Millisecond)
		copies := freeze(t, c.a, c.b)
		c.flow(t, 600, "after the snapshots")
		c.a.kill(t)
		c.b.kill(t)
		putBack(t, c.a, copies[c.a])
		putBack(t, c.b, copies[c.b])
		c.b.start(t)
		c.a.start(t)
	}
	c.flow(t, 600, "after the last restore")
	c.end(t)
	t.Logf("%d restores", restores)
}

func merge(into, from map[*process]string) map[*process]string {
	if into == nil {
		into = map[*process]string{}
	}
	for p, path := range from {
		into[p] = path
	}
	return into
}
