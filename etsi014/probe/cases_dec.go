package probe

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// drawn makes a case that begins with keys drawn by the master.
func drawn(
	name, clause, title string, soft bool, n int, run func(*session, []key) error,
) Case {
	return Case{Name: name, Clause: clause, Title: title, soft: soft, run: func(s *session) error {
		list, err := s.draw(n)
		if err != nil {
			return err
		}
		return run(s, list)
	}}
}

func (s *session) decGet(id string) (reply, error) {
	return s.get(s.cfg.Slave, s.cfg.Master.SAE, "dec_keys", "?key_ID="+url.QueryEscape(id))
}

func ids(list []key) []string {
	var names []string
	for _, k := range list {
		names = append(names, k.id)
	}
	return names
}

// decCases are about Get key with key IDs that succeeds; clause 6.3.
var decCases = []Case{
	drawn("dec-get", "6.3", "GET gives the slave the master's key", false, 1,
		func(s *session, k []key) error {
			r, err := s.decGet(k[0].id)
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-post", "6.3 table 11", "POST gives the slave the master's keys", false, 3,
		func(s *session, k []key) error {
			r, err := s.fetch(ids(k)...)
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-order", "6.3", "the order asked is the order answered", true, 3,
		func(s *session, k []key) error {
			slices.Reverse(k)
			r, err := s.fetch(ids(k)...)
			if err := firstOf(err, wantSame(r, k)); err != nil {
				return err
			}
			got, err := r.container()
			for i := range got {
				if !strings.EqualFold(got[i].id, k[i].id) {
					return &finding{"the order of the request", "another"}
				}
			}
			return err
		}),
	drawn("dec-case", "RFC 9562 4", "a key_ID is taken in either case", true, 1,
		func(s *session, k []key) error {
			r, err := s.decGet(strings.ToUpper(k[0].id))
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-extension", "6.3 table 11", "extension objects are taken", false, 1,
		func(s *session, k []key) error {
			r, err := s.post(s.cfg.Slave, s.cfg.Master.SAE, "dec_keys", `{"key_IDs":[{"key_ID":"`+
				k[0].id+`","key_ID_extension":{}}],"key_IDs_extension":{}}`)
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-content-type", "5.1", "as application/json", false, 1,
		func(s *session, k []key) error {
			r, err := s.decGet(k[0].id)
			return firstOf(err, wantCode(r, 200), wantJSON(r))
		}),
	drawn("dec-no-store", "RFC 9111 5.2.2.5", "for no cache", true, 1,
		func(s *session, k []key) error {
			r, err := s.decGet(k[0].id)
			return firstOf(err, wantCode(r, 200), wantNoStore(r))
		}),
	drawn("dec-late", "6.3", "keys of several draws come in one answer", false, 1,
		func(s *session, k []key) error {
			more, err := s.draw(2)
			if err != nil {
				return err
			}
			all := append(k, more...)
			r, err := s.fetch(ids(all)...)
			return firstOf(err, wantSame(r, all))
		}),
}

// strange is a UUID of version 8 (RFC 9562), which no generator makes.
const strange = "71756965-746c-8696-8e65-70726f626521"

// dec makes a case out of one request that must be refused with 400.
func dec(name, title, query, body string, text string) Case {
	return Case{Name: name, Clause: "6.3", Title: title, run: func(s *session) error {
		a := ask{as: s.cfg.Slave, path: keys(s.cfg.Master.SAE, "dec_keys") + query}
		if body != "" {
			a.method, a.body = http.MethodPost, strings.TrimPrefix(body, "-")
		}
		r, err := s.send(a)
		return firstOf(err, wantRefusal(r, http.StatusBadRequest, text))
	}}
}

// decRefusals are requests by key_ID that must not succeed; clause 6.3.
var decRefusals = []Case{
	dec("dec-unknown", "an unknown key_ID is 400", "?key_ID="+strange, "", ""),
	dec("dec-unknown-text", "with the standard's text", "?key_ID="+strange, "", notFound),
	dec("dec-unknown-post", "by POST too", "", idList(strange), notFound),
	dec("dec-none", "GET without a key_ID is 400", "", "", ""),
	dec("dec-no-body", "POST without a body is 400", "", "-", ""),
	dec("dec-empty", "an empty list is 400", "", `{"key_IDs":[]}`, ""),
	dec("dec-strings", "an array of strings is 400", "", `{"key_IDs":["`+strange+`"]}`, ""),
	dec("dec-no-uuid", "a key_ID that is no UUID is 400", "?key_ID=1234", "", ""),
	dec("dec-json-broken", "a broken body is 400", "", `{"key_IDs":[`, ""),
	drawn("dec-twice", "6.3", "a key is delivered once: again is 400", false, 1, again("")),
	drawn("dec-twice-text", "6.3", "with the standard's text", false, 1, again(notFound)),
	drawn("dec-all-or-none", "6.3", "one unknown key_ID fails the whole request", false, 1,
		func(s *session, k []key) error {
			r, err := s.fetch(k[0].id, strange)
			return firstOf(err, wantRefusal(r, http.StatusBadRequest, ""))
		}),
	drawn("dec-all-or-none-free", "6.3", "and takes no key", false, 1,
		func(s *session, k []key) error {
			if _, err := s.fetch(k[0].id, strange); err != nil {
				return err
			}
			r, err := s.fetch(k[0].id)
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-by-master", "6.3 table 3", "the master is no slave of its key: 401", false, 1,
		func(s *session, k []key) error {
			r, err := s.post(s.cfg.Master, s.cfg.Slave.SAE, "dec_keys", idList(k[0].id))
			if s.cfg.Master.URL != s.cfg.Slave.URL && r.code == http.StatusBadRequest {
				return err // the master's own KME has forgotten the key, as it should
			}
			return firstOf(err, wantRefusal(r, http.StatusUnauthorized, ""))
		}),
	drawn("dec-stranger", "6.3 table 3", "an SAE that was not named gets 401", false, 1,
		func(s *session, k []key) error {
			r, err := s.asThird(k[0].id)
			return firstOf(err, wantRefusal(r, http.StatusUnauthorized, ""))
		}),
	drawn("dec-stranger-free", "6.3", "and takes no key", false, 1,
		func(s *session, k []key) error {
			if _, err := s.asThird(k[0].id); err != nil {
				return err
			}
			r, err := s.fetch(k[0].id)
			return firstOf(err, wantSame(r, k))
		}),
	drawn("dec-wrong-path", "6.3", "a path that names another master gives no key", false, 1,
		func(s *session, k []key) error {
			r, err := s.post(s.cfg.Slave, s.cfg.Slave.SAE, "dec_keys", idList(k[0].id))
			return firstOf(err, wantCode(r, http.StatusBadRequest, http.StatusUnauthorized))
		}),
	{Name: "dec-error-type", Clause: "5.1", Title: "an Error is application/json",
		run: func(s *session) error {
			r, err := s.decGet(strange)
			return firstOf(err, wantCode(r, 400), wantJSON(r))
		}},
}

func again(text string) func(*session, []key) error {
	return func(s *session, k []key) error {
		r, err := s.decGet(k[0].id)
		if err := firstOf(err, wantSame(r, k)); err != nil {
			return err
		}
		r, err = s.decGet(k[0].id)
		return firstOf(err, wantRefusal(r, http.StatusBadRequest, text))
	}
}

func (s *session) asThird(id string) (reply, error) {
	if s.cfg.Third == nil {
		return reply{}, skipped("no third SAE is given")
	}
	return s.post(*s.cfg.Third, s.cfg.Master.SAE, "dec_keys", idList(id))
}
