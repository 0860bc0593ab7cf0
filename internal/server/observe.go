package server

import (
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/tracing"
)

// note records how a request failed for its access line.
func note(w http.ResponseWriter, err error) {
	if rec, ok := w.(*recorder); ok {
		rec.err = err
	}
}

// noteTakenOver records that a connection was taken over after a 200.
func noteTakenOver(w http.ResponseWriter) {
	if rec, ok := w.(*recorder); ok {
		rec.status = http.StatusOK
	}
}

// The kinds of what is asked for, as [Access.Kind] has them.
const (
	KindPage      = "page" // a discovery page
	KindSignature = "signature"
	KindImage     = "image"
	KindPush      = "push" // what is about an upload
	KindOCI       = "oci"  // of the OCI distribution API
	KindOther     = "other"
)

// Kinds are the kinds of what is asked for.
func Kinds() []string {
	return []string{KindPage, KindSignature, KindImage, KindPush, KindOCI, KindOther}
}

// kindOf returns the kind of what an extension stands for.
func kindOf(ext string) string {
	if ext == extSignature {
		return KindSignature
	}
	return KindImage
}

// noteRef records what a request asked for, of which nothing is known yet.
func noteRef(w http.ResponseWriter, kind, ref string) {
	if rec, ok := w.(*recorder); ok {
		rec.kind, rec.ref, rec.steady = kind, ref, false
	}
}

// observe gives every request an ID, refuses loops and writes one access line.
func (s *Server) observe(front Front, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{ResponseWriter: w, id: requestID(r), front: front, kind: KindOther}
		if r.TLS != nil && r.ProtoMajor == 1 {
			rec.buffers = &s.buffers
		}
		rec.Header()[requestIDField] = []string{rec.id}
		brisk, _ := w.(*briskWriter)
		if brisk != nil {
			// The grounds of an answer are those from before it is made.
			brisk.began, brisk.grounds = s.now(), s.grounds()
		}
		if s.cfg.Traces != nil || r.Header[tracing.Header] != nil {
			var span *tracing.Span
			r, span = s.traced(r, rec)
			defer func() {
				if brisk == nil || !brisk.given {
					end(span, r, rec)
				}
			}()
		}
		if s.cfg.Access != nil {
			started := s.now()
			rec.now = s.now
			defer func() {
				if brisk == nil || !brisk.given {
					a := s.said(r, rec, started)
					s.cfg.Access(a)
					if brisk != nil {
						brisk.access = a
					}
				}
			}()
		}
		if via := r.Header["Via"]; via != nil && s.cfg.Via != "" && strings.Contains(strings.Join(via, ","), s.cfg.Via) {
			s.fail(rec, r, problem.WithStatus(http.StatusLoopDetected, &acproxy.Error{
				Kind: acproxy.ErrPublisher, Code: "loop",
				Detail: "this proxy was asked by itself: the name " + r.Host + " resolves to it here too; set dial.hosts or dial.resolver in its configuration so that it finds the publisher",
			}))
			return
		}
		err := s.rates.Load().check(r)
		if err == nil {
			err = s.admit(rec, r)
		}
		if err != nil {
			s.fail(rec, r, err)
			return
		}
		next.ServeHTTP(rec, r)
		switch {
		case brisk == nil:
			s.remember(r, rec)
		case rec.steady && !rec.identified && (rec.status == http.StatusOK || rec.status == http.StatusNotModified) && rec.trace == "" && r.Header[requestIDField] == nil:
			brisk.steady, brisk.image = true, rec.image
		}
	})
}

// traced returns a request that belongs to the trace that it names, or to a new one if traces are exported.
func (s *Server) traced(r *http.Request, rec *recorder) (*http.Request, *tracing.Span) {
	ctx, span := s.cfg.Traces.Request(tracing.Incoming(r.Context(), r.Header), r.Method)
	rec.trace = tracing.ID(ctx)
	return r.WithContext(ctx), span
}

// end ends the span of a request. Neither its URL nor what the client has shown is in it.
func end(span *tracing.Span, r *http.Request, rec *recorder) {
	if span == nil {
		return
	}
	span.Answered(r.Method+" "+rec.kind, rec.status)
	span.Note("acproxy.kind", rec.kind, "client.address", client(r), "acproxy.request_id", rec.id)
	if cache := rec.Header().Get("Cache-Status"); cache != "" {
		span.Note("acproxy.cache", cache)
	}
	if rec.ref != "" && rec.status < http.StatusBadRequest {
		span.Note("acproxy.ref", rec.ref)
	} else if rec.ref != "" {
		// A label may be anything that stood in the URL, a token too. Those of an image that was found are its own.
		name := strings.FieldsFunc(rec.ref, func(c rune) bool { return c == ':' || c == ',' })
		span.Note("acproxy.name", name[0])
	}
	span.Count("http.response.body.size", rec.bytes)
	if rec.status >= http.StatusInternalServerError {
		span.Fail(rec.err)
	} else if code := acproxy.Code(rec.err); code != "" {
		// A server's span has not failed when the client asked for what it can't have.
		span.Note("error.type", code)
	}
	span.End(nil)
}

