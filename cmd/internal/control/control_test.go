package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve opens a door until the test ends and returns its socket.
func serve(t *testing.T, door Door) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "d.sock")
	s, err := Listen(path, door, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket is left behind: %v", err)
		}
	})
	return path
}

func TestStatusComesBackEqual(t *testing.T) {
	q, stock := 0.0125, 7
	want := Status{Daemon: "line", ID: "a", Site: "tokyo", Version: "v1", PID: 12, Simulated: true,
		Started: time.Date(2026, 11, 21, 1, 2, 3, 0, time.UTC),
		Line: &Line{Policy: "qkd-strict", Level: "QKD", Epoch: 3, Age: &q, Stock: &stock,
			Drops: map[string]uint64{"no epoch": 1}}}
	got, err := Dial(serve(t, Door{Status: func() Status { return want }})).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}

// TestStatusNames holds the names that scripts read.
func TestStatusNames(t *testing.T) {
	data, err := json.Marshal(Status{KME: &KME{Links: []Link{{}}, Peers: []Peer{{}}},
		Line: &Line{}, Sim: &Sim{}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"daemon", "simulated", "serving", "keys_drawn", "keys_fetched",
		"drawable_bits", "stored_bits", "delivered_bits", "policy", "level", "since", "epoch",
		"epoch_age_seconds", "stock_keys", "qber", "sifted_bps", "secret_bps", "fibre_up", "eve",
		"auth_bits_left", "auth_bits_used", "peer_alive", "rtt_seconds"} {
		if !bytes.Contains(data, []byte(`"`+name+`":`)) {
			t.Errorf("no %q in %s", name, data)
		}
	}
}

func TestCommands(t *testing.T) {
	var calls []any
	c := Dial(serve(t, Door{
		Status: func() Status { return Status{} },
		Rekey:  func() error { calls = append(calls, "rekey"); return nil },
		Fibre:  func(up bool) error { calls = append(calls, up); return nil },
		Eve: func(f float64) error {
			calls = append(calls, f)
			return nil
		},
	}))
	err := errors.Join(c.Rekey(t.Context()), c.Fibre(t.Context(), false), c.Fibre(t.Context(), true),
		c.Eve(t.Context(), 0.25))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]any{"rekey", false, true, 0.25}, calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if err := c.Eve(t.Context(), 1.5); !errors.Is(err, ErrRefused) || len(calls) != 4 {
		t.Errorf("eve 1.5: err = %v, calls %v", err, calls)
	}
}

func TestRefusals(t *testing.T) {
	broken := errors.New("fibre has no switch")
	c := Dial(serve(t, Door{
		Status: func() Status { return Status{Sim: &Sim{Eve: math.NaN()}} },
		Fibre:  func(bool) error { return broken },
	}))
	for name, tt := range map[string]struct {
		err  error
		want string
	}{
		"failed command":  {c.Fibre(t.Context(), true), broken.Error()},
		"no such command": {c.Rekey(t.Context()), "this daemon has no POST /v1/rekey"},
		"status with NaN": {second(c.Status(t.Context())), "status cannot be told"},
	} {
		if !errors.Is(tt.err, ErrRefused) || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: err = %v, want %v with %q", name, tt.err, ErrRefused, tt.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestNobodyThere(t *testing.T) {
	_, err := Dial(filepath.Join(t.TempDir(), "none.sock")).Status(t.Context())
	if !errors.Is(err, ErrDown) || strings.Contains(err.Error(), "http:") {
		t.Errorf("err = %v, want %v without a URL", err, ErrDown)
	}
}

func TestSocketModeAndOwner(t *testing.T) {
	path := serve(t, Door{Status: func() Status { return Status{} }})
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	if _, err := Listen(path, Door{}, nil); !errors.Is(err, ErrBusy) {
		t.Errorf("second daemon: err = %v, want %v", err, ErrBusy)
	}
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Errorf("after the second daemon was refused: %v", err)
	}
}

// TestTakeOver: what a killed daemon left is no hindrance, anything else is.
func TestTakeOver(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d.sock")
	old, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Listen(path, Door{}, nil)
	if err != nil {
		t.Fatalf("over a dead socket: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, Door{}, nil); err == nil {
		t.Error("took the place of a file")
	}
	if data, _ := os.ReadFile(file); string(data) != "precious" {
		t.Errorf("file now holds %q", data)
	}
}

func TestOnlyOwner(t *testing.T) {
	h := onlyOwner(Door{Status: func() Status { return Status{} }}.handler())
	me := uint32(os.Geteuid())
	for _, tt := range []struct {
		name string
		cred *unix.Ucred
		want int
	}{
		{"root", &unix.Ucred{Uid: 0}, http.StatusOK},
		{"own user", &unix.Ucred{Uid: me}, http.StatusOK},
		{"another user", &unix.Ucred{Uid: me + 1000}, http.StatusForbidden},
		{"unmapped user", &unix.Ucred{Uid: 65534}, http.StatusForbidden},
		{"unknown", nil, http.StatusForbidden},
	} {
		r := httptest.NewRequest("GET", "/v1/status", nil)
		if tt.cred != nil && tt.want == http.StatusForbidden && tt.cred.Uid == me {
			continue // the test runs as nobody, whom the kernel puts in for the unmapped
		}
		if tt.cred != nil {
			r = r.WithContext(context.WithValue(r.Context(), peerKey{}, tt.cred))
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, w.Code, tt.want)
		}
	}
}

// FuzzDoor: no request may crash the daemon or reach a command with a value
// out of range.
func FuzzDoor(f *testing.F) {
	f.Add("POST", "/v1/eve", []byte(`{"fraction": 1}`))
	f.Add("POST", "/v1/eve", []byte(`{"fraction": -1}`))
	f.Add("POST", "/v1/fibre", []byte(`{"up": null}`))
	f.Add("POST", "/v1/rekey", []byte(`{"now": true}`))
	f.Add("GET", "/v1/status", []byte(nil))
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		if !strings.HasPrefix(path, "/v1/") || strings.ContainsAny(path, " %?#\x7f") {
			return
		}
		r, err := http.NewRequest(method, "http://daemon"+path, bytes.NewReader(body))
		if err != nil {
			return
		}
		Door{
			Status: func() Status { return Status{} },
			Rekey:  func() error { return nil },
			Fibre:  func(bool) error { return nil },
			Eve: func(x float64) error {
				if !(x >= 0 && x <= 1) {
					t.Errorf("eve(%v)", x)
				}
				return nil
			},
		}.handler().ServeHTTP(httptest.NewRecorder(), r)
	})
}
