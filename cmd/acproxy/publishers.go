package main

import (
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/web"
)

func newPublishers(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "publishers",
		Short: "List the publishers' hosts that the running server asked lately, and which of them are down",
		Long: `publishers lists the hosts that the running server asked in the last ten minutes, with the requests in progress and those that wait for their
turn. A host that is down, or that asked to be left alone, isn't asked for a while: requests for images that aren't held fail at once, those that are
held are served as ever.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.server("only a running server knows how things are with publishers")
			if err != nil {
				return err
			}
			hosts, err := client.Publishers()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), hosts)
			}
			return listPublishers(cmd.OutOrStdout(), hosts, time.Now())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func listPublishers(w io.Writer, hosts []web.HostState, now time.Time) error {
	p := newPrinter(w)
	if len(hosts) > 0 {
		t := p.table("HOST", "REQUESTS", "FAILED", "LATENCY", "IN PROGRESS", "WAITING", "STATE", "LAST FAILURE")
		for _, h := range hosts {
			row := func(cells ...string) {
				latency := "-"
				if h.Latency > 0 {
					latency = tookText(time.Duration(h.Latency * float64(time.Second)))
				}
				numbers := []string{h.Host, strconv.FormatInt(h.Requests, 10), strconv.FormatInt(h.Failures, 10), latency, strconv.Itoa(h.InProgress), strconv.Itoa(h.Waiting)}
				t.row(append(numbers, cells...)...)
			}
			if h.RestingUntil.IsZero() && len(h.Breakers) == 0 {
				row("ok")
			}
			if !h.RestingUntil.IsZero() {
				row("left alone for "+leftText(h.RestingUntil, now)+", as it wants", "it answered "+h.RestingWhy)
			}
			for _, b := range h.Breakers {
				row(breakerText(b, now), b.LastError)
			}
		}
		t.flush()
	}
	p.printf("%s\n", count(len(hosts), "host"))
	return p.err
}

// breakerText says how things are with a host, for a person.
func breakerText(b web.BreakerState, now time.Time) string {
	state := count(b.Failures, "failure") + " in a row"
	switch b.State {
	case web.BreakerOpen:
		state = "down since " + timeText(b.Since) + ", asked again in " + leftText(b.Until, now)
	case web.BreakerHalfOpen:
		state = "down since " + timeText(b.Since) + ", the next request finds out whether it is back"
	}
	if b.Prefix != "" {
		state = "for " + b.Prefix + ": " + state
	}
	return state
}

// leftText returns how long it is until a time, in whole seconds.
func leftText(until, now time.Time) string {
	return max(until.Sub(now).Round(time.Second), time.Second).String()
}