// requestIDField is the field with the ID of a request, the client's or ours.
const requestIDField = "X-Request-Id"

func requestID(r *http.Request) string {
	id := r.Header.Get(requestIDField)
	if len(id) == 0 || len(id) > 64 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return newRequestID()
	}
	return id
}

// newRequestID returns an ID that no other request has: 128 random bits, in base 32. Nothing is secret about it.
func newRequestID() string {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
	var id [26]byte
	for i := 0; i < len(id); {
		for n, bits := 0, rand.Uint64(); n < 13; n, bits = n+1, bits>>5 { //nolint:gosec // it is to be another one each time, and no more
			id[i] = digits[bits&31]
			i++
		}
	}
	return string(id[:])
}

// Access is what there is to say of a request that was answered.
type Access struct {
	ID, Client, Method, Host, Path, Proto string
	Trace                                 string // the ID of the trace that it belongs to, "" if it belongs to none
	User                                  string // who has shown who he is, "" if nobody was asked
	Status                                int
	Bytes                                 int64         // of the content
	Kind                                  string        // of what was asked for
	FirstByte                             time.Duration // until the answer began
	Took                                  time.Duration
	Cache                                 string // as in Cache-Status
	Verdict                               string // the same in a word, as [Verdicts] has them; "" if the store had no part in it
	Ref                                   string // what was asked for, "" if that was no image
	Err                                   error  // how it failed, nil if it didn't
}

// said returns what there is to say of a request.
func (s *Server) said(r *http.Request, rec *recorder, started time.Time) Access {
	took, first := s.now().Sub(started), time.Duration(0)
	if !rec.headed.IsZero() {
		first = rec.headed.Sub(started)
	}
	cache := rec.Header().Get("Cache-Status")
	return Access{
		Kind: rec.kind, FirstByte: first, Verdict: verdicts[cache],
		ID: rec.id, Trace: rec.trace, Client: client(r), Method: r.Method, Host: r.Host, Path: requestURI(r), Proto: r.Proto, User: rec.who.Name, Status: rec.status, Bytes: rec.bytes, Took: took,
		Cache: cache, Ref: rec.ref, Err: rec.err,
	}
}

// requestURI returns the path and the query that were asked for, as they came.
func requestURI(r *http.Request) string {
	if strings.HasPrefix(r.RequestURI, "/") {
		return r.RequestURI
	}
	return r.URL.RequestURI()
}

// recorder sees the status and the bytes of a response go by, and keeps what else its access line says. It belongs to the request's goroutine.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64

	id    string
	trace string
	kind  string
	ref   string
	err   error

	now    func() time.Time // nil if nobody wants to know when
	headed time.Time        // when the answer began

	front      Front
	who        access.Identity
	wrong      error // with what the client has shown
	identified bool  // who and wrong are set
	private    bool  // what is answered is not for everybody

	steady bool           // what is answered stays the answer, see noteSteady
	image  acproxy.Digest // that was used, if it is

	buffers *sync.Pool // of *[encryptAtOnce]byte, nil where nothing is encrypted by us
}

// Unwrap lets [http.ResponseController] reach the connection.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader is the ResponseWriter's.
func (w *recorder) WriteHeader(status int) {
	if w.status == 0 || w.status < 200 {
		w.begin(status)
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write is the ResponseWriter's.
func (w *recorder) Write(p []byte) (int, error) {
	w.ok()
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// ReadFrom keeps sendfile possible: the connection under a plain HTTP response copies from a file inside the kernel. What is encrypted is read in larger
// pieces than net/http would.
func (w *recorder) ReadFrom(src io.Reader) (n int64, err error) {
	w.ok()
	if w.buffers == nil {
		n, err = io.Copy(w.ResponseWriter, src)
	} else {
		b, ok := w.buffers.Get().(*[encryptAtOnce]byte)
		if !ok {
			b = new([encryptAtOnce]byte)
		}
		n, err = io.CopyBuffer(struct{ io.Writer }{w.ResponseWriter}, struct{ io.Reader }{src}, b[:])
		w.buffers.Put(b)
	}
	w.bytes += n
	return n, err
}

// encryptAtOnce is how much of a file is read at once to be encrypted, in bytes.
const encryptAtOnce = 256 << 10

func (w *recorder) ok() {
	if w.status == 0 {
		w.begin(http.StatusOK)
	}
}

// begin notes the status of an answer, and when it began.
func (w *recorder) begin(status int) {
	w.status = status
	if w.now != nil && status >= 200 {
		w.headed = w.now()
	}
}
