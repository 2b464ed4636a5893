package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
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
// pair in two files was not made by quietline init: it is the business of
// whoever made it, and nil is returned.
func lineKeeper(k *config.Keys, live *identity.Live, log *slog.Logger) *renew.Keeper {
	if k.Certificate != k.Key {
		return nil
	}
	return renew.NewKeeper([]string{k.Certificate},
		renew.Client{URL: k.KMEs[0], TLS: live.Client}, log)
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
