// Package hwtest is the suite every hw.Driver must pass.
//
// The main function is [Run]: a driver's test opens the driver on a [Bench]
// whose device side the suite controls, and the suite checks the contract of
// package hw: order, credit, acknowledgement, redelivery, close.
//
// A caller must keep in mind: the suite checks what a driver does, not how
// fast; it waits up to ten seconds for what must come.
package hwtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

// patience bounds the wait for what must come.
const patience = 10 * time.Second

// Bench is a driver together with the device behind it. Each test of the suite
// gets a fresh one; what it needs closed is the opener's t.Cleanup, the Driver
// itself excepted, which the suite closes.
type Bench struct {
	Driver hw.Driver
	// Info is what the device says of itself.
	Info hw.Info
	// Feed makes the device finish a block; it takes ownership of the bits.
	Feed func(hw.Block)
	// Emit makes the device report an event.
	Emit func(hw.Event)
	// Taken counts the blocks the device has handed over so far, first
	// deliveries only: the suite compares it with the credits it gave.
	Taken func() int
	// Cut breaks the connection between driver and device. The driver is
	// expected to be connected again without a call of the suite.
	Cut func()
}

// Run runs the suite against what open returns.
func Run(t *testing.T, open func(t *testing.T) Bench) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Bench)
	}{
		{"Describe", testDescribe},
		{"BlocksAreEqual", testEqual},
		{"Order", testOrder},
		{"Credit", testCredit},
		{"CancelledReadLosesNothing", testCancel},
		{"UnackedComesAgain", testAgain},
		{"AckedIsForgotten", testAcked},
		{"AckTwice", testAckTwice},
		{"ReaderOwnsBits", testOwnership},
		{"WaitingReadSurvivesCut", testWaitThroughCut},
		{"Events", testEvents},
		{"CloseEndsCalls", testClose},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := open(t)
			t.Cleanup(func() { _ = b.Driver.Close() })
			c.test(t, b)
		})
	}
}

// NewBlock makes a block whose bits tell its name apart from every other.
func NewBlock(generation, seq uint64, size int) hw.Block {
	bits := make([]byte, size)
	for i := range bits {
		bits[i] = byte(uint64(i)*31 + seq*7 + generation*131)
	}
	if size >= 16 {
		binary.LittleEndian.PutUint64(bits, generation)
		binary.LittleEndian.PutUint64(bits[8:], seq)
	}
	return hw.Block{Generation: generation, Seq: seq, Bits: secret.Own(bits), QBER: .02,
		Epsilon: 1e-9, Simulated: seq%2 == 0, Made: time.Unix(1.7e9, int64(seq)).UTC()}
}

// diff compares a block with the one made under its name.
func diff(want, got hw.Block) string {
	if !bytes.Equal(want.Bits.Expose(), got.Bits.Expose()) {
		return fmt.Sprintf("bits of %d/%d differ", got.Generation, got.Seq)
	}
	want.Bits, got.Bits = secret.Bytes{}, secret.Bytes{}
	return cmp.Diff(want, got, cmp.Comparer(func(a, b float64) bool {
		return a == b || math.IsNaN(a) && math.IsNaN(b)
	}), cmp.Comparer(func(a, b secret.Bytes) bool { return true }))
}

func read(t *testing.T, d hw.Driver) hw.Block {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		var b hw.Block
		err := d.ReadBlock(ctx, &b)
		if err == nil {
			return b
		}
		if ctx.Err() != nil || errors.Is(err, hw.ErrClosed) || errors.Is(err, hw.ErrRefused) {
			t.Fatalf("read block: %v", err)
		}
	}
}

// ack acknowledges, again while the driver has no connection.
func ack(t *testing.T, d hw.Driver, generation, seq uint64) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := d.Ack(context.Background(), generation, seq)
		if err == nil {
			return
		}
		if time.Now().After(deadline) || errors.Is(err, hw.ErrClosed) {
			t.Fatalf("acknowledge: %v", err)
		}
		pause()
	}
}

// pause lets other goroutines run while something is polled.
func pause() { time.Sleep(time.Millisecond) }

func testDescribe(t *testing.T, b Bench) {
	b.Feed(NewBlock(1, 1, 32))
	read(t, b.Driver).Bits.Clear() // connected now
	if d := cmp.Diff(b.Info, b.Driver.Describe()); d != "" {
		t.Errorf("info (-device +driver):\n%s", d)
	}
}

func testEqual(t *testing.T, b Bench) {
	for i, size := range []int{1, 31, 32, 4096, 1 << 20} {
		want := NewBlock(7, uint64(i), size)
		if i == 1 {
			want.QBER, want.Epsilon, want.Made = math.NaN(), math.NaN(), time.Time{}
		}
		mine := want
		mine.Bits = secret.Copy(want.Bits.Expose())
		b.Feed(mine)
		if d := diff(want, read(t, b.Driver)); d != "" {
			t.Errorf("%d bytes: %s", size, d)
		}
		ack(t, b.Driver, 7, uint64(i))
	}
}

func testOrder(t *testing.T, b Bench) {
	names := [][2]uint64{{1, 1}, {1, 2}, {1, 5}, {2, 0}, {2, 1}, {9, 3}}
	for _, n := range names {
		b.Feed(NewBlock(n[0], n[1], 64))
	}
	for _, n := range names {
		if d := diff(NewBlock(n[0], n[1], 64), read(t, b.Driver)); d != "" {
			t.Fatal(d)
		}
	}
}

