package etsi014_test

import (
	"testing"

	"github.com/quietline/quietline/etsi014"
)

// Each ready profile takes what its box is known to send, with the answer that
// the box can read.
func TestReadyProfiles(t *testing.T) {
	var profile etsi014.Profile
	w := newWorld(t, func(c *etsi014.HandlerConfig) {
		c.Profile = func(etsi014.SAEID) etsi014.Profile { return profile }
	})
	unknown := dec + "?key_ID=" + aUUID
	all := etsi014.Profiles()
	for _, tc := range []struct {
		profile, method, target, body string
		code, keys, bits              int
	}{
		{"strict", "GET", enc + "?number=1&size=256", "", 200, 1, 256},
		{"strict", "POST", enc + "?number=2", "{}", 400, 0, 0},
		{"strict", "GET", enc, "{}", 400, 0, 0},
		{"default", "GET", enc + "?key_size=128", "", 200, 1, 128},
		{"default", "POST", enc + "?number=2", "", 200, 2, 256},
		{"default", "GET", enc, "{}", 400, 0, 0},
		{"default", "GET", unknown, "", 400, 0, 0},
		{"fortigate", "GET", enc + "?number=1&size=256", "", 200, 1, 256},
		{"fortigate", "POST", enc, `{"number":1,"size":256}`, 200, 1, 256},
		{"junos", "GET", enc + "?key_size=256", "", 200, 1, 256},
		{"junos", "GET", enc + "?number=4&key_size=256", "", 200, 4, 256},
		{"junos", "GET", enc + "?number=5&key_size=256", "", 400, 0, 0},
		{"junos", "GET", unknown + "&key_size=256", "", 400, 0, 0},
		{"strongswan", "POST", enc, `{"size":256}`, 200, 1, 256},
		{"arnika", "GET", enc + "?number=1&size=256", "", 200, 1, 256},
		{"arnika", "GET", enc, `{"number":1,"size":256}`, 200, 1, 256},
		{"arnika", "POST", enc + "?number=1&size=256", "", 200, 1, 256},
		{"arnika", "GET", unknown, "", 404, 0, 0},
		{"arnika", "GET", dec, `{"key_IDs":[{"key_ID":"` + aUUID + `"}]}`, 404, 0, 0},
	} {
		p, ok := all[tc.profile]
		if !ok || p.Name != tc.profile {
			t.Fatalf("no profile %s", tc.profile)
		}
		profile = p
		r := w.send(t, "tokyo", tc.method, tc.target, tc.body)
		if r.code != tc.code {
			t.Errorf("%s: %s %s %s: got %d %s", tc.profile, tc.method, tc.target, tc.body, r.code,
				r.body)
			continue
		}
		if tc.code == 200 {
			if c := decode(t, r); len(c.Keys) != tc.keys || 8*len(c.Keys[0].Key) != tc.bits {
				t.Errorf("%s: %s %s: %d keys", tc.profile, tc.method, tc.target, len(c.Keys))
			}
		}
	}
	// A junos box sends key_size with dec_keys too, which asks for nothing.
	profile = all["junos"]
	id := decode(t, w.send(t, "tokyo", "GET", enc+"?key_size=256", "")).Keys[0].ID
	if r := w.send(t, "kochi", "GET", dec+"?key_ID="+id+"&key_size=256", ""); r.code != 200 {
		t.Errorf("junos dec_keys: got %d %s", r.code, r.body)
	}
	all["default"] = etsi014.Profile{}
	if etsi014.Profiles()["default"] == (etsi014.Profile{}) {
		t.Error("a caller's change reached the ready profiles")
	}
}
