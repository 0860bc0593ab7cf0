// Package access decides who a client is, and what it may have.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/memo"
)

// Names that stand for more than one client in a [Rule].
const (
	Anyone = "anyone" // everybody, nameless clients too
	Known  = "known"  // everybody who has shown who he is
)

// A Method is how a client shows who it is. Methods add up as bits.
type Method uint8

// The methods.
const (
	Anonymous   Method = 1 << iota // not at all
	Basic                          // user and password (RFC 7617)
	Bearer                         // a token (RFC 6750)
	Certificate                    // in the TLS handshake

	AllMethods = Anonymous | Basic | Bearer | Certificate
)

// An Identity is who a client is. The zero Identity is a nameless client.
type Identity struct {
	Name string
	By   Method
}

// A Right is something that a client may do with images.
type Right string

// The rights.
const (
	Read   Right = "read"   // have them, and know that there are any
	Warm   Right = "warm"   // have lists of them be fetched
	Pin    Right = "pin"    // keep them from being evicted, and let them be again
	Push   Right = "push"   // publish them here, where this is who publishes them
	Delete Right = "delete" // remove them
	Admin  Right = "admin"  // all of that; for every image, whatever is about the server as a whole
)

// Rights are all of them.
func Rights() []Right { return []Right{Read, Warm, Pin, Push, Delete, Admin} }

// A Rule says who may do what with the images under a prefix, by whole segments of their names.
type Rule struct {
	Prefix string             // "" is every image
	May    map[Right][]string // names of clients, [Anyone] or [Known]
}

// Config is what a Guard works with.
type Config struct {
	Users  *Users  // nil means that there are none
	Tokens *Tokens // nil means that there are none
	// Rules say who may do what; the longest prefix that covers a name decides alone, and what none covers nobody may. Without any rules anybody may read
	// everything, and do nothing else.
	Rules []Rule
	Now   func() time.Time // nil means time.Now
}

// A Guard decides who clients are, and what they may have. It is safe for concurrent use.
type Guard struct {
	cfg     atomic.Pointer[Config] // with the rule of the longest prefix first
	changes atomic.Uint64          // how often another one took its place

	// What bcrypt was asked already: it takes a tenth of a second.
	passwords *memo.Memo[[sha256.Size]byte, time.Time]
	hashing   chan struct{}
}

// New returns a Guard.
func New(cfg Config) *Guard {
	g := &Guard{passwords: memo.New[[sha256.Size]byte, time.Time](maxPasswords), hashing: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))}
	g.Change(cfg)
	return g
}

// Change has the Guard decide by something else from now on.
func (g *Guard) Change(cfg Config) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Rules = slices.Clone(cfg.Rules)
	slices.SortStableFunc(cfg.Rules, func(a, b Rule) int { return len(b.Prefix) - len(a.Prefix) })
	g.cfg.Store(&cfg)
	g.changes.Add(1)
}

// May reports whether a client has a right to the images of a name. The name "" asks for what is about the server as a whole, which only rules for every image
// give.
func (g *Guard) May(who Identity, right Right, name string) bool {
	rules := g.cfg.Load().Rules
	if len(rules) == 0 {
		return right == Read
	}
	for _, rule := range rules {
		if rule.Prefix == "" || acproxy.HasPrefix(name, rule.Prefix) {
			return covers(rule.May[right], who) || covers(rule.May[Admin], who)
		}
	}
	return false
}

// Changes returns how often the Guard was told to decide by something else. While it is the same, a nameless client has the same rights. Ask for it before asking
// for anything else.
func (g *Guard) Changes() uint64 { return g.changes.Load() }

// Open reports whether there are no rules, so that anybody may read everything.
func (g *Guard) Open() bool { return len(g.cfg.Load().Rules) == 0 }

// Public reports whether anybody may read everything, with rules or without: nobody need show who it is.
func (g *Guard) Public() bool {
	rules := g.cfg.Load().Rules
	if len(rules) == 0 {
		return true
	}
	// The rule for every name, if there is one, is the last.
	return rules[len(rules)-1].Prefix == "" && !slices.ContainsFunc(rules, func(rule Rule) bool {
		return !covers(rule.May[Read], Identity{}) && !covers(rule.May[Admin], Identity{})
	})
}

// covers reports whether a list of names covers a client.
func covers(names []string, who Identity) bool {
	for _, name := range names {
		switch {
		case name == Anyone, name == Known && who.Name != "", name == who.Name && who.Name != "":
			return true
		}
	}
	return false
}

// Credentials are what a client shows.
type Credentials struct {
	Authorization string              // the field of that name, or Proxy-Authorization
	Certificates  []*x509.Certificate // that TLS has verified, the client's first
}

// errCredentials is matched by errors about what a client has shown.
var errCredentials = errors.New("the credentials are not valid")

