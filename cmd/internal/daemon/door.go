package daemon

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"reflect"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
)

// keyDoor is the ETSI 014 door of a key manager: who may come in, and how far it
// bends for whom. Both change while it serves.
type keyDoor struct {
	live     *identity.Live
	profiles atomic.Pointer[map[etsi014.SAEID]etsi014.Profile]
	calls    callCounter
	site     *config.Site // as the key manager began with it
	loaded   *config.Site // as it is served; changed by follow alone
	log      *slog.Logger
	// behind makes the key manager behind the door take over the SAEs and
	// limits of a site file.
	behind func(context.Context, *config.Site) error
}

// openDoor reads what the site file names for the door.
func openDoor(s *config.Site, log *slog.Logger) (*keyDoor, error) {
	live, err := identity.Open(doorIdentity(s))
	if err != nil {
		return nil, err
	}
	if err := twoRoots(s); err != nil {
		return nil, err
	}
	d := &keyDoor{live: live, site: s, loaded: s, log: log,
		behind: func(context.Context, *config.Site) error { return nil }}
	d.profiles.Store(doorProfiles(s))
	return d, nil
}

// server puts a key manager behind the door.
func (d *keyDoor) server(kme etsi014.KME) (*http.Server, error) {
	k := d.site.KME
	handler, err := etsi014.NewHandler(etsi014.HandlerConfig{
		KME: kme, Identify: d.live.Identify, Log: d.log, Observe: d.calls.observe,
		Profile: d.profile, Limits: etsi014.Limits{MaxConnAge: k.MaxConnectionAge},
	})
	if err != nil {
		return nil, err
	}
	s := etsi014.NewServer(handler, d.live.Server(), d.log)
	d.live.Guard(s)
	return s, nil
}

// profile has the form that [etsi014.HandlerConfig] wants.
func (d *keyDoor) profile(sae etsi014.SAEID) etsi014.Profile {
	if p, ok := (*d.profiles.Load())[sae]; ok {
		return p
	}
	return etsi014.DefaultProfile
}

// Open files. The default of connections is that of [etsi014.Bounds]; besides
// them the key manager opens its store, devices, peers and sockets.
const (
	defaultHeld = 16 << 10
	otherFiles  = 256
)

// bounds are those of the door's connections.
func (d *keyDoor) bounds() etsi014.Bounds { return etsi014.Bounds{Held: d.held()} }

// held is how many connections the door takes: not more than files may be
// open, else the store would be the one to go without.
func (d *keyDoor) held() int {
	want := cmp.Or(d.site.KME.MaxConnections, defaultHeld)
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return want
	}
	room := max(int(min(files.Cur, 1<<30))-otherFiles, 1)
	if room < want {
		d.log.Warn("the limit of open files bounds the door's connections", "connections", room,
			"wanted", want)
	}
	return min(room, want)
}

// load takes over what may change of a site file while the door serves, all of
// it or nothing: certificates, roots, lists, and the SAEs with their
// identities, profiles and limits. The key manager knows a new SAE before the
// door lets it in; one that left is denied at once, and its connections end.
func (d *keyDoor) load(ctx context.Context, s *config.Site) error {
	if s.KME == nil {
		return ErrNoKME
	}
	if err := twoRoots(s); err != nil {
		return err
	}
	if err := d.behind(ctx, s); err != nil {
		return err
	}
	if err := d.live.Reload(doorIdentity(s)); err != nil {
		return errors.Join(err, d.behind(ctx, d.loaded))
	}
	d.profiles.Store(doorProfiles(s))
	d.loaded = s
	return nil
}

// reload loads the site file again, and says what of it must wait for the next
// start.
func (d *keyDoor) reload(ctx context.Context, file string) {
	s, err := config.Load(file)
	if err == nil {
		err = d.load(ctx, s)
	}
	if err != nil {
		d.log.Warn("site file not loaded, the door stays as it was", "err", err)
		return
	}
	d.log.Info("site file loaded", "saes", len(*d.profiles.Load()))
	if !reflect.DeepEqual(fixed(d.site), fixed(s)) {
		d.log.Warn("a change takes effect at the next start", "reason", errNewParts)
	}
}

// errNewParts is a change that needs a new start of the key manager.
var errNewParts = errors.New("listeners, peers, links or files of the store")

// fixed is what of a site file a running key manager keeps.
func fixed(s *config.Site) config.Site {
	k := *s.KME
	k.Certificate, k.Key, k.SecondCertificate, k.SecondKey = "", "", "", ""
	k.ClientCA, k.ClientCRL, k.ClientDeny = "", "", ""
	k.MaxKeys = 0
	return config.Site{Lab: s.Lab, State: s.State, KME: &k, Peers: s.Peers, Links: s.Links}
}

// stamp tells whether a file was written anew; zero if it is not there.
type stamp struct {
	ino, size uint64
	at        unix.Timespec
}

func stampOf(path string) stamp {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return stamp{}
	}
	return stamp{st.Ino, uint64(st.Size), st.Mtim}
}

// follow reloads on SIGHUP, and when the site file was changed and then quiet
// for one look, until ctx ends. The files that the site names are followed by
// identity.Live.
func (d *keyDoor) follow(ctx context.Context, file string) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	seen := stampOf(file)
	done := seen
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			seen = stampOf(file)
			done = seen
		case <-tick.C:
			before := seen
			seen = stampOf(file)
			if seen != before || seen == done {
				continue
			}
			done = seen
		}
		d.reload(ctx, file)
	}
}

// doorIdentity says which certificates the door shows and which belong to the
// SAEs of this site.
func doorIdentity(s *config.Site) identity.Config {
	k := s.KME
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: k.Certificate, Key: k.Key}}, CA: k.ClientCA}
	if k.SecondCertificate != "" {
		cfg.Pairs = append(cfg.Pairs, identity.Pair{Cert: k.SecondCertificate, Key: k.SecondKey})
	}
	if k.ClientCRL != "" {
		cfg.CRLs = []string{k.ClientCRL}
	}
	if k.ClientDeny != "" {
		cfg.DenyFiles = []string{k.ClientDeny}
	}
	for _, a := range s.SAEs {
		if a.KME != k.ID {
			continue
		}
		rule := identity.Rule{SAE: etsi014.SAEID(a.ID)}
		switch id := a.Identity; {
		case id.URI != "":
			rule.By, rule.Value = identity.ByURI, id.URI
		case id.DNS != "":
			rule.By, rule.Value = identity.ByDNS, id.DNS
		case id.CN != "":
			rule.By, rule.Value = identity.ByCN, id.CN
		default:
			rule.By, rule.Value = identity.ByPin, id.Pin
		}
		cfg.Rules = append(cfg.Rules, rule)
	}
	return cfg
}

// doorProfiles are those of this site's SAEs.
func doorProfiles(s *config.Site) *map[etsi014.SAEID]etsi014.Profile {
	ready := etsi014.Profiles()
	found := make(map[etsi014.SAEID]etsi014.Profile)
	for _, a := range s.SAEs {
		if a.KME == s.KME.ID {
			found[etsi014.SAEID(a.ID)] = ready[cmp.Or(a.Profile, etsi014.DefaultProfile.Name)]
		}
	}
	return &found
}
