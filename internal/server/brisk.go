package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/memo"
)

// This file answers small, simple requests on plain connections without net/http: what a node's polling consists of, pages, signatures and "not modified".
// net/http takes four times as long for such a request as the answer does (docs/decisions/brisk.md).
//
//	connection ─▶ read ─▶ the same as a moment ago, and nothing has changed? ─▶ the same answer (replay.go) ─▶ one write ─▶ read …
//	                            │ no
//	                      simple, and small when last asked? ─▶ the same handlers ─▶ small again? ─▶ one write ─▶ read …
//	                            │ no                                                    │ no
//	                            └──────▶ net/http, which reads it all again ◀───────────┘ and keeps the connection
//
// Simple is what can be read in one way only: all of it came at once, with nothing behind it, its lines end in CR LF, and each of its fields is one of a few
// that are here once. Nobody guesses: anything else is for net/http.

const (
	// briskRequest is how long the head of a simple request can be, in bytes.
	briskRequest = 4 << 10
	// briskAnswer is how long the content of a small answer can be, in bytes.
	briskAnswer = 64 << 10
	// maxBrisk bounds what is remembered to be small.
	maxBrisk = 16 << 10
)

// briskFields are the fields that a simple request may have, by their canonical names, each once.
var briskFields = map[string]bool{
	"Host": true, "User-Agent": true, "Accept": true, "Accept-Encoding": true, "Accept-Language": true, "Cache-Control": true, "Pragma": true,
	"If-None-Match": true, "If-Modified-Since": true, "Connection": true, "X-Request-Id": true,
	"Traceparent": true,
}

// briskKey is what a simple request asks for.
type briskKey struct{ host, target string }

// mayBeBrisk reports whether an answer to a URL is worth being remembered as small.
func mayBeBrisk(u *url.URL) bool {
	return u.RawQuery == "ac-discovery=1" || strings.HasPrefix(u.Path, imagesPath) && (strings.HasSuffix(u.Path, "."+extSignature) || strings.HasSuffix(u.Path, "."+extImage))
}

// remember notes that a request was answered with little, from what is held, and at once.
func (s *Server) remember(r *http.Request, rec *recorder) {
	if r.Method != http.MethodGet || r.TLS != nil || r.ProtoMajor != 1 || rec.bytes > briskAnswer || rec.status != http.StatusOK && rec.status != http.StatusNotModified {
		return
	}
	if status := rec.Header()["Cache-Status"]; len(status) != 1 || status[0] != cacheStatus(0)[0] || !mayBeBrisk(r.URL) {
		return
	}
	key := briskKey{r.Host, r.RequestURI}
	if _, ok := s.brisk.Get(key); ok || len(key.host)+len(key.target) > maxMemoURL {
		return
	}
	if u, err := url.ParseRequestURI(key.target); err == nil && u.Host == "" && u.Scheme == "" {
		s.brisk.Put(key, u)
	}
}

// newBriskMemo returns a memory of what is small: the URLs as they are parsed, which nobody changes.
func newBriskMemo() *memo.Memo[briskKey, *url.URL] { return memo.New[briskKey, *url.URL](maxBrisk) }

// A Door serves a listener for plain connections. It is used like an [http.Server].
type Door struct {
	server  *Server
	http    *http.Server
	handler http.Handler
	handed  *handedListener
	replays *replays

	ctx      context.Context
	cancel   context.CancelFunc
	closing  atomic.Bool
	mu       sync.Mutex
	listener net.Listener
	conns    map[*briskConn]struct{}
	serving  sync.WaitGroup
}

