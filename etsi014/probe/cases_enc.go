package probe

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/quietline/quietline/secret"
)

// enc makes a case out of one Get key request; with a body it is a POST.
func enc(
	name, clause, title string, soft bool, query, body string, want func(*session, reply) error,
) Case {
	return Case{Name: name, Clause: clause, Title: title, soft: soft, run: func(s *session) error {
		r, err := s.encAs(s.cfg.Master, query, body)
		if err != nil {
			return err
		}
		return want(s, r)
	}}
}

// encAs asks for keys to the slave: by POST with a body, of which "-" stands for
// an empty one, else by GET with a query.
func (s *session) encAs(as Party, query, body string) (reply, error) {
	if body == "" {
		return s.get(as, s.cfg.Slave.SAE, "enc_keys", query)
	}
	return s.post(as, s.cfg.Slave.SAE, "enc_keys", strings.TrimPrefix(body, "-"))
}

// wantN wants n keys of the default size.
func wantN(n int) func(*session, reply) error {
	return func(s *session, r reply) error {
		known, err := s.known()
		return firstOf(err, wantKeys(r, n, known.keySize))
	}
}

// bySize asks for n keys of a size that is not the default, by GET or POST.
func bySize(n int, post bool) func(*session) error {
	return func(s *session) error {
		known, err := s.known()
		if err != nil {
			return err
		}
		size := known.maxSize
		if min := (known.minSize + 7) / 8 * 8; min != known.keySize {
			size = min
		}
		query, body := fmt.Sprintf("?number=%d&size=%d", n, size), ""
		if post {
			query, body = "", fmt.Sprintf(`{"number":%d,"size":%d}`, n, size)
		}
		r, err := s.encAs(s.cfg.Master, query, body)
		return firstOf(err, wantKeys(r, n, size))
	}
}

