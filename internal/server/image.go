package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/trust"
)

const (
	imagesPath = Root + "images/"
	keysPath   = Root + "keys/"

	extImage     = "aci"
	extSignature = "aci.asc"
)

// image answers direct URLs:
//
//	/.acproxy/images/NAME.aci?version=1.0&os=linux      by name and any labels
//	/.acproxy/images/sha512-….aci                       by image ID
//
// and both with .aci.asc for the signature.
func (s *Server) image(w http.ResponseWriter, r *http.Request) error {
	key := requested{r.URL.EscapedPath(), r.URL.RawQuery}
	known, ok := s.refs.Get(key)
	if !ok {
		path, ext, err := splitExt(strings.TrimPrefix(key.path, imagesPath))
		if err != nil {
			return err
		}
		if strings.HasPrefix(path, "sha512-") {
			return s.byImageID(w, r, path, ext)
		}
		ref, err := directRef(path, key.query)
		if err != nil {
			return err
		}
		known = asked{ref, ref.String(), ext}
		if len(key.path)+len(key.query) <= maxMemoURL {
			s.refs.Put(key, known)
		}
	}
	return s.serveKnown(w, r, known)
}

// requested is a URL as it was asked for, asked what that means.
type (
	requested struct{ path, query string }
	asked     struct {
		ref  acproxy.Ref
		text string // the ref's
		ext  string
	}
)

// maxMemoURL is the longest URL that is remembered, in bytes.
const maxMemoURL = 512

// splitExt takes the extension off the end of a path, which it also decodes.
func splitExt(escaped string) (path, ext string, err error) {
	path, err = url.PathUnescape(escaped)
	if err != nil {
		return "", "", acproxy.Invalid("the path is not percent-encoded properly: %v", err)
	}
	for _, ext := range []string{extSignature, extImage} {
		if base, ok := strings.CutSuffix(path, "."+ext); ok {
			return base, ext, nil
		}
	}
	return "", "", acproxy.Invalid("%.128q ends neither in .aci (the image) nor in .aci.asc (its signature)", path)
}

// directRef reads a name and the labels in a query. A plus sign is a plus sign: clients fill versions like 1.0+git into the template as they
// are, and none of them writes a space as a plus.
func directRef(name, rawQuery string) (acproxy.Ref, error) {
	labels := make(map[string]string)
	for pair := range strings.SplitSeq(rawQuery, "&") {
		if pair == "" {
			continue
		}
		rawLabel, rawValue, _ := strings.Cut(pair, "=")
		label, err := url.PathUnescape(rawLabel)
		value, valueErr := url.PathUnescape(rawValue)
		if err := errors.Join(err, valueErr); err != nil {
			return acproxy.Ref{}, acproxy.Invalid("the query is not percent-encoded properly: %v", err)
		}
		if _, twice := labels[label]; twice {
			return acproxy.Ref{}, acproxy.Invalid("the label %.64q is given twice", label)
		}
		labels[label] = value
	}
	return acproxy.NewRef(name, labels)
}

// directPath returns the direct URL's path and query for a ref; directRef reads it.
func directPath(ref acproxy.Ref, ext string) string {
	var query []string
	for label, value := range ref.Labels() {
		query = append(query, label+"="+strings.ReplaceAll(url.QueryEscape(value), "+", "%20"))
	}
	path := imagesPath + ref.Name() + "." + ext
	if len(query) > 0 {
		path += "?" + strings.Join(query, "&")
	}
	return path
}

// serveRef is where all front doors meet that ask for an image or a signature by name.
func (s *Server) serveRef(w http.ResponseWriter, r *http.Request, ref acproxy.Ref, ext string) error {
	return s.serveKnown(w, r, asked{ref, ref.String(), ext})
}

func (s *Server) serveKnown(w http.ResponseWriter, r *http.Request, known asked) error {
	noteRef(w, kindOf(known.ext), known.text)
	ref := known.ref
	if err := s.mayRead(w, r, ref.Name()); err != nil {
		return err
	}
	req := fetch.Request{Ref: ref, Client: client(r)}
	if known.ext == extSignature {
		sig, err := s.cfg.Fetcher.Signature(r.Context(), req)
		if err != nil {
			return err
		}
		if sig.Status == fetch.Hit && ref.Version() != "" && !sig.Image.IsZero() {
			noteSteady(w, sig.Image)
		}
		return s.serveSignature(w, r, ref, sig)
	}
	req.Has = has(r)
	im, err := s.cfg.Fetcher.Image(r.Context(), req)
	if err != nil {
		return err
	}
	defer im.Close()
	if im.Status == fetch.Hit && ref.Version() != "" && !im.Arriving() && im.File() == nil {
		noteSteady(w, im.Record.Digest)
	}
	s.cacheHeader(w, im.Status, ref)
	return s.serveImage(w, r, im)
}

