package oci

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
)

// Where the files of an image are in its tar (appc specification, "Image Layout").
const rootfs = "rootfs"

// whiteoutPrefix begins the names by which an OCI layer says that something below it is gone (OCI image specification 1.1, "Image Layer Filesystem Changeset").
const whiteoutPrefix = ".wh."

// xattrPrefix begins the PAX records that are extended attributes.
const xattrPrefix = "SCHILY.xattr."

// codeUnconvertible is the code of an image that OCI has no words for.
const codeUnconvertible = "no-oci-image"

// overlayPrefix begins the extended attributes by which overlayfs says that something below is gone; a device of the numbers 0 and 0 says the same. No image has
// them but one that was made of such a directory by mistake, or on purpose.
const overlayPrefix = xattrPrefix + "trusted.overlay."

// unconvertible says why an image can't be had as an OCI image.
func unconvertible(format string, args ...any) error {
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: codeUnconvertible, Detail: fmt.Sprintf(format, args...)}
}

// paths is a pathWhitelist (appc specification, "Image Manifest Schema"): the paths that there are once an image is rendered. nil lets everything through.
type paths struct {
	listed []string // without the slash that they begin with, sorted
	dirs   bool     // every directory is let through: an image's own whitelist is about files alone, to those who render images
}

// newPaths returns what a manifest lists, nil if it lists nothing.
func newPaths(list []string, dirs bool) *paths {
	if len(list) == 0 {
		return nil
	}
	p := &paths{listed: make([]string, len(list)), dirs: dirs}
	for i, name := range list {
		p.listed[i] = strings.TrimPrefix(path.Clean("/"+name), "/")
	}
	slices.Sort(p.listed)
	return p
}

// keeps reports whether something is there once the image is rendered. A directory that leads to something that is listed is there, too.
func (p *paths) keeps(name string, isDir bool) bool {
	switch {
	case p == nil, isDir && p.dirs:
		return true
	case p.has(name):
		return true
	case !isDir:
		return false
	}
	i, _ := slices.BinarySearch(p.listed, name+"/")
	return i < len(p.listed) && strings.HasPrefix(p.listed[i], name+"/")
}

func (p *paths) has(name string) bool {
	_, ok := slices.BinarySearch(p.listed, name)
	return ok
}

// writeLayer writes the files of an appc image as an OCI layer: a tar, not compressed, of what is in rootfs, as far as all the whitelists keep it. The same
// image gives the same bytes for ever: they have a digest that nodes know. image is the blob; the limits bound what comes out of it.
//
// What is written of an entry is its type, name, target, mode, owner, device, extended attributes, and its time in whole seconds. A sparse file has zeros where
// its holes are.
func writeLayer(w io.Writer, image io.Reader, size int64, lim aci.Limits, keep []*paths) error {
	plain, _, err := aci.Decompress(image, lim)
	if err != nil {
		return err
	}
	defer plain.Close()
	in, out := tar.NewReader(plain), tar.NewWriter(w)
	l := layer{in: in, out: out, keep: keep, room: room(size, lim)}
	for {
		header, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("reading the image's tar: %w", err)
		}
		if err := l.entry(header); err != nil {
			return err
		}
	}
	return out.Close()
}

// The defaults of the limits of package aci, as far as they bound sparse files.
const (
	defaultMaxUncompressed = 64 << 30
	defaultMaxRatio        = 200
	defaultRatioFrom       = 10 << 20
)

// room returns how many bytes of files an image of some size may come to. Sparse files can claim any number of zeros; what else there is was bounded when the
// image was inspected.
func room(size int64, lim aci.Limits) int64 {
	if lim.MaxUncompressed == 0 {
		lim.MaxUncompressed = defaultMaxUncompressed
	}
	if lim.MaxRatio == 0 {
		lim.MaxRatio = defaultMaxRatio
	}
	if lim.RatioFrom == 0 {
		lim.RatioFrom = defaultRatioFrom
	}
	return min(lim.MaxUncompressed, max(lim.RatioFrom, int64(lim.MaxRatio*float64(size))))
}

// layer is the writing of one.
type layer struct {
	in   *tar.Reader
	out  *tar.Writer
	keep []*paths
	room int64
}

func (l *layer) keeps(name string, isDir bool) bool {
	for _, p := range l.keep {
		if !p.keeps(name, isDir) {
			return false
		}
	}
	return true
}

// entry writes an entry of the image's tar, which package aci has found in order, if it belongs to the layer.
func (l *layer) entry(from *tar.Header) error {
	name, ok := inRootfs(from.Name)
	if !ok || name != "." && !l.keeps(name, from.Typeflag == tar.TypeDir) {
		return nil
	}
	if strings.HasPrefix(path.Base(name), whiteoutPrefix) {
		return unconvertible("it has a file %.160q, and in an OCI layer a name that begins with %s says that a file is gone", "/"+name, whiteoutPrefix)
	}
	to := &tar.Header{
		Typeflag: from.Typeflag, Name: name, Linkname: from.Linkname, Size: from.Size, Mode: from.Mode, Uid: from.Uid, Gid: from.Gid,
		Uname: from.Uname, Gname: from.Gname, ModTime: from.ModTime.Truncate(time.Second), Devmajor: from.Devmajor, Devminor: from.Devminor,
	}
	for key, value := range from.PAXRecords {
		if strings.HasPrefix(key, xattrPrefix) && !strings.HasPrefix(key, overlayPrefix) {
			if to.PAXRecords == nil {
				to.PAXRecords = make(map[string]string)
			}
			to.PAXRecords[key] = value
		}
	}
	switch from.Typeflag {
	case tar.TypeChar:
		if from.Devmajor == 0 && from.Devminor == 0 {
			return unconvertible("it has a device of the numbers 0 and 0, %.160q, and to today's runtimes that says that a file is gone", "/"+name)
		}
	case tar.TypeDir:
		to.Name += "/"
		to.Size = 0
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		to.Typeflag = tar.TypeReg
	case tar.TypeLink:
		target, _ := inRootfs(from.Linkname)
		if !l.keeps(target, false) {
			return unconvertible("its pathWhitelist keeps %.160q, a hard link to %.160q, and not that", "/"+name, "/"+target)
		}
		to.Linkname = target
		to.Size = 0
	default:
		to.Size = 0
	}
	if l.room -= to.Size; l.room < 0 {
		return unconvertible("its files come to more than its size, and fetch.limits, let one expect: it has a sparse file, %.160q among them, with holes that are too large", "/"+name)
	}
	if err := l.out.WriteHeader(to); errors.Is(err, tar.ErrHeader) || isHeaderError(err) {
		return unconvertible("its entry %.160q can't be written into a tar again: %v", "/"+name, err)
	} else if err != nil {
		return fmt.Errorf("writing %.160q: %w", name, err)
	}
	if to.Size == 0 {
		return nil
	}
	_, err := io.Copy(l.out, l.in)
	if err != nil {
		return fmt.Errorf("writing %.160q: %w", name, err)
	}
	return nil
}

// isHeaderError reports whether a header can't be written, as package tar says it.
func isHeaderError(err error) bool {
	return err != nil && strings.HasPrefix(err.Error(), "archive/tar: cannot encode header")
}

// inRootfs returns the path of an entry below rootfs, "." for that itself. ok reports whether it is there.
func inRootfs(name string) (below string, ok bool) {
	name = path.Clean(name)
	if name == rootfs {
		return ".", true
	}
	return strings.CutPrefix(name, rootfs+"/")
}
