package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/cmd/internal/renew"
	"github.com/quietline/quietline/etsi014/identity"
)

// keep runs a keeper as a part; nil waits for the end.
func keep(k *renew.Keeper) part {
	return func(ctx context.Context) error {
		if k == nil {
			<-ctx.Done()
			return nil
		}
		k.Run(ctx)
		return nil
	}
}

// lineKeeper renews a line's certificate at the door of its key manager. A
// pair in two files was not made by quietline init: whoever made it renews it,
// and is told when.
func lineKeeper(k *config.Keys, live *identity.Live, log *slog.Logger) *renew.Keeper {
	if k.Certificate != k.Key {
		return renew.NewKeeper([]string{k.Certificate}, renew.Foreign{}, log)
	}
	return renew.NewKeeper([]string{k.Certificate},
		renew.Client{URL: k.KMEs[0], TLS: live.Client}, log)
}

// authorityOf opens the authority in whose folder the door's certificate lies;
// nil if there is none: the certificates are somebody else's to renew.
func authorityOf(k *config.KME) (*pki.Authority, error) {
	dir := filepath.Dir(k.Certificate)
	if k.Certificate != k.Key || filepath.Dir(k.PeerCertificate) != dir || k.PeerCertificate != k.PeerKey {
		return nil, nil
	}
	if _, err := os.Stat(filepath.Join(dir, "sae-ca.key")); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return pki.Open(dir)
}

// revive renews what ended while the machine was off: with the authority on
// board, a box that comes back after a year serves at once. A certificate that
// is not valid yet is left: the clock is wrong, and says so in a moment.
func revive(k *config.KME, log *slog.Logger) error {
	a, err := authorityOf(k)
	if a == nil || err != nil {
		return err
	}
	files, err := filepath.Glob(a.PairFile("*"))
	if err != nil {
		return err
	}
	for _, f := range files {
		p, err := pki.LoadPair(f)
		if err != nil {
			return err
		}
		if time.Now().Before(p.Chain[0].NotAfter) {
			continue
		}
		next, err := a.Renew(strings.TrimSuffix(filepath.Base(f), ".pem"))
		if errors.Is(err, pki.ErrRevoked) || errors.Is(err, pki.ErrForeign) {
			log.Warn("certificate has ended", "path", f, "err", err)
			continue
		} else if err != nil {
			return err
		}
		log.Warn("certificate had ended and is renewed", "path", f, "until", next.Chain[0].NotAfter)
	}
	return nil
}

// renewals renews the key manager's own certificates from the authority on
// this machine, and those of its SAEs at its door. Without an authority the
// keeper only watches, and the door stays as it is.
func renewals(k *config.KME, live *identity.Live, door http.Handler, log *slog.Logger,
) (*renew.Keeper, http.Handler, error) {
	a, err := authorityOf(k)
	paths := []string{k.Certificate, k.PeerCertificate}
	if err != nil {
		return nil, door, err
	}
	if a == nil {
		return renew.NewKeeper(paths, renew.Foreign{}, log), door, nil
	}
	h := &renew.Handler{Authority: a, Log: log, Allow: func(cs *tls.ConnectionState) error {
		_, err := live.Identify(cs)
		return err
	}}
	both := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == renew.Path {
			h.ServeHTTP(w, r)
			return
		}
		door.ServeHTTP(w, r)
	})
	own := renew.NewKeeper(paths, renew.Local{Authority: a}, log)
	return own, both, nil
}

// certificateStatus puts a keeper's state into the words of status.
func certificateStatus(k *renew.Keeper) (list []control.Certificate) {
	if k == nil {
		return nil
	}
	for _, c := range k.Certificates() {
		out := control.Certificate{File: c.Path, Subject: c.Subject, NotAfter: c.NotAfter, Due: c.Due,
			Fault: c.Fault}
		if !c.NotAfter.IsZero() {
			out.Left = known(time.Until(c.NotAfter).Seconds())
		}
		list = append(list, out)
	}
	return list
}
