package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/quietline/quietline/secret"
)

// schema is the layout of the state folder that this program writes.
const schema = 1

// Errors of the state folder.
var (
	// ErrNewerState: a newer program wrote the folder; this one would damage it.
	ErrNewerState = errors.New("state folder was written by a newer program")
	// ErrState: the folder is not one of ours, or is damaged.
	ErrState = errors.New("state folder is not valid")
	// ErrOpenState: anybody may put files into the folder, an old store for one.
	ErrOpenState = errors.New("state folder is open to everybody")
)

// openState makes the state folder if need be, and refuses one that a newer
// program wrote. The daemons of a site share it, each in a corner of its own.
func openState(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make state folder: %w", err)
	}
	if info, err := os.Stat(dir); err != nil {
		return fmt.Errorf("look at state folder: %w", err)
	} else if mode := info.Mode().Perm(); mode&0o002 != 0 {
		return fmt.Errorf("%w (mode %#o); run: chmod 700 %s", ErrOpenState, mode, dir)
	}
	path := filepath.Join(dir, "schema")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return secret.WriteFile(path, fmt.Appendf(nil, "%d\n", schema))
	}
	if err != nil {
		return fmt.Errorf("read state folder: %w", err)
	}
	found, err := strconv.Atoi(strings.TrimSpace(string(data)))
	switch {
	case err != nil || found < 1:
		return fmt.Errorf("read %s: %w: it holds %.20q, expected a number", path, ErrState, data)
	case found > schema:
		return fmt.Errorf("read %s: %w: it has schema %d, this program knows %d",
			path, ErrNewerState, found, schema)
	}
	return nil
}
