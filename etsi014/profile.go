package etsi014

// Profile says how far the door bends for one SAE on the way in; answers keep
// the standard's form. What a profile does not allow is refused with 400 and
// not passed over in silence, because a wish that is ignored costs a key. The
// zero value is the letter of the standard.
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
