package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
)

func newDiscover(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "discover NAME[:VERSION][,LABEL=VALUE…]",
		Short: "Ask an image's publisher where it keeps the image and its keys, and show every step",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := acproxy.ParseRef(args[0])
			if err != nil {
				return &usageError{err}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			found, err := discover(cmd.Context(), cfg, ref)
			if found.Ref.IsZero() {
				return err // nobody was asked
			}
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), found), silent(err))
			}
			return errors.Join(printDiscovered(cmd.OutOrStdout(), found), err)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// discover has the server that runs on the data directory ask, or asks itself when none does.
func discover(ctx context.Context, cfg *config.Config, ref acproxy.Ref) (admin.Discovered, error) {
	if server, err := admin.Dial(cfg.Admin.Socket); err == nil {
		found, err := server.Discover(ctx, ref)
		if err == nil && found.Error != "" {
			err = errors.New(found.Error)
		}
		return found, err
	}
	shown, err := newCredentials(cfg, slog.Default())
	if err != nil {
		return admin.Discovered{}, err
	}
	client, err := newWeb(cfg, "", shown)
	if err != nil {
		return admin.Discovered{}, err
	}
	defer client.Close()
	finder := newFinder(cfg, client)
	found, err := admin.Discover(ctx, finder, ref)
	return found, errors.Join(err, finder.Close())
}

func printDiscovered(w io.Writer, d admin.Discovered) error {
	p := newPrinter(w)
	p.printf("%v\n\n", d.Ref)
	steps := p.table("", "ASKED", "STATUS", "TIME", "RESULT")
	for i, a := range d.Trace {
		steps.row(fmt.Sprintf("%d.", i+1), a.URL, statusText(a.Status), tookText(a.Took), joinNonEmpty("; ", a.Note, a.Err))
	}
	steps.flush()
	p.printf("\n")
	for _, e := range d.Endpoints {
		p.printf("template   %s\n", e.Template.URL)
		if e.Error != "" {
			p.printf("           can't be used: %s\n", e.Error)
			continue
		}
		p.printf("image      %s\nsignature  %s\n", e.Image, e.Signature)
	}
	for _, key := range d.Keys {
		p.printf("key        %s\n", key)
	}
	return p.err
}

func statusText(status int) string {
	if status == 0 {
		return "-"
	}
	return fmt.Sprint(status)
}

func tookText(d time.Duration) string {
	if d == 0 {
		return "-"
	}
	return d.Round(100 * time.Microsecond).String()
}
