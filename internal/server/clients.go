package server

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
)

// Defaults of a [Patience].
const (
	DefaultHeaderTimeout = 10 * time.Second
	DefaultIdleTimeout   = 2 * time.Minute
	DefaultStallTimeout  = 5 * time.Minute
)

// maxHeaderBytes is how long the head of a request may be.
const maxHeaderBytes = 64 << 10

// Patience is how long clients may keep a connection, and what it takes, without doing anything with it. A field that is 0 means the default.
type Patience struct {
	Header time.Duration // for the head of a request, and for the TLS handshake before the first
	Idle   time.Duration // until the next request
	// Stall is for how long a client may take nothing of what waits for it. On Linux the kernel watches over connections; elsewhere only what
	// HTTP/2 does within a connection is seen.
	Stall time.Duration
}

func (p Patience) withDefaults() Patience {
	or := func(d, fallback time.Duration) time.Duration {
		if d == 0 {
			return fallback
		}
		return d
	}
	return Patience{Header: or(p.Header, DefaultHeaderTimeout), Idle: or(p.Idle, DefaultIdleTimeout), Stall: or(p.Stall, DefaultStallTimeout)}
}

// Admit returns a listener whose clients are within the server's limits. A TCP connection whose client takes nothing for longer than the server's patience
// is closed. early says that there may be connections already.
func (s *Server) Admit(l net.Listener, early bool) (net.Listener, error) {
	if tcp, ok := l.(*net.TCPListener); ok {
		// A socket of Multipath TCP, which somebody else may have opened, doesn't know how; most of its connections do.
		if err := cutStalled(tcp, s.cfg.Patience.Stall); err != nil && !early {
			return nil, err
		}
		if early {
			l = &earlyListener{tcp, s.cfg.Patience.Stall}
		}
	}
	return newLimitedListener(l, s.cfg.Limits), nil
}

// earlyListener is one with connections that are older than what was set on it.
type earlyListener struct {
	*net.TCPListener
	stall time.Duration
}

// Accept waits for a connection.
func (l *earlyListener) Accept() (net.Conn, error) {
	conn, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	if err := cutStalled(conn, l.stall); err != nil {
		// It is over already, which whoever reads from it finds out.
		return conn, nil //nolint:nilerr // this is about the connection, not about the listener
	}
	return conn, nil
}

// HTTP returns what serves a listener, within the server's patience.
func (s *Server) HTTP(front Front) *http.Server {
	p := s.cfg.Patience
	return &http.Server{Handler: s.Handler(front), ReadHeaderTimeout: p.Header, IdleTimeout: p.Idle, MaxHeaderBytes: maxHeaderBytes}
}

// TLS returns the configuration of TLS that all connections of nodes have in common. Old builds of rkt know TLS 1.2 at the most. Nearly all bytes are those
// of images, which are not worth sending in small records first.
func TLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, DynamicRecordSizingDisabled: true}
}

// patient has a handler answer within the patience for what the client does meanwhile.
func (s *Server) patient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			s.expectContent(w, r)
		}
		if r.ProtoMajor == 2 {
			stream := &streamWriter{ResponseWriter: w, stall: s.cfg.Patience.Stall}
			defer stream.finish()
			w = stream
		}
		next.ServeHTTP(w, r)
	})
}

// expectContent sees to it that the content of a request isn't waited for without end, which net/http would do before it answers, and that what follows
// it isn't taken for another request: where its length was said in two ways, that is what smugglers send (RFC 9112, section 6.3).
func (s *Server) expectContent(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	// A connection that has no deadlines isn't one of a client.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(s.cfg.Patience.Header))
}

// errContent refuses a request for its content, which means nothing with GET and HEAD (RFC 9110, section 9.3.1).
var errContent = &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "unexpected-content", Detail: "the request comes with content, and nothing here takes any"}

// streamWriter is the ResponseWriter of an HTTP/2 stream. The window of a stream is the client's: while it stays shut the stream waits, and the connection
// looks well. A write that takes longer than the patience ends the stream.
type streamWriter struct {
	http.ResponseWriter
	stall time.Duration
	timer *time.Timer // runs while something is written

	mu   sync.Mutex
	over bool // the handler returns, and with it the stream is no longer ours
}

// Unwrap lets [http.ResponseController] reach the stream.
func (w *streamWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write is the ResponseWriter's.
func (w *streamWriter) Write(p []byte) (int, error) {
	w.watch()
	defer w.timer.Stop()
	return w.ResponseWriter.Write(p)
}

// FlushError is the ResponseController's Flush.
func (w *streamWriter) FlushError() error {
	w.watch()
	defer w.timer.Stop()
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// watch ends the stream after the patience, unless the timer is stopped before.
func (w *streamWriter) watch() {
	if w.timer != nil {
		w.timer.Reset(w.stall)
		return
	}
	w.timer = time.AfterFunc(w.stall, func() { w.end(time.Now(), false) })
}

// finish sees to it that what is written after the handler has returned has its time as well.
func (w *streamWriter) finish() { w.end(time.Now().Add(w.stall), true) }

// end sets when writing fails.
func (w *streamWriter) end(at time.Time, over bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		// It fails if the stream has ended, which is as well.
		_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(at)
	}
	w.over = w.over || over
}

// patientBody is the content of a request that is passed on: each part of it has to come within a time.
type patientBody struct {
	io.ReadCloser
	conn *http.ResponseController
	wait time.Duration
}

// Read is the body's. The deadline must not outlast it: it would count for the connection as a whole.
func (b *patientBody) Read(p []byte) (int, error) {
	// Where there is none to be set, the connection's end will do.
	_ = b.conn.SetReadDeadline(time.Now().Add(b.wait))
	n, err := b.ReadCloser.Read(p)
	_ = b.conn.SetReadDeadline(time.Time{})
	return n, err
}
