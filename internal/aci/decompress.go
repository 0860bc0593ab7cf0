package aci

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
)

// A Compression is how an image's tar is compressed.
type Compression string

// The compressions that the specification allows (aci.md, "Image Archives").
const (
	None  Compression = "none"
	Gzip  Compression = "gzip"
	Bzip2 Compression = "bzip2"
	XZ    Compression = "xz"
)

const (
	gzipMagic  = "\x1f\x8b"
	bzip2Magic = "BZh"
	xzMagic    = "\xfd7zXZ\x00"

	// Every tar that appc's own tools accept says so at this place of its first header (POSIX ustar and GNU alike).
	tarMagic       = "ustar"
	tarMagicOffset = 257
)

// Decompress returns the tar that r holds, and how it was compressed, told by its first bytes. The tar ends with io.EOF only where r ended
// too and everything that the format checks was right; nothing may follow the compressed stream. Like gunzip, bunzip2 and unxz it accepts
// several streams one after the other as one (several gzip members, bzip2 streams, xz streams with padding between them); the tar, and so
// the image ID, is all of them together.
//
// A format that is broken or a limit that is passed is a [*Violation]; a source that ends too early, with io.EOF or io.ErrUnexpectedEOF, is
// one too, "truncated". Any other error of r is returned wrapped. Close frees what the tar needed; it doesn't close r.
func Decompress(r io.Reader, lim Limits) (io.ReadCloser, Compression, error) {
	d := &decompressor{src: &source{r: r}, lim: lim.withDefaults()}
	// The decoders know a *bufio.Reader, read no further in it than their stream goes, and are fastest with it.
	d.br = bufio.NewReaderSize(d.src, 64<<10)
	how, err := d.open()
	if err != nil {
		return nil, "", d.explain(err)
	}
	return d, how, nil
}

// A source remembers how reading ended, to tell the failures of the source from those of the format. The decoders pass on the one and make
// up the other, and some turn one into the other.
type source struct {
	r   io.Reader
	n   int64 // bytes read
	err error // what it ended with
}

func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	s.err = err
	return n, err
}

// A decompressor is the tar inside an image, within its limits.
type decompressor struct {
	src *source
	br  *bufio.Reader
	tar io.Reader // what br holds, uncompressed; it ends with io.EOF only where the format does
	lim Limits
	n   int64 // uncompressed bytes
	err error
}

// consumed returns how many compressed bytes the decoder has taken.
func (d *decompressor) consumed() int64 { return d.src.n - int64(d.br.Buffered()) }

func (d *decompressor) open() (Compression, error) {
	head, err := d.br.Peek(tarMagicOffset + len(tarMagic))
	if err != nil && err != io.EOF {
		return "", err
	}
	switch {
	case bytes.HasPrefix(head, []byte(gzipMagic)):
		zr, err := gzip.NewReader(d.br)
		if err != nil {
			return "", noEOF(err)
		}
		zr.Multistream(false)
		d.tar = &gzipReader{br: d.br, zr: zr}
		return Gzip, nil
	case bytes.HasPrefix(head, []byte(bzip2Magic)):
		d.tar = bzip2.NewReader(d.br)
		return Bzip2, nil
	case bytes.HasPrefix(head, []byte(xzMagic)):
		d.tar = &xzReader{br: d.br, pos: d.consumed, maxDictionary: d.lim.MaxDictionary}
		return XZ, nil
	case len(head) == tarMagicOffset+len(tarMagic) && string(head[tarMagicOffset:]) == tarMagic:
		d.tar = d.br
		return None, nil
	case len(head) == 0:
		return "", violation(RuleTruncated, "it is empty")
	}
	return "", violation(RuleNotAnImage, "it begins with %q, which is neither a tar nor made by gzip, bzip2 or xz", head[:min(len(head), 16)])
}

// Read reads the tar.
func (d *decompressor) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.tar.Read(p)
	d.n += int64(n)
	switch in := d.consumed(); {
	case d.n > d.lim.MaxUncompressed:
		n, err = 0, violation(RuleTooLarge, "its tar is larger than %d bytes", d.lim.MaxUncompressed)
	case d.n > d.lim.RatioFrom && float64(d.n) > d.lim.MaxRatio*float64(in):
		n, err = 0, violation(RuleBombRatio, "%d bytes came out of the first %d, more than %g times as many", d.n, in, d.lim.MaxRatio)
	}
	if err != nil && err != io.EOF {
		err = d.explain(err)
	}
	d.err = err
	return n, err
}

// Close ends reading; it never fails.
func (d *decompressor) Close() error {
	if d.err == nil {
		d.err = errClosed
	}
	return nil
}

var errClosed = errors.New("read after Close")

// explain turns whatever a decoder returned into the error to tell.
func (d *decompressor) explain(err error) error {
	var v *Violation
	switch failed := d.src.err; {
	case errors.As(err, &v):
		return v
	case failed == nil, failed == io.EOF, failed == io.ErrUnexpectedEOF:
	default:
		return fmt.Errorf("reading the image: %w", failed)
	}
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return violation(RuleTruncated, "it ends after %d bytes, before its compressed stream does", d.src.n)
	}
	// compress/bzip2 has no other word for it.
	if err == bzip2.StructuralError("bad magic value in continuation file") {
		return violation(RuleTrailingBytes, "bytes that aren't bzip2's follow the end of the compressed stream")
	}
	return violation(RuleCorrupt, "after %d bytes: %v", d.consumed(), err)
}

// A gzipReader reads gzip members one after the other until the source ends (RFC 1952, section 2.2).
type gzipReader struct {
	br *bufio.Reader
	zr *gzip.Reader
}

func (g *gzipReader) Read(p []byte) (int, error) {
	for {
		n, err := g.zr.Read(p)
		if err != io.EOF {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
		if err := g.next(); err != nil {
			return 0, err
		}
	}
}

// next goes on to the next member. It returns io.EOF if there is none.
func (g *gzipReader) next() error {
	head, err := g.br.Peek(len(gzipMagic))
	switch {
	case len(head) == 0:
		return err
	case err != nil && err != io.EOF:
		return err
	case !strings.HasPrefix(gzipMagic, string(head)):
		return violation(RuleTrailingBytes, "%q follows the end of the compressed stream", head)
	}
	if err := g.zr.Reset(g.br); err != nil {
		return noEOF(err)
	}
	g.zr.Multistream(false)
	return nil
}

// noEOF returns err as it is told where the source may not end.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
