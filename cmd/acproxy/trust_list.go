package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
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
				return printJSON(cmd.OutOrStdout(), admin.ListKeys(keyring, time.Now()))
			}
			return printTree(cmd.OutOrStdout(), keyring)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

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
