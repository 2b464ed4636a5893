package daemon

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/tunnel"
)

// door puts a key manager behind a real door on loopback, and returns what two
// lines' site files would say of it.
func door(t *testing.T, kme etsi014.KME) (a, b *config.Keys) {
	t.Helper()
	keys := doorFor(t, kme, "a", "b")
	return keys("a", "b"), keys("b", "a")
}

// doorFor is door for such SAEs; what it returns makes the words of a site file.
func doorFor(t *testing.T, kme etsi014.KME, saes ...string) func(own, peer string) *config.Keys {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	ca, err := pki.NewCA("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string, r pki.Request) {
		r.CommonName, r.Life = name, time.Hour
		issued, err := ca.Issue(r)
		if err == nil {
			err = issued.Save(file(name+".crt"), file(name+".key"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	issue("door", pki.Request{KME: "kme-test", IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Server: true})
	var rules []identity.Rule
	for _, sae := range saes {
		issue(sae, pki.Request{SAE: sae, Client: true})
		rules = append(rules, identity.Rule{SAE: etsi014.SAEID(sae)})
	}
	if err := ca.SaveCertificate(file("ca.crt")); err != nil {
		t.Fatal(err)
	}
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: file("door.crt"), Key: file("door.key")}},
		CA:    file("ca.crt"),
		Rules: rules,
	})
	if err != nil {
		t.Fatal(err)
	}
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: kme, Identify: live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := etsi014.NewServer(h, live.Server(), nil)
	done := make(chan error, 1)
	go func() { done <- etsi014.Serve(server, ln, etsi014.Bounds{}) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return func(own, peer string) *config.Keys {
		return &config.Keys{KMEs: []string{"https://" + ln.Addr().String()}, CA: file("ca.crt"),
			Certificate: file(own + ".crt"), Key: file(own + ".key"), SAE: own, PeerSAE: peer}
	}
}

// source opens a key source as the line daemon does.
func source(t *testing.T, k *config.Keys) keySource {
	t.Helper()
	s, err := openKeySource(k, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.Close)
	return s
}

var _ tunnel.KeySource = keySource{}

// TestKeySource draws at one end and collects the same bytes at the other,
// over mutual TLS.
func TestKeySource(t *testing.T) {
	kme := &etsitest.KME{Stock: 5}
	ka, kb := door(t, kme)
	a, b := source(t, ka), source(t, kb)
	stock, err := a.Status(t.Context(), tunnel.UseEpoch)
	if err != nil || stock.Keys != 5 || stock.SizeBits != 256 {
		t.Fatalf("stock %+v, %v", stock, err)
	}
	drawn, err := a.New(t.Context(), tunnel.UseEpoch, 2, 256)
	if err != nil || len(drawn) != 2 {
		t.Fatalf("drew %d keys, %v", len(drawn), err)
	}
	ids := []tunnel.KeyID{drawn[1].ID, drawn[0].ID}
	got, err := b.ByID(t.Context(), tunnel.UseEpoch, ids)
	if err != nil || len(got) != 2 {
		t.Fatalf("collected %d keys, %v", len(got), err)
	}
	for i, k := range got {
		want := drawn[1-i]
		if k.ID != want.ID || k.Bits.Len() != 32 ||
			!bytes.Equal(k.Bits.Expose(), want.Bits.Expose()) {
			t.Errorf("key %d is not the one drawn", i)
		}
	}
	if _, err := b.ByID(t.Context(), tunnel.UseEpoch, ids[:1]); !errors.Is(err, tunnel.ErrKeyUnknown) {
		t.Errorf("a second time: err = %v, want %v", err, tunnel.ErrKeyUnknown)
	}
	if _, err := a.New(t.Context(), tunnel.UseEpoch, 4, 256); !errors.Is(err, tunnel.ErrKeyEmpty) {
		t.Errorf("more than there is: err = %v, want %v", err, tunnel.ErrKeyEmpty)
	}
	if _, err := a.New(t.Context(), tunnel.UsePad, 1, 256); !errors.Is(err, tunnel.ErrKeyDenied) {
		t.Errorf("pad: err = %v, want %v", err, tunnel.ErrKeyDenied)
	}
	if kme.Left() != 3 {
		t.Errorf("%d keys left, want 3: a refused call took one", kme.Left())
	}
}

func TestKeySourceErrors(t *testing.T) {
	kme := &etsitest.KME{Stock: 5}
	ka, _ := door(t, kme)
	a := source(t, ka)
	for _, tt := range []struct{ answer, want error }{
		{etsi014.ErrDenied, tunnel.ErrKeyDenied},
		{etsi014.ErrEmpty, tunnel.ErrKeyEmpty},
		{etsi014.ErrDown, tunnel.ErrKeyDown},
		{errors.New("disk is on fire"), tunnel.ErrKeyDown},
	} {
		kme.Fail = func() error { return tt.answer }
		_, err := a.New(t.Context(), tunnel.UseEpoch, 1, 256)
		if !errors.Is(err, tt.want) {
			t.Errorf("%v: err = %v, want %v", tt.answer, err, tt.want)
		}
	}
	ka.KMEs[0] = "https://127.0.0.1:1" // nobody listens on port 1
	_, err := source(t, ka).Status(t.Context(), tunnel.UseEpoch)
	if !errors.Is(err, tunnel.ErrKeyDown) {
		t.Errorf("nobody there: err = %v, want %v", err, tunnel.ErrKeyDown)
	}
	ka.CA = ka.Key
	if _, err := openKeySource(ka, nil); err == nil {
		t.Error("a key passes for a root")
	}
}

// TestKeySourceDoors: the second door is asked while the first cannot be
// reached, and none that is not of the key manager named.
func TestKeySourceDoors(t *testing.T) {
	kme := &etsitest.KME{Stock: 5}
	ka, _ := door(t, kme)
	alive, dead := ka.KMEs[0], "https://127.0.0.1:1"
	for _, tt := range []struct {
		name  string
		doors []string
		kme   string
		ok    bool
	}{
		{"first of two", []string{alive, dead}, "", true},
		{"second of two", []string{dead, alive}, "", true},
		{"the one named", []string{dead, alive}, "kme-test", true},
		{"another one", []string{dead, alive}, "kme-other", false},
	} {
		ka.KMEs, ka.KME = tt.doors, tt.kme
		before := kme.Left()
		keys, err := source(t, ka).New(t.Context(), tunnel.UseEpoch, 1, 256)
		if ok := err == nil && len(keys) == 1; ok != tt.ok {
			t.Errorf("%s: %d keys, %v", tt.name, len(keys), err)
		}
		if drawn := before - kme.Left(); drawn != len(keys) {
			t.Errorf("%s: %d keys were drawn for %d", tt.name, drawn, len(keys))
		}
	}
}
