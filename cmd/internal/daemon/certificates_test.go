package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/cmd/internal/renew"
)

func TestCertificateStatus(t *testing.T) {
	if got := certificateStatus(nil); got != nil {
		t.Errorf("without a keeper: %v", got)
	}
	a, err := pki.Init(filepath.Join(t.TempDir(), "pki"), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Make(pki.SAERoot, "line", pki.Request{CommonName: "line-tokyo", SAE: "line-tokyo",
		Client: true, Life: 30 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	k := renew.NewKeeper([]string{a.PairFile("line"), "none"}, renew.Local{Authority: a}, nil)
	list := certificateStatus(k)
	if len(list) != 2 {
		t.Fatalf("%d certificates, want 2", len(list))
	}
	if c := list[0]; c.Left == nil || *c.Left < 29*3600 || *c.Left > 30*3600 || c.Fault != "" ||
		c.Subject != "line-tokyo" || !c.Due.Before(c.NotAfter) {
		t.Errorf("%+v", c)
	}
	if c := list[1]; c.Left != nil || !strings.Contains(c.Fault, "no such file") {
		t.Errorf("%+v", c)
	}
}

// TestLineKeeper: a pair in two files is somebody else's to renew.
func TestLineKeeper(t *testing.T) {
	dir := t.TempDir()
	cert := filepath.Join(dir, "a.crt")
	k := config.Keys{KMEs: []string{"https://127.0.0.1:1"}, Certificate: cert, Key: filepath.Join(dir, "a.key")}
	if got := lineKeeper(&k, nil, nil); got != nil {
		t.Error("a keeper for a pair in two files")
	}
	k.Key = cert
	if err := os.WriteFile(cert, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := lineKeeper(&k, nil, nil)
	if list := got.Certificates(); len(list) != 1 || list[0].Path != cert {
		t.Errorf("%+v", list)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	for _, k := range []*renew.Keeper{nil, got} {
		if err := keep(k)(ctx); err != nil {
			t.Error(err)
		}
	}
}
