package daemon

import (
	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/node"
)

// doorSAEs are the SAEs of all sites.
func doorSAEs(s *config.Site) (list []node.SAE) {
	for _, a := range s.SAEs {
		list = append(list, node.SAE{ID: etsi014.SAEID(a.ID), KME: etsi014.KMEID(a.KME)})
	}
	return list
}

// doorLimits bound requests, and what single SAEs may take.
func doorLimits(s *config.Site) kms.Limits {
	return kms.Limits{MaxKeys: s.KME.MaxKeys, Allowances: allowances(s)}
}

// allowances puts limits and re-read windows of this site's SAEs into the key manager's words.
func allowances(s *config.Site) map[etsi014.SAEID]kms.Allowance {
	found := make(map[etsi014.SAEID]kms.Allowance)
	for _, a := range s.SAEs {
		if l := a.Limits; l != (config.SAELimits{}) || a.RereadWindow != 0 {
			found[etsi014.SAEID(a.ID)] = kms.Allowance{Calls: l.RequestsPerSecond,
				Keys: l.KeysPerSecond, Share: l.Share, Window: l.ShareWindow, Reserve: l.Reserve,
				Reread: a.RereadWindow}
		}
	}
	return found
}
