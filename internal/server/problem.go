package server

import (
	"errors"
	"html"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/problem"
)

// fail writes an error as the response. It is the only place that does.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if left(r) {
		panic(http.ErrAbortHandler)
	}
	if acproxy.Shortage(err) && acproxy.KindOf(err) == nil {
		s.log.Error("request failed", "host", r.Host, "path", r.URL.EscapedPath(), "err", err)
		err = &acproxy.Error{
			Kind: acproxy.ErrBusy, Code: acproxy.CodeShortage, RetryAfter: time.Second, Trace: problem.Of(err).Trace,
			Detail: "this proxy has run out of descriptors, or of something else that it needs of its machine; its log says of what. See LimitNOFILE and clients.max_connections",
		}
	}
	p := problem.Of(err)
	if p.Status == http.StatusInternalServerError {
		// What is wrong inside is for the log, not for strangers.
		s.log.Error("request failed", "host", r.Host, "path", r.URL.EscapedPath(), "err", err)
		p.Detail = "something is wrong inside this proxy; its log says what"
	}
	note(w, err)
	h := w.Header()
	for _, name := range []string{"Content-Length", "Content-Range", "ETag", "Last-Modified", "Repr-Digest", "Accept-Ranges", "Docker-Content-Digest"} {
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
	if s.isOCI(r, nil) && !toProxy(r) {
		o, _ := readOCI(r)
		h.Set("Content-Type", "application/json")
		s.answer(w, r, p.Status, ociProblem(o.kind, p))
		return
	}
	switch preferred(r.Header.Get("Accept")) {
	case "text/html":
		h.Set("Content-Type", "text/html; charset=utf-8")
		body = []byte("<!doctype html><meta charset=utf-8><title>" + html.EscapeString(p.Title) + "</title><pre>" + html.EscapeString(p.Text()) + "</pre>\n")
	case "text/plain":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		body = []byte(p.Text())
	default:
		h.Set("Content-Type", problem.ContentType)
		body = p.JSON()
	}
	s.answer(w, r, p.Status, body)
}

// answer sends what is short.
func (*Server) answer(w http.ResponseWriter, r *http.Request, status int, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, err := w.Write(body)
		_ = gone(err)
	}
}

// preferred returns which form of an error an Accept header asks for: "text/html", "text/plain" or "application/problem+json". Programs that
// don't say get the last (RFC 9110 §12.5.1).
func preferred(accept string) string {
	offers := []string{problem.ContentType, "text/html", "text/plain"}
	best, bestQ := problem.ContentType, 0.0
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
			if media != problem.ContentType {
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
