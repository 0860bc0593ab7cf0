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

// Settings are what an operator may change while a Fetcher works: the fields of the same names of a [Config].
type Settings struct {
	Policies []Policy
	Allow    []string
	Offline  bool
	Jitter   float64
}

// settings are the Settings that count until others take their place. They don't change.
type settings struct {
	Settings
	number uint64 // how often others were there before
}

// A basis is what decisions rest on at a moment. What was decided on one is not remembered for another.
type basis struct {
	keyring  string // the ID of the keys
	settings uint64 // the number
}

// Change puts other settings in the place of those that count. Requests and flights that begin after it go by these. Those in progress go on by what they
// began with, but for trust: the verdict on what has arrived is by the policy of its moment, as it is by the keys of its moment. What was decided about
// images before, held or refused, is decided again.
func (f *Fetcher) Change(s Settings) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settings.Store(&settings{Settings: s, number: f.settings.Load().number + 1})
	// Those that could not be refreshed may be refreshed now.
	clear(f.retry)
}

// basis returns what decisions rest on now.
func (f *Fetcher) basis() basis { return basis{f.cfg.Keyring().ID(), f.settings.Load().number} }

// policy returns the policy that counts for a name now.
func (f *Fetcher) policy(name string) Policy { return f.settings.Load().policy(name) }

// policy returns the policy with the longest prefix that covers the name.
func (s *settings) policy(name string) Policy {
	best := Policy{}
	for _, p := range s.Policies {
		if acproxy.HasPrefix(name, p.Prefix) && len(p.Prefix) >= len(best.Prefix) {
			best = p
		}
	}
	best.Offline = best.Offline || best.Local || s.Offline
	return best
}

// allowed refuses names that no configured prefix covers.
func (f *Fetcher) allowed(name string) error {
	prefixes := f.settings.Load().Allow
	if len(prefixes) == 0 {
		return nil
	}
	for _, prefix := range prefixes {
		if acproxy.HasPrefix(name, prefix) {
			return nil
		}
	}
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "name-not-allowed",
		Detail: name + " is under none of the prefixes that this proxy answers for; add one to allow in its configuration",
	}
}
