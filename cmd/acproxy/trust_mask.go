package main

import (
	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newTrustRemove(o *options) *cobra.Command {
	return newTrustChange(o, &cobra.Command{
		Use:   "rm (--prefix NAME | --root) FINGERPRINT",
		Short: "Trust a key no longer",
		Long:  `rm removes a key. Images that no other trusted key signed are not served any more, from that moment on.`,
	}, trust.Remove, "No longer trusted for %s: %s\n")
}

func newTrustMask(o *options) *cobra.Command {
	return newTrustChange(o, &cobra.Command{
		Use:   "mask (--prefix NAME | --root) FINGERPRINT",
		Short: "Switch off a key that comes with the system, or except a prefix from a key that is trusted for more",
		Long: `mask puts an empty file in the key's place, as rkt does. Images under the prefix that no other trusted key signed are not served any more, from
that moment on.`,
	}, trust.Mask, "Masked for %s: %s\n")
}

func newTrustUnmask(o *options) *cobra.Command {
	return newTrustChange(o, &cobra.Command{
		Use:   "unmask (--prefix NAME | --root) FINGERPRINT",
		Short: "Take away what mask made",
	}, trust.Unmask, "Not masked any more for %s: %s\n")
}

// newTrustChange makes a command that changes what one key at one place counts for.
func newTrustChange(o *options, cmd *cobra.Command, change func(trust.Dirs, string, trust.Fingerprint) error, done string) *cobra.Command {
	var where scope
	cmd.Args = args(cobra.ExactArgs(1))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
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
		if err := change(trustDirs(cfg), prefix, fingerprint); err != nil {
			return err
		}
		p := newPrinter(cmd.OutOrStdout())
		p.printf(done, prefixText(prefix), fingerprint)
		return stillTrusted(p, cmd, cfg, prefix, fingerprint)
	}
	where.flags(cmd)
	return cmd
}

// stillTrusted tells what else the key is trusted for, so that nobody believes it gone who has only removed one copy.
func stillTrusted(p *printer, cmd *cobra.Command, cfg *config.Config, prefix string, fingerprint trust.Fingerprint) error {
	keyring, err := loadKeyring(cmd, cfg)
	if err != nil {
		return err
	}
	for _, k := range keyring.All() {
		if k.Fingerprint == fingerprint && k.Prefix != prefix {
			p.printf("It is trusted for %s: %s\n", prefixText(k.Prefix), k.File)
		}
	}
	return p.err
}
