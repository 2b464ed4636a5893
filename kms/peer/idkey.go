package peer

import (
	"io"
	"slices"

	"github.com/quietline/quietline/kms"
)

// agreeIDKey settles the link's ID key at the start of a session: the KME
// whose ID sorts first draws it at the link's set-up and sends it; the other
// adopts it. Nothing is open then, so a new key renames nothing.
func (m *Machine) agreeIDKey(l *link) {
	if m.cfg.KME > l.remote.id || l.idAgreed {
		return
	}
	if l.idKey == nil {
		m.drawIDKey(l)
	}
	m.repeatIDKey(l, true)
}

// drawIDKey makes a new ID key.
func (m *Machine) drawIDKey(l *link) {
	key := make([]byte, IDKeySize)
	if _, err := io.ReadFull(m.cfg.Rand, key); err != nil {
		panic("read randomness: " + err.Error()) // crypto/rand never fails
	}
	m.setIDKey(l, key)
}

func (m *Machine) repeatIDKey(l *link, now bool) {
	r := l.remote
	if !r.up() || l.idAgreed || m.cfg.KME > r.id {
		return
	}
	if now {
		l.idTries = 0
	}
	if now || m.now >= l.idDue {
		m.send(r, message{kind: kIDKey, id: kms.SegmentID{Link: l.ID}, key: l.idKey})
		l.idDue = m.now + backoff(l.idTries)
		l.idTries++
	}
	r.due = min(r.due, l.idDue)
}

func (m *Machine) setIDKey(l *link, key []byte) {
	names, err := newNamer(key)
	if err != nil {
		return // the length is checked by the parser
	}
	l.idKey, l.names = key, names
	if m.out.IDKeys == nil {
		m.out.IDKeys = map[kms.LinkID][]byte{}
	}
	m.out.IDKeys[l.ID] = key
	m.change(kms.Change{Op: kms.OpLink, Segment: kms.SegmentID{Link: l.ID}})
}

func (m *Machine) idKeyReceived(l *link, key []byte) {
	if m.cfg.KME < l.remote.id {
		return // ours counts
	}
	if !slices.Equal(key, l.idKey) {
		if l.idAgreed {
			return // not within a session: IDs are out
		}
		m.setIDKey(l, slices.Clone(key))
	}
	l.idAgreed = true
	m.send(l.remote, message{kind: kIDKeyAck, id: kms.SegmentID{Link: l.ID}})
}

func (m *Machine) idKeyAcked(l *link) {
	if m.cfg.KME < l.remote.id {
		l.idAgreed = true
	}
}
