package bundle

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/acproxy/acproxy"
)

const (
	formatName    = "acproxy-bundle"
	formatVersion = 1
)

// line is one line of an index: one of its fields is set.
type line struct {
	Format  string          `json:"format,omitempty"`
	Version int             `json:"version,omitempty"`
	Since   *acproxy.Digest `json:"since,omitempty"`
	Key     *Key            `json:"key,omitempty"`
	Name    *Name           `json:"name,omitempty"`
	Image   *Image          `json:"image,omitempty"`
}

// Encode sorts the index, decides where each image will lie, and returns the one way to write it. It returns an error if it breaks a limit of the format.
func (x *Index) Encode() ([]byte, error) {
	x.sort()
	x.place()
	if err := x.check(); err != nil {
		return nil, err
	}
	b, err := x.encode()
	if err == nil && len(b) > MaxIndex {
		err = failure(CodeTooLarge, "the index of %d images has %d bytes, and a bundle's may have %d: export them by prefixes, as several bundles", len(x.Images), len(b), MaxIndex)
	}
	return b, err
}

func (x *Index) encode() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	first := line{Format: formatName, Version: formatVersion}
	if !x.Since.IsZero() {
		first.Since = &x.Since
	}
	lines := []line{first}
	for i := range x.Keys {
		lines = append(lines, line{Key: &x.Keys[i]})
	}
	for i := range x.Names {
		lines = append(lines, line{Name: &x.Names[i]})
	}
	for i := range x.Images {
		lines = append(lines, line{Image: &x.Images[i]})
	}
	for _, l := range lines {
		before := b.Len()
		if err := enc.Encode(l); err != nil {
			return nil, err
		}
		if n := b.Len() - before; n > MaxLine {
			return nil, failure(CodeTooLarge, "a line of the index has %d bytes, and may have %d: %.80s…", n, MaxLine, b.Bytes()[before:])
		}
	}
	return b.Bytes(), nil
}

func (x *Index) sort() {
	slices.SortFunc(x.Keys, func(a, b Key) int { return strings.Compare(a.Fingerprint, b.Fingerprint) })
	slices.SortFunc(x.Names, func(a, b Name) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(x.Images, func(a, b Image) int { return strings.Compare(a.order(), b.order()) })
	for i := range x.Images {
		slices.SortFunc(x.Images[i].Refs, compareRefs)
		slices.Sort(x.Images[i].Signers)
		if m := x.Images[i].Modified; !m.IsZero() {
			x.Images[i].Modified = m.UTC().Truncate(1e9)
		}
	}
	for i := range x.Keys {
		slices.Sort(x.Keys[i].Prefixes)
	}
}

func compareRefs(a, b acproxy.Ref) int { return strings.Compare(a.String(), b.String()) }

// place sets where images lie.
func (x *Index) place() {
	at := int64(0)
	for _, m := range x.members() {
		at += headerSize(m.Size)
		if m.Kind == KindImage {
			m.Image.At = at
		}
		at += padded(m.Size)
	}
	for i := range x.Images {
		if x.Images[i].Absent {
			x.Images[i].At = 0
		}
	}
}

// Parse reads an index. It is an error if this isn't exactly what [Index.Encode] writes of it.
func Parse(b []byte) (*Index, error) {
	if len(b) > MaxIndex {
		return nil, failure(CodeTooLarge, "the index has %d bytes, more than the %d of any bundle's", len(b), MaxIndex)
	}
	x := new(Index)
	lines := bufio.NewReaderSize(bytes.NewReader(b), 64<<10)
	for n := 1; ; n++ {
		text, err := readLine(lines)
		if err == io.EOF && n > 1 {
			break
		}
		var l line
		if err == nil {
			err = strictly(text, &l)
		}
		if err == nil {
			err = x.add(n, l)
		}
		if err != nil {
			return nil, failure(CodeNotBundle, "line %d of the index: %v", n, err)
		}
	}
	placed := Index{Since: x.Since, Keys: x.Keys, Names: x.Names, Images: slices.Clone(x.Images)}
	if err := placed.check(); err != nil {
		return nil, err
	}
	// Whatever differs, in order, in spelling or in a place, is another index than the one that was written.
	placed.place()
	again, err := placed.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, failure(CodeNotBundle, "the index is not written as it has to be, from byte %d on", differ(again, b))
	}
	return x, nil
}

func (x *Index) add(n int, l line) error {
	switch {
	case n == 1:
		if l.Format != formatName || l.Version != formatVersion {
			return fmt.Errorf("it is of format %.40q, version %d; this acproxy reads %s, version %d", l.Format, l.Version, formatName, formatVersion)
		}
		if l.Since != nil {
			x.Since = *l.Since
		}
	case l.Key != nil:
		x.Keys = append(x.Keys, *l.Key)
	case l.Name != nil:
		x.Names = append(x.Names, *l.Name)
	case l.Image != nil:
		x.Images = append(x.Images, *l.Image)
	default:
		return errors.New("it says nothing")
	}
	return nil
}

