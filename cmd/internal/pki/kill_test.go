package pki_test

import (
	"crypto/x509"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// TestMain plays a process that renews, revokes and issues without end, for
// the test that kills it.
func TestMain(m *testing.M) {
	dir := os.Getenv("PKI_CHILD")
	if dir == "" {
		os.Exit(m.Run())
	}
	a, err := pki.Open(dir)
	if err != nil {
		os.Exit(1)
	}
	_, _ = os.Stdout.Write([]byte{1})
	for {
		if _, err := a.Renew("x"); err != nil {
			os.Exit(1)
		}
		if _, err := a.Revoke("y"); err != nil {
			os.Exit(1)
		}
		if err := os.Remove(a.PairFile("y")); err != nil {
			os.Exit(1)
		}
		if _, err := a.Make(pki.SAERoot, "y", line("y")); err != nil {
			os.Exit(1)
		}
	}
}

// TestKilledWhileItRenews kills a process that renews at a random moment, many
// times; each time the folder is whole, and the same command works.
func TestKilledWhileItRenews(t *testing.T) {
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	a := newAuthority(t)
	for _, name := range []string{"x", "y"} {
		if _, err := a.Make(pki.SAERoot, name, line(name)); err != nil {
			t.Fatal(err)
		}
	}
	roots := []*x509.Certificate{a.Root(pki.SAERoot).Certificate()}
	for round := range 20 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "PKI_CHILD="+a.Dir())
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has begun
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		time.Sleep(time.Duration(random.IntN(int(40 * time.Millisecond)))) // the moment of the kill
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		b, err := pki.Open(a.Dir())
		if err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		p, err := pki.LoadPair(b.PairFile("x"))
		if err == nil {
			err = pki.CheckChain(p.Chain, roots, p.Key.Public(), pki.Use{Client: true}, time.Now())
		}
		if err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		if _, err := b.List(); err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		if _, err := b.Renew("x"); err != nil {
			t.Fatalf("seed %d, round %d: the same command: %v", seed, round, err)
		}
		if _, err := os.Stat(b.PairFile("y")); err != nil { // killed between remove and make
			if _, err := b.Make(pki.SAERoot, "y", line("y")); err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
		}
	}
}
