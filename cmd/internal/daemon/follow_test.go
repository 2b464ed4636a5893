package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
)

const followed = `version: 1
site: tokyo
state: state
kme: {id: kme-tokyo, listen: "127.0.0.1:0", certificate: a, key: a, client_ca: b,
  peer_listen: "127.0.0.1:1", peer_certificate: peer.pem, peer_key: peer.pem, peer_ca: peers.crt, root_key: r}
peers:
  - {kme: kme-kochi, address: "192.0.2.2:8444"}
`

// TestWhile edits a site file in every way and looks when the context ends.
func TestWhile(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(dir string) error
		ends bool
	}{
		"nothing":   {func(string) error { return nil }, false},
		"comment":   {func(d string) error { return put(d, "site.yaml", followed+"# hello\n") }, false},
		"broken":    {func(d string) error { return put(d, "site.yaml", "peers: [") }, false},
		"peer gone": {func(d string) error { return put(d, "site.yaml", followed[:strings.Index(followed, "peers:")]) }, true},
		"peer moved": {func(d string) error {
			return put(d, "site.yaml", strings.Replace(followed, "192.0.2.2", "192.0.2.3", 1))
		}, true},
		"peers' roots": {func(d string) error { return put(d, "peers.crt", "another") }, false},
		"peer renewed": {func(d string) error { return put(d, "peer.pem", "another") }, false},
		"another list": {func(d string) error {
			return put(d, "site.yaml", strings.Replace(followed, "root_key: r", "root_key: r, peer_crl: l", 1))
		}, true},
		"door renewed":    {func(d string) error { return put(d, "a", "another") }, false},
		"the file itself": {func(d string) error { return os.Remove(filepath.Join(d, "site.yaml")) }, false},
	} {
		dir := t.TempDir()
		if err := errors.Join(put(dir, "site.yaml", followed), put(dir, "peer.pem", "x")); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := while(t.Context(), filepath.Join(dir, "site.yaml"), kmeSum, slog.New(slog.DiscardHandler))
			defer stop()
			time.Sleep(10 * followEvery)
			if ctx.Err() != nil {
				t.Fatalf("%s: ended before anything changed", name)
			}
			if err := tc.edit(dir); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * followEvery)
			synctest.Wait()
			if ended := errors.Is(context.Cause(ctx), ErrChanged); ended != tc.ends {
				t.Errorf("%s: ended %v, want %v", name, ended, tc.ends)
			}
		})
	}
}

func put(dir, name, text string) error {
	return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
}

func TestLineSum(t *testing.T) {
	s := &config.Site{Lines: []config.Line{{ID: "a", Policy: "qkd-strict"}, {ID: "b"}}}
	a := lineSum(s, "a")
	s.Lines[1].Policy = "pqc-only"
	if lineSum(s, "a") != a {
		t.Error("another line's change ends this one")
	}
	s.Lines[0].Policy = "pqc-only"
	if lineSum(s, "a") == a {
		t.Error("a change is not seen")
	}
	s.Lines = s.Lines[1:]
	if lineSum(s, "a") != [32]byte{} {
		t.Error("a line that left is not missed")
	}
}

func TestLinkSum(t *testing.T) {
	s := &config.Site{Links: []config.Link{{ID: "a", Peer: "kme-kochi"}, {ID: "b"}}}
	a := linkSum(s, "a")
	s.Links[1].Peer = "kme-osaka"
	if linkSum(s, "a") != a {
		t.Error("another link's change ends this one")
	}
	s.Links = s.Links[1:]
	if linkSum(s, "a") != [32]byte{} {
		t.Error("a link that left is not missed")
	}
}
