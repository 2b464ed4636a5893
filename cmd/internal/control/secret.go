package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/quietline/quietline/secret"
)

// A secret body is a byte for the length, the secret, and zeros up to this
// size, which is a multiple of the buffers that net/http reads through: the
// zeros wash the secret out of them.
const (
	secretBody = 32 << 10
	secretMost = 64
	sip        = 512 // read at a time, less than such a buffer, so that none is passed by
)

var errSecret = errors.New("body is not a secret of at most 64 bytes with zeros behind it")

// readSecret takes the secret out of a body; the caller clears it.
func readSecret(body io.Reader) (secret.Bytes, error) {
	var b [sip]byte
	defer clear(b[:])
	if _, err := io.ReadFull(body, b[:]); err != nil || b[0] > secretMost {
		return secret.Bytes{}, errSecret
	}
	s := secret.Copy(b[1 : 1+b[0]])
	for left := secretBody - sip; left > 0; left -= sip {
		if _, err := io.ReadFull(body, b[:]); err != nil {
			s.Clear()
			return secret.Bytes{}, errSecret
		}
	}
	return s, nil
}

// withSecret hands the secret of a request to do, clears it, and answers {} or
// the refusal.
func withSecret(w http.ResponseWriter, r *http.Request,
	do func(ctx context.Context, s secret.Bytes) error) {
	s, err := readSecret(r.Body)
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error(), "")
		return
	}
	defer s.Clear()
	if err := do(r.Context(), s); err != nil {
		refuse(w, http.StatusConflict, err.Error(), "")
		return
	}
	answer(w, struct{}{})
}

// seals adds the commands around the root key to a door.
func (d Door) seals(mux *http.ServeMux) {
	if d.Unseal != nil {
		mux.HandleFunc("POST /v1/unseal", func(w http.ResponseWriter, r *http.Request) {
			withSecret(w, r, d.Unseal)
		})
	}
	if d.Seal != nil {
		mux.HandleFunc("POST /v1/seal", func(w http.ResponseWriter, r *http.Request) {
			command(w, r, &struct{}{}, func() error { return d.Seal(r.Context()) })
		})
	}
	if d.Root == nil {
		return
	}
	for _, step := range []RootStep{RootAdmit, RootReplace, RootAdopt} {
		mux.HandleFunc("POST /v1/root/"+string(step), func(w http.ResponseWriter, r *http.Request) {
			withSecret(w, r, func(ctx context.Context, s secret.Bytes) error {
				return d.Root(ctx, step, s)
			})
		})
	}
}

// RootStep is a step of a change of the root key.
type RootStep string

// The steps, in their order.
const (
	RootAdmit   RootStep = "admit"   // with the new root key, which then opens too
	RootReplace RootStep = "replace" // the same, instead of one admitted before
	// RootAdopt has the key manager read its root key where the site file says
	// and go over to it; with the key of its passphrase, or nothing.
	RootAdopt RootStep = "adopt"
)

// Unseal gives a sealed key manager the key of the passphrase
// (keyring.SealedRoot.Key). It stays the caller's.
func (c *Client) Unseal(ctx context.Context, key secret.Bytes) error {
	return c.tell(ctx, "unseal", key)
}

// Seal has a key manager drop its keys until it is unsealed again.
func (c *Client) Seal(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "seal", struct{}{}, nil)
}

// Root takes a step of a change of the root key. The key stays the caller's.
func (c *Client) Root(ctx context.Context, step RootStep, key secret.Bytes) error {
	return c.tell(ctx, "root/"+string(step), key)
}

// sips hands out little at a time, for the buffers on our own side.
type sips struct{ from *bytes.Reader }

func (s sips) Read(b []byte) (int, error) { return s.from.Read(b[:min(len(b), sip)]) }

// tell sends a secret.
func (c *Client) tell(ctx context.Context, name string, s secret.Bytes) error {
	if s.Len() > secretMost {
		return fmt.Errorf("ask %s: %w", name, errSecret)
	}
	body := make([]byte, secretBody)
	defer clear(body)
	body[0] = byte(s.Len())
	copy(body[1:], s.Expose())
	res, err := c.post(ctx, http.MethodPost, name, sips{bytes.NewReader(body)}, secretBody)
	if err != nil {
		return err
	}
	return res.Body.Close()
}
