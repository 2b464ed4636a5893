package secret

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// ErrExposed says that others than the owner can read a secret file.
var ErrExposed = errors.New("file is readable by others")

// WriteFile writes data to path so that after a power cut the file holds the
// old bytes or the new ones, never a mixture: temporary file in the same
// folder, fsync, rename, fsync of the folder. The mode is 0600.
func WriteFile(path string, data []byte) error { return WriteFileMode(path, data, 0o600) }

// WriteFileMode is [WriteFile] with another mode, for what is not secret.
func WriteFileMode(path string, data []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err = f.Chmod(mode); err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes the names in a folder durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// ReadFile reads a secret file of at most max bytes. It refuses, with
// [ErrExposed], a file whose mode lets group or others read or write it.
func ReadFile(path string, max int) (Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return Bytes{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Bytes{}, err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return Bytes{}, fmt.Errorf("read %s: %w (mode %04o); run: chmod 600 %s", path, ErrExposed, mode, path)
	}
	if info.Size() > int64(max) {
		return Bytes{}, fmt.Errorf("read %s: %d bytes, at most %d are expected", path, info.Size(), max)
	}
	s := New(int(info.Size()))
	if _, err := io.ReadFull(f, s.Expose()); err != nil {
		s.Clear()
		return Bytes{}, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}
