package etsi014

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"sync"
	"time"
)

// primer keeps the plain text of records out of memory that nobody wipes.
// crypto/tls puts a record's plain text into a buffer of a pool and seals it in
// place; but where the buffer is too small for that, it seals into a new one
// and leaves the old one to the garbage as it is. A write of zeros on a
// connection that leads nowhere, just before, leaves a buffer in the pool that
// is large enough: the goroutine gets the one it put there last, unless it is
// moved to another processor between the two.
type primer struct {
	conn  *tls.Conn
	zeros []byte
}

// record is the most that a record of TLS holds; RFC 8446 section 5.1.
const record = 16 << 10

// recordRoom is more than a record adds to its plain text: 5 bytes of head, one of
// type, 16 of tag, in TLS 1.3.
const recordRoom = 64

// prime is called before a write of n bytes.
func (p *primer) prime(n int) {
	if p.conn != nil {
		_, _ = p.conn.Write(p.zeros[:min(n+recordRoom, record)])
	}
}

// nowhere takes what is written once the handshake is over.
type nowhere struct {
	net.Conn
	over bool
}

func (n *nowhere) Write(p []byte) (int, error) {
	if n.over {
		return len(p), nil
	}
	return n.Conn.Write(p)
}

// thePrimer is made once a process. Without one the door works all the same.
var thePrimer = sync.OnceValue(func() *primer {
	p := &primer{zeros: make([]byte, record)}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p
	}
	self := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"nowhere"},
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, self, self, key.Public(), key)
	if err != nil {
		return p
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return p
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	a, b := net.Pipe()
	defer b.Close()
	done := make(chan error, 1)
	go func() {
		done <- tls.Server(b, &tls.Config{SessionTicketsDisabled: true,
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}).Handshake()
	}()
	raw := &nowhere{Conn: a}
	conn := tls.Client(raw, &tls.Config{RootCAs: roots, ServerName: "nowhere",
		MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true})
	if err := conn.Handshake(); err != nil {
		_ = b.Close()
	} else {
		p.conn = conn
	}
	<-done
	raw.over = true
	return p
})
