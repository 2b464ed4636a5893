package etsi014

import (
	"encoding/hex"
	"errors"
)

// KeyID is a key_ID: a UUID (RFC 9562). It says nothing about the key.
type KeyID [16]byte

// ErrKeyID says that a text is not a UUID.
var ErrKeyID = errors.New("key_ID is not a UUID")

// ParseKeyID reads the 36-character form, in either case.
func ParseKeyID(s string) (KeyID, error) {
	var id KeyID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, ErrKeyID
	}
	digits := s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36]
	if _, err := hex.Decode(id[:], []byte(digits)); err != nil {
		return KeyID{}, ErrKeyID
	}
	return id, nil
}

// String is the lower-case 36-character form.
func (id KeyID) String() string {
	b, _ := id.AppendText(make([]byte, 0, 36))
	return string(b)
}

// AppendText appends the lower-case 36-character form.
func (id KeyID) AppendText(b []byte) ([]byte, error) {
	b = hex.AppendEncode(b, id[0:4])
	b = append(b, '-')
	b = hex.AppendEncode(b, id[4:6])
	b = append(b, '-')
	b = hex.AppendEncode(b, id[6:8])
	b = append(b, '-')
	b = hex.AppendEncode(b, id[8:10])
	b = append(b, '-')
	return hex.AppendEncode(b, id[10:16]), nil
}

// MarshalText implements [encoding.TextMarshaler].
func (id KeyID) MarshalText() ([]byte, error) { return id.AppendText(make([]byte, 0, 36)) }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (id *KeyID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseKeyID(string(b))
	return err
}
