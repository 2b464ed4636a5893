package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
)

// ErrChanged is the cause of a context that ended because the site file no
// longer holds what the daemon began with.
var ErrChanged = errors.New("the site file has changed")

// while returns a context that ends, with the cause [ErrChanged], once part
// tells another sum of the site file than at first, twice in a row: a file is
// not always written in one step. A file that cannot be loaded changes
// nothing. The caller calls stop; no goroutine is left after it.
func while(ctx context.Context, file string, part func(*config.Site) [32]byte, log *slog.Logger,
) (inner context.Context, stop func()) {
	inner, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	look := func() ([32]byte, bool) {
		s, err := config.Load(file)
		if err != nil {
			return [32]byte{}, false
		}
		return part(s), true
	}
	begun, ok := look()
	go func() {
		defer close(ended)
		tick := time.NewTicker(followEvery)
		defer tick.Stop()
		seen := begun
		for {
			select {
			case <-inner.Done():
				return
			case <-tick.C:
			}
			now, good := look()
			if !good {
				continue
			}
			if !ok { // it could not be read at first
				begun, seen, ok = now, now, true
			}
			if now == seen && now != begun {
				log.Info("the site file has changed")
				cancel(ErrChanged)
				return
			}
			seen = now
		}
	}()
	return inner, func() { cancel(context.Canceled); <-ended }
}

// changed tells whether a daemon has ended because of the site file and of
// nothing else; some return the cause, some nil.
func changed(inner context.Context, err error) bool {
	return errors.Is(context.Cause(inner), ErrChanged) && (err == nil || errors.Is(err, ErrChanged))
}

// FollowLine runs a line until ctx ends. It ends too when the line leaves the
// site file: a site that is cut off must not be spoken to for one packet more,
// and the TUN device goes with it. A line that was enrolled anew, or leads
// elsewhere, begins anew with what the file says now.
func FollowLine(ctx context.Context, env Env, file string, l *config.Line) error {
	for {
		inner, stop := while(ctx, file, func(s *config.Site) [32]byte { return lineSum(s, l.ID) }, env.Log)
		err := Line(inner, env, l)
		stop()
		if !changed(inner, err) {
			return err
		}
		site, err := config.Load(file)
		if err != nil {
			return err
		}
		next, err := site.Line(l.ID)
		if err != nil {
			env.Log.Warn("line ends: the site file has it no longer", "line", l.ID)
			return nil
		}
		env.Site, l = site, next
		env.Log.Info("line begins anew with the changed site file", "line", l.ID)
	}
}

// FollowSim plays an end of a link until ctx ends, or the link leaves the site
// file; a link that was changed begins anew.
func FollowSim(ctx context.Context, env Env, file string, l *config.Link) error {
	for {
		inner, stop := while(ctx, file, func(s *config.Site) [32]byte { return linkSum(s, l.ID) }, env.Log)
		err := Sim(inner, env, l)
		stop()
		if !changed(inner, err) {
			return err
		}
		site, err := config.Load(file)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(site.Links, func(x config.Link) bool { return x.ID == l.ID && x.Simulator != nil })
		if i < 0 {
			env.Log.Warn("link ends: the site file has it no longer", "link", l.ID)
			return nil
		}
		env.Site, l = site, &site.Links[i]
		env.Log.Info("link begins anew with the changed site file", "link", l.ID)
	}
}

// linkSum is what a running end of a link cannot take over of a site file.
func linkSum(s *config.Site, id string) [32]byte {
	for i := range s.Links {
		if s.Links[i].ID == id {
			return sum(s.Links[i])
		}
	}
	return [32]byte{}
}

// lineSum is what a running line cannot take over of a site file.
func lineSum(s *config.Site, id string) [32]byte {
	for i := range s.Lines {
		if s.Lines[i].ID == id {
			return sum(s.Lines[i], s.Lines[i].PeerBundle, s.Lines[i].LinkSecret)
		}
	}
	return [32]byte{}
}

// FollowKME runs the key manager until ctx ends. When peers or links of the
// site file change, it ends
// gracefully, so that requests in flight get their keys, and begins anew with
// the new file: a site that was cut off is out, and its stock is void.
func FollowKME(ctx context.Context, env Env, file string) error {
	env.vault = newVault(env.Log)
	defer env.vault.close()
	for {
		inner, stop := while(ctx, file, kmeSum, env.Log)
		err := KME(inner, env)
		stop()
		if !changed(inner, err) {
			return err
		}
		site, err := config.Load(file)
		if err != nil {
			return err
		}
		env.Site = site
		env.Log.Info("key manager begins anew with the changed site file")
	}
}

// kmeSum is what a running key manager cannot take over of a site file.
func kmeSum(s *config.Site) [32]byte {
	if s.KME == nil {
		return [32]byte{}
	}
	return sum(struct {
		ID, Listen, PeerListen, RootKey, Credential, State string
		Lab                                                bool
		Peers                                              []config.Peer
		Links                                              []config.Link
		Trust                                              []string // paths; what they hold is followed
	}{s.KME.ID, s.KME.Listen, s.KME.PeerListen, s.KME.RootKey, s.KME.RootCredential, s.State, s.Lab, s.Peers, unlit(s.Links),
		[]string{s.KME.PeerCertificate, s.KME.PeerKey, s.KME.PeerCA, s.KME.PeerCRL}})
}

// unlit are links as a key manager sees them: what is behind the door of a
// device is no business of its.
func unlit(links []config.Link) (list []config.Link) {
	for _, l := range links {
		l.Simulator = nil
		list = append(list, l)
	}
	return list
}

// sum is over a value and the contents of files; one that is missing counts as
// empty.
func sum(v any, files ...string) [32]byte {
	h := sha256.New()
	_ = json.NewEncoder(h).Encode(v) // of strings and numbers: it cannot fail
	for _, f := range files {
		text, _ := os.ReadFile(f)
		part := sha256.Sum256(text)
		clear(text)
		h.Write(part[:])
	}
	return [32]byte(h.Sum(nil))
}
