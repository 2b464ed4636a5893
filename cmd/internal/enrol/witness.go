package enrol

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

// clock holds this machine's clock against what the site's own files witness:
// none was written in the future. A clock that runs ahead leaves no such
// trace; `quietline doctor tls` compares with another machine's.
func (i *inspection) clock(file string) {
	newest, path := time.Time{}, ""
	look := func(p string) {
		if info, err := os.Stat(p); err == nil && info.ModTime().After(newest) {
			newest, path = info.ModTime(), p
		}
	}
	look(file)
	for _, pattern := range []string{"pki/*", "pki/issued/*", "enrol/*", "lines/*/*"} {
		files, _ := filepath.Glob(filepath.Join(i.dir, pattern)) // the patterns are well formed
		for _, f := range files {
			look(f)
		}
	}
	files, _ := filepath.Glob(filepath.Join(i.site.State, "*", "*"))
	for _, f := range files {
		look(f)
	}
	var err error
	if ahead := newest.Sub(i.now); ahead > maxSkew {
		err = pki.Advise(fmt.Errorf("%w: this machine says %s, %s was written %s: the clock is behind by "+
			"%v at least", ErrClock, stamp(i.now), path, stamp(newest), ahead.Round(time.Minute)),
			"set the clock; until then nothing is renewed and nothing is thrown away")
	}
	i.note("clock", stamp(i.now)+", "+disciplined(), err)
}

// disciplined tells whether the kernel follows a source of time (adjtimex(2)).
func disciplined() string {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		return "the kernel does not say whether it is synchronised"
	case state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0:
		return "not synchronised to any source; look that NTP runs"
	}
	return "synchronised"
}

// refusal is a site that was turned away, so that a person can be told later.
type refusal struct {
	Site   string    `json:"site"`
	Print  string    `json:"fingerprint,omitempty"`
	Reason string    `json:"reason"` // what was compared; what to do
	At     time.Time `json:"at"`
}

// enrolments looks at invitations and joins that are under way.
func (i *inspection) enrolments() {
	dirs, _ := filepath.Glob(filepath.Join(i.dir, "enrol", "invite-*"))
	for _, d := range dirs {
		i.invitation(d)
	}
	files, _ := filepath.Glob(filepath.Join(i.dir, "enrol", "join-*.json"))
	for _, f := range files {
		i.joining(f)
	}
}

func (i *inspection) invitation(dir string) {
	site := strings.TrimPrefix(filepath.Base(dir), "invite-")
	name := "invitation of " + site
	inv := &Invitation{dir: dir}
	if err := inv.load(); errors.Is(err, fs.ErrNotExist) {
		i.note(name, "not whole: the same pki invite completes it")
		return
	} else if err != nil {
		i.note(name, "", err)
		return
	}
	var faults []error
	if r := inv.state.Refused; r != nil {
		found, next, _ := strings.Cut(r.Reason, "; ")
		faults = append(faults, pki.Advise(fmt.Errorf("on %s a machine that calls itself %s was refused: %s",
			stamp(r.At), r.Site, found), next+"; a new token: quietline pki invite --again "+site))
	}
	good := "used by the site with fingerprint " + inv.state.Bound
	if !inv.state.Done {
		good = "open until " + stamp(inv.token.Expires)
		if err := inv.token.expired(i.now); err != nil {
			faults = append(faults, err)
		}
	}
	i.note(name, good, faults...)
}

func (i *inspection) joining(file string) {
	from := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "join-"), ".json")
	name := "joining " + from
	text, err := os.ReadFile(file)
	var state joiningState
	if err == nil {
		err = strict(text, &state)
	}
	good := "begun; the same pki join completes it"
	if state.Stored {
		good = "done"
	}
	if r := state.Refused; err == nil && r != nil {
		found, next, _ := strings.Cut(r.Reason, "; ")
		if next == "" {
			next = "ask " + from + " for a new token: quietline pki invite"
		}
		err = pki.Advise(fmt.Errorf("on %s: %s", stamp(r.At), found), next)
	}
	i.note(name, good, err)
}

// remember keeps why this site was refused, for [Inspect]; a fault of the file
// itself changes nothing about the refusal that is on its way to a person.
func (j *Joining) remember(why error, now time.Time) {
	if errors.Is(why, ErrRefused) || errors.Is(why, ErrExpired) || errors.Is(why, ErrFingerprint) ||
		errors.Is(why, ErrSecret) {
		j.state.Refused = &refusal{Site: j.token.From, Reason: why.Error(), At: now.UTC()}
		if text, err := json.Marshal(j.state); err == nil {
			_ = secret.WriteFile(j.path(), text)
		}
	}
}
