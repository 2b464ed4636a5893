package probe

import (
	"encoding/json"
	"fmt"
	"mime"
	"slices"
	"strings"
)

// The questions that many cases ask of an answer. Each takes the zero reply
// too, because firstOf evaluates all.

// firstOf is the first fault.
func firstOf(faults ...error) error {
	for _, err := range faults {
		if err != nil {
			return err
		}
	}
	return nil
}

// wantRefusal wants an Error (table 13) of a code, and of a text unless empty.
func wantRefusal(r reply, code int, text string) error {
	want := fmt.Sprintf("%d with an Error", code)
	if text != "" {
		want = fmt.Sprintf("%d %q", code, text)
	}
	var e struct {
		Message *string           `json:"message"`
		Details []json.RawMessage `json:"details"`
	}
	if r.code != code || json.Unmarshal(r.body, &e) != nil || e.Message == nil || *e.Message == "" ||
		text != "" && *e.Message != text {
		return &finding{want, r.String()}
	}
	return nil
}

// wantCode wants one of some codes.
func wantCode(r reply, codes ...int) error {
	if !slices.Contains(codes, r.code) {
		return &finding{strings.Trim(fmt.Sprint(codes), "[]"), r.String()}
	}
	return nil
}

// wantJSON wants a content type that every client takes as JSON.
func wantJSON(r reply) error {
	got := r.header.Get("Content-Type")
	if kind, _, err := mime.ParseMediaType(got); err != nil || kind != "application/json" {
		return &finding{"Content-Type application/json", fmt.Sprintf("%q", got)}
	}
	return nil
}

// wantNoStore wants that no cache keeps an answer.
func wantNoStore(r reply) error {
	if got := r.header.Get("Cache-Control"); !strings.Contains(got, "no-store") {
		return &finding{"Cache-Control no-store", fmt.Sprintf("%q", got)}
	}
	return nil
}

// wantString wants a member of a 200; an empty want means any text but none.
func wantString(r reply, name, want string) error {
	m, err := r.object()
	if err != nil {
		return err
	}
	var got string
	if json.Unmarshal(m[name], &got) != nil || got == "" || want != "" && got != want {
		return &finding{strings.TrimSpace(fmt.Sprintf("%s as a string %s", name, want)), show(m[name])}
	}
	return nil
}

// wantCount wants an integer member of a 200, not below least.
func wantCount(r reply, name string, least int) error {
	m, err := r.object()
	if err != nil {
		return err
	}
	var got int
	if json.Unmarshal(m[name], &got) != nil || m[name] == nil || got < least {
		return &finding{fmt.Sprintf("%s as an integer of at least %d", name, least), show(m[name])}
	}
	return nil
}

// show prints a member of a status.
func show(raw json.RawMessage) string {
	if raw == nil {
		return "none"
	}
	return fmt.Sprintf("%.200s", raw)
}

// wantMembers wants no member beside the named ones.
func wantMembers(got []string, allowed ...string) error {
	for _, name := range got {
		if !slices.Contains(allowed, name) {
			return &finding{"no member beside " + strings.Join(allowed, ", "),
				fmt.Sprintf("%.100q", name)}
		}
	}
	return nil
}

// wantKeys wants n keys of a size; 0 bits means any.
func wantKeys(r reply, n, bits int) error {
	list, err := r.container()
	if err != nil {
		return err
	}
	if len(list) != n {
		return &finding{fmt.Sprintf("%d keys", n), fmt.Sprintf("%d keys", len(list))}
	}
	for _, k := range list {
		if bits != 0 && k.bits != bits {
			return &finding{fmt.Sprintf("keys of %d bits", bits), fmt.Sprintf("%d bits", k.bits)}
		}
	}
	return nil
}

// wantSame wants exactly the given keys, in any order.
func wantSame(r reply, want []key) error {
	got, err := r.container()
	if err != nil {
		return err
	}
	if len(got) != len(want) {
		return &finding{fmt.Sprintf("%d keys", len(want)), fmt.Sprintf("%d keys", len(got))}
	}
	for _, w := range want {
		at := slices.IndexFunc(got, func(k key) bool { return strings.EqualFold(k.id, w.id) })
		if at < 0 {
			return &finding{"the keys that were asked", "others"}
		}
		if got[at].sum != w.sum {
			return &finding{"the bytes that the master got", "others"}
		}
	}
	return nil
}
