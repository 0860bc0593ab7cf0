package web

import (
	"errors"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
)

// roundTrip asks, and asks once more where a connection that was used before broke without a byte of the answer: what broke it may have come for somebody
// else, as with HTTP/2 all requests to a host share a connection, and one answer that breaks the rules ends all of them. The second time has a
// connection of its own, because it may be this request whose answer breaks them. net/http does the same by itself over HTTP/1.1.
func (r *route) roundTrip(req *http.Request) (*http.Response, error) {
	var used, begun atomic.Bool
	watched := httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotConn:              func(info httptrace.GotConnInfo) { used.Store(info.Reused) },
		GotFirstResponseByte: func() { begun.Store(true) },
	})
	resp, err := r.transport.RoundTrip(req.WithContext(watched))
	if err == nil || !used.Load() || begun.Load() || req.Context().Err() != nil || errors.As(err, new(streamError)) {
		return resp, err
	}
	return r.alone.RoundTrip(req)
}

// streamError is what net/http's error about one HTTP/2 stream can be read as: the connection is well, and the answer was a refusal.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (e streamError) Error() string { return "stream error" }