// Identify returns who a client is by what it shows, as far as the methods allow it. Of a client that shows nothing it returns the zero Identity. The error,
// beside the zero Identity, says what is wrong with what it showed: whoever is asked for what anybody may have need not mind. Passwords wait for one another;
// ctx ends the waiting.
func (g *Guard) Identify(ctx context.Context, shown Credentials, methods Method) (Identity, error) {
	if methods&Certificate != 0 && len(shown.Certificates) > 0 {
		if name := subject(shown.Certificates[0]); name != "" {
			return Identity{name, Certificate}, nil
		}
		return Identity{}, fmt.Errorf("%w: the certificate names nobody: it has neither a common name nor a DNS name", errCredentials)
	}
	scheme, rest, _ := strings.Cut(shown.Authorization, " ")
	switch {
	case shown.Authorization == "":
		return Identity{}, nil
	case strings.EqualFold(scheme, "Basic") && methods&Basic != 0:
		return g.basic(ctx, strings.TrimSpace(rest))
	case strings.EqualFold(scheme, "Bearer") && methods&Bearer != 0:
		return g.bearer(strings.TrimSpace(rest))
	}
	return Identity{}, fmt.Errorf("%w: %.20q is no way to show who one is here", errCredentials, scheme)
}

// subject returns the name of whom a certificate is for.
func subject(cert *x509.Certificate) string {
	if cert.Subject.CommonName != "" {
		return cert.Subject.CommonName
	}
	if len(cert.DNSNames) > 0 {
		return cert.DNSNames[0]
	}
	return ""
}

// maxPasswords bounds how many passwords are remembered, and passwordFor is for how long.
const (
	maxPasswords = 4096
	passwordFor  = 5 * time.Minute
)

var errPassword = fmt.Errorf("%w: there is no such user, or the password is another one", errCredentials)

// nobody is compared with the passwords of users where there are none at all.
var nobody = []byte("$2a$10$vU//WD78VePwLFXXRXGas.UqNXpFgcRUmvAWf0wtJuCDxFtBuzpWC")

func (g *Guard) basic(ctx context.Context, encoded string) (Identity, error) {
	// The standard library reads it, of a request.
	r := http.Request{Header: http.Header{"Authorization": {"Basic " + encoded}}}
	user, password, ok := r.BasicAuth()
	switch {
	case !ok:
		return Identity{}, fmt.Errorf("%w: user and password can't be read", errCredentials)
	case user == Anyone || user == Known || user == "":
		return Identity{}, errPassword
	}
	cfg := g.cfg.Load()
	if cfg.Tokens != nil && strings.HasPrefix(password, tokenPrefix) {
		// As Docker, containerd and rkt can be told to: the token in the place of the password.
		who, err := g.bearer(password)
		if err == nil && user != who.Name {
			return Identity{}, errPassword
		}
		return who, err
	}
	hash := cfg.Users.hash(user)
	if hash == nil {
		// It takes as long as for a user that there is.
		hash = cfg.Users.some()
	}
	// Of the hash too: a password that was changed is not remembered.
	key := sha256.Sum256(fmt.Appendf(nil, "%d:%s%d:%s%s", len(user), user, len(password), password, hash))
	if until, ok := g.passwords.Get(key); ok && cfg.Now().Before(until) {
		return Identity{user, Basic}, nil
	}
	// A flood of passwords must not take all processors.
	select {
	case g.hashing <- struct{}{}:
	case <-ctx.Done():
		return Identity{}, context.Cause(ctx)
	}
	err := bcrypt.CompareHashAndPassword(hash, []byte(password))
	<-g.hashing
	if err != nil || cfg.Users.hash(user) == nil {
		return Identity{}, errPassword
	}
	g.passwords.Put(key, cfg.Now().Add(passwordFor))
	return Identity{user, Basic}, nil
}

func (g *Guard) bearer(token string) (Identity, error) {
	cfg := g.cfg.Load()
	t, ok := cfg.Tokens.find(token)
	switch {
	case !ok:
		return Identity{}, fmt.Errorf("%w: the token is unknown here, or was revoked", errCredentials)
	case !t.Expires.IsZero() && !cfg.Now().Before(t.Expires):
		return Identity{}, fmt.Errorf("%w: the token %s of %s has expired on %s", errCredentials, t.ID, t.Name, t.Expires.Format(time.DateOnly))
	}
	return Identity{t.Name, Bearer}, nil
}

// CheckName returns an error matching [acproxy.ErrInvalid] if a client can't have a name.
func CheckName(name string) error {
	switch {
	case name == "", len(name) > 255:
		return acproxy.Invalid("the name of a client has 1 to 255 bytes, and %.40q has %d", name, len(name))
	case name == Anyone, name == Known:
		return acproxy.Invalid("a client can't be called %s, which stands for many", name)
	case strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c == 0x7f || c == ':' }):
		return acproxy.Invalid("the name of a client, %q, must not have spaces or colons in it", name)
	}
	return nil
}
