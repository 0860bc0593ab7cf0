package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/missing"
)

func newMissing(o *options) *cobra.Command {
	var asJSON, list, forget bool
	cmd := &cobra.Command{
		Use:   "missing",
		Short: "Show what nodes asked for and could not get, because it isn't held",
		Long: `missing shows what nodes asked for that is not held, and could not be had either: because nobody may be asked (offline), the publisher doesn't have it, or doesn't
answer. What was refused is in acproxy refusals. What has come since is left out.

With --list it prints a list that acproxy warm takes as it is, on the side that may ask publishers. Where a node got no further than discovery nothing but the name is
known: such a line stands for the image that the publisher calls latest.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON && list || forget && (asJSON || list) {
				return usagef("--json, --list and --forget exclude each other")
			}
			return o.withStore(func(store admin.Store) error {
				if forget {
					return store.ForgetMissing()
				}
				entries, err := store.Missing()
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), entries)
				}
				p := newPrinter(cmd.OutOrStdout())
				if list {
					printMissingList(p, entries)
				} else {
					printMissing(p, entries)
				}
				return p.err
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&list, "list", false, "print a list for acproxy warm")
	cmd.Flags().BoolVar(&forget, "forget", false, "forget all of it, and begin anew")
	return cmd
}

func printMissing(p *printer, entries []missing.Missed) {
	t := p.table("IMAGE", "ASKED", "LAST", "WHY")
	for _, e := range entries {
		why := e.Code
		if e.Name {
			why += ", at discovery"
		}
		t.row(e.Ref.String(), count(int(e.Count), "time"), e.Last.Local().Format(time.DateTime), why)
	}
	t.flush()
	p.printf("%d missing\n", len(entries))
}

func printMissingList(p *printer, entries []missing.Missed) {
	for _, e := range entries {
		comment := fmt.Sprintf("%s, last %s: %s", count(int(e.Count), "time"), e.Last.UTC().Format(time.RFC3339), e.Code)
		if e.Name {
			comment += "; the version is not known"
		}
		p.printf("%s  # %s\n", e.Ref, comment)
	}
}
