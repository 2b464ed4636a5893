package daemon

import (
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/socket"
	"github.com/quietline/quietline/secret"
)

// lamp is a device that makes the same blocks at both ends as fast as they are
// taken, for tests that need more key than photons give.
type lamp struct {
	blocks, bytes int
	made          uint64
}

func (l *lamp) Describe() hw.Info {
	return hw.Info{Vendor: "test", Model: "lamp", Simulated: true, BlockBytes: l.bytes}
}

func (l *lamp) Next(ctx context.Context) (hw.Block, error) {
	if int(l.made) == l.blocks {
		<-ctx.Done()
		return hw.Block{}, ctx.Err()
	}
	l.made++
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], l.made)
	b := make([]byte, l.bytes)
	source := rand.NewChaCha8(seed)
	_, _ = source.Read(b)
	// Its buffer holds the end of the block; what it makes next takes its place,
	// or a search of this process would find keys there.
	_, _ = source.Read(make([]byte, 1024))
	return hw.Block{Generation: 1, Seq: l.made, Bits: secret.Own(b), QBER: math.NaN(),
		Epsilon: math.NaN(), Simulated: true}, nil
}

func (l *lamp) NextEvent(ctx context.Context) (hw.Event, error) {
	<-ctx.Done()
	return hw.Event{}, ctx.Err()
}

// lit is two sites whose key managers run and have taken all of a lamp's
// blocks.
type lit struct {
	tokyo, kochi *config.Site
	root         *pki.CA
	tokyoDoor    string // host:port
	kochiDoor    string
}

// path names a file of the two sites.
func (l *lit) path(name string) string { return filepath.Join(filepath.Dir(l.tokyo.State), name) }

// certificates opens an SAE's files.
func (l *lit) certificates(t *testing.T, sae string) *identity.Live {
	t.Helper()
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: l.path(sae + ".crt"), Key: l.path(sae + ".key")}},
		CA:    l.path("sae-ca"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return live
}

// client draws for an SAE at a door.
func (l *lit) client(t *testing.T, sae, door string) *etsi014.Client {
	t.Helper()
	c, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://" + door},
		TLS: l.certificates(t, sae).Client})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// newLit runs both key managers until the test ends. adapt changes them before
// they start.
func newLit(t *testing.T, blocks, bytes int, adapt func(tokyo, kochi *Env)) *lit {
	t.Helper()
	a, b := simSites(t)
	root := addKMEs(t, a.Site, b.Site)
	if adapt != nil {
		adapt(&a, &b)
	}
	background := func(run func(context.Context) error) { t.Cleanup(start(t, run)) }
	for _, env := range []Env{a, b} {
		listener, err := socket.Listen(env.Site.Links[0].Driver[len("unix://"):])
		if err != nil {
			t.Fatal(err)
		}
		background(func(ctx context.Context) error {
			return socket.Serve(ctx, listener, &lamp{blocks: blocks, bytes: bytes})
		})
	}
	background(func(ctx context.Context) error { return KME(ctx, a) })
	await(t, "tokyo listens", func() bool { return kmeStatus(t, a.Site).PeerListen != "" })
	b.Site.Peers = []config.Peer{{KME: "kme-tokyo", Address: kmeStatus(t, a.Site).PeerListen}}
	background(func(ctx context.Context) error { return KME(ctx, b) })
	all := uint64(blocks) * uint64(bytes) * 8
	for _, s := range []*config.Site{a.Site, b.Site} {
		await(t, s.Site+" has all keys", func() bool {
			k := kmeStatus(t, s)
			// Each side draws its half; an eighth less is what confirmation costs.
			return len(k.Links) > 0 && k.Links[0].Ingested == all && k.Links[0].Drawable > all*3/8
		})
	}
	return &lit{a.Site, b.Site, root, kmeStatus(t, a.Site).Listen, kmeStatus(t, b.Site).Listen}
}
