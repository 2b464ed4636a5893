// Package probe asks a key manager, anybody's, whether it keeps to ETSI GS QKD
// 014 V1.1.1.
//
// [Run] sends the requests of all [Cases] and gives each a [Verdict]: PASS,
// FAIL where the standard says otherwise, WARN where the standard is silent
// and clients suffer, SKIP where a case cannot be asked.
//
// A caller must keep in mind that a probe draws real keys, some two hundred of
// the pair's default size, which are then nobody's; and that counts of stored
// keys are compared, so nobody else should draw for the pair meanwhile.
package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// Verdict is the outcome of a case.
type Verdict string

// Verdicts, from good to bad.
const (
	Pass Verdict = "PASS"
	Skip Verdict = "SKIP"
	Warn Verdict = "WARN"
	Fail Verdict = "FAIL"
)

// Party is one SAE as the probe plays it.
type Party struct {
	SAE etsi014.SAEID
	// URL is the base URL of the party's KME, as in [etsi014.ClientConfig].
	URL string
	// TLS holds the party's certificate and the CA of its KME.
	TLS *tls.Config
}

// Config names who probes. Master and Slave must be two SAEs that the KME, or
// the pair of KMEs, lets share keys.
type Config struct {
	Master, Slave Party
	// Third is another SAE of the slave's KME, for questions of entitlement
	// and multicast; nil skips them.
	Third *Party
	// Timeout bounds one request; 0 = 10 s.
	Timeout time.Duration
	// Only selects cases by name; nil means all.
	Only func(name string) bool
}

// Case is one question.
type Case struct {
	Name   string `json:"case"`
	Clause string `json:"clause"` // of ETSI GS QKD 014 V1.1.1 unless it names another
	Title  string `json:"title"`
	soft   bool   // a deviation is a warning
	run    func(*session) error
}

// Result is a case with its answer. It holds no key.
type Result struct {
	Case
	Verdict Verdict       `json:"verdict"`
	Want    string        `json:"want,omitempty"` // unless passed
	Got     string        `json:"got,omitempty"`
	Took    time.Duration `json:"took_ns"`
}

// Summary counts verdicts.
type Summary struct{ Pass, Skip, Warn, Fail int }

// finding says what was expected and what came.
type finding struct{ want, got string }

func (f *finding) Error() string { return fmt.Sprintf("want %s, got %s", f.want, f.got) }

// skipped says why a case cannot be asked.
type skipped string

func (s skipped) Error() string { return string(s) }

// Cases lists all questions in the order in which they are asked.
func Cases() []Case {
	var all []Case
	for _, group := range [][]Case{
		tlsCases, pathCases, statusCases, encCases, encRefusals, decCases, decRefusals,
	} {
		all = append(all, group...)
	}
	return all
}

// Run asks all selected cases one after the other and reports each as it is
// answered; report may be nil. It fails only if the configuration is useless
// or ctx ends.
func Run(ctx context.Context, cfg Config, report func(Result)) (Summary, error) {
	s, err := newSession(ctx, cfg)
	if err != nil {
		return Summary{}, fmt.Errorf("probe: %w", err)
	}
	defer s.close()
	var sum Summary
	for _, c := range Cases() {
		if cfg.Only != nil && !cfg.Only(c.Name) {
			continue
		}
		start := time.Now()
		err := c.run(s)
		s.wipe()
		if ctx.Err() != nil {
			return sum, fmt.Errorf("probe: %w", ctx.Err())
		}
		r := judge(c, err)
		r.Took = time.Since(start)
		sum.add(r.Verdict)
		if report != nil {
			report(r)
		}
	}
	return sum, nil
}

// judge turns the outcome of a case into a result.
func judge(c Case, err error) Result {
	r := Result{Case: c, Verdict: Fail}
	if c.soft {
		r.Verdict = Warn
	}
	var found *finding
	var skip skipped
	switch {
	case err == nil:
		r.Verdict = Pass
	case errors.As(err, &skip):
		r.Verdict, r.Got = Skip, string(skip)
	case errors.As(err, &found):
		r.Want, r.Got = found.want, found.got
	default:
		r.Want, r.Got = "an answer", err.Error()
	}
	return r
}

func (s *Summary) add(v Verdict) {
	switch v {
	case Pass:
		s.Pass++
	case Skip:
		s.Skip++
	case Warn:
		s.Warn++
	case Fail:
		s.Fail++
	}
}
