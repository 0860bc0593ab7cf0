package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newTrustCheck(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check NAME[:VERSION][,LABEL=VALUE…]",
		Short: "Say which keys count for an image name, which don't, and why",
		Long: `check lists the keys that have to do with an image name, and the policy that applies to it. It exits 0 if enough keys count for an image of that
name to be acceptable, 1 if not. Trust is by name alone: a version or labels make no difference.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := acproxy.ParseRef(args[0])
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
			c := checkName(cfg, keyring, ref.Name(), time.Now())
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), c), silent(c.verdict()))
			}
			p := newPrinter(cmd.OutOrStdout())
			c.print(p)
			return errors.Join(p.err, silent(c.verdict()))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// checked is what acproxy trust check prints.
type checked struct {
	Name     string        `json:"name"`
	Policy   checkedPolicy `json:"policy"`
	Counting int           `json:"counting"` // different keys that may sign
	Keys     []checkedKey  `json:"keys"`
}

type checkedPolicy struct {
	Prefix    string              `json:"prefix"` // of the publishers entry in the configuration, "" if none is for the name
	Signature trust.Requirement   `json:"signature"`
	Threshold int                 `json:"threshold"`
	Expired   trust.ExpiredPolicy `json:"expired"`
	Legacy    bool                `json:"legacy"`
}

type checkedKey struct {
	admin.Key
	Counts  bool          `json:"counts"`
	Outcome trust.Outcome `json:"outcome"` // of a signature that it would make now
	Reason  string        `json:"reason"`
	Until   time.Time     `json:"until,omitzero"`
}

func checkName(cfg *config.Config, keyring *trust.Keyring, name string, now time.Time) checked {
	publisher := cfg.PublisherFor(name)
	policy := trustPolicy(publisher)
	out := checked{Name: name, Keys: []checkedKey{}, Policy: checkedPolicy{
		Prefix: publisher.Prefix, Signature: policy.Signature, Threshold: max(policy.Threshold, 1), Expired: policy.Expired, Legacy: policy.Legacy,
	}}
	counting := make(map[trust.Fingerprint]bool)
	for _, s := range keyring.Explain(name, policy, now) {
		if s.Counts() {
			counting[s.Key.Fingerprint] = true
		}
		out.Keys = append(out.Keys, checkedKey{Key: admin.KeyOf(s.Key, time.Now()), Counts: s.Counts(), Outcome: s.Outcome, Reason: s.Reason, Until: s.Until})
	}
	out.Counting = len(counting)
	return out
}

// verdict returns an error if no image of the name can be acceptable.
func (c checked) verdict() error {
	if c.Counting >= c.Policy.Threshold || c.Policy.Signature == trust.Optional {
		return nil
	}
	return errors.New("too few keys count")
}

func (c checked) print(p *printer) {
	from := "the defaults"
	if c.Policy.Prefix != "" {
		from = "publishers: " + c.Policy.Prefix
	}
	p.printf("%s\npolicy  signature %v, threshold %d, expired %v, legacy %t (%s)\n", c.Name, c.Policy.Signature, c.Policy.Threshold, c.Policy.Expired, c.Policy.Legacy, from)
	p.printf("keys    %s, the policy asks for %d\n\n", count(c.Counting, "key")+plural(c.Counting, " counts", " count"), c.Policy.Threshold)
	if len(c.Keys) == 0 {
		p.printf("No key has to do with this name. Add one with: acproxy trust add --prefix %s --fingerprint FPR FILE\n", c.Name)
		return
	}
	t := p.table("", "FINGERPRINT", "USER ID", "WHY")
	for _, k := range c.Keys {
		mark, why := "no", k.Outcome.String()+": "+k.Reason
		if k.Counts {
			mark, why = "yes", k.Reason
			if !k.Until.IsZero() {
				why += ", until " + expiryText(k.Until)
			}
		}
		id := ""
		if len(k.UserIDs) > 0 {
			id = k.UserIDs[0]
		}
		t.row(mark, string(k.Fingerprint), id, why)
	}
	t.flush()
}
