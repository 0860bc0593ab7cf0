package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"time"

	"github.com/acproxy/acproxy"
)

const (
	blockSize = 512 // of a tar
	// maxOctal is the most that the size field of a plain header can say; more goes into a PAX record before it.
	maxOctal = 1<<33 - 1
)

// padded returns how many bytes a member of some size takes in the tar.
func padded(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

// header returns the bytes that stand before a member.
func header(name string, size int64) []byte {
	var b bytes.Buffer
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
	if size > maxOctal {
		h.Format = tar.FormatPAX
	}
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		panic(fmt.Sprintf("cannot happen: the tar header of %s with %d bytes: %v", name, size, err))
	}
	return b.Bytes()
}

// headerSize returns how many bytes the header of a member of some size has.
func headerSize(size int64) int64 {
	if size > maxOctal {
		// The header of the PAX record, the record, and the header itself.
		return 3 * blockSize
	}
	return blockSize
}

// trailer is how many bytes end a tar.
const trailer = 2 * blockSize

// A Bundle is what a stream is made of.
type Bundle struct {
	Index   *Index
	encoded []byte
	note    []byte
	size    int64
}

// New returns a bundle of what an index says. It is signed if there is a signer.
func New(x *Index, signer *Signer) (*Bundle, error) {
	encoded, err := x.Encode()
	if err != nil {
		return nil, err
	}
	text := statement(encoded, len(x.Images))
	b := &Bundle{Index: x, encoded: encoded, note: []byte(text)}
	if signer != nil {
		if b.note, err = signer.Sign(text); err != nil {
			return nil, err
		}
	}
	b.size = b.base() + trailer
	for _, m := range x.members() {
		b.size += headerSize(m.Size) + padded(m.Size)
	}
	return b, nil
}

// ID returns what the bundle is called.
func (b *Bundle) ID() acproxy.Digest { return ID(b.encoded) }

// head returns the digest of all that stands before the first member.
func (b *Bundle) head() acproxy.Digest {
	sum := sha256.New()
	at := int64(0)
	for _, p := range b.parts() {
		if at += p.size; at > b.base() {
			break
		}
		sum.Write(p.bytes)
	}
	return acproxy.Digest(sum.Sum(nil))
}

// Size returns how many bytes the stream has.
func (b *Bundle) Size() int64 { return b.size }

// base returns where the first member behind the note has its header.
func (b *Bundle) base() int64 {
	return 2*blockSize + padded(int64(len(b.encoded))) + padded(int64(len(b.note)))
}

// A part is a piece of the stream: bytes, or a member.
type part struct {
	at, size int64
	bytes    []byte
	member   *Member
}

// parts returns the pieces of the stream.
func (b *Bundle) parts() []part {
	var all []part
	at := int64(0)
	add := func(bytes []byte, member *Member, size int64) {
		if size > 0 {
			all = append(all, part{at: at, size: size, bytes: bytes, member: member})
		}
		at += size
	}
	pad := func(size int64) {
		n := padded(size) - size
		add(make([]byte, n), nil, n)
	}
	for _, own := range []struct {
		name  string
		bytes []byte
	}{{indexName, b.encoded}, {noteName, b.note}} {
		h := header(own.name, int64(len(own.bytes)))
		add(h, nil, int64(len(h)))
		add(own.bytes, nil, int64(len(own.bytes)))
		pad(int64(len(own.bytes)))
	}
	for _, m := range b.Index.members() {
		h := header(m.Name(), m.Size)
		add(h, nil, int64(len(h)))
		add(nil, &m, m.Size)
		pad(m.Size)
	}
	add(make([]byte, trailer), nil, trailer)
	return all
}

// An Opener opens the bytes of a member, from the first one on. The caller closes them.
type Opener func(Member) (io.ReadCloser, error)

// skipTo reads and drops n bytes.
func skipTo(r io.Reader, n int64) error {
	if n == 0 {
		return nil
	}
	skipped, err := io.CopyN(io.Discard, r, n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", skipped, err)
	}
	return nil
}
