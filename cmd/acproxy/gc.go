package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
)

func newGC(o *options) *cobra.Command {
	var dryRun, asJSON bool
	var to string
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Evict the least recently used images, or say which would be",
		Long: `gc makes the store smaller now: to the low watermark (cache.low), or to a size. What nobody writes any more goes first, then what is quarantined, then
the images that were not used for the longest time. Images that are pinned, in use, younger than cache.grace, last copies, or needed by others that
stay are kept.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			target := int64(-1)
			if to != "" {
				size, err := config.ParseSize(to)
				if err != nil {
					return usagef("--to: %w", err)
				}
				target = int64(size)
			}
			return o.withStore(func(store admin.Store) error {
				w := cmd.OutOrStdout()
				plan, err := store.PlanEviction(cmd.Context(), target)
				if err != nil {
					return err
				}
				if dryRun {
					if asJSON {
						return printJSON(w, plan)
					}
					return showPlan(w, plan)
				}
				freed, err := store.Evict(cmd.Context(), target)
				if err != nil {
					return err
				}
				if asJSON {
					return json.NewEncoder(w).Encode(freed)
				}
				return showFreed(w, plan, freed)
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "evict nothing, and say what would be evicted and what kept, and why")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&to, "to", "", "size to come down to, such as 10GiB (default: the low watermark)")
	return cmd
}

func evictions(p *printer, list []cache.Eviction) {
	if len(list) == 0 {
		return
	}
	t := p.table("WHAT", "KIND", "SIZE", "LAST USED")
	for _, e := range list {
		what := e.File
		switch {
		case e.Record != nil:
			what = recordRef(*e.Record)
		case e.Ref != "":
			what = e.Ref
		}
		t.row(what, e.Kind, bytesText(e.Bytes), ageText(e.Used))
	}
	t.flush()
}

func showPlan(w io.Writer, plan cache.Plan) error {
	p := newPrinter(w)
	evictions(p, plan.Evict)
	if len(plan.Kept) > 0 {
		p.printf("\nKept:\n")
		t := p.table("IMAGE", "WHY", "SIZE", "LAST USED")
		for _, k := range plan.Kept {
			why := k.Why
			if k.By != "" {
				why += " by " + k.By
			}
			t.row(recordRef(k.Record), why, bytesText(k.Bytes), ageText(k.Used))
		}
		t.flush()
		p.printf("\n")
	}
	p.printf("%s are taken, and %s are to be: %s would be evicted, %s\n", bytesText(plan.Taken), bytesText(plan.Target), count(len(plan.Evict), "thing"), bytesText(plan.Frees))
	notEnough(p, plan)
	return p.err
}

func notEnough(p *printer, plan cache.Plan) {
	if plan.Enough {
		return
	}
	p.printf("That is not enough: the rest is kept.\n")
	var whys []string
	for why := range plan.Sums {
		whys = append(whys, why)
	}
	slices.Sort(whys)
	for _, why := range whys {
		p.printf("  %-10s %s\n", why, bytesText(plan.Sums[why]))
	}
}

func showFreed(w io.Writer, plan cache.Plan, freed cache.Freed) error {
	p := newPrinter(w)
	evictions(p, freed.Evicted)
	p.printf("%s evicted, %s\n", count(freed.Count, "thing"), bytesText(freed.Bytes))
	notEnough(p, plan)
	return p.err
}

func newPin(o *options, pinned bool) *cobra.Command {
	use, short := "pin", "Keep an image from being evicted"
	if !pinned {
		use, short = "unpin", "Let an image be evicted again"
	}
	return &cobra.Command{
		Use:   use + " IMAGE-ID|DIGEST",
		Short: short,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withStore(func(store admin.Store) error {
				rec, err := findImage(store, args[0])
				if err != nil {
					return err
				}
				if err := store.Pin(cmd.Context(), rec.Digest, pinned); err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %sned now\n", recordRef(rec), use)
				return err
			})
		},
	}
}

func newUsage(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "usage",
		Short: "Show how much space the store takes, and may take",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withStore(func(store admin.Store) error {
				u, err := store.Usage()
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), u)
				}
				return showUsage(cmd.OutOrStdout(), u)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func showUsage(w io.Writer, u cache.Usage) error {
	p := newPrinter(w)
	p.printf("images       %d, %d of them quarantined\n", u.Images, u.Quarantined)
	for _, part := range []struct {
		name  string
		bytes int64
	}{
		{"blobs", u.Blobs}, {"sidecars", u.Sidecars}, {"index", u.Index}, {"arriving", u.Partials}, {"spools", u.Spools}, {"quarantine", u.Quarantine}, {"names", u.Names},
		{"directories", u.Directories}, {"open", u.Open},
	} {
		p.printf("%-12s %s\n", part.name, bytesText(part.bytes))
	}
	p.printf("together     %s, and %s promised to what is arriving; %s are pinned\n", bytesText(u.Total()), bytesText(u.Promised), bytesText(u.Pinned))
	limit := "no limit of its own"
	if u.Room.MaxSize > 0 {
		limit = "at most " + bytesText(u.Room.MaxSize)
	}
	p.printf("may take     %s, and leaves %s of the file system free, of which %s are\n", limit, bytesText(u.Room.MinFree), bytesText(u.Room.Free))
	p.printf("evicts       above %d per cent of that, down to %d\n", u.Room.High, u.Room.Low)
	if s := u.Scrub; !s.Began.IsZero() {
		p.printf("scrubbed     %.0f per cent since %s; the round before that ended %s\n", 100*s.Position, timeText(s.Began), timeText(s.Finished))
	}
	return p.err
}
