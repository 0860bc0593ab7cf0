package server

import (
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
)

const mesosPath = Root + "mesos/"

// recompressedHeader says, on an image that was not published as gzip, what it was published as. Its signature doesn't fit the bytes sent; its
// image ID does.
const recompressedHeader = "X-Acproxy-Recompressed-From"

// mesos answers simple discovery as Mesos does it: {name}-{version}-{os}-{arch}.aci under a prefix.
func (s *Server) mesos(w http.ResponseWriter, r *http.Request) error {
	path, ext, err := splitExt(strings.TrimPrefix(r.URL.EscapedPath(), mesosPath))
	if err != nil {
		return err
	}
	refs, err := simpleRefs(path, func(name string) bool { return s.reads(w, r, name) && s.cfg.Fetcher.Knows(name) })
	if err != nil {
		return err
	}
	if ext == extSignature {
		return s.firstOf(w, r, refs, ext)
	}
	var first error
	for _, ref := range refs {
		err := s.serveGzip(w, r, ref)
		if err == nil || left(r) {
			return err
		}
		// Of several readings of a URL the likeliest one's error is told, but rather what is wrong with an image than that there is none.
		if first == nil || errors.Is(first, acproxy.ErrNotFound) && !errors.Is(err, acproxy.ErrNotFound) && !errors.Is(err, acproxy.ErrPublisher) {
			first = err
		}
	}
	return first
}

// maxSimpleRefs bounds how many readings of one simple-discovery URL are tried.
const maxSimpleRefs = 8

// simpleRefs returns what {name}-{version}-{os}-{arch} may mean, the likeliest first. os and arch hold no dash, names and versions may. Names that
// known says something is held or known of go first; then versions that look like one (a digit, or v and a digit, or latest) before others; then
// longer names.
func simpleRefs(path string, known func(name string) bool) ([]acproxy.Ref, error) {
	notSimple := acproxy.Invalid("%.128q is not {name}-{version}-{os}-{arch}, as simple discovery has it", path)
	rest, arch, ok := cutLast(path, "-")
	if !ok {
		return nil, notSimple
	}
	rest, os, ok := cutLast(rest, "-")
	if !ok {
		return nil, notSimple
	}
	type reading struct {
		ref  acproxy.Ref
		rank int
	}
	var readings []reading
	for i := len(rest) - 1; i > 0; i-- {
		if rest[i] != '-' {
			continue
		}
		name, version := rest[:i], rest[i+1:]
		ref, err := acproxy.NewRef(name, map[string]string{acproxy.LabelVersion: version, acproxy.LabelOS: os, acproxy.LabelArch: arch})
		if err != nil || version == "" {
			continue
		}
		rank := 0
		if known(name) {
			rank += 2
		}
		if looksLikeVersion(version) {
			rank++
		}
		readings = append(readings, reading{ref, rank})
	}
	if len(readings) == 0 {
		return nil, notSimple
	}
	// Stable, and the readings begin with the longest name.
	slices.SortStableFunc(readings, func(a, b reading) int { return b.rank - a.rank })
	var refs []acproxy.Ref
	for _, reading := range readings[:min(len(readings), maxSimpleRefs)] {
		refs = append(refs, reading.ref)
	}
	return refs, nil
}

func looksLikeVersion(s string) bool {
	s = strings.TrimPrefix(s, "v")
	return s == "latest" || s != "" && s[0] >= '0' && s[0] <= '9'
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// serveGzip sends an image as gzip, as published if it was published so, else compressed on the way. Whether that is needed is known only once
// the image is held.
func (s *Server) serveGzip(w http.ResponseWriter, r *http.Request, ref acproxy.Ref) error {
	noteRef(w, KindImage, ref.String())
	if err := s.mayRead(w, r, ref.Name()); err != nil {
		return err
	}
	im, err := s.cfg.Fetcher.Image(r.Context(), fetch.Request{Ref: ref, Client: client(r)})
	if err != nil {
		return err
	}
	defer im.Close()
	if err := im.Inspected(r.Context()); err != nil {
		return err
	}
	s.cacheHeader(w, im.Status, ref)
	if im.Record.Compression == string(aci.Gzip) {
		return s.serveImage(w, r, im)
	}
	plain, _, err := aci.Decompress(im.File(), aci.Limits{})
	if err != nil {
		return err
	}
	defer plain.Close()
	h := w.Header()
	imageHeader(w, im)
	h.Del("ETag")
	h.Del("Accept-Ranges")
	h.Set(recompressedHeader, im.Record.Compression)
	h.Set("X-Appc-Image-Id", im.Record.ImageID.String())
	if r.Method == http.MethodHead {
		return nil
	}
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err = io.Copy(zip, plain); err == nil {
		err = zip.Close()
	}
	return gone(err)
}
