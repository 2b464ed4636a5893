package kms

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// Allowance is what one SAE of this KME may take, so that one hungry client
// cannot starve a line. The zero value bounds and reserves nothing.
type Allowance struct {
	// Calls and Keys are rates a second: of calls of any kind, and of new keys.
	// Each bucket holds one second's worth; 0 = no bound. A request for more
	// keys than the bucket holds passes when it is full, and is paid off after.
	Calls, Keys float64
	// Share is the largest part, 0 to 1, of the stock with one peer KME that
	// the SAE may draw in a Window; 0 = no bound. The stock is counted as if
	// the SAE had drawn nothing in this window. Window is 0 = 1 min.
	Share  float64
	Window time.Duration
	// Reserve is how many keys of the default size others leave in the stock
	// with each peer KME, at this KME.
	Reserve int
	// Reread is the window, at most 1 min, in which the SAE may fetch a key
	// once more: the same bytes for the same certificate. Until it ends they
	// are held in memory. 0 = one answer, strictly.
	Reread time.Duration
}

// Bounds of an allowance.
const (
	shareWindow = time.Minute
	windowMost  = 24 * time.Hour
	reserveMost = 1 << 20 // as many keys as the store is measured with
)

// Validate tells what of the allowance cannot be.
func (a Allowance) Validate() error {
	switch {
	case !(a.Calls >= 0) || math.IsInf(a.Calls, 1):
		return fmt.Errorf("%v calls a second is not a rate", a.Calls)
	case !(a.Keys >= 0) || math.IsInf(a.Keys, 1):
		return fmt.Errorf("%v keys a second is not a rate", a.Keys)
	case !(a.Share >= 0 && a.Share <= 1):
		return fmt.Errorf("share %v is outside 0 to 1", a.Share)
	case a.Window < 0 || a.Window > windowMost:
		return fmt.Errorf("window %v is outside 0 to %v", a.Window, windowMost)
	case a.Reserve < 0 || a.Reserve > reserveMost:
		return fmt.Errorf("reserve of %d keys is outside 0 to %d", a.Reserve, reserveMost)
	case a.Reread < 0 || a.Reread > rereadMost:
		return fmt.Errorf("re-read window %v is outside 0 to %v", a.Reread, rereadMost)
	}
	return nil
}

// bucket holds tokens that come at a rate, one second's worth at most and room
// for one. It may be in debt.
type bucket struct {
	rate, tokens float64
	at           time.Time
}

// set gives the bucket another rate. One that had none begins full.
func (b *bucket) set(rate, before float64, now time.Time) {
	if before == 0 {
		b.tokens, b.at = max(rate, 1), now
	}
	b.rate = rate
}

// take takes n tokens, or tells how long to wait for them. More than the
// bucket holds are taken from a full one.
func (b *bucket) take(n float64, now time.Time) time.Duration {
	if b.rate == 0 {
		return 0
	}
	most := max(b.rate, 1)
	b.tokens = min(most, b.tokens+now.Sub(b.at).Seconds()*b.rate)
	b.at = now
	if lack := min(n, most) - b.tokens; lack > 1e-9 { // what sums of fractions lose
		// Longer than a duration can say is longer than anybody waits.
		return time.Duration(min(lack/b.rate, windowMost.Seconds()) * float64(time.Second))
	}
	b.tokens -= n
	return 0
}

// account is what an SAE with an allowance has taken.
type account struct {
	Allowance
	calls, keys bucket
	drawn       map[etsi014.KMEID]*drawn
}

// drawn is what an SAE took of one stock in a window, default-size keys.
type drawn struct {
	ends time.Time
	keys int
}

// accounts are those of all SAEs with an allowance, and what is being drawn.
type accounts struct {
	mu       sync.Mutex
	of       map[etsi014.SAEID]*account
	reserved int                   // by all together
	pending  map[etsi014.KMEID]int // draws in flight, default-size keys
}

func newAccounts() *accounts {
	return &accounts{of: map[etsi014.SAEID]*account{}, pending: map[etsi014.KMEID]int{}}
}

// reload takes other allowances over. Who had one keeps what it has taken.
func (a *accounts) reload(allowances map[etsi014.SAEID]Allowance, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.of
	a.of, a.reserved = make(map[etsi014.SAEID]*account, len(allowances)), 0
	for sae, al := range allowances {
		if al.Window == 0 {
			al.Window = shareWindow
		}
		acc := old[sae]
		if acc == nil {
			acc = &account{drawn: map[etsi014.KMEID]*drawn{}}
		}
		acc.calls.set(al.Calls, acc.Calls, now)
		acc.keys.set(al.Keys, acc.Keys, now)
		acc.Allowance = al
		a.of[sae] = acc
		a.reserved += al.Reserve
	}
}

// reserve is what others than an SAE have reserved.
func (a *accounts) reserve(who etsi014.SAEID) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if acc := a.of[who]; acc != nil {
		return a.reserved - acc.Reserve
	}
	return a.reserved
}

// call counts one call of an SAE, or refuses it.
func (a *accounts) call(who etsi014.SAEID) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	acc := a.of[who]
	if acc == nil {
		return nil
	}
	if wait := acc.calls.take(1, time.Now()); wait > 0 {
		return &etsi014.Error{Kind: etsi014.ErrDown, RetryAfter: wait, Cause: ErrRate,
			Message: "too many requests of this SAE in a second"}
	}
	return nil
}

