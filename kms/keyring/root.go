package keyring

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

// MinPassphrase is the shortest passphrase that a root key is put under,
// characters: NIST SP 800-63B-4 section 3.1.1.2, a password that is the only
// factor.
const MinPassphrase = 15

// Parameters of Argon2id: the second recommended option of RFC 9106 section 4.
// The file names its own, so that later ones may be stronger; weaker ones, or
// such as would take a machine down, are refused.
const (
	passes, maxPasses    = 3, 64
	memoryKiB, maxMemory = 64 << 10, 4 << 20
	lanes, maxLanes      = 4, 64
	saltSize             = 16
	sealedHead           = 8 + 4 + 4 + 4 + saltSize + nonceSize
	sealedSize           = sealedHead + KeySize + TagSize + sha256.Size
	largestRoot          = 4096 // of any root key file, to come ones too
)

var rootMagic = magic{'Q', 'L', 'r', 'o', 'o', 't', '0', '1'}

// NewRootKey makes a root key file of 32 random bytes with mode 0600. It does
// not replace a file.
func NewRootKey(path string) error {
	return newRootFile(path, func(root secret.Bytes) ([]byte, error) {
		return bytes.Clone(root.Expose()), nil
	})
}

// NewSealedRoot makes a root key file under a passphrase, see [SealedRoot], with
// mode 0600. It does not replace a file. It takes about half a second and 64 MiB
// of memory, which the caller should get rid of by ending the process.
func NewSealedRoot(path string, passphrase secret.Bytes) error {
	if n := utf8.RuneCount(passphrase.Expose()); n < MinPassphrase {
		return fmt.Errorf("make root key %s: %w: it has %d characters, at least %d are needed", path,
			kms.ErrPassphrase, n, MinPassphrase)
	}
	return newRootFile(path, func(root secret.Bytes) ([]byte, error) {
		b := append(make([]byte, 0, sealedSize), rootMagic[:]...)
		b = binary.BigEndian.AppendUint32(b, passes)
		b = binary.BigEndian.AppendUint32(b, memoryKiB)
		b = binary.BigEndian.AppendUint32(b, lanes)
		b = b[:sealedHead]
		if _, err := rand.Read(b[sealedHead-saltSize-nonceSize:]); err != nil {
			return nil, err
		}
		s := SealedRoot{data: b}
		key := s.Key(passphrase)
		defer key.Clear()
		a, err := newAEAD(key.Expose())
		if err != nil {
			return nil, err
		}
		defer a.wipe()
		b = a.Seal(b, b[sealedHead-nonceSize:], root.Expose(), b[:sealedHead-nonceSize])
		sum := sha256.Sum256(b)
		return append(b, sum[:]...), nil
	})
}

func newRootFile(path string, form func(root secret.Bytes) ([]byte, error)) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return fmt.Errorf("make root key %s: %w", path, err)
	}
	root, err := newLockedKey()
	if err != nil {
		return fmt.Errorf("make root key: %w", err)
	}
	defer root.Clear()
	data, err := form(root)
	if err != nil {
		return fmt.Errorf("make root key: %w", err)
	}
	defer secret.Wipe(data)
	return secret.WriteFile(path, data)
}

// ReadRootKey reads a root key file into locked memory. The caller clears the
// key. One under a passphrase is kms.ErrSealed: see [ReadSealedRoot].
func ReadRootKey(path string) (secret.Bytes, error) {
	data, err := secret.ReadFile(path, largestRoot)
	if err != nil {
		return data, fmt.Errorf("read root key: %w", err)
	}
	defer data.Clear()
	if bytes.HasPrefix(data.Expose(), rootMagic[:]) && data.Len() != KeySize {
		return secret.Bytes{}, fmt.Errorf("read root key %s: %w", path, kms.ErrSealed)
	}
	if n := data.Len(); n != KeySize {
		return secret.Bytes{}, fmt.Errorf("read root key %s: %d bytes, want %d", path, n, KeySize)
	}
	key, err := locked(data)
	if err != nil {
		return key, fmt.Errorf("read root key: %w", err)
	}
	return key, nil
}

