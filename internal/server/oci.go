package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/oci"
	"github.com/acproxy/acproxy/internal/problem"
)

// ociPath is where the OCI distribution API is (OCI distribution specification 1.1, "API"). An image that is called HOST/v2/… has its discovery page all the same,
// which has a query of its own, and what ends as an image or a signature does is a publisher's URL.
const ociPath = "/v2/"

// ociRequest is a path of the OCI distribution API taken apart.
type ociRequest struct {
	name string // "" for the root of the API
	kind string // one of the OCI constants
	what string // the tag or digest
}

const (
	ociRoot      = ""
	ociManifests = "manifests"
	ociBlobs     = "blobs"
	ociTags      = "tags"
	ociReferrers = "referrers"
)

// readOCI takes a path of the OCI distribution API apart. ok reports whether it is one.
func readOCI(r *http.Request) (o ociRequest, ok bool) {
	rest, ok := strings.CutPrefix(r.URL.EscapedPath(), ociPath)
	switch {
	case strings.HasSuffix(rest, "."+extImage), strings.HasSuffix(rest, "."+extSignature):
		return o, false
	case !ok:
		return o, r.URL.EscapedPath() == strings.TrimSuffix(ociPath, "/")
	case rest == "":
		return o, true
	}
	if name, ok := strings.CutSuffix(rest, "/tags/list"); ok {
		return ociRequest{name, ociTags, ""}, true
	}
	if i := strings.Index(rest, "/blobs/uploads/"); i >= 0 {
		return ociRequest{rest[:i], ociBlobs, "uploads"}, true
	}
	rest, what, ok := cutLast(rest, "/")
	if !ok {
		return o, false
	}
	name, kind, ok := cutLast(rest, "/")
	if !ok || kind != ociManifests && kind != ociBlobs && kind != ociReferrers {
		return o, false
	}
	return ociRequest{name, kind, what}, true
}

// isOCI matches requests of the OCI distribution API.
func (s *Server) isOCI(r *http.Request, _ *mux.RouteMatch) bool {
	if s.cfg.OCI == nil || !strings.HasPrefix(r.URL.EscapedPath(), strings.TrimSuffix(ociPath, "/")) {
		return false
	}
	_, ok := readOCI(r)
	return ok
}

// oci answers clients of the OCI distribution API: containerd, CRI-O, podman. It is for pulling.
func (s *Server) oci(w http.ResponseWriter, r *http.Request) error {
	// What old clients want to see before they ask for anything.
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	o, _ := readOCI(r)
	if o.kind == ociRoot {
		return s.ociRoot(w, r)
	}
	name, err := ociName(r, o.name)
	if err != nil {
		return err
	}
	noteRef(w, KindOCI, name+ociSeparator(o.what)+o.what)
	q := oci.Query{Name: name, Client: client(r), May: func(name string) error { return s.mayRead(w, r, name) }}
	switch o.kind {
	case ociTags:
		return s.ociTags(w, r, q)
	case ociManifests:
		c, err := s.cfg.OCI.Manifest(discovery.For(r.Context(), q.Client), q, o.what, acceptsOCI(r))
		if err != nil {
			return err
		}
		return s.serveOCI(w, r, c)
	case ociBlobs:
		digest, err := acproxy.ParseDigest(o.what)
		if err != nil {
			return err
		}
		c, err := s.cfg.OCI.Blob(r.Context(), q, digest)
		if err != nil {
			return err
		}
		return s.serveOCI(w, r, c)
	}
	// Nothing refers to an image here, and an API without this one is answered the same by clients (OCI distribution specification 1.1, "Listing Referrers").
	return s.unknown(w, r)
}

func ociSeparator(what string) string {
	switch {
	case what == "":
		return ""
	case strings.Contains(what, ":"):
		return "@"
	}
	return ":"
}

