package daemon

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/hw/socket"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/simulator"
)

// Sim plays one end of a simulated link until ctx ends.
func Sim(ctx context.Context, env Env, link *config.Link) error {
	if err := openState(env.Site.State); err != nil {
		return err
	}
	s := link.Simulator
	var end *simulator.End // set before the door answers
	var cut atomic.Bool
	door := control.Door{
		Status: func() control.Status { return simStatus(s, end.Stats(), cut.Load()) },
		Fibre: func(up bool) error {
			cut.Store(!up)
			end.CutFibre(!up)
			return nil
		},
	}
	if s.Role == "alice" {
		door.Eve = func(fraction float64) error { return end.SetEve(fraction) }
	}
	// The control socket's lock comes first: what follows takes over sockets
	// that a dead daemon left.
	parts, closeDoors, err := env.doors(link.ID, s.Control, s.Metrics, door)
	if err != nil {
		return err
	}
	var stack closers
	stack.add(closeDoors)
	defer stack.close()
	if end, err = openEnd(env, link, &stack); err != nil {
		return err
	}
	_, path := config.Network(link.Driver)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("open driver socket: %w", err)
	}
	listener, err := socket.Listen(path)
	if err != nil {
		return fmt.Errorf("open driver socket: %w", err)
	}
	stack.add(func() { _ = listener.Close() })
	env.Log.Warn("simulated link, its keys protect nothing", "link", link.ID)
	return together(ctx, append(parts, end.Run, func(ctx context.Context) error {
		return socket.Serve(ctx, listener, end)
	})...)
}

// openEnd makes the end of the link; what it opens goes on the stack.
func openEnd(env Env, link *config.Link, stack *closers) (*simulator.End, error) {
	s := link.Simulator
	dir := filepath.Join(env.Site.State, "sim-"+link.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	preset, err := simulator.PresetByName(s.Preset)
	if err != nil {
		return nil, err
	}
	pool := filepath.Join(dir, poolOf(s.AuthSeed))
	auth, err := openAuth(pool, s.AuthSeed)
	if err != nil {
		return nil, err
	}
	stack.add(func() { _ = auth.Close() })
	if err := dropPools(dir, pool); err != nil {
		return nil, err
	}
	fibre, err := openChannel(s.Fibre, stack)
	if err != nil {
		return nil, fmt.Errorf("open fibre: %w", err)
	}
	classical, err := openChannel(s.Classical, stack)
	if err != nil {
		return nil, fmt.Errorf("open classical channel: %w", err)
	}
	role := distill.Alice
	if s.Role == "bob" {
		role = distill.Bob
	}
	return simulator.New(simulator.Config{Role: role, Link: link.ID, Preset: preset, Fibre: fibre,
		Classical: classical, Auth: auth, StateDir: dir, Eve: s.Eve, Log: env.Log})
}

// poolOf names the pool of a seed: enrolment gives each seed a name of its own,
// auth-NUMBER.seed, so that a link that is enrolled once more has another pool.
func poolOf(seed string) string {
	name := strings.TrimSuffix(filepath.Base(seed), ".seed")
	if strings.HasPrefix(name, "auth-") {
		return name
	}
	return "auth"
}

// dropPools removes the pools of seeds that the link had before.
func dropPools(dir, pool string) error {
	old, err := filepath.Glob(filepath.Join(dir, "auth*"))
	if err != nil {
		return fmt.Errorf("remove old authentication key: %w", err)
	}
	for _, path := range old {
		if path == pool || path == pool+".lock" {
			continue
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove old authentication key: %w", err)
		}
	}
	return secret.SyncDir(dir)
}

// maxSeed bounds a seed file, bytes.
const maxSeed = 1 << 20

// ErrSeed: a new authentication seed lies beside a pool made of another one.
var ErrSeed = errors.New("authentication seed is not the one in use")

// openAuth opens the pool of authentication key. The first time it makes the
// pool of the seed. A seed that became a pool is removed: if it started twice,
// its pads would be used twice.
func openAuth(pool, seedPath string) (_ *distill.AuthFile, err error) {
	seed, err := secret.ReadFile(seedPath, maxSeed)
	defer seed.Clear()
	haveSeed := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read authentication seed: %w", err)
	}
	if _, serr := os.Stat(pool); errors.Is(serr, fs.ErrNotExist) {
		if !haveSeed {
			return nil, fmt.Errorf("read authentication seed: %w", err)
		}
		if err := distill.CreateAuthFile(pool, seed.Expose()); err != nil {
			return nil, err
		}
	}
	auth, err := distill.OpenAuthFile(pool)
	if err != nil || !haveSeed {
		return auth, err
	}
	if err := dropSeed(auth, pool, seedPath, seed); err != nil {
		_ = auth.Close()
		return nil, err
	}
	return auth, nil
}

// dropSeed removes the seed if it is the one that the pool was made of. The
// hash points are its first 32 bytes.
func dropSeed(auth *distill.AuthFile, pool, seedPath string, seed secret.Bytes) error {
	alice, bob := auth.Point(distill.Alice), auth.Point(distill.Bob)
	points := append(alice[:], bob[:]...)
	if b := seed.Expose(); len(b) < len(points) ||
		subtle.ConstantTimeCompare(points, b[:len(points)]) != 1 {
		return fmt.Errorf("%w: remove %s to go on, or, at both ends, %s to begin with it",
			ErrSeed, seedPath, pool)
	}
	if err := os.Remove(seedPath); err != nil {
		return fmt.Errorf("remove authentication seed: %w", err)
	}
	return secret.SyncDir(filepath.Dir(seedPath))
}

// openChannel listens or will dial, as the site file says.
func openChannel(c config.Channel, stack *closers) (simulator.Channel, error) {
	if c.Connect != "" {
		return simulator.Dial(simAddress(c.Connect)), nil
	}
	l, err := simulator.Listen(simAddress(c.Listen))
	if err != nil {
		return nil, err
	}
	stack.add(func() { _ = l.Close() })
	return l, nil
}

// simAddress writes an address of the site file as the simulator reads it.
func simAddress(address string) string {
	if network, addr := config.Network(address); network == "unix" {
		return "unix:" + addr
	}
	return address
}

// simStatus puts an end's numbers into the words of status.
func simStatus(s *config.Simulator, st simulator.Stats, cut bool) control.Status {
	out := &control.Sim{
		Role: s.Role, Preset: s.Preset, FibreUp: !cut, Eve: st.Eve,
		Up: st.Status.Up, Reason: st.Status.Reason, QBER: known(st.Status.QBER),
		SiftedRate: known(st.Status.SiftedBPS), SecretRate: known(st.Status.SecretBPS),
		Blocks: st.Total.Blocks, SecretBits: st.Total.SecretBits, AuthUsed: st.Total.AuthUsed,
	}
	if left := st.Session.AuthLeft; left >= 0 {
		out.AuthBits = &left
	}
	return control.Status{Daemon: "sim", Simulated: true, Sim: out}
}
