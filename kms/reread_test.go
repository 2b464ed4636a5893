package kms

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// once is a pool that hands out each key once, and takes a while for it.
type once struct {
	recorder
	mu    sync.Mutex
	taken map[etsi014.KeyID]bool
	slow  time.Duration
	calls int
}

func (o *once) Fetch(ctx context.Context, _, _ etsi014.SAEID, ids []etsi014.KeyID) (
	keys []etsi014.Key, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	for i, id := range ids {
		for j := range i {
			if ids[j] == id {
				return nil, etsi014.ErrUnknownKey
			}
		}
		if o.taken[id] {
			return nil, etsi014.ErrUnknownKey
		}
	}
	for _, id := range ids {
		o.taken[id] = true
		keys = append(keys, etsi014.Key{ID: id, Bits: secret.Copy(bytes.Repeat(id[:1], 32))})
	}
	select {
	case <-time.After(o.slow):
		return keys, nil
	case <-ctx.Done(): // taken, and the answer is lost
		return nil, &etsi014.Error{Kind: etsi014.ErrDown, Cause: ctx.Err()}
	}
}

func rereadKME(t *testing.T, window time.Duration) (*KME, *once) {
	t.Helper()
	o := &once{taken: map[etsi014.KeyID]bool{}}
	o.refused = map[string]int{}
	return withAllowances(t, o, map[etsi014.SAEID]Allowance{"line": {Reread: window}}), o
}

// TestRereadIsCounted: what was given again is told, for the audit log, and
// nothing else is.
func TestRereadIsCounted(t *testing.T) {
	k, pool := rereadKME(t, time.Minute)
	for i, step := range []struct {
		ids  []byte
		want int64 // in all
	}{{[]byte{1, 2}, 0}, {[]byte{1, 2}, 2}, {[]byte{2, 3}, 3}, {[]byte{4}, 3}} {
		if err := fetchIDs(t.Context(), k, "line", 1, step.ids...); err != nil {
			t.Fatal(err)
		}
		if n := pool.reread.Load(); n != step.want {
			t.Errorf("step %d: %d keys told as given again, want %d", i, n, step.want)
		}
	}
	k.Forget()
}

func fetchIDs(ctx context.Context, k *KME, who etsi014.SAEID, cert byte, ids ...byte) error {
	req := etsi014.IDRequest{Initiator: "far"}
	for _, b := range ids {
		req.IDs = append(req.IDs, etsi014.KeyID{b})
	}
	got, err := k.KeysByID(ctx, etsi014.Caller{SAE: who, Cert: [32]byte{cert}}, req)
	defer got.Clear() // the caller's copy; what is held must live on
	if err != nil {
		return err
	}
	for i, b := range ids {
		if got.Keys[i].ID != req.IDs[i] || !bytes.Equal(got.Keys[i].Bits.Expose(),
			bytes.Repeat([]byte{b}, 32)) {
			return errors.New("other bytes than the first time")
		}
	}
	return nil
}

