package daemon

import (
	"fmt"
	"log/slog"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
)

// openKeySource makes the client of a line's key manager. It reads the files
// and opens no connection. The caller closes the client.
func openKeySource(k *config.Keys, log *slog.Logger) (keySource, error) {
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: k.Certificate, Key: k.Key}},
		CA:    k.CA,
	})
	if err != nil {
		return keySource{}, fmt.Errorf("open key source: %w", err)
	}
	client, err := etsi014.NewClient(etsi014.ClientConfig{URLs: k.KMEs, TLS: live.Client, Log: log})
	if err != nil {
		return keySource{}, fmt.Errorf("open key source: %w", err)
	}
	return keySource{client: client, peer: etsi014.SAEID(k.PeerSAE)}, nil
}
