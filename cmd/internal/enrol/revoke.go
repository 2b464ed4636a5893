package enrol

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
)

// Revoke ends the trust in another site: its key manager, its links and lines
// leave the site file, which daemons that run follow within seconds; its root,
// the secrets of its lines and its invitations are removed. Stock that its
// links made is void once the key manager has read the file. A site that is
// not enrolled is [pki.ErrUnknown]; a Revoke that was interrupted is completed
// by the next.
func (h *Home) Revoke(site string) error {
	fail := func(err error) error { return fmt.Errorf("revoke site %s: %w", site, err) }
	if !siteForm.MatchString(site) || site == h.plan.Site {
		return fail(fmt.Errorf("%w: it is not another site's", ErrName))
	}
	found, err := h.leave(site)
	if err != nil {
		return fail(err)
	}
	pools, err := h.authPools(linkName(h.plan.Site, site))
	if err != nil {
		return fail(err)
	}
	for _, path := range append(pools, h.Path("pki", "peers", site+".crt"), h.lineDir(site),
		h.Path("enrol", "invite-"+site), h.Path("enrol", "join-"+site+".json")) {
		if _, err := os.Lstat(path); err == nil {
			found = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fail(err)
		}
		if err := destroy(path); err != nil {
			return fail(err)
		}
	}
	if err := h.writePeers(); err != nil {
		return fail(err)
	}
	if !found {
		return fail(fmt.Errorf("%w: no site of that name is enrolled", pki.ErrUnknown))
	}
	return nil
}

// leave takes a site out of the site file and tells whether it was in it.
func (h *Home) leave(site string) (bool, error) {
	text, err := os.ReadFile(h.SiteFile())
	if err != nil {
		return false, err
	}
	now, err := config.Parse(h.SiteFile(), text)
	if err != nil {
		return false, err
	}
	for _, p := range now.Peers {
		if p.KME != kmeID(site) {
			continue
		}
		if text, err = config.Remove(h.SiteFile(), text, p.KME); err != nil {
			return true, err
		}
		return true, writeFile(h.SiteFile(), text)
	}
	return false, nil
}
