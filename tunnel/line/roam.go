package line

import "time"

// sender is where the burst in hand came from; the zero Endpoint for a peer
// whose endpoint is fixed.
func (l *Line) sender() Endpoint {
	if l.roaming == nil {
		return Endpoint{}
	}
	return l.roaming.Sender()
}

// adopt follows a peer that roams, after its newest record of an epoch. The
// epoch before counts no longer once the peer has been heard in the next: its
// late records come from where the peer was.
func (l *Line) adopt(epoch *receiving) {
	table := *l.receiving.Load()
	if len(table) == 0 {
		return // retired while the datagram was in our hands
	}
	if last := table[len(table)-1]; last != epoch && last.heard.Load() {
		return
	}
	if now, changed := l.roaming.Adopt(); changed {
		l.moves.Add(1)
		l.log.Info("peer has another endpoint", "addr", now.Peer.String())
	}
}

// partner is who last sent a handshake datagram that was answered.
type partner struct {
	Endpoint
	at time.Time
}

// partnerFor is how long a partner gets what the machine says later of itself:
// a handshake waits no longer for the key manager.
const partnerFor = 10 * time.Second

// noteAnswer makes the sender of the datagram in hand the partner.
func (o *owner) noteAnswer() {
	if o.roaming != nil && o.answer != (Endpoint{}) {
		o.partner = partner{o.answer, time.Now()}
	}
}

// handshake sends a datagram of the handshake: as an answer to whoever sent the
// one in hand, or to the peer, and to a partner that may be the peer at another
// place. Nobody is adopted for it. What a stranger gets is bounded by the
// machine's cookies; he must make a record to be believed.
func (o *owner) handshake(d []byte) error {
	b := Burst{Data: d, Size: len(d)}
	o.noteAnswer()
	if o.roaming != nil && o.answer != (Endpoint{}) {
		return o.roaming.WriteTo(b, &o.partner.Endpoint)
	}
	err := o.cfg.Conn.Write(b)
	if o.roaming != nil && o.partner.Peer.IsValid() && time.Since(o.partner.at) < partnerFor {
		_ = o.roaming.WriteTo(b, &o.partner.Endpoint)
	}
	return err
}
