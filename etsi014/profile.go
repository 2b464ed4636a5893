package etsi014

// Profile says how far the door bends for one SAE on the way in; answers keep
// the standard's form. What a profile does not allow is refused with 400 and
// not passed over in silence, because a wish that is ignored costs a key. The
// zero value is the letter of the standard.
//
// The re-read window is no matter of the door: a key manager that keeps one
// binds it to Caller.Cert.
type Profile struct {
	Name string
	// BodyOnGET reads the body of a GET like that of a POST.
	BodyOnGET bool
	// QueryOnPOST reads the query of a POST; a member of the body wins.
	QueryOnPOST bool
	// KeySizeAlias reads key_size as size, in query and body.
	KeySizeAlias bool
	// UnknownKeyStatus is 400, the standard's (also for 0), or 404.
	UnknownKeyStatus int
	// MaxKeys bounds keys per request below Limits.MaxKeys; 0 = no bound of
	// its own.
	MaxKeys int
}

// DefaultProfile is for an SAE of which nothing is known: it reads query and
// body on POST, and the one wrong name that is known from the field.
var DefaultProfile = Profile{Name: "default", QueryOnPOST: true, KeySizeAlias: true}

// Profiles are the ready ones by name. They hold what was read in the clients'
// code or documents; where nothing is known of what a box sends, its profile
// is the default under the box's name, so that what is learnt later has a
// place. The returned map is the caller's.
func Profiles() map[string]Profile {
	list := []Profile{
		{Name: "strict"},
		DefaultProfile,
		// FortiOS 7.4.2 and later: no request was seen; plain 014 is claimed.
		{Name: "fortigate", QueryOnPOST: true, KeySizeAlias: true},
		// Juniper's MACsec automation (August 2026) sends key_size in the
		// query of enc_keys and dec_keys and asks for at most four at once.
		{Name: "junos", QueryOnPOST: true, KeySizeAlias: true, MaxKeys: 4},
		// strongSwan takes keys over vici; what asks the KME is a script.
		{Name: "strongswan", QueryOnPOST: true, KeySizeAlias: true},
		// arnika (July 2026) sends plain GETs; its test script also sends a
		// body with GET and a query with POST, and expects 404 for an unknown
		// key_ID.
		{Name: "arnika", BodyOnGET: true, QueryOnPOST: true, KeySizeAlias: true,
			UnknownKeyStatus: 404},
	}
	m := make(map[string]Profile, len(list))
	for _, p := range list {
		m[p.Name] = p
	}
	return m
}
