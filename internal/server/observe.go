package server

import (
	"context"
	"crypto/rand"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// observed is what the access line says about a request besides what HTTP does. It belongs to the request's goroutine.
type observed struct {
	id     string
	ref    string
	status int // of a connection that was taken over, which the recorder doesn't see
	err    error
}

type observedKey struct{}

// note records how a request failed for its access line.
func note(r *http.Request, err error) {
	if o, ok := r.Context().Value(observedKey{}).(*observed); ok {
		o.err = err
	}
}

// noteTakenOver records that a connection was taken over after a 200.
func noteTakenOver(r *http.Request) {
	if o, ok := r.Context().Value(observedKey{}).(*observed); ok {
		o.status = http.StatusOK
	}
}

// noteRef records what a request asked for.
func noteRef(r *http.Request, ref string) {
	if o, ok := r.Context().Value(observedKey{}).(*observed); ok {
		o.ref = ref
	}
}

// observe gives every request an ID, refuses loops and writes one access line.
func (s *Server) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started := s.now()
		o := &observed{id: requestID(r)}
		r = r.WithContext(context.WithValue(r.Context(), observedKey{}, o))
		rec := &recorder{ResponseWriter: w}
		rec.Header().Set("X-Request-Id", o.id)
		if s.cfg.AccessLog {
			defer func() { s.access(r, rec, o, s.now().Sub(started)) }()
		}
		if s.cfg.Via != "" && strings.Contains(strings.Join(r.Header.Values("Via"), ","), s.cfg.Via) {
			s.fail(rec, r, &statusError{http.StatusLoopDetected, &acproxy.Error{
				Kind: acproxy.ErrPublisher, Code: "loop",
				Detail: "this proxy was asked by itself: the name " + r.Host + " resolves to it here too; set dial.hosts or dial.resolver in its configuration so that it finds the publisher",
			}})
			return
		}
		next.ServeHTTP(rec, r)
	})
}

func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if len(id) == 0 || len(id) > 64 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return rand.Text()
	}
	return id
}

func (s *Server) access(r *http.Request, rec *recorder, o *observed, took time.Duration) {
	if o.status != 0 {
		rec.status = o.status
	}
	attrs := []any{
		"id", o.id, "client", client(r), "method", r.Method, "host", r.Host, "path", r.URL.RequestURI(), "proto", r.Proto,
		"status", rec.status, "bytes", rec.bytes, "took", took, "cache", rec.Header().Get("Cache-Status"),
	}
	if o.ref != "" {
		attrs = append(attrs, "ref", o.ref)
	}
	if o.err != nil {
		attrs = append(attrs, "err", o.err)
	}
	s.log.Info("request", attrs...)
}

// recorder sees the status and the bytes of a response go by.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

// Unwrap lets [http.ResponseController] reach the connection.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader is the ResponseWriter's.
func (w *recorder) WriteHeader(status int) {
	if w.status == 0 || w.status < 200 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write is the ResponseWriter's.
func (w *recorder) Write(p []byte) (int, error) {
	w.ok()
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// ReadFrom keeps sendfile possible: the connection under a plain HTTP response copies from a file inside the kernel.
func (w *recorder) ReadFrom(src io.Reader) (int64, error) {
	w.ok()
	n, err := io.Copy(w.ResponseWriter, src)
	w.bytes += n
	return n, err
}

func (w *recorder) ok() {
	if w.status == 0 {
		w.status = http.StatusOK
	}
}
