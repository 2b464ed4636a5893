package probe

import (
	"encoding/json"
	"maps"
	"slices"
)

// status makes a case out of a question to the answer of Get status.
func status(name, clause, title string, soft bool, want func(*session, reply) error) Case {
	return Case{Name: name, Clause: clause, Title: title, soft: soft, run: func(s *session) error {
		r, err := s.get(s.cfg.Master, s.cfg.Slave.SAE, "status", "")
		if err != nil {
			return err
		}
		return want(s, r)
	}}
}

func text(name string) func(*session, reply) error {
	return func(_ *session, r reply) error { return wantString(r, name, "") }
}

func count(name string, least int) func(*session, reply) error {
	return func(_ *session, r reply) error { return wantCount(r, name, least) }
}

// ordered wants small <= large among the members.
func ordered(small, large string) func(*session, reply) error {
	return func(_ *session, r reply) error {
		m, err := r.object()
		if err != nil {
			return err
		}
		var a, b int
		if json.Unmarshal(m[small], &a) != nil || json.Unmarshal(m[large], &b) != nil || a > b {
			return &finding{small + " not above " + large,
				show(m[small]) + " and " + show(m[large])}
		}
		return nil
	}
}

// statusMembers are those of table 8.
var statusMembers = []string{
	"source_KME_ID", "target_KME_ID", "master_SAE_ID", "slave_SAE_ID", "key_size",
	"stored_key_count", "max_key_count", "max_key_per_request", "max_key_size", "min_key_size",
	"max_SAE_ID_count", "status_extension",
}

// statusCases are about Get status; clause 6.1 and table 8.
var statusCases = []Case{
	status("status-200", "6.1", "Get status answers 200", false,
		func(_ *session, r reply) error { return wantCode(r, 200) }),
	status("status-content-type", "5.1", "as application/json", false,
		func(_ *session, r reply) error { return wantJSON(r) }),
	status("status-no-store", "RFC 9111 5.2.2.5", "for no cache", true,
		func(_ *session, r reply) error { return wantNoStore(r) }),
	status("status-source-kme", "6.1 table 8", "names the KME that answers", false,
		text("source_KME_ID")),
	status("status-target-kme", "6.1 table 8", "names the slave's KME", false, text("target_KME_ID")),
	status("status-master", "6.1 table 8", "names the caller as master", false,
		func(s *session, r reply) error {
			return wantString(r, "master_SAE_ID", string(s.cfg.Master.SAE))
		}),
	status("status-slave", "6.1 table 8", "names the SAE of the path as slave", false,
		func(s *session, r reply) error {
			return wantString(r, "slave_SAE_ID", string(s.cfg.Slave.SAE))
		}),
	status("status-key-size", "6.1 table 8", "tells the default size", false, count("key_size", 1)),
	status("status-stored", "6.1 table 8", "tells how many keys there are", false,
		count("stored_key_count", 0)),
	status("status-max-count", "6.1 table 8", "tells how many there can be", false,
		count("max_key_count", 0)),
	status("status-per-request", "6.1 table 8", "tells how many at once", false,
		count("max_key_per_request", 1)),
	status("status-max-size", "6.1 table 8", "tells the largest size", false,
		count("max_key_size", 1)),
	status("status-min-size", "6.1 table 8", "tells the smallest size", false,
		count("min_key_size", 1)),
	status("status-max-sae", "6.1 table 8", "tells how many additional slaves", false,
		count("max_SAE_ID_count", 0)),
	status("status-stored-bound", "6.1 table 8", "stored is not above the possible", false,
		ordered("stored_key_count", "max_key_count")),
	status("status-size-below", "6.1 table 8", "the default is not above the largest size", false,
		ordered("key_size", "max_key_size")),
	status("status-size-above", "6.1 table 8", "the default is not below the smallest size", false,
		ordered("min_key_size", "key_size")),
	status("status-members", "6.1 table 8", "nothing else outside status_extension", true,
		func(_ *session, r reply) error {
			m, err := r.object()
			return firstOf(err, wantMembers(slices.Sorted(maps.Keys(m)), statusMembers...))
		}),
	status("status-free", "6.1", "asking for the status costs no key", false,
		func(s *session, _ reply) error { return s.costs(0, func() error { return nil }) }),
}
