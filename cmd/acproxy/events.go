package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/journal"
)

// server returns a client of the server that runs on the data directory. why says what only that can do.
func (o *options) server(why string) (*admin.Client, error) {
	cfg, err := o.load()
	if err != nil {
		return nil, err
	}
	client, err := admin.Dial(cfg.Admin.Socket)
	if errors.Is(err, acproxy.ErrNotFound) {
		return nil, fmt.Errorf("%s: %w", why, err)
	}
	return client, err
}

func newEvents(o *options) *cobra.Command {
	var asJSON, follow bool
	var limit int
	var kinds []string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what has happened lately, and what happens",
		Long: `events shows the last decisions about images (accepted, refused, quarantined, restored, inspected, passed, published, evicted, damaged), what operators did (pinned, unpinned,
deleted), lists that were fetched ahead (warmed) and what happened to the server (started, reloaded, reload-failed, keys-changed, publisher-down, publisher-up), the oldest first. All decisions since the first day are in the audit
file, unless it was rotated.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.server("only a running server knows what has happened; what it decided is in its audit file, too")
			if err != nil {
				return err
			}
			if limit < 0 || limit > 1000 {
				return usagef("--last %d: it is a number from 0 to 1000", limit)
			}
			events, after := []journal.Event{}, int64(-1)
			if limit > 0 {
				if events, err = client.Events(limit, kinds...); err != nil {
					return err
				}
			}
			slices.Reverse(events)
			w := cmd.OutOrStdout()
			for _, e := range events {
				if err := printEvent(w, e, asJSON); err != nil {
					return err
				}
				after = e.ID
			}
			if !follow {
				return nil
			}
			err = client.WatchEvents(cmd.Context(), after, func(e journal.Event) error {
				if len(kinds) > 0 && !slices.Contains(kinds, e.Event) {
					return nil
				}
				return printEvent(w, e, asJSON)
			})
			return notStopped(cmd, err)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens, until interrupted")
	cmd.Flags().IntVarP(&limit, "last", "n", 50, "how many of the last events are shown first, up to 1000")
	cmd.Flags().StringSliceVar(&kinds, "kind", nil, "only events of these kinds, such as refused,quarantined")
	return cmd
}

// notStopped returns an error unless it is that the user has stopped watching.
func notStopped(cmd *cobra.Command, err error) error {
	if err != nil && cmd.Context().Err() != nil {
		return nil
	}
	return err
}

func printEvent(w io.Writer, e journal.Event, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(e)
	}
	what := ""
	if !e.Ref.IsZero() {
		what = e.Ref.String()
	}
	by := ""
	if e.Client != "" {
		by = "by " + e.Client
	}
	outcome := e.Outcome
	if outcome == e.Event {
		outcome = ""
	}
	_, err := fmt.Fprintf(w, "%s  %-14s  %s\n", timeText(e.Time), e.Event, joinNonEmpty("  ", what, outcome, by, e.Detail))
	return err
}

func newFlights(o *options) *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "flights",
		Short: "Show what is being fetched, and how far it has come",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.server("only a running server fetches")
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if !watch {
				flights, err := client.Flights()
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(w, flights)
				}
				return printFlights(w, flights)
			}
			clear := ""
			if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && !asJSON {
				clear = "\x1b[H\x1b[2J" // to the top, and all of it empty
			}
			return notStopped(cmd, client.WatchFlights(cmd.Context(), func(flights []fetch.FlightState) error {
				if asJSON {
					return json.NewEncoder(w).Encode(flights)
				}
				if _, err := io.WriteString(w, clear); err != nil {
					return err
				}
				return printFlights(w, flights)
			}))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, with --watch an array in each line")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever it changes, until interrupted")
	return cmd
}

func printFlights(w io.Writer, flights []fetch.FlightState) error {
	p := newPrinter(w)
	if len(flights) > 0 {
		t := p.table("IMAGE", "PHASE", "RECEIVED", "OF", "FOR", "ASKED BY", "SOURCE")
		for _, fl := range flights {
			size, received := "-", "-"
			if fl.Size > 0 {
				size = bytesText(fl.Size)
			}
			if fl.Source != "" {
				received = bytesText(fl.Received)
			}
			phase := fl.Phase
			if fl.Refresh {
				phase += " (refresh)"
			}
			t.row(fl.Ref.String(), phase, received, size, seconds(time.Since(fl.Began)), fl.Client, fl.Source)
		}
		t.flush()
	}
	p.printf("%s\n", count(len(flights), "flight"))
	return p.err
}

func newConfig(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "config",
		Short: "Print the configuration that counts, with all defaults filled in",
		Long: `config prints the configuration of the server that runs on the data directory, or, when none does, the one that would count for the next. Passwords in URLs are
replaced by xxxxx.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			var text []byte
			if server, dialErr := admin.Dial(cfg.Admin.Socket); dialErr == nil {
				text, err = server.Config()
			} else {
				text, err = cfg.YAML()
			}
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
}
