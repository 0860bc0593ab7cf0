package aci

import (
	"crypto/sha512"
	"hash"
	"io"

	"github.com/acproxy/acproxy"
)

const (
	hashBuffer  = 64 << 10
	hashBuffers = 4
	// hashInline bytes are hashed by the reader itself: for a small image a goroutine costs more than it brings.
	hashInline = 256 << 10
)

// A hashedReader reads r and hashes every byte of it. Inflating takes about three times as long as hashing, so the hash is taken on another
// goroutine, of the same buffers that are handed out: neither side writes to them.
type hashedReader struct {
	r     io.Reader
	hash  hash.Hash
	n     int64  // bytes read from r
	err   error  // what r ended with
	ended bool   // the end was told
	rest  []byte // what was read and isn't handed out yet
	made  int    // buffers made
	own   []byte // the buffer of inline hashing

	free chan []byte   // buffers that are hashed
	full chan []byte   // buffers to hash; nil until the goroutine is started
	done chan struct{} // closed when the goroutine has ended
}

func newHashedReader(r io.Reader) *hashedReader { return &hashedReader{r: r, hash: sha512.New()} }

func (h *hashedReader) Read(p []byte) (int, error) {
	for len(h.rest) == 0 {
		if h.err != nil {
			h.ended = h.err == io.EOF
			return 0, h.err
		}
		h.fill()
	}
	n := copy(p, h.rest)
	h.rest = h.rest[n:]
	return n, nil
}

// fill reads once from r. What was read before has been handed out, so that a buffer which is hashed too is free.
func (h *hashedReader) fill() {
	if h.full == nil && h.n >= hashInline {
		h.free = make(chan []byte, hashBuffers)
		h.full = make(chan []byte, hashBuffers)
		h.done = make(chan struct{})
		// Ended by stop, which also waits for it.
		go h.run()
	}
	var buf []byte
	switch {
	case h.full == nil:
		if h.own == nil {
			h.own = make([]byte, hashBuffer)
		}
		buf = h.own
	case h.made < hashBuffers:
		select {
		case buf = <-h.free:
		default:
			buf = make([]byte, hashBuffer)
			h.made++
		}
	default:
		buf = <-h.free
	}
	n, err := h.r.Read(buf[:hashBuffer])
	h.n += int64(n)
	h.err = err
	h.rest = buf[:n]
	if h.full == nil {
		h.hash.Write(h.rest)
	} else {
		h.full <- h.rest
	}
}

func (h *hashedReader) run() {
	defer close(h.done)
	for buf := range h.full {
		h.hash.Write(buf)
		h.free <- buf
	}
}

// stop ends the goroutine, if there is one, after it has hashed what was read. Nothing may be read afterwards.
func (h *hashedReader) stop() {
	if h.full != nil {
		close(h.full)
		<-h.done
		h.full = nil
	}
}

// sum returns the image ID of everything that was read. Nothing may be read afterwards.
func (h *hashedReader) sum() acproxy.ImageID {
	h.stop()
	return acproxy.ImageID(h.hash.Sum(nil))
}
