package rekey

import "fmt"

// Policy says what an epoch of the line must rest on, and what happens when
// there is no QKD key. It is set at both ends and never negotiated.
type Policy uint8

// Policies, weakest first. X25519, ML-KEM and the link secret always run.
const (
	PQCOnly      Policy = iota + 1 // no QKD is expected on this line
	QKDPreferred                   // QKD when present, else chained, else PQC with an alarm
	QKDRequired                    // a fresh QKD key, or chained from one for a bounded time
	QKDStrict                      // a fresh QKD key in every epoch, else hold, then block
	OTPPreferred                   // as QKDRequired, payload under pad while there is pad
	OTPStrict                      // as QKDStrict, payload under pad or not at all
)

var policyNames = [...]string{
	PQCOnly: "pqc-only", QKDPreferred: "qkd-preferred", QKDRequired: "qkd-required",
	QKDStrict: "qkd-strict", OTPPreferred: "otp-preferred", OTPStrict: "otp-strict",
}

// ParsePolicy reads the name used in configuration files. Any other word is
// refused with [ErrPolicy].
func ParsePolicy(name string) (Policy, error) {
	for p := PQCOnly; p <= OTPStrict; p++ {
		if policyNames[p] == name {
			return p, nil
		}
	}
	return 0, fmt.Errorf("parse policy %q: %w", name, ErrPolicy)
}

// String is the name used in configuration files.
func (p Policy) String() string {
	if p < PQCOnly || p > OTPStrict {
		return fmt.Sprintf("policy(%d)", uint8(p))
	}
	return policyNames[p]
}

func (p Policy) check() error {
	if p < PQCOnly || p > OTPStrict {
		return fmt.Errorf("use policy %d: %w", uint8(p), ErrPolicy)
	}
	return nil
}

// Pad tells whether the policy wants payload under one-time pad.
func (p Policy) Pad() bool { return p >= OTPPreferred }

// floor is the weakest level that the policy lets a line have, as both ends
// state it. An epoch itself is never above QKD: the pad is the data plane's.
func (p Policy) floor() Level {
	switch p {
	case OTPStrict:
		return OTP
	case QKDStrict:
		return QKD
	case QKDRequired, OTPPreferred:
		return Chained
	}
	return PQC
}

// offer is the strongest level that the policy can bring to a line.
func (p Policy) offer() Level {
	switch {
	case p == PQCOnly:
		return PQC
	case p.Pad():
		return OTP
	}
	return QKD
}
