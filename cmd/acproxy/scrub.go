package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
)

func newScrub(o *options) *cobra.Command {
	var asJSON bool
	var rate string
	cmd := &cobra.Command{
		Use:   "scrub",
		Short: "Read all images now, and repair what is damaged",
		Long: `scrub reads every held image and checks its bytes, its image ID and what is known of it. What is damaged is moved to the quarantine directory, and
the server fetches it again from its publisher, if it can. The server does the same by itself, little by little (scrub.every, scrub.rate).

It works on a running server, or on the store itself when none runs. Ctrl-C ends it; what was found by then is repaired.
The exit code is 1 if something was found.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			bytes, err := rateOf(rate)
			if err != nil {
				return err
			}
			return o.withStore(func(store admin.Store) error {
				out := newFindings(cmd.OutOrStdout(), cmd.ErrOrStderr(), "scrubbing", asJSON)
				sum, err := store.Scrub(cmd.Context(), cache.ScrubOptions{Rate: bytes, Found: out.found, Progress: out.progress})
				return out.scrubbed(sum, err)
			})
		},
	}
	cmd.Flags().StringVar(&rate, "rate", "", "how much is read in a second at most, such as 20MiB (default: as much as can be)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line: each finding, then the sum")
	return cmd
}

func rateOf(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	size, err := config.ParseSize(text)
	if err != nil {
		return 0, usagef("--rate: %w", err)
	}
	return int64(size), nil
}

func newFsck(o *options) *cobra.Command {
	var asJSON, repair bool
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Check the store of a server that doesn't run",
		Long: `fsck checks everything in the store, which nobody may have open: the index, what is known of each image, the bytes and the image ID of each, and
whether there is anything that doesn't belong there. It prints what it finds, and what --repair would do about it, and changes nothing.

With --repair it does that. Nothing is deleted: what can't be used is moved to the quarantine directory. An image whose bytes are damaged is marked as
lost, and the server fetches it again.

The exit code is 0 if nothing is wrong, or nothing is left that is; 1 otherwise.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			out := newFindings(cmd.OutOrStdout(), cmd.ErrOrStderr(), "checking", asJSON)
			check := cache.CheckOptions{Repair: repair, Found: out.found, Progress: out.progress}
			if repair {
				check.Found, check.Repaired = out.noted, out.found
			}
			sum, err := cache.Check(cmd.Context(), storeDir(cfg), cache.Options{Log: slog.New(slog.DiscardHandler), Inspect: inspector(cfg)}, check)
			return out.checked(sum, repair, err)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what is found")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line: each finding, then the sum")
	return cmd
}

// findings prints what a scrub or a check finds, as it is found, and how far it has come.
type findings struct {
	out io.Writer
	enc *json.Encoder // nil if it is for people
	bar *progress
	err error
}

func newFindings(stdout, stderr io.Writer, what string, asJSON bool) *findings {
	f := &findings{out: stdout, bar: newProgress(stderr, what)}
	if asJSON {
		f.enc = json.NewEncoder(stdout)
	}
	return f
}

func (f *findings) progress(s cache.Scrubbed) { f.bar.set(s.Bytes, s.OfBytes) }

// found prints a finding.
func (f *findings) found(x cache.Finding) {
	if f.err != nil {
		return
	}
	if f.enc != nil {
		f.err = f.enc.Encode(struct {
			Finding cache.Finding `json:"finding"`
		}{x})
		return
	}
	kind, next := "problem", x.Repair
	if x.Note {
		kind = "note"
	}
	if x.Repaired {
		next = "done: " + next
	}
	what := x.Path
	if x.Image != "" {
		what += " (" + x.Image + ")"
	}
	_, f.err = fmt.Fprintf(f.bar.over(f.out), "%s: %s: %s: %s\n    %s\n", kind, x.Code, what, x.Detail, next)
}

// noted prints a finding where nothing is wrong. Problems come again, when something was done about them.
func (f *findings) noted(x cache.Finding) {
	if x.Note {
		f.found(x)
	}
}

// sum prints what it came to, and returns the error that the command ends with.
func (f *findings) sum(value any, s cache.Scrubbed, problems int64, err error, text string) error {
	f.bar.end()
	switch {
	case errors.Is(err, context.Canceled):
		err = fmt.Errorf("it was ended after %s of about %s", bytesText(s.Bytes), bytesText(s.OfBytes))
	case err == nil && problems > 0:
		err = silent(fmt.Errorf("%d problems", problems))
	}
	switch {
	case f.err != nil:
	case f.enc != nil:
		f.err = f.enc.Encode(value)
	default:
		_, f.err = fmt.Fprintf(f.out, "%s whole, %s read in %s; %s\n", count(int(s.Images), "image"), bytesText(s.Bytes), tookText(s.Took), text)
	}
	return errors.Join(err, f.err)
}

func (f *findings) scrubbed(s cache.Scrubbed, err error) error {
	text := count(int(s.Problems), "problem")
	if s.Known > 0 {
		text = fmt.Sprintf("%d lost before; %s", s.Known, text)
	}
	return f.sum(s, s, s.Problems, err, text)
}

func (f *findings) checked(s cache.Checked, repair bool, err error) error {
	left, text := s.Problems, count(int(s.Problems), "problem")+", "+count(int(s.Notes), "note")
	if repair {
		left = s.Left
		text += fmt.Sprintf("; %d repaired, %d left", s.Repaired, s.Left)
	}
	return f.sum(s, s.Scrubbed, left, err, text)
}
