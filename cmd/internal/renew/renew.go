// Package renew keeps a daemon's certificates young, for years, with nobody
// looking.
//
// The main type is [Keeper]: it looks at the pairs of a daemon and renews each
// at two thirds of its life, with jitter, from an [Issuer]: the authority
// itself where it lies on this machine ([Local]), else the key manager's door
// over mutual TLS ([Client], answered by [Handler]). It writes the new pair in
// one step; identity.Live.Follow and its like take it up without a restart.
//
// A caller must keep in mind that nothing here ever removes or spoils a pair
// that works: a fault, an authority that is away, or a clock that is wrong by
// hours is told and the old pair stays.
package renew

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// Errors of renewal.
var (
	// ErrClock: this machine's clock cannot be right.
	ErrClock = errors.New("clock is wrong")
	// ErrRefused: the authority said no.
	ErrRefused = errors.New("authority refuses")
	// ErrAnswer: the authority's answer is not the certificate that was asked for.
	ErrAnswer = errors.New("authority's answer is not usable")
)

// Times of the keeper.
const (
	// lookEvery is the longest time between two looks: a certificate of a day
	// is due for eight hours.
	lookEvery = 4 * time.Hour
	// retryLeast is the shortest pause after a fault; see retry.
	retryLeast = time.Minute
	// maxSkew is how far a clock may be off before it is called wrong: as much
	// as pki dates certificates back.
	maxSkew = time.Hour
)

// Issuer gives the next pair to the holder of one.
type Issuer interface {
	Renew(ctx context.Context, path string, old *pki.Pair) (*pki.Pair, error)
}

// Certificate is the state of one pair.
type Certificate struct {
	Path     string
	Subject  string
	NotAfter time.Time // zero: it could not be read
	Due      time.Time // when it will be renewed
	Fault    string    // of the last attempt; empty = none
}

// Keeper renews pairs. Its methods may be called from several goroutines.
type Keeper struct {
	paths  []string
	issuer Issuer
	log    *slog.Logger
	clock  clock

	mu    sync.Mutex
	state map[string]Certificate
}

// NewKeeper makes a keeper for pair files. A path may stand twice.
func NewKeeper(paths []string, issuer Issuer, log *slog.Logger) *Keeper {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{issuer: issuer, log: log, state: map[string]Certificate{}, clock: clock{time.Now()}}
	for _, p := range paths {
		if _, twice := k.state[p]; !twice {
			k.paths = append(k.paths, p)
			k.state[p] = k.look(p)
		}
	}
	return k
}

// Certificates tells the state of all pairs.
func (k *Keeper) Certificates() []Certificate {
	wrong := k.clock.check(time.Now())
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []Certificate
	for _, p := range k.paths {
		c := k.state[p]
		if wrong != nil {
			c.Fault = wrong.Error()
		}
		list = append(list, c)
	}
	return list
}

