package simulator

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/quietline/quietline/secret"
)

// stateSchema is the version of the state file this program writes.
const stateSchema = 1

// stateFile is the name inside the end's state folder.
const stateFile = "sim.json"

// state is what an end keeps over a restart: the highest generation it ever
// offered or used. It is on disk before the generation is used.
type state struct {
	path string

	Schema     int    `json:"schema"`
	Generation uint64 `json:"generation"`
}

// loadState reads a folder's state; a folder without one starts at zero.
func loadState(dir string) (*state, error) {
	s := &state{path: filepath.Join(dir, stateFile), Schema: stateSchema}
	data, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load simulator state: %w", err)
	}
	s.Schema = 0
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("load simulator state %s: %w", s.path, err)
	}
	switch {
	case s.Schema > stateSchema:
		return nil, fmt.Errorf("load simulator state %s: %w: schema %d, this program knows %d",
			s.path, ErrNewerState, s.Schema, stateSchema)
	case s.Schema < 1:
		return nil, fmt.Errorf("load simulator state %s: schema %d", s.path, s.Schema)
	}
	return s, nil
}

// raise makes generation, if it is higher than the present one, durable.
func (s *state) raise(generation uint64) error {
	if generation <= s.Generation {
		return nil
	}
	next := *s
	next.Generation = generation
	data, err := json.Marshal(&next)
	if err != nil {
		return fmt.Errorf("save simulator state: %w", err)
	}
	if err := secret.WriteFile(s.path, append(data, '\n')); err != nil {
		return fmt.Errorf("save simulator state: %w", err)
	}
	s.Generation = generation
	return nil
}
