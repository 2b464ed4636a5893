package distill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/secret"
)

// File format of a pool, version 1, integers little-endian:
//
//	magic "QLAUTH", version u16
//	hash points: 16 bytes for alice's tags, 16 for bob's
//	number of segments u32, then for each:
//	  generation u64, seq u64, pads u32, next of alice u32, of bob u32,
//	  16 bytes a pad; used pads are zero
const (
	authMagic   = "QLAUTH"
	authVersion = 1
	padBytes    = 16
	// padGroup is the pads a block costs: two of alice's, one of bob's.
	padGroup = 3
	// maxSegments bounds the file. Segments beyond are those of blocks that
	// only one end finished; the oldest go, never the seed.
	maxSegments = 256
	// maxAuthFile bounds what is read: a seed of a million pads.
	maxAuthFile = 16 << 20
	// seedBytes is the default seed: the points and 3072 pads, enough for a
	// thousand blocks that all fail.
	seedBytes = 32 + 1024*padGroup*padBytes
)

// AuthFile is an [AuthKeys] in a file of mode 0600. It is safe for concurrent
// use; the file is locked against other processes while it is open.
//
// Copying the file back from a backup would let pads be used twice. The peer
// sees it in its first message and the session ends with ErrRolledBack.
type AuthFile struct {
	path string
	lock *os.File

	mu       sync.Mutex
	points   [2][16]byte
	segments []authSegment
	failed   error // of a write; what is on disk is then unknown
}

type authSegment struct {
	AuthSegment
	pads []byte
}

// NewAuthSeed draws a seed of the default size for CreateAuthFile. Both ends
// need the same one; the caller clears it.
func NewAuthSeed(r io.Reader) (secret.Bytes, error) {
	s := secret.New(seedBytes)
	if _, err := io.ReadFull(r, s.Expose()); err != nil {
		s.Clear()
		return secret.Bytes{}, fmt.Errorf("draw authentication seed: %w", err)
	}
	return s, nil
}

// CreateAuthFile makes a pool of a seed: 32 bytes for the hash points, then
// 48 bytes for each three pads, at least 32 blocks' worth. It refuses to
// replace a file: a seed must never start twice. The seed stays the caller's.
func CreateAuthFile(path string, seed []byte) error {
	pads := (len(seed) - 32) / padBytes / padGroup * padGroup
	if pads < 32*padGroup {
		return fmt.Errorf("create authentication pool %s: a seed of %d bytes is too short, "+
			"%d are needed", path, len(seed), 32+32*padGroup*padBytes)
	}
	switch _, err := os.Lstat(path); {
	case err == nil:
		return fmt.Errorf("create authentication pool %s: %w", path, os.ErrExist)
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("create authentication pool: %w", err)
	}
	f := &AuthFile{path: path}
	copy(f.points[0][:], seed)
	copy(f.points[1][:], seed[16:])
	f.segments = []authSegment{newSegment(0, 0, seed[32:32+pads*padBytes])}
	defer f.clear()
	return f.save()
}

func newSegment(generation, seq uint64, bits []byte) authSegment {
	return authSegment{
		AuthSegment{Generation: generation, Seq: seq, Pads: uint32(len(bits) / padBytes),
			Next: [2]uint32{0, padGroup - 1}},
		append([]byte(nil), bits...),
	}
}

// OpenAuthFile opens a pool and locks it; Close lets it go.
func OpenAuthFile(path string) (*AuthFile, error) {
	// The lock is on a file of its own, because the pool is replaced at each
	// write.
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open authentication pool: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("open authentication pool %s: in use by another process: %w", path, err)
	}
	f := &AuthFile{path: path, lock: lock}
	raw, err := secret.ReadFile(path, maxAuthFile)
	if err == nil {
		err = f.parse(raw.Expose())
		raw.Clear()
	}
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("open authentication pool %s: %w", path, err)
	}
	return f, nil
}

// Close clears the keys in memory and unlocks the file.
func (f *AuthFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.clear()
	f.failed = os.ErrClosed
	if f.lock == nil {
		return nil
	}
	err := f.lock.Close()
	f.lock = nil
	return err
}

func (f *AuthFile) clear() {
	for _, s := range f.segments {
		secret.Wipe(s.pads)
	}
	f.segments = nil
	clear(f.points[:])
}

// Point implements [AuthKeys].
func (f *AuthFile) Point(sender Role) [16]byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.points[sender&1]
}

// Segments implements [AuthKeys].
func (f *AuthFile) Segments() []AuthSegment {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]AuthSegment, len(f.segments))
	for i, s := range f.segments {
		out[i] = s.AuthSegment
	}
	return out
}

// Left is the number of unused bits of both directions.
func (f *AuthFile) Left() int64 { return authLeft(f.Segments()) }

func authLeft(segments []AuthSegment) int64 {
	var pads int64
	for _, s := range segments {
		for i := uint32(0); i < s.Pads; i++ {
			if i >= s.Next[sender(i)] {
				pads++
			}
		}
	}
	return pads * padBytes * 8
}