// Door returns what serves plain connections: hs has those with requests that aren't simple.
func (s *Server) Door(hs *http.Server) *Door {
	d := &Door{
		server: s, http: hs, handler: hs.Handler, conns: make(map[*briskConn]struct{}),
		handed: &handedListener{conns: make(chan net.Conn), closed: make(chan struct{})}, replays: newReplays(),
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

// Serve accepts connections until Shutdown or Close, and returns [http.ErrServerClosed] then.
func (d *Door) Serve(l net.Listener) error {
	d.mu.Lock()
	d.listener = l
	d.mu.Unlock()
	if d.closing.Load() {
		return errors.Join(http.ErrServerClosed, l.Close())
	}
	// Ends when handed is closed, which Shutdown and Close do.
	go func() { _ = d.http.Serve(d.handed) }()
	var pause time.Duration
	for {
		conn, err := l.Accept()
		switch {
		case d.closing.Load():
			if err == nil {
				_ = conn.Close()
			}
			return http.ErrServerClosed
		case err != nil && temporary(err):
			// As net/http does: too many open files, for instance.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			time.Sleep(pause)
			continue
		case err != nil:
			return err
		}
		pause = 0
		var c *briskConn
		switch conn := conn.(type) {
		case *net.TCPConn:
			c = newBriskConn(d, conn, nil)
		case *limitedConn:
			c = newBriskConn(d, conn.TCPConn, conn)
		default:
			d.handed.hand(conn)
			continue
		}
		if !d.enter(c) {
			_ = conn.Close()
			continue
		}
		// Ends with the connection, with its first request that isn't simple, or with Shutdown or Close, which wait for it.
		d.serving.Go(c.serve)
	}
}

// temporary reports whether accepting may work again after a while.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

func (d *Door) enter(c *briskConn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing.Load() {
		return false
	}
	d.conns[c] = struct{}{}
	return true
}

func (d *Door) leave(c *briskConn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
}

// stop ends the accepting, and closes the connections that are idle, or all.
func (d *Door) stop(all bool) error {
	d.mu.Lock()
	d.closing.Store(true)
	listener, conns := d.listener, maps.Clone(d.conns)
	d.mu.Unlock()
	var err error
	if listener != nil {
		if err = listener.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	}
	for c := range conns {
		if all || c.busy.CompareAndSwap(briskIdle, briskOver) {
			// Whoever reads from it finds out.
			_ = c.Close()
		}
	}
	return err
}

// Shutdown is that of [http.Server].
func (d *Door) Shutdown(ctx context.Context) error {
	err := d.stop(false)
	done := make(chan struct{})
	// Ends with the last request; if ctx is done before, with Close.
	go func() {
		d.serving.Wait()
		close(done)
	}()
	err = errors.Join(err, d.http.Shutdown(ctx))
	select {
	case <-done:
		d.cancel()
	case <-ctx.Done():
		err = errors.Join(err, ctx.Err())
	}
	return err
}

// Close is that of [http.Server].
func (d *Door) Close() error {
	d.cancel()
	return errors.Join(d.stop(true), d.http.Close(), d.handed.Close())
}

// What a connection does.
const (
	briskIdle int32 = iota
	briskBusy
	briskOver
)

// briskConn is a connection whose requests have been simple so far.
type briskConn struct {
	*net.TCPConn
	door    *Door
	request *http.Request // what all its requests have in common
	client  string        // as it is logged
	busy    atomic.Int32
	before  []byte       // what was read of it already, for whoever it is handed to
	counted *limitedConn // nil if it doesn't count
}

// newBriskConn returns what serves a connection. counted is that connection if it counts.
func newBriskConn(d *Door, tcp *net.TCPConn, counted *limitedConn) *briskConn {
	r := &http.Request{Method: http.MethodGet, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody}
	if tcp != nil {
		r.RemoteAddr = tcp.RemoteAddr().String()
	}
	return &briskConn{TCPConn: tcp, counted: counted, door: d, request: r.WithContext(d.ctx), client: client(r)}
}

// Close closes the connection.
func (c *briskConn) Close() error {
	if c.counted != nil {
		return c.counted.Close()
	}
	return c.TCPConn.Close()
}

// Read gives what was read before it was handed over, and then the rest.
func (c *briskConn) Read(p []byte) (int, error) {
	if len(c.before) > 0 {
		n := copy(p, c.before)
		c.before = c.before[n:]
		return n, nil
	}
	return c.TCPConn.Read(p)
}

// WriteTo is Read to the end: the one of the TCP connection knows nothing of what was read before.
func (c *briskConn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(c.before)
	c.before = c.before[n:]
	if err != nil {
		return int64(n), err
	}
	rest, err := c.TCPConn.WriteTo(w)
	return int64(n) + rest, err
}

// A next is what a connection does after a request.
type next int

const (
	nextRequest next = iota
	nextOwner        // net/http goes on with what was read
	nextNothing      // the connection ends
)

// An exchange is what a connection needs for a request and its answer.
type exchange struct {
	head, out []byte
	w         briskWriter
}

func newExchange() *exchange {
	return &exchange{head: make([]byte, briskRequest), out: make([]byte, 0, 1<<10), w: briskWriter{header: make(http.Header, 12)}}
}

// rushFor is for how long a connection whose last request was simple waits for the next one in a rush, see rush.
const rushFor = time.Second

// serve answers simple requests, one after the other.
func (c *briskConn) serve() {
	d := c.door
	defer d.leave(c)
	x := newExchange()
	patience, idle := d.server.cfg.Patience.Header, d.server.cfg.Patience.Idle
	rush := min(rushFor, idle/2)
	for {
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			_ = c.Close()
			return
		}
		n, err := c.TCPConn.Read(x.head)
		if err != nil {
			_ = c.Close()
			return
		}
		after := c.answer(x, n, c.TCPConn.Write)
		if after == nextRequest {
			n, after = c.rush(x, rush)
		}
		switch after {
		case nextOwner:
			c.handOver(x.head[:n])
			return
		case nextNothing:
			_ = c.Close()
			return
		}
		patience = idle - rush
	}
}

// answer answers the request of which n bytes were read.
func (c *briskConn) answer(x *exchange, n int, write func([]byte) (int, error)) next {
	d := c.door
	if n == 0 || !c.busy.CompareAndSwap(briskIdle, briskBusy) {
		return nextNothing
	}
	head := x.head[:n]
	slot := d.replays.slot(head)
	if !c.again(x, slot, head) {
		r := c.simple(head)
		if r == nil || !x.w.answer(d.handler, r) {
			return nextOwner
		}
		x.out = x.w.appendTo(x.out[:0])
		c.keep(x, slot, head)
	}
	if _, err := write(x.out); err != nil || x.w.last() || d.closing.Load() || !c.busy.CompareAndSwap(briskBusy, briskIdle) {
		return nextNothing
	}
	return nextRequest
}

// handOver gives the connection to net/http, with what was read of it.
func (c *briskConn) handOver(head []byte) {
	c.before = head
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		_ = c.Close()
		return
	}
	c.door.handed.hand(c)
}

