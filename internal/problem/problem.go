// Package problem turns errors into what HTTP says of them.
package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/acproxy/acproxy"
)

// Type begins the type of every problem; the error's code ends it.
const Type = "urn:acproxy:problem:"

// ContentType is the media type of a [Problem] (RFC 9457, section 3).
const ContentType = "application/problem+json"

// Problem is the body of an error (RFC 9457).
type Problem struct {
	Type   string        `json:"type"`             // [Type] and the error's code, or about:blank
	Title  string        `json:"title"`            // the status and the kind of failure in words
	Status int           `json:"status"`           // as in the head of the answer
	Detail string        `json:"detail,omitempty"` // what was wrong, where, and what to do
	Trace  acproxy.Trace `json:"trace,omitempty"`  // what was tried, in order
}

// withStatus is an error with a status of its own.
type withStatus struct {
	status int
	error
}

// Unwrap returns the error without the status.
func (e *withStatus) Unwrap() error { return e.error }

// WithStatus returns an error that is answered with a status that its kind doesn't have.
func WithStatus(status int, err error) error { return &withStatus{status, err} }

// StatusOf returns the status that stands for an error.
func StatusOf(err error) int {
	var s *withStatus
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

// Of returns what is said of an error.
func Of(err error) Problem {
	p := Problem{Status: StatusOf(err), Detail: err.Error()}
	p.Title = http.StatusText(p.Status)
	p.Type = "about:blank"
	if code := acproxy.Code(err); code != "" {
		p.Type = Type + code
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

// kinds are the kinds of failure by the statuses that stand for them alone.
var kinds = []error{
	acproxy.ErrInvalid, acproxy.ErrNotFound, acproxy.ErrRefused, acproxy.ErrPublisher, acproxy.ErrTimeout, acproxy.ErrNoSpace, acproxy.ErrBusy,
}

// Err returns the error that a problem stands for: with its kind, as far as the status tells, its code, detail and trace.
func (p Problem) Err() error {
	e := &acproxy.Error{Detail: p.Detail, Trace: p.Trace}
	if code, ok := strings.CutPrefix(p.Type, Type); ok {
		e.Code = code
	}
	for _, kind := range kinds {
		if StatusOf(kind) == p.Status {
			e.Kind = kind
		}
	}
	if e.Detail == "" {
		e.Detail = p.Title
	}
	return e
}

// JSON returns the problem as it is sent.
func (p Problem) JSON() []byte {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		// A Problem is strings and numbers; there is nothing in it that JSON can't say.
		return []byte(`{"type":"about:blank","status":500}`)
	}
	return append(b, '\n')
}

// Text returns the problem for people.
func (p Problem) Text() string {
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
