package fetch

import (
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust"
)

// Delivery says when the bytes of an image that is still arriving may leave for the nodes.
type Delivery int

const (
	// CutThrough delivers a signed image while it arrives, up to the last bytes, which wait for the verdict.
	CutThrough Delivery = iota
	// VerifyFirst delivers nothing before everything about the image has been checked.
	VerifyFirst
)

// OnChange says what to do when a version that is held already comes back from its publisher with another image ID.
type OnChange int

const (
	// RefuseChange keeps what is held and refuses the new image.
	RefuseChange OnChange = iota
	// FollowChange takes the new image in the place of the old one.
	FollowChange
)

// A Policy is what the operator decided for the images under a prefix.
type Policy struct {
	Prefix   string // by segments; "" covers every name
	Trust    trust.Policy
	Delivery Delivery
	TTL      time.Duration // how long a ref without a version is fresh
	// MaxStale is for how long after that it is still answered at once, and refreshed behind. Beyond it the node waits for the publisher,
	// and gets what is held only if the publisher doesn't answer.
	MaxStale time.Duration
	OnChange OnChange
	OnFull   OnFull
	Offline  bool // dial nobody
	// Listing is where the publisher lists the versions of an image: a URL with {name}. "" means that nothing is known of any.
	Listing string
	// Local says that the images are published here: they come by [Fetcher.Publish], and nobody is asked for them.
	Local bool
}

// policy returns the policy with the longest prefix that covers the name.
func (f *Fetcher) policy(name string) Policy {
	best := Policy{}
	for _, p := range *f.policies.Load() {
		if acproxy.HasPrefix(name, p.Prefix) && len(p.Prefix) >= len(best.Prefix) {
			best = p
		}
	}
	best.Offline = best.Offline || best.Local || f.cfg.Offline
	return best
}

// SetPolicies puts others in the place of [Config.Policies], from the next request and the next flight on. What they say of trust must be what the policies
// before said of it: verdicts by which held images are served are remembered.
func (f *Fetcher) SetPolicies(policies []Policy) { f.policies.Store(&policies) }

// allowed refuses names that no configured prefix covers.
func (f *Fetcher) allowed(name string) error {
	if len(f.cfg.Allow) == 0 {
		return nil
	}
	for _, prefix := range f.cfg.Allow {
		if acproxy.HasPrefix(name, prefix) {
			return nil
		}
	}
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "name-not-allowed",
		Detail: name + " is under none of the prefixes that this proxy answers for; add one to allow in its configuration",
	}
}
