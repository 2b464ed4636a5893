package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/pki"
)

// exits runs a program and holds its exit code: `exits 2 quietline …`. Its
// output can be matched by stdout and stderr afterwards.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code program args...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("run %s: %v", args[1], err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// awaitSocket waits for a daemon to listen: `awaitSocket path`.
func awaitSocket(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: awaitSocket path")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := control.Dial(ts.MkAbs(args[0]))
	for {
		_, err := client.Status(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("nobody listens: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// random makes a file of random bytes, mode 0600: `random 64 path`.
func random(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: random bytes path")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	b := make([]byte, n)
	_, _ = rand.Read(b)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o600))
}

// certificates makes what kme.txtar's key manager shows and trusts: `pki`.
func certificates(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: pki")
	}
	saes, err := pki.NewCA("SAEs", time.Hour)
	ts.Check(err)
	kmes, err := pki.NewCA("KMEs", time.Hour)
	ts.Check(err)
	ts.Check(saes.SaveCertificate(ts.MkAbs("sae.crt")))
	ts.Check(kmes.SaveCertificate(ts.MkAbs("ca.crt")))
	door, err := saes.Issue(pki.Request{CommonName: "door", DNS: []string{"localhost"},
		Server: true, Life: time.Hour})
	ts.Check(err)
	ts.Check(door.Save(ts.MkAbs("kme.crt"), ts.MkAbs("kme.key")))
	peer, err := kmes.Issue(pki.Request{CommonName: "peer", KME: "kme-tokyo", Server: true,
		Client: true, Life: time.Hour})
	ts.Check(err)
	ts.Check(peer.Save(ts.MkAbs("peer.crt"), ts.MkAbs("peer.key")))
}

// controlDaemon opens a control socket and tells the status of a daemon that
// has run for a while, until a signal ends it. It lets the verbs' tests show
// states that a real daemon reaches only after minutes.
func controlDaemon() {
	socket := flag.String("socket", "", "path")
	kind := flag.String("daemon", "line", "kme, line or sim")
	stuck := flag.Bool("stuck", false, "a rekeying never ends")
	flag.Parse()
	var epoch atomic.Uint64
	epoch.Store(6)
	door := control.Door{Status: func() control.Status { return statusOf(*kind, epoch.Load()) }}
	if *kind == "line" {
		door.Rekey = func() error {
			if !*stuck {
				epoch.Add(1)
			}
			return nil
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	s, err := control.Listen(*socket, door, nil)
	if err == nil {
		err = s.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func statusOf(kind string, epoch uint64) control.Status {
	ratio, bps, age, stock := 0.0153, 12345.0, 13.2, 42
	left := 86400.0
	s := control.Status{Daemon: kind, Simulated: true, Started: time.Unix(1e9, 0),
		Certificates: []control.Certificate{{File: "line.pem", Subject: "line-tokyo", Left: &left,
			NotAfter: time.Unix(2e9, 0), Due: time.Unix(1.9e9, 0), Fault: "no route to the authority"},
			{File: "kme.pem", Fault: "readable by others"}}}
	switch kind {
	case "kme":
		s.ID = "kme-tokyo"
		s.KME = &control.KME{Serving: false, Reason: "no session with kme-kochi", KeysDrawn: 3,
			Peers: []control.Peer{{KME: "kme-kochi", Reason: "no route"}},
			Links: []control.Link{{ID: "tokyo-kochi", Up: true, QBER: &ratio, SecretRate: &bps,
				Stored: 4096, Drawable: 2048}},
			Alarms: []string{"peer remembers more than we have"}}
	case "line":
		s.ID = "tokyo-kochi"
		s.Line = &control.Line{Policy: "qkd-strict", Level: "QKD", Since: time.Unix(1e9, 0),
			Epoch: epoch, Age: &age, Stock: &stock, Rekeys: epoch - 1}
	case "sim":
		s.ID = "tokyo-kochi"
		s.Sim = &control.Sim{Role: "alice", Preset: "metro", Eve: 0.5, Reason: "no light arrives",
			QBER: &ratio}
	}
	return s
}
