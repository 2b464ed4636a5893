package identity

import (
	"context"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"
)

// Follow reloads when one of the files changes, until ctx ends; the caller
// runs it in a goroutine of its own. It looks every so often, because a file
// may be replaced on a file system that tells nobody, and it waits until the
// files were the same twice in a row, because a pair of certificate and key is
// not written in one step. A load that fails is logged and tried again after
// the next change; the old state stays. every of 0 means 5 s.
func (l *Live) Follow(ctx context.Context, every time.Duration, log *slog.Logger) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if every <= 0 {
		every = 5 * time.Second
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	loaded := l.now.Load()
	seen, done := look(loaded.cfg), loaded.seen // done: what the last load, good or bad, found
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := l.now.Load()
		if now != loaded { // somebody called Reload: its files are the ones to watch
			loaded, seen, done = now, look(now.cfg), now.seen
			continue
		}
		before := seen
		seen = look(now.cfg)
		if !same(seen, before) || same(seen, done) {
			continue
		}
		done = seen
		next, err := load(now.cfg)
		if err != nil {
			log.Warn("changed certificates not loaded", "err", err)
			continue
		}
		if l.now.CompareAndSwap(now, next) { // else a Reload was faster and is right
			loaded = next
			l.sweep()
			log.Info("changed certificates loaded")
		}
	}
}

// files names all that a configuration reads.
func (cfg Config) files() []string {
	list := slices.Concat([]string{cfg.CA}, cfg.CRLs, cfg.DenyFiles)
	for _, p := range cfg.Pairs {
		list = append(list, p.Cert, p.Key)
	}
	return list
}

// look notes the state of all files; one that is missing is nil.
func look(cfg Config) map[string]fs.FileInfo {
	found := make(map[string]fs.FileInfo)
	for _, path := range cfg.files() {
		info, err := os.Stat(path)
		if err != nil {
			info = nil
		}
		found[path] = info
	}
	return found
}

func same(a, b map[string]fs.FileInfo) bool {
	return maps.EqualFunc(a, b, func(x, y fs.FileInfo) bool {
		if x == nil || y == nil {
			return x == nil && y == nil
		}
		return os.SameFile(x, y) && x.Size() == y.Size() && x.ModTime().Equal(y.ModTime())
	})
}

// clone keeps a configuration from changes of the caller's slices.
func (cfg Config) clone() Config {
	cfg.Pairs, cfg.Rules = slices.Clone(cfg.Pairs), slices.Clone(cfg.Rules)
	cfg.CRLs, cfg.Deny = slices.Clone(cfg.CRLs), slices.Clone(cfg.Deny)
	cfg.DenyFiles = slices.Clone(cfg.DenyFiles)
	return cfg
}
