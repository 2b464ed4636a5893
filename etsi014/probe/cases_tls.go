package probe

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// tlsCases are about clause 5.1: HTTPS, versions, mutual authentication.
var tlsCases = []Case{
	{Name: "tls-mutual", Clause: "5.1", Title: "the KME's certificate verifies and the SAE's is taken",
		run: func(s *session) error { return s.shake(true, nil) }},
	{Name: "tls-1.3", Clause: "5.1", Title: "TLS 1.3 is spoken", soft: true,
		run: func(s *session) error {
			return s.shake(true, func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 })
		}},
	{Name: "tls-1.2", Clause: "5.1", Title: "TLS 1.2 is spoken, which many boxes need", soft: true,
		run: func(s *session) error {
			return s.shake(true, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
		}},
	{Name: "tls-1.1", Clause: "5.1", Title: "TLS 1.1 is refused",
		run: func(s *session) error {
			return s.shake(false, func(c *tls.Config) {
				c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
			})
		}},
	{Name: "tls-no-certificate", Clause: "5.1", Title: "an SAE without a certificate is refused",
		run: func(s *session) error {
			return s.shake(false, func(c *tls.Config) {
				c.Certificates, c.GetClientCertificate = nil, nil
			})
		}},
	{Name: "tls-foreign-certificate", Clause: "5.1",
		Title: "an SAE with a certificate of its own making is refused", run: foreignCertificate},
	{Name: "http-1.1", Clause: "5.1", Title: "answers are HTTP/1.1",
		run: func(s *session) error {
			r, err := s.get(s.cfg.Master, s.cfg.Slave.SAE, "status", "")
			if err == nil && r.proto != "HTTP/1.1" {
				return &finding{"HTTP/1.1", r.proto}
			}
			return err
		}},
}

// shake asks for the status over a changed TLS; taken says whether a 200 is
// right. Where it is not, a broken handshake and a 401 are both refusals.
func (s *session) shake(taken bool, change func(*tls.Config)) error {
	r, err := s.send(ask{
		as: s.cfg.Master, path: keys(s.cfg.Slave.SAE, "status"), tls: change,
	})
	switch {
	case taken:
		if err == nil && r.code != http.StatusOK {
			return &finding{"200", r.String()}
		}
		return err
	case err == nil && r.code != http.StatusUnauthorized:
		return &finding{"a refused handshake or 401", r.String()}
	}
	return nil
}

// foreignCertificate copies all names of the master's certificate into one
// that no authority signed.
func foreignCertificate(s *session) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), Subject: pkix.Name{CommonName: string(s.cfg.Master.SAE)},
	}
	if certs := s.cfg.Master.TLS.Certificates; len(certs) > 0 {
		if own, err := x509.ParseCertificate(certs[0].Certificate[0]); err == nil {
			t.Subject, t.URIs, t.DNSNames = own.Subject, own.URIs, own.DNSNames
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return err
	}
	forged := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return s.shake(false, func(c *tls.Config) {
		c.Certificates = nil
		// Shown even if the KME names the authorities that it takes.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &forged, nil
		}
	})
}

// pathCases are about addresses and methods; clause 5.3 and RFC 9110.
var pathCases = []Case{
	{Name: "path-unknown", Clause: "5.3", Title: "an unknown path is 404 with an Error body",
		soft: true, run: func(s *session) error {
			r, err := s.send(ask{as: s.cfg.Master, path: keys(s.cfg.Slave.SAE, "no_such_call")})
			return firstOf(err, wantRefusal(r, 404, ""))
		}},
	{Name: "path-case", Clause: "RFC 3986 6.2.2.1", Title: "a path in another case is another path",
		soft: true, run: func(s *session) error {
			r, err := s.send(ask{as: s.cfg.Master, path: keys(s.cfg.Slave.SAE, "STATUS")})
			return firstOf(err, wantRefusal(r, 404, ""))
		}},
	{Name: "path-escaped", Clause: "5.3", Title: "an SAE ID may be percent-encoded",
		run: func(s *session) error {
			var all strings.Builder
			for _, b := range []byte(s.cfg.Slave.SAE) {
				fmt.Fprintf(&all, "%%%02X", b)
			}
			r, err := s.send(ask{as: s.cfg.Master, path: "/api/v1/keys/" + all.String() + "/status"})
			return firstOf(err, wantString(r, "slave_SAE_ID", string(s.cfg.Slave.SAE)))
		}},
	{Name: "status-post", Clause: "5.3", Title: "POST on status is 405 with Allow", soft: true,
		run: wrongMethod("status", http.MethodPost)},
	{Name: "enc-put", Clause: "5.3", Title: "PUT on enc_keys is 405 with Allow", soft: true,
		run: wrongMethod("enc_keys", http.MethodPut)},
	{Name: "dec-delete", Clause: "5.3", Title: "DELETE on dec_keys is 405 with Allow", soft: true,
		run: wrongMethod("dec_keys", http.MethodDelete)},
	{Name: "enc-head", Clause: "RFC 9110 9.3.2", Title: "HEAD on enc_keys takes no key",
		run: func(s *session) error { return s.costs(0, s.head("enc_keys", "")) }},
	{Name: "dec-head", Clause: "RFC 9110 9.3.2", Title: "HEAD on dec_keys takes no key",
		run: func(s *session) error {
			list, err := s.draw(1)
			if err != nil {
				return err
			}
			if err := s.head("dec_keys", "?key_ID="+url.QueryEscape(list[0].id))(); err != nil {
				return err
			}
			r, err := s.fetch(list[0].id)
			return firstOf(err, wantSame(r, list))
		}},
}

func wrongMethod(call, method string) func(*session) error {
	return func(s *session) error {
		r, err := s.send(ask{as: s.cfg.Master, method: method, path: keys(s.cfg.Slave.SAE, call),
			body: "{}"})
		if err := firstOf(err, wantRefusal(r, http.StatusMethodNotAllowed, "")); err != nil {
			return err
		}
		if r.header.Get("Allow") == "" {
			return &finding{"a header Allow", "none"}
		}
		return nil
	}
}

// head sends HEAD as the party of a call; any answer will do.
func (s *session) head(call, query string) func() error {
	return func() error {
		as, peer := s.cfg.Master, s.cfg.Slave.SAE
		if call == "dec_keys" {
			as, peer = s.cfg.Slave, s.cfg.Master.SAE
		}
		_, err := s.send(ask{as: as, method: http.MethodHead, path: keys(peer, call) + query})
		return err
	}
}
