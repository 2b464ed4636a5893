package daemon

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// A line of a hub that breaks begins anew after a pause, until it ends well or
// the hub does.
func TestBrokenLineBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		env := Env{Log: slog.New(slog.DiscardHandler)}
		began := time.Now()
		runs := 0
		again(t.Context(), env, "a", func() error {
			if runs++; runs < 4 {
				return errors.New("broken")
			}
			return nil
		})
		if runs != 4 || time.Since(began) != 3*againAfter {
			t.Errorf("%d runs in %v", runs, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), againAfter/2)
		defer cancel()
		again(ctx, env, "b", func() error { runs++; return errors.New("broken") })
		if runs != 5 || ctx.Err() == nil {
			t.Errorf("%d runs, the hub has ended: %v", runs, ctx.Err())
		}
	})
}
