package aci

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"path"
	"strings"

	"github.com/acproxy/acproxy"
)

// The two names at the top of an image (appc specification, "Image Layout").
const (
	manifestName = "manifest"
	rootfsName   = "rootfs"
)

// An Inspection is what reading a whole image found.
type Inspection struct {
	ID          acproxy.ImageID // the SHA-512 of every byte of the uncompressed tar, padding included
	Compression Compression
	Size        int64 // bytes of the uncompressed tar
	Entries     int   // entries of the tar
	Manifest    Manifest
}

// Inspect reads an image once, to its end, and returns what it is. The rules are the specification's ("Image Archives", "Image Layout"),
// read as appc's own tools read them:
//
//   - a tar, plain or compressed, that ends with the two blocks of zeros that POSIX asks for. Zeros may follow (tar pads to whole records)
//     and belong to the image ID; anything else may not. The marker is asked for in compressed images too, because a gzip cut between two
//     of its members looks whole.
//   - exactly two names at the top: manifest, a regular file, and rootfs, a directory; every other entry is below rootfs, and every hard
//     link points there. Names are cleaned first: ./manifest is the manifest, and ./ itself is of no account. Symbolic links may point
//     anywhere, and devices are allowed.
//   - no name twice, none absolute, none with .. in it.
//
// onManifest, if it isn't nil, is called once, as soon as the manifest is read, wherever in the tar it is and long before the rest; its
// error ends the inspection and is returned as it is. A broken rule is returned as a [*Violation]; an error of r, wrapped, is not one.
// Inspect leaves no goroutine behind, and doesn't read from r after it has returned.
func Inspect(r io.Reader, lim Limits, onManifest func(Manifest) error) (Inspection, error) {
	lim = lim.withDefaults()
	d, how, err := Decompress(r, lim)
	if err != nil {
		return Inspection{}, err
	}
	defer d.Close()
	h := newHashedReader(d)
	defer h.stop()
	s := &scan{lim: lim, onManifest: onManifest, seen: make(map[[16]byte]struct{})}
	if err := s.read(h); err != nil {
		return Inspection{}, err
	}
	return Inspection{ID: h.sum(), Compression: how, Size: h.n, Entries: s.entries, Manifest: *s.manifest}, nil
}

// A scan is the reading of one tar.
type scan struct {
	lim        Limits
	onManifest func(Manifest) error
	entries    int
	manifest   *Manifest
	rootfs     bool
	// seen holds 16 bytes of each name's SHA-256 instead of the names, which have no bound but their sum. By chance two of a million
	// collide once in 10^26 images; who makes a collision on purpose has his own image refused.
	seen map[[16]byte]struct{}
}

func (s *scan) read(h *hashedReader) error {
	tr := tar.NewReader(h)
	for {
		// Next skips what is left of an entry by the bytes that are there, not by the holes that a sparse file claims.
		header, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return tarError(h, err)
		}
		if s.entries++; s.entries > s.lim.MaxEntries {
			return violation(RuleTooManyEntries, "its tar has more than %d entries", s.lim.MaxEntries)
		}
		if err := s.entry(header, tr, h); err != nil {
			return err
		}
	}
	if err := readPadding(h); err != nil {
		return err
	}
	switch {
	case s.manifest == nil:
		return violation(RuleNoManifest, "its tar has %d entries and none is called manifest", s.entries)
	case !s.rootfs:
		return violation(RuleNoRootfs, "its tar has no entry for the directory rootfs")
	}
	return nil
}