func testCredit(t *testing.T, b Bench) {
	for i := range uint64(5) {
		b.Feed(NewBlock(1, i, 64))
	}
	for i := range 3 {
		read(t, b.Driver).Bits.Clear()
		if got := b.Taken(); got > i+1 {
			t.Fatalf("device has handed over %d blocks after %d reads", got, i+1)
		}
	}
}

func testCancel(t *testing.T, b Bench) {
	for i := range 3 {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			var k hw.Block
			done <- b.Driver.ReadBlock(ctx, &k)
		}()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled read %d: %v", i, err)
		}
	}
	for i := range uint64(3) {
		b.Feed(NewBlock(1, i, 64))
	}
	for i := range uint64(3) {
		if d := diff(NewBlock(1, i, 64), read(t, b.Driver)); d != "" {
			t.Fatal(d)
		}
	}
}

func testAgain(t *testing.T, b Bench) {
	for i := range uint64(4) {
		b.Feed(NewBlock(1, i, 64))
	}
	for range 3 {
		read(t, b.Driver).Bits.Clear()
	}
	ack(t, b.Driver, 1, 1)
	settle(t, b)
	b.Cut()
	for _, seq := range []uint64{0, 2, 3} {
		if d := diff(NewBlock(1, seq, 64), read(t, b.Driver)); d != "" {
			t.Fatalf("after the cut: %s", d)
		}
	}
}

// settle makes sure that the device has taken note of all that was sent to it
// so far: what goes the same way after it has had its effect.
func settle(t *testing.T, b Bench) {
	t.Helper()
	before := b.Taken()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	read := make(chan error, 1)
	go func() {
		var k hw.Block
		read <- b.Driver.ReadBlock(ctx, &k)
		k.Bits.Clear()
	}()
	for b.Taken() == before {
		if ctx.Err() != nil {
			t.Fatal("device does not answer a credit")
		}
		pause()
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
}

func testAcked(t *testing.T, b Bench) {
	for i := range uint64(3) {
		b.Feed(NewBlock(1, i, 64))
	}
	for i := range uint64(2) {
		read(t, b.Driver).Bits.Clear()
		ack(t, b.Driver, 1, i)
	}
	settle(t, b)
	b.Cut()
	if d := diff(NewBlock(1, 2, 64), read(t, b.Driver)); d != "" {
		t.Fatalf("acknowledged blocks come again: %s", d)
	}
}

func testAckTwice(t *testing.T, b Bench) {
	b.Feed(NewBlock(1, 1, 64))
	read(t, b.Driver).Bits.Clear()
	for range 2 {
		ack(t, b.Driver, 1, 1)
	}
	ack(t, b.Driver, 99, 99) // never seen: nothing to forget
	b.Feed(NewBlock(1, 2, 64))
	if d := diff(NewBlock(1, 2, 64), read(t, b.Driver)); d != "" {
		t.Fatal(d)
	}
}

// Clearing what was read must not reach the copy that is sent again.
func testOwnership(t *testing.T, b Bench) {
	b.Feed(NewBlock(1, 1, 64))
	read(t, b.Driver).Bits.Clear()
	b.Cut()
	if d := diff(NewBlock(1, 1, 64), read(t, b.Driver)); d != "" {
		t.Fatal(d)
	}
}

func testWaitThroughCut(t *testing.T, b Bench) {
	b.Feed(NewBlock(1, 1, 64))
	read(t, b.Driver).Bits.Clear()
	ack(t, b.Driver, 1, 1)
	got := make(chan hw.Block, 1)
	go func() { got <- read(t, b.Driver) }()
	b.Cut()
	b.Feed(NewBlock(1, 2, 64))
	// The acknowledgement may have been lost in the cut.
	for k := range got {
		if k.Seq == 1 {
			go func() { got <- read(t, b.Driver) }()
			continue
		}
		if d := diff(NewBlock(1, 2, 64), k); d != "" {
			t.Fatal(d)
		}
		return
	}
}

func testEvents(t *testing.T, b Bench) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	at := time.Unix(1.7e9, 5).UTC()
	for _, want := range []hw.Event{
		{At: at, Alarm: "qber above limit", Detail: "qber 0.25 limit 0.11"},
		{At: at, Status: &hw.Status{Up: true, QBER: .013, SiftedBPS: 1e6, SecretBPS: 2e5,
			AuthBits: 12345, Simulated: true}},
		{At: at, Status: &hw.Status{Reason: "fibre is cut", QBER: math.NaN(), AuthBits: -1}},
	} {
		b.Emit(want)
		got, err := b.Driver.Events(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same := cmp.Comparer(func(a, b float64) bool { return a == b || math.IsNaN(a) && math.IsNaN(b) })
		if d := cmp.Diff(want, got, same); d != "" {
			t.Errorf("event (-device +driver):\n%s", d)
		}
	}
}

func testClose(t *testing.T, b Bench) {
	errs := make(chan error, 2)
	go func() {
		var k hw.Block
		errs <- b.Driver.ReadBlock(context.Background(), &k)
	}()
	go func() {
		_, err := b.Driver.Events(context.Background())
		errs <- err
	}()
	if err := b.Driver.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-errs:
			if !errors.Is(err, hw.ErrClosed) {
				t.Errorf("call ended with %v", err)
			}
		case <-time.After(patience):
			t.Fatal("a call outlives Close")
		}
	}
	var k hw.Block
	if err := b.Driver.ReadBlock(context.Background(), &k); !errors.Is(err, hw.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if err := b.Driver.Ack(context.Background(), 1, 1); !errors.Is(err, hw.ErrClosed) {
		t.Errorf("acknowledge after close: %v", err)
	}
	if err := b.Driver.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}
