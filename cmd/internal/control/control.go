// Package control is the door of a daemon for the people who run it: a Unix
// socket that answers status and takes a few commands.
//
// The daemon's side is [Serve], the other side is [Client]. The protocol is
// HTTP over the socket with small JSON bodies:
//
//	GET  /v1/status                       → Status
//	POST /v1/rekey   {}                   line: begin a new epoch
//	POST /v1/fibre   {"up": false}        sim: cut or restore the fibre
//	POST /v1/eve     {"fraction": 1.0}    sim: intercept and resend
//	GET  /v1/audit                        kme: its audit log, a record a line
//	POST /v1/unseal  secret               kme: the key of the passphrase
//	POST /v1/seal    {}                   kme: drop all keys
//	POST /v1/root/admit, replace, adopt   secret; kme: steps of a change of the root key
//
// A secret body is a length byte, the secret, and zeros up to 32,768 bytes.
// A refusal is {"message": …, "hint": …} with a status of 4xx or 5xx.
//
// A caller must keep in mind that the socket has mode 0600 and answers root
// and the daemon's own user only, that it carries no delivered key, and that
// one daemon owns a socket path at a time.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

// Errors of this package.
var (
	// ErrDown: no daemon answers at the socket.
	ErrDown = errors.New("daemon does not answer")
	// ErrBusy: another daemon owns the socket.
	ErrBusy = errors.New("another daemon owns the socket")
	// ErrRefused: the daemon answered and said no.
	ErrRefused = errors.New("daemon refuses")
)

// maxBody bounds a request, bytes, and maxStatus an answer.
const (
	maxBody   = 4 << 10
	maxStatus = 4 << 20
)

// Door is what a daemon offers. A nil func is answered 404: this daemon has no
// such command. The funcs are called by any goroutine.
type Door struct {
	Status func() Status
	Rekey  func() error
	Fibre  func(up bool) error
	Eve    func(fraction float64) error
	// Audit reads the audit log from its beginning.
	Audit func(ctx context.Context) iter.Seq2[kms.Record, error]
	// Unseal, Seal and Root are about the root key; see the client's methods
	// of these names. They do not keep the secret.
	Unseal func(ctx context.Context, key secret.Bytes) error
	Seal   func(ctx context.Context) error
	Root   func(ctx context.Context, step RootStep, key secret.Bytes) error
}

// Server is a door that is open. Make it with [Listen].
type Server struct {
	listener net.Listener
	lock     *os.File
	http     http.Server
}

// Listen opens the socket, with its folder if need be, and takes over what a
// dead daemon left there. A living daemon's socket is [ErrBusy].
func Listen(path string, door Door, log *slog.Logger) (*Server, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("open control socket %s: %w", path, err)
	}
	listener, err := ListenUnix(path)
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("open control socket %s: %w", path, err)
	}
	return &Server{listener: listener, lock: lock, http: http.Server{
		Handler:           onlyOwner(door.handler()),
		ConnContext:       withPeer,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelInfo),
	}}, nil
}

// ListenUnix binds a Unix socket of mode 0600, with its folder if need be, in
// place of one that a dead daemon left. The caller must know that the old owner
// is dead: a daemon opens its control socket, which has a lock, before others.
func ListenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("a file is in the way that is not a socket")
	default:
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// Until here the umask decides; onlyOwner closes the moment between.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = listener.Close()
		return nil, err
	}
	return listener, nil
}

// lockFile takes the lock that a daemon holds for its life. The file stays: to
// remove it would let two daemons lock two files of one name.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, err
	}
	return f, nil
}

// Run answers until ctx ends; then it lets running requests finish and removes
// the socket.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- s.http.Serve(s.listener) }()
	select {
	case err := <-stopped:
		_ = s.lock.Close()
		return fmt.Errorf("serve control socket: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := s.http.Shutdown(grace); err != nil {
		_ = s.http.Close()
	}
	<-stopped
	return s.lock.Close()
}

// Close gives up a server that was never run.
func (s *Server) Close() error { return errors.Join(s.listener.Close(), s.lock.Close()) }

type peerKey struct{}

// withPeer notes who connected, as the kernel tells it (SO_PEERCRED, unix(7)).
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	ctrl := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if ctrl != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred)
}

// onlyOwner lets root and the daemon's own user in.
func onlyOwner(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(peerKey{}).(*unix.Ucred)
		if !ok || (cred.Uid != 0 && cred.Uid != uint32(os.Geteuid())) {
			refuse(w, http.StatusForbidden, "this user may not command the daemon",
				"run it as root or as the daemon's user")
			return
		}
		h.ServeHTTP(w, r)
	})
}

type fibreRequest struct {
	Up *bool `json:"up"`
}

type eveRequest struct {
	Fraction *float64 `json:"fraction"`
}

type refusal struct {
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func (d Door) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, d.Status())
	})
	if d.Rekey != nil {
		mux.HandleFunc("POST /v1/rekey", func(w http.ResponseWriter, r *http.Request) {
			command(w, r, &struct{}{}, d.Rekey)
		})
	}
	if d.Fibre != nil {
		mux.HandleFunc("POST /v1/fibre", func(w http.ResponseWriter, r *http.Request) {
			var req fibreRequest
			command(w, r, &req, func() error {
				if req.Up == nil {
					return errors.New("up is missing")
				}
				return d.Fibre(*req.Up)
			})
		})
	}
	if d.Eve != nil {
		mux.HandleFunc("POST /v1/eve", func(w http.ResponseWriter, r *http.Request) {
			var req eveRequest
			command(w, r, &req, func() error {
				if f := req.Fraction; f == nil || *f < 0 || *f > 1 {
					return errors.New("fraction is missing or outside 0 to 1")
				}
				return d.Eve(*req.Fraction)
			})
		})
	}
	if d.Audit != nil {
		mux.HandleFunc("GET /v1/audit", d.audit)
	}
	d.seals(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, "this daemon has no "+r.Method+" "+r.URL.Path, "")
	})
	return mux
}

// command reads req strictly, runs do, and answers {} or the refusal.
func command(w http.ResponseWriter, r *http.Request, req any, do func() error) {
	dec := json.NewDecoder(io.LimitReader(r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(req); err != nil {
		refuse(w, http.StatusBadRequest, "request is not valid: "+err.Error(), "")
		return
	}
	if err := do(); err != nil {
		refuse(w, http.StatusConflict, err.Error(), "")
		return
	}
	answer(w, struct{}{})
}

func answer(w http.ResponseWriter, v any) {
	body, err := json.Marshal(v)
	if err != nil { // a NaN that should have been null
		refuse(w, http.StatusInternalServerError, "status cannot be told: "+err.Error(), "")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n'))
}

func refuse(w http.ResponseWriter, code int, message, hint string) {
	body, _ := json.Marshal(refusal{message, hint})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n'))
}
