package probe

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// session is one run of the probe.
type session struct {
	ctx    context.Context
	cfg    Config
	bodies [][]byte // of the running case, wiped after it
	limits *limits  // what Get status told, once it did
}

// limits is what of a status other cases build on.
type limits struct{ keySize, minSize, maxSize, perRequest, maxTargets int }

func newSession(ctx context.Context, cfg Config) (*session, error) {
	for _, p := range []*Party{&cfg.Master, &cfg.Slave, cfg.Third} {
		if p == nil {
			continue
		}
		u, err := url.Parse(p.URL)
		if err != nil {
			return nil, err
		}
		if u.Scheme != "https" || u.Host == "" || p.TLS == nil || p.SAE == "" {
			return nil, errors.New("a party needs an SAE ID, an https URL and a certificate")
		}
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	return &session{ctx: ctx, cfg: cfg}, nil
}

func (s *session) close() { s.wipe() }

func (s *session) wipe() {
	for _, b := range s.bodies {
		secret.Wipe(b)
	}
	s.bodies = nil
}

// reply is one answer. Its body may hold keys.
type reply struct {
	of     *session
	code   int
	proto  string
	header http.Header
	body   []byte
}

// String names an answer without what it delivered.
func (r reply) String() string {
	var e struct {
		Message any `json:"message"`
	}
	if r.code == http.StatusOK || json.Unmarshal(r.body, &e) != nil || e.Message == nil {
		return fmt.Sprintf("%d with %d bytes of %q", r.code, len(r.body), r.header.Get("Content-Type"))
	}
	text := fmt.Sprint(e.Message)
	return fmt.Sprintf("%d %q", r.code, text[:min(len(text), 200)])
}

// ask is one request: a path below the base URL, and for a POST a body.
type ask struct {
	as     Party
	method string
	path   string
	body   string
	tls    func(*tls.Config) // changes the party's TLS
}

// keys is the path of a call.
func keys(peer etsi014.SAEID, call string) string {
	return "/api/v1/keys/" + url.PathEscape(string(peer)) + "/" + call
}

// send makes a request on a connection of its own: net/http repeats a GET when
// a kept connection breaks, and the probe counts keys.
func (s *session) send(a ask) (reply, error) {
	if a.method == "" {
		a.method = http.MethodGet
	}
	cfg := a.as.TLS.Clone()
	cfg.NextProtos = []string{"http/1.1"}
	if a.tls != nil {
		a.tls(cfg)
	}
	transport := &http.Transport{
		TLSClientConfig: cfg, DisableKeepAlives: true, DisableCompression: true,
	}
	defer transport.CloseIdleConnections()
	client := http.Client{
		Transport: transport, Timeout: s.cfg.Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	target := strings.TrimSuffix(a.as.URL, "/") + a.path
	req, err := http.NewRequestWithContext(s.ctx, a.method, target, strings.NewReader(a.body))
	if err != nil {
		return reply{}, err
	}
	if a.method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		if u := new(url.Error); errors.As(err, &u) {
			err = u.Err
		}
		return reply{}, err
	}
	defer resp.Body.Close()
	const most = 4 << 20 // far above any answer of the standard
	body, err := io.ReadAll(io.LimitReader(resp.Body, most))
	s.bodies = append(s.bodies, body)
	return reply{s, resp.StatusCode, resp.Proto, resp.Header, body}, err
}

// get and post ask as a party; peer is the SAE in the path.
func (s *session) get(as Party, peer etsi014.SAEID, call, query string) (reply, error) {
	return s.send(ask{as: as, path: keys(peer, call) + query})
}

func (s *session) post(as Party, peer etsi014.SAEID, call, body string) (reply, error) {
	return s.send(ask{as: as, method: http.MethodPost, path: keys(peer, call), body: body})
}

// object reads a JSON object of a 200.
func (r reply) object() (map[string]json.RawMessage, error) {
	if r.code != http.StatusOK {
		return nil, &finding{"200", r.String()}
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(r.body, &m); err != nil || m == nil {
		return nil, &finding{"a JSON object", "something else"}
	}
	return m, nil
}

// key is one key as the probe sees it: enough to compare.
type key struct {
	id      string
	text    []byte // base64, wiped after the case
	sum     [sha256.Size]byte
	bits    int
	members []string
}

// container reads a Key container of a 200 as tolerantly as it can, so that
// one fault does not hide others.
func (r reply) container() ([]key, error) {
	s := r.of
	m, err := r.object()
	if err != nil {
		return nil, err
	}
	raw, ok := m["keys"]
	if !ok {
		raw = m["Keys"]
	}
	var items []map[string]json.RawMessage
	if json.Unmarshal(raw, &items) != nil {
		return nil, &finding{"a Key container", "no array of objects named keys"}
	}
	list := make([]key, len(items))
	for i, item := range items {
		k := &list[i]
		if json.Unmarshal(item["key_ID"], &k.id) != nil {
			return nil, &finding{"a key_ID that is a string", "none"}
		}
		if !bytes.HasPrefix(item["key"], []byte{'"'}) {
			return nil, &finding{"a key that is a string", "none"}
		}
		k.text = unescape(bytes.Trim(item["key"], `"`))
		s.bodies = append(s.bodies, k.text)
		if k.bits, k.sum, err = decode(k.text); err != nil {
			return nil, err
		}
		for name := range item {
			k.members = append(k.members, name)
		}
		slices.Sort(k.members)
	}
	return list, nil
}

// unescape copies a JSON string without the escapes that base64 can need.
func unescape(text []byte) []byte {
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		rest := text[i:]
		switch {
		case bytes.HasPrefix(rest, []byte(`\/`)):
			out, i = append(out, '/'), i+1
		case len(rest) >= 6 && bytes.HasPrefix(rest, []byte(`\u00`)):
			var c [1]byte
			if _, err := hex.Decode(c[:], rest[4:6]); err != nil {
				c[0] = '\\' // base64 refuses it
			}
			out, i = append(out, c[0]), i+5
		default:
			out = append(out, text[i])
		}
	}
	return out
}

// decode reads base64 of either alphabet, padded or not.
func decode(text []byte) (bits int, sum [sha256.Size]byte, err error) {
	plain := bytes.Clone(bytes.TrimRight(text, "="))
	defer secret.Wipe(plain)
	for i, c := range plain {
		switch c {
		case '-':
			plain[i] = '+'
		case '_':
			plain[i] = '/'
		}
	}
	raw := make([]byte, base64.RawStdEncoding.DecodedLen(len(plain)))
	defer secret.Wipe(raw)
	n, err := base64.RawStdEncoding.Decode(raw, plain)
	if err != nil || n == 0 {
		return 0, sum, &finding{"a key in base64", fmt.Sprintf("%d characters that are none", len(text))}
	}
	return 8 * n, sha256.Sum256(raw[:n]), nil
}

// draw takes n keys of the default size as the master, by POST.
func (s *session) draw(n int) ([]key, error) {
	r, err := s.post(s.cfg.Master, s.cfg.Slave.SAE, "enc_keys", fmt.Sprintf(`{"number":%d}`, n))
	if err != nil {
		return nil, err
	}
	list, err := r.container()
	if err == nil && len(list) != n {
		err = &finding{fmt.Sprintf("%d keys", n), fmt.Sprintf("%d keys", len(list))}
	}
	return list, err
}

// fetch asks for keys by key_ID as the slave, by POST.
func (s *session) fetch(ids ...string) (reply, error) {
	return s.post(s.cfg.Slave, s.cfg.Master.SAE, "dec_keys", idList(ids...))
}

func idList(ids ...string) string {
	return `{"key_IDs":[{"key_ID":"` + strings.Join(ids, `"},{"key_ID":"`) + `"}]}`
}

// known returns what Get status told, asking once.
func (s *session) known() (limits, error) {
	if s.limits != nil {
		return *s.limits, nil
	}
	r, err := s.get(s.cfg.Master, s.cfg.Slave.SAE, "status", "")
	if err != nil {
		return limits{}, skipped("Get status gives no answer")
	}
	var w struct {
		KeySize    int `json:"key_size"`
		MinSize    int `json:"min_key_size"`
		MaxSize    int `json:"max_key_size"`
		PerRequest int `json:"max_key_per_request"`
		MaxTargets int `json:"max_SAE_ID_count"`
	}
	if r.code != http.StatusOK || json.Unmarshal(r.body, &w) != nil || w.KeySize <= 0 {
		return limits{}, skipped("Get status gives no sizes to build on")
	}
	s.limits = &limits{w.KeySize, w.MinSize, w.MaxSize, w.PerRequest, w.MaxTargets}
	return *s.limits, nil
}

// stored asks for the number of keys that can be drawn now.
func (s *session) stored() (int, error) {
	r, err := s.get(s.cfg.Master, s.cfg.Slave.SAE, "status", "")
	if err != nil {
		return 0, err
	}
	m, err := r.object()
	if err != nil {
		return 0, err
	}
	var n int
	if json.Unmarshal(m["stored_key_count"], &n) != nil {
		return 0, &finding{"stored_key_count as an integer", "something else"}
	}
	return n, nil
}

// costs runs do and wants some keys to leave the stock meanwhile, exactly none
// or at least want: a KME may spend more than it hands out, to authenticate the
// channel to its peer and in the ends of blocks.
func (s *session) costs(want int, do func() error) error {
	before, err := s.stored()
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	after, err := s.stored()
	if err != nil {
		return err
	}
	if fell := before - after; fell < want || want == 0 && fell != 0 {
		return &finding{fmt.Sprintf("stored_key_count to fall by %d", want),
			fmt.Sprintf("%d before and %d after", before, after)}
	}
	return nil
}
