package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/trust"
)

func newTrustShow(o *options) *cobra.Command {
	var asJSON, armor bool
	cmd := &cobra.Command{
		Use:   "show FINGERPRINT",
		Short: "Show all there is to know about a key, and where it is trusted",
		Long:  `show shows a key that lies among the trusted ones, masked or not. With --armor it prints the key itself, to be given to a node.`,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			fingerprint, err := trust.ParseFingerprint(args[0])
			if err != nil {
				return &usageError{err}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			keyring, err := loadKeyring(cmd, cfg)
			if err != nil {
				return err
			}
			held := keyring.Held(fingerprint)
			if len(held) == 0 {
				return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-key", Detail: fmt.Sprintf("key %s is not among the trusted keys", fingerprint)}
			}
			switch {
			case armor:
				_, err := cmd.OutOrStdout().Write(newest(held).Armored())
				return err
			case asJSON:
				return printJSON(cmd.OutOrStdout(), shownKeyOf(keyring, held))
			}
			p := newPrinter(cmd.OutOrStdout())
			shownKeyOf(keyring, held).print(p, newest(held))
			return p.err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&armor, "armor", false, "print the key")
	cmd.MarkFlagsMutuallyExclusive("json", "armor")
	return cmd
}

// newest returns the copy of a key whose owner changed it last.
func newest(held []trust.Key) trust.Key {
	return slices.MaxFunc(held, func(a, b trust.Key) int { return a.Changed.Compare(b.Changed) })
}

// shownKey is what acproxy trust show prints.
type shownKey struct {
	admin.Key
	Changed time.Time     `json:"changed"` // when its owner last changed it
	Subkeys []shownSubkey `json:"subkeys"`
	Rkt     string        `json:"rkt,omitempty"` // why rkt nodes can't read it
	Copies  []shownCopy   `json:"copies"`
}

type shownSubkey struct {
	KeyID     string    `json:"keyID"`
	Algorithm string    `json:"algorithm"`
	Created   time.Time `json:"created"`
	Expires   time.Time `json:"expires,omitzero"`
	Revoked   bool      `json:"revoked"`
	Signs     bool      `json:"signs"`
}

type shownCopy struct {
	Prefix  string       `json:"prefix"`
	File    string       `json:"file"`
	Origin  trust.Origin `json:"origin"`
	Trusted bool         `json:"trusted"` // false if something masks or replaces it
}

func shownKeyOf(keyring *trust.Keyring, held []trust.Key) shownKey {
	key := newest(held)
	out := shownKey{Key: admin.KeyOf(key, time.Now()), Changed: key.Changed, Subkeys: []shownSubkey{}, Copies: []shownCopy{}}
	if err := key.RktReadable(); err != nil {
		out.Rkt = err.Error()
	}
	for _, sub := range key.Subkeys {
		out.Subkeys = append(out.Subkeys, shownSubkey(sub))
	}
	trusted := keyring.All()
	for _, k := range held {
		out.Copies = append(out.Copies, shownCopy{
			Prefix: k.Prefix, File: k.File, Origin: k.Origin, Trusted: slices.ContainsFunc(trusted, func(t trust.Key) bool { return t.File == k.File }),
		})
	}
	return out
}

func (s shownKey) print(p *printer, key trust.Key) {
	showKey(p, key)
	p.printf("changed      %s, by its owner\n", date(s.Changed))
	for _, sub := range s.Subkeys {
		p.printf("subkey       %s, %s, created %s, expires %s%s%s\n", sub.KeyID, sub.Algorithm, date(sub.Created), expiryText(sub.Expires), orNothing(sub.Signs, ", signs"), orNothing(sub.Revoked, ", revoked"))
	}
	p.printf("\n")
	for _, c := range s.Copies {
		verb := "trusted for "
		if !c.Trusted {
			verb = "masked for  "
		}
		p.printf("%s %s, %v: %s\n", verb, prefixText(c.Prefix), c.Origin, c.File)
	}
}
