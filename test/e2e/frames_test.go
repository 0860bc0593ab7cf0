package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	wire "encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// Frames, flags, settings and errors of HTTP/2 (RFC 9113, sections 6 and 7).
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameReset        = 0x3
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindow       = 0x8
	frameContinuation = 0x9

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4

	settingWindow = 0x4

	errCancel = 0x8
)

const http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// frames is a client that speaks HTTP/2 frame by frame, well or not.
type frames struct {
	net.Conn
	t    testing.TB
	r    *bufio.Reader
	last uint32 // the stream opened last
}

type frame struct {
	kind, flags byte
	stream      uint32
	payload     []byte
}

// frames connects to the TLS listener and offers HTTP/2. Nothing of HTTP has been said yet.
func (s *scene) frames() *frames {
	s.t.Helper()
	conn := tls.Client(s.raw("https"), &tls.Config{RootCAs: s.nodeCAs, ServerName: imageHost, NextProtos: []string{"h2"}})
	if err := conn.HandshakeContext(s.context()); err != nil {
		s.t.Fatal(err)
	}
	return &frames{Conn: conn, t: s.t, r: bufio.NewReader(conn)}
}

// begin sends what a client begins with: its preface, and the window that each of its streams has for answers.
func (c *frames) begin(window uint32) {
	c.t.Helper()
	_, err := io.WriteString(c, http2Preface)
	if err == nil {
		err = c.send(frame{kind: frameSettings, payload: wire.BigEndian.AppendUint32([]byte{0, settingWindow}, window)})
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *frames) send(all ...frame) error {
	var b []byte
	for _, f := range all {
		b = wire.BigEndian.AppendUint32(b, uint32(len(f.payload))<<8|uint32(f.kind))
		b = append(b, f.flags)
		b = wire.BigEndian.AppendUint32(b, f.stream)
		b = append(b, f.payload...)
	}
	_, err := c.Write(b)
	return err
}

// request returns the frame that gets a path on a stream of its own.
func (c *frames) request(path string) frame {
	c.last = max(c.last+2, 1)
	if c.last%2 == 0 {
		c.last--
	}
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: imageHost}, {Name: ":path", Value: path}} {
		// Writing to memory can't fail.
		_ = e.WriteField(f)
	}
	return frame{kind: frameHeaders, flags: flagEndStream | flagEndHeaders, stream: c.last, payload: b.Bytes()}
}

// more returns the frame that gives a stream, or with 0 the connection, more of a window.
func more(stream, n uint32) frame {
	return frame{kind: frameWindow, stream: stream, payload: wire.BigEndian.AppendUint32(nil, n)}
}

// read returns the next frame.
func (c *frames) read() (frame, error) {
	var head [9]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return frame{}, err
	}
	word := wire.BigEndian.Uint32(head[:4])
	f := frame{kind: byte(word), flags: head[4], stream: wire.BigEndian.Uint32(head[5:]), payload: make([]byte, word>>8)}
	_, err := io.ReadFull(c.r, f.payload)
	return f, err
}

// until returns the next frame of a kind on a stream.
func (c *frames) until(kind byte, stream uint32) (frame, error) {
	for {
		f, err := c.read()
		if err != nil || f.kind == kind && f.stream == stream {
			return f, err
		}
		if f.kind == frameGoAway {
			return f, fmt.Errorf("the connection is ended: %x", f.payload)
		}
	}
}
