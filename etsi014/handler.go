package etsi014

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// HandlerConfig is what a [Handler] needs. KME and Identify are required.
type HandlerConfig struct {
	KME KME
	// Identify says who the other end of a TLS connection is; it is asked for
	// every request, so that a change of the rules takes effect at once. The
	// state is nil on a connection without TLS. An error is answered 401 and
	// ends the connection; its text goes to the log only.
	Identify func(*tls.ConnectionState) (Caller, error)
	// Profile says how far to bend for an SAE; nil means DefaultProfile.
	Profile func(SAEID) Profile
	Limits  Limits
	Log     *slog.Logger // nil discards
	// Observe is called once after every answer, from the request's goroutine;
	// nil means nobody counts.
	Observe func(Observation)
}

// Limits bounds what one request may ask. A zero field means the default. The
// KME has limits of its own; these protect the door.
type Limits struct {
	MaxBody     int           // bytes of a request's body; 64 KiB
	MaxKeys     int           // keys per request; 1024, as many key_IDs as MaxBody holds
	MinSizeBits int           // bits per key; 64
	MaxSizeBits int           // bits per key; 4096
	Timeout     time.Duration // for the KME; 5 s, the shortest patience of a known client
	// MaxInFlight bounds the requests of one SAE that are answered at the same
	// time; what is more gets 503 at once. 64: the most
	// connections at which the door is measured (TestLoad).
	MaxInFlight int
	// MaxConnAge ends a connection of a NewServer after the answer that finds
	// it older, so that a client shows its renewed certificate some day; 1 h,
	// a handshake of some milliseconds an hour costs nothing.
	MaxConnAge time.Duration
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&l.MaxBody, 64<<10)
	set(&l.MaxKeys, 1024)
	set(&l.MinSizeBits, 64)
	set(&l.MaxSizeBits, 4096)
	set(&l.MaxInFlight, 64)
	if l.Timeout <= 0 {
		l.Timeout = 5 * time.Second
	}
	if l.MaxConnAge <= 0 {
		l.MaxConnAge = time.Hour
	}
	return l
}

// Observation is one answered request, for metrics. Call is "status",
// "enc_keys", "dec_keys" or, for any other path, empty; Caller is empty for a
// stranger. Keys and Bits count what was written, also if the connection broke
// meanwhile: those keys are gone.
type Observation struct {
	Call         string
	Code         int // HTTP status
	Caller, Peer SAEID
	Keys, Bits   int
	Took         time.Duration
	Err          error // why Code is not 200, or why the answer was not delivered
}

// Handler is the door: an [http.Handler] that puts a [KME] behind the
// standard's three calls. It answers every request that reaches it with JSON.
// It is safe for concurrent use.
//
// Paths are /api/v1/keys/{SAE ID}/status, …/enc_keys and …/dec_keys, the SAE
// ID percent-decoded after the path is split, so that %2F stays inside it.
type Handler struct {
	cfg  HandlerConfig
	log  *slog.Logger
	busy inflight
}

var _ http.Handler = (*Handler)(nil)

// NewHandler makes the door. It fails if a required part is missing.
func NewHandler(cfg HandlerConfig) (*Handler, error) {
	if cfg.KME == nil || cfg.Identify == nil {
		return nil, errors.New("make handler: KME and Identify are required")
	}
	if cfg.Profile == nil {
		cfg.Profile = func(SAEID) Profile { return DefaultProfile }
	}
	if cfg.Observe == nil {
		cfg.Observe = func(Observation) {}
	}
	cfg.Limits = cfg.Limits.withDefaults()
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &Handler{cfg: cfg, log: log}
	h.busy = inflight{most: cfg.Limits.MaxInFlight, n: make(map[SAEID]int)}
	return h, nil
}

// call is one of the three methods of table 2.
type call struct {
	name  string
	allow string // for the Allow header
	post  bool
	serve func(*Handler, context.Context, *exchange) (answer, error)
}

