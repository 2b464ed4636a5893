package enrol

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

// Kinds of files; they stand in the PEM block and in the key derivation.
const (
	inviteKind = "QUIETLINE INVITATION"
	replyKind  = "QUIETLINE REPLY"
)

// seal makes a file of a message: AES-256-GCM, random nonce, under a key of
// its own per token and kind.
func seal(t *Token, kind string, v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(text)
	gcm, err := fileKey(t, kind)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: gcm.Seal(nil, nil, text, nil)}), nil
}

func unseal(t *Token, kind string, file []byte, v any) error {
	block, _ := pem.Decode(file)
	if block == nil || block.Type != kind {
		return fmt.Errorf("%w: the file is no %s", ErrCard, kind)
	}
	gcm, err := fileKey(t, kind)
	if err != nil {
		return err
	}
	text, err := gcm.Open(nil, nil, block.Bytes, nil)
	if err != nil {
		return pki.Advise(fmt.Errorf("%w: the file does not open with token %s", ErrSecret, t.Number()),
			"take the file and the token of one invitation")
	}
	defer secret.Wipe(text)
	if err := strict(text, v); err != nil {
		return fmt.Errorf("%w: %w", ErrCard, err)
	}
	return nil
}

func fileKey(t *Token, kind string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, t.Secret[:], nil, "quietline enrolment file "+kind, 32)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// WriteFile writes the invitation for a site that cannot be reached: it goes
// on a stick, and the token another way.
func (inv *Invitation) WriteFile(path string) error {
	a, err := inv.answer()
	if err != nil {
		return fmt.Errorf("invite %s: %w", inv.token.To, err)
	}
	defer a.clear()
	text, err := seal(inv.token, inviteKind, a)
	if err != nil {
		return fmt.Errorf("invite %s: %w", inv.token.To, err)
	}
	return writeFile(path, text)
}

// ReadReply takes the file that came back and ends the invitation, if the
// person whom ask asks heard the fingerprint that the reply is signed with. It
// returns that.
func (inv *Invitation) ReadReply(ctx context.Context, path string, ask Ask) (string, error) {
	if err := inv.readReply(ctx, path, ask); err != nil {
		return "", fmt.Errorf("invite %s: %w", inv.token.To, err)
	}
	return inv.state.Bound, nil
}

func (inv *Invitation) readReply(ctx context.Context, path string, ask Ask) error {
	var s signedCard
	text, err := readFile(path)
	if err != nil {
		return err
	}
	if err := unseal(inv.token, replyKind, text, &s); err != nil {
		return err
	}
	c, print, err := inv.examine(&s, time.Now())
	if err != nil {
		return err
	}
	if inv.state.Bound != print {
		heard := inv.state.Expect
		if heard == "" {
			if heard, err = ask(ctx, c.Site); err != nil {
				return err
			}
		}
		if err := inv.settle(c.Site, print, heard, time.Now()); err != nil {
			return err
		}
	}
	if err := inv.accept(c); err != nil {
		return err
	}
	return inv.confirm()
}

// RunFiles takes the invitation's file, configures this site, and writes the
// reply that goes back.
func (j *Joining) RunFiles(invitation, reply string, now time.Time) error {
	err := j.token.expired(now)
	if j.state.Stored {
		err = nil
	}
	var a answer
	var text []byte
	if err == nil {
		text, err = readFile(invitation)
	}
	if err == nil {
		err = unseal(j.token, inviteKind, text, &a)
	}
	if err == nil {
		err = j.store(&a)
	}
	var card *signedCard
	if err == nil {
		_, card, err = j.card()
	}
	if err == nil {
		text, err = seal(j.token, replyKind, card)
	}
	if err == nil {
		err = writeFile(reply, text)
	}
	if err != nil {
		j.remember(err, now)
		return fmt.Errorf("join %s: %w", j.token.From, err)
	}
	return nil
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxFrame {
		err = fmt.Errorf("read %s: %w: %d bytes", path, ErrCard, info.Size())
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}
