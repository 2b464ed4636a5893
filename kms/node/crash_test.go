//go:build linux

package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/kms/powercut"
)

// childEnv names the file that tells a child process which KME to be.
const childEnv = "QUIETLINE_KMS_CHILD"

func TestMain(m *testing.M) {
	powercut.Main()
	if path := os.Getenv(childEnv); path != "" {
		if err := childMain(path); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// childConfig is a KME process of the crash tests.
type childConfig struct {
	KME, Peer     etsi014.KMEID
	Dir, Root     string
	Listen, Dial  string // of the peer channel
	TLS           TLSFiles
	Door          string // of ETSI 014
	Cert, Key, CA string // of ETSI 014
	Acked         string // what the device knows to be stored
	Seed          uint64
	Pace          time.Duration // between two blocks
	Blocks        uint64        // that the device makes in all; 0 = no bound
	Turn          time.Duration // of the epoch; 0 = as usual
}

// childMain runs a KME with its door until it is killed or its stdin ends.
func childMain(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var c childConfig
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	n, err := Open(Config{KME: c.KME, Dir: c.Dir, RootKey: c.Root, Lab: true, Listen: c.Listen,
		TLS: c.TLS, Peers: []Peer{{ID: c.Peer, Addr: c.Dial}}, SAEs: testSAEs, Logger: log,
		EpochTurn: c.Turn,
		Links:     []Link{{ID: "link", Peer: c.Peer, Driver: pacedStream(ctx, c)}}})
	if err != nil {
		return err
	}
	live, err := identity.Open(identity.Config{Pairs: []identity.Pair{{Cert: c.Cert, Key: c.Key}},
		CA: c.CA, Rules: []identity.Rule{{SAE: "sae-a"}, {SAE: "sae-b"}}})
	if err != nil {
		return err
	}
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: n.KME(), Identify: live.Identify})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Door)
	if err != nil {
		return err
	}
	srv := etsi014.NewServer(h, live.Server(), log)
	go func() {
		if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
			log.Error("door", "err", err)
		}
	}()
	fmt.Println("door", l.Addr())
	if a := n.ListenAddr(); a != nil {
		fmt.Println("peer", a)
	}
	fmt.Println("ready")
	err = n.Run(ctx)
	_ = srv.Close()
	return errors.Join(err, n.Close())
}

// pacedStream is a device that keeps in a file what was acknowledged to it, as
// a real one does, and makes a block now and then.
func pacedStream(ctx context.Context, c childConfig) *stream {
	first := uint64(1)
	if data, err := os.ReadFile(c.Acked); err == nil && len(data) >= 8 {
		v, err := strconv.ParseUint(string(data[len(data)/8*8-8:len(data)/8*8]), 16, 64)
		if err == nil {
			first = v + 1
		}
	}
	s := newStream(c.Seed, first, 4096)
	f, err := os.OpenFile(c.Acked, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	s.acked = func(seq uint64) { fmt.Fprintf(f, "%08x", seq) }
	go func() {
		tick := time.NewTicker(c.Pace)
		defer tick.Stop()
		for limit := first; c.Blocks == 0 || limit <= c.Blocks+1; limit++ {
			s.allow(limit)
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return s
}

// process is a KME child of the test.
type process struct {
	cfg  childConfig
	path string
	cmd  *exec.Cmd
	in   io.WriteCloser
	errs *textBuffer
}

// textBuffer is what a process has said so far.
type textBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *textBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *textBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// start runs the child and waits until it is ready. The addresses of its first
// run are kept for the next ones.
func (p *process) start(t *testing.T) {
	t.Helper()
	data, err := json.Marshal(p.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), childEnv+"="+p.path)
	p.errs = &textBuffer{}
	p.cmd.Stderr = p.errs
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case "door":
			p.cfg.Door = rest
		case "peer":
			p.cfg.Listen = rest
		case "ready":
			return
		}
	}
	t.Fatalf("%s did not start: %s", p.cfg.KME, p.errs)
}

func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.cmd.Wait() // it was killed: the error says so
}

// stop ends the child in order.
func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("%s: %v: %s", p.cfg.KME, err, p.errs)
	}
}