var calls = map[string]*call{
	"status":   {name: "status", allow: "GET", serve: (*Handler).status},
	"enc_keys": {name: "enc_keys", allow: "GET, POST", post: true, serve: (*Handler).encKeys},
	"dec_keys": {name: "dec_keys", allow: "GET, POST", post: true, serve: (*Handler).decKeys},
}

// exchange is one request on its way through the door.
type exchange struct {
	w       http.ResponseWriter
	r       *http.Request
	call    *call
	who     Caller
	peer    SAEID
	profile Profile
	entered bool // counted by Handler.busy
}

// Faults of the door itself that the standard has no code for.
var (
	errPath   = errors.New("no such path")
	errMethod = errors.New("method is not allowed here")
)

// ServeHTTP implements [http.Handler].
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	x := &exchange{w: w, r: r}
	over, _ := r.Context().Value(connKey{}).(*begun)
	if over != nil && start.Sub(over.at) > h.cfg.Limits.MaxConnAge {
		w.Header().Set("Connection", "close")
	}
	defer func() {
		if x.entered {
			h.busy.leave(x.who.SAE)
		}
	}()
	a, err := h.answer(x)
	if err != nil {
		a = h.refusal(x, err)
	}
	werr := a.write(w, r, over)
	o := Observation{
		Code: a.code, Caller: x.who.SAE, Peer: x.peer, Keys: a.keys, Bits: a.bits,
		Took: time.Since(start), Err: errors.Join(err, werr),
	}
	if x.call != nil {
		o.Call = x.call.name
	}
	h.report(r, o)
	h.cfg.Observe(o)
}

// answer does what is asked. The order is fixed: a stranger learns nothing
// about paths, and a request is read before the KME is asked.
func (h *Handler) answer(x *exchange) (answer, error) {
	who, err := h.cfg.Identify(x.r.TLS)
	if err != nil {
		x.w.Header().Set("Connection", "close")
		return answer{}, &Error{Kind: ErrDenied, Cause: err}
	}
	x.who, x.profile = who, h.cfg.Profile(who.SAE)
	if x.r.URL.Path == OpenAPIPath {
		return describe(x)
	}
	c, peer, ok := splitPath(x.r.URL)
	if !ok {
		return answer{}, errPath
	}
	x.call = c
	if m := x.r.Method; m != http.MethodGet && (m != http.MethodPost || !c.post) {
		x.w.Header().Set("Allow", c.allow)
		return answer{}, errMethod
	}
	if x.peer, err = ParseSAEID(peer); err != nil {
		return answer{}, err
	}
	if x.entered = h.busy.enter(x.who.SAE); !x.entered {
		return answer{}, errBusy
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), h.cfg.Limits.Timeout)
	defer cancel()
	return c.serve(h, ctx, x)
}

// splitPath finds call and SAE ID in a path. It works on the escaped form,
// because an SAE ID may hold a slash.
func splitPath(u *url.URL) (c *call, peer string, ok bool) {
	seg := strings.Split(u.EscapedPath(), "/")
	if len(seg) != 6 || seg[0] != "" {
		return nil, "", false
	}
	for i := 1; i < len(seg); i++ {
		s, err := url.PathUnescape(seg[i])
		if err != nil {
			return nil, "", false
		}
		seg[i] = s
	}
	c = calls[seg[5]]
	ok = c != nil && seg[1] == "api" && seg[2] == "v1" && seg[3] == "keys"
	return c, seg[4], ok
}

func (h *Handler) status(ctx context.Context, x *exchange) (answer, error) {
	if _, err := url.ParseQuery(x.r.URL.RawQuery); err != nil {
		return answer{}, badRequest("query is not valid")
	}
	s, err := h.cfg.KME.Status(ctx, x.who, x.peer)
	if err != nil {
		return answer{}, err
	}
	return statusAnswer(s)
}

func (h *Handler) encKeys(ctx context.Context, x *exchange) (answer, error) {
	req, err := h.readKeyRequest(x)
	if err != nil {
		return answer{}, err
	}
	keys, err := h.cfg.KME.Keys(ctx, x.who, req)
	if err != nil {
		return answer{}, err
	}
	return keyAnswer(keys, max(req.Number, 1))
}

