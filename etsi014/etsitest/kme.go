package etsitest

import (
	"context"
	"crypto/rand"
	"slices"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// KME is one key manager for both ends, in memory, with the standard's rules:
// a key once to its initiator and once to each target. Safe for concurrent use.
type KME struct {
	Stock int           // keys left to draw, of any size
	Fail  func() error  // asked before each call; nil = never fails
	Lose  func() error  // asked after keys were taken: failed, but taken
	Retry time.Duration // told with ErrEmpty

	mu   sync.Mutex
	keys map[etsi014.KeyID]*drawn
}

type drawn struct {
	by   etsi014.SAEID
	open []etsi014.SAEID // targets that have not fetched yet
	all  []etsi014.SAEID
	bits secret.Bytes
}

var _ etsi014.KME = (*KME)(nil)

// DefaultBits is the size of a key where the request names none.
const DefaultBits = 256

// maxKeys is how many keys one request may draw.
const maxKeys = 128

// MaxTargets is how many additional targets one request may name.
const MaxTargets = 3

func (k *KME) fail(ask func() error) error {
	if ask == nil {
		return nil
	}
	return ask()
}

// Status implements [etsi014.KME].
func (k *KME) Status(
	_ context.Context, who etsi014.Caller, peer etsi014.SAEID,
) (etsi014.Status, error) {
	if err := k.fail(k.Fail); err != nil {
		return etsi014.Status{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return etsi014.Status{
		SourceKME: "kme-tokyo", TargetKME: "kme-kochi", Initiator: who.SAE, Target: peer,
		KeySizeBits: DefaultBits, StoredKeys: k.Stock, MaxKeys: 100000, MaxKeysPerRequest: maxKeys,
		MaxKeySizeBits: 4096, MinKeySizeBits: 64, MaxTargets: MaxTargets,
	}, nil
}

// Keys implements [etsi014.KME].
func (k *KME) Keys(
	_ context.Context, who etsi014.Caller, req etsi014.KeyRequest,
) (etsi014.Container, error) {
	if err := k.fail(k.Fail); err != nil {
		return etsi014.Container{}, err
	}
	if len(req.Mandatory) > 0 {
		return etsi014.Container{}, etsi014.ErrMandatory
	}
	if len(req.Targets)-1 > MaxTargets {
		return etsi014.Container{}, &etsi014.Error{
			Kind: etsi014.ErrRequest, Message: "additional_slave_SAE_IDs names too many SAEs",
		}
	}
	if req.Number > maxKeys {
		return etsi014.Container{}, &etsi014.Error{
			Kind: etsi014.ErrRequest, Message: "number is above max_key_per_request",
		}
	}
	bits := req.SizeBits
	if bits == 0 {
		bits = DefaultBits
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	n := max(req.Number, 1)
	if n > k.Stock {
		return etsi014.Container{}, &etsi014.Error{
			Kind: etsi014.ErrEmpty, MissingBits: (n - k.Stock) * bits, RetryAfter: k.Retry,
		}
	}
	k.Stock -= n
	var c etsi014.Container
	for range n {
		c.Keys = append(c.Keys, k.draw(who.SAE, req.Targets, bits))
	}
	if err := k.fail(k.Lose); err != nil {
		c.Clear()
		return etsi014.Container{}, err
	}
	return c, nil
}

func (k *KME) draw(by etsi014.SAEID, targets []etsi014.SAEID, bits int) etsi014.Key {
	var id etsi014.KeyID
	_, _ = rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // RFC 9562 version 4
	b := secret.New(bits / 8)
	_, _ = rand.Read(b.Expose())
	if k.keys == nil {
		k.keys = make(map[etsi014.KeyID]*drawn)
	}
	k.keys[id] = &drawn{
		by: by, open: slices.Clone(targets), all: slices.Clone(targets),
		bits: secret.Copy(b.Expose()),
	}
	return etsi014.Key{ID: id, Bits: b}
}

// KeysByID implements [etsi014.KME].
func (k *KME) KeysByID(
	_ context.Context, who etsi014.Caller, req etsi014.IDRequest,
) (etsi014.Container, error) {
	if err := k.fail(k.Fail); err != nil {
		return etsi014.Container{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range req.IDs {
		d := k.keys[id]
		switch {
		case d == nil:
			return etsi014.Container{}, etsi014.ErrUnknownKey
		case d.by != req.Initiator || !slices.Contains(d.all, who.SAE):
			return etsi014.Container{}, etsi014.ErrDenied
		case !slices.Contains(d.open, who.SAE):
			return etsi014.Container{}, etsi014.ErrUnknownKey
		}
	}
	var c etsi014.Container
	for _, id := range req.IDs {
		d := k.keys[id]
		c.Keys = append(c.Keys, etsi014.Key{ID: id, Bits: secret.Copy(d.bits.Expose())})
		d.open = slices.DeleteFunc(d.open, func(s etsi014.SAEID) bool { return s == who.SAE })
		if len(d.open) == 0 {
			d.bits.Clear()
		}
	}
	if err := k.fail(k.Lose); err != nil {
		c.Clear()
		return etsi014.Container{}, err
	}
	return c, nil
}

// Left is the stock now.
func (k *KME) Left() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.Stock
}