// sender is whose tags a pad is for.
func sender(index uint32) Role {
	if index%padGroup == padGroup-1 {
		return Bob
	}
	return Alice
}

// after is the next index of the same sender.
func after(index uint32) uint32 {
	role := sender(index)
	for index++; sender(index) != role; index++ {
	}
	return index
}

// Take implements [AuthKeys].
func (f *AuthFile) Take(name PadName) (pad [16]byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return pad, f.failed
	}
	for i := range f.segments {
		s := &f.segments[i]
		if s.Generation != name.Generation || s.Seq != name.Seq || name.Index >= s.Pads {
			continue
		}
		role := sender(name.Index)
		if name.Index < s.Next[role] {
			return pad, ErrPadUsed
		}
		copy(pad[:], s.pads[name.Index*padBytes:])
		for j := s.Next[role]; j <= name.Index; j = after(j) {
			clear(s.pads[j*padBytes : (j+1)*padBytes])
		}
		s.Next[role] = after(name.Index)
		if s.Next[Alice] >= s.Pads && s.Next[Bob] >= s.Pads && (s.Generation != 0 || s.Seq != 0) {
			f.segments = append(f.segments[:i], f.segments[i+1:]...)
		}
		if err := f.save(); err != nil {
			return [16]byte{}, err
		}
		return pad, nil
	}
	return pad, ErrPadUnknown
}

// Peek implements [AuthKeys].
func (f *AuthFile) Peek(name PadName) (pad [16]byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.segments {
		if s.Generation != name.Generation || s.Seq != name.Seq || name.Index >= s.Pads {
			continue
		}
		if name.Index < s.Next[sender(name.Index)] {
			return pad, ErrPadUsed
		}
		copy(pad[:], s.pads[name.Index*padBytes:])
		return pad, nil
	}
	return pad, ErrPadUnknown
}

// Add implements [AuthKeys].
func (f *AuthFile) Add(generation, seq uint64, bits []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return f.failed
	}
	if len(bits) == 0 || len(bits)%(padGroup*padBytes) != 0 {
		return fmt.Errorf("add authentication key: %d bytes are no multiple of %d",
			len(bits), padGroup*padBytes)
	}
	for _, s := range f.segments {
		if s.Generation == generation && s.Seq == seq {
			return fmt.Errorf("add authentication key: block %d of generation %d was added before",
				seq, generation)
		}
	}
	f.segments = append(f.segments, newSegment(generation, seq, bits))
	if len(f.segments) > maxSegments {
		secret.Wipe(f.segments[1].pads)
		f.segments = append(f.segments[:1], f.segments[2:]...)
	}
	return f.save()
}

// save writes the pool. A failed write is final: nobody knows what is on disk,
// so nothing more is given out.
func (f *AuthFile) save() error {
	b := append([]byte(authMagic), authVersion, 0)
	b = append(b, f.points[0][:]...)
	b = append(b, f.points[1][:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.segments)))
	for _, s := range f.segments {
		b = appendSegment(b, s.AuthSegment)
		b = append(b, s.pads...)
	}
	err := secret.WriteFile(f.path, b)
	secret.Wipe(b)
	if err != nil {
		f.failed = fmt.Errorf("save authentication pool: %w", err)
	}
	return f.failed
}

func appendSegment(b []byte, s AuthSegment) []byte {
	b = binary.LittleEndian.AppendUint64(b, s.Generation)
	b = binary.LittleEndian.AppendUint64(b, s.Seq)
	b = binary.LittleEndian.AppendUint32(b, s.Pads)
	b = binary.LittleEndian.AppendUint32(b, s.Next[0])
	return binary.LittleEndian.AppendUint32(b, s.Next[1])
}

func (r *reader) segment() (s AuthSegment) {
	s.Generation, s.Seq = r.u64(), r.u64()
	s.Pads, s.Next[0], s.Next[1] = r.u32(), r.u32(), r.u32()
	if s.Pads > math.MaxUint32-padGroup || s.Pads%padGroup != 0 ||
		sender(s.Next[0]) != Alice || sender(s.Next[1]) != Bob {
		r.bad = true
	}
	return s
}

func (f *AuthFile) parse(raw []byte) error {
	r := &reader{b: raw}
	magic := string(r.take(len(authMagic)))
	version := r.take(2)
	if r.bad || magic != authMagic {
		return errors.New("not an authentication pool")
	}
	if v := binary.LittleEndian.Uint16(version); v != authVersion {
		return fmt.Errorf("schema version is %d, this program knows %d", v, authVersion)
	}
	copy(f.points[0][:], r.take(16))
	copy(f.points[1][:], r.take(16))
	for n := r.u32(); n > 0 && !r.bad; n-- {
		s := r.segment()
		pads := r.take(int(s.Pads) * padBytes)
		if !r.bad {
			f.segments = append(f.segments, authSegment{s, append([]byte(nil), pads...)})
		}
	}
	if !r.end() || len(f.segments) == 0 {
		f.clear()
		return errors.New("authentication pool is damaged")
	}
	return nil
}