// ociRoot says that the API is here. Clients that show who they are only when they are asked for it learn here how to, so they are asked where there is anything
// that not everybody may have.
func (s *Server) ociRoot(w http.ResponseWriter, r *http.Request) error {
	noteRef(w, KindOCI, "")
	if guard := s.cfg.Guard; guard != nil && !guard.Public() {
		if who, wrong := s.identify(w, r); who.Name == "" {
			return s.challenge(w, r, wrong, "not everything here is for everybody")
		}
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-cache")
	_, err := io.WriteString(w, "{}\n")
	return gone(err)
}

// ociName returns the name of the appc image that a repository is. containerd says beside it for which registry it takes us (ns), and leaves that out of the
// repository; whoever comes by the registry's name itself leaves it out, too. It is a word to look up, and nothing that is dialled.
func ociName(r *http.Request, repository string) (string, error) {
	repository, err := url.PathUnescape(repository)
	if err != nil {
		return "", acproxy.Invalid("the path is not percent-encoded properly: %v", err)
	}
	name := repository
	if ns := r.URL.Query().Get("ns"); ns != "" {
		name = hostname(ns) + "/" + repository
	} else if first, _, _ := strings.Cut(repository, "/"); !strings.Contains(first, ".") {
		name = requestHost(r) + "/" + repository
	}
	return name, acproxy.CheckName(name)
}

// acceptsOCI returns whether a client reads a media type, by its Accept fields.
func acceptsOCI(r *http.Request) func(mediaType string) bool {
	accept := strings.Join(r.Header["Accept"], ",")
	return func(mediaType string) bool { return quality(accept, mediaType) > 0 }
}

// serveOCI sends a document or a layer.
func (s *Server) serveOCI(w http.ResponseWriter, r *http.Request, c *oci.Content) error {
	h, settings := w.Header(), s.settings.Load()
	h["Cache-Status"] = cacheStatus(c.Status)
	h["Cache-Control"] = settings.maxAge
	switch {
	case c.Partial:
		h["Cache-Control"] = []string{"no-cache"}
	case c.Latest:
		h["Cache-Control"] = settings.maxAgeLatest
	}
	if rec, ok := w.(*recorder); ok && rec.private {
		h["Cache-Control"] = []string{"private, " + h["Cache-Control"][0]}
	}
	etag := `"` + c.Digest.String() + `"`
	h.Set("Etag", etag)
	h.Set("Docker-Content-Digest", c.Digest.String())
	h.Set("Vary", "Accept")
	if tags := r.Header.Get("If-None-Match"); tags != "" && slices.ContainsFunc(strings.Split(tags, ","), func(t string) bool {
		t = strings.TrimPrefix(strings.TrimSpace(t), "W/")
		return t == etag || t == "*"
	}) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Type", c.MediaType)
	h.Set("Repr-Digest", reprDigest(c.Digest))
	h.Set("Accept-Ranges", "bytes")
	span := ociSpan(r, c)
	if span.status == http.StatusRequestedRangeNotSatisfiable {
		h.Del("Content-Type")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", c.Size))
		h.Set("Content-Length", "0")
		w.WriteHeader(span.status)
		return nil
	}
	if r.Method == http.MethodGet {
		if err := c.Open(r.Context()); err != nil {
			return err
		}
		defer c.Close()
	}
	if span.contentRange != "" {
		h.Set("Content-Range", span.contentRange)
	}
	h.Set("Content-Length", strconv.FormatInt(span.to-span.from, 10))
	w.WriteHeader(span.status)
	if r.Method == http.MethodHead || span.from == span.to {
		return nil
	}
	return s.sendOCI(r.Context(), w, c, span)
}

// sendOCI sends a part of a content.
func (s *Server) sendOCI(ctx context.Context, w http.ResponseWriter, c *oci.Content, span span) error {
	if file := c.File(); file != nil {
		_, err := file.Seek(span.from, io.SeekStart)
		if err == nil {
			_, err = io.CopyN(w, file, span.to-span.from)
		}
		if err != nil {
			note(w, err)
			panic(http.ErrAbortHandler)
		}
		return nil
	}
	to := &part{w: w, skip: span.from, left: span.to - span.from}
	_, err := c.Send(ctx, to)
	if errors.Is(err, errPartWritten) {
		err = nil
	}
	if err == nil && to.left > 0 {
		err = fmt.Errorf("%v has %d bytes less than it had", c.Digest, to.left)
	}
	if err != nil {
		// Never a clean end.
		note(w, err)
		if !to.gone {
			s.log.Error("sending an OCI blob", "digest", c.Digest, "err", err)
		}
		panic(http.ErrAbortHandler)
	}
	return nil
}

// ociSpan decides what part of a content a request gets: one range of it, if it asks for one and has its version right, else all.
func ociSpan(r *http.Request, c *oci.Content) span {
	all := span{status: http.StatusOK, to: c.Size}
	rng, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ok || strings.Contains(rng, ",") || r.Method != http.MethodGet {
		return all
	}
	if by := r.Header.Get("If-Range"); by != "" && by != `"`+c.Digest.String()+`"` {
		return all
	}
	first, last, ok := strings.Cut(rng, "-")
	if !ok {
		return all
	}
	from, err := strconv.ParseUint(first, 10, 62)
	to := uint64(c.Size)
	switch {
	case first == "":
		n, err := strconv.ParseUint(last, 10, 62)
		if err != nil {
			return all
		}
		if n == 0 {
			return span{status: http.StatusRequestedRangeNotSatisfiable}
		}
		from = to - min(n, to)
	case err != nil:
		return all
	case last != "":
		n, err := strconv.ParseUint(last, 10, 62)
		if err != nil || n < from {
			return all
		}
		to = min(to, n+1)
	}
	if from >= uint64(c.Size) {
		return span{status: http.StatusRequestedRangeNotSatisfiable}
	}
	return span{
		status: http.StatusPartialContent, from: int64(from), to: int64(to), //nolint:gosec // no more than Size
		contentRange: fmt.Sprintf("bytes %d-%d/%d", from, to-1, c.Size),
	}
}

// part is a writer that lets a part of what is written through, and then ends the writing.
type part struct {
	w          io.Writer
	skip, left int64
	gone       bool // the client
}

var errPartWritten = errors.New("the part that was asked for is written")

// Write writes what belongs to the part.
func (p *part) Write(b []byte) (int, error) {
	all := len(b)
	n := min(p.skip, int64(len(b)))
	p.skip -= n
	b = b[n:]
	b = b[:min(p.left, int64(len(b)))]
	if len(b) > 0 {
		n, err := p.w.Write(b)
		p.left -= int64(n)
		if err != nil {
			p.gone = true
			return 0, err
		}
	}
	if p.left == 0 {
		return all, errPartWritten
	}
	return all, nil
}

// ociTags lists the tags of what is held of a name, from the one after last on, at most n of them.
func (s *Server) ociTags(w http.ResponseWriter, r *http.Request, q oci.Query) error {
	tags, err := s.cfg.OCI.Tags(q)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	if last := query.Get("last"); last != "" {
		at, there := slices.BinarySearch(tags, last)
		if there {
			at++
		}
		tags = tags[at:]
	}
	if query.Has("n") {
		n, err := strconv.Atoi(query.Get("n"))
		if err != nil || n < 0 {
			return acproxy.Invalid("n=%.32q is no number of tags", query.Get("n"))
		}
		if n < len(tags) {
			tags = tags[:n]
			if n > 0 {
				next := url.Values{"n": {strconv.Itoa(n)}, "last": {tags[n-1]}}
				if ns := query.Get("ns"); ns != "" {
					next.Set("ns", ns)
				}
				w.Header().Set("Link", "<"+r.URL.EscapedPath()+"?"+next.Encode()+`>; rel="next"`)
			}
		}
	}
	o, _ := readOCI(r)
	body, err := json.Marshal(struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{o.name, append([]string{}, tags...)})
	if err != nil {
		return err
	}
	h := w.Header()
	h["Cache-Status"] = cacheStatus(fetch.Hit)
	h.Set("Cache-Control", "no-cache")
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(body)
	return gone(err)
}

// ociErrors is an error as clients of the OCI distribution API read it (OCI distribution specification 1.1, "Error Codes"): the problem is the detail.
type ociErrors struct {
	Errors []ociError `json:"errors"`
}

type ociError struct {
	Code    string          `json:"code"`
	Message string          `json:"message"`
	Detail  problem.Problem `json:"detail"`
}

// ociProblem returns the body of an answer to a request of the OCI distribution API.
func ociProblem(kind string, p problem.Problem) []byte {
	code := "UNKNOWN"
	switch p.Status {
	case http.StatusUnauthorized:
		code = "UNAUTHORIZED"
	case http.StatusForbidden:
		code = "DENIED"
	case http.StatusTooManyRequests:
		code = "TOOMANYREQUESTS"
	case http.StatusMethodNotAllowed:
		code = "UNSUPPORTED"
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		code = "UNAVAILABLE"
	case http.StatusBadRequest:
		code = map[string]string{ociManifests: "MANIFEST_INVALID", ociBlobs: "DIGEST_INVALID"}[kind]
		if code == "" {
			code = "NAME_INVALID"
		}
	case http.StatusNotFound:
		code = map[string]string{ociManifests: "MANIFEST_UNKNOWN", ociBlobs: "BLOB_UNKNOWN"}[kind]
		if code == "" {
			code = "NAME_UNKNOWN"
		}
	}
	body, err := json.Marshal(ociErrors{[]ociError{{code, p.Detail, p}}})
	if err != nil {
		// As with [problem.Problem.JSON].
		return []byte(`{"errors":[{"code":"UNKNOWN"}]}`)
	}
	return append(body, '\n')
}