// Run looks after the pairs until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	for {
		next := lookEvery
		for _, p := range k.paths {
			next = min(next, k.tend(ctx, p))
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// tend looks at one pair, renews it if that is due, and returns when to look
// again.
func (k *Keeper) tend(ctx context.Context, path string) time.Duration {
	now := time.Now()
	c := k.look(path)
	if err := k.clock.check(now); err != nil {
		c.Fault = err.Error()
	} else if c.Fault == "" && !now.Before(c.Due) {
		if err := k.renew(ctx, path); err != nil {
			c.Fault = err.Error()
		} else {
			c = k.look(path)
			k.log.Info("certificate renewed", "subject", c.Subject, "until", c.NotAfter)
		}
	}
	k.mu.Lock()
	before := k.state[path].Fault
	k.state[path] = c
	k.mu.Unlock()
	if c.Fault != "" {
		if c.Fault != before { // once per reason
			k.log.Warn("certificate not renewed", "path", path, "until", c.NotAfter, "err", c.Fault)
		}
		return retry(c.NotAfter.Sub(now))
	}
	return max(time.Second, min(lookEvery, c.Due.Sub(now)))
}

// retry is the pause after a fault: the less is left, the more often.
func retry(left time.Duration) time.Duration {
	return max(retryLeast, min(lookEvery, left/20))
}

// look reads one pair.
func (k *Keeper) look(path string) Certificate {
	leaf, err := leafOf(path)
	if err != nil {
		return Certificate{Path: path, Fault: err.Error()}
	}
	c := Certificate{Path: path, Subject: leaf.Subject.CommonName, NotAfter: leaf.NotAfter, Due: Due(leaf)}
	if now := time.Now(); now.Before(leaf.NotBefore) {
		c.Fault = fmt.Sprintf("%v: it says %s, the certificate is valid from %s; set the clock, or, if it "+
			"is right now and was wrong before, quietline pki renew", ErrClock, stamp(now), stamp(leaf.NotBefore))
	}
	return c
}

// leafOf reads the certificate of a pair, or of a file without a key.
func leafOf(path string) (*x509.Certificate, error) {
	p, err := pki.LoadPair(path)
	if err == nil {
		return p.Chain[0], nil
	}
	if list, lerr := pki.ReadCertificates(path); lerr == nil {
		return list[0], nil
	}
	return nil, err
}

func (k *Keeper) renew(ctx context.Context, path string) error {
	old, err := pki.LoadPair(path)
	if _, foreign := k.issuer.(Foreign); foreign && err != nil {
		var leaf *x509.Certificate
		if leaf, err = leafOf(path); err == nil { // its key lies elsewhere
			old = &pki.Pair{Chain: []*x509.Certificate{leaf}}
		}
	}
	if err != nil {
		return err
	}
	next, err := k.issuer.Renew(ctx, path, old)
	if err != nil {
		return err
	}
	if err := sameNames(old.Chain[0], next.Chain[0]); err != nil {
		return err
	}
	if leaf, now := next.Chain[0], time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return fmt.Errorf("%w: it says %s, the new certificate is valid from %s to %s; set the clock "+
			"here or at the key manager", ErrClock, stamp(now), stamp(leaf.NotBefore), stamp(leaf.NotAfter))
	}
	return next.Save(path)
}

// sameNames refuses a certificate for somebody else.
func sameNames(old, next *x509.Certificate) error {
	if len(old.URIs) != len(next.URIs) || old.Subject.CommonName != next.Subject.CommonName ||
		len(old.DNSNames) != len(next.DNSNames) || len(old.IPAddresses) != len(next.IPAddresses) {
		return fmt.Errorf("%w: asked for %s, got %s", ErrAnswer, pki.Describe(old), pki.Describe(next))
	}
	for i := range old.URIs {
		if old.URIs[i].String() != next.URIs[i].String() {
			return fmt.Errorf("%w: asked for %s, got %s", ErrAnswer, pki.Describe(old), pki.Describe(next))
		}
	}
	return nil
}

// Due is when a certificate is renewed: at two thirds of its life and a jitter
// of up to a twelfth, so that a thousand that were made in one minute do not
// come in one minute. The jitter is the certificate's own: a restart does not
// draw another.
func Due(c *x509.Certificate) time.Time {
	life := c.NotAfter.Sub(c.NotBefore)
	sum := sha256.Sum256(c.Raw)
	part := time.Duration(binary.BigEndian.Uint16(sum[:2]))
	return c.NotBefore.Add(life*2/3 + life/12*part/(1<<16))
}

// clock compares the wall clock with the one that only runs forward.
type clock struct {
	begun time.Time // with its monotonic reading
}

// check tells a clock that was moved by hours since the daemon began.
func (c clock) check(now time.Time) error {
	return moved(c.begun.Round(0), now.Round(0), now.Sub(c.begun))
}

// moved compares two readings of the wall clock with the time that really
// passed between them.
func moved(begun, now time.Time, passed time.Duration) error {
	if by := now.Sub(begun) - passed; by.Abs() > maxSkew {
		return fmt.Errorf("%w: it was moved by %v since this daemon began; nothing is renewed; set "+
			"it right, or restart the daemon if it is right now", ErrClock, by.Round(time.Minute))
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
