package daemon

import (
	"context"
	"sync"
	"time"
)

// againAfter is the pause before a line of a hub that broke begins anew.
const againAfter = 5 * time.Second

// FollowLines runs every line of the site in this process until ctx ends, each
// as [FollowLine] does. A line that breaks begins anew after a pause; the others
// do not notice. One that is new in the site file needs a restart. Each line has
// goroutines, memory and sockets of its own, and the kernel shares out the
// processors among their threads.
func FollowLines(ctx context.Context, env Env, file string) error {
	var lines sync.WaitGroup
	defer lines.Wait()
	for i := range env.Site.Lines {
		l := &env.Site.Lines[i]
		lines.Go(func() {
			again(ctx, env, l.ID, func() error { return FollowLine(ctx, env, file, l) })
		})
	}
	return nil
}

// again runs a line until it ends without an error or ctx ends.
func again(ctx context.Context, env Env, id string, run func() error) {
	for {
		err := run()
		if err == nil || ctx.Err() != nil {
			return
		}
		env.Log.Error("line broke and begins anew", "line", id, "after", againAfter, "err", err)
		pause := time.NewTimer(againAfter)
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
	}
}
