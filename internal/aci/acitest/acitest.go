// Package acitest makes appc images, proper ones and hostile ones, the same bytes every time.
//
// It has its own way of writing and reading images and doesn't use package aci, so that the two check each other.
package acitest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"crypto/sha512"
	_ "embed" // for the bzip2 image
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/appc/spec/schema"
	"github.com/appc/spec/schema/types"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/ulikunitz/xz"

	"github.com/acproxy/acproxy"
)

// The compressions that images can be made with. There is no bzip2 writer for Go: [Bzip2] is an image that bzip2 made.
const (
	None = "none"
	Gzip = "gzip"
	XZ   = "xz"
)

// A Spec says what image to make. The zero Spec makes a small, proper image called example.com/app without labels.
type Spec struct {
	Name         string            // the image name; "" is example.com/app
	Labels       map[string]string // what the image is labelled with
	Dependencies []Dependency      // what it says it needs
	Annotations  map[string]string // what it says besides

	Compression string // None, Gzip or XZ; "" is Gzip
	Members     int    // gzip members, or xz streams, that the tar is spread over; 0 is one

	Files      map[string]string // regular files: path below rootfs → content
	RootfsSize int64             // bytes of one more file, rootfs/content, that no compression makes smaller
	Seed       uint64            // makes another content of the same size

	// What follows makes images that break rules.

	Manifest     []byte  // the manifest's bytes in place of what the fields above say; nil is those
	NoManifest   bool    // leave the manifest out
	NoRootfs     bool    // leave the entry of the rootfs directory out
	ManifestLast bool    // the manifest comes after everything else; that breaks no rule
	Before       []Entry // entries before all others
	Extra        []Entry // entries after all others
	NoEnd        bool    // leave out the blocks of zeros that end a tar
	Padding      int64   // zeros after the end of the tar; they break no rule
	Tail         []byte  // bytes after the end of the tar, still compressed
	Trailing     []byte  // bytes after the end of the compressed stream
}

// A Dependency is an image that the image says it needs.
type Dependency struct {
	Name    string
	Labels  map[string]string
	ImageID acproxy.ImageID // zero leaves it out
	Size    int64           // 0 leaves it out
}

// An Entry is one tar entry. A header's Size is the body's length unless it is set.
type Entry struct {
	Header tar.Header
	Body   []byte
}

// Dir returns a directory's entry.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

// File returns a regular file's entry.
func File(name, body string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, Body: []byte(body)}
}

// Symlink returns a symbolic link's entry.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Link returns a hard link's entry.
func Link(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

// Device returns a character device's entry.
func Device(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Devmajor: 1, Devminor: 3, Mode: 0o666}}
}

// Epoch is when every file of every image was changed last.
var Epoch = time.Date(2016, time.June, 30, 12, 0, 0, 0, time.UTC)

// Build returns the image that s describes. It returns an error if s can't be written as a tar, or names a compression that there is no
// writer for. Large images are better written to a file with [Write].
func Build(s Spec) ([]byte, error) {
	var b bytes.Buffer
	if _, err := Write(&b, s); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// A TB is the part of testing.TB that Must needs.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
}

// Must is [Build] for tests: it ends the test if the image can't be made.
func Must(t TB, s Spec) []byte {
	t.Helper()
	image, err := Build(s)
	if err != nil {
		t.Fatalf("making a test image: %v", err)
	}
	return image
}

// Write writes the image that s describes and returns its ID. It holds no more of it than a buffer.
func Write(w io.Writer, s Spec) (acproxy.ImageID, error) {
	buffered := bufio.NewWriterSize(w, 256<<10)
	z, err := newCompressor(buffered, s)
	if err != nil {
		return acproxy.ImageID{}, err
	}
	hash := sha512.New()
	if err := s.writeTar(io.MultiWriter(hash, z), z.split); err != nil {
		return acproxy.ImageID{}, err
	}
	if err := z.Close(); err != nil {
		return acproxy.ImageID{}, err
	}
	if _, err := buffered.Write(s.Trailing); err != nil {
		return acproxy.ImageID{}, err
	}
	return acproxy.ImageID(hash.Sum(nil)), buffered.Flush()
}

