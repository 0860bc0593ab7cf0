package web

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strings"
	"syscall"

	"github.com/acproxy/acproxy"
)

// A dialError is why no connection was made.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// Unreachable reports whether an error of Get means that nobody could be connected to, so that nothing was asked and nothing answered. It
// is false for addresses that the dial rules forbid, and once a connection was made, whatever happened on it.
func Unreachable(err error) bool {
	var dial *dialError
	return errors.As(err, &dial) && !errors.Is(err, acproxy.ErrRefused)
}

// explain turns an error of the network into one that says whose fault it was, and notes it in the last attempt of the trace.
func (a *asking) explain(err error, doing string) error {
	last := &a.trace[len(a.trace)-1]
	cause := context.Cause(a.ctx)
	ours := errors.Is(cause, errSlow) || errors.Is(cause, errStalled)
	if ctxErr := a.ctx.Err(); ctxErr != nil && !ours {
		last.Err = ctxErr.Error()
		if cause == nil || errors.Is(cause, ctxErr) {
			return fmt.Errorf("%s: %w", doing, ctxErr)
		}
		return fmt.Errorf("%s: %w: %w", doing, ctxErr, cause)
	}
	var refused *acproxy.Error
	var network net.Error
	switch {
	case errors.As(err, &refused):
		e := *refused
		last.Err = e.Detail
		e.Trace = slices.Clone(a.trace)
		return &e
	case errors.Is(cause, errSlow):
		detail := fmt.Sprintf("no answer within %v", a.route.rule.Timeout)
		last.Err = detail
		return a.fail(acproxy.ErrTimeout, "publisher-timeout", doing+": "+detail, nil)
	case errors.Is(cause, errStalled):
		detail := fmt.Sprintf("not %d bytes within %v", leastRead, a.route.settings.cfg.StallTimeout)
		last.Err = detail
		return a.fail(acproxy.ErrTimeout, "publisher-timeout", doing+": "+detail, nil)
	case lostPing(err), errors.As(err, &network) && network.Timeout():
		last.Err = err.Error()
		return a.fail(acproxy.ErrTimeout, "publisher-timeout", doing, err)
	}
	last.Err = err.Error()
	if acproxy.Shortage(err) {
		// It is no fault of the publisher's.
		return &acproxy.Error{Kind: acproxy.ErrBusy, Code: acproxy.CodeShortage, Detail: doing, Trace: slices.Clone(a.trace), RetryAfter: busyRetry, Err: err}
	}
	return a.fail(acproxy.ErrPublisher, code(err), doing, err)
}

// lostPing reports whether an HTTP/2 connection was given up because it brought nothing for a time, not even the answer to a ping (see
// http.HTTP2Config). The standard library gives this no type.
func lostPing(err error) bool {
	return strings.Contains(err.Error(), "http2: client connection lost")
}

// code returns the stable word for an error of the network.
func code(err error) string {
	var (
		dial      *dialError
		record    tls.RecordHeaderError
		alert     tls.AlertError
		verify    *tls.CertificateVerificationError
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		invalid   x509.CertificateInvalidError
	)
	switch {
	case errors.As(err, &dial):
		return "publisher-unreachable"
	case errors.As(err, &record), errors.As(err, &alert), errors.As(err, &verify), errors.As(err, &authority), errors.As(err, &host), errors.As(err, &invalid):
		return "publisher-tls"
	// The standard library gives some of the handshake's failures no type.
	case strings.Contains(err.Error(), "tls: "), strings.Contains(err.Error(), "HTTP response to HTTPS client"):
		return "publisher-tls"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "publisher-cut"
	}
	return "publisher-protocol"
}

// parseReason returns why url.Parse failed. The error quotes the URL, or a part of it, which is left out if it may hold a password.
func parseReason(rawURL string, err error) string {
	if parse, ok := errors.AsType[*url.Error](err); ok {
		err = parse.Err
	}
	if strings.Contains(rawURL, "@") {
		return "its host, port or escapes can't be read"
	}
	return err.Error()
}

// secretParameters are words that mark a query parameter as a credential: those of presigned URLs at Amazon, Google and Azure among them.
var secretParameters = []string{"signature", "token", "credential", "password", "secret", "accessid", "accesskey", "apikey", "api_key", "auth"}

// Redacted returns a URL as it may be shown to anybody: without user name and password, and with the values of query parameters that look
// like credentials replaced by an ellipsis.
func Redacted(rawURL string) string {
	const most = 2048
	rawURL, _, _ = strings.Cut(rawURL, "#")
	head, query, queried := strings.Cut(rawURL, "?")
	// Done on the text, so that it holds for what is not a URL too.
	scheme, rest, absolute := strings.Cut(head, "//")
	if absolute = absolute && (scheme == "" || strings.HasSuffix(scheme, ":")); !absolute {
		scheme, rest = "", head
	}
	if _, err := url.Parse(rawURL); err != nil {
		// Nobody can say where the authority of this ends: a password may hold a slash.
		rest = rest[strings.LastIndexByte(rest, '@')+1:]
	}
	authority, path, hasPath := strings.Cut(rest, "/")
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		authority = authority[at+1:]
	}
	shown := authority
	if absolute {
		shown = scheme + "//" + shown
	}
	if hasPath {
		shown += "/" + path
	}
	if queried {
		pairs := strings.Split(query, "&")
		for i, pair := range pairs {
			if parameter, _, ok := strings.Cut(pair, "="); ok && isSecret(parameter) {
				pairs[i] = parameter + "=…"
			}
		}
		shown += "?" + strings.Join(pairs, "&")
	}
	if len(shown) > most {
		shown = strings.ToValidUTF8(shown[:most], "") + "…"
	}
	return shown
}

func isSecret(parameter string) bool {
	if p, err := url.QueryUnescape(parameter); err == nil {
		parameter = p
	}
	parameter = strings.ToLower(parameter)
	return parameter == "sig" || parameter == "key" || slices.ContainsFunc(secretParameters, func(word string) bool { return strings.Contains(parameter, word) })
}
