package kms

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// Shape is who draws for whom, and the size of the keys.
type Shape struct {
	Initiator etsi014.SAEID
	Targets   []etsi014.SAEID
	SizeBits  int // a multiple of 8
}

// Stock is what a shape could draw now.
type Stock struct {
	Keys      int
	Simulated bool // some of it came from no photons
	Loopback  bool // it is for SAEs of this KME alone, from no link
}

// Pool is what a KME draws from. Its methods may be called from several
// goroutines; errors are etsi014's sentinels or wrap them.
type Pool interface {
	// Draw takes n new keys for a shape, durably, or none. The caller clears them.
	Draw(ctx context.Context, shape Shape, n int) ([]etsi014.Key, error)
	// Fetch takes the keys of those IDs that initiator drew for target,
	// durably, all or none, in that order. The caller clears them.
	Fetch(ctx context.Context, initiator, target etsi014.SAEID, ids []etsi014.KeyID) (
		[]etsi014.Key, error)
	// Stock tells what Draw could yield. Without an initiator it tells what is
	// granted to nobody yet.
	Stock(ctx context.Context, shape Shape) (Stock, error)
	// Refused counts a request that was turned away, for the audit log.
	Refused(sae etsi014.SAEID, reason string)
}

// Limits bound requests. Zero values mean the defaults.
type Limits struct {
	KeySizeBits    int // default size; 256
	MinKeySizeBits int // 64
	MaxKeySizeBits int // 4096
	MaxKeys        int // of one request; 128
	MaxTargets     int // additional targets of one request; 4
	// Allowances of single SAEs of this KME; one that is not here has none.
	Allowances map[etsi014.SAEID]Allowance
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.KeySizeBits, 256)
	set(&l.MinKeySizeBits, 64)
	set(&l.MaxKeySizeBits, 4096)
	set(&l.MaxKeys, 128)
	set(&l.MaxTargets, 4)
	return l
}

// Validate tells what of the limits cannot be.
func (l Limits) Validate() error {
	l = l.withDefaults()
	for _, bits := range []int{l.KeySizeBits, l.MinKeySizeBits, l.MaxKeySizeBits} {
		if bits <= 0 || bits%8 != 0 {
			return fmt.Errorf("key size of %d bits is not a multiple of 8", bits)
		}
	}
	switch {
	case l.MinKeySizeBits > l.KeySizeBits || l.KeySizeBits > l.MaxKeySizeBits:
		return fmt.Errorf("default key size %d is outside %d to %d bits",
			l.KeySizeBits, l.MinKeySizeBits, l.MaxKeySizeBits)
	case l.MaxKeySizeBits > 1<<20:
		return fmt.Errorf("largest key size %d is above %d bits", l.MaxKeySizeBits, 1<<20)
	case l.MaxKeys < 1 || l.MaxKeys > 1<<16:
		return fmt.Errorf("%d keys per request is outside 1 to %d", l.MaxKeys, 1<<16)
	case l.MaxTargets < 0 || l.MaxTargets > 15:
		return fmt.Errorf("%d additional targets is outside 0 to 15", l.MaxTargets)
	}
	for sae, a := range l.Allowances {
		if err := a.Validate(); err != nil {
			return fmt.Errorf("allowance of %q: %w", sae, err)
		}
	}
	return nil
}

// KME answers what stands behind the ETSI 014 door for the SAEs of one KME. It
// is safe for concurrent use.
type KME struct {
	self     etsi014.KMEID
	saes     map[etsi014.SAEID]etsi014.KMEID
	limits   Limits
	pool     Pool
	accounts *accounts
	shelves  map[etsi014.SAEID]*shelf
}

var _ etsi014.KME = (*KME)(nil)

// NewKME makes the KME of that ID. The map says of every SAE of the network
// which KME serves it; it is not changed afterwards.
func NewKME(self etsi014.KMEID, saes map[etsi014.SAEID]etsi014.KMEID, limits Limits,
	pool Pool) (*KME, error) {
	if err := limits.Validate(); err != nil {
		return nil, err
	}
	for sae := range limits.Allowances {
		if at, ok := saes[sae]; !ok || at != self {
			return nil, fmt.Errorf("allowance of %q: the SAE is not served by this KME", sae)
		}
	}
	return &KME{self: self, saes: saes, limits: limits.withDefaults(), pool: pool,
		accounts: newAccounts(limits.Allowances, time.Now()),
		shelves:  newShelves(limits.Allowances)}, nil
}

// Status implements etsi014.KME.
func (k *KME) Status(ctx context.Context, who etsi014.Caller, peer etsi014.SAEID) (
	etsi014.Status, error) {
	err := k.accounts.call(who.SAE)
	if err == nil {
		err = k.pair(who.SAE, peer)
	}
	if err != nil {
		return etsi014.Status{}, k.refuse(who.SAE, err)
	}
	stock, err := k.pool.Stock(ctx, Shape{who.SAE, []etsi014.SAEID{peer}, k.limits.KeySizeBits})
	if err == nil {
		stock.Keys, err = k.drawable(ctx, who.SAE, peer, stock.Keys)
	}
	if err != nil {
		return etsi014.Status{}, k.refuse(who.SAE, err)
	}
	ext := map[string]any{"quietline_simulated": stock.Simulated}
	if stock.Loopback {
		ext["quietline_loopback"] = true
	}
	return etsi014.Status{
		SourceKME: k.self, TargetKME: k.saes[peer], Initiator: who.SAE, Target: peer,
		KeySizeBits: k.limits.KeySizeBits, StoredKeys: stock.Keys,
		// The pool is shared by all pairs: what is stored is what can be stored.
		MaxKeys:           max(stock.Keys, k.limits.MaxKeys),
		MaxKeysPerRequest: k.limits.MaxKeys,
		MaxKeySizeBits:    k.limits.MaxKeySizeBits, MinKeySizeBits: k.limits.MinKeySizeBits,
		MaxTargets: k.limits.MaxTargets,
		Extension:  ext,
	}, nil
}