// simple reads the head of a request. It returns nil for one that isn't simple, or whose answer isn't known to be small.
func (c *briskConn) simple(head []byte) *http.Request {
	text, ok := bytes.CutSuffix(head, []byte("\r\n\r\n"))
	if !ok {
		return nil
	}
	line, text, _ := bytes.Cut(text, []byte("\r\n"))
	target, ok := bytes.CutPrefix(line, []byte("GET "))
	if !ok {
		return nil
	}
	target, ok = bytes.CutSuffix(target, []byte(" HTTP/1.1"))
	if !ok || len(target) == 0 || target[0] != '/' || !only7bit(target, '!') || bytes.IndexByte(target, '#') >= 0 {
		return nil
	}
	header := make(http.Header, 6)
	for len(text) > 0 {
		line, text, _ = bytes.Cut(text, []byte("\r\n"))
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || !only7bit(value, ' ') {
			return nil
		}
		field := textproto.CanonicalMIMEHeaderKey(string(name))
		if !briskFields[field] || header[field] != nil {
			return nil
		}
		header[field] = []string{string(bytes.Trim(value, " "))}
	}
	host := header["Host"]
	if len(host) != 1 || !plainHost(host[0]) {
		return nil
	}
	if connection := header["Connection"]; len(connection) > 0 && !strings.EqualFold(connection[0], "keep-alive") {
		return nil
	}
	key := briskKey{host[0], string(target)}
	u, ok := c.door.server.brisk.Get(key)
	if !ok || strings.HasSuffix(u.Path, "."+extImage) && header["If-None-Match"] == nil {
		return nil
	}
	delete(header, "Host")
	r := new(http.Request)
	*r = *c.request
	r.URL, r.Header, r.Host, r.RequestURI = u, header, key.host, key.target
	return r
}

// only7bit reports whether all bytes are printable ASCII, from a first one on.
func only7bit(b []byte, first byte) bool {
	for _, c := range b {
		if c < first || c > '~' {
			return false
		}
	}
	return true
}

// plainHost reports whether a host is a name or an address, maybe with a port.
func plainHost(host string) bool {
	for i := range len(host) {
		switch c := host[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '-', c == ':', c == '[', c == ']':
		default:
			return false
		}
	}
	return host != ""
}