// entry judges one entry, and reads it if it is the manifest.
func (s *scan) entry(header *tar.Header, body io.Reader, h *hashedReader) error {
	name, err := cleanName(header.Name, header.Name)
	if err != nil {
		return err
	}
	if err := checkType(header); err != nil {
		return err
	}
	if name == manifestName && s.manifest != nil {
		return violationAt(header.Name, RuleSecondManifest, "an image has one manifest")
	}
	sum := sha256.Sum256([]byte(name))
	key := [16]byte(sum[:])
	if _, twice := s.seen[key]; twice {
		return violationAt(header.Name, RuleDuplicateEntry, "an entry of this name came before")
	}
	s.seen[key] = struct{}{}
	isDir := header.Typeflag == tar.TypeDir
	switch {
	case name == manifestName:
		return s.readManifest(header, body, h)
	case name == rootfsName && !isDir:
		return violationAt(header.Name, RuleRootfsDirectory, "it is of tar type %q", header.Typeflag)
	case name == rootfsName:
		s.rootfs = true
	case name == "." && isDir:
	case !inRootfs(name):
		return violationAt(header.Name, RuleOutsideRootfs, "only manifest and rootfs may stand at the top of an image")
	}
	return nil
}

// checkType refuses entries that are no files, and hard links to what isn't in rootfs. A hard link's target is a name in the same tar.
func checkType(header *tar.Header) error {
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo, tar.TypeCont, tar.TypeGNUSparse:
		return nil
	case tar.TypeLink:
		target, err := cleanName(header.Linkname, header.Name)
		if err != nil {
			return err
		}
		if !inRootfs(target) {
			return violationAt(header.Name, RuleOutsideRootfs, "it is a hard link to %q", clip(header.Linkname))
		}
		return nil
	}
	// A global header among them: tools differ in whether it renames the entries that follow.
	return violationAt(header.Name, RuleUnsupported, "tar type %q is not a file, a link, a directory or a device", header.Typeflag)
}

func (s *scan) readManifest(header *tar.Header, body io.Reader, h *hashedReader) error {
	if header.Typeflag != tar.TypeReg {
		return violationAt(header.Name, RuleManifestFile, "it is of tar type %q, not a regular file", header.Typeflag)
	}
	if header.Size > s.lim.MaxManifest {
		return violationAt(header.Name, RuleManifestTooLarge, "it has %d bytes, the limit is %d", header.Size, s.lim.MaxManifest)
	}
	var raw bytes.Buffer
	if _, err := io.Copy(&raw, body); err != nil {
		return tarError(h, err)
	}
	m, err := readManifest(raw.Bytes())
	if err != nil {
		return err
	}
	s.manifest = &m
	if s.onManifest == nil {
		return nil
	}
	return s.onManifest(m)
}

// readPadding reads what follows the entries: the end-of-archive marker has been read already, unless the tar ended without.
func readPadding(h *hashedReader) error {
	if h.ended {
		return tarError(h, io.ErrUnexpectedEOF)
	}
	room := make([]byte, 4<<10)
	for {
		n, err := h.Read(room)
		for _, c := range room[:n] {
			if c != 0 {
				return violation(RuleTrailingBytes, "something other than zeros follows the end of the tar, before byte %d of it", h.n)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return tarError(h, err)
		}
	}
}

// tarError returns what to tell of a tar that can't be read on. What went wrong below the tar comes first.
func tarError(h *hashedReader, err error) error {
	switch {
	case h.err != nil && h.err != io.EOF:
		return h.err
	case err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF):
		return violation(RuleTruncated, "its tar ends after %d bytes without an end-of-archive marker", h.n)
	}
	return violation(RuleBadTar, "near byte %d of its tar: %v", h.n, err)
}

// cleanName returns a name without the . and doubled slashes that change nothing.
func cleanName(name, entry string) (string, error) {
	if strings.HasPrefix(name, "/") {
		return "", violationAt(entry, RuleAbsolutePath, "%q begins with a slash", clip(name))
	}
	for segment := range strings.SplitSeq(name, "/") {
		if segment == ".." {
			return "", violationAt(entry, RuleDotDot, "%q goes up", clip(name))
		}
	}
	return path.Clean(name), nil
}

func inRootfs(name string) bool { return strings.HasPrefix(name, rootfsName+"/") }
