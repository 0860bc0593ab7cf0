package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"

	"github.com/acproxy/acproxy"
)

// ProblemType begins the type of every problem; the error's code ends it.
const ProblemType = "urn:acproxy:problem:"

// Problem is the body of an error (RFC 9457).
type Problem struct {
	Type   string        `json:"type"`
	Title  string        `json:"title"`
	Status int           `json:"status"`
	Detail string        `json:"detail,omitempty"`
	Trace  acproxy.Trace `json:"trace,omitempty"` // what was tried, in order
}

// statusError is an error with a status of its own.
type statusError struct {
	status int
	error
}

// Unwrap returns the error without the status.
func (e *statusError) Unwrap() error { return e.error }

// statusOf maps the kinds of failure to HTTP.
func statusOf(err error) int {
	var s *statusError
	if errors.As(err, &s) {
		return s.status
	}
	switch acproxy.KindOf(err) {
	case acproxy.ErrInvalid:
		return http.StatusBadRequest
	case acproxy.ErrNotFound, acproxy.ErrOffline:
		return http.StatusNotFound
	case acproxy.ErrRefused:
		return http.StatusForbidden
	case acproxy.ErrPublisher:
		return http.StatusBadGateway
	case acproxy.ErrTimeout:
		return http.StatusGatewayTimeout
	case acproxy.ErrNoSpace:
		return http.StatusInsufficientStorage
	case acproxy.ErrBusy:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// fail writes an error as the response. It is the only place that does.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if left(r) {
		panic(http.ErrAbortHandler)
	}
	p := problemOf(err)
	if p.Status == http.StatusInternalServerError {
		// What is wrong inside is for the log, not for strangers.
		s.log.Error("request failed", "host", r.Host, "path", r.URL.EscapedPath(), "err", err)
		p.Detail = "something is wrong inside this proxy; its log says what"
	}
	note(w, err)
	h := w.Header()
	for _, name := range []string{"Content-Length", "Content-Range", "ETag", "Last-Modified", "Repr-Digest", "Accept-Ranges"} {
		h.Del(name)
	}
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Add("Vary", "Accept")
	var e *acproxy.Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(e.RetryAfter.Seconds()+0.999)))
	}
	var body []byte
	switch preferred(r.Header.Get("Accept")) {
	case "text/html":
		h.Set("Content-Type", "text/html; charset=utf-8")
		body = []byte("<!doctype html><meta charset=utf-8><title>" + html.EscapeString(p.Title) + "</title><pre>" + html.EscapeString(p.text()) + "</pre>\n")
	case "text/plain":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		body = []byte(p.text())
	default:
		h.Set("Content-Type", "application/problem+json")
		body = p.json()
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.Status)
	if r.Method != http.MethodHead {
		_, err := w.Write(body)
		_ = gone(err)
	}
}

func problemOf(err error) Problem {
	p := Problem{Status: statusOf(err), Detail: err.Error()}
	p.Title = http.StatusText(p.Status)
	p.Type = "about:blank"
	if code := acproxy.Code(err); code != "" {
		p.Type = ProblemType + code
	}
	if kind := acproxy.KindOf(err); kind != nil {
		p.Title += ": " + kind.Error()
	}
	var e *acproxy.Error
	if errors.As(err, &e) {
		p.Trace = e.Trace
	}
	return p
}

func (p Problem) json() []byte {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		// A Problem is strings and numbers; there is nothing in it that JSON can't say.
		return []byte(`{"type":"about:blank","status":500}`)
	}
	return append(b, '\n')
}

func (p Problem) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s\n\n%s\n", p.Status, p.Title, p.Detail)
	if len(p.Trace) > 0 {
		b.WriteString("\nWhat was tried:\n")
		for i, a := range p.Trace {
			fmt.Fprintf(&b, "%3d. %v\n", i+1, a)
		}
	}
	return b.String()
}

// preferred returns which form of an error an Accept header asks for: "text/html", "text/plain" or "application/problem+json". Programs that
// don't say get the last (RFC 9110 §12.5.1).
func preferred(accept string) string {
	const problem = "application/problem+json"
	offers := []string{problem, "text/html", "text/plain"}
	best, bestQ := problem, 0.0
	for _, offer := range offers {
		if q := quality(accept, offer); q > bestQ {
			best, bestQ = offer, q
		}
	}
	return best
}

// quality returns how much an Accept header wants a media type, from 0 to 1. The most specific range that fits counts.
func quality(accept, media string) float64 {
	if accept == "" {
		return 1
	}
	kind, _, _ := strings.Cut(media, "/")
	best, specificity := 0.0, -1
	for part := range strings.SplitSeq(accept, ",") {
		rng, params, _ := strings.Cut(part, ";")
		var s int
		switch strings.ToLower(strings.TrimSpace(rng)) {
		case media:
			s = 2
		case "application/json":
			// Whoever reads JSON reads a problem in JSON.
			if media != "application/problem+json" {
				continue
			}
			s = 2
		case kind + "/*":
			s = 1
		case "*/*":
			s = 0
		default:
			continue
		}
		if s < specificity {
			continue
		}
		q := 1.0
		for param := range strings.SplitSeq(params, ";") {
			if v, ok := strings.CutPrefix(strings.TrimSpace(param), "q="); ok {
				if parsed, err := strconv.ParseFloat(v, 64); err == nil {
					q = parsed
				}
			}
		}
		best, specificity = q, s
	}
	return best
}
