package node

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
)

const imageEnv = "QUIETLINE_TEST_IMAGE"

// TestNothingOnTheDiskOpensDeliveredKeys searches a whole disk: both KMEs run on
// ext4 in an image, deliver keys and turn. Then no byte of the image is a
// delivered key, and no epoch key that the image still gives anybody who has
// the root key opens one, though he may have every ciphertext and wrapping that
// was ever written. With data=journal old epoch keys do survive, which is what
// the warning at the start is about, and shows that the search finds them.
func TestNothingOnTheDiskOpensDeliveredKeys(t *testing.T) {
	for _, journal := range []string{"ordered", "journal"} {
		t.Run(journal, func(t *testing.T) {
			if options := os.Getenv(imageEnv); options != "" {
				if options == journal {
					searchImage(t, options)
				}
				return
			}
			runInMountNamespace(t, imageEnv+"="+journal)
		})
	}
}

// runInMountNamespace runs this very test again where its mounts end with it.
func runInMountNamespace(t *testing.T, env string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting an image needs root")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skipf("no mkfs.ext4: %v", err)
	}
	if f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0); err != nil {
		t.Skipf("no loop devices: %v", err)
	} else {
		f.Close()
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$",
		"-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("no mount namespace: %v", err)
	}
	text := string(out)
	for line := range strings.Lines(text) {
		if err != nil || strings.Contains(line, "image_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if err != nil || !strings.Contains(text, "--- PASS: "+t.Name()) {
		t.Errorf("search: %v", err)
	}
}

// mountImage makes ext4 in a file and mounts it until the process ends.
func mountImage(t *testing.T, options string) (image, dir string) {
	t.Helper()
	base := t.TempDir()
	image, dir = filepath.Join(base, "image"), filepath.Join(base, "mnt")
	err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20),
		os.Mkdir(dir, 0o700), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	if err := unix.Mount(loopOver(t, image), dir, "ext4", 0, "data="+options); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount: %v", err)
		}
	})
	return image, dir
}

// loopOver makes a loop device over a file, which goes with its last user. Not by
// mount(8): that asks every loop device of the machine, and waits for one whose
// file does not answer.
func loopOver(t *testing.T, image string) (device string) {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for range 20 { // another process may take the free one first
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatalf("free loop device: %v", err)
		}
		device = fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = loop.Close() }) // the mount keeps it after
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(file.Fd()),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}})
		if err == nil {
			return device
		} else if !errors.Is(err, unix.EBUSY) {
			t.Fatalf("set up %s: %v", device, err)
		}
	}
	t.Fatal("every free loop device is taken by somebody else")
	return ""
}

// scribe is a store that remembers what was ever sealed and wrapped.
type scribe struct {
	kms.Store
	mu   sync.Mutex
	keys map[kms.SegmentID][]kms.Wrapped
	text map[kms.SegmentID][][]byte
}

func (s *scribe) Commit(ctx context.Context, f kms.Fence, changes []kms.Change) (kms.Position, error) {
	s.mu.Lock()
	for _, c := range changes {
		w := c.Sealed.Key
		if c.Op == kms.OpRewrap {
			w = c.Key
		}
		if len(w.Bytes) > 0 {
			s.keys[c.Segment] = append(s.keys[c.Segment],
				kms.Wrapped{Epoch: w.Epoch, Bytes: bytes.Clone(w.Bytes)})
		}
		if len(c.Sealed.Slots) > 0 {
			s.text[c.Segment] = append(s.text[c.Segment], bytes.Clone(c.Sealed.Slots))
		}
	}
	s.mu.Unlock()
	return s.Store.Commit(ctx, f, changes)
}

