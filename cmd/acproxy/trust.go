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
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newTrust(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trust",
		Short: "Decide whose signatures count, for which image names",
		Long: `Keys are kept as rkt keeps them, one file per key, for a prefix of image names or for all of them (root). A running server sees changes within a
second. It never adds a key by itself: that takes one of these commands, and somebody who has compared a fingerprint.`,
		Args:               args(cobra.NoArgs),
		RunE:               func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPostRunE: func(*cobra.Command, []string) error { return tellServer(o) },
	}
	cmd.AddCommand(
		newTrustAdd(o), newTrustList(o), newTrustShow(o), newTrustRemove(o), newTrustMask(o), newTrustUnmask(o), newTrustCheck(o), newTrustRefresh(o),
	)
	return cmd
}

// tellServer has a server that runs on the data directory read the keys now, so that what comes after the command is decided by them.
func tellServer(o *options) error {
	cfg, err := o.load()
	if err != nil {
		return err
	}
	server, err := admin.Dial(cfg.Admin.Socket)
	if err != nil {
		// None runs, or not for this user; then it sees the change by itself.
		return nil
	}
	return server.ReloadKeys()
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

// loadKeyring reads the trusted keys, and warns of files among them that can't count.
func loadKeyring(cmd *cobra.Command, cfg *config.Config) (*trust.Keyring, error) {
	keyring, err := trust.Load(trustDirs(cfg))
	if err != nil {
		return nil, err
	}
	for _, problem := range keyring.Problems() {
		fmt.Fprintf(cmd.ErrOrStderr(), "acproxy: warning: skipped %v\n", problem)
	}
	return keyring, nil
}

// fingerprints reads the values of --fingerprint.
func fingerprints(values []string) ([]trust.Fingerprint, error) {
	var out []trust.Fingerprint
	for _, value := range values {
		fingerprint, err := trust.ParseFingerprint(value)
		if err != nil {
			return nil, &usageError{err}
		}
		out = append(out, fingerprint)
	}
	return out, nil
}

// asker asks a person.
type asker struct {
	in  io.Reader
	buf *bufio.Reader
	out io.Writer
}

func newAsker(cmd *cobra.Command) *asker {
	in := cmd.InOrStdin()
	return &asker{in: in, buf: bufio.NewReader(in), out: cmd.OutOrStdout()}
}

// possible reports whether there is somebody to ask.
func (a *asker) possible() bool {
	f, ok := a.in.(*os.File)
	return !ok || term.IsTerminal(int(f.Fd()))
}

// ask returns whether the answer is yes. Where nobody can answer, it is an error.
func (a *asker) ask(format string, args ...any) (bool, error) {
	if !a.possible() {
		return false, usagef("nobody can be asked whether to trust it: give --fingerprint FPR")
	}
	fmt.Fprintf(a.out, format+" [y/N] ", args...)
	answer, err := a.buf.ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return true, nil
	}
	return false, nil
}

// showKey prints what somebody has to know of a key before trusting it.
func showKey(p *printer, key trust.Key) {
	p.printf("fingerprint  %s\n", key.Fingerprint)
	for _, id := range key.UserIDs {
		p.printf("user ID      %s\n", id)
	}
	p.printf("algorithm    %s\ncreated      %s\nexpires      %s\n", key.Algorithm, date(key.Created), expiryText(key.Expires))
	for _, sub := range key.Subkeys {
		if sub.Signs {
			p.printf("signs with   subkey %s, %s, created %s, expires %s%s\n", sub.KeyID, sub.Algorithm, date(sub.Created), expiryText(sub.Expires), orNothing(sub.Revoked, ", revoked"))
		}
	}
	if key.Revoked {
		p.printf("revoked      yes: its signatures are refused\n")
	}
	if len(key.SigningIDs) == 0 {
		p.printf("warning      it can't sign: nothing that it signs will be accepted\n")
	}
	if err := key.RktReadable(); err != nil {
		p.printf("rkt nodes    can't read this key: %v\n", err)
	} else {
		p.printf("rkt nodes    can read this key\n")
	}
	p.printf("\n")
}

func orNothing(when bool, text string) string {
	if when {
		return text
	}
	return ""
}

func date(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// expiryText says when something ends, and warns if that is soon.
func expiryText(end time.Time) string {
	if end.IsZero() {
		return "never"
	}
	return date(end) + expiryWarning(end)
}

func expiryWarning(end time.Time) string {
	switch warning := admin.ExpiryWarning(end, time.Now()); warning {
	case "":
		return ""
	case "EXPIRED":
		return " (EXPIRED)"
	default:
		return " (" + warning + "!)"
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
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

func userID(key trust.Key) string {
	if len(key.UserIDs) == 0 {
		return ""
	}
	return key.UserIDs[0]
}

// scopeFlag returns the flag that a command needs for a prefix.
func scopeFlag(prefix string) string {
	if prefix == "" {
		return "--root"
	}
	return "--prefix " + prefix
}
