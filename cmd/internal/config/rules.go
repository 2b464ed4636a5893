package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/simulator"
)

// rules are the checks on one text that a `check` tag may name. Each returns
// the text as the daemons use it: with absolute paths.
var rules = map[string]func(d *decoder, s string) (string, error){
	"name":      checkName,
	"sae":       checkSAE,
	"path":      checkPath,
	"socket":    checkSocket,
	"address":   checkAddress,
	"channel":   checkChannel,
	"metrics":   checkMetrics,
	"driver":    checkDriver,
	"https":     checkHTTPS,
	"interface": checkInterface,
	"pin":       checkPin,
	"preset":    checkPreset,
	"profile":   checkProfile,

	"fingerprint": checkFingerprint,
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// checkName holds for names that become part of file names and certificates.
func checkName(_ *decoder, s string) (string, error) {
	if !nameForm.MatchString(s) {
		return "", errors.New("is not a name; expected letters, digits, dot, dash, " +
			"underscore, beginning with a letter or digit, at most 63 characters")
	}
	return s, nil
}

func checkSAE(_ *decoder, s string) (string, error) {
	if _, err := etsi014.ParseSAEID(s); err != nil {
		return "", fmt.Errorf("is not an SAE ID: %w", err)
	}
	return s, nil
}

func checkPreset(_ *decoder, s string) (string, error) {
	if _, err := simulator.PresetByName(s); err != nil {
		var names []string
		for _, p := range simulator.Presets() {
			names = append(names, p.Name)
		}
		return "", fmt.Errorf("is not a preset; known are %s", strings.Join(names, ", "))
	}
	return s, nil
}

func checkProfile(_ *decoder, s string) (string, error) {
	known := etsi014.Profiles()
	if _, ok := known[s]; !ok {
		return "", fmt.Errorf("is not a profile; known are %s",
			strings.Join(slices.Sorted(maps.Keys(known)), ", "))
	}
	return s, nil
}

func checkPath(d *decoder, s string) (string, error) {
	if s == "" || strings.ContainsRune(s, 0) {
		return "", errors.New("is not a path")
	}
	if !filepath.IsAbs(s) {
		s = filepath.Join(d.dir, s)
	}
	return filepath.Clean(s), nil
}

// maxSocket is the longest path of a Unix socket, bytes: sun_path of unix(7)
// without its final zero.
const maxSocket = 107

func checkSocket(d *decoder, s string) (string, error) {
	path, err := checkPath(d, s)
	if err == nil && len(path) > maxSocket {
		err = fmt.Errorf("is a socket path of %d bytes; the kernel takes at most %d, "+
			"choose a shorter one, e.g. under /run/quietline", len(path), maxSocket)
	}
	return path, err
}

func checkAddress(_ *decoder, s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" {
		return "", errors.New("is not host:port; expected e.g. 192.0.2.1:8443, " +
			"[2001:db8::1]:8443 or 0.0.0.0:8443 for every address")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", errors.New("has no port number from 0 to 65535")
	}
	return s, nil
}

// unixPath cuts unix:/path and unix:///path.
func unixPath(s string) (path string, ok bool) {
	path, ok = strings.CutPrefix(s, "unix:")
	return strings.TrimPrefix(path, "//"), ok
}

func checkUnix(d *decoder, path string) (string, error) {
	path, err := checkSocket(d, path)
	return "unix://" + path, err
}

func checkChannel(d *decoder, s string) (string, error) {
	if path, ok := unixPath(s); ok {
		return checkUnix(d, path)
	}
	return checkAddress(d, s)
}

func checkMetrics(d *decoder, s string) (string, error) {
	if path, ok := unixPath(s); ok {
		return checkUnix(d, path)
	}
	if _, err := checkAddress(d, s); err != nil {
		return "", err
	}
	host, _, _ := net.SplitHostPort(s)
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return "", errors.New("is not loopback; metrics carry no authentication, " +
			"use 127.0.0.1:port, [::1]:port or unix:/path")
	}
	return s, nil
}

func checkDriver(d *decoder, s string) (string, error) {
	if path, ok := unixPath(s); ok {
		return checkUnix(d, path)
	}
	if u, err := url.Parse(s); err == nil && u.Scheme != "" {
		return "", fmt.Errorf("has the scheme %q, for which no driver is built yet; "+
			"use unix:///path of the device's or simulator's socket", u.Scheme)
	}
	return "", errors.New("is not a driver URL; expected unix:///path")
}

func checkHTTPS(_ *decoder, s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", errors.New("is not the door of a key manager; expected https://host:port")
	}
	return s, nil
}

var interfaceForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$`)

// checkInterface: IFNAMSIZ of the kernel is 16 with its final zero.
func checkInterface(_ *decoder, s string) (string, error) {
	if !interfaceForm.MatchString(s) {
		return "", errors.New("is not an interface name; expected 1 to 15 letters, " +
			"digits, dots, dashes or underscores")
	}
	return s, nil
}

func checkPin(_ *decoder, s string) (string, error) {
	if b, err := hex.DecodeString(s); err != nil || len(b) != 32 {
		return "", errors.New("is not a SHA-256; expected 64 hexadecimal digits, " +
			"from: openssl x509 -in cert.pem -outform DER | sha256sum")
	}
	return strings.ToLower(s), nil
}

var fingerprintForm = regexp.MustCompile(`^[0-9a-f]{4}( [0-9a-f]{4}){7}$`)

// checkFingerprint: as bundle.FingerprintOf prints it.
func checkFingerprint(_ *decoder, s string) (string, error) {
	if !fingerprintForm.MatchString(s) {
		return "", errors.New("is not a fingerprint; expected eight groups of four " +
			"hexadecimal digits with spaces between")
	}
	return s, nil
}

// Network splits an address of a site file into what net.Dial and net.Listen
// take: ("unix", path) for unix:///path, else ("tcp", host:port).
func Network(address string) (network, addr string) {
	if path, ok := unixPath(address); ok {
		return "unix", path
	}
	return "tcp", address
}
