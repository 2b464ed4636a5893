package identity_test

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

func TestLookup(t *testing.T) {
	ca := etsitest.NewCA(t, "test CA")
	leaf := func(l etsitest.Leaf) *x509.Certificate { return ca.Issue(t, l).Leaf }
	pinned := leaf(etsitest.Leaf{CN: "whoever"})
	pin := fmt.Sprintf("%X", sha256.Sum256(pinned.Raw))
	pin = pin[:2] + ":" + pin[2:]
	table, err := identity.New([]identity.Rule{
		{SAE: "tokyo"},
		{SAE: "京/都"},
		{SAE: "kochi", By: identity.ByDNS, Value: "SAE.Kochi.example"},
		{SAE: "osaka", By: identity.ByCN, Value: "Osaka SAE 1"},
		{SAE: "osaka", By: identity.ByURI, Value: "urn:example:osaka"},
		{SAE: "nara", By: identity.ByPin, Value: pin},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		leaf *x509.Certificate
		want etsi014.SAEID
		err  error
	}{
		{"default URI", leaf(etsitest.Leaf{URIs: []string{"urn:quietline:sae:tokyo"}}), "tokyo", nil},
		{"escaped URI", leaf(etsitest.Leaf{
			URIs: []string{"urn:quietline:sae:%E4%BA%AC%2F%E9%83%BD"},
		}), "京/都", nil},
		{"second URI", leaf(etsitest.Leaf{
			URIs: []string{"urn:x:y", "urn:quietline:sae:tokyo"},
		}), "tokyo", nil},
		{"DNS in another case", leaf(etsitest.Leaf{DNS: []string{"sae.KOCHI.example"}}), "kochi", nil},
		{"CN", leaf(etsitest.Leaf{CN: "Osaka SAE 1"}), "osaka", nil},
		{"two marks of one SAE", leaf(etsitest.Leaf{
			CN: "Osaka SAE 1", URIs: []string{"urn:example:osaka"},
		}), "osaka", nil},
		{"pin", pinned, "nara", nil},
		{"same name, other certificate", leaf(etsitest.Leaf{CN: "whoever"}), "", identity.ErrNoMatch},
		{"CN in another case", leaf(etsitest.Leaf{CN: "osaka sae 1"}), "", identity.ErrNoMatch},
		{"SAE ID as CN", leaf(etsitest.Leaf{CN: "tokyo"}), "", identity.ErrNoMatch},
		{"URI as DNS", leaf(etsitest.Leaf{DNS: []string{"urn.example.osaka"}}), "", identity.ErrNoMatch},
		{"wildcard", leaf(etsitest.Leaf{DNS: []string{"*.kochi.example"}}), "", identity.ErrNoMatch},
		{"nothing", leaf(etsitest.Leaf{}), "", identity.ErrNoMatch},
		{"two SAEs", leaf(etsitest.Leaf{
			CN: "Osaka SAE 1", URIs: []string{"urn:quietline:sae:tokyo"},
		}), "", identity.ErrAmbiguous},
		{"two SAEs by URI", leaf(etsitest.Leaf{
			URIs: []string{"urn:quietline:sae:tokyo", "urn:example:osaka"},
		}), "", identity.ErrAmbiguous},
	} {
		got, err := table.Lookup(tc.leaf)
		if got != tc.want || !errors.Is(err, tc.err) || (err == nil) != (tc.err == nil) {
			t.Errorf("%s: got %q, %v", tc.name, got, err)
		}
	}
}

// The text of a refusal lets the operator find the certificate.
func TestLookupErrorNamesTheCertificate(t *testing.T) {
	ca := etsitest.NewCA(t, "Hospital CA")
	table, err := identity.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf := ca.Issue(t, etsitest.Leaf{
		CN: "box 7", URIs: []string{"urn:a:b"}, DNS: []string{"box7.example"},
	}).Leaf
	_, err = table.Lookup(leaf)
	for _, want := range []string{
		"CN=box 7", "CN=Hospital CA", "urn:a:b", "box7.example",
		fmt.Sprintf("%x", leaf.SerialNumber), fmt.Sprintf("%x", sha256.Sum256(leaf.Raw)),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %s", err, want)
		}
	}
}

func TestNewReportsAllFaults(t *testing.T) {
	_, err := identity.New([]identity.Rule{
		{SAE: ""},
		{SAE: "a", By: "serial", Value: "1"},
		{SAE: "b", By: identity.ByCN},
		{SAE: "c", By: identity.ByPin, Value: "abcd"},
		{SAE: "d", By: identity.ByDNS, Value: "x.example"},
		{SAE: "e", By: identity.ByDNS, Value: "X.example"},
	})
	if err == nil {
		t.Fatal("taken")
	}
	for _, want := range []string{
		"rule 1", `unknown match "serial"`, "cn needs a value", "64 hexadecimal digits",
		`rule 6, SAE "e": dns "x.example" is already the mark of SAE d`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %s", err, want)
		}
	}
}

// The default URI of any SAE ID survives a certificate.
func FuzzDefaultURI(f *testing.F) {
	for _, s := range []string{"tokyo", "a/b", "東京", "a b", "%41", "a?b#c", "a:b@c", "..", "\"<>"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := etsi014.ParseSAEID(s)
		if err != nil {
			return
		}
		u, err := url.Parse(identity.DefaultURI(id))
		if err != nil {
			t.Fatal(err)
		}
		table, err := identity.New([]identity.Rule{{SAE: id}, {SAE: id + "x"}})
		if err != nil {
			return // the longer one is too long
		}
		got, err := table.Lookup(&x509.Certificate{URIs: []*url.URL{u}})
		if err != nil || got != id {
			t.Errorf("%q: got %q, %v", s, got, err)
		}
	})
}

// Whatever stands in a certificate, a look-up does not panic and finds nobody
// without a rule.
func FuzzLookup(f *testing.F) {
	ca := etsitest.NewCA(f, "test CA")
	leaf := etsitest.Leaf{CN: "a", URIs: []string{"urn:a"}, DNS: []string{"b"}}
	f.Add(ca.Issue(f, leaf).Leaf.Raw)
	f.Add(ca.Cert.Raw)
	table, err := identity.New([]identity.Rule{{SAE: "tokyo"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		if got, err := table.Lookup(leaf); (got == "") == (err == nil) {
			t.Errorf("got %q, %v", got, err)
		}
	})
}