// onImage starts a site with its state and root key on the image.
func (s *site) onImage(t *testing.T, dir string) *scribe {
	t.Helper()
	root := filepath.Join(dir, string(s.cfg.KME)+".root")
	if err := keyring.NewRootKey(root); err != nil {
		t.Fatal(err)
	}
	s.cfg.RootKey, s.cfg.Dir = root, filepath.Join(dir, string(s.cfg.KME))
	if err := os.Mkdir(s.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	rec := &scribe{keys: map[kms.SegmentID][]kms.Wrapped{}, text: map[kms.SegmentID][][]byte{}}
	s.startWith(t, func() (*Node, error) {
		store, err := boltstore.Open(filepath.Join(s.cfg.Dir, StoreFile), s.cfg.KME, boltstore.Options{})
		if err != nil {
			return nil, err
		}
		rec.Store = store
		return open(s.cfg, rec)
	})
	return rec
}

func searchImage(t *testing.T, options string) {
	image, dir := mountImage(t, options)
	a, b := newPair(t, 4096)
	ofB := b.onImage(t, dir)
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	ofA := a.onImage(t, dir)
	a.driver.allow(9)
	b.driver.allow(9)
	a.stored(t, "sae-a", "sae-b", 400)
	plain := map[string]bool{}
	deliver := func(n int) {
		t.Helper()
		got, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
			etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: n})
		if err != nil {
			t.Fatal(err)
		}
		req := etsi014.IDRequest{Initiator: "sae-a"}
		for _, k := range got.Keys {
			plain[string(k.Bits.Expose())] = true
			req.IDs = append(req.IDs, k.ID)
		}
		if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b"}, req); err != nil {
			t.Fatal(err)
		}
	}
	turn := func() {
		t.Helper()
		for _, s := range []*site{a, b} {
			if err := s.turn(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	deliver(60)
	turn()
	deliver(70)
	look := func(when string) (atA, atB int) {
		t.Helper()
		settle(t, dir)
		disk := written(t, image)
		for k := range plain {
			if bytes.Contains(disk, []byte(k)) {
				t.Errorf("%s: a delivered key stands on the disk in clear", when)
			}
		}
		var epochsA, epochsB int
		atA, epochsA = opened(t, disk, a.cfg.RootKey, ofA, plain)
		atB, epochsB = opened(t, disk, b.cfg.RootKey, ofB, plain)
		t.Logf("data=%s, %s: the disk gives %d and %d epoch keys, which open %d and %d of %d keys",
			options, when, epochsA, epochsB, atA, atB, len(plain))
		return atA, atB
	}
	if atA, atB := look("before the turn"); atA < 70 || atB < 70 {
		t.Errorf("positive control: %d and %d keys open before the turn, want 70 at least", atA, atB)
	}
	turn()
	atA, atB := look("after the turn")
	switch options {
	case "ordered":
		if atA+atB != 0 {
			t.Errorf("%d and %d delivered keys open after the turn", atA, atB)
		}
	default:
		if atA+atB == 0 {
			t.Error("nothing survives in a journal of data: the search finds nothing, or the " +
				"warning of it is wrong")
		}
	}
	deliver(20) // and the rest is still there
}

// written is an image without its pages of zeros, in which no key lies.
func written(t *testing.T, image string) (disk []byte) {
	t.Helper()
	all, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	zero := make([]byte, 4096)
	for page := range slices.Chunk(all, len(zero)) {
		if !bytes.Equal(page, zero) {
			disk = append(disk, page...)
		}
	}
	return disk
}

// settle has a file system write everything to its device. A sync of all would
// wait for whatever else the machine has mounted.
func settle(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
}

func gcm(t *testing.T, key []byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return aead
}

// epochKeysOn finds every whole epoch slot on a disk, wherever it lies, and
// opens it with the root key. The format is that of package keyring, written
// down here once more.
func epochKeysOn(t *testing.T, disk, root []byte) map[uint64][][]byte {
	t.Helper()
	found := map[uint64][][]byte{}
	for at := 0; ; {
		i := bytes.Index(disk[at:], []byte("QLepoch1"))
		if i < 0 || at+i+108 > len(disk) {
			return found
		}
		slot := disk[at+i : at+i+108]
		at += i + 8
		sum := sha256.Sum256(slot[:76])
		if !bytes.Equal(sum[:], slot[76:]) {
			continue
		}
		key, err := gcm(t, root).Open(nil, slot[16:28], slot[28:76], slot[:16])
		if err == nil {
			epoch := binary.BigEndian.Uint64(slot[8:])
			found[epoch] = append(found[epoch], key)
		}
	}
}

// opened counts the keys of want that epoch keys on the disk open, with every
// wrapping and every ciphertext that was ever written at hand.
func opened(t *testing.T, disk []byte, rootFile string, of *scribe, want map[string]bool) (n, epochs int) {
	t.Helper()
	root, err := os.ReadFile(rootFile)
	if err != nil {
		t.Fatal(err)
	}
	keys := epochKeysOn(t, disk, root)
	if len(keys) == 0 {
		t.Fatal("no epoch key is found on the disk, not even the living one: the search is blind")
	}
	found := map[string]bool{}
	of.mu.Lock()
	defer of.mu.Unlock()
	for id, wrappings := range of.keys {
		name := keyring.Name(id)
		for _, w := range wrappings {
			for _, all := range keys { // of every epoch: the number may lie
				for _, epoch := range all {
					data, err := gcm(t, epoch).Open(nil, w.Bytes[:12], w.Bytes[12:], name)
					if err != nil {
						continue
					}
					for _, text := range of.text[id] {
						openSlots(gcm(t, data), text, name, want, found)
					}
				}
			}
		}
	}
	return len(found), len(keys)
}

func openSlots(aead cipher.AEAD, text, name []byte, want, found map[string]bool) {
	const sealed = peer.SlotBytes + 16
	for i := range len(text) / sealed {
		nonce := binary.BigEndian.AppendUint64(make([]byte, 4), uint64(i))
		key, err := aead.Open(nil, nonce, text[i*sealed:(i+1)*sealed], name)
		if err == nil && want[string(key)] {
			found[string(key)] = true
		}
	}
}
