package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

// adding is one run of acproxy trust add.
type adding struct {
	cmd          *cobra.Command
	cfg          *config.Config
	fingerprints []trust.Fingerprint // those that are accepted without a question
	yes          bool                // all are
}

func newTrustAdd(o *options) *cobra.Command {
	var where scope
	var discover string
	var accepted []string
	var yes, insecure bool
	cmd := &cobra.Command{
		Use:   "add (--prefix NAME | --root) FILE|URL | add --discover NAME",
		Short: "Trust the keys in a file, at a URL, or that a publisher tells of",
		Long: `add shows every key and asks whether to trust it. With --fingerprint it doesn't ask: the keys with these fingerprints are trusted and no others.

FILE may be - for standard input, together with --fingerprint or --yes. A URL is asked for by https only, and without credentials. --yes answers
every question for a file or URL that you name yourself.

--discover asks the publisher of an image name for its keys (ac-discovery-pubkeys). Whoever controls that web site can tell of any key: compare
the fingerprint with one that came another way. --yes alone is refused for such keys; with --insecure-accept-discovered it isn't. Unless --prefix
says otherwise, a key is trusted for the prefix that the page names, but for no more than the page is for.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			a := &adding{cmd: cmd, yes: yes}
			if a.fingerprints, err = fingerprints(accepted); err != nil {
				return err
			}
			if discover == "" {
				return a.named(o, where, args)
			}
			switch {
			case len(args) > 0:
				return usagef("--discover asks the publisher for the keys: leave out %s", args[0])
			case where.root:
				return usagef("--discover and --root exclude each other: a publisher's page can't speak for every name")
			case yes && !insecure && len(a.fingerprints) == 0:
				return usagef("--yes is not enough for keys that a web site tells of: give --fingerprint FPR, got another way, or --insecure-accept-discovered to trust that site")
			}
			a.yes = yes && insecure
			return a.discovered(o, where, discover)
		},
	}
	where.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&discover, "discover", "", "ask the publisher of this image name for its keys")
	f.StringArrayVar(&accepted, "fingerprint", nil, "trust the key with this fingerprint without asking (repeatable)")
	f.BoolVar(&yes, "yes", false, "trust all keys without asking")
	f.BoolVar(&insecure, "insecure-accept-discovered", false, "let --yes trust keys that --discover found")
	return cmd
}

// named adds keys from a file or URL that the user names.
func (a *adding) named(o *options, where scope, args []string) error {
	prefix, err := where.check()
	if err != nil {
		return err
	}
	if len(args) != 1 {
		return usagef("which key? Name a FILE, an https URL, or --discover NAME")
	}
	if a.cfg, err = o.load(); err != nil {
		return err
	}
	var data []byte
	if isURL(args[0]) {
		data, err = a.download(prefix, args[0])
	} else {
		data, err = readKeyFile(a.cmd.InOrStdin(), args[0])
	}
	if err != nil {
		return err
	}
	offers, err := offersOf(data, args[0], prefix)
	if err != nil {
		return err
	}
	return a.add(offers)
}

func (a *adding) download(prefix, url string) (data []byte, err error) {
	getter, err := newKeyGetter(a.cfg)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, getter.close()) }()
	return getter.get(a.cmd.Context(), prefix, url)
}

// discovered adds keys that a publisher tells of.
func (a *adding) discovered(o *options, where scope, name string) (err error) {
	if err := acproxy.CheckName(name); err != nil {
		return &usageError{err}
	}
	if where.prefix != "" {
		if _, err := where.check(); err != nil {
			return err
		}
	}
	if a.cfg, err = o.load(); err != nil {
		return err
	}
	getter, err := newKeyGetter(a.cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, getter.close()) }()
	found, err := getter.discover(a.cmd.Context(), name)
	if err != nil {
		return err
	}
	for _, err := range found.errs {
		fmt.Fprintf(a.cmd.ErrOrStderr(), "acproxy: warning: a key is left out: %v\n", err)
	}
	p := newPrinter(a.cmd.OutOrStdout())
	p.printf("%s tells of %s.\n\n", found.page, count(len(found.offers), "key"))
	for i := range found.offers {
		if where.prefix != "" {
			found.offers[i].prefix = where.prefix
		}
	}
	return errors.Join(p.err, a.add(found.offers))
}

// add shows the keys, finds out which of them are to be trusted, and writes those.
func (a *adding) add(offers []offer) error {
	keyring, err := loadKeyring(a.cmd, a.cfg)
	if err != nil {
		return err
	}
	if err := a.have(offers); err != nil {
		return err
	}
	p, asker := newPrinter(a.cmd.OutOrStdout()), newAsker(a.cmd)
	added := 0
	for _, f := range offers {
		p.printf("from         %s\n", f.source)
		showKey(p, f.key)
		if p.err != nil {
			return p.err
		}
		done, err := a.one(p, asker, keyring, f)
		if err != nil {
			return err
		}
		added += done
	}
	if added == 0 && p.err == nil {
		return errors.New("not trusted, nothing was added")
	}
	return p.err
}

// have returns an error if a key that was asked for by its fingerprint is not there.
func (a *adding) have(offers []offer) error {
	var keys []trust.Key
	for _, f := range offers {
		keys = append(keys, f.key)
	}
	for _, want := range a.fingerprints {
		if !slices.ContainsFunc(keys, func(k trust.Key) bool { return k.Fingerprint == want }) {
			return fmt.Errorf("%s holds %s, not the key %s; nothing was added", offers[0].source, fingerprintsText(keys), want)
		}
	}
	return nil
}

// one decides about one key, and returns 1 if it is trusted now.
func (a *adding) one(p *printer, asker *asker, keyring *trust.Keyring, f offer) (int, error) {
	for _, held := range keyring.Held(f.key.Fingerprint) {
		if trust.Compare(held, f.key).Older {
			return 0, fmt.Errorf("%s is held already and says more than this copy: its owner changed it at %s; remove that one first if you mean it (acproxy trust rm %s %s)",
				held.File, date(held.Changed), scopeFlag(held.Prefix), held.Fingerprint)
		}
	}
	yes := a.yes || slices.Contains(a.fingerprints, f.key.Fingerprint)
	switch {
	case yes:
	case len(a.fingerprints) > 0:
		p.printf("Left out: no --fingerprint names it.\n\n")
		return 0, nil
	default:
		var err error
		if yes, err = asker.ask("Trust this key to sign images of %s?", prefixText(f.prefix)); err != nil {
			return 0, err
		}
	}
	if !yes {
		return 0, nil
	}
	return 1, store(p, a.cfg, f)
}

// store writes a key.
func store(p *printer, cfg *config.Config, f offer) error {
	added, err := trust.Add(trustDirs(cfg), f.prefix, f.bytes())
	if err != nil {
		return err
	}
	for _, key := range added {
		p.printf("Trusted for %s: %s\n", prefixText(f.prefix), key.File)
	}
	return nil
}