// readLine returns the next line, without its end.
func readLine(r *bufio.Reader) ([]byte, error) {
	var text []byte
	for {
		part, err := r.ReadSlice('\n')
		text = append(text, part...)
		switch {
		case len(text) > MaxLine:
			return nil, fmt.Errorf("it has more than %d bytes", MaxLine)
		case err == nil:
			return text[:len(text)-1], nil
		case err == bufio.ErrBufferFull:
		case err == io.EOF && len(text) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// strictly reads one JSON value without fields that are not known.
func strictly(text []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("something follows its value")
	}
	return nil
}

func differ(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// check returns what the index says that can't be.
func (x *Index) check() error {
	bad := func(format string, args ...any) error { return failure(CodeNotBundle, "the index: "+format, args...) }
	before := ""
	for i, k := range x.Keys {
		switch {
		case !isFingerprint(k.Fingerprint):
			return bad("key %d has the fingerprint %.80q", i, k.Fingerprint)
		case i > 0 && k.Fingerprint <= before:
			return bad("key %s is there twice, or out of order", k.Fingerprint)
		case k.Size < 1 || k.Size > MaxSignature:
			return bad("key %s has %d bytes, where 1 to %d are allowed", k.Fingerprint, k.Size, MaxSignature)
		}
		for _, prefix := range k.Prefixes {
			if prefix != "" && acproxy.CheckName(prefix) != nil {
				return bad("key %s is for the prefix %.80q", k.Fingerprint, prefix)
			}
		}
		before = k.Fingerprint
	}
	before = ""
	for _, n := range x.Names {
		if err := n.Check(); err != nil {
			return bad("%v", err)
		}
		if n.Name <= before {
			return bad("the name %s is there twice, or out of order", n.Name)
		}
		before = n.Name
	}
	before = ""
	seen := make(map[acproxy.Digest]bool, len(x.Images))
	total := int64(0)
	for i, im := range x.Images {
		if err := im.check(); err != nil {
			return bad("image %d, %.200s: %v", i+1, im.Name, err)
		}
		if order := im.order(); order <= before {
			return bad("image %d, %v, is out of order", i+1, im.Ref())
		} else {
			before = order
		}
		if seen[im.Digest] {
			return bad("the image with digest %v is there twice", im.Digest)
		}
		seen[im.Digest] = true
		if total += im.Size; total > 1<<60 {
			return bad("its images have more than %d bytes together", int64(1)<<60)
		}
	}
	return nil
}

func (im Image) check() error {
	ref, err := acproxy.NewRef(im.Name, im.Labels)
	switch {
	case err != nil:
		return err
	case im.Digest.IsZero() || im.ImageID.IsZero():
		return errors.New("it has no digest or no image ID")
	case im.Size < 1 || im.Size > MaxImage:
		return fmt.Errorf("it has %d bytes, where 1 to %d are allowed", im.Size, int64(MaxImage))
	case im.Signature != nil && (im.Signature.Digest.IsZero() || im.Signature.Size < 1 || im.Signature.Size > MaxSignature):
		return fmt.Errorf("its signature has %d bytes, where 1 to %d are allowed", im.Signature.Size, MaxSignature)
	case !im.Modified.IsZero() && (im.Modified.Year() < 1970 || im.Modified.Year() > 9000 || im.Modified.Nanosecond() != 0):
		return fmt.Errorf("it was modified at %v", im.Modified)
	}
	for i, r := range im.Refs {
		switch {
		case r.IsZero() || r == ref:
			return fmt.Errorf("its ref %d says nothing", i+1)
		case r.Matches(im.Name, im.Labels) != nil:
			return fmt.Errorf("its ref %v doesn't fit it", r)
		case i > 0 && compareRefs(im.Refs[i-1], r) >= 0:
			return fmt.Errorf("its ref %v is there twice, or out of order", r)
		}
	}
	for i, s := range im.Signers {
		if !isFingerprint(s) || i > 0 && s <= im.Signers[i-1] {
			return fmt.Errorf("its signer %d, %.80q, is no fingerprint, is there twice, or out of order", i+1, s)
		}
	}
	return nil
}

// Check returns why what a bundle says of a name can't be what discovery has found, nil if it can.
func (n Name) Check() error {
	if err := acproxy.CheckName(n.Name); err != nil {
		return err
	}
	if len(n.Templates) == 0 || len(n.Templates) > MaxTemplates {
		return fmt.Errorf("%s has %d templates, where 1 to %d are allowed", n.Name, len(n.Templates), MaxTemplates)
	}
	for _, t := range n.Templates {
		if err := acproxy.CheckName(t.Prefix); err != nil || !acproxy.HasPrefix(n.Name, t.Prefix) {
			return fmt.Errorf("%s has a template for the prefix %.80q, which doesn't cover it", n.Name, t.Prefix)
		}
		// Braces are not for URLs, but here they stand for what is put in.
		u, err := url.Parse(strings.NewReplacer("{", "", "}", "").Replace(t.URL))
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || len(t.URL) > 4096 || !printable(t.URL) {
			return fmt.Errorf("%s has a template with the URL %.80q, which is none", n.Name, t.URL)
		}
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
}
