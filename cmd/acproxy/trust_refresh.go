package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newTrustRefresh(o *options) *cobra.Command {
	var all, asJSON bool
	var accepted []string
	cmd := &cobra.Command{
		Use:   "refresh NAME | refresh --all",
		Short: "Ask publishers for their keys again, and show what is different from what is trusted",
		Long: `refresh discovers the keys of an image name, or of every prefix that keys are trusted for, and compares them with the trusted ones: keys that are
new, that their owner has changed (another end, a revocation, a subkey), and that the publisher tells of no longer. Where there is somebody to ask
it asks what to do about each. With --fingerprint it trusts new keys with these fingerprints and takes over their changes, without asking;
otherwise it changes nothing. Nothing is removed without a question.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			wanted, err := fingerprints(accepted)
			if err != nil {
				return err
			}
			if all == (len(args) == 1) {
				return usagef("of which image names? Give a NAME or --all")
			}
			if len(args) == 1 {
				if err := acproxy.CheckName(args[0]); err != nil {
					return &usageError{err}
				}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			r := &refreshing{cmd: cmd, cfg: cfg, fingerprints: wanted, asker: newAsker(cmd), asJSON: asJSON}
			return r.run(args)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&all, "all", false, "every prefix that keys are trusted for")
	f.BoolVar(&asJSON, "json", false, "print JSON, and change nothing that --fingerprint doesn't name")
	f.StringArrayVar(&accepted, "fingerprint", nil, "trust this key, or take over its changes, without asking (repeatable)")
	return cmd
}

// refreshing is one run of acproxy trust refresh.
type refreshing struct {
	cmd          *cobra.Command
	cfg          *config.Config
	keyring      *trust.Keyring
	fingerprints []trust.Fingerprint
	asker        *asker
	asJSON       bool
}

// The states of a refreshed key.
const (
	stateSame    = "unchanged"
	stateNew     = "new"     // the publisher tells of it, and it isn't trusted for the name
	stateChanged = "changed" // it is trusted, and its owner has changed it
	stateOlder   = "older"   // it is trusted, and what the publisher tells is older than what is held
	stateGone    = "gone"    // it is trusted, and the publisher doesn't tell of it
)

// refreshed is what came of one name.
type refreshed struct {
	Name     string         `json:"name"`
	Page     string         `json:"page,omitempty"`
	Keys     []refreshedKey `json:"keys"`
	Warnings []string       `json:"warnings,omitempty"`
	Error    string         `json:"error,omitempty"`
}

type refreshedKey struct {
	admin.Key
	State   string   `json:"state"`
	Changes []string `json:"changes,omitempty"`
	Source  string   `json:"source,omitempty"` // the URL it came from
	Done    string   `json:"done,omitempty"`   // what was done about it: added, updated or removed

	offer offer
	key   trust.Key
}

func (r *refreshing) run(args []string) (err error) {
	if r.keyring, err = loadKeyring(r.cmd, r.cfg); err != nil {
		return err
	}
	names := args
	if len(args) == 0 {
		names = prefixesOf(r.keyring)
	}
	getter, err := newKeyGetter(r.cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, getter.close()) }()
	p := newPrinter(r.cmd.OutOrStdout())
	all, failed := []refreshed{}, 0
	for _, name := range names {
		one := r.compare(r.cmd.Context(), getter, name)
		if one.Error != "" {
			failed++
		}
		if !r.asJSON {
			one.print(p)
		}
		if err := errors.Join(p.err, r.change(p, &one)); err != nil {
			return err
		}
		all = append(all, one)
	}
	if r.asJSON {
		if err := printJSON(r.cmd.OutOrStdout(), all); err != nil {
			return err
		}
	} else if len(names) == 0 {
		p.printf("No key is trusted for a prefix: there is nobody to ask.\n")
	}
	if failed > 0 {
		return errors.Join(p.err, fmt.Errorf("%s of %d could not be refreshed", count(failed, "name"), len(names)))
	}
	return p.err
}

// prefixesOf returns the prefixes that keys are trusted for.
func prefixesOf(keyring *trust.Keyring) []string {
	var prefixes []string
	for _, k := range keyring.All() {
		if k.Prefix != "" {
			prefixes = append(prefixes, k.Prefix)
		}
	}
	return slices.Compact(prefixes)
}

// compare asks the publisher of a name and compares its keys with those trusted for it.
func (r *refreshing) compare(ctx context.Context, getter *keyGetter, name string) refreshed {
	out := refreshed{Name: name, Keys: []refreshedKey{}}
	got, err := getter.discover(ctx, name)
	out.Page = got.page
	for _, err := range got.errs {
		out.Warnings = append(out.Warnings, err.Error())
	}
	if err != nil {
		out.Error = err.Error()
		return out
	}
	// Keys trusted for every name came another way, and no page is expected to tell of them.
	held := slices.DeleteFunc(r.keyring.Keys(name), func(k trust.Key) bool { return k.Prefix == "" })
	for _, f := range got.offers {
		i := slices.IndexFunc(held, func(k trust.Key) bool { return k.Fingerprint == f.key.Fingerprint })
		if i < 0 {
			// A new key takes its place beside those that are trusted already, but never for more than its page may speak for.
			if len(held) > 0 && len(held[0].Prefix) > len(f.prefix) {
				f.prefix = held[0].Prefix
			}
			out.add(f, f.key, stateNew, nil)
			continue
		}
		f.prefix = held[i].Prefix
		c := trust.Compare(held[i], f.key)
		switch {
		case c.Older:
			out.add(f, held[i], stateOlder, c.Changes)
		case len(c.Changes) > 0:
			out.add(f, held[i], stateChanged, c.Changes)
		default:
			out.add(f, held[i], stateSame, nil)
		}
	}
	// Where a key couldn't be read nobody knows which one it was.
	if len(got.errs) > 0 {
		return out
	}
	for _, k := range held {
		if !slices.ContainsFunc(got.offers, func(f offer) bool { return f.key.Fingerprint == k.Fingerprint }) {
			out.add(offer{key: k, prefix: k.Prefix}, k, stateGone, nil)
		}
	}
	return out
}

func (o *refreshed) add(f offer, key trust.Key, state string, changes []string) {
	key.Prefix = f.prefix
	o.Keys = append(o.Keys, refreshedKey{Key: admin.KeyOf(key, time.Now()), State: state, Changes: changes, Source: f.source, offer: f, key: key})
}

func (o *refreshed) has(state string) bool {
	return slices.ContainsFunc(o.Keys, func(k refreshedKey) bool { return k.State == state })
}

func (o *refreshed) print(p *printer) {
	p.printf("%s\n", o.Name)
	if o.Page != "" {
		p.printf("asked        %s\n", o.Page)
	}
	for _, warning := range o.Warnings {
		p.printf("warning      %s\n", warning)
	}
	if o.Error != "" {
		p.printf("error        %s\n\n", strings.ReplaceAll(o.Error, "\n", "; "))
		return
	}
	for _, k := range o.Keys {
		p.printf("%-12s %s\n", k.State, joinNonEmpty("  ", string(k.Fingerprint), k.Algorithm, userID(k.key), "expires "+expiryText(k.SignsUntil)))
		for _, change := range k.Changes {
			p.printf("             %s\n", change)
		}
		if k.State == stateOlder {
			p.printf("             what is held here is newer and stays\n")
		}
	}
	switch {
	case o.has(stateNew) && (o.has(stateSame) || o.has(stateChanged)):
		p.printf("The publisher is changing keys, and tells of the old one still: trust the new one now, and remove the old one when nothing that you need is\nsigned by it alone.\n")
	case o.has(stateNew) && o.has(stateGone):
		p.printf("The publisher has changed keys without an overlap: what the old key signed is acceptable only as long as it stays trusted.\n")
	}
	p.printf("\n")
}

// change does what somebody, or --fingerprint, says about the differences.
func (r *refreshing) change(p *printer, o *refreshed) error {
	open := 0
	for i := range o.Keys {
		k := &o.Keys[i]
		if k.State == stateSame || k.State == stateOlder {
			continue
		}
		yes, err := r.decide(p, k)
		if err != nil {
			return err
		}
		if !yes {
			open++
			continue
		}
		if err := r.apply(p, k); err != nil {
			return err
		}
	}
	if open > 0 && !r.asJSON {
		p.printf("%s left as %s.\n\n", count(open, "difference"), plural(open, "it is", "they are"))
	}
	return p.err
}

func (r *refreshing) decide(p *printer, k *refreshedKey) (bool, error) {
	named := slices.Contains(r.fingerprints, k.Fingerprint)
	if r.asJSON || len(r.fingerprints) > 0 || !r.asker.possible() {
		return named && k.State != stateGone, nil
	}
	switch k.State {
	case stateNew:
		showKey(p, k.offer.key)
		return r.asker.ask("Trust this key to sign images of %s?", prefixText(k.Prefix))
	case stateChanged:
		return r.asker.ask("Take over the changes of key %s for %s?", k.Fingerprint, prefixText(k.Prefix))
	}
	return r.asker.ask("Trust key %s no longer for %s?", k.Fingerprint, prefixText(k.Prefix))
}

func (r *refreshing) apply(p *printer, k *refreshedKey) error {
	if k.State == stateGone {
		if err := trust.Remove(trustDirs(r.cfg), k.Prefix, k.Fingerprint); err != nil {
			return err
		}
		k.Done = "removed"
		p.printf("No longer trusted for %s: %s\n", prefixText(k.Prefix), k.Fingerprint)
		return p.err
	}
	added, err := trust.Add(trustDirs(r.cfg), k.Prefix, k.offer.bytes())
	if err != nil {
		return err
	}
	k.Done = "added"
	if k.State == stateChanged {
		k.Done = "updated"
	}
	if r.asJSON {
		return nil
	}
	for _, key := range added {
		p.printf("Trusted for %s, %s: %s\n", prefixText(k.Prefix), k.Done, key.File)
	}
	return p.err
}
