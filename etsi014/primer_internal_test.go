package etsi014

import "testing"

// TestPrimer: it stands, and takes writes of any length without an end.
func TestPrimer(t *testing.T) {
	p := thePrimer()
	if p.conn == nil {
		t.Fatal("no primer could be made")
	}
	for _, n := range []int{0, 1, 300, record - recordRoom, record, 2 * record} {
		for range 100 {
			p.prime(n)
		}
	}
	if _, err := p.conn.Write(p.zeros); err != nil {
		t.Error(err)
	}
}

// BenchmarkPrimer is what an answer of one key, and one of 128, pays for it.
func BenchmarkPrimer(b *testing.B) {
	for name, n := range map[string]int{"1 key": 300, "128 keys": 13 << 10} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				thePrimer().prime(n)
			}
		})
	}
}
