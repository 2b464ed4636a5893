package probe_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/secret"
)

// request lets a fault change what our server gets to read.
func request(change func(r *http.Request)) mutant {
	return mutant{wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			change(r)
			next.ServeHTTP(w, r)
		})
	}}
}

func setBody(r *http.Request, s string) {
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(s)), int64(len(s))
}

// body is a server that reads one text of a body as another.
func body(from, to string) mutant {
	return request(func(r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		setBody(r, strings.ReplaceAll(string(b), from, to))
	})
}

// query is a server that reads one text of a query as another.
func query(from, to string) mutant {
	return request(func(r *http.Request) {
		r.URL.RawQuery = strings.ReplaceAll(r.URL.RawQuery, from, to)
	})
}

// empty is a server that reads a body which it does not understand as {}.
func empty(text string) mutant { return body(text, "{}") }

// method is a server that takes one method as another.
func method(from, to string) mutant {
	return request(func(r *http.Request) {
		if r.Method == from {
			r.Method = to
		}
	})
}

// path is a server that takes one end of a path as another.
func path(from, to string) mutant {
	return request(func(r *http.Request) {
		if strings.HasSuffix(r.URL.Path, from) {
			r.URL.Path = strings.TrimSuffix(r.URL.Path, from) + to
			r.URL.RawPath = ""
		}
	})
}

// kme puts a faulty key manager behind our door.
func kme(faulty func(etsi014.KME) etsi014.KME) mutant {
	return mutant{config: func(c *etsi014.HandlerConfig) { c.KME = faulty(c.KME) }}
}

// forgetful hands any key that was drawn to anybody, again and again.
type forgetful struct {
	etsi014.KME
	mu   sync.Mutex
	keys map[etsi014.KeyID][]byte
}

func (f *forgetful) Keys(
	ctx context.Context, who etsi014.Caller, req etsi014.KeyRequest,
) (etsi014.Container, error) {
	c, err := f.KME.Keys(ctx, who, req)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range c.Keys {
		f.keys[k.ID] = bytes.Clone(k.Bits.Expose())
	}
	return c, err
}

func (f *forgetful) KeysByID(
	_ context.Context, _ etsi014.Caller, req etsi014.IDRequest,
) (etsi014.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var c etsi014.Container
	for _, id := range req.IDs {
		if f.keys[id] == nil {
			return etsi014.Container{}, etsi014.ErrUnknownKey
		}
		c.Keys = append(c.Keys, etsi014.Key{ID: id, Bits: secret.Copy(f.keys[id])})
	}
	return c, nil
}

func forgetfulKME() mutant {
	return kme(func(k etsi014.KME) etsi014.KME {
		return &forgetful{KME: k, keys: map[etsi014.KeyID][]byte{}}
	})
}

// apart hands out keys between sites alone.
type apart struct{ etsi014.KME }

func (a apart) Keys(
	ctx context.Context, who etsi014.Caller, req etsi014.KeyRequest,
) (etsi014.Container, error) {
	if who.SAE == "kochi" {
		return etsi014.Container{}, etsi014.ErrRequest
	}
	return a.KME.Keys(ctx, who, req)
}

// clumsy takes the keys that it then refuses, one by one and as the slave.
type clumsy struct{ etsi014.KME }

func (c clumsy) KeysByID(
	ctx context.Context, who etsi014.Caller, req etsi014.IDRequest,
) (etsi014.Container, error) {
	got, err := c.KME.KeysByID(ctx, who, req)
	if err != nil {
		for _, id := range req.IDs {
			lost, _ := c.KME.KeysByID(ctx, etsi014.Caller{SAE: "kochi"}, etsi014.IDRequest{
				Initiator: req.Initiator, IDs: []etsi014.KeyID{id},
			})
			lost.Clear()
		}
	}
	return got, err
}

func clumsyKME() mutant {
	return kme(func(k etsi014.KME) etsi014.KME { return clumsy{k} })
}

