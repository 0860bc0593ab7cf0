package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust"
)

func newTrustList(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the trusted keys, by prefix",
		Long: `list shows the trusted keys as a tree of prefixes: what is trusted for a prefix is trusted for those below it, too. It warns of keys that have
expired, or will within 30 days.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			keyring, err := loadKeyring(cmd, cfg)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), listedKeys(keyring))
			}
			return printTree(cmd.OutOrStdout(), keyring)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// listedKey is a key as the trust commands print it with --json.
type listedKey struct {
	Prefix      string            `json:"prefix"` // "" is every name
	Fingerprint trust.Fingerprint `json:"fingerprint"`
	UserIDs     []string          `json:"userIDs"`
	Algorithm   string            `json:"algorithm"`
	Created     time.Time         `json:"created"`
	Expires     time.Time         `json:"expires,omitzero"`
	SignsUntil  time.Time         `json:"signsUntil,omitzero"` // when the last of its keys that may sign ends
	Warning     string            `json:"warning,omitempty"`   // that it has expired, or will soon
	Revoked     bool              `json:"revoked"`
	RktReadable bool              `json:"rktReadable"`
	Origin      trust.Origin      `json:"origin"`
	File        string            `json:"file"`
}

func listed(k trust.Key) listedKey {
	return listedKey{
		Prefix: k.Prefix, Fingerprint: k.Fingerprint, UserIDs: append([]string{}, k.UserIDs...), Algorithm: k.Algorithm, Created: k.Created, Expires: k.Expires,
		SignsUntil: k.SignsUntil, Warning: keyWarning(k), Revoked: k.Revoked, RktReadable: k.RktReadable() == nil, Origin: k.Origin, File: k.File,
	}
}

// listedMask is a file that switches a key off.
type listedMask struct {
	Prefix      string            `json:"prefix"`
	Fingerprint trust.Fingerprint `json:"fingerprint"`
	Origin      trust.Origin      `json:"origin"`
	File        string            `json:"file"`
	Broken      bool              `json:"broken"` // it masks because it can't be read
}

type keyListing struct {
	Keys     []listedKey     `json:"keys"`
	Masks    []listedMask    `json:"masks"`
	Problems []trust.Problem `json:"problems"` // files that were skipped
}

func listedKeys(keyring *trust.Keyring) keyListing {
	out := keyListing{Keys: []listedKey{}, Masks: []listedMask{}, Problems: append([]trust.Problem{}, keyring.Problems()...)}
	for _, k := range keyring.All() {
		out.Keys = append(out.Keys, listed(k))
	}
	for _, m := range keyring.Masks() {
		out.Masks = append(out.Masks, listedMask{Prefix: m.Prefix, Fingerprint: m.Fingerprint, Origin: m.Origin, File: m.File, Broken: m.Broken})
	}
	return out
}

// keyWarning says that a key has expired or will soon, "" otherwise.
func keyWarning(k trust.Key) string { return strings.Trim(expiryWarning(k.SignsUntil), " ()!") }

// branch is a prefix in the tree of those that keys are trusted for.
type branch struct {
	prefix string
	leaves []string
	below  []*branch
}

func printTree(w io.Writer, keyring *trust.Keyring) error {
	p := newPrinter(w)
	keys := keyring.All()
	if len(keys) == 0 {
		p.printf("No key is trusted: every image that has to be signed is refused. Add one with: acproxy trust add --prefix NAME --fingerprint FPR FILE\n")
	}
	leaves := make(map[string][]string)
	for _, k := range keys {
		leaves[k.Prefix] = append(leaves[k.Prefix], keyLine(k))
	}
	for _, m := range keyring.Masks() {
		leaves[m.Prefix] = append(leaves[m.Prefix], fmt.Sprintf("%s  MASKED by %s%s", m.Fingerprint, m.File, orNothing(m.Broken, ", which can't be read")))
	}
	for _, b := range grow(leaves) {
		b.print(p, "", "")
	}
	return p.err
}

// grow arranges prefixes in a tree: each below the longest that covers it. Every name comes first, by itself.
func grow(leaves map[string][]string) []*branch {
	var roots []*branch
	var path []*branch // from a root to the last prefix
	prefixes := make([]string, 0, len(leaves))
	for prefix := range leaves {
		prefixes = append(prefixes, prefix)
	}
	// By segments, so that a prefix stands right before those below it.
	slices.SortFunc(prefixes, func(a, b string) int { return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) })
	for _, prefix := range prefixes {
		b := &branch{prefix: prefix, leaves: leaves[prefix]}
		for len(path) > 0 && (path[len(path)-1].prefix == "" || !acproxy.HasPrefix(prefix, path[len(path)-1].prefix)) {
			path = path[:len(path)-1]
		}
		if len(path) == 0 {
			roots = append(roots, b)
		} else {
			above := path[len(path)-1]
			above.below = append(above.below, b)
		}
		path = append(path, b)
	}
	return roots
}

// print prints a prefix, its keys and what is below it. The line begins with first, those below it with rest.
func (b *branch) print(p *printer, first, rest string) {
	p.printf("%s%s\n", first, prefixText(b.prefix))
	for i, leaf := range b.leaves {
		p.printf("%s%s%s\n", rest, fork(i+1 == len(b.leaves)+len(b.below), "├── ", "└── "), leaf)
	}
	for i, below := range b.below {
		last := i+1 == len(b.below)
		below.print(p, rest+fork(last, "├── ", "└── "), rest+fork(last, "│   ", "    "))
	}
}

func fork(last bool, more, end string) string {
	if last {
		return end
	}
	return more
}

func keyLine(k trust.Key) string {
	return joinNonEmpty("  ", string(k.Fingerprint), k.Algorithm, userID(k), "expires "+expiryText(k.SignsUntil), k.Origin.String(), keyNote(k))
}

func keyNote(k trust.Key) string {
	switch {
	case k.Revoked:
		return "REVOKED"
	case k.RktReadable() != nil:
		return "rkt can't read it"
	}
	return ""
}