// newProcesses prepares two KMEs; b listens.
func newProcesses(t *testing.T) (a, b *process, client func(sae string, p *process) *etsi014.Client) {
	t.Helper()
	kmeCA, saeCA := newAuthority(t), etsitest.NewCA(t, "SAEs")
	dir := t.TempDir()
	caPath := filepath.Join(dir, "sae-ca.crt")
	etsitest.WriteFile(t, caPath, saeCA.PEM())
	make1 := func(self, other etsi014.KMEID) *process {
		home := filepath.Join(dir, string(self))
		if err := os.Mkdir(home, 0o700); err != nil {
			t.Fatal(err)
		}
		root := filepath.Join(home, "root.key")
		if err := keyring.NewRootKey(root); err != nil {
			t.Fatal(err)
		}
		cert, key := etsitest.WriteFiles(t, home, "door", saeCA.Issue(t,
			etsitest.Leaf{IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}))
		return &process{path: filepath.Join(home, "child.json"), cfg: childConfig{
			KME: self, Peer: other, Dir: filepath.Join(home, "state"), Root: root,
			TLS: kmeCA.issue(t, uriPrefix+string(self)), Door: "127.0.0.1:0", Cert: cert, Key: key,
			CA: caPath, Acked: filepath.Join(home, "acked"), Seed: 7, Pace: 5 * time.Millisecond}}
	}
	a, b = make1("kme-a", "kme-b"), make1("kme-b", "kme-a")
	b.cfg.Listen = "127.0.0.1:0"
	client = func(sae string, p *process) *etsi014.Client {
		cert, key := etsitest.WriteFiles(t, t.TempDir(), sae, saeCA.Issue(t, etsitest.Leaf{
			URIs: []string{identity.DefaultURI(etsi014.SAEID(sae))}}))
		live, err := identity.Open(identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}},
			CA: caPath})
		if err != nil {
			t.Fatal(err)
		}
		c, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://" + p.cfg.Door},
			TLS: live.Client, Timeout: 3 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	return a, b, client
}

// journal is what callers were answered, over both sites and all lives.
type journal struct {
	mu      sync.Mutex
	drawn   map[etsi014.KeyID]string // key_ID to key bytes
	bytes   map[string]bool
	fetched map[etsi014.KeyID]bool
	bySite  map[etsi014.KMEID][]etsi014.KeyID
	faults  []string
}

func newJournal() *journal {
	return &journal{drawn: map[etsi014.KeyID]string{}, bytes: map[string]bool{},
		fetched: map[etsi014.KeyID]bool{}, bySite: map[etsi014.KMEID][]etsi014.KeyID{}}
}

func (j *journal) fault(format string, args ...any) {
	j.faults = append(j.faults, fmt.Sprintf(format, args...))
}

func (j *journal) draw(at etsi014.KMEID, keys []etsi014.Key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, k := range keys {
		bits := string(k.Bits.Expose())
		if _, twice := j.drawn[k.ID]; twice || j.bytes[bits] {
			j.fault("key %s was delivered to a master twice", k.ID)
		}
		j.drawn[k.ID], j.bytes[bits] = bits, true
		j.bySite[at] = append(j.bySite[at], k.ID)
	}
}

func (j *journal) fetch(keys []etsi014.Key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, k := range keys {
		if j.fetched[k.ID] {
			j.fault("key %s was delivered to its target twice", k.ID)
		}
		if j.drawn[k.ID] != string(k.Bits.Expose()) {
			j.fault("key %s has other bytes at its target", k.ID)
		}
		j.fetched[k.ID] = true
	}
}

// reach waits until so many keys were drawn and fetched in all.
func (j *journal) reach(limit time.Duration, drawn, fetched int) bool {
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		j.mu.Lock()
		enough := len(j.drawn) >= drawn && len(j.fetched) >= fetched
		j.mu.Unlock()
		if enough {
			return true
		}
	}
	return false
}

