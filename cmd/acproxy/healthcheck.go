package main

import (
	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
)

func newHealthcheck(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "healthcheck",
		Short: "Say whether the running server can do all of its work",
		Long: `healthcheck asks the running server whether it serves what it holds and can keep what it doesn't, as /.acproxy/readyz does. It exits with 0 if so, else with 1 and the
reason. It is for containers, whose health a command has to tell.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			client, err := admin.Dial(cfg.Admin.Socket)
			if err != nil {
				return err
			}
			if err := client.Ready(); err != nil {
				return err
			}
			p := newPrinter(cmd.OutOrStdout())
			p.printf("ready\n")
			return p.err
		},
	}
}
