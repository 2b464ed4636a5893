package keyring

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

const childEnv = "QUIETLINE_KEYRING_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Println(turnAndRotate(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// disk is the folder of a key manager that is killed: its store is a file with
// the epoch and one wrapped key, written as one.
type disk string

func (d disk) path(name string) string { return filepath.Join(string(d), name) }

func (d disk) commit(w kms.Wrapped) error {
	return secret.WriteFile(d.path("store"), append(binary.BigEndian.AppendUint64(nil, w.Epoch),
		w.Bytes...))
}

// start opens the ring as a key manager does and returns the stored key.
func (d disk) start(root secret.Bytes) (*Ring, kms.Wrapped, error) {
	data, err := os.ReadFile(d.path("store"))
	if err != nil {
		return nil, kms.Wrapped{}, err
	}
	w := kms.Wrapped{Epoch: binary.BigEndian.Uint64(data), Bytes: data[8:]}
	r, err := Open(d.path("epoch.keys"), root, w.Epoch, false)
	return r, w, err
}

// turnAndRotate turns epochs and changes the root key until it is killed. Root
// keys are files that are put in place by a rename, as the verb does.
func turnAndRotate(dir string) error {
	d := disk(dir)
	root, err := ReadRootKey(d.path("root"))
	if err != nil {
		return err
	}
	r, w, err := d.start(root)
	if err != nil {
		return err
	}
	turn := func() error {
		next, err := r.Next()
		if err == nil {
			w, err = r.Rewrap(use, w, next)
		}
		if err == nil {
			err = d.commit(w)
		}
		if err == nil {
			err = r.Finish(next)
		}
		return err
	}
	fmt.Println("begin")
	for {
		if err := turn(); err != nil {
			return err
		}
		next, err := newRootBeside(d)
		if err == nil {
			if err = r.Admit(next); errors.Is(err, kms.ErrRotation) {
				// One from before a kill waits: give it up, it is not in place.
				if err = r.Abandon(); err == nil {
					err = r.Admit(next)
				}
			}
		}
		if err == nil {
			err = turn()
		}
		if err == nil {
			err = os.Rename(d.path("next"), d.path("root"))
		}
		if err == nil {
			_, err = r.Adopt(next)
		}
		if err == nil {
			err = turn()
		}
		if err != nil {
			return err
		}
		next.Clear()
	}
}

func newRootBeside(d disk) (secret.Bytes, error) {
	_ = os.Remove(d.path("next"))
	if err := NewRootKey(d.path("next")); err != nil {
		return secret.Bytes{}, err
	}
	return ReadRootKey(d.path("next"))
}

// TestKilledWhileTheRootKeyChanges: the key manager itself is killed at any
// moment of turns and changes. The root key in place always opens what it
// stored.
func TestKilledWhileTheRootKeyChanges(t *testing.T) {
	d := disk(t.TempDir())
	if err := NewRootKey(d.path("root")); err != nil {
		t.Fatal(err)
	}
	root, err := ReadRootKey(d.path("root"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(d.path("epoch.keys"), root, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Wrap(use, material)
	if err == nil {
		err = d.commit(w)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	draw := rand.New(rand.NewPCG(seed, 0))
	roots := map[string]bool{}
	for n := range 40 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+string(d))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		lines.Scan()
		if lines.Text() != "begin" {
			t.Fatalf("after kill %d: %s", n, lines.Text())
		}
		time.Sleep(time.Duration(draw.Int64N(int64(80 * time.Millisecond))))
		_ = cmd.Process.Kill()
		for lines.Scan() {
			t.Errorf("kill %d: the child said %q", n, lines.Text())
		}
		_ = cmd.Wait()
		root, err := ReadRootKey(d.path("root"))
		if err != nil {
			t.Fatal(err)
		}
		roots[string(root.Expose()[:8])] = true
		r, w, err := d.start(root)
		if err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		key, err := r.Unwrap(use, w)
		if err != nil || string(key.Expose()) != string(material) {
			t.Fatalf("after kill %d: the stored key: %v", n, err)
		}
		r.Close()
	}
	if len(roots) < 3 {
		t.Errorf("only %d root keys in 40 runs: the test means little", len(roots))
	}
	t.Logf("%d root keys seen at 40 kills", len(roots))
}
