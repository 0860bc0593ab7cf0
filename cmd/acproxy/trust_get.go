package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

const (
	keyTimeout        = time.Minute // for one key file
	maxDiscoveredKeys = 32          // key files of one page
)

// offer is a key that somebody may want to trust.
type offer struct {
	key    trust.Key
	data   []byte // the file, if it holds this key alone; nil otherwise
	source string // the file or URL
	prefix string // what it would be trusted for, "" for every name
}

// bytes returns what to store.
func (f offer) bytes() []byte {
	if f.data != nil {
		return f.data
	}
	return f.key.Armored()
}

// offersOf reads the keys of a key file.
func offersOf(data []byte, source, prefix string) ([]offer, error) {
	keys, err := trust.ReadKeys(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	var offers []offer
	for _, key := range keys {
		f := offer{key: key, source: source, prefix: prefix}
		if len(keys) == 1 {
			f.data = data
		}
		offers = append(offers, f)
	}
	return offers, nil
}

func isURL(s string) bool { return strings.Contains(s, "://") }

func readKeyFile(stdin io.Reader, file string) ([]byte, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	return readKeyData(in, file)
}

func readKeyData(r io.Reader, source string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, trust.MaxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > trust.MaxKeyFile {
		return nil, fmt.Errorf("%s is longer than %d bytes: that is no key", source, trust.MaxKeyFile)
	}
	return data, nil
}

// keyGetter gets keys from publishers: within the dial rules, by https whatever the configuration allows for images, and without credentials,
// as key URLs have to be public.
type keyGetter struct {
	cfg    *config.Config
	web    *web.Client
	finder *discovery.Finder
}

// newKeyGetter returns a getter. The caller closes it.
func newKeyGetter(cfg *config.Config) (*keyGetter, error) {
	secure := *cfg
	secure.Publishers = slices.Clone(cfg.Publishers)
	for i := range secure.Publishers {
		secure.Publishers[i].HTTP = false
	}
	shown, err := newCredentials(&secure, slog.Default())
	if err != nil {
		return nil, err
	}
	client, err := newWeb(&secure, "", shown)
	if err != nil {
		return nil, err
	}
	return &keyGetter{cfg: cfg, web: client, finder: newFinder(&secure, client)}, nil
}

func (g *keyGetter) close() error {
	err := g.finder.Close()
	g.web.Close()
	return err
}

// get returns a key file, by the rules for an image name.
func (g *keyGetter) get(ctx context.Context, name, url string) ([]byte, error) {
	if !strings.HasPrefix(strings.ToLower(url), "https://") {
		return nil, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "insecure-url", Detail: web.Redacted(url) + ": keys are fetched by https only"}
	}
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	resp, trace, err := g.web.Get(ctx, name, "key", url, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &acproxy.Error{
			Kind: acproxy.ErrPublisher, Code: "publisher-status", Trace: trace, RetryAfter: web.RetryAfter(resp, time.Now()), Detail: fmt.Sprintf("asking for the key %s: its publisher answers %s", web.Redacted(url), resp.Status),
		}
	}
	return readKeyData(resp.Body, web.Redacted(url))
}

// found is what a publisher offers for a name.
type found struct {
	page   string // the discovery page
	offers []offer
	errs   []error // of key files that couldn't be got or read
}

// discover gets the keys that the publisher of an image name tells on its discovery pages. A page speaks for the names at its own level and
// below: on a host with many tenants, a tenant's page may claim what it wants.
func (g *keyGetter) discover(ctx context.Context, name string) (found, error) {
	if err := allowedName(g.cfg, name); err != nil {
		return found{}, err
	}
	tags, err := g.finder.Keys(ctx, name)
	if err != nil {
		return found{}, err
	}
	out := found{page: tags.Page}
	for i, tag := range tags.KeyTags {
		if i == maxDiscoveredKeys {
			out.errs = append(out.errs, fmt.Errorf("the page tells of %s, the first %d were looked at", count(len(tags.KeyTags), "key"), maxDiscoveredKeys))
			break
		}
		if slices.ContainsFunc(tags.KeyTags[:i], func(t discovery.Template) bool { return t.URL == tag.URL }) {
			continue
		}
		prefix := strings.TrimSuffix(tag.Prefix, "/")
		if len(prefix) < len(tags.Level) {
			prefix = tags.Level
		}
		data, err := g.get(ctx, name, tag.URL)
		if err != nil {
			out.errs = append(out.errs, err)
			continue
		}
		offers, err := offersOf(data, web.Redacted(tag.URL), prefix)
		if err != nil {
			out.errs = append(out.errs, err)
			continue
		}
		for _, f := range offers {
			if !slices.ContainsFunc(out.offers, func(o offer) bool { return o.key.Fingerprint == f.key.Fingerprint }) {
				out.offers = append(out.offers, f)
			}
		}
	}
	if len(out.offers) == 0 {
		return out, fmt.Errorf("no key of %s can be read: %w", name, errors.Join(out.errs...))
	}
	return out, nil
}

// allowedName refuses names that the configuration doesn't let anybody ask for.
func allowedName(cfg *config.Config, name string) error {
	if len(cfg.Allow) == 0 || slices.ContainsFunc(cfg.Allow, func(prefix string) bool { return acproxy.HasPrefix(name, prefix) }) {
		return nil
	}
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "name-not-allowed", Detail: name + " is under none of the prefixes that the configuration allows; add one to allow",
	}
}
