package peer

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestDemandIsGrantedAhead: of a thousand draws a second over a channel of 5 ms
// each way, next to none waits for a grant, and few grants are made.
func TestDemandIsGrantedAhead(t *testing.T) {
	const draws, every = 5000, 5 // messages arrive every 5 ms
	s := newStage()
	do := func(line string) { s.do(t, strings.Fields(line)) }
	for _, line := range []string{"boot a", "boot b", "join", "all"} {
		do(line)
	}
	for n := 1; n <= 8; n++ { // half of them are drawn; of the last nothing is kept ahead
		do(fmt.Sprintf("ingest a %d slots=4096", n))
		do(fmt.Sprintf("ingest b %d slots=4096", n))
		do("all")
	}
	do("draw a a1 b1")
	do("all")
	s.out.Reset()
	waited := 0
	for i := range draws {
		before := len(s.keys)
		do("draw a a1 b1")
		if len(s.keys) == before {
			waited++
		}
		s.wait(t, time.Millisecond, false)
		if i%every == 0 {
			do("all")
		}
	}
	do("all")
	if len(s.keys) != 1+draws {
		t.Fatalf("%d keys were drawn, want %d", len(s.keys), 1+draws)
	}
	grants := strings.Count(s.out.String(), "b < GRANT ")
	t.Logf("%d of %d draws waited, %d grants", waited, draws, grants)
	if waited > draws/50 || grants == 0 || grants > draws/20 {
		t.Errorf("%d of %d draws waited, %d grants", waited, draws, grants)
	}
}

// TestBatchesAreGrantedAhead: of batches of 128 keys every 2 ms none waits for
// a segment to be opened once the demand is known.
func TestBatchesAreGrantedAhead(t *testing.T) {
	const draws, every = 200, 5
	s := newStage()
	do := func(line string) { s.do(t, strings.Fields(line)) }
	for _, line := range []string{"boot a", "boot b", "join", "all"} {
		do(line)
	}
	for n := 1; n <= 200; n++ {
		for _, at := range []string{"a", "b"} {
			do(fmt.Sprintf("ingest %s %d slots=512", at, n))
		}
		do("all")
	}
	do("run 6s") // a fresh session opens nothing ahead
	do("draw a a1 b1 n=128")
	do("all")
	s.out.Reset()
	waited, late := 0, 0
	for i := range draws {
		before := len(s.keys)
		do("draw a a1 b1 n=128")
		if len(s.keys) == before {
			waited++
			if i > draws/4 {
				late++
			}
		}
		s.wait(t, 2*time.Millisecond, false)
		if i%every == 0 {
			do("all")
		}
	}
	do("all")
	do("all")
	if len(s.keys) != 128*(1+draws) {
		t.Fatalf("%d keys were drawn, want %d", len(s.keys), 128*(1+draws))
	}
	text := s.out.String()
	grants, opens := strings.Count(text, "b < GRANT "), strings.Count(text, "b < OPEN ")
	t.Logf("%d of %d draws waited, %d of them late, %d grants, %d opens", waited, draws, late,
		grants, opens)
	if waited > draws/3 || late > 0 || opens > draws*128/512*3/2 {
		t.Errorf("%d of %d draws waited, %d of them late, %d opens", waited, draws, late, opens)
	}
}
