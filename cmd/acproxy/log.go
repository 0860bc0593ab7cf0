package main

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/server"
)

// logs are where a server says what it does: at once, or, for the lines of single requests, together with others a moment later. The lines stay in
// order.
type logs struct {
	*slog.Logger
	level  *slog.LevelVar
	access func(server.Access) // nil if requests get no lines
	out    *logWriter
}

// newLogs returns the logs as configured. Close writes what waits.
func newLogs(cfg config.Log, w io.Writer) (*logs, error) {
	out := &logWriter{buf: bufio.NewWriterSize(w, 64<<10)}
	level := new(slog.LevelVar)
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		return nil, err
	}
	log := newLogger(cfg, level, out)
	l := &logs{Logger: log, level: level, out: out}
	switch {
	case !cfg.Access:
	case cfg.AccessFlush == 0:
		l.access = newAccess(cfg, log, out, true)
	default:
		l.access = newAccess(cfg, log, out, false)
		ctx, cancel := context.WithCancel(context.Background())
		out.stop = cancel
		// Ends with stop; Close waits for it.
		out.flushing.Go(func() { out.flushEvery(ctx, time.Duration(cfg.AccessFlush)) })
	}
	return l, nil
}

// newLogger returns the log as configured.
func newLogger(cfg config.Log, level slog.Leveler, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if cfg.Format == config.LogJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// Close writes what waits. What is logged after that is written at once.
func (l *logs) Close() error { return l.out.Close() }

// A logWriter writes lines to a file, in the order in which they come.
type logWriter struct {
	mu  sync.Mutex
	buf *bufio.Writer

	stop     context.CancelFunc // nil if nothing ever waits
	flushing sync.WaitGroup
}

// Write writes a line, and all that wait before it.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.buf.Write(line)
	if err == nil {
		err = w.buf.Flush()
	}
	return n, err
}

func (w *logWriter) flushEvery(ctx context.Context, pause time.Duration) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			// Whoever can't write a log has nobody to tell.
			_ = w.flush()
		case <-ctx.Done():
			return
		}
	}
}

func (w *logWriter) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Flush()
}

// Close ends the flushing and writes what waits.
func (w *logWriter) Close() error {
	if w.stop != nil {
		w.stop()
		w.flushing.Wait()
	}
	return w.flush()
}

// lineOf writes the line of a request: at once, or with the next ones, after a moment at the latest.
func (w *logWriter) lineOf(a server.Access, line func([]byte, server.Access, time.Time) []byte, atOnce bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Where it is to stand, if it fits there. Whoever can't write a log has nobody to tell.
	_, err := w.buf.Write(line(w.buf.AvailableBuffer(), a, time.Now()))
	if err == nil && atOnce {
		_ = w.buf.Flush()
	}
}
