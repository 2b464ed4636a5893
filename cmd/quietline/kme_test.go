package main

import (
	"context"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/quietline/quietline/cmd/internal/control"
)

func TestKME(t *testing.T) { script(t, "kme") }

func TestKMESeal(t *testing.T) { script(t, "kme-seal") }

// unsealTakes waits out the pause after wrong passphrases and unseals with a
// file: `unsealTakes file`.
func unsealTakes(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: unsealTakes file")
	}
	ts.Check(ts.Exec("chmod", "600", args[0]))
	deadline := time.Now().Add(20 * time.Second)
	for ts.Exec("quietline", "kme", "unseal", "--config", "site.yaml",
		"--passphrase-file", args[0]) != nil {
		if time.Now().After(deadline) {
			ts.Fatalf("it stays sealed")
		}
	}
}

// awaitSealed waits until a key manager says that it is sealed: `awaitSealed
// socket`.
func awaitSealed(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: awaitSealed socket")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := control.Dial(ts.MkAbs(args[0]))
	for {
		s, err := client.Status(ctx)
		ts.Check(err)
		if s.KME.Sealed {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
