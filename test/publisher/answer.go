package publisher

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

type connKey struct{}

// handler answers the requests of one time of being up.
func (p *Publisher) handler(up *listening) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		if p.up != up {
			p.mu.Unlock()
			panic(http.ErrAbortHandler) // net/http's way to end an answer without an end
		}
		p.running.Add(1)
		p.mu.Unlock()
		defer p.running.Done()

		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		// A proxy's request has its host in both places, and a server's has none in the URL.
		r.URL.Host = strings.ToLower(host)
		a := &answer{p: p, w: w, r: r, up: up.ctx, logged: p.note(r)}
		a.fault, a.stalls = p.faultFor(r)
		defer a.done()
		a.serve()
	})
}

// note adds a request to the log, and returns it.
func (p *Publisher) note(r *http.Request) *Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	logged := &Request{
		Time: time.Now(), Method: r.Method, Host: r.URL.Host, Path: r.URL.Path, Query: r.URL.RawQuery, Header: r.Header.Clone(),
		Proto: r.Proto, TLS: r.TLS != nil, Remote: r.RemoteAddr,
	}
	p.log = append(p.log, logged)
	p.tell()
	return logged
}

// An answer is one response, with its faults. It is the ResponseWriter that net/http's own code writes to.
type answer struct {
	p      *Publisher
	w      http.ResponseWriter
	r      *http.Request
	fault  Fault
	stalls *Trouble
	up     context.Context // ends when the publisher goes down
	logged *Request

	begun  bool
	status int
	n      int64         // bytes of the body
	torn   bool          // the connection ends with the next bytes
	raw    *bufio.Writer // the connection, if net/http would not do as told
	chunks bool          // what is written to raw is cut into chunks
	conn   net.Conn      // what raw writes to
	free   func() bool   // ends watching for the publisher going down
	since  time.Time     // when the body began
}

var _ http.ResponseWriter = (*answer)(nil)

func (a *answer) done() {
	if a.conn != nil {
		a.free()
		_ = a.raw.Flush()
		_ = a.conn.Close()
	}
	a.log(true)
}

// log brings the log up to date.
func (a *answer) log(done bool) {
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	a.logged.Status, a.logged.Bytes, a.logged.Done = a.status, a.n, done
	a.p.tell()
}

// serve answers.
func (a *answer) serve() {
	f := a.fault
	if f.Delay > 0 {
		a.wait(f.Delay, nil)
	}
	switch {
	case f.CloseConnection:
		a.cut(false)
	case f.EndlessHeaders:
		a.endlessHeaders()
		return
	case f.EndlessInterim:
		a.endlessInterim()
		return
	case f.RedirectLoop:
		a.redirect(requested(a.r))
	case f.RedirectTo != "":
		a.redirect(f.RedirectTo)
	case f.Status != 0 && f.Body == nil:
		a.text(f.Status, fmt.Sprintf("%d %s, as told.\n", f.Status, http.StatusText(f.Status)))
	default:
		a.serveContent()
	}
	if f.EndlessBody {
		spaces := []byte(strings.Repeat(" ", 32<<10))
		for {
			if _, err := a.Write(spaces); err != nil {
				return
			}
		}
	}
	// A fault at the very end of the body.
	_, _ = a.Write(nil)
	if a.chunks {
		// What can't be written is noticed by the client.
		_, _ = a.raw.WriteString(f.BadChunk)
	}
}

func (a *answer) redirect(to string) {
	a.Header().Set("Location", to)
	status := http.StatusFound
	if a.fault.Status != 0 {
		status = a.fault.Status
	}
	a.text(status, "It is at "+to+"\n")
}

func (a *answer) text(status int, line string) {
	a.Header().Set("Content-Type", "text/plain; charset=utf-8")
	a.Header().Set("Content-Length", strconv.Itoa(len(line)))
	a.WriteHeader(status)
	_, _ = io.WriteString(a, line)
}

