//go:build linux

package powercut

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const testBlocks = 64

func testCache(t *testing.T) (*cache, *os.File) {
	t.Helper()
	var files [2]*os.File
	for i := range files {
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		files[i] = f
	}
	if err := files[0].Truncate(testBlocks * blockSize); err != nil {
		t.Fatal(err)
	}
	return newCache(files[0], testBlocks*blockSize, 0), files[1]
}

// fill writes a block full of one byte.
func fill(t *testing.T, c *cache, n int64, with byte) {
	t.Helper()
	if errno := c.write(bytes.Repeat([]byte{with}, blockSize), n*blockSize); errno != 0 {
		t.Fatal(errno)
	}
}

// sectors returns the first byte of each sector of a block of the image.
func sectorsOf(t *testing.T, image *os.File, n int64) []byte {
	t.Helper()
	b := make([]byte, blockSize)
	if _, err := image.ReadAt(b, n*blockSize); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for s := 0; s < blockSize; s += sectorSize {
		if !bytes.Equal(b[s:s+sectorSize], bytes.Repeat(b[s:s+1], sectorSize)) {
			t.Fatalf("a sector of block %d is itself torn", n)
		}
		out = append(out, b[s])
	}
	return out
}

func TestCutKeepsTheFlushedAndChoosesOfTheRest(t *testing.T) {
	for _, fraction := range []float64{0, 0.25, 0.5, 1} {
		for seed := range uint64(50) {
			c, image := testCache(t)
			for n := range int64(testBlocks) {
				fill(t, c, n, 1)
			}
			if errno := c.flush(); errno != 0 {
				t.Fatal(errno)
			}
			for n := range int64(testBlocks / 2) {
				fill(t, c, n, 2)
			}
			loss, err := c.cutTo(image, fraction, seed)
			if err != nil {
				t.Fatal(err)
			}
			var got Loss
			for n := range int64(testBlocks) {
				old := bytes.Count(sectorsOf(t, image, n), []byte{1})
				switch new := bytes.Count(sectorsOf(t, image, n), []byte{2}); {
				case old+new != blockSize/sectorSize, n >= testBlocks/2 && new > 0:
					t.Fatalf("seed %d: block %d holds %d old and %d new sectors", seed, n, old, new)
				case new > 0 && old > 0:
					got.Torn++
					got.Written++
				case new > 0:
					got.Written++
				}
			}
			got.Unflushed = testBlocks / 2
			if diff := cmp.Diff(got, loss); diff != "" {
				t.Errorf("seed %d: loss told (-found +told):\n%s", seed, diff)
			}
			if want := int(fraction * testBlocks / 2); got.Written != want {
				t.Errorf("seed %d: %d blocks written, want %d", seed, got.Written, want)
			}
		}
	}
}

func TestSameSeedSameCut(t *testing.T) {
	var images [][]byte
	for range 2 {
		c, image := testCache(t)
		for n := range int64(testBlocks) {
			fill(t, c, n, byte(n))
		}
		if _, err := c.cutTo(image, 0.5, 7); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(image.Name())
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, b)
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two cuts with one seed differ")
	}
}

func TestReadsSeeTheNewestBytes(t *testing.T) {
	c, _ := testCache(t)
	model := make([]byte, testBlocks*blockSize)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 500 {
		off := rng.Int64N(int64(len(model)))
		n := rng.Int64N(min(3*blockSize, int64(len(model))-off) + 1)
		b := make([]byte, n)
		switch rng.IntN(5) {
		case 0:
			if errno := c.flush(); errno != 0 {
				t.Fatal(errno)
			}
		case 1, 2:
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			copy(model[off:], b)
			if errno := c.write(b, off); errno != 0 {
				t.Fatal(errno)
			}
		default:
			if errno := c.read(b, off); errno != 0 || !bytes.Equal(b, model[off:off+n]) {
				t.Fatalf("seed %d: %d bytes at %d differ, %v", seed, n, off, errno)
			}
		}
	}
}

func TestAfterACut(t *testing.T) {
	c, image := testCache(t)
	fill(t, c, 1, 1)
	if _, err := c.cutTo(image, 1, 3); err != nil {
		t.Fatal(err)
	}
	fill(t, c, 1, 2) // goes nowhere, but is seen
	if errno := c.flush(); errno != syscall.EIO {
		t.Errorf("flush after the cut: %v, want EIO", errno)
	}
	b := make([]byte, 1)
	if errno := c.read(b, blockSize); errno != 0 || b[0] != 2 {
		t.Errorf("read after the cut: %d, %v", b[0], errno)
	}
	if bytes.Contains(sectorsOf(t, image, 1), []byte{2}) {
		t.Error("a write after the cut reached the disk")
	}
	if errno := c.write([]byte{1}, testBlocks*blockSize); errno != syscall.ENOSPC {
		t.Errorf("write past the end: %v", errno)
	}
}
