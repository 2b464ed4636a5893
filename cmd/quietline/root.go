package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/simulator"
)

// Exit codes of every verb.
const (
	exitOK      = 0
	exitFailure = 1 // the verb was understood and could not be done
	exitUsage   = 2 // the verb was not understood
)

// verbs makes the commands, in the order in which help shows them.
var verbs = []func() *cobra.Command{
	newKMECommand, newLineCommand, newSimCommand,
	newDemoCommand, newClientCommand, newDoctorCommand, newProbeCommand, newCheckCommand,
	newStatusCommand, newBenchCommand, newVersionCommand,
}

// run is the program; it returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return report(stderr, root.ExecuteContext(ctx))
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "quietline",
		Short: "Quietline: QKD key manager and line encryptor",
		Long: "Quietline keeps the lines between sites secret with keys from quantum key\n" +
			"distribution. One YAML file describes a site to all of its daemons.\n\n" +
			"Exit codes: 0 done, 1 not done, 2 not understood.",
		Args:          noArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("no verb is given"), "quietline help lists the verbs")
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(err, cmd.CommandPath()+" --help shows the flags")
	})
	for _, verb := range verbs {
		root.AddCommand(verb())
	}
	return root
}

// fault is an error with what a person can do about it.
type fault struct {
	err  error
	hint string // "" = none
	code int
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

// usage says that the command line was not understood.
func usage(err error, hint string) error { return &fault{err, hint, exitUsage} }

// hinted adds a hint to a failure.
func hinted(err error, hint string) error { return &fault{err, hint, exitFailure} }

// errReported ends a verb whose output has already told what is wrong.
var errReported = errors.New("already reported")

// report prints what went wrong, and a hint, and returns the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitOK
	}
	f := &fault{err: err, hint: hint(err), code: exitFailure}
	errors.As(err, &f)
	if errors.Is(err, errReported) {
		return f.code
	}
	var faults *config.Faults
	if errors.As(err, &faults) {
		fmt.Fprintf(w, "quietline: %s is refused: %s\n%v\n", faults.File,
			count(len(faults.List), "fault"), faults)
	} else {
		fmt.Fprintf(w, "quietline: %v\n", err)
	}
	if f.hint != "" {
		fmt.Fprintf(w, "hint: %s\n", f.hint)
	}
	return f.code
}

// hint knows what to do about faults that any verb can meet.
func hint(err error) string {
	var faults *config.Faults
	switch {
	case errors.As(err, &faults):
		return "docs/examples/site-tokyo.yaml shows and explains every key"
	case errors.Is(err, control.ErrBusy):
		return "quietline status shows it; stop it first"
	case errors.Is(err, control.ErrDown):
		return "start the daemon, or read its log to see why it stopped"
	case errors.Is(err, daemon.ErrNewerState), errors.Is(err, simulator.ErrNewerState),
		errors.Is(err, kms.ErrNewer):
		return "run the newer quietline, or restore a copy of the folder from before the upgrade"
	case errors.Is(err, kms.ErrRootKey):
		return "put back the root key that kme used last; docs/operations.md, wrong root key"
	case errors.Is(err, secret.ErrExposed):
		return "a secret must be readable by its owner only"
	case errors.Is(err, fs.ErrPermission):
		return "run it as the daemon's user or as root"
	case errors.Is(err, fs.ErrNotExist):
		return "paths in a site file count from the folder of that file"
	}
	return ""
}

// noArgs refuses arguments of a verb that takes none.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.HasSubCommands() {
		return usage(fmt.Errorf("%s has no verb %q", cmd.CommandPath(), args[0]),
			cmd.CommandPath()+" --help lists the verbs")
	}
	return usage(fmt.Errorf("%s takes no argument, found %q", cmd.CommandPath(), args[0]),
		cmd.CommandPath()+" --help shows its use")
}

// configFlag adds --config; loadConfig reads it.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "config", "", "the site's YAML `file`")
}

func loadConfig(cmd *cobra.Command, file string) (*config.Site, error) {
	if file == "" {
		return nil, usage(errors.New("--config is missing"),
			cmd.CommandPath()+" --config FILE; see docs/examples/site-tokyo.yaml")
	}
	return config.Load(file)
}

// count is "1 fault" or "3 faults".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
