package etsi014_test

import (
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
)

// A client that was told its KME asks nobody else: not by any of the ways in
// which a certificate may name one, and not before it knows.
func TestClientConfirmsTheKME(t *testing.T) {
	w := newWorld(t, nil) // its status names kme-tokyo
	here := []net.IP{net.IPv4(127, 0, 0, 1)}
	for _, tt := range []struct {
		name  string
		leaf  etsitest.Leaf
		kme   etsi014.KMEID
		taken bool
	}{
		{"unnamed", etsitest.Leaf{CN: "x"}, "", true},
		{"URI", etsitest.Leaf{URIs: []string{etsi014.KMEURI("kme-tokyo")}}, "kme-tokyo", true},
		{"DNS name", etsitest.Leaf{DNS: []string{"a.example", "KME-Tokyo"}}, "kme-tokyo", true},
		{"common name", etsitest.Leaf{CN: "kme-tokyo"}, "kme-tokyo", true},
		{"another", etsitest.Leaf{CN: "kme-osaka", DNS: []string{"kme-osaka"},
			URIs: []string{etsi014.KMEURI("kme-osaka")}}, "kme-tokyo", false},
		{"an SAE of that name", etsitest.Leaf{URIs: []string{"urn:quietline:sae:kme-tokyo"}},
			"kme-tokyo", false},
		{"part of a name", etsitest.Leaf{CN: "kme-tokyo-2"}, "kme-tokyo", false},
		{"case of a common name", etsitest.Leaf{CN: "KME-tokyo"}, "kme-tokyo", false},
		{"nothing", etsitest.Leaf{}, "kme-tokyo", false},
	} {
		tt.leaf.Server, tt.leaf.IPs = true, here
		door := w.live.Server()
		cert := w.ca.Issue(t, tt.leaf)
		inner := door.GetConfigForClient
		door.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			cfg, err := inner(h)
			if err == nil {
				cfg = cfg.Clone()
				cfg.Certificates = []tls.Certificate{cert}
			}
			return cfg, err
		}
		addr := serve(t, etsi014.NewServer(w.server.Handler, door, nil))
		c := newClient(t, etsi014.ClientConfig{URLs: []string{"https://" + addr}, KME: tt.kme,
			TLS: func() *tls.Config { return w.tls("tokyo") }})
		before := w.kme.Left()
		keys, err := c.Keys(t.Context(), toKochi)
		keys.Clear()
		if tt.taken != (err == nil) || tt.taken != (w.kme.Left() == before-1) {
			t.Errorf("%s: %v, %d keys left of %d", tt.name, err, w.kme.Left(), before)
		}
		if err != nil && (!errors.Is(err, etsi014.ErrDown) ||
			!strings.Contains(err.Error(), "does not name KME kme-tokyo")) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// The status of another KME is no answer, whatever its certificate says.
func TestStatusOfAnotherKME(t *testing.T) {
	w := newWorld(t, nil)
	c := newClient(t, etsi014.ClientConfig{URLs: []string{"https://" + w.addr}, KME: "kme",
		TLS: func() *tls.Config { return w.tls("tokyo") }}) // its CN is kme
	if _, err := c.Status(t.Context(), "kochi"); !errors.Is(err, etsi014.ErrDown) ||
		!strings.Contains(err.Error(), `comes from KME "kme-tokyo"`) {
		t.Errorf("got %v", err)
	}
}
