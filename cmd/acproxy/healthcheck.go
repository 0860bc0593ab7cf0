package main

import (
	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
)

func newHealthcheck(o *options) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "Say whether the running server can do all of its work",
		Long: `healthcheck asks the running server whether it serves what it holds and can keep what it doesn't, as /.acproxy/readyz does. It exits with 0 if so, else with 1 and the
reason. It is for containers, whose health a command has to tell. With --socket it doesn't read the configuration, which somebody may be changing.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if socket == "" {
				cfg, err := o.load()
				if err != nil {
					return err
				}
				socket = cfg.Admin.Socket
			}
			client, err := admin.Dial(socket)
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
	cmd.Flags().StringVar(&socket, "socket", "", "path of the server's admin socket (default: as configured)")
	return cmd
}
