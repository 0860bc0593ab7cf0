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
	"github.com/acproxy/acproxy/discovery"
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
			shown, err := newCredentials(cfg, slog.Default())
			if err != nil {
				return err
			}
			client, err := newWeb(cfg, "", shown)
			if err != nil {
				return err
			}
			defer client.Close()
			finder := newFinder(cfg, client)
			found, err := discoverAll(cmd.Context(), finder, ref)
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), found), silent(err), finder.Close())
			}
			return errors.Join(found.print(cmd.OutOrStdout()), err, finder.Close())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// discovered is what acproxy discover prints.
type discovered struct {
	Ref       acproxy.Ref   `json:"ref"`
	Endpoints []endpoint    `json:"endpoints"`
	Keys      []string      `json:"keys"`
	Trace     acproxy.Trace `json:"trace"`
	Error     string        `json:"error,omitempty"`
}

type endpoint struct {
	Template  discovery.Template `json:"template"`
	Image     string             `json:"image,omitempty"`
	Signature string             `json:"signature,omitempty"`
	Error     string             `json:"error,omitempty"` // why the template can't be used for this ref
}

// discoverAll walks for templates and for keys. What was found is returned with an error, too.
func discoverAll(ctx context.Context, finder *discovery.Finder, ref acproxy.Ref) (discovered, error) {
	out := discovered{Ref: ref, Endpoints: []endpoint{}, Keys: []string{}}
	found, err := finder.Templates(ctx, ref.Name())
	out.Trace = append(out.Trace, traceOf(found.Trace, err)...)
	usable := 0
	for _, t := range found.Templates {
		e := endpoint{Template: t}
		image, imageErr := t.Expand(ref, discovery.ExtImage)
		signature, signatureErr := t.Expand(ref, discovery.ExtSignature)
		if err := errors.Join(imageErr, signatureErr); err != nil {
			e.Error = firstOf(imageErr, signatureErr).Error()
		} else {
			e.Image, e.Signature = image, signature
			usable++
		}
		out.Endpoints = append(out.Endpoints, e)
	}
	if err == nil && usable == 0 {
		err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: fmt.Sprintf("none of the publisher's templates can be filled in with the labels of %v", ref)}
	}
	keys, keysErr := finder.Keys(ctx, ref.Name())
	out.Trace = append(out.Trace, traceOf(keys.Trace, keysErr)...)
	out.Keys = append(out.Keys, keys.Keys...)
	// A publisher without keys is no failure of discovery: they may have come another way.
	if err == nil && !errors.Is(keysErr, acproxy.ErrNotFound) {
		err = keysErr
	}
	if err != nil {
		out.Error = err.Error()
	}
	return out, withoutTrace(err)
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func traceOf(trace acproxy.Trace, err error) acproxy.Trace {
	var e *acproxy.Error
	if len(trace) == 0 && errors.As(err, &e) {
		return e.Trace
	}
	return trace
}

// withoutTrace drops the trace from an error that is printed below it anyway.
func withoutTrace(err error) error {
	var e *acproxy.Error
	if !errors.As(err, &e) {
		return err
	}
	plain := *e
	plain.Trace = nil
	return &plain
}

func (d discovered) print(w io.Writer) error {
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
