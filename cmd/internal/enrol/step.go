package enrol

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// step is called after each durable change of an enrolment. Only the test that
// kills the process at every one of them puts something else here.
var step = func() {}

func writeFile(path string, text []byte) error {
	err := secret.WriteFile(path, text)
	step()
	return err
}

func writeSecret(path string, b secret.Bytes) error {
	err := bundle.WriteSecret(path, b)
	step()
	return err
}

// destroy overwrites a file, or every file below a folder, with random bytes,
// then removes it; one that is not there is no fault. Overwriting is worth
// something where a file keeps its blocks: ext4 or XFS on a plain disk. Flash
// and copy-on-write file systems keep the old bytes for a while whatever a
// program does: there only an encrypted disk helps.
func destroy(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.IsDir() {
		inside, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		for _, e := range inside {
			if err := destroy(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	} else if info.Mode().IsRegular() {
		if err := overwrite(path, info.Size()); err != nil {
			return err
		}
		step()
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	step()
	return secret.SyncDir(filepath.Dir(path))
}

func overwrite(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	noise := make([]byte, size)
	_, _ = rand.Read(noise) // never fails, see crypto/rand
	if _, err = f.WriteAt(noise, 0); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
