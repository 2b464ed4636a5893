// Package etsi014 speaks ETSI GS QKD 014 V1.1.1, the REST API by which an
// application (SAE) draws keys from its key manager (KME).
//
// [KME] is the contract a key manager fulfils; [Handler] puts it behind HTTP,
// [Client] is the other end. Inside, a request names an initiator and a list
// of targets; the first edition's words (master, slave) stand only in the
// JSON and the paths.
//
// A caller must keep in mind that a key leaves the KME once: a repeated call
// draws another key, and a lost answer is a lost key. Sizes are bits at this
// API only where a name ends in Bits, as in the standard's clause 6.
package etsi014

import (
	"context"

	"github.com/quietline/quietline/secret"
)

// SAEID names a secure application entity: 1 to 291 characters.
type SAEID string

// KMEID names a key management entity.
type KMEID string

// Caller is who asks, as the transport authenticated it.
type Caller struct {
	SAE SAEID
	// Cert is the SHA-256 of the caller's leaf certificate. A re-read window
	// is bound to it; zero where the transport has no certificate.
	Cert [32]byte
}

// KME is what stands behind the door: one key manager. Implementations are
// safe for concurrent use. Errors are [*Error] values or wrap one of the
// sentinels in errors.go; anything else is answered 503.
type KME interface {
	// Status tells what the pair (who, peer) can draw; clause 6.1.
	Status(ctx context.Context, who Caller, peer SAEID) (Status, error)
	// Keys draws new keys for who and the targets, durably before it
	// returns: all or none; clause 6.2.
	Keys(ctx context.Context, who Caller, req KeyRequest) (Container, error)
	// KeysByID hands who the keys that req.Initiator drew for it: all or
	// none, in the order asked; clause 6.3.
	KeysByID(ctx context.Context, who Caller, req IDRequest) (Container, error)
}

// Status is table 8 of the standard. Sizes are bits.
type Status struct {
	SourceKME, TargetKME KMEID
	Initiator, Target    SAEID
	KeySizeBits          int
	StoredKeys           int // drawable now, of KeySizeBits each
	MaxKeys              int
	MaxKeysPerRequest    int
	MaxKeySizeBits       int
	MinKeySizeBits       int
	MaxTargets           int // additional targets; 0 = no multicast
	Extension            map[string]any
}

// KeyRequest asks for new keys; table 9.
type KeyRequest struct {
	Targets   []SAEID // first is the path's, the rest additional_slave_SAE_IDs
	Number    int     // keys wanted, 0 = the default of 1
	SizeBits  int     // bits per key, 0 = the KME's default
	Mandatory []Extension
	Optional  []Extension
}

// Extension is one member of extension_mandatory or extension_optional.
type Extension map[string]any

// IDRequest asks for keys by key_ID; tables 11 and 12.
type IDRequest struct {
	Initiator SAEID
	IDs       []KeyID
}

// Key is one key of a container.
type Key struct {
	ID   KeyID
	Bits secret.Bytes
}

// Container is table 10: keys in the order drawn or asked. It owns its bytes;
// whoever receives it calls Clear after use.
type Container struct {
	Keys      []Key
	Extension map[string]any
}

// Clear wipes every key of the container.
func (c Container) Clear() {
	for i := range c.Keys {
		c.Keys[i].Bits.Clear()
	}
}