// spend is a server that takes a key when what ends a request's path is asked
// and answered with a code.
func spend(call string, code int) mutant {
	var inner etsi014.KME
	m := reply(func(r *http.Request, a *httptest.ResponseRecorder) {
		if !strings.HasSuffix(r.URL.Path, call) || a.Code != code {
			return
		}
		lost, err := inner.Keys(r.Context(), etsi014.Caller{SAE: "tokyo"}, etsi014.KeyRequest{
			Targets: []etsi014.SAEID{"kochi"}, Number: 1,
		})
		if err != nil {
			panic(err)
		}
		lost.Clear()
	})
	m.config = func(c *etsi014.HandlerConfig) { inner = c.KME }
	return m
}

// partial is a server that gives the first key where not all can be given.
func partial() mutant {
	return mutant{wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			setBody(r, string(b))
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, r)
			if first, _, more := strings.Cut(string(b), "},"); more && rec.Code == 400 {
				setBody(r, first+"}]}")
				rec = httptest.NewRecorder()
				next.ServeHTTP(rec, r)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		})
	}}
}

// http10 is a server that answers everything in HTTP/1.0.
func http10() mutant {
	return mutant{wrap: func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}")
		})
	}}
}

// anybody is a server that takes everybody for the master.
func anybody(auth tls.ClientAuthType) mutant {
	return mutant{
		tls: func(_ testing.TB, c *tls.Config) { c.ClientAuth = auth },
		config: func(c *etsi014.HandlerConfig) {
			c.Identify = func(*tls.ConnectionState) (etsi014.Caller, error) {
				return etsi014.Caller{SAE: "tokyo"}, nil
			}
		},
	}
}

func versions(least, most uint16) mutant {
	return mutant{tls: func(_ testing.TB, c *tls.Config) { c.MinVersion, c.MaxVersion = least, most }}
}

// strictBody is a server that refuses a request whose body or query has a text.
func strictBody(text string) mutant {
	return mutant{wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			setBody(r, string(b))
			if strings.Contains(string(b)+"?"+r.URL.RawQuery, text) {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			next.ServeHTTP(w, r)
		})
	}}
}

// foreignDoor shows a certificate of another authority.
func foreignDoor(t testing.TB, c *tls.Config) {
	other := etsitest.NewCA(t, "another CA")
	c.Certificates = []tls.Certificate{other.Issue(t, etsitest.Leaf{
		Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
	})}
}

// withoutAllow is a server whose 405 names no method.
func withoutAllow() mutant {
	return reply(func(_ *http.Request, a *httptest.ResponseRecorder) { a.Header().Del("Allow") })
}

// brokenKME fails in a way of its own.
func brokenKME() mutant {
	return kme(func(etsi014.KME) etsi014.KME {
		return &etsitest.KME{Fail: func() error { return errors.New("no disk") }}
	})
}

// mutants has one fault for each case.
func mutants() map[string]mutant {
	all := map[string]mutant{}
	for _, group := range []map[string]mutant{
		transportFaults(), statusFaults(), encFaults(), encLeniences(), decFaults(),
	} {
		for name, m := range group {
			all[name] = m
		}
	}
	return all
}

func transportFaults() map[string]mutant {
	return map[string]mutant{
		"tls-mutual":              {tls: foreignDoor},
		"tls-1.3":                 versions(tls.VersionTLS12, tls.VersionTLS12),
		"tls-1.2":                 versions(tls.VersionTLS13, tls.VersionTLS13),
		"tls-1.1":                 versions(tls.VersionTLS10, tls.VersionTLS13),
		"tls-no-certificate":      anybody(tls.NoClientCert),
		"tls-foreign-certificate": anybody(tls.RequireAnyClientCert),
		"http-1.1":                http10(),
		"path-unknown":            recode(404, 200),
		"path-case":               path("STATUS", "status"),
		"path-escaped":            member("slave_SAE_ID", "%6B%6F%63%68%69"),
		"status-post":             method("POST", "GET"),
		"enc-put":                 withoutAllow(),
		"dec-delete":              message(405, nil),
		"enc-head":                method("HEAD", "GET"),
		"dec-head": request(func(r *http.Request) {
			if r.Method == "HEAD" {
				r.Method = "GET"
			}
		}),
	}
}

