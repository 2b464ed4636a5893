package daemon

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// addKMEs turns the two ends of a link into two whole sites: roots,
// certificates, key managers and an SAE each. Ports are the kernel's choice;
// kochi is told tokyo's once it listens. It returns the root of doors and SAEs.
func addKMEs(t *testing.T, tokyo, kochi *config.Site) *pki.CA {
	t.Helper()
	dir := filepath.Dir(tokyo.State)
	file := func(name string) string { return filepath.Join(dir, name) }
	saes, err := pki.NewCA("SAEs", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	kmes, err := pki.NewCA("KMEs", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(saes.SaveCertificate(file("sae-ca")), kmes.SaveCertificate(file("kme-ca")))
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ca *pki.CA, name string, r pki.Request) {
		r.CommonName, r.Life = name, time.Hour
		issued, err := ca.Issue(r)
		if err == nil {
			err = issued.Save(file(name+".crt"), file(name+".key"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	for _, s := range []*config.Site{tokyo, kochi} {
		id := "kme-" + s.Site
		issue(saes, s.Site+"-door", pki.Request{IPs: loopback, Server: true})
		issue(saes, "sae-"+s.Site, pki.Request{SAE: "sae-" + s.Site, Client: true})
		issue(saes, "other-"+s.Site, pki.Request{SAE: "other-" + s.Site, Client: true})
		issue(kmes, id, pki.Request{KME: id, Server: true, Client: true})
		if err := keyring.NewRootKey(file(s.Site + ".root")); err != nil {
			t.Fatal(err)
		}
		s.KME = &config.KME{ID: id, Listen: "127.0.0.1:0", ClientCA: file("sae-ca"),
			Certificate: file(s.Site + "-door.crt"), Key: file(s.Site + "-door.key"),
			PeerListen: "127.0.0.1:0", PeerCertificate: file(id + ".crt"),
			PeerKey: file(id + ".key"), PeerCA: file("kme-ca"), RootKey: file(s.Site + ".root"),
			Control: file(s.Site + ".kme"), Metrics: "127.0.0.1:0"}
		for _, name := range []string{"sae", "other"} {
			for _, at := range []string{"tokyo", "kochi"} {
				a := config.SAE{ID: name + "-" + at, KME: "kme-" + at}
				if at == s.Site {
					a.Identity.URI = pki.SAEURI(a.ID)
				}
				s.SAEs = append(s.SAEs, a)
			}
		}
	}
	tokyo.Peers = []config.Peer{{KME: "kme-kochi", Address: "127.0.0.1:1"}} // tokyo is dialled
	tokyo.Links[0].Peer, kochi.Links[0].Peer = "kme-kochi", "kme-tokyo"
	return saes
}

// keysOf says what a line's site file would say of an SAE.
func keysOf(s *config.Site, door, name, peer string) *config.Keys {
	file := func(n string) string { return filepath.Join(filepath.Dir(s.State), n) }
	return &config.Keys{KMEs: []string{"https://" + door}, CA: file("sae-ca"), SAE: name,
		Certificate: file(name + ".crt"), Key: file(name + ".key"), PeerSAE: peer}
}

// kmeStatus asks a key manager that may not be there yet.
func kmeStatus(t *testing.T, s *config.Site) *control.KME {
	st, err := control.Dial(s.KME.Control).Status(t.Context())
	if err != nil {
		return &control.KME{Reason: err.Error()}
	}
	if !st.Simulated && len(st.KME.Links) > 0 && st.KME.Links[0].Up {
		t.Error("a simulated link is not marked so")
	}
	return st.KME
}

// TestTwoSites runs both ends of a link and both key managers, as the verbs
// do, and takes a key from photons to SAE at both sites.
func TestTwoSites(t *testing.T) {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	for _, env := range []Env{a, b} {
		defer start(t, func(ctx context.Context) error {
			return Sim(ctx, env, &env.Site.Links[0])
		})()
	}
	defer start(t, func(ctx context.Context) error { return KME(ctx, a) })()
	await(t, "tokyo listens", func() bool { return kmeStatus(t, a.Site).PeerListen != "" })
	b.Site.Peers = []config.Peer{{KME: "kme-tokyo", Address: kmeStatus(t, a.Site).PeerListen}}
	defer start(t, func(ctx context.Context) error { return KME(ctx, b) })()
	await(t, "tokyo has keys to draw", func() bool {
		return len(kmeStatus(t, a.Site).Links) > 0 && kmeStatus(t, a.Site).Links[0].Drawable > 4096
	})

	tokyo := source(t, keysOf(a.Site, kmeStatus(t, a.Site).Listen, "sae-tokyo", "sae-kochi"))
	door := kmeStatus(t, b.Site).Listen
	kochi := source(t, keysOf(b.Site, door, "sae-kochi", "sae-tokyo"))
	stranger := source(t, keysOf(b.Site, door, "other-kochi", "sae-tokyo"))
	var drawn []tunnel.Key
	await(t, "tokyo draws", func() (ok bool) {
		var err error
		drawn, err = tokyo.New(t.Context(), tunnel.UseEpoch, 2, 256)
		return err == nil
	})
	ids := []tunnel.KeyID{drawn[0].ID, drawn[1].ID}
	_, err := stranger.ByID(t.Context(), tunnel.UseEpoch, ids)
	if !errors.Is(err, tunnel.ErrKeyDenied) {
		t.Errorf("a third SAE: err = %v, want %v", err, tunnel.ErrKeyDenied)
	}
	got, err := kochi.ByID(t.Context(), tunnel.UseEpoch, ids)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i].Bits.Len() != 32 || !bytes.Equal(got[i].Bits.Expose(), drawn[i].Bits.Expose()) {
			t.Errorf("key %d differs between the sites", i)
		}
		got[i].Bits.Clear()
		drawn[i].Bits.Clear()
	}
	_, err = kochi.ByID(t.Context(), tunnel.UseEpoch, ids)
	if !errors.Is(err, tunnel.ErrKeyUnknown) {
		t.Errorf("a second time: err = %v, want %v", err, tunnel.ErrKeyUnknown)
	}
	stock, err := tokyo.Status(t.Context(), tunnel.UseEpoch)
	if err != nil || !stock.Simulated {
		t.Errorf("stock %+v, %v; want it marked as simulated", stock, err)
	}
	if s := kmeStatus(t, a.Site); s.KeysDrawn < 2 || !s.Serving || !s.Peers[0].Up {
		t.Errorf("tokyo tells %+v", s)
	}
	if s := kmeStatus(t, b.Site); s.KeysFetched != 2 || s.Refused == 0 || len(s.Calls) != 3 {
		t.Errorf("kochi tells %+v", s)
	}
}

func TestKMERefusesToStart(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*config.Site)
		want   error // nil = any
	}{
		{"no kme", func(s *config.Site) { s.KME = nil }, ErrNoKME},
		{"newer state", func(s *config.Site) {
			if err := openState(s.State); err != nil {
				t.Fatal(err)
			}
			if err := secret.WriteFile(filepath.Join(s.State, "schema"), []byte("2")); err != nil {
				t.Fatal(err)
			}
		}, ErrNewerState},
		{"no certificate", func(s *config.Site) { s.KME.Certificate += "x" }, nil},
		{"key others can read", func(s *config.Site) { s.KME.Key = s.KME.Certificate }, nil},
		{"no root key", func(s *config.Site) { s.KME.RootKey += "x" }, nil},
		{"peers' root", func(s *config.Site) { s.KME.PeerCA += "x" }, nil},
		{"one root in two files", func(s *config.Site) {
			root, err := os.ReadFile(s.KME.ClientCA)
			if err != nil {
				t.Fatal(err)
			}
			s.KME.PeerCA += "-too"
			if err := os.WriteFile(s.KME.PeerCA, root, 0o644); err != nil {
				t.Fatal(err)
			}
		}, ErrOneRoot},
		{"one root for SAEs and a peer", func(s *config.Site) {
			root, err := os.ReadFile(s.KME.ClientCA)
			if err != nil {
				t.Fatal(err)
			}
			s.Peers[0].CA = s.KME.PeerCA + "-peer"
			if err := os.WriteFile(s.Peers[0].CA, root, 0o644); err != nil {
				t.Fatal(err)
			}
		}, ErrOneRoot},
		{"driver", func(s *config.Site) { s.Links[0].Driver = "https://x" }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := simSites(t)
			addKMEs(t, a.Site, b.Site)
			tt.change(a.Site)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := KME(ctx, a)
			if err == nil || (tt.want != nil && !errors.Is(err, tt.want)) {
				t.Errorf("err = %v, want %v", err, tt.want)
			}
		})
	}
}