func (h *Handler) decKeys(ctx context.Context, x *exchange) (answer, error) {
	req, err := h.readIDRequest(x)
	if err != nil {
		return answer{}, err
	}
	keys, err := h.cfg.KME.KeysByID(ctx, x.who, req)
	if err != nil {
		return answer{}, err
	}
	return keyAnswer(keys, len(req.IDs))
}

// refusal turns an error into an answer: the one place where sentinels become
// codes. What the client reads says no more than the code and the standard's
// text; the cause stays in the log.
func (h *Handler) refusal(x *exchange, err error) answer {
	e := new(Error)
	if !errors.As(err, &e) {
		e = &Error{Kind: err}
	}
	fixed := func(code int, kind error) answer {
		return errorAnswer(code, kind.Error(), nil)
	}
	for _, kind := range []error{ErrSize, ErrMandatory, ErrUnmet} {
		if errors.Is(e.Kind, kind) {
			return fixed(http.StatusBadRequest, kind)
		}
	}
	switch {
	case errors.Is(e.Kind, errPath):
		return fixed(http.StatusNotFound, errPath)
	case errors.Is(e.Kind, errMethod):
		return fixed(http.StatusMethodNotAllowed, errMethod)
	case errors.Is(e.Kind, ErrDenied):
		// RFC 9110 section 11.6.1: a 401 carries a challenge.
		x.w.Header().Set("WWW-Authenticate", `ClientCertificate realm="KME"`)
		return fixed(http.StatusUnauthorized, ErrDenied)
	case errors.Is(e.Kind, ErrUnknownKey):
		if x.profile.UnknownKeyStatus == http.StatusNotFound {
			return fixed(http.StatusNotFound, ErrUnknownKey)
		}
		return fixed(http.StatusBadRequest, ErrUnknownKey)
	case errors.Is(e.Kind, ErrRequest), errors.Is(e.Kind, ErrKeyID):
		return errorAnswer(http.StatusBadRequest, e.text(ErrRequest), e.Details)
	}
	return unavailable(x.w, e)
}

// unavailable answers 503 with what is missing and when to come again.
func unavailable(w http.ResponseWriter, e *Error) answer {
	kind := ErrDown
	if errors.Is(e.Kind, ErrEmpty) {
		kind = ErrEmpty
	} else if !errors.Is(e.Kind, ErrDown) {
		e = &Error{Kind: ErrDown} // an error of unknown kind keeps its text
	}
	details := e.Details
	if e.MissingBits > 0 {
		missing := map[string]string{"missing_bits": strconv.Itoa(e.MissingBits)}
		details = append(details[:len(details):len(details)], missing)
	}
	if e.RetryAfter > 0 {
		seconds := (e.RetryAfter + time.Second - 1) / time.Second
		w.Header().Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	return errorAnswer(http.StatusServiceUnavailable, e.text(kind), details)
}

// text is what the client may read of an error: its message, else its kind's.
func (e *Error) text(kind error) string {
	if e.Message != "" {
		return e.Message
	}
	return kind.Error()
}

// report logs one request. Faults of clients are quiet: a client that repeats
// itself must not fill the log at the usual level.
func (h *Handler) report(r *http.Request, o Observation) {
	level, msg := slog.LevelDebug, "request answered"
	switch {
	case o.Code == http.StatusUnauthorized:
		level, msg = slog.LevelInfo, "request denied"
	case o.Code == http.StatusServiceUnavailable && r.Context().Err() == nil:
		level, msg = slog.LevelWarn, "request not served"
	case o.Code == http.StatusOK && o.Err != nil:
		level, msg = slog.LevelWarn, "answer not delivered"
	}
	if !h.log.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("call", o.Call), slog.Int("code", o.Code), slog.String("addr", r.RemoteAddr),
		slog.String("sae", string(o.Caller)), slog.String("peer_sae", string(o.Peer)),
		slog.Int("bits", o.Bits),
	}
	if o.Err != nil {
		attrs = append(attrs, slog.Any("err", o.Err))
	}
	h.log.LogAttrs(r.Context(), level, msg, attrs...)
}
