package control

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
)

func TestSecretsComeAcross(t *testing.T) {
	var got []string
	take := func(what string) func(context.Context, secret.Bytes) error {
		return func(_ context.Context, s secret.Bytes) error {
			got = append(got, what+" "+string(s.Expose()))
			return nil
		}
	}
	c := Dial(serve(t, Door{
		Status: func() Status { return Status{} },
		Unseal: take("unseal"),
		Seal:   func(context.Context) error { got = append(got, "seal"); return nil },
		Root: func(ctx context.Context, step RootStep, s secret.Bytes) error {
			if s.Len() == 64 {
				return errors.New("too much")
			}
			return take(string(step))(ctx, s)
		},
	}))
	key := secret.Copy([]byte("key"))
	err := errors.Join(c.Unseal(t.Context(), key), c.Seal(t.Context()),
		c.Root(t.Context(), RootAdmit, key), c.Root(t.Context(), RootReplace, key),
		c.Root(t.Context(), RootAdopt, secret.Bytes{}))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"unseal key", "seal", "admit key", "replace key", "adopt "}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	err = c.Root(t.Context(), RootAdmit, secret.New(64))
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "too much") {
		t.Errorf("refused: %v", err)
	}
	if err := c.Unseal(t.Context(), secret.New(65)); !errors.Is(err, errSecret) {
		t.Errorf("65 bytes: %v", err)
	}
}

// TestBodiesThatAreNoSecret are refused before anybody sees them.
func TestBodiesThatAreNoSecret(t *testing.T) {
	called := false
	c := Dial(serve(t, Door{Status: func() Status { return Status{} },
		Unseal: func(context.Context, secret.Bytes) error { called = true; return nil }}))
	long := make([]byte, secretBody)
	long[0] = secretMost + 1
	for name, body := range map[string][]byte{"nothing": nil, "JSON": []byte(`{"passphrase":"x"}`),
		"short": make([]byte, secretBody-1), "too long a secret": long} {
		_, err := c.post(t.Context(), http.MethodPost, "unseal", bytes.NewReader(body), int64(len(body)))
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "body is not a secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if called {
		t.Error("a body that is no secret was handed on")
	}
}

func FuzzReadSecret(f *testing.F) {
	f.Add([]byte{3, 'k', 'e', 'y'}, secretBody)
	f.Add([]byte{65}, secretBody)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, head []byte, size int) {
		if size < 0 || size > 2*secretBody {
			return
		}
		body := make([]byte, size)
		copy(body, head)
		s, err := readSecret(bytes.NewReader(body))
		if good := size >= secretBody && body[0] <= secretMost; good != (err == nil) {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if err == nil && !bytes.Equal(s.Expose(), body[1:1+body[0]]) {
			t.Error("another secret")
		}
	})
}
