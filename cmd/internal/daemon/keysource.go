package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/tunnel"
)

// keySource draws a line's keys through ETSI 014 clients, one for each use: the
// SAE of the pad is another.
type keySource struct {
	client *etsi014.Client
	peer   etsi014.SAEID  // of the line's other end
	live   *identity.Live // the line's certificate
	pad    *keySource     // nil = no pad
}

// close ends idle connections.
func (s keySource) close() {
	s.client.Close()
	if s.pad != nil {
		s.pad.close()
	}
}

// of is the source of a use.
func (s keySource) of(u tunnel.Use) (keySource, error) {
	switch {
	case u != tunnel.UsePad:
		return s, nil
	case s.pad == nil:
		return s, fmt.Errorf("%w: it has no SAE for pad keys", tunnel.ErrKeyDenied)
	}
	return *s.pad, nil
}

func (s keySource) Status(ctx context.Context, u tunnel.Use) (tunnel.Stock, error) {
	s, err := s.of(u)
	if err != nil {
		return tunnel.Stock{}, err
	}
	st, err := s.client.Status(ctx, s.peer)
	simulated, _ := st.Extension["quietline_simulated"].(bool)
	return tunnel.Stock{Keys: st.StoredKeys, SizeBits: st.KeySizeBits, MaxBits: st.MaxKeySizeBits,
		MaxKeys: st.MaxKeysPerRequest, Simulated: simulated, At: time.Now()}, keyError(err)
}

func (s keySource) New(ctx context.Context, u tunnel.Use, n, bits int) ([]tunnel.Key, error) {
	s, err := s.of(u)
	if err != nil {
		return nil, err
	}
	req := etsi014.KeyRequest{Targets: []etsi014.SAEID{s.peer}, Number: n, SizeBits: bits}
	c, err := s.client.Keys(ctx, req)
	return moved(c), keyError(err)
}

func (s keySource) ByID(ctx context.Context, u tunnel.Use, ids []tunnel.KeyID) (
	[]tunnel.Key, error,
) {
	s, err := s.of(u)
	if err != nil {
		return nil, err
	}
	req := etsi014.IDRequest{Initiator: s.peer}
	for _, id := range ids {
		req.IDs = append(req.IDs, etsi014.KeyID(id))
	}
	c, err := s.client.KeysByID(ctx, req)
	return moved(c), keyError(err)
}

// moved hands the keys of a container on; their bytes change the owner.
func moved(c etsi014.Container) (keys []tunnel.Key) {
	for _, k := range c.Keys {
		keys = append(keys, tunnel.Key{ID: tunnel.KeyID(k.ID), Bits: k.Bits})
	}
	return keys
}

// keyError puts a client's error into the tunnel's words.
func keyError(err error) error {
	kind := tunnel.ErrKeyDown
	switch {
	case err == nil:
		return nil
	case errors.Is(err, etsi014.ErrEmpty):
		kind = tunnel.ErrKeyEmpty
	case errors.Is(err, etsi014.ErrUnknownKey):
		kind = tunnel.ErrKeyUnknown
	case errors.Is(err, etsi014.ErrDenied):
		kind = tunnel.ErrKeyDenied
	}
	return fmt.Errorf("%w: %w", kind, err)
}