func (s *Server) byImageID(w http.ResponseWriter, r *http.Request, id, ext string) error {
	digits, err := acproxy.ParseImageIDPrefix(id)
	if err != nil {
		return err
	}
	noteRef(w, kindOf(ext), id)
	im, err := s.cfg.Fetcher.ByImageID(r.Context(), digits, func(name string) bool { return s.reads(w, r, name) })
	if err != nil {
		return err
	}
	defer im.Close()
	s.cacheHeader(w, im.Status, acproxy.Ref{})
	if ext == extImage {
		return s.serveImage(w, r, im)
	}
	sig, err := s.cfg.Fetcher.SignatureOf(*im.Record)
	if err != nil {
		return err
	}
	return s.serveSignature(w, r, acproxy.Ref{}, fetch.Signature{Status: im.Status, Bytes: sig, Modified: im.Modified, Digest: im.Record.SignatureDigest})
}

// serveSignature sends a signature in the form that rkt reads: armored.
func (s *Server) serveSignature(w http.ResponseWriter, r *http.Request, ref acproxy.Ref, sig fetch.Signature) error {
	s.cacheHeader(w, sig.Status, ref)
	if sig.Later {
		// rkt knows this: it fetches the image and asks again.
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	served, ok := s.signatures.Get(sig.Digest)
	if !ok {
		armored, err := trust.ArmorSignature(sig.Bytes)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(armored)
		served = newSmall("application/pgp-signature", fmt.Sprintf(`"a-%x"`, sum[:16]), armored)
		served.header["Repr-Digest"] = []string{reprDigest(sum)}
		s.signatures.Put(sig.Digest, served)
	}
	served.serve(w, r, sig.Modified)
	return nil
}

func reprDigest(sum [sha256.Size]byte) string {
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

// cacheHeader says how the answer came about (RFC 9211), and for how long it may be used again.
func (s *Server) cacheHeader(w http.ResponseWriter, status fetch.Status, ref acproxy.Ref) {
	h := w.Header()
	h["Cache-Status"] = cacheStatus(status)
	settings := s.settings.Load()
	h["Cache-Control"] = settings.maxAge
	if !ref.IsZero() && ref.Version() == "" {
		h["Cache-Control"] = settings.maxAgeLatest
	}
	if rec, ok := w.(*recorder); ok && rec.private {
		h["Cache-Control"] = []string{"private, " + h["Cache-Control"][0]}
	}
}

func cacheControl(age time.Duration) []string {
	if age == 0 {
		return []string{"no-cache"}
	}
	return []string{"max-age=" + strconv.Itoa(int(age.Seconds()))}
}

var statuses = map[fetch.Status][]string{
	fetch.Hit:         {"acproxy; hit"},
	fetch.Stale:       {"acproxy; hit; detail=STALE"},
	fetch.Gone:        {"acproxy; hit; detail=GONE"},
	fetch.Revalidated: {"acproxy; hit; detail=REVALIDATED"},
	fetch.Joined:      {"acproxy; fwd=uri-miss; collapsed"},
	fetch.Miss:        {"acproxy; fwd=uri-miss"},
	fetch.Uncached:    {"acproxy; fwd=uri-miss; stored=?0; detail=FULL"},
}

// words are what the statuses are called in one word.
var words = map[fetch.Status]string{
	fetch.Hit: "hit", fetch.Stale: "stale", fetch.Gone: "gone", fetch.Revalidated: "revalidated", fetch.Joined: "joined", fetch.Miss: "miss", fetch.Uncached: "uncached",
}

// verdicts are the words by the value of Cache-Status.
var verdicts = func() map[string]string {
	out := make(map[string]string)
	for status, values := range statuses {
		out[values[0]] = words[status]
	}
	return out
}()

// Verdicts returns the words for how an answer came about: hit, stale, gone and revalidated were held, joined and miss were fetched, uncached was passed on.
func Verdicts() []string { return slices.Sorted(maps.Values(words)) }

// cacheStatus returns the value of Cache-Status, which must not be changed.
func cacheStatus(status fetch.Status) []string { return statuses[status] }

// serveImage sends an image, held or arriving.
func (s *Server) serveImage(w http.ResponseWriter, r *http.Request, im *fetch.Image) error {
	if p := im.Passage(); p != nil {
		return servePassage(w, r, im, p)
	}
	if !strings.HasPrefix(r.Header.Get("Range"), "bytes=") {
		// A unit that nobody knows is to be ignored (RFC 9110 §14.2); ServeContent would answer 416.
		r.Header.Del("Range")
	}
	if im.Arriving() {
		done, err := s.serveArriving(w, r, im)
		if done || err != nil {
			return err
		}
	}
	h, file := w.Header(), im.File()
	for field, values := range s.heldHeader(im) {
		// To who has it already goes a 304, without what is about content (RFC 9110, section 15.4.5).
		if file != nil || field != "Content-Type" && field != "Last-Modified" {
			h[field] = values
		}
	}
	if file == nil {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	http.ServeContent(w, r, "", im.Modified, file)
	return nil
}

// has returns the ETag of the image that a client has already and doesn't want again, "" if it can't be told as simply as that.
func has(r *http.Request) string {
	if tags := r.Header["If-None-Match"]; len(tags) == 1 && r.Header["If-Match"] == nil && r.Header["If-Unmodified-Since"] == nil {
		return tags[0]
	}
	return ""
}

// heldKey is what the header of a held image depends on.
type heldKey struct {
	digest    acproxy.Digest
	etag      string
	modified  int64 // nanoseconds since 1970
	inspected bool
}

// heldHeader returns the fields of the header of a held image, which must not be changed.
func (s *Server) heldHeader(im *fetch.Image) http.Header {
	key := heldKey{im.Record.Digest, im.ETag, im.Modified.UnixNano(), im.Record.Inspected}
	h, ok := s.helds.Get(key)
	if !ok {
		h = imageFields(im)
		h.Set("Repr-Digest", reprDigest(im.Record.Digest))
		if !im.Record.ImageID.IsZero() {
			h.Set("X-Appc-Image-Id", im.Record.ImageID.String())
		}
		s.helds.Put(key, h)
	}
	return h
}

func imageHeader(w http.ResponseWriter, im *fetch.Image) { maps.Copy(w.Header(), imageFields(im)) }

// imageFields returns the fields of the header of every image.
func imageFields(im *fetch.Image) http.Header {
	return http.Header{
		"Content-Type": {"application/octet-stream"}, "Accept-Ranges": {"bytes"}, "Etag": {im.ETag}, "Last-Modified": {im.Modified.UTC().Format(http.TimeFormat)},
	}
}

// serveArriving sends an image while it arrives. It reports false, with nothing sent and the image held by then, for requests that need to know
// the end first.
func (s *Server) serveArriving(w http.ResponseWriter, r *http.Request, im *fetch.Image) (done bool, err error) {
	span, ok := arrivingSpan(r, im)
	if !ok {
		return false, im.Decided(r.Context())
	}
	imageHeader(w, im)
	h := w.Header()
	if span.contentRange != "" {
		h.Set("Content-Range", span.contentRange)
	}
	if span.status != http.StatusOK && span.status != http.StatusPartialContent {
		h.Del("Content-Type")
		if span.status != http.StatusNotModified {
			h.Set("Content-Length", "0")
		}
		w.WriteHeader(span.status)
		return true, nil
	}
	if span.to >= 0 {
		h.Set("Content-Length", strconv.FormatInt(span.to-span.from, 10))
	}
	w.WriteHeader(span.status)
	if r.Method == http.MethodHead {
		return true, nil
	}
	copyArriving(w, r, im, span)
	return true, nil
}

// servePassage sends an image that isn't kept: all of it, whatever range is asked for (RFC 9110, section 14.2, lets a server ignore that).
func servePassage(w http.ResponseWriter, r *http.Request, im *fetch.Image, p io.Reader) error {
	if im.Size < 0 && !r.ProtoAtLeast(1, 1) {
		// HTTP/1.0 can't tell a cut body of unknown length from a whole one, and there is no verdict to wait for without reading it.
		return im.Decided(r.Context())
	}
	imageHeader(w, im)
	w.Header().Del("Accept-Ranges")
	if im.Size >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(im.Size, 10))
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	// The flushing is for clients that look at what comes; the buffer, so that it isn't done for every few bytes.
	flusher, b := http.NewResponseController(w), make([]byte, 128<<10)
	for {
		n, err := p.Read(b)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			if _, err = w.Write(b[:n]); err == nil {
				err = flusher.Flush()
			}
		}
		if err != nil {
			note(w, err)
			panic(http.ErrAbortHandler)
		}
	}
}

// firstPiece is how much a client gets at first of an image that is arriving, in bytes; then it is twice as much each time.
const firstPiece = 64 << 10

// copyArriving sends what may be delivered as it comes. An image that turns out bad never ends cleanly: the connection (the stream, with HTTP/2)
// is cut.
func copyArriving(w http.ResponseWriter, r *http.Request, im *fetch.Image, span span) {
	flusher := http.NewResponseController(w)
	file := im.Growing()
	_, err := file.Seek(span.from, io.SeekStart)
	piece := int64(firstPiece)
	for offset := span.from; err == nil && (span.to < 0 || offset < span.to); {
		// What came so far must not wait in a buffer for what comes next.
		if err = flusher.Flush(); err != nil {
			break
		}
		var upTo int64
		upTo, err = im.Await(r.Context(), offset)
		if err == io.EOF && span.to < 0 {
			return
		}
		if err != nil {
			break
		}
		if span.to >= 0 {
			upTo = min(upTo, span.to)
		}
		var n int64
		n, err = io.CopyN(w, file, min(upTo-offset, piece))
		offset += n
		if piece < math.MaxInt64/2 {
			piece *= 2
		}
		// Everybody's first bytes before anybody's next ones.
		runtime.Gosched()
	}
	if err != nil {
		note(w, err)
		panic(http.ErrAbortHandler)
	}
}

// span is what part of an image a request gets: bytes from to to (excluded; -1 is the unknown end), with a status. Of other statuses than 200 and 206 it is
// none.
type span struct {
	status       int
	from, to     int64
	contentRange string // the field of that name, "" for none
}

// arrivingSpan decides what a request gets of an image that is still arriving: what net/http would answer if all of it were here, so that no answer depends on
// whether it is. It reports false for what needs the whole image first: several ranges, and ranges of an unknown length.
func arrivingSpan(r *http.Request, im *fetch.Image) (span, bool) {
	if im.Size < 0 && !r.ProtoAtLeast(1, 1) {
		// HTTP/1.0 can't tell a cut body of unknown length from a whole one.
		return span{}, false
	}
	if im.Size == 0 {
		// Its head is all of it: there is no byte that could be held back until the verdict.
		return span{}, false
	}
	size := im.Size
	if size < 0 {
		size = math.MaxInt64
	}
	said := &headOnly{header: make(http.Header)}
	said.header.Set("ETag", im.ETag)
	said.header.Set("Content-Type", "application/octet-stream")
	head := r.WithContext(r.Context())
	head.Method = http.MethodHead
	http.ServeContent(said, head, "", im.Modified, sized(size))
	got := span{status: said.status, contentRange: said.header.Get("Content-Range")}
	switch got.status {
	case http.StatusOK:
		got.to = im.Size
		return got, true
	case http.StatusPartialContent:
		var total int64
		_, err := fmt.Sscanf(got.contentRange, "bytes %d-%d/%d", &got.from, &got.to, &total)
		got.to++
		return got, err == nil && im.Size >= 0
	case http.StatusRequestedRangeNotSatisfiable:
		return got, im.Size >= 0
	}
	return got, true
}

// headOnly is a ResponseWriter that keeps the head of an answer.
type headOnly struct {
	header http.Header
	status int
}

// Header returns the answer's header.
func (w *headOnly) Header() http.Header { return w.header }

// WriteHeader keeps the status.
func (w *headOnly) WriteHeader(status int) { w.status = status }

// Write drops what an error says.
func (w *headOnly) Write(p []byte) (int, error) { return len(p), nil }

// sized is content of which nothing but its size is known.
type sized int64

// Seek knows the beginning and the end.
func (n sized) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		offset += int64(n)
	}
	return offset, nil
}

// Read gives nothing.
func (sized) Read([]byte) (int, error) { return 0, io.EOF }

// key answers with one armored public key.
func (s *Server) key(w http.ResponseWriter, r *http.Request) error {
	fingerprint, ok := strings.CutSuffix(strings.TrimPrefix(r.URL.EscapedPath(), keysPath), ".asc")
	if !ok {
		return s.unknown(w, r)
	}
	for _, key := range s.cfg.Keyring().All() {
		if string(key.Fingerprint) != fingerprint {
			continue
		}
		w.Header().Set("Content-Type", "application/pgp-keys")
		w.Header().Set("Cache-Control", "no-cache")
		armored := key.Armored()
		sum := sha256.Sum256(armored)
		w.Header().Set("ETag", fmt.Sprintf(`"k-%x"`, sum[:16]))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(armored))
		return nil
	}
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-key", Detail: "no trusted key has the fingerprint " + fmt.Sprintf("%.80q", fingerprint)}
}