// draw is one request for new keys, from its booking to its end.
type draw struct {
	who  etsi014.SAEID
	at   etsi014.KMEID // whose stock
	keys int
	bits int // of each
	cost int // default-size keys that it may use up
	unit int // bits of a default-size key

	// As booked: others' reserve, what all draws in flight may use up, this
	// one with them, and what the SAE has drawn before.
	reserve, pending, before int
	share                    float64
	ends                     time.Time
}

// book counts a draw before its stock is looked at, so that of two at a time
// each sees the other.
func (a *accounts) book(d *draw) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	now, acc := time.Now(), a.of[d.who]
	d.reserve = a.reserved
	if acc != nil {
		d.reserve -= acc.Reserve
		if wait := acc.keys.take(float64(d.keys), now); wait > 0 {
			lack := min(int(math.Ceil(wait.Seconds()*acc.keys.rate)), d.keys)
			return &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: wait, Cause: ErrRate,
				MissingBits: lack * d.bits, Message: "too many keys of this SAE in a second"}
		}
	}
	if acc != nil && acc.Share > 0 {
		t := acc.drawn[d.at]
		if t == nil {
			t = &drawn{}
			acc.drawn[d.at] = t
		}
		if !now.Before(t.ends) {
			*t = drawn{ends: now.Add(acc.Window)}
		}
		d.share, d.before, d.ends = acc.Share, t.keys, t.ends
		t.keys += d.cost
	}
	a.pending[d.at] += d.cost
	d.pending = a.pending[d.at]
	return nil
}

// end closes a draw. What surely was not drawn is given back; a call that was
// cut short may have drawn, or else who hangs up in time would draw for free.
func (a *accounts) end(d *draw, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending[d.at] -= d.cost
	acc := a.of[d.who]
	if acc == nil || err == nil || !errors.Is(err, etsi014.ErrEmpty) && refusalReason(err) == "" {
		return
	}
	acc.keys.tokens += float64(d.keys)
	if t := acc.drawn[d.at]; t != nil && t.ends.Equal(d.ends) {
		t.keys -= d.cost
	}
}

// bounded tells whether the draw needs a look at the stock.
func (d *draw) bounded() bool { return d.reserve > 0 || d.share > 0 }

// spare is how much of what is granted to nobody draws may use up so that a
// reserve stands after them. The pool grants ahead of demand, to who has drawn,
// up to a quarter of what it can draw (kms/peer, rule 6): that quarter must not
// come out of the reserve either.
func spare(free, reserve int) int { return free - (free+3)/4 - reserve }

// judge holds the draw against what is granted to nobody yet, default-size
// keys.
func (d *draw) judge(free int) error {
	if lack := d.pending - spare(free, d.reserve); d.reserve > 0 && lack > 0 {
		return &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: time.Second, Cause: ErrReserve,
			MissingBits: min(lack, d.cost) * d.unit,
			Message:     "what is left is reserved for other SAEs"}
	}
	stock := free - (d.pending - d.cost) + d.before
	if lack := float64(d.before+d.cost) - d.share*float64(stock); d.share > 0 && lack > 0 {
		return &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: time.Until(d.ends),
			Cause: ErrQuota, MissingBits: min(int(math.Ceil(lack)), d.cost) * d.unit,
			Message: "the share of this SAE is drawn"}
	}
	return nil
}

// free is how many default-size keys the pool has granted to nobody.
func (k *KME) free(ctx context.Context, t *terms, targets []etsi014.SAEID) (int, error) {
	stock, err := k.pool.Stock(ctx, Shape{Targets: targets, SizeBits: t.limits.KeySizeBits})
	return stock.Keys, err
}

// draw takes n keys from the pool if the caller's allowance and the reserves
// of the others let it.
func (k *KME) draw(ctx context.Context, t *terms, shape Shape, n int) (keys []etsi014.Key,
	err error) {
	unit := KeySlots(t.limits.KeySizeBits, slotBytes)
	d := &draw{who: shape.Initiator, at: t.elsewhere(shape.Targets), keys: n,
		bits: shape.SizeBits, unit: t.limits.KeySizeBits,
		cost: (n*KeySlots(shape.SizeBits, slotBytes) + unit - 1) / unit}
	if err := k.accounts.book(d); err != nil {
		return nil, err
	}
	defer func() { k.accounts.end(d, err) }()
	if d.bounded() {
		free, err := k.free(ctx, t, shape.Targets)
		if err != nil {
			return nil, err
		}
		if err := d.judge(free); err != nil {
			return nil, err
		}
	}
	return k.pool.Draw(ctx, shape, n)
}

// drawable is how many of stock default-size keys are not reserved for others.
func (k *KME) drawable(ctx context.Context, t *terms, who, target etsi014.SAEID, stock int) (
	int, error) {
	reserve := k.accounts.reserve(who)
	if reserve == 0 {
		return stock, nil
	}
	free, err := k.free(ctx, t, []etsi014.SAEID{target})
	return max(0, min(stock, spare(free, reserve))), err
}

// elsewhere is the KME that serves the targets we do not, or we ourselves if
// there is none; the pool refuses more than one.
func (t *terms) elsewhere(targets []etsi014.SAEID) etsi014.KMEID {
	i := slices.IndexFunc(targets, func(s etsi014.SAEID) bool { return t.saes[s] != t.self })
	if i < 0 {
		return t.self
	}
	return t.saes[targets[i]]
}