func statusFaults() map[string]mutant {
	return map[string]mutant{
		"status-200":          brokenKME(),
		"status-content-type": header(200, "Content-Type", "text/plain"),
		"status-no-store":     header(200, "Cache-Control", "max-age=60"),
		"status-source-kme":   member("source_KME_ID", ""),
		"status-target-kme":   member("target_KME_ID", nil),
		"status-master":       member("master_SAE_ID", "kochi"),
		"status-slave":        member("slave_SAE_ID", "tokyo"),
		"status-key-size":     member("key_size", 0),
		"status-stored":       member("stored_key_count", "1000"),
		"status-max-count":    member("max_key_count", nil),
		"status-per-request":  member("max_key_per_request", 1.5),
		"status-max-size":     member("max_key_size", true),
		"status-min-size":     member("min_key_size", -8),
		"status-max-sae":      member("max_SAE_ID_count", []int{}),
		"status-stored-bound": member("max_key_count", 999),
		"status-size-below":   member("max_key_size", 128),
		"status-size-above":   member("min_key_size", 512),
		"status-members":      member("qber", 0.02),
		"status-free":         spend("/status", 200),
	}
}

func encFaults() map[string]mutant {
	upper := func(_ int, k map[string]any) { k["key_ID"] = strings.ToUpper(k["key_ID"].(string)) }
	return map[string]mutant{
		"enc-get-number":   query("number=3", "number=2"),
		"enc-get-size":     query("size=64", "size=512"), // bytes for bits
		"enc-get-unknown":  strictBody("quietline_probe"),
		"enc-post-none":    mutant{wrap: refuseNoBody},
		"enc-post-empty":   strictBody("{}"),
		"enc-post-number":  body(`"number":3`, `"number":1`),
		"enc-post-size":    body(`"size":64`, `"size":512`),
		"enc-post-unknown": strictBody("quietline_probe"),
		"enc-post-optional": body("extension_optional",
			"extension_mandatory"),
		"enc-content-type": header(200, "Content-Type", "application/octet-stream"),
		"enc-no-store":     header(200, "Cache-Control", ""),
		"enc-keys-name": edit(200, func(m map[string]any) {
			m["Keys"] = m["keys"]
			delete(m, "keys")
		}),
		"enc-container-members": member("count", 1),
		"enc-key-members":       eachKey(func(_ int, k map[string]any) { k["size"] = 256 }),
		"enc-uuid": eachKey(func(_ int, k map[string]any) {
			k["key_ID"] = strings.ReplaceAll(k["key_ID"].(string), "-", "")
		}),
		"enc-uuid-lower": eachKey(upper),
		"enc-ids-differ": eachKey(func(i int, k map[string]any) {
			k["key_ID"] = "00000000-0000-4000-8000-000000000000"
		}),
		"enc-keys-differ": eachKey(func(_ int, k map[string]any) {
			k["key"] = strings.Repeat("A", 43) + "="
		}),
		"enc-base64": eachKey(func(_ int, k map[string]any) {
			k["key"] = strings.TrimRight(k["key"].(string), "=")
		}),
		"enc-takes-stock": member("stored_key_count", 1000),
		"enc-multicast":   body("additional_slave_SAE_IDs", "x"),
		"enc-same-kme":    kme(func(k etsi014.KME) etsi014.KME { return apart{k} }),
	}
}

