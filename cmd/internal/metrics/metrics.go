// Package metrics shows a daemon to Prometheus. It is the only package that
// imports the Prometheus client.
//
// [Listen] serves what a daemon's status says as metrics named
// quietline_<room>_<thing>_<unit>[_total], in bytes, seconds and ratios.
// Labels are names from the site file and constant words, so their number is
// bounded. A caller must keep in mind that a scrape asks for the status once,
// and that metrics carry no authentication: they are served on loopback or a
// Unix socket only, which the site file's check ensures.
package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
)

// Server answers scrapes. Make it with [Listen].
type Server struct {
	listener net.Listener
	http     http.Server
}

// Listen opens the address, a loopback host:port or unix:///path, and serves
// the metrics of status at /metrics.
func Listen(address string, status func() control.Status, log *slog.Logger) (*Server, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	network, addr := config.Network(address)
	var listener net.Listener
	var err error
	if network == "unix" {
		listener, err = control.ListenUnix(addr)
	} else {
		listener, err = net.Listen(network, addr)
	}
	if err != nil {
		return nil, fmt.Errorf("open metrics %s: %w", address, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", Handler(status))
	return &Server{listener: listener, http: http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       2 * time.Minute, // above the usual scrape interval
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelInfo),
	}}, nil
}

// Addr is the address bound, for a port that the kernel chose.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- s.http.Serve(s.listener) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("serve metrics: %w", err)
	case <-ctx.Done():
	}
	_ = s.http.Close() // a scrape cut short is repeated
	<-stopped
	return nil
}

// Close gives up a server that was never run.
func (s *Server) Close() error { return s.listener.Close() }

// Handler serves the metrics of status and of the process itself.
func Handler(status func() control.Status) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(
		&collector{status},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}
