package bench

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// controlDir is where wireguard-go opens the socket that sets it up.
const controlDir = "/var/run/wireguard"

// wireguard starts wireguard-go at both ends and sets keys and endpoints by its
// cross-platform protocol (www.wireguard.com/xplatform).
func (p *pair) wireguard(path string) error {
	if err := coverControlDir(); err != nil {
		return err
	}
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		keys[i] = key
	}
	for i := range p.ns {
		// The sockets of both ends lie in one folder: a name each.
		name := fmt.Sprintf("wgbench%d", i)
		socket := filepath.Join(controlDir, name+".sock")
		if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := p.run(i, &p.tunnels, path, "-f", name); err != nil {
			return err
		}
		err := configure(socket, fmt.Sprintf("set=1\nprivate_key=%x\nlisten_port=%d\n"+
			"public_key=%x\nendpoint=%s:%d\nallowed_ip=0.0.0.0/0\n\n", keys[i].Bytes(), outerPort,
			keys[1-i].PublicKey().Bytes(), cableAddr[1-i].Addr(), outerPort))
		if err != nil {
			return err
		}
		if err := p.raise(i, name, innerAddr[i]); err != nil {
			return err
		}
	}
	return nil
}

// coverControlDir lays a folder in memory over the one of the machine's own
// WireGuard, once, for this lab only.
var coverControlDir = sync.OnceValue(func() error {
	run, err := filepath.EvalSymlinks(filepath.Dir(controlDir))
	if err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("tmpfs", run, "tmpfs", flags, "mode=0755"); err != nil {
		return &os.PathError{Op: "mount", Path: run, Err: err}
	}
	return os.Mkdir(controlDir, 0o700)
})

// configure sends a set operation as soon as the socket is there.
func configure(socket, set string) error {
	const tries, pause = 200, 20 * time.Millisecond
	var c net.Conn
	var err error
	for range tries {
		if c, err = net.Dial("unix", socket); err == nil {
			break
		}
		time.Sleep(pause)
	}
	if err != nil {
		return fmt.Errorf("set up wireguard-go: %w", err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, set); err != nil {
		return fmt.Errorf("set up wireguard-go: %w", err)
	}
	answer := make([]byte, 256)
	n, err := c.Read(answer)
	if got := strings.TrimSpace(string(answer[:n])); got != "errno=0" {
		return fmt.Errorf("set up wireguard-go: it answers %q: %w", got, err)
	}
	return nil
}

// selfSigned makes a certificate as OpenVPN pins it.
func selfSigned(name string) (certPEM, keyPEM, fingerprint string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", "", err
	}
	now := time.Now()
	t := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()),
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour),
		NotAfter: now.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return "", "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", "", err
	}
	sum := sha256.Sum256(der)
	var pairs []string
	for _, b := range sum {
		pairs = append(pairs, hex.EncodeToString([]byte{b}))
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return block("CERTIFICATE", der), block("PRIVATE KEY", keyDER), strings.Join(pairs, ":"), nil
}