// refuseNoBody is a server that wants a body with every POST.
func refuseNoBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" && r.ContentLength == 0 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// encLeniences are servers that serve what they should refuse.
func encLeniences() map[string]mutant {
	return map[string]mutant{
		"enc-get": eachKey(func(_ int, k map[string]any) { // 512 bits
			k["key"] = strings.Repeat("A", 86) + "=="
		}),
		"enc-size-odd":        message(400, "Size shall be a multiple of eight"),
		"enc-size-zero":       body(`"size":0`, `"size":256`),
		"enc-size-negative":   body(`"size":-256`, `"size":256`),
		"enc-size-string":     body(`"256"`, "256"),
		"enc-size-query":      query("large", "256"),
		"enc-size-large":      body(`"size":4104`, `"size":4096`),
		"enc-size-small":      body(`"size":56`, `"size":64`),
		"enc-number-zero":     body(`"number":0`, `"number":1`),
		"enc-number-negative": body(`"number":-1`, `"number":1`),
		"enc-number-string":   body(`"1"`, "1"),
		"enc-number-fraction": body("1.5", "1"),
		"enc-number-large":    body("129", "128"),
		"enc-slaves-many":     body("additional_slave_SAE_IDs", "x"),
		"enc-mandatory":       body("extension_mandatory", "x"),
		"enc-mandatory-text":  message(400, "unknown extension"),
		"enc-json-broken":     body(`{"number":1`, `{"number":1}`),
		"enc-json-array":      empty("[1]"),
		"enc-json-two":        empty(`{"number":1}{}`),
		"enc-json-twice":      empty(`{"number":1,"number":2}`),
		"enc-error-type":      header(400, "Content-Type", "text/html"),
		"enc-error-free":      spend("/enc_keys", 400),
	}
}

func decFaults() map[string]mutant {
	const unknown = "71756965-746c-8696-8e65-70726f626521"
	wrongBytes := reply(func(r *http.Request, a *httptest.ResponseRecorder) {
		if strings.HasSuffix(r.URL.Path, "dec_keys") && a.Code == 200 {
			b := bytes.Replace(a.Body.Bytes(), []byte(`"key":"`), []byte(`"key":"AAAA`), 1)
			a.Body.Reset()
			_, _ = a.Body.Write(b)
		}
	})
	return map[string]mutant{
		"dec-get":              wrongBytes,
		"dec-post":             wrongBytes,
		"dec-order":            mutant{wrap: reversed},
		"dec-case":             mutant{wrap: caseful},
		"dec-extension":        strictBody("extension"),
		"dec-content-type":     header(200, "Content-Type", ""),
		"dec-no-store":         header(200, "Cache-Control", "private"),
		"dec-late":             mutant{wrap: lastDrawOnly()},
		"dec-unknown":          recode(400, 404),
		"dec-unknown-text":     message(400, "no such key"),
		"dec-unknown-post":     message(400, "no such key"),
		"dec-none":             recode(400, 503),
		"dec-no-body":          recode(400, 200),
		"dec-empty":            recode(400, 500),
		"dec-strings":          recode(400, 422),
		"dec-no-uuid":          message(400, ""),
		"dec-json-broken":      message(400, 17),
		"dec-twice":            forgetfulKME(),
		"dec-twice-text":       message(400, "key "+unknown+" is gone"),
		"dec-all-or-none":      partial(),
		"dec-all-or-none-free": clumsyKME(),
		"dec-by-master":        forgetfulKME(),
		"dec-stranger":         recode(401, 400),
		"dec-stranger-free":    clumsyKME(),
		"dec-wrong-path":       forgetfulKME(),
		"dec-error-type":       header(400, "Content-Type", "application/problem+json"),
	}
}

// reversed is a server that answers the last key first.
func reversed(next http.Handler) http.Handler {
	return edit(200, func(m map[string]any) {
		if list, ok := m["keys"].([]any); ok && len(list) > 1 {
			list[0], list[len(list)-1] = list[len(list)-1], list[0]
		}
	}).wrap(next)
}

// caseful is a server that compares key_IDs as texts.
func caseful(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if id := r.URL.Query().Get("key_ID"); id != strings.ToLower(id) {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// lastDrawOnly is a server that remembers only the last draw.
func lastDrawOnly() func(http.Handler) http.Handler {
	var mu sync.Mutex
	var last string
	return reply(func(r *http.Request, a *httptest.ResponseRecorder) {
		mu.Lock()
		defer mu.Unlock()
		if strings.HasSuffix(r.URL.Path, "enc_keys") {
			last = a.Body.String()
			return
		}
		for _, part := range strings.Split(a.Body.String(), `"key_ID":"`)[1:] {
			if !strings.Contains(last, part[:36]) {
				a.Code = http.StatusBadRequest
			}
		}
	}).wrap
}