func TestReread(t *testing.T) {
	const window = 2 * time.Second
	type step struct {
		after time.Duration
		who   etsi014.SAEID
		cert  byte
		ids   []byte
		want  error
	}
	unknown := etsi014.ErrUnknownKey
	for name, steps := range map[string][]step{
		"same bytes within the window": {{0, "line", 1, []byte{1, 2}, nil},
			{time.Second, "line", 1, []byte{1, 2}, nil}, {0, "line", 1, []byte{2}, nil}},
		"not after it": {{0, "line", 1, []byte{1}, nil}, {window, "line", 1, []byte{1}, unknown}},
		"a second look does not lengthen it": {{0, "line", 1, []byte{1}, nil},
			{1500 * time.Millisecond, "line", 1, []byte{1}, nil},
			{1500 * time.Millisecond, "line", 1, []byte{1}, unknown}},
		"another certificate": {{0, "line", 1, []byte{1}, nil}, {0, "line", 2, []byte{1}, unknown},
			{0, "line", 1, []byte{1}, nil}},
		"another SAE":    {{0, "line", 1, []byte{1}, nil}, {0, "hungry", 1, []byte{1}, unknown}},
		"no window":      {{0, "hungry", 1, []byte{1}, nil}, {0, "hungry", 1, []byte{1}, unknown}},
		"no certificate": {{0, "line", 0, []byte{1}, nil}, {0, "line", 0, []byte{1}, unknown}},
		"old and new together": {{0, "line", 1, []byte{2}, nil},
			{time.Second, "line", 1, []byte{1, 2, 3}, nil},
			{time.Second, "line", 1, []byte{1, 3}, nil}, {0, "line", 1, []byte{2}, unknown}},
		"one that is gone spoils all": {{0, "hungry", 1, []byte{9}, nil},
			{0, "line", 1, []byte{1}, nil},
			{0, "line", 1, []byte{1, 9}, unknown}, {0, "line", 1, []byte{1}, nil}},
		"an ID named twice": {{0, "line", 1, []byte{1, 1}, unknown}, {0, "line", 1, []byte{1}, nil},
			{0, "line", 1, []byte{1, 1}, unknown}},
	} {
		synctest.Test(t, func(t *testing.T) {
			k, _ := rereadKME(t, window)
			for i, s := range steps {
				time.Sleep(s.after)
				synctest.Wait()
				if err := fetchIDs(t.Context(), k, s.who, s.cert, s.ids...); !errors.Is(err, s.want) ||
					s.want == nil && err != nil {
					t.Errorf("%s: step %d: %v, want %v", name, i, err, s.want)
				}
			}
			time.Sleep(window)
		})
	}
}

// TestRereadAfterHangUp: the caller went away while its keys were taken; they
// are there when it comes back, also when it is back before they are.
func TestRereadAfterHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, pool := rereadKME(t, 10*time.Second)
		pool.slow = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		go func() { _ = fetchIDs(ctx, k, "line", 1, 1) }()
		time.Sleep(time.Second * 3 / 4)
		if err := fetchIDs(t.Context(), k, "line", 1, 1); err != nil || pool.calls != 1 {
			t.Errorf("again: %v after %d fetches", err, pool.calls)
		}
		time.Sleep(time.Minute)
	})
}

// TestRereadIsWiped: after the window, after too many keys and after Forget no
// byte is left where it was.
func TestRereadIsWiped(t *testing.T) {
	for name, end := range map[string]func(*KME){
		"window": func(*KME) { time.Sleep(time.Second); synctest.Wait() },
		"forget": (*KME).Forget,
		"too many": func(k *KME) {
			for i := range rereadKeys {
				id := etsi014.KeyID{7, byte(i), byte(i >> 8)}
				got, err := k.KeysByID(context.Background(), etsi014.Caller{SAE: "line",
					Cert: [32]byte{1}}, etsi014.IDRequest{Initiator: "far", IDs: []etsi014.KeyID{id}})
				if err != nil {
					panic(err)
				}
				got.Clear()
			}
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			k, _ := rereadKME(t, time.Second)
			if err := fetchIDs(t.Context(), k, "line", 1, 5); err != nil {
				t.Fatal(err)
			}
			s := k.terms.Load().shelves["line"]
			s.mu.Lock()
			held := s.held[etsi014.KeyID{5}].bits.Expose()
			s.mu.Unlock()
			if !bytes.Equal(held, bytes.Repeat([]byte{5}, 32)) {
				t.Fatalf("%s: not held", name)
			}
			end(k)
			s.mu.Lock()
			if !bytes.Equal(held, make([]byte, 32)) {
				t.Errorf("%s: the bytes are still there", name)
			}
			if s.held[etsi014.KeyID{5}] != nil || len(s.order) > rereadKeys {
				t.Errorf("%s: %d keys are held", name, len(s.order))
			}
			s.mu.Unlock()
			time.Sleep(time.Second) // timers end
		})
	}
}
