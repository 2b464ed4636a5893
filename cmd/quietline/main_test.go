package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"quietline": main,
		"control":   controlDaemon,
	})
}

// script runs the scripts of one verb.
func script(t *testing.T, verb string) {
	t.Helper()
	examples, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Files: []string{"testdata/" + verb + ".txtar"},
		Setup: func(env *testscript.Env) error {
			env.Setenv("EXAMPLES", examples+"/../../docs/examples")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":       exits,
			"awaitSocket": awaitSocket,
			"random":      random,
			"pki":         certificates,
			"spoilAudit":  spoilAudit,
			"unsealTakes": unsealTakes,
			"awaitSealed": awaitSealed,
		},
		RequireExplicitExec: true,
	})
}
