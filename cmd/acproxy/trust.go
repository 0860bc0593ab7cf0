package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newTrust(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trust",
		Short: "Decide whose signatures count, for which image names",
		Long: `Keys are kept as rkt keeps them, one file per key, for a prefix of image names or for all of them (root). A running server sees changes within a
second.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newTrustAdd(o), newTrustList(o), newTrustRemove(o))
	return cmd
}

// scope is the prefix that a trust command is about.
type scope struct {
	prefix string
	root   bool
}

func (s *scope) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.prefix, "prefix", "", "prefix of image names, by whole segments: example.com/app")
	cmd.Flags().BoolVar(&s.root, "root", false, "every image name")
}

// check returns the prefix, "" for every name.
func (s *scope) check() (string, error) {
	switch {
	case s.root && s.prefix != "":
		return "", usagef("--prefix and --root exclude each other")
	case s.root:
		return "", nil
	case s.prefix == "":
		return "", usagef("for which image names? Give --prefix NAME, or --root for all of them")
	}
	if err := acproxy.CheckName(s.prefix); err != nil {
		return "", &usageError{err}
	}
	return s.prefix, nil
}

func newTrustAdd(o *options) *cobra.Command {
	var where scope
	var fingerprint string
	cmd := &cobra.Command{
		Use:   "add (--prefix NAME | --root) [--fingerprint FPR] FILE",
		Short: "Trust the key in a file",
		Long: `add shows the key in a file and asks whether to trust it. With --fingerprint it doesn't ask: the key must be the one with that fingerprint.
FILE may be - for standard input, together with --fingerprint.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			prefix, err := where.check()
			if err != nil {
				return err
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			data, err := readKeyFile(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			return addKey(cmd, cfg, prefix, fingerprint, args[0], data)
		},
	}
	where.flags(cmd)
	cmd.Flags().StringVar(&fingerprint, "fingerprint", "", "the key's fingerprint; answers the question")
	return cmd
}

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
	data, err := io.ReadAll(io.LimitReader(in, trust.MaxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > trust.MaxKeyFile {
		return nil, fmt.Errorf("%s is longer than %d bytes: that is no key", file, trust.MaxKeyFile)
	}
	return data, nil
}

func addKey(cmd *cobra.Command, cfg *config.Config, prefix, fingerprint, file string, data []byte) error {
	keys, err := trust.ReadKeys(data)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	p := newPrinter(cmd.OutOrStdout())
	for _, key := range keys {
		showKey(p, key)
	}
	if p.err != nil {
		return p.err
	}
	if fingerprint != "" {
		want, err := trust.ParseFingerprint(fingerprint)
		if err != nil {
			return &usageError{err}
		}
		if len(keys) != 1 || keys[0].Fingerprint != want {
			return fmt.Errorf("%s holds %s, not the key %s alone; nothing was added", file, fingerprintsText(keys), want)
		}
	} else if err := confirm(cmd, fmt.Sprintf("Trust %s to sign images of %s?", plural(len(keys), "this key", "these keys"), prefixText(prefix))); err != nil {
		return err
	}
	added, err := trust.Add(trustDirs(cfg), prefix, data)
	if err != nil {
		return err
	}
	for _, key := range added {
		p.printf("Trusted for %s: %s\n", prefixText(prefix), key.File)
	}
	return p.err
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

func fingerprintsText(keys []trust.Key) string {
	var out []string
	for _, key := range keys {
		out = append(out, string(key.Fingerprint))
	}
	return strings.Join(out, ", ")
}

// confirm asks a person. Where nobody can answer, it is an error.
func confirm(cmd *cobra.Command, question string) error {
	in := cmd.InOrStdin()
	if f, ok := in.(*os.File); ok && !term.IsTerminal(int(f.Fd())) {
		return usagef("nobody can be asked whether to trust it: give --fingerprint FPR")
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s [y/N] ", question)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errors.New("not trusted, nothing was added")
}

func showKey(p *printer, key trust.Key) {
	p.printf("fingerprint  %s\n", key.Fingerprint)
	for _, id := range key.UserIDs {
		p.printf("user ID      %s\n", id)
	}
	p.printf("algorithm    %s\ncreated      %s\nexpires      %s\n", key.Algorithm, key.Created.UTC().Format(time.DateOnly), expiryText(key))
	if key.Revoked {
		p.printf("revoked      yes: its signatures are refused\n")
	}
	if err := key.RktReadable(); err != nil {
		p.printf("rkt nodes    can't read this key: %v\n", err)
	} else {
		p.printf("rkt nodes    can read this key\n")
	}
	p.printf("\n")
}

func expiryText(key trust.Key) string {
	if key.Expires.IsZero() {
		return "never"
	}
	text := key.Expires.UTC().Format(time.DateOnly)
	switch left := time.Until(key.Expires); {
	case left < 0:
		text += " (expired)"
	case left < 30*24*time.Hour:
		text += fmt.Sprintf(" (in %d days)", int(left.Hours()/24))
	}
	return text
}

func newTrustList(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the trusted keys, by prefix",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			keyring, err := trust.Load(trustDirs(cfg))
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), listedKeys(keyring))
			}
			return printKeys(cmd.OutOrStdout(), keyring)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// listedKey is a line of acproxy trust list --json.
type listedKey struct {
	Prefix      string            `json:"prefix"` // "" is every name
	Fingerprint trust.Fingerprint `json:"fingerprint"`
	UserIDs     []string          `json:"userIDs"`
	Algorithm   string            `json:"algorithm"`
	Created     time.Time         `json:"created"`
	Expires     time.Time         `json:"expires,omitzero"`
	Revoked     bool              `json:"revoked"`
	RktReadable bool              `json:"rktReadable"`
	Origin      trust.Origin      `json:"origin"`
	File        string            `json:"file"`
}

type keyListing struct {
	Keys     []listedKey     `json:"keys"`
	Problems []trust.Problem `json:"problems"` // files that were skipped
}

func listedKeys(keyring *trust.Keyring) keyListing {
	out := keyListing{Keys: []listedKey{}, Problems: append([]trust.Problem{}, keyring.Problems()...)}
	for _, k := range keyring.All() {
		out.Keys = append(out.Keys, listedKey{
			Prefix: k.Prefix, Fingerprint: k.Fingerprint, UserIDs: k.UserIDs, Algorithm: k.Algorithm, Created: k.Created, Expires: k.Expires,
			Revoked: k.Revoked, RktReadable: k.RktReadable() == nil, Origin: k.Origin, File: k.File,
		})
	}
	return out
}

func printKeys(w io.Writer, keyring *trust.Keyring) error {
	p := newPrinter(w)
	keys := keyring.All()
	if len(keys) == 0 {
		p.printf("No key is trusted: every image that has to be signed is refused. Add one with: acproxy trust add --prefix NAME --fingerprint FPR FILE\n")
	} else {
		t := p.table("PREFIX", "FINGERPRINT", "USER ID", "ALGORITHM", "EXPIRES", "FROM", "NOTE")
		for _, k := range keys {
			userID := ""
			if len(k.UserIDs) > 0 {
				userID = k.UserIDs[0]
			}
			t.row(prefixText(k.Prefix), string(k.Fingerprint), userID, k.Algorithm, expiryText(k), k.Origin.String(), keyNote(k))
		}
		t.flush()
	}
	for _, problem := range keyring.Problems() {
		p.printf("skipped: %v\n", problem)
	}
	return p.err
}

func keyNote(k trust.Key) string {
	switch {
	case k.Revoked:
		return "revoked"
	case k.RktReadable() != nil:
		return "rkt can't read it"
	}
	return ""
}

func newTrustRemove(o *options) *cobra.Command {
	var where scope
	cmd := &cobra.Command{
		Use:   "rm (--prefix NAME | --root) FINGERPRINT",
		Short: "Trust a key no longer",
		Long:  `rm removes a key. Images that no other trusted key signed are not served any more, from that moment on.`,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			prefix, err := where.check()
			if err != nil {
				return err
			}
			fingerprint, err := trust.ParseFingerprint(args[0])
			if err != nil {
				return &usageError{err}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			if err := trust.Remove(trustDirs(cfg), prefix, fingerprint); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "No longer trusted for %s: %s\n", prefixText(prefix), fingerprint)
			return nil
		},
	}
	where.flags(cmd)
	return cmd
}
