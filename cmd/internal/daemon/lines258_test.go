package daemon

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tunneltest"
)

// numbered is an IPv4 packet with a number.
func numbered(n uint64) []byte {
	p := make([]byte, 200)
	p[0], p[3] = 0x45, 200
	binary.BigEndian.PutUint64(p[20:], n)
	return p
}

// TestLines258: so many lines as the field's best published system has
// channels, each with a fresh QKD key a second from one key manager behind a
// real door, mutual TLS and all: no packet is lost. That is for ten minutes with
// QUIETLINE_LONG=1; else it is a quarter of the lines for ten seconds, or longer
// where the machine is busy. It prints what a rekey takes.
func TestLines258(t *testing.T) {
	lines, long := 64, 10*time.Second
	if os.Getenv("QUIETLINE_LONG") == "1" {
		lines, long = 258, 10*time.Minute
	}
	kme := &etsitest.KME{Stock: 1 << 30}
	var saes []string
	for i := range lines {
		saes = append(saes, fmt.Sprintf("t%d", i), fmt.Sprintf("k%d", i))
	}
	keys := doorFor(t, kme, saes...)
	var pairs []*tunneltest.Pair
	var received [][2]*tunneltest.Receiver
	for i := range lines {
		tokyo, kochi := saes[2*i], saes[2*i+1]
		p := tunneltest.New(t, tunneltest.Options{Policy: rekey.QKDStrict, EpochLife: time.Second,
			Sources: [2]tunnel.KeySource{source(t, keys(tokyo, kochi)), source(t, keys(kochi, tokyo))}})
		pairs = append(pairs, p)
		received = append(received, [2]*tunneltest.Receiver{p.Tokyo.Receive(), p.Kochi.Receive()})
	}
	for _, p := range pairs {
		p.Up(2 * time.Minute)
	}
	epochs := func(p *tunneltest.Pair) uint64 { return p.Tokyo.Line.Stats().Handshakes.Epochs }
	var first []uint64
	for _, p := range pairs {
		first = append(first, epochs(p))
	}
	last := make([]uint64, 2*lines)
	var took []time.Duration
	var sent uint64
	began := time.Now()
	rekeyed := func() (all, least uint64) {
		least = 1 << 63
		for i, p := range pairs {
			n := epochs(p) - first[i]
			all, least = all+n, min(least, n)
		}
		return all, least
	}
	enough := func() bool {
		_, least := rekeyed()
		return time.Since(began) >= long && least >= 5 || time.Since(began) > long+2*time.Minute
	}
	for tick := 0; !enough(); tick++ {
		for _, p := range pairs {
			for _, s := range []*tunneltest.Site{p.Tokyo, p.Kochi} {
				if err := s.Device.Inject(0, numbered(sent)); err != nil {
					t.Fatal(err)
				}
			}
		}
		sent++
		if tick%4 == 0 {
			for i, p := range pairs {
				for j, s := range []*tunneltest.Site{p.Tokyo, p.Kochi} {
					if st := s.Line.Stats(); st.Scheduled && st.Epoch != last[2*i+j] {
						last[2*i+j] = st.Epoch
						took = append(took, st.Took)
					}
				}
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	span := time.Since(began)
	rekeys, least := rekeyed()
	missing := func() (n int) {
		for _, r := range received {
			n += 2*int(sent) - len(r[0].Packets()) - len(r[1].Packets())
		}
		return n
	}
	// What is on its way on a busy machine comes late, but comes.
	for deadline := time.Now().Add(20 * time.Second); missing() > 0 && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
	}
	drops := map[string]uint64{}
	for _, p := range pairs {
		for _, s := range []*tunneltest.Site{p.Tokyo, p.Kochi} {
			for why, n := range s.Line.Stats().Drops {
				if n > 0 {
					drops[why] += n
				}
			}
		}
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))].Round(10 * time.Microsecond) }
	t.Logf("%d lines, %v: %d rekeys, %.2f a line and second, the slowest %.2f; %d of %d packets missing; "+
		"a rekey took %v in the middle, %v at p99, %v at most", lines, span.Round(time.Second), rekeys,
		float64(rekeys)/float64(lines)/span.Seconds(), float64(least)/span.Seconds(), missing(), 2*lines*int(sent),
		at(0.5), at(0.99), at(1))
	if n := missing(); n != 0 {
		t.Errorf("%d packets are missing; dropped %v", n, drops)
	}
	if least < 5 {
		t.Errorf("a line rekeyed %d times in %v", least, span)
	}
}
