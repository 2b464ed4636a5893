package etsi014

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// connKey is the key of a connection in the context of its requests.
type connKey struct{}

// begun is a connection and when it came.
type begun struct {
	at   time.Time
	conn *conn // nil if it is not one of Serve
}

// NewServer returns an HTTP/1.1 server (clause 5.1) for a door, with a bound on
// every wait, so that slow clients cannot hold what others need. cfg must
// demand client certificates; the caller listens with [Serve] and ends with
// Shutdown, which lets running requests finish. Handshake faults and
// broken connections go to log; nil discards.
//
// Requests that are no HTTP never reach the door: net/http answers them, and
// [Serve] makes an Error of that.
func NewServer(h http.Handler, cfg *tls.Config, log *slog.Logger) *http.Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var http1 http.Protocols
	http1.SetHTTP1(true)
	return &http.Server{
		Handler:   h,
		TLSConfig: cfg,
		Protocols: &http1,
		// The shortest patience of a known client is 5 s (Juniper's MACsec
		// automation): one that needs longer to ask is no use to itself.
		ReadHeaderTimeout: handshakeTime,
		ReadTimeout:       10 * time.Second,
		// Both together: the read, the KME's 5 s, and as long for the answer.
		WriteTimeout: 20 * time.Second,
		// Longer than the usual rekey interval of one minute, so that a line
		// keeps its connection.
		IdleTimeout: 2 * time.Minute,
		// A path with an SAE ID of 291 four-byte characters, percent-encoded,
		// has 3.5 KiB.
		MaxHeaderBytes:               16 << 10,
		DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			own, _ := c.(*conn)
			return context.WithValue(ctx, connKey{}, &begun{time.Now(), own})
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelInfo),
	}
}