// writeTar writes the tar. It calls split between entries.
func (s Spec) writeTar(w io.Writer, split func() error) error {
	tw := tar.NewWriter(w)
	for _, e := range s.entries() {
		if err := writeEntry(tw, e); err != nil {
			return err
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		if err := split(); err != nil {
			return err
		}
	}
	if s.RootfsSize > 0 {
		if err := s.writeContent(tw); err != nil {
			return err
		}
	}
	for _, e := range s.lastEntries() {
		if err := writeEntry(tw, e); err != nil {
			return err
		}
	}
	end := tw.Close
	if s.NoEnd {
		end = tw.Flush
	}
	if err := end(); err != nil {
		return err
	}
	if _, err := io.CopyN(w, zeros{}, s.Padding); err != nil {
		return err
	}
	_, err := w.Write(s.Tail)
	return err
}

func (s Spec) entries() []Entry {
	entries := slices.Clone(s.Before)
	if !s.ManifestLast {
		entries = append(entries, s.manifest()...)
	}
	if !s.NoRootfs {
		entries = append(entries, Dir("rootfs"))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Files)) {
		entries = append(entries, File(path.Join("rootfs", name), s.Files[name]))
	}
	return entries
}

func (s Spec) lastEntries() []Entry {
	var entries []Entry
	if s.ManifestLast {
		entries = s.manifest()
	}
	return append(entries, s.Extra...)
}

func (s Spec) manifest() []Entry {
	switch {
	case s.NoManifest:
		return nil
	case s.Manifest != nil:
		return []Entry{File("manifest", string(s.Manifest))}
	}
	return []Entry{File("manifest", string(s.ManifestJSON()))}
}

func (s Spec) writeContent(tw *tar.Writer) error {
	header := File("rootfs/content", "").Header
	header.Size, header.ModTime = s.RootfsSize, Epoch
	if err := tw.WriteHeader(&header); err != nil {
		return err
	}
	_, err := io.CopyN(tw, Noise(s.Seed), s.RootfsSize)
	return err
}

func writeEntry(tw *tar.Writer, e Entry) error {
	if e.Header.Size == 0 {
		e.Header.Size = int64(len(e.Body))
	}
	if e.Header.ModTime.IsZero() && e.Header.Typeflag != tar.TypeXGlobalHeader {
		e.Header.ModTime = Epoch
	}
	if err := tw.WriteHeader(&e.Header); err != nil {
		return fmt.Errorf("tar entry %q: %w", e.Header.Name, err)
	}
	_, err := tw.Write(e.Body)
	return err
}

