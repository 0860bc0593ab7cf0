package bundle

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/acproxy/acproxy"
)

// A Source is the bytes of a bundle, in order. A Read that fails with an error of code [CodeDamaged] or [CodeIncomplete] has said that some bytes can't be had;
// what comes behind them may be, by Skip.
type Source interface {
	io.Reader
	// Skip goes on with the byte at a place, which isn't before the next one.
	Skip(to int64) error
}

// Plain returns a Source of a stream that can only be read, such as a pipe.
func Plain(r io.Reader) Source { return &plain{r: r} }

type plain struct {
	r  io.Reader
	at int64
}

// Read implements io.Reader.
func (p *plain) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.at += int64(n)
	return n, err
}

// Skip implements [Source].
func (p *plain) Skip(to int64) error {
	if to < p.at {
		return fmt.Errorf("cannot happen: byte %d of a stream was read already, at %d", to, p.at)
	}
	return p.ends(skipTo(readOnly{p}, to-p.at))
}

// ends turns the end of the stream into what it means.
func (p *plain) ends(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return failure(CodeIncomplete, "the bundle ends after %d bytes", p.at)
	}
	return err
}

// A Reader reads a bundle. Nothing of what it says is to be believed: bytes are as the index says, if a digest was checked, and the index is whatever somebody
// wrote. A Reader is for one goroutine.
type Reader struct {
	ID     acproxy.Digest
	Index  *Index
	Signed Signed
	Size   int64 // bytes of all of it, as its index says

	source Source
	at     int64 // how far the source was read
	base   int64
	places map[string]int64 // of members, by name, from the base on, where their headers are
}

// NewReader reads the index of a bundle. With keys, given as verifiers, it has to be signed by one of them. Members can be opened in the order in which they are
// in the bundle.
func NewReader(s Source, keys []string) (*Reader, error) {
	r := &Reader{source: s, places: make(map[string]int64)}
	index, err := r.own(indexName, MaxIndex)
	if err != nil {
		return nil, err
	}
	r.ID = ID(index)
	signed, err := r.own(noteName, MaxNote)
	if err != nil {
		return nil, err
	}
	if r.Index, err = Parse(index); err != nil {
		return nil, err
	}
	if r.Signed, err = check(signed, statement(index, len(r.Index.Images)), keys); err != nil {
		return nil, err
	}
	r.base = r.at
	at := int64(0)
	for _, m := range r.Index.members() {
		r.places[m.Name()] = at
		at += headerSize(m.Size) + padded(m.Size)
	}
	r.Size = r.base + at + trailer
	return r, nil
}

// own reads a member of the bundle's own, whose size only its header says.
func (r *Reader) own(name string, most int64) ([]byte, error) {
	head := make([]byte, blockSize)
	if err := r.full(head); err != nil {
		return nil, err
	}
	// The field for the size (POSIX, ustar): eleven octal digits and a zero byte.
	size, err := strconv.ParseInt(strings.TrimRight(string(head[124:135]), "\x00 "), 8, 64)
	if err != nil || size < 0 || size > most || !bytes.Equal(head, header(name, size)) {
		return nil, failure(CodeNotBundle, "it doesn't begin as a bundle of acproxy: where the header of %s has to be, with at most %d bytes, is something else", name, most)
	}
	// It grows with what comes: what the header claims is not believed.
	var b bytes.Buffer
	if _, err := io.CopyN(&b, readOnly{r}, size); err != nil {
		return nil, r.ends(err)
	}
	return b.Bytes(), r.zeros(padded(size) - size)
}

// Read reads the source, and counts.
func (r *Reader) Read(b []byte) (int, error) {
	n, err := r.source.Read(b)
	r.at += int64(n)
	return n, err
}

func (r *Reader) full(b []byte) error {
	_, err := io.ReadFull(readOnly{r}, b)
	return r.ends(err)
}

// ends turns the end of the source into what it means.
func (r *Reader) ends(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return failure(CodeIncomplete, "the bundle ends after %d bytes", r.at)
	}
	return err
}

// zeros reads padding.
func (r *Reader) zeros(n int64) error {
	b := make([]byte, n)
	at := r.at
	if err := r.full(b); err != nil {
		return err
	}
	for i, c := range b {
		if c != 0 {
			return failure(CodeDamaged, "byte %d of the bundle is %d, and has to be 0", at+int64(i), c)
		}
	}
	return nil
}

// Members returns what is in the bundle, in order.
func (r *Reader) Members() []Member { return r.Index.members() }

// Open returns the bytes of a member, all of which have to be there but may be others than its digest says: whoever reads them checks that. It may be read
// until the next one is opened.
func (r *Reader) Open(m Member) (io.Reader, error) {
	place, ok := r.places[m.Name()]
	if !ok || m.Size < 0 {
		return nil, fmt.Errorf("cannot happen: the bundle has no member %s", m.Name())
	}
	if place += r.base; place != r.at {
		if err := r.source.Skip(place); err != nil {
			return nil, r.ends(err)
		}
		r.at = place
	}
	want := header(m.Name(), m.Size)
	is := make([]byte, len(want))
	if err := r.full(is); err != nil {
		return nil, err
	}
	if !bytes.Equal(is, want) {
		return nil, failure(CodeDamaged, "byte %d of the bundle is not as it has to be before %s", place+int64(differ(is, want)), m.Name())
	}
	return &body{r: r, left: m.Size, name: m.Name()}, nil
}

// body is the bytes of one member.
type body struct {
	r    *Reader
	left int64
	name string
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	switch {
	case err == io.EOF && b.left == 0:
		err = nil
	case err != nil:
		err = fmt.Errorf("%s: %w", b.name, b.r.ends(err))
	}
	return n, err
}

// ReadSmall returns the bytes of a member that is no image, which are those that its digest says.
func (r *Reader) ReadSmall(m Member) ([]byte, error) {
	if m.Size > MaxSignature {
		return nil, failure(CodeTooLarge, "%s has %d bytes, more than %d", m.Name(), m.Size, MaxSignature)
	}
	from, err := r.Open(m)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(from)
	if err != nil {
		return nil, err
	}
	if acproxy.Digest(sha256.Sum256(b)) != m.Digest {
		return nil, failure(CodeDamaged, "%s has other bytes than the index says", m.Name())
	}
	return b, nil
}

// End checks that the bundle ends where it has to, and that nothing comes behind it.
func (r *Reader) End() error {
	if at := r.Size - trailer; at != r.at {
		if err := r.source.Skip(at); err != nil {
			return r.ends(err)
		}
		r.at = at
	}
	if err := r.zeros(trailer); err != nil {
		return err
	}
	var one [1]byte
	switch n, err := io.ReadFull(readOnly{r}, one[:]); {
	case n > 0:
		return failure(CodeDamaged, "something follows the end of the bundle, at byte %d", r.Size)
	case err != io.EOF:
		return err
	}
	return nil
}
