package kms

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
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
	// Reread counts keys that an SAE was given again within its re-read window,
	// for the audit log.
	Reread(sae etsi014.SAEID, keys int)
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
	pool     Pool
	accounts *accounts
	mu       sync.Mutex // one Reload at a time
	terms    atomic.Pointer[terms]
}

var _ etsi014.KME = (*KME)(nil)

// terms are whom a KME serves and how. A request is judged by those it found;
// they do not change.
type terms struct {
	self    etsi014.KMEID
	saes    map[etsi014.SAEID]etsi014.KMEID
	limits  Limits
	shelves map[etsi014.SAEID]*shelf
}

// NewKME makes the KME of that ID. The map says of every SAE of the network
// which KME serves it; the caller does not change it afterwards.
func NewKME(self etsi014.KMEID, saes map[etsi014.SAEID]etsi014.KMEID, limits Limits,
	pool Pool) (*KME, error) {
	k := &KME{pool: pool, accounts: newAccounts()}
	k.terms.Store(&terms{self: self})
	if err := k.Reload(saes, limits); err != nil {
		return nil, err
	}
	return k, nil
}

// Reload takes over other SAEs and limits, all of them or nothing; requests
// under way end by the old ones. What an SAE has taken in its windows still
// counts. Keys held for a re-read window that is gone or changed are wiped.
// The map and the limits are as in [NewKME].
func (k *KME) Reload(saes map[etsi014.SAEID]etsi014.KMEID, limits Limits) error {
	if err := limits.Validate(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	old := k.terms.Load()
	for sae := range limits.Allowances {
		if at, ok := saes[sae]; !ok || at != old.self {
			return fmt.Errorf("allowance of %q: the SAE is not served by this KME", sae)
		}
	}
	limits.Allowances = maps.Clone(limits.Allowances)
	k.accounts.reload(limits.Allowances, time.Now())
	k.terms.Store(&terms{self: old.self, saes: saes, limits: limits.withDefaults(),
		shelves: reshelve(old.shelves, limits.Allowances)})
	for sae, s := range old.shelves {
		if k.terms.Load().shelves[sae] != s {
			s.close()
		}
	}
	return nil
}

// Status implements etsi014.KME.
func (k *KME) Status(ctx context.Context, who etsi014.Caller, peer etsi014.SAEID) (
	etsi014.Status, error) {
	t, err := k.terms.Load(), k.accounts.call(who.SAE)
	if err == nil {
		err = t.pair(who.SAE, peer)
	}
	if err != nil {
		return etsi014.Status{}, k.refuse(who.SAE, err)
	}
	stock, err := k.pool.Stock(ctx, Shape{who.SAE, []etsi014.SAEID{peer}, t.limits.KeySizeBits})
	if err == nil {
		stock.Keys, err = k.drawable(ctx, t, who.SAE, peer, stock.Keys)
	}
	if err != nil {
		return etsi014.Status{}, k.refuse(who.SAE, err)
	}
	ext := map[string]any{"quietline_simulated": stock.Simulated}
	if stock.Loopback {
		ext["quietline_loopback"] = true
	}
	return etsi014.Status{
		SourceKME: t.self, TargetKME: t.saes[peer], Initiator: who.SAE, Target: peer,
		KeySizeBits: t.limits.KeySizeBits, StoredKeys: stock.Keys,
		// The pool is shared by all pairs: what is stored is what can be stored.
		MaxKeys:           max(stock.Keys, t.limits.MaxKeys),
		MaxKeysPerRequest: t.limits.MaxKeys,
		MaxKeySizeBits:    t.limits.MaxKeySizeBits, MinKeySizeBits: t.limits.MinKeySizeBits,
		MaxTargets: t.limits.MaxTargets,
		Extension:  ext,
	}, nil
}

// Keys implements etsi014.KME.
func (k *KME) Keys(ctx context.Context, who etsi014.Caller, req etsi014.KeyRequest) (
	etsi014.Container, error) {
	if err := k.accounts.call(who.SAE); err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	t := k.terms.Load()
	shape, n, err := t.shape(who.SAE, req)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	keys, err := k.draw(ctx, t, shape, n)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	return etsi014.Container{Keys: keys}, nil
}

// KeysByID implements etsi014.KME.
func (k *KME) KeysByID(ctx context.Context, who etsi014.Caller, req etsi014.IDRequest) (
	etsi014.Container, error) {
	t, err := k.terms.Load(), k.accounts.call(who.SAE)
	if err == nil {
		err = t.served(who.SAE)
	}
	switch {
	case err != nil:
	case who.SAE == req.Initiator:
		err = errSameSAE
	case len(req.IDs) == 0:
		err = badRequest("no key_ID is given")
	case len(req.IDs) > t.limits.MaxKeys:
		err = badRequest("more than %d key_IDs in one request", t.limits.MaxKeys)
	}
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	keys, err := k.fetch(ctx, t, who, req)
	if err != nil {
		return etsi014.Container{}, k.refuse(who.SAE, err)
	}
	return etsi014.Container{Keys: keys}, nil
}

// served checks that the caller is. That is all a fetch checks here: whether
// there is such an initiator the pool does not tell, but whether it drew these
// keys for the caller.
func (t *terms) served(who etsi014.SAEID) error {
	if at, ok := t.saes[who]; !ok || at != t.self {
		return &etsi014.Error{Kind: etsi014.ErrDenied, Message: "the SAE is not served by this KME"}
	}
	return nil
}

var errSameSAE = badRequest("initiator and target are the same SAE")

// pair checks that the caller is served here and the other SAE is known.
func (t *terms) pair(who, other etsi014.SAEID) error {
	if err := t.served(who); err != nil {
		return err
	}
	if _, ok := t.saes[other]; !ok {
		return badRequest("the other SAE is not known here")
	}
	if who == other {
		return errSameSAE
	}
	return nil
}

// shape checks a request and fills in what it leaves to us.
func (t *terms) shape(who etsi014.SAEID, req etsi014.KeyRequest) (Shape, int, error) {
	s := Shape{Initiator: who, Targets: req.Targets, SizeBits: req.SizeBits}
	n := req.Number
	if n == 0 {
		n = 1
	}
	if s.SizeBits == 0 {
		s.SizeBits = t.limits.KeySizeBits
	}
	switch {
	case len(s.Targets) == 0:
		return s, n, badRequest("no slave SAE is named")
	case len(s.Targets) > t.limits.MaxTargets+1:
		return s, n, badRequest("more than %d additional slave SAEs", t.limits.MaxTargets)
	case len(req.Mandatory) > 0:
		return s, n, etsi014.ErrMandatory
	case n < 0 || n > t.limits.MaxKeys:
		return s, n, badRequest("number is not between 1 and %d", t.limits.MaxKeys)
	case s.SizeBits < 0 || s.SizeBits%8 != 0:
		return s, n, etsi014.ErrSize
	case s.SizeBits < t.limits.MinKeySizeBits || s.SizeBits > t.limits.MaxKeySizeBits:
		return s, n, badRequest("size is not between %d and %d bits", t.limits.MinKeySizeBits,
			t.limits.MaxKeySizeBits)
	}
	for i, target := range s.Targets {
		if err := t.pair(who, target); err != nil {
			return s, n, err
		}
		if slices.Contains(s.Targets[:i], target) {
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
