package simulator

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Both connections carry something at least every heartbeat, and count as
// broken when they do not for a while. On the fibre that is short, for light
// that stops is seen at once; the classical channel bears a slow network, and
// a peer that is busy with a block.
const (
	heartbeat        = time.Second
	fibreSilence     = 3 * time.Second
	classicalSilence = 10 * time.Second
)

// errFrame: a frame is longer than its connection allows.
var errFrame = errors.New("frame is too long")

// appendFrame appends a frame: length of the rest (4 bytes, big endian), body.
func appendFrame(b, body []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

// framed reads and writes frames on a connection that must not be silent. One
// goroutine may read while another writes.
type framed struct {
	conn    net.Conn
	r       *bufio.Reader
	max     int           // bytes of a body
	silence time.Duration // after which a read or write gives up
	out     []byte
}

func newFramed(conn net.Conn, maxBody int, silence time.Duration) *framed {
	return &framed{
		conn: conn, r: bufio.NewReaderSize(awake{conn, silence}, 1<<16),
		max: maxBody, silence: silence,
	}
}

// awake fails a Read that waits too long.
type awake struct {
	conn    net.Conn
	silence time.Duration
}

func (a awake) Read(b []byte) (int, error) {
	if err := a.conn.SetReadDeadline(time.Now().Add(a.silence)); err != nil {
		return 0, err
	}
	return a.conn.Read(b)
}

// read returns the next body, in buf's memory if it is large enough.
func (f *framed) read(buf []byte) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if uint64(n) > uint64(f.max) {
		return nil, fmt.Errorf("read frame of %d bytes: %w", n, errFrame)
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(f.r, buf); err != nil {
		return nil, err
	}
	return buf, nil
}

// write sends a body and gives up after silence.
func (f *framed) write(body []byte) error {
	f.out = appendFrame(f.out[:0], body)
	if err := f.conn.SetWriteDeadline(time.Now().Add(f.silence)); err != nil {
		return err
	}
	_, err := f.conn.Write(f.out)
	return err
}