// SealedRoot is a root key file under a passphrase. It holds nothing secret:
//
//	magic (8) "QLroot01" || passes (4) || memory in KiB (4) || lanes (4) || salt (16)
//	|| nonce (12) || sealed root key (48) || SHA-256 of all before (32)
//
// The root key is 32 random bytes, sealed with AES-256-GCM under what Argon2id
// (RFC 9106) makes of passphrase and salt; what stands before the nonce is the
// associated data. Numbers are big-endian.
type SealedRoot struct{ data []byte }

// ReadSealedRoot reads such a file. Errors: kms.ErrCorrupt, secret.ErrExposed,
// or the file system's.
func ReadSealedRoot(path string) (*SealedRoot, error) {
	data, err := secret.ReadFile(path, largestRoot)
	if err != nil {
		return nil, fmt.Errorf("read root key: %w", err)
	}
	s, err := parseSealedRoot(data.Expose())
	if err != nil {
		return nil, fmt.Errorf("read root key %s: %w", path, err)
	}
	return s, nil
}

func parseSealedRoot(b []byte) (*SealedRoot, error) {
	if len(b) != sealedSize || !bytes.HasPrefix(b, rootMagic[:]) {
		return nil, fmt.Errorf("%w: it is no root key under a passphrase", kms.ErrCorrupt)
	}
	if sum := sha256.Sum256(b[:sealedSize-sha256.Size]); !bytes.HasSuffix(b, sum[:]) {
		return nil, fmt.Errorf("%w: the root key file; put a copy of it back", kms.ErrCorrupt)
	}
	s := &SealedRoot{data: b}
	if t, m, p := s.costs(); t < passes || t > maxPasses || m < memoryKiB || m > maxMemory ||
		p < 1 || p > maxLanes {
		return nil, fmt.Errorf("%w: its Argon2id costs %d, %d KiB, %d are weaker than RFC 9106 "+
			"or more than this program does", kms.ErrCorrupt, t, m, p)
	}
	return s, nil
}

func (s *SealedRoot) costs() (t, m, p uint32) {
	return binary.BigEndian.Uint32(s.data[8:]), binary.BigEndian.Uint32(s.data[12:]),
		binary.BigEndian.Uint32(s.data[16:])
}

// Key makes of a passphrase the key that opens the root key. It takes the time
// and the memory that the file says; this memory lets the key be computed
// again, so it is best done in a process that ends soon. Both stay the caller's
// to clear.
func (s *SealedRoot) Key(passphrase secret.Bytes) secret.Bytes {
	t, m, p := s.costs()
	salt := s.data[sealedHead-nonceSize-saltSize : sealedHead-nonceSize]
	return secret.Own(argon2.IDKey(passphrase.Expose(), salt, t, m, uint8(p), KeySize))
}

// Open opens the root key, into locked memory, with the key of the passphrase.
// A wrong one is kms.ErrPassphrase. The caller clears both.
func (s *SealedRoot) Open(key secret.Bytes) (secret.Bytes, error) {
	if key.Len() != KeySize {
		return secret.Bytes{}, fmt.Errorf("open root key: %w", kms.ErrPassphrase)
	}
	a, err := newAEAD(key.Expose())
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("open root key: %w", err)
	}
	defer a.wipe()
	root, err := secret.NewLocked(KeySize)
	if err != nil {
		return root, fmt.Errorf("open root key: %w", err)
	}
	if _, err := a.Open(root.Expose()[:0], s.data[sealedHead-nonceSize:sealedHead],
		s.data[sealedHead:sealedSize-sha256.Size], s.data[:sealedHead-nonceSize]); err != nil {
		root.Clear()
		return secret.Bytes{}, fmt.Errorf("open root key: %w", kms.ErrPassphrase)
	}
	return root, nil
}