// work draws at one site and fetches at the other until stop; every third
// fetch is tried again, as a caller does that lost the answer.
func (j *journal) work(stop <-chan struct{}, at etsi014.KMEID, from, to *etsi014.Client,
	initiator, target etsi014.SAEID, most int, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	for {
		select {
		case <-stop:
			return
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		got, err := from.Keys(ctx, etsi014.KeyRequest{Targets: []etsi014.SAEID{target},
			Number: 1 + rng.IntN(most), SizeBits: 256})
		if err != nil {
			cancel()
			time.Sleep(time.Duration(1+rng.IntN(10)) * time.Millisecond) // as a caller would
			continue
		}
		j.draw(at, got.Keys)
		req := etsi014.IDRequest{Initiator: initiator}
		for _, k := range got.Keys {
			req.IDs = append(req.IDs, k.ID)
		}
		for range 1 + rng.IntN(3)/2 {
			if twin, err := to.KeysByID(ctx, req); err == nil {
				j.fetch(twin.Keys)
			}
		}
		cancel()
	}
}

// crew is two KME processes under load.
type crew struct {
	a, b *process
	seed uint64
	rng  *rand.Rand
	*journal
	stop chan struct{}
	wg   sync.WaitGroup
}

// newCrew starts both, as prepared, with load at both: requests of up to most
// keys.
func newCrew(t *testing.T, most int, prepare func(a, b *process)) *crew {
	t.Helper()
	c := &crew{seed: uint64(time.Now().UnixNano()), journal: newJournal(), stop: make(chan struct{})}
	c.rng = rand.New(rand.NewPCG(c.seed, 2))
	var client func(string, *process) *etsi014.Client
	c.a, c.b, client = newProcesses(t)
	if prepare != nil {
		prepare(c.a, c.b)
	}
	t.Cleanup(func() { // whatever the test's end was
		for _, p := range []*process{c.a, c.b} {
			if p.cmd != nil {
				_ = p.cmd.Process.Kill()
				_, _ = p.cmd.Process.Wait()
			}
		}
	})
	c.b.start(t)
	c.a.cfg.Dial, c.b.cfg.Dial = c.b.cfg.Listen, "127.0.0.1:1"
	c.a.start(t)
	for i := range uint64(4) {
		atA, atB := client("sae-a", c.a), client("sae-b", c.b)
		c.wg.Go(func() { c.work(c.stop, "kme-a", atA, atB, "sae-a", "sae-b", most, c.seed+i) })
		c.wg.Go(func() { c.work(c.stop, "kme-b", atB, atA, "sae-b", "sae-a", most, c.seed+100+i) })
	}
	return c
}

// flow waits until so many more keys have reached both ends.
func (c *crew) flow(t *testing.T, more int, when string) {
	t.Helper()
	c.mu.Lock()
	drawn, fetched := len(c.drawn), len(c.fetched)
	c.mu.Unlock()
	if !c.reach(time.Minute, drawn+more, fetched+more/2) {
		t.Fatalf("seed %d: keys do not flow %s; a: %s; b: %s", c.seed, when, c.a.errs, c.b.errs)
	}
}

// end stops the load and both processes, and reports what was wrong.
func (c *crew) end(t *testing.T) {
	t.Helper()
	close(c.stop)
	c.wg.Wait()
	c.a.stop(t)
	c.b.stop(t)
	for _, f := range c.faults {
		t.Errorf("seed %d: %s", c.seed, f)
	}
	t.Logf("%d keys acknowledged to masters (%d at a, %d at b), %d to targets", len(c.drawn),
		len(c.bySite["kme-a"]), len(c.bySite["kme-b"]), len(c.fetched))
}

// TestKilledUnderLoad kills either KME, or both, at random moments while both
// are drawn and fetched from, and starts it again. QUIETLINE_LONG=1 kills
// 2,000 times.
func TestKilledUnderLoad(t *testing.T) {
	kills := long(50, 2000)
	c := newCrew(t, 3, nil)
	for i := range kills {
		// Enough answers before each kill, however busy the machine is, and
		// then a random moment.
		c.flow(t, 10, fmt.Sprintf("after %d kills", i))
		time.Sleep(time.Duration(c.rng.IntN(100)) * time.Millisecond)
		victims := [][]*process{{c.a}, {c.b}, {c.a}, {c.b}, {c.a}, {c.b}, {c.a}, {c.b},
			{c.a, c.b}, {c.b, c.a}}[c.rng.IntN(10)]
		for _, p := range victims {
			p.kill(t)
		}
		for _, p := range victims {
			p.start(t)
		}
	}
	c.flow(t, 10, "after the last kill")
	c.end(t)
	t.Logf("%d kills", kills)
	for _, p := range []*process{c.a, c.b} {
		c.compare(t, p)
	}
}

// compare reads a site's audit log: every key that was acknowledged stands in
// it as delivered, once.
func (j *journal) compare(t *testing.T, p *process) {
	t.Helper()
	store, err := boltstore.Open(filepath.Join(p.cfg.Dir, StoreFile), p.cfg.KME, boltstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	lease, err := store.Lease(t.Context(), "link", -1)
	if err != nil {
		t.Fatal(err)
	}
	if !lease.Ledger.Balanced() {
		t.Errorf("%s: ledger does not balance: %+v", p.cfg.KME, lease.Ledger)
	}
	root, err := keyring.ReadRootKey(p.cfg.Root)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Clear()
	kme, err := store.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	ring, err := keyring.Open(filepath.Join(p.cfg.Dir, epochFile), root, kme.Epoch, false)
	if err != nil {
		t.Fatal(err)
	}
	idKey, err := ring.Unwrap(keyring.IDKeyName("link"), lease.IDKey)
	if err != nil {
		t.Fatal(err)
	}
	defer idKey.Clear()
	logged := map[bool]map[etsi014.KeyID]bool{true: {}, false: {}}
	for rec, err := range store.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			if c.Op != kms.OpClaim {
				continue
			}
			for slot := c.First; slot < c.First+c.Slots; slot++ { // keys of one slot each
				id, err := peer.KeyID(idKey.Expose(), c.Segment, slot, 256)
				if err != nil {
					t.Fatal(err)
				}
				role := c.Role == kms.RoleInitiator
				if logged[role][id] {
					t.Errorf("%s: the log delivers key %s twice", p.cfg.KME, id)
				}
				logged[role][id] = true
			}
		}
	}
	for _, id := range j.bySite[p.cfg.KME] {
		if !logged[true][id] {
			t.Errorf("%s: key %s was acknowledged and is not in the log", p.cfg.KME, id)
		}
	}
	here := map[etsi014.KeyID]bool{}
	for _, id := range j.bySite[p.cfg.KME] {
		here[id] = true
	}
	for id := range j.fetched {
		if !here[id] && !logged[false][id] {
			t.Errorf("%s: fetch of key %s was acknowledged and is not in the log", p.cfg.KME, id)
		}
	}
}