// Keys implements etsi014.KME.
func (k *KME) Keys(ctx context.Context, who etsi014.Caller, req etsi014.KeyRequest) (
	etsi014.Container, error) {
	if err := k.accounts.call(who.SAE); err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	shape, n, err := k.shape(who.SAE, req)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	keys, err := k.draw(ctx, shape, n)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	return etsi014.Container{Keys: keys}, nil
}

// KeysByID implements etsi014.KME.
func (k *KME) KeysByID(ctx context.Context, who etsi014.Caller, req etsi014.IDRequest) (
	etsi014.Container, error) {
	err := k.accounts.call(who.SAE)
	if err == nil {
		err = k.pair(who.SAE, req.Initiator)
	}
	switch {
	case err != nil:
	case len(req.IDs) == 0:
		err = badRequest("no key_ID is given")
	case len(req.IDs) > k.limits.MaxKeys:
		err = badRequest("more than %d key_IDs in one request", k.limits.MaxKeys)
	}
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	keys, err := k.fetch(ctx, who, req)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	return etsi014.Container{Keys: keys}, nil
}

// pair checks that the caller is served here and the other SAE is known.
func (k *KME) pair(who, other etsi014.SAEID) error {
	if at, ok := k.saes[who]; !ok || at != k.self {
		return &etsi014.Error{Kind: etsi014.ErrDenied, Message: "the SAE is not served by this KME"}
	}
	if _, ok := k.saes[other]; !ok {
		return badRequest("the other SAE is not known here")
	}
	if who == other {
		return badRequest("initiator and target are the same SAE")
	}
	return nil
}

// shape checks a request and fills in what it leaves to us.
func (k *KME) shape(who etsi014.SAEID, req etsi014.KeyRequest) (Shape, int, error) {
	s := Shape{Initiator: who, Targets: req.Targets, SizeBits: req.SizeBits}
	n := req.Number
	if n == 0 {
		n = 1
	}
	if s.SizeBits == 0 {
		s.SizeBits = k.limits.KeySizeBits
	}
	switch {
	case len(s.Targets) == 0:
		return s, n, badRequest("no slave SAE is named")
	case len(s.Targets) > k.limits.MaxTargets+1:
		return s, n, badRequest("more than %d additional slave SAEs", k.limits.MaxTargets)
	case len(req.Mandatory) > 0:
		return s, n, etsi014.ErrMandatory
	case n < 0 || n > k.limits.MaxKeys:
		return s, n, badRequest("number is not between 1 and %d", k.limits.MaxKeys)
	case s.SizeBits < 0 || s.SizeBits%8 != 0:
		return s, n, etsi014.ErrSize
	case s.SizeBits < k.limits.MinKeySizeBits || s.SizeBits > k.limits.MaxKeySizeBits:
		return s, n, badRequest("size is not between %d and %d bits", k.limits.MinKeySizeBits,
			k.limits.MaxKeySizeBits)
	}
	for i, t := range s.Targets {
		if err := k.pair(who, t); err != nil {
			return s, n, err
		}
		if slices.Contains(s.Targets[:i], t) {
			return s, n, badRequest("a slave SAE is named twice")
		}
	}
	return s, n, nil
}

// refuse counts a turned-away request. A shortage is no refusal.
func (k *KME) refuse(who etsi014.SAEID, err error) error {
	if reason := refusalReason(err); reason != "" {
		k.pool.Refused(who, reason)
	}
	return err
}

func badRequest(format string, args ...any) error {
	return &etsi014.Error{Kind: etsi014.ErrRequest, Message: fmt.Sprintf(format, args...)}
}

// PeerStats is the state of one peer.
type PeerStats struct {
	ID        etsi014.KMEID
	Connected bool
	Up        bool   // a session stands
	Reason    string // why not
	RTT       time.Duration
}

// LinkStats is the state of one link.
type LinkStats struct {
	ID           LinkID
	Peer         etsi014.KMEID
	Simulated    bool // the device sends no photons
	DeviceUp     bool
	DeviceReason string // why not
	QBER         float64
	SecretBPS    float64
	Ledger       Ledger
	DrawableBits uint64         // this side's own
	Segments     map[string]int // live ones by state
}

// Stats is what a running KME tells of itself.
type Stats struct {
	KME         etsi014.KMEID
	Incarnation uint64
	Position    Position // of the audit log
	Peers       []PeerStats
	Links       []LinkStats
	KeysDrawn   uint64 // since the start
	KeysFetched uint64
	Refused     uint64
	Alarms      []string // newest last, at most 32
}