// briskWriter is the ResponseWriter of a small answer, which is sent as a whole. One that turns out not to be small is given up, with nothing sent.
type briskWriter struct {
	header  http.Header
	status  int
	content []byte
	given   bool // up

	// What is said of the answer by those who have made it: when they began, on which grounds, and whether it may be given again on these. See replay.go.
	began   time.Time
	grounds grounds
	steady  bool
	image   acproxy.Digest
	access  Access

	own    struct{ from, to int } // where, in what was appended last, the fields are that no two answers have in common
	second int64                  // of dated, since 1970
	dated  []byte
}

// errNotSmall ends the making of an answer that isn't small.
var errNotSmall = errors.New("the answer is not small")

// Header is the ResponseWriter's.
func (w *briskWriter) Header() http.Header { return w.header }

// WriteHeader is the ResponseWriter's.
func (w *briskWriter) WriteHeader(status int) {
	if w.status == 0 && status >= http.StatusOK {
		w.status = status
	}
}

// Write is the ResponseWriter's.
func (w *briskWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if len(w.content)+len(p) > briskAnswer {
		w.giveUp()
	}
	w.content = append(w.content, p...)
	return len(p), nil
}

// ReadFrom is for files, which are never small.
func (w *briskWriter) ReadFrom(io.Reader) (int64, error) {
	w.giveUp()
	return 0, errNotSmall
}

// FlushError is for what comes little by little.
func (w *briskWriter) FlushError() error {
	w.giveUp()
	return errNotSmall
}

func (w *briskWriter) giveUp() {
	w.given = true
	panic(errNotSmall)
}

// answer has a handler answer a request. It reports false if the answer isn't small, or the handler gave up: then nothing was sent.
func (w *briskWriter) answer(handler http.Handler, r *http.Request) (ok bool) {
	clear(w.header)
	w.status, w.content, w.given, w.steady = 0, w.content[:0], false, false
	defer func() {
		// Whatever it is, net/http asks again, and does with a panic what it always does.
		if recover() != nil {
			ok = false
		}
	}()
	handler.ServeHTTP(w, r)
	w.WriteHeader(http.StatusOK)
	return true
}

// last reports whether the connection ends with this answer.
func (w *briskWriter) last() bool { return w.header["Connection"] != nil }

// appendTo appends the answer as it is sent (RFC 9112).
func (w *briskWriter) appendTo(b []byte) []byte {
	switch w.status {
	case http.StatusOK:
		b = append(b, "HTTP/1.1 200 OK\r\n"...)
	case http.StatusNotModified:
		b = append(b, "HTTP/1.1 304 Not Modified\r\n"...)
	default:
		b = fmt.Appendf(b, "HTTP/1.1 %03d %s\r\n", w.status, http.StatusText(w.status))
	}
	id := w.header[requestIDField]
	delete(w.header, requestIDField)
	w.own.from = len(b)
	b = w.appendOwn(b, id...)
	w.own.to = len(b)
	content := w.status != http.StatusNotModified && w.status != http.StatusNoContent
	if content {
		w.header["Content-Length"] = []string{strconv.Itoa(len(w.content))}
		if w.header["Content-Type"] == nil && len(w.content) > 0 {
			w.header["Content-Type"] = []string{http.DetectContentType(w.content)}
		}
	}
	for field, values := range w.header {
		for _, value := range values {
			if strings.IndexByte(value, '\n') >= 0 || strings.IndexByte(value, '\r') >= 0 {
				// It must not become two fields.
				value = strings.Map(func(c rune) rune {
					if c == '\r' || c == '\n' {
						return ' '
					}
					return c
				}, value)
			}
			b = append(append(append(append(b, field...), ": "...), value...), "\r\n"...)
		}
	}
	b = append(b, "\r\n"...)
	if content {
		b = append(b, w.content...)
	}
	return b
}

// appendOwn appends the fields that no two answers have in common: the time, which is to the second and made once for each, and the ID of the request.
func (w *briskWriter) appendOwn(b []byte, id ...string) []byte {
	if now := time.Now(); now.Unix() != w.second {
		w.second, w.dated = now.Unix(), now.UTC().AppendFormat(w.dated[:0], http.TimeFormat)
	}
	b = append(append(append(b, "Date: "...), w.dated...), "\r\n"...)
	for _, id := range id {
		b = append(append(append(b, requestIDField+": "...), id...), "\r\n"...)
	}
	return b
}
