package probe

import (
	"fmt"
	"net/http"
	"strings"
)

// refusal wants 400 with an Error of a text, if one is given.
func refusal(text string) func(*session, reply) error {
	return func(_ *session, r reply) error { return wantRefusal(r, http.StatusBadRequest, text) }
}

// beyond asks for what the status rules out; with may say that it rules out
// nothing.
func beyond(name, title string, with func(limits) (body string, err error)) Case {
	return Case{Name: name, Clause: "6.2 table 9", Title: title, run: func(s *session) error {
		known, err := s.known()
		if err != nil {
			return err
		}
		body, err := with(known)
		if err != nil {
			return err
		}
		r, err := s.encAs(s.cfg.Master, "", body)
		return firstOf(err, wantRefusal(r, http.StatusBadRequest, ""))
	}}
}

const (
	oddSize  = "size shall be a multiple of 8"
	notMet   = "not all extension_mandatory parameters are supported"
	notFound = "one or more keys specified are not found on KME"
)

// encRefusals are requests for keys that break a rule; clause 6.2, table 9.
var encRefusals = []Case{
	enc("enc-size-odd", "6.2 table 9", "a size of 257 is given, or 400 with the standard's text",
		false, "", `{"size":257}`, func(_ *session, r reply) error {
			if r.code == http.StatusOK {
				return wantKeys(r, 1, 264) // as base64 can tell
			}
			return wantRefusal(r, 400, oddSize)
		}),
	enc("enc-size-zero", "6.2 table 9", "a size of 0 is 400", false, "", `{"size":0}`, refusal("")),
	enc("enc-size-negative", "6.2 table 9", "a negative size is 400", false, "", `{"size":-256}`,
		refusal("")),
	enc("enc-size-string", "6.2 table 9", "a size as a string is 400", false, "", `{"size":"256"}`,
		refusal("")),
	enc("enc-size-query", "6.2", "a size that is no number is 400 in a query", false, "?size=large",
		"", refusal("")),
	beyond("enc-size-large", "a size above max_key_size is 400", func(l limits) (string, error) {
		return fmt.Sprintf(`{"size":%d}`, l.maxSize/8*8+8), nil
	}),
	beyond("enc-size-small", "a size below min_key_size is 400", func(l limits) (string, error) {
		if l.minSize <= 8 {
			return "", skipped("min_key_size is not above 8")
		}
		return fmt.Sprintf(`{"size":%d}`, (l.minSize-1)/8*8), nil
	}),
	enc("enc-number-zero", "6.2 table 9", "a number of 0 is 400", false, "", `{"number":0}`,
		refusal("")),
	enc("enc-number-negative", "6.2 table 9", "a negative number is 400", false, "",
		`{"number":-1}`, refusal("")),
	enc("enc-number-string", "6.2 table 9", "a number as a string is 400", false, "",
		`{"number":"1"}`, refusal("")),
	enc("enc-number-fraction", "6.2 table 9", "half a key is 400", false, "", `{"number":1.5}`,
		refusal("")),
	beyond("enc-number-large", "a number above max_key_per_request is 400",
		func(l limits) (string, error) { return fmt.Sprintf(`{"number":%d}`, l.perRequest+1), nil }),
	beyond("enc-slaves-many", "more slaves than max_SAE_ID_count are 400",
		func(l limits) (string, error) {
			names := make([]string, l.maxTargets+1)
			for i := range names {
				names[i] = fmt.Sprintf(`"quietline-probe-%d"`, i)
			}
			return `{"additional_slave_SAE_IDs":[` + strings.Join(names, ",") + `]}`, nil
		}),
	enc("enc-mandatory", "6.2 table 9", "an unknown extension_mandatory is 400", false, "",
		`{"extension_mandatory":[{"quietline_probe":1}]}`, refusal("")),
	enc("enc-mandatory-text", "6.2 table 9", "with the standard's text", false, "",
		`{"extension_mandatory":[{"quietline_probe":1}]}`, refusal(notMet)),
	enc("enc-json-broken", "RFC 8259", "a broken body is 400", false, "", `{"number":1`, refusal("")),
	enc("enc-json-array", "6.2", "an array as body is 400", false, "", `[1]`, refusal("")),
	enc("enc-json-two", "RFC 8259", "two values as body are 400", true, "", `{"number":1}{}`,
		refusal("")),
	enc("enc-json-twice", "RFC 8259 4", "a member that stands twice is 400", true, "",
		`{"number":1,"number":2}`, refusal("")),
	enc("enc-error-type", "5.1", "an Error is application/json", false, "", `{"number":0}`,
		func(_ *session, r reply) error { return firstOf(wantCode(r, 400), wantJSON(r)) }),
	{Name: "enc-error-free", Clause: "6.2", Title: "a refused request takes no key",
		run: func(s *session) error {
			return s.costs(0, func() error {
				_, err := s.encAs(s.cfg.Master, "", `{"number":2,"size":-8}`)
				return err
			})
		}},
}
