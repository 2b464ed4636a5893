package lab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// message travels between the stages, as a line of JSON. The outer process
// answers a Listen with a line and, if all is well, a descriptor beside it.
type message struct {
	Network string `json:",omitempty"` // listen outside
	Address string `json:",omitempty"`
	Limit   string `json:",omitempty"` // a LimitError of init
	Hint    string `json:",omitempty"`
	Err     string `json:",omitempty"`
	Errno   unix.Errno
	PID     int `json:",omitempty"` // a question when -1, else the answer
}

// controlPair returns a connected pair: ours, and the file for the child.
func controlPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make control socket: %w", err)
	}
	inner := os.NewFile(uintptr(fds[1]), "control")
	outer, err := unixConn(os.NewFile(uintptr(fds[0]), "control"))
	if err != nil {
		_ = inner.Close()
		return nil, nil, err
	}
	return outer, inner, nil
}

// unixConn makes a connection of f and closes f.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use control socket: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("use control socket: %w", ErrOutside)
	}
	return u, nil
}

// serve answers what the inner stages ask until they are gone, and returns the
// limit that init has reported, if any. pid is init's, as seen from here.
func serve(c *net.UnixConn, pid int) *LimitError {
	var limit *LimitError
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		var m message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			continue
		}
		if m.Limit != "" {
			limit = &LimitError{Limit: m.Limit, Hint: m.Hint, Err: remoteError{m.Err, m.Errno}}
			continue
		}
		if m.PID != 0 {
			_ = json.NewEncoder(c).Encode(message{PID: pid})
			continue
		}
		answerListen(c, m)
	}
	return limit
}

// remoteError is an error of another process: its text, and its errno.
type remoteError struct {
	text  string
	errno unix.Errno
}

func (e remoteError) Error() string { return e.text }

func (e remoteError) Is(target error) bool {
	return e.errno != 0 && (target == error(e.errno) || e.errno.Is(target))
}

// report tells the outer process why there will be no inside.
func report(control *os.File, limit *LimitError) error {
	m := message{Limit: limit.Limit, Hint: limit.Hint, Err: limit.Err.Error()}
	_ = errors.As(limit.Err, &m.Errno)
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = control.Write(append(b, '\n'))
	return err
}

// answerListen opens a listener here and passes it in.
func answerListen(c *net.UnixConn, m message) {
	var rights []byte
	var reply message
	ln, err := net.Listen(m.Network, m.Address)
	if err == nil {
		defer ln.Close() // the descriptor that travels keeps it open
		var f *os.File
		if f, err = ln.(interface{ File() (*os.File, error) }).File(); err == nil {
			defer f.Close()
			rights = unix.UnixRights(int(f.Fd()))
		}
	}
	if err != nil {
		reply.Err = err.Error()
		_ = errors.As(err, &reply.Errno)
	}
	b, err := json.Marshal(reply)
	if err != nil {
		return
	}
	// If the inside is gone there is nobody to tell.
	_, _, _ = c.WriteMsgUnix(append(b, '\n'), rights, nil)
}

var control struct {
	sync.Mutex // one question at a time on the socket
	conn       *net.UnixConn
}

// ListenOutside listens in the network from which [Reexec] was called, so that
// people there can reach what runs inside. Networks are tcp, tcp4, tcp6 and
// unix. The listener is an ordinary one.
func ListenOutside(network, address string) (net.Listener, error) {
	var ln net.Listener
	err := ask(func(c *net.UnixConn) (err error) {
		ln, err = askListen(c, message{Network: network, Address: address})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen outside on %s: %w", address, err)
	}
	return ln, nil
}

// OutsidePID is the number, in the process table of whoever called [Reexec],
// of a process that sees our file system: /proc/<number>/root is our root.
func OutsidePID() (int, error) {
	var reply message
	err := ask(func(c *net.UnixConn) error {
		if err := json.NewEncoder(c).Encode(message{PID: -1}); err != nil {
			return err
		}
		line := make([]byte, 4096)
		n, err := c.Read(line)
		if err != nil {
			return err
		}
		return json.Unmarshal(line[:n], &reply)
	})
	if err != nil {
		return 0, fmt.Errorf("ask process number: %w", err)
	}
	return reply.PID, nil
}

// ask runs one question and its answer on the socket to the outer process.
func ask(question func(*net.UnixConn) error) error {
	if !Inside() {
		return ErrOutside
	}
	control.Lock()
	defer control.Unlock()
	if control.conn == nil {
		c, err := unixConn(os.NewFile(controlFD, "control"))
		if err != nil {
			return err
		}
		control.conn = c
	}
	return question(control.conn)
}

func askListen(c *net.UnixConn, m message) (net.Listener, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(append(b, '\n')); err != nil {
		return nil, err
	}
	line, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(line, oob)
	if err != nil {
		return nil, err
	}
	var reply message
	if err := json.Unmarshal(line[:n], &reply); err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	if reply.Err != "" {
		return nil, remoteError{reply.Err, reply.Errno}
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("read answer: no descriptor came: %w", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "listener")
	defer f.Close()
	return net.FileListener(f)
}