var (
	uuidForm  = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	lowerUUID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// each asks a question about every key of an answer.
func each(ask func(key) error) func(*session, reply) error {
	return func(_ *session, r reply) error {
		list, err := r.container()
		if err == nil && len(list) == 0 {
			err = &finding{"keys", "none"}
		}
		for _, k := range list {
			err = firstOf(err, ask(k))
		}
		return err
	}
}

func matches(form *regexp.Regexp, want string) func(key) error {
	return func(k key) error {
		if !form.MatchString(k.id) {
			return &finding{want, fmt.Sprintf("%.60q", k.id)}
		}
		return nil
	}
}

// distinct wants a mark of every key to be its own.
func distinct[T comparable](what string, mark func(key) T) func(*session, reply) error {
	return func(_ *session, r reply) error {
		list, err := r.container()
		seen := make(map[T]bool)
		for _, k := range list {
			if seen[mark(k)] {
				return &finding{what + " that differ", "one twice"}
			}
			seen[mark(k)] = true
		}
		return err
	}
}

// encCases are about Get key that succeeds; clause 6.2, tables 9 and 10.
var encCases = []Case{
	enc("enc-get", "6.2", "GET gives one key of the default size", false, "", "", wantN(1)),
	enc("enc-get-number", "6.2", "GET gives as many as asked", false, "?number=3", "", wantN(3)),
	{Name: "enc-get-size", Clause: "6.2", Title: "GET gives the size asked, in bits",
		run: bySize(1, false)},
	enc("enc-get-unknown", "6.2", "GET with an unknown query name is served", true,
		"?number=1&quietline_probe=1", "", wantN(1)),
	enc("enc-post-none", "6.2", "POST without a body gives one key", false, "", "-", wantN(1)),
	enc("enc-post-empty", "6.2", "POST of an empty object gives one key", false, "", "{}", wantN(1)),
	enc("enc-post-number", "6.2 table 9", "POST gives as many as asked", false, "", `{"number":3}`,
		wantN(3)),
	{Name: "enc-post-size", Clause: "6.2 table 9", Title: "POST gives number and size asked",
		run: bySize(2, true)},
	enc("enc-post-unknown", "6.2", "POST with an unknown member is served", true, "",
		`{"quietline_probe":{"a":[1]}}`, wantN(1)),
	enc("enc-post-optional", "6.2 table 9",
		"an unknown extension_optional is passed over or refused with the standard's text", false, "",
		`{"extension_optional":[{"quietline_probe":1}]}`, func(s *session, r reply) error {
			if r.code == http.StatusOK {
				return wantN(1)(s, r)
			}
			return wantRefusal(r, 400, "not all extension_optional request options handled")
		}),
	enc("enc-content-type", "5.1", "as application/json", false, "", "{}",
		func(_ *session, r reply) error { return firstOf(wantCode(r, 200), wantJSON(r)) }),
	enc("enc-no-store", "RFC 9111 5.2.2.5", "for no cache", true, "", "{}",
		func(_ *session, r reply) error { return firstOf(wantCode(r, 200), wantNoStore(r)) }),
	enc("enc-keys-name", "6.2 table 10", "the array is called keys, as in every example", true, "",
		"{}", func(_ *session, r reply) error {
			m, err := r.object()
			if err == nil && m["keys"] == nil {
				err = &finding{"a member keys", "none"}
			}
			return err
		}),
	enc("enc-container-members", "6.2 table 10", "nothing else outside the extension", true, "", "{}",
		func(_ *session, r reply) error {
			m, err := r.object()
			return firstOf(err, wantMembers(slices.Sorted(maps.Keys(m)), "keys", "Keys",
				"key_container_extension"))
		}),
	enc("enc-key-members", "6.2 table 10", "a key has no other members", true, "", "{}",
		each(func(k key) error {
			return wantMembers(k.members, "key_ID", "key", "key_ID_extension", "key_extension")
		})),
	enc("enc-uuid", "6.2 table 10", "a key_ID is a UUID", false, "", `{"number":3}`,
		each(matches(uuidForm, "a UUID"))),
	enc("enc-uuid-lower", "RFC 9562 4", "a key_ID is lower case", true, "", `{"number":3}`,
		each(matches(lowerUUID, "a UUID in lower case"))),
	enc("enc-ids-differ", "6.2 table 10", "key_IDs differ", false, "", `{"number":8}`,
		distinct("key_IDs", func(k key) string { return strings.ToLower(k.id) })),
	enc("enc-keys-differ", "6.2", "keys differ", false, "", `{"number":8}`,
		distinct("keys", func(k key) [32]byte { return k.sum })),
	enc("enc-base64", "6.2 table 10", "a key is padded base64 of the standard alphabet", false, "",
		`{"number":8}`, each(func(k key) error {
			out := make([]byte, base64.StdEncoding.DecodedLen(len(k.text)))
			_, err := base64.StdEncoding.Strict().Decode(out, k.text)
			secret.Wipe(out)
			if err != nil {
				return &finding{"RFC 4648 section 4 base64", "another encoding"}
			}
			return nil
		})),
	{Name: "enc-takes-stock", Clause: "6.2", Title: "drawn keys leave the stock", soft: true,
		run: func(s *session) error {
			return s.costs(2, func() error { _, err := s.draw(2); return err })
		}},
	{Name: "enc-multicast", Clause: "6.2 table 9", Title: "additional slaves get the same key",
		run: func(s *session) error {
			known, err := s.known()
			switch {
			case err != nil:
				return err
			case s.cfg.Third == nil:
				return skipped("no third SAE is given")
			case known.maxTargets == 0:
				return skipped("max_SAE_ID_count is 0")
			}
			r, err := s.encAs(s.cfg.Master, "",
				fmt.Sprintf(`{"additional_slave_SAE_IDs":[%q]}`, s.cfg.Third.SAE))
			if err != nil {
				return err
			}
			list, err := r.container()
			if err != nil || len(list) == 0 {
				return firstOf(err, &finding{"a key", "none"})
			}
			for _, p := range []Party{s.cfg.Slave, *s.cfg.Third} {
				r, err := s.post(p, s.cfg.Master.SAE, "dec_keys", idList(list[0].id))
				if err := firstOf(err, wantSame(r, list)); err != nil {
					return err
				}
			}
			return nil
		}},
	{Name: "enc-same-kme", Clause: "6.2", Title: "two SAEs of one KME share keys", soft: true,
		run: func(s *session) error {
			if s.cfg.Third == nil {
				return skipped("no third SAE is given")
			}
			r, err := s.post(s.cfg.Slave, s.cfg.Third.SAE, "enc_keys", "{}")
			if err != nil {
				return err
			}
			list, err := r.container()
			if err != nil || len(list) == 0 {
				return firstOf(err, &finding{"a key", "none"})
			}
			r, err = s.post(*s.cfg.Third, s.cfg.Slave.SAE, "dec_keys", idList(list[0].id))
			return firstOf(err, wantSame(r, list[:1]))
		}},
}
