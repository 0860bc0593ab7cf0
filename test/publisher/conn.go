package publisher

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// A conn is a connection that can end where nobody above it meant it to.
type conn struct {
	*net.TCPConn // its ReadFrom sends files, where no fault is in the way

	mu    sync.Mutex
	fault ConnFault
	left  int64 // bytes until it ends; less than 0 is never
	reset bool  // it ends with RST
	torn  bool  // it ends in the middle of the next write
}

// Write writes up to where the connection ends.
func (c *conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(p)
	switch {
	case c.torn:
		n /= 2
	case c.left < 0 || int64(n) < c.left:
		n, err := c.TCPConn.Write(p)
		if c.left >= 0 {
			c.left -= int64(n)
		}
		return n, err
	default:
		n = int(c.left)
	}
	n, err := c.TCPConn.Write(p[:n])
	c.end(c.reset)
	return n, errors.Join(err, net.ErrClosed)
}

// end closes the connection: at once, or with a reset.
func (c *conn) end(reset bool) {
	if reset {
		_ = c.SetLinger(0)
	}
	_ = c.Close()
}

// tear has the connection end in the middle of what is written next.
func (c *conn) tear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.torn = true
}

// misbehave puts a fault into effect.
func (c *conn) misbehave(f ConnFault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
	switch {
	case f.CutAfter != nil:
		c.left = *f.CutAfter
	case f.ResetAfter != nil:
		c.left, c.reset = *f.ResetAfter, true
	}
}

func (c *conn) faults() ConnFault {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fault
}

// under returns the connection below TLS.
func under(c net.Conn) *conn {
	// TLS would say goodbye.
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	ours, _ := c.(*conn)
	return ours
}

// listener makes a conn of each connection.
type listener struct{ net.Listener }

// Accept returns the next connection.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return c, nil // cannot happen: net.Listen("tcp") gives no others
	}
	return &conn{TCPConn: tcp, left: -1}, nil
}

// errFault ends a handshake that is not meant to succeed.
var errFault = errors.New("as told")

// tlsConfig returns the TLS of one time of being up: each connection as the fault for the host that its client names has it.
func (p *Publisher) tlsConfig(up *listening) *tls.Config {
	proper := &tls.Config{GetCertificate: p.ca.certificate, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	own := proper.Clone()
	own.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		t := p.connFaultFor(hello.ServerName)
		c := under(hello.Conn)
		if t == nil || c == nil {
			return nil, nil
		}
		f := t.conn
		c.misbehave(f)
		switch {
		case f.StallHandshake:
			t.stall()
			c.waitFor(t.released, up.ctx.Done())
			c.end(false)
			return nil, errFault
		case f.CutHandshake:
			c.end(false)
			return nil, errFault
		case f.Garbage:
			// What can't be written is noticed by the client.
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.9 and no certificate\r\n")
			_ = c.CloseWrite()
			return nil, errFault
		}
		changed := proper.Clone()
		if f.HTTP1 {
			changed.NextProtos = []string{"http/1.1"}
		}
		name := hello.ServerName
		if f.WrongHost {
			name = "wrong.invalid"
		}
		if f.WrongHost || f.Expired {
			cert, err := p.ca.mint(name, f.Expired)
			if err != nil {
				return nil, err
			}
			changed.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
		}
		return changed, nil
	}
	return own
}

// waitFor returns when one of two channels is closed or the client has gone. It takes whatever the client sends.
func (c *conn) waitFor(one, other <-chan struct{}) {
	gone := make(chan struct{})
	// Ends when the client goes, or by the caller, who closes the connection.
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, c.TCPConn)
	}()
	select {
	case <-one:
	case <-other:
	case <-gone:
	}
}

// http2ByHand returns what serves connections that speak HTTP/2: net/http, but where a fault asks for frames that net/http doesn't send.
func http2ByHand(up *listening) map[string]func(*http.Server, *tls.Conn, http.Handler) {
	usual := standardHTTP2()
	return map[string]func(*http.Server, *tls.Conn, http.Handler){
		"h2": func(s *http.Server, c *tls.Conn, h http.Handler) {
			f := ConnFault{}
			if ours := under(c); ours != nil {
				f = ours.faults()
			}
			if !f.EndlessHeaders && !f.StallInHeader {
				usual(s, c, h)
				return
			}
			defer c.Close()
			answerByHand(c, up, f.EndlessHeaders)
		},
	}
}

// standardHTTP2 returns what net/http serves HTTP/2 connections with. It gives that to a server which begins to serve.
func standardHTTP2() func(*http.Server, *tls.Conn, http.Handler) {
	s := &http.Server{TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errFault }}}
	// It returns at once, with the listener's error.
	_ = s.ServeTLS(closedListener{}, "", "")
	return s.TLSNextProto["h2"]
}

// closedListener accepts nothing.
type closedListener struct{}

func (closedListener) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (closedListener) Close() error              { return nil }
func (closedListener) Addr() net.Addr            { return &net.TCPAddr{} }

// The frames of HTTP/2 that are written by hand (RFC 9113, section 6).
const (
	frameHeaders      = 0x1
	frameSettings     = 0x4
	frameContinuation = 0x9
)

// frame returns an HTTP/2 frame without flags.
func frame(kind byte, stream uint32, payload []byte) []byte {
	b := make([]byte, 9, 9+len(payload))
	binary.BigEndian.PutUint32(b, uint32(len(payload))<<8)
	b[3] = kind
	binary.BigEndian.PutUint32(b[5:], stream)
	return append(b, payload...)
}

// answerByHand answers the first request of an HTTP/2 connection with a header that has no end: one that goes on and on, or one that doesn't go on. It
// returns when the client has gone, or the publisher goes down.
func answerByHand(c net.Conn, up *listening, endless bool) {
	gone := make(chan struct{})
	// Ends when the client goes, or by the caller, who closes the connection.
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, c)
	}()
	// ":status: 200" from the table (RFC 7541, appendix A), then a field that isn't to be indexed.
	field := append([]byte{0x00, 7}, "x-again"...)
	field = append(append(field, 3), "one"...)
	if _, err := c.Write(append(frame(frameSettings, 0, nil), frame(frameHeaders, 1, append([]byte{0x88}, field...))...)); err != nil {
		return
	}
	for endless {
		if _, err := c.Write(frame(frameContinuation, 1, field)); err != nil {
			return
		}
	}
	select {
	case <-gone:
	case <-up.ctx.Done():
	}
}
