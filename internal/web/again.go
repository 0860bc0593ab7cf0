package web

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
)

// roundTrip asks, and asks once more where a connection that was used before broke without a byte of the answer: what broke it may have come for somebody
// else, as with HTTP/2 all requests to a host share a connection, and one answer that breaks the rules ends all of them. The second time has a
// connection of its own, because it may be this request whose answer breaks them. net/http does the same by itself over HTTP/1.1.
func (r *route) roundTrip(req *http.Request) (*http.Response, error) {
	var used, begun atomic.Bool
	shaking := new(handshake)
	watched := httptrace.WithClientTrace(withHandshake(req, shaking), &httptrace.ClientTrace{
		TLSHandshakeDone:     func(tls.ConnectionState, error) { shaking.done() },
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

// A handshake ends with its request. http.Transport has dials and handshakes outlive theirs, for whoever asks next; a publisher that accepts connections
// and says nothing would so have many more of them from us than there are requests.
type handshake struct {
	request context.Context

	mu   sync.Mutex
	over bool
	stop []func() bool
}

type handshakeKey struct{}

// withHandshake returns the context of a request, with its handshake if there will be one.
func withHandshake(req *http.Request, h *handshake) context.Context {
	h.request = req.Context()
	if req.URL.Scheme != "https" {
		return h.request
	}
	return context.WithValue(h.request, handshakeKey{}, h)
}

// shake closes a connection that was dialled for a request if that ends before its handshake.
func shake(ctx context.Context, conn net.Conn) {
	h, ok := ctx.Value(handshakeKey{}).(*handshake)
	if !ok {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.over {
		h.stop = append(h.stop, context.AfterFunc(h.request, func() { _ = conn.Close() }))
	}
}

// done leaves connections to whoever uses them.
func (h *handshake) done() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.over = true
	for _, stop := range h.stop {
		stop()
	}
}
