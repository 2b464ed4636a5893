package daemon

import (
	"context"
	"net/http"
	"sync/atomic"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/node"
)

// gate stands between the door and a key manager that may not be there: before
// its root key is. It implements etsi014.KME.
type gate struct{ node atomic.Pointer[node.Node] }

// sealedAnswer is the standard's Error (ETSI GS QKD 014 table 15). Strangers
// learn nothing more.
const sealedAnswer = `{"message":"key manager is sealed"}` + "\n"

// guard answers every request 503 while there is no key manager.
func (g *gate) guard(open http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.node.Load() != nil {
			open.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusServiceUnavailable)
		if r.Method != http.MethodHead {
			_, _ = w.Write([]byte(sealedAnswer))
		}
	})
}

func (g *gate) kme() (*kms.KME, error) {
	if n := g.node.Load(); n != nil {
		return n.KME(), nil
	}
	return nil, &etsi014.Error{Kind: etsi014.ErrDown, Message: "key manager is sealed",
		Cause: kms.ErrSealed}
}

// Status implements etsi014.KME.
func (g *gate) Status(ctx context.Context, who etsi014.Caller, peer etsi014.SAEID,
) (etsi014.Status, error) {
	k, err := g.kme()
	if err != nil {
		return etsi014.Status{}, err
	}
	return k.Status(ctx, who, peer)
}

// Keys implements etsi014.KME.
func (g *gate) Keys(ctx context.Context, who etsi014.Caller, req etsi014.KeyRequest,
) (etsi014.Container, error) {
	k, err := g.kme()
	if err != nil {
		return etsi014.Container{}, err
	}
	return k.Keys(ctx, who, req)
}

// KeysByID implements etsi014.KME.
func (g *gate) KeysByID(ctx context.Context, who etsi014.Caller, req etsi014.IDRequest,
) (etsi014.Container, error) {
	k, err := g.kme()
	if err != nil {
		return etsi014.Container{}, err
	}
	return k.KeysByID(ctx, who, req)
}