// ManifestJSON returns the manifest that s describes, without regard to its field Manifest. It is not validated: what s says wrongly is in
// it wrongly.
func (s Spec) ManifestJSON() []byte {
	type pair struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	type dependency struct {
		ImageName string `json:"imageName"`
		ImageID   string `json:"imageID,omitempty"`
		Labels    []pair `json:"labels,omitempty"`
		Size      int64  `json:"size,omitempty"`
	}
	pairs := func(m map[string]string) []pair {
		var list []pair
		for _, name := range slices.Sorted(maps.Keys(m)) {
			list = append(list, pair{name, m[name]})
		}
		return list
	}
	m := struct {
		ACKind       string       `json:"acKind"`
		ACVersion    string       `json:"acVersion"`
		Name         string       `json:"name"`
		Labels       []pair       `json:"labels,omitempty"`
		Dependencies []dependency `json:"dependencies,omitempty"`
		Annotations  []pair       `json:"annotations,omitempty"`
	}{"ImageManifest", schema.AppContainerVersion.String(), s.Name, pairs(s.Labels), nil, pairs(s.Annotations)}
	if m.Name == "" {
		m.Name = "example.com/app"
	}
	for _, d := range s.Dependencies {
		m.Dependencies = append(m.Dependencies, dependency{d.Name, d.ImageID.String(), pairs(d.Labels), d.Size})
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	// Strings and numbers written to memory can't fail.
	_ = enc.Encode(m)
	return bytes.TrimSpace(b.Bytes())
}

// Noise returns endless bytes that look random and are the same for the same seed.
func Noise(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// A compressor is a writer whose stream can be ended and begun anew.
type compressor struct {
	io.WriteCloser
	begin func() (io.WriteCloser, error)
	left  int // how many times yet
}

func newCompressor(w io.Writer, s Spec) (*compressor, error) {
	z := &compressor{left: s.Members - 1}
	switch s.Compression {
	case None:
		z.begin = func() (io.WriteCloser, error) { return plain{w}, nil }
	case Gzip, "":
		// Noise doesn't compress, and what else is in a large test image is small.
		level := kgzip.BestSpeed
		if s.RootfsSize > 1<<20 {
			level = kgzip.NoCompression
		}
		z.begin = func() (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, level) }
	case XZ:
		z.begin = func() (io.WriteCloser, error) { return xz.WriterConfig{DictCap: 64 << 10}.NewWriter(w) }
	default:
		return nil, fmt.Errorf("there is no writer for compression %q: use %q, %q or %q", s.Compression, None, Gzip, XZ)
	}
	var err error
	z.WriteCloser, err = z.begin()
	return z, err
}

func (z *compressor) split() error {
	if z.left <= 0 {
		return nil
	}
	z.left--
	err := z.Close()
	if err != nil {
		return err
	}
	z.WriteCloser, err = z.begin()
	return err
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }

// ID returns the ID of an image, read with the standard library's decoders rather than with those that acproxy uses (xz apart, of which
// there is one).
func ID(image []byte) (acproxy.ImageID, error) {
	r, err := open(bytes.NewReader(image))
	if err != nil {
		return acproxy.ImageID{}, err
	}
	hash := sha512.New()
	if _, err := io.Copy(hash, r); err != nil {
		return acproxy.ImageID{}, err
	}
	return acproxy.ImageID(hash.Sum(nil)), nil
}

// Manifest returns the manifest of an image, read by appc's own schema package. Nothing else of the image is checked.
func Manifest(r io.Reader) (*schema.ImageManifest, error) {
	r, err := open(r)
	if err != nil {
		return nil, err
	}
	tr := tar.NewReader(r)
	for {
		header, err := tr.Next()
		if err == io.EOF {
			return nil, errors.New("the image has no manifest")
		}
		if err != nil {
			return nil, err
		}
		if path.Clean(header.Name) != "manifest" {
			continue
		}
		data, err := io.ReadAll(io.LimitReader(tr, 1<<20))
		if err != nil {
			return nil, err
		}
		m := schema.BlankImageManifest()
		if err := m.UnmarshalJSON(data); err != nil {
			return nil, err
		}
		return m, nil
	}
}

// Labels returns a manifest's labels as a map.
func Labels(labels types.Labels) map[string]string {
	m := make(map[string]string)
	for _, l := range labels {
		m[l.Name.String()] = l.Value
	}
	return m
}

func open(r io.Reader) (io.Reader, error) {
	br := bufio.NewReader(r)
	head, err := br.Peek(6)
	if err != nil {
		return nil, err
	}
	switch magic := string(head); {
	case strings.HasPrefix(magic, "\x1f\x8b"):
		return gzip.NewReader(br)
	case strings.HasPrefix(magic, "BZh"):
		return bzip2.NewReader(br), nil
	case strings.HasPrefix(magic, "\xfd7zXZ"):
		return xz.NewReader(br)
	}
	return br, nil
}

//go:embed testdata/bzip2.aci
var bzip2Image []byte

// Bzip2 returns an image compressed by bzip2, and what is in it: example.com/bzip2, version 1.0.0, linux, amd64.
func Bzip2() ([]byte, Spec) {
	return slices.Clone(bzip2Image), Spec{
		Name:   "example.com/bzip2",
		Labels: map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"},
		Files:  map[string]string{"etc/motd": strings.Repeat("compressed by bzip2\n", 1000)},
	}
}
