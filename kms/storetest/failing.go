package storetest

import (
	"context"
	"errors"
	"fmt"

	"github.com/quietline/quietline/kms"
)

// ErrDisk is what a failing disk says.
var ErrDisk = errors.New("input/output error")

// Failing is a store whose disk fails at one commit, in one of the two forms
// that a caller cannot tell apart: the changes are on the disk, or they are
// not. From then on it answers kms.ErrStopped, as every store must.
type Failing struct {
	kms.Store
	// At is the commit that fails, counted from 1; 0 = none.
	At int
	// Stored says that the failing commit did reach the disk.
	Stored bool

	commits int
	stopped bool
}

// Commit implements kms.Store.
func (f *Failing) Commit(ctx context.Context, fence kms.Fence, changes []kms.Change) (
	kms.Position, error) {
	if f.stopped {
		return kms.Position{}, kms.ErrStopped
	}
	f.commits++
	if f.commits != f.At {
		return f.Store.Commit(ctx, fence, changes)
	}
	f.stopped = true
	if f.Stored {
		if _, err := f.Store.Commit(ctx, fence, changes); err != nil {
			return kms.Position{}, err
		}
	}
	return kms.Position{}, fmt.Errorf("commit: %w: %w", kms.ErrStopped, ErrDisk)
}

// Commits is how many commits were tried.
func (f *Failing) Commits() int { return f.commits }
