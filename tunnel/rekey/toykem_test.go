package rekey

import (
	"crypto/sha256"
	"io"

	"github.com/quietline/quietline/secret"
)

// toyKEM has the form of a KEM and no security: it lets the simulator try a
// hundred thousand worlds, whose subject is the state machine. Some of the
// seeds run with the real one.
type toyKEM struct{}

func toyHash(parts ...[]byte) []byte {
	d := sha256.New()
	for _, p := range parts {
		_, _ = d.Write(p)
	}
	return d.Sum(nil)
}

func (toyKEM) sizes() (int, int) { return 32, 32 }

func (toyKEM) public(seed secret.Bytes) ([]byte, error) { return toyHash(seed.Expose()), nil }

func (toyKEM) encapsulate(rand io.Reader, public []byte) ([]byte, secret.Bytes, error) {
	coins := make([]byte, 32)
	if _, err := io.ReadFull(rand, coins); err != nil {
		return nil, secret.Bytes{}, err
	}
	return coins, secret.Own(toyHash(public, coins)), nil
}

func (toyKEM) decapsulate(seed secret.Bytes, ct []byte) (secret.Bytes, error) {
	return secret.Own(toyHash(toyHash(seed.Expose()), ct)), nil
}

// toys replaces the KEM of a machine that has not stepped yet.
func (m *Machine) toys(peerSeed secret.Bytes) {
	m.kem = toyKEM{}
	m.self = toyHash(m.cfg.StaticSeed.Expose())
	m.peer = toyHash(peerSeed.Expose())
}
