package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// printer writes text and remembers the first error, so that a full disk under a redirected listing fails the command.
type printer struct {
	w   io.Writer
	err error
}

func newPrinter(w io.Writer) *printer { return &printer{w: w} }

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// table is columns under a heading.
type table struct {
	p *printer
	w *tabwriter.Writer
}

func (p *printer) table(heading ...string) *table {
	t := &table{p, tabwriter.NewWriter(p.w, 0, 0, 2, ' ', 0)}
	t.row(heading...)
	return t
}

func (t *table) row(cells ...string) {
	if t.p.err == nil {
		_, t.p.err = fmt.Fprintln(t.w, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
	}
}

func (t *table) flush() {
	if t.p.err == nil {
		t.p.err = t.w.Flush()
	}
}

func printJSON(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}

// silentError fails a command whose output has said why already.
type silentError struct{ error }

// Unwrap returns the cause.
func (e *silentError) Unwrap() error { return e.error }

// silent returns an error that only sets the exit code.
func silent(err error) error {
	if err == nil {
		return nil
	}
	return &silentError{err}
}

func isSilent(err error) bool {
	var s *silentError
	return errors.As(err, &s)
}

func joinNonEmpty(sep string, parts ...string) string {
	var out []string
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return strings.Join(out, sep)
}

// bytesText prints a number of bytes for people.
func bytesText(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, suffix := float64(n)/unit, "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if v < unit {
			break
		}
		v, suffix = v/unit, next
	}
	return fmt.Sprintf("%.1f %s", v, suffix)
}