// serveContent answers with what is published, or with what the fault puts in its place.
func (a *answer) serveContent() {
	c := a.p.look(a.r)
	if a.fault.Body != nil {
		swapped := &content{data: a.fault.Body, modified: time.Date(2016, time.June, 30, 13, 0, 0, 0, time.UTC), kind: "application/octet-stream"}
		if c != nil {
			swapped.kind, swapped.modified = c.kind, c.modified.Add(time.Hour)
		}
		// Hashing what is in memory can't fail.
		_ = swapped.seal()
		c = swapped
	}
	if c == nil {
		a.text(http.StatusNotFound, "There is nothing here.\n")
		return
	}
	if a.r.Method != http.MethodGet && a.r.Method != http.MethodHead {
		a.text(http.StatusMethodNotAllowed, "Only GET and HEAD are answered here.\n")
		return
	}
	body, err := c.open()
	if err != nil {
		a.text(http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	defer body.Close()
	r := a.r.Clone(a.r.Context())
	a.changeRange(r.Header)
	a.Header().Set("Content-Type", c.kind)
	a.Header().Set("ETag", c.etag)
	http.ServeContent(a, r, "", c.modified, body)
}

// changeRange makes of the range that was asked for the one that is answered with.
func (a *answer) changeRange(h http.Header) {
	f := a.fault
	if f.UnaskedRange && h.Get("Range") == "" {
		h.Set("Range", "bytes=0-")
	}
	if f.IgnoreRange {
		h.Del("Range")
	}
	if f.IgnoreIfRange {
		h.Del("If-Range")
	}
	first, last, ok := askedRange(h.Get("Range"))
	if !ok {
		return
	}
	first = max(first+f.ShiftRange, 0)
	if f.RangeLength > 0 {
		last = first + f.RangeLength - 1
	}
	span := fmt.Sprintf("bytes=%d-", first)
	if last >= 0 {
		span += strconv.FormatInt(max(last, first), 10)
	}
	if f.MultipartRange {
		span += fmt.Sprintf(",%d-%d", first, first)
	}
	h.Set("Range", span)
}

// askedRange reads a single range that has a beginning; last is -1 if it has no end.
func askedRange(s string) (first, last int64, ok bool) {
	span, ok := strings.CutPrefix(s, "bytes=")
	from, to, both := strings.Cut(span, "-")
	if !ok || !both {
		return 0, 0, false
	}
	first, err := strconv.ParseInt(from, 10, 64)
	last = -1
	if err == nil && to != "" {
		last, err = strconv.ParseInt(to, 10, 64)
	}
	return first, last, err == nil
}

// look returns what is published where a request asks, nil if nothing is.
func (p *Publisher) look(r *http.Request) *content {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := r.URL.Host + r.URL.Path
	if r.URL.Query().Get("ac-discovery") == "1" {
		page, ok := p.page(strings.TrimSuffix(at, "/"))
		if !ok {
			return nil
		}
		c := &content{data: page.render(), modified: p.started, kind: "text/html; charset=utf-8"}
		// Hashing what is in memory can't fail.
		_ = c.seal()
		return c
	}
	return p.find(at)
}

// Header returns the header that will be sent.
func (a *answer) Header() http.Header { return a.w.Header() }

// WriteHeader sends the header, as the fault has it.
func (a *answer) WriteHeader(status int) {
	if a.begun {
		return
	}
	a.begun = true
	f, h := a.fault, a.Header()
	if f.Status != 0 && f.Body != nil {
		status = f.Status
	}
	a.status = status
	for name, values := range f.Header {
		if values == nil {
			h.Del(name)
		} else {
			h[name] = values
		}
	}
	if f.WrongContentRange && status == http.StatusPartialContent {
		h.Set("Content-Range", oneFurther(h.Get("Content-Range")))
	}
	if f.NoContentLength || f.CloseDelimited || f.BadChunk != "" || f.EndlessBody && f.ContentLength == nil {
		h.Del("Content-Length")
	}
	if f.ContentLength != nil {
		h.Set("Content-Length", strconv.FormatInt(*f.ContentLength, 10))
	}
	a.log(false)
	if f.ContentLength != nil || f.OtherLength != nil || f.CloseDelimited || f.HTTP10 || f.BadChunk != "" || f.HeaderEvery > 0 {
		a.takeOver()
	}
	if a.raw == nil {
		a.w.WriteHeader(status)
		return
	}
	version := "1.1"
	switch {
	case f.HTTP10:
		version = "1.0"
	case f.BadChunk != "":
		a.chunks = true
		h.Set("Transfer-Encoding", "chunked")
	}
	if f.OtherLength != nil {
		h.Add("Content-Length", strconv.FormatInt(*f.OtherLength, 10))
	}
	h.Set("Connection", "close")
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	var head bytes.Buffer
	fmt.Fprintf(&head, "HTTP/%s %d %s\r\n", version, status, http.StatusText(status))
	// Writing to memory can't fail.
	_ = h.Write(&head)
	head.WriteString("\r\n")
	a.writeHead(head.Bytes())
}

// writeHead writes a header by hand, a byte at a time if that is the fault. What can't be written is noticed by the body.
func (a *answer) writeHead(head []byte) {
	every := a.fault.HeaderEvery
	for step := len(head); len(head) > 0; head = head[step:] {
		if every > 0 {
			step = 1
			a.wait(every, nil)
		}
		_, err := a.raw.Write(head[:step])
		if err = errors.Join(err, a.raw.Flush()); err != nil {
			return
		}
	}
}

// takeOver takes the connection from net/http, which keeps lengths right. In HTTP/2 it can't be taken.
func (a *answer) takeOver() {
	hijacker, ok := a.w.(http.Hijacker)
	if !ok {
		return
	}
	conn, buffered, err := hijacker.Hijack()
	if err != nil {
		return
	}
	a.conn, a.raw = conn, buffered.Writer
	// net/http doesn't close it any more.
	a.free = context.AfterFunc(a.up, func() { _ = conn.Close() })
}

// Write writes the body up to where the fault changes, slows or ends it.
func (a *answer) Write(p []byte) (int, error) {
	if !a.begun {
		a.WriteHeader(http.StatusOK)
	}
	if a.since.IsZero() {
		a.since = time.Now()
	}
	written := 0
	for {
		a.misbehave()
		part := p[written:]
		if len(part) == 0 {
			return written, nil
		}
		part = part[:a.until(int64(len(part)))]
		n, err := a.pass(part)
		written += n
		a.n += int64(n)
		if err != nil {
			return written, err
		}
		if a.torn {
			a.flush()
			a.end()
		}
		if a.fault.BytesPerSecond > 0 {
			a.flush()
			due := a.since.Add(time.Duration(float64(a.n) / float64(a.fault.BytesPerSecond) * float64(time.Second)))
			a.wait(time.Until(due), nil)
		}
	}
}

// ReadFrom lets net/http send a file by itself where no fault is in the way.
func (a *answer) ReadFrom(r io.Reader) (int64, error) {
	if a.inTheWay() || a.raw != nil {
		return io.Copy(struct{ io.Writer }{a}, r)
	}
	if !a.begun {
		a.WriteHeader(http.StatusOK)
	}
	n, err := io.Copy(a.w, r)
	a.n += n
	return n, err
}

func (a *answer) inTheWay() bool {
	f := a.fault
	return f.FlipBitAt != nil || f.TruncateAfter != nil || f.ResetAfter != nil || f.StallAfter != nil || f.TearAfter != nil || f.BytesPerSecond > 0
}

// until returns how many of n bytes can be written before the fault has something to do.
func (a *answer) until(n int64) int64 {
	for _, at := range []*int64{a.fault.TruncateAfter, a.fault.ResetAfter, a.fault.StallAfter, a.fault.TearAfter} {
		if at != nil && *at > a.n {
			n = min(n, *at-a.n)
		}
	}
	if rate := a.fault.BytesPerSecond; rate > 0 {
		n = min(n, max(rate/50, 1))
	}
	return n
}

// misbehave does what the fault does at this byte.
func (a *answer) misbehave() {
	if a.r.Method == http.MethodHead {
		return
	}
	reached := func(at *int64) bool { return at != nil && *at <= a.n }
	f := a.fault
	if reached(f.StallAfter) && a.stalls != nil {
		a.flush()
		a.log(false)
		stalls := a.stalls
		a.stalls = nil
		stalls.stall()
		a.wait(0, stalls.released)
	}
	if reached(f.ResetAfter) {
		a.flush()
		a.cut(true)
	}
	if c := under(a.connection()); reached(f.TearAfter) && c != nil {
		a.flush()
		c.tear()
		a.torn = true
	}
	if reached(f.TruncateAfter) {
		a.flush()
		a.end()
	}
}

// pass writes bytes, one of them with a bit flipped perhaps.
func (a *answer) pass(part []byte) (int, error) {
	if at := a.fault.FlipBitAt; at != nil && *at >= a.n && *at < a.n+int64(len(part)) {
		part = append([]byte(nil), part...)
		part[*at-a.n] ^= 1
	}
	switch {
	case a.chunks:
		if _, err := fmt.Fprintf(a.raw, "%x\r\n", len(part)); err != nil {
			return 0, err
		}
		n, err := a.raw.Write(part)
		if err == nil {
			_, err = a.raw.WriteString("\r\n")
		}
		return n, err
	case a.raw != nil:
		return a.raw.Write(part)
	}
	return a.w.Write(part)
}

func (a *answer) flush() {
	if a.raw != nil {
		_ = a.raw.Flush()
		return
	}
	// It fails if the client has gone, which the next write notices.
	_ = http.NewResponseController(a.w).Flush()
}

// wait waits for a time to pass, or, if it is 0 or less, for a channel. It ends the answer if the client or the publisher goes first.
func (a *answer) wait(d time.Duration, until <-chan struct{}) {
	var timeout <-chan time.Time
	if until == nil {
		if d <= 0 {
			return
		}
		timer := time.NewTimer(d)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-timeout:
	case <-until:
	case <-a.up.Done():
		a.end()
	case <-a.r.Context().Done():
		a.end()
	}
}

// end ends the answer without an end, as if the connection had been lost; in HTTP/2, the stream.
func (a *answer) end() {
	panic(http.ErrAbortHandler) // net/http's way to do that; a connection that was taken over is closed by done
}

// cut closes the connection that the request came on: at once, or with a reset.
func (a *answer) cut(reset bool) {
	if c := under(a.connection()); c != nil {
		c.end(reset)
	}
	panic(http.ErrAbortHandler)
}

// connection returns the connection that the request came on, nil if that isn't known.
func (a *answer) connection() net.Conn {
	c, _ := a.r.Context().Value(connKey{}).(net.Conn)
	return c
}

// endlessInterim sends interim responses (RFC 9110, section 15.2) until the client has had enough.
func (a *answer) endlessInterim() {
	a.Header().Set("Link", "</style.css>; rel=preload")
	for a.r.Context().Err() == nil && a.up.Err() == nil {
		a.w.WriteHeader(http.StatusEarlyHints)
	}
	a.end()
}

func (a *answer) endlessHeaders() {
	const line = "X-And-Another-Thing: there is always one more, and after that there is one more\r\n"
	a.takeOver()
	if a.raw == nil {
		for i := range 4 << 20 / len(line) {
			a.Header().Set(fmt.Sprintf("X-%d", i), line[:len(line)-2])
		}
		a.WriteHeader(http.StatusOK)
		return
	}
	a.status = http.StatusOK
	_, err := a.raw.WriteString("HTTP/1.1 200 OK\r\n")
	for err == nil {
		_, err = a.raw.WriteString(line)
	}
}

// requested returns the URL that was asked for.
func requested(r *http.Request) string {
	u := url.URL{Scheme: "http", Host: r.Host, Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery}
	if r.TLS != nil {
		u.Scheme = "https"
	}
	return u.String()
}

// oneFurther returns a Content-Range that says one byte further.
func oneFurther(s string) string {
	var first, last, size int64
	if _, err := fmt.Sscanf(s, "bytes %d-%d/%d", &first, &last, &size); err != nil {
		return "bytes 1-1/2"
	}
	return fmt.Sprintf("bytes %d-%d/%d", first+1, last+1, size+1)
}
