package peer

import (
	"fmt"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// couple is two machines that talk without loss, with a round trip of rtt, and
// counts what that takes. Commits are counted and not made.
type couple struct {
	m              [2]*Machine
	now            time.Duration
	half           time.Duration // a way between them
	net            []packet
	block          uint64
	ticket, length uint64

	counts
	keys   []KeyRef // answered
	failed error
}

// counts are of both machines.
type counts struct{ messages, bytes, commits, changes int }

func newCouple(tb testing.TB, pairs int, rtt time.Duration) *couple {
	tb.Helper()
	c := &couple{now: time.Second, half: rtt / 2}
	at := map[etsi014.SAEID]etsi014.KMEID{}
	for i := range pairs {
		at[left(i)], at[right(i)] = "a", "b"
	}
	for i, id := range []etsi014.KMEID{"a", "b"} {
		m, err := New(Config{KME: id, Links: []Link{{ID: "l", Peer: peerOf(id)}}, SAEs: at,
			Rand: simRand{newWorld(1, histories{}).rng}}, Snapshot{})
		if err != nil {
			tb.Fatal(err)
		}
		c.m[i] = m
	}
	for i := range c.m {
		c.feed(i, Boot{})
	}
	for i := range c.m {
		c.feed(i, Connected{Peer: peerOf(c.m[i].cfg.KME)})
	}
	c.run(10 * time.Second)
	if !c.m[0].ordered[0].up() {
		tb.Fatal("no session: " + c.m[0].ordered[0].reason)
	}
	return c
}

func left(i int) etsi014.SAEID  { return etsi014.SAEID(fmt.Sprint("left", i)) }
func right(i int) etsi014.SAEID { return etsi014.SAEID(fmt.Sprint("right", i)) }

// feed steps a machine and takes what comes out.
func (c *couple) feed(i int, inputs ...Input) {
	for len(inputs) > 0 {
		out := c.m[i].Step(c.now, inputs...)
		inputs = nil
		for _, m := range out.Messages {
			c.messages++
			c.bytes += len(m.Data)
			c.net = append(c.net, packet{1 - i, m.Data, c.now + c.half})
		}
		if len(out.Changes) > 0 {
			c.commits++
			c.changes += len(out.Changes)
			c.length++
			inputs = append(inputs, Durable{kms.Position{Length: c.length}})
		}
		for _, a := range out.Answers {
			c.keys = append(c.keys, a.Keys...)
			if a.Err != nil {
				c.failed = a.Err
			}
		}
		for _, l := range out.Lookups {
			inputs = append(inputs, Looked{Peer: l.Peer, Length: l.Length, Found: true})
		}
	}
}

// run lets time pass.
func (c *couple) run(d time.Duration) {
	for end := c.now + d; c.now < end; {
		next := end
		for i := range c.m {
			if at := c.m[i].wakeAt; at > c.now {
				next = min(next, at)
			}
		}
		if len(c.net) > 0 {
			next = min(next, max(c.net[0].at, c.now))
		}
		c.now = next
		for len(c.net) > 0 && c.net[0].at <= c.now {
			p := c.net[0]
			c.net = c.net[1:]
			c.feed(p.to, Received{Peer: c.m[1-p.to].cfg.KME, Data: p.data})
		}
		for i := range c.m {
			if c.m[i].wakeAt <= c.now {
				c.feed(i, Tick{})
			}
		}
	}
}

// ingest gives both a block.
func (c *couple) ingest(tb testing.TB, slots int) {
	c.block++
	for i := range c.m {
		seg, _, err := Cut(kms.SegmentID{Link: "l", Generation: 1, Number: c.block},
			c.m[i].cfg.KME, c.m[1-i].cfg.KME, Weights{}, false, make([]byte, Reserved+slots*SlotBytes))
		if err != nil {
			tb.Fatal(err)
		}
		c.ticket++
		c.feed(i, Ingested{Ticket: c.ticket, Segment: seg})
	}
}

func (c *couple) draw(pair, n int) Draw {
	c.ticket++
	return Draw{Ticket: c.ticket, Initiator: left(pair), Targets: []etsi014.SAEID{right(pair)},
		Number: n, SizeBits: 256}
}

// BenchmarkDraws draws and fetches in commits of 1 or 16 calls, at a pace of
// 5,000 a second, and tells what 1,000 of them cost beside time: messages and
// their bytes, commits and changes of both KMEs together.
func BenchmarkDraws(b *testing.B) {
	for _, rtt := range []time.Duration{time.Millisecond, 10 * time.Millisecond} {
		for _, batch := range []int{1, 16} {
			b.Run(fmt.Sprintf("rtt=%v/batch=%d", rtt, batch), func(b *testing.B) {
				benchDraws(b, rtt, batch)
			})
		}
	}
}

func benchDraws(b *testing.B, rtt time.Duration, batch int) {
	const slots = 2048
	c := newCouple(b, 1, rtt)
	draws, spent := 0, counts{}
	draws1 := make([]Input, batch)
	fetches := make([]Input, 0, 2*batch)
	for range 8 {
		c.ingest(b, slots)
	}
	b.ReportAllocs()
	for b.Loop() {
		if draws%slots < batch {
			c.ingest(b, slots)
			c.ingest(b, slots)
			c.run(time.Second)
		}
		before := c.counts
		for i := range draws1 {
			draws1[i] = c.draw(0, 1)
		}
		c.feed(0, draws1...)
		c.run(time.Duration(batch) * time.Second / 5000)
		fetches = fetches[:0]
		for _, k := range c.keys {
			c.ticket++
			fetches = append(fetches, Fetch{Ticket: c.ticket, Target: right(0), Initiator: left(0),
				IDs: []etsi014.KeyID{k.ID}})
		}
		c.keys = c.keys[:0]
		if len(fetches) > 0 {
			c.feed(1, fetches...)
			c.keys = c.keys[:0]
		}
		draws += batch
		spent = spent.plus(c.counts, before)
		if c.failed != nil {
			b.Fatal(c.failed)
		}
	}
	per := float64(draws) / 1000
	b.ReportMetric(float64(spent.messages)/per, "messages/1000")
	b.ReportMetric(float64(spent.bytes)/per, "bytes/1000")
	b.ReportMetric(float64(spent.commits)/per, "commits/1000")
	b.ReportMetric(float64(spent.changes)/per, "changes/1000")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(draws), "ns/draw")
}

func (c counts) plus(after, before counts) counts {
	return counts{c.messages + after.messages - before.messages, c.bytes + after.bytes - before.bytes,
		c.commits + after.commits - before.commits, c.changes + after.changes - before.changes}
}
