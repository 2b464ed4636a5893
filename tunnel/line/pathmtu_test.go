package line

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// road is a connection over a path that a test makes narrow.
type road struct {
	*mirror
	mtu       int
	err       error
	fragments bool
	changes   int
}

func (r *road) PathMTU() (int, error) { return r.mtu, r.err }
func (r *road) InnerMTU(path int) (int, error) {
	if path < 652 {
		return 0, errors.New("too narrow")
	}
	return path - 76, nil
}

func (r *road) AllowFragments(allow bool) error {
	r.fragments = allow
	r.changes++
	return nil
}

func (k *keeper) SetMTU(mtu int) error {
	if k.err != nil {
		return k.err
	}
	k.mtu = mtu
	return nil
}

func TestDeviceFollowsThePath(t *testing.T) {
	r := &road{mirror: newMirror()}
	dev := &keeper{mtu: 1424}
	l := &Line{cfg: Config{Device: dev, Conn: r}, log: slog.New(slog.DiscardHandler)}
	o := &owner{Line: l, widest: dev.mtu}
	lost := errors.New("no route")
	for _, tt := range []struct {
		path      int
		err       error
		mtu       int
		fragments bool
	}{
		{1500, nil, 1424, false},
		{1400, nil, 1324, false},
		{1400, lost, 1324, false}, // no news
		{1356, nil, 1280, false},
		{1355, nil, 1280, true},
		{552, nil, 1280, true}, // all that forged ICMP can do
		{1420, nil, 1344, false},
		{9000, nil, 1424, false}, // never above what the configuration says
	} {
		r.mtu, r.err = tt.path, tt.err
		o.fitPath()
		if dev.mtu != tt.mtu || r.fragments != tt.fragments {
			t.Errorf("path %d: MTU %d, fragments %v; want %d, %v", tt.path, dev.mtu, r.fragments,
				tt.mtu, tt.fragments)
		}
	}
	if r.changes != 2 {
		t.Errorf("the socket was set %d times", r.changes)
	}
	dev.err, r.mtu = lost, 1400
	o.fitPath()
	if dev.mtu != 1424 {
		t.Error("a device that refuses has another MTU")
	}
	// A line that was configured below the least MTU keeps what it has.
	dev = &keeper{mtu: 1000}
	o = &owner{Line: &Line{cfg: Config{Device: dev, Conn: r}, log: l.log}, widest: 1000}
	o.fitPath()
	if dev.mtu != 1000 {
		t.Errorf("MTU raised to %d", dev.mtu)
	}
	(&owner{Line: &Line{cfg: Config{Device: dev, Conn: newMirror()}}}).fitPath() // knows no path
}

func TestPathOfTheSocket(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		peer, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Log("no such loopback address here:", err)
			continue
		}
		c, err := DialUDP(netip.AddrPort{}, peer.LocalAddr().(*net.UDPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		u := c.(*udpConn)
		mtu, err := u.PathMTU()
		if err != nil || mtu < 1280 || mtu > maxPacket {
			t.Errorf("%s: path MTU %d, %v", host, mtu, err)
		}
		if inner, err := u.InnerMTU(mtu); err != nil || inner <= mtu-100 || inner >= mtu-60 {
			t.Errorf("%s: inner MTU %d of %d, %v", host, inner, mtu, err)
		}
		for _, allow := range []bool{false, true, false} {
			if err := u.AllowFragments(allow); err != nil {
				t.Fatal(err)
			}
			if got := discovery(t, u) != unix.IP_PMTUDISC_DO; got != allow {
				t.Errorf("%s: fragments %v, want %v", host, got, allow)
			}
		}
		_, _ = u.Close(), peer.Close()
		if _, err := u.PathMTU(); err == nil {
			t.Errorf("%s: a closed socket has a path", host)
		}
		if err := u.AllowFragments(true); err == nil {
			t.Errorf("%s: a closed socket was set", host)
		}
	}
}

// discovery is the socket's mode of path MTU discovery; both families have the
// same values.
func discovery(t *testing.T, u *udpConn) int {
	t.Helper()
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if u.six {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	fd, open := u.file.Enter()
	if !open {
		t.Fatal("closed")
	}
	defer u.file.Leave()
	mode, err := unix.GetsockoptInt(int(fd), level, option)
	if err != nil {
		t.Fatal(err)
	}
	return mode
}
