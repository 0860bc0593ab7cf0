package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/acpush"
	"github.com/acproxy/acproxy/internal/problem"
)

// PushPath is where uploads begin, followed by the name of the image.
const PushPath = Root + "push/"

// uploadsPath is where the parts of uploads go. No name of an image begins with a dash.
const uploadsPath = PushPath + "-/"

// maxVerdict bounds what a client says in the end, in bytes.
const maxVerdict = 64 << 10

// push answers acpush 0.0.1:
//
//	POST /.acproxy/push/NAME?version=1.0&os=linux      begins an upload, and says where its parts go
//	PUT  /.acproxy/push/-/ID/manifest                  and signature, and image, in any order
//	POST /.acproxy/push/-/ID/completed                 asks for the verdict
//
// The protocol's own client takes 200 and 400 for answers, and prints the number of anything else. So who may not push, or not this name, gets the status that
// says so; whatever goes wrong with an upload after that is a 400 with the reason, which this client shows.
func (s *Server) push(w http.ResponseWriter, r *http.Request) error {
	path := r.URL.EscapedPath()
	id, part, ok := strings.Cut(strings.TrimPrefix(path, uploadsPath), "/")
	switch {
	case !strings.HasPrefix(path, uploadsPath):
		return only(s.beginUpload, http.MethodPost)(w, r)
	case !ok || !isUploadID(id):
		return s.unknown(w, r)
	case part == partCompleted:
		return withContent(w, r, http.MethodPost, func() error { return s.completeUpload(w, r, id) })
	case part == partManifest, part == partSignature, part == partImage:
		return withContent(w, r, http.MethodPut, func() error { return s.takePart(w, r, id, part) })
	}
	return s.unknown(w, r)
}

// The parts of an upload, by the ends of their URLs.
const (
	partManifest  = "manifest"
	partSignature = "signature"
	partImage     = "image"
	partCompleted = "completed"
)

// withContent refuses all methods but one, which may come with content.
func withContent(w http.ResponseWriter, r *http.Request, method string, do func() error) error {
	if r.Method == method {
		return do()
	}
	w.Header().Set("Allow", method)
	return problem.WithStatus(http.StatusMethodNotAllowed, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "method-not-allowed", Detail: r.Method + " is not possible here"})
}

// bySocket is the key of a request that came by the socket of operators, whose users may do everything.
type bySocket struct{}

// PushHandler returns what answers acpush at the socket of operators.
func (s *Server) PushHandler() http.Handler {
	next := s.Handler(Front{})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), bySocket{}, true)))
	})
}

// socketClient is what clients that came by the socket are called.
const socketClient = "admin.socket"

// mayPush returns who a client is if it may publish the images of a name, else why it may not.
func (s *Server) mayPush(w http.ResponseWriter, r *http.Request, name string) (who string, err error) {
	if r.Context().Value(bySocket{}) != nil {
		return socketClient, nil
	}
	id, wrong := s.identify(w, r)
	guard := s.cfg.Guard
	switch {
	case guard == nil || guard.Open():
		return "", &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "not-allowed",
			Detail: "nobody may push here, because no rule of access.rules says who may: write one, or use acproxy push on the server's own machine",
		}
	case guard.May(id, access.Push, name):
		return id.Name, nil
	case id.Name == "":
		return "", s.challenge(w, r, wrong, "who wants to push "+name+" has to show who it is")
	}
	return "", &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-allowed", Detail: fmt.Sprintf("%s may not push %s: no rule of access.rules says so", id.Name, name)}
}

func (s *Server) beginUpload(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(strings.TrimPrefix(r.URL.EscapedPath(), PushPath))
	if err != nil {
		return err
	}
	ref, err := directRef(name, r.URL.RawQuery)
	if err != nil {
		return err
	}
	noteRef(w, KindPush, ref.String())
	who, err := s.mayPush(w, r, name)
	if err != nil {
		return err
	}
	if err := s.cfg.Fetcher.Publishable(name); err != nil {
		return err
	}
	u, err := s.uploads.begin(ref, who, client(r))
	if err != nil {
		return err
	}
	at := s.ownBase(r) + uploadsPath + u.id + "/"
	return answerJSON(w, http.StatusOK, acpush.Start{
		Version: acpush.Version, ManifestURL: at + partManifest, SignatureURL: at + partSignature, ImageURL: at + partImage, CompletedURL: at + partCompleted,
	})
}

// uploadOf returns the upload that a request is about, if its client may push it and is the one that began it.
func (s *Server) uploadOf(w http.ResponseWriter, r *http.Request, id string) (*upload, error) {
	u := s.uploads.get(id)
	if u == nil {
		return nil, &verdictError{&acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: "no-such-upload", Detail: "this upload is not known: it took longer than push.timeout, or the server was started again since; push again",
		}, ""}
	}
	noteRef(w, KindPush, u.ref.String())
	who, err := s.mayPush(w, r, u.ref.Name())
	if err != nil {
		return nil, err
	}
	if who != u.who {
		return nil, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-allowed", Detail: "this upload is somebody else's"}
	}
	return u, nil
}

// verdictError is an error that is answered as acpush has it.
type verdictError struct {
	error
	reason string // what the client has said
}

// Unwrap returns the cause.
func (e *verdictError) Unwrap() error { return e.error }

// failUpload answers as acpush has it for what is wrong with an upload, and leaves other errors to the caller.
func (s *Server) failUpload(w http.ResponseWriter, r *http.Request, err error) error {
	var v *verdictError
	if !errors.As(err, &v) {
		return err
	}
	if left(r) {
		panic(http.ErrAbortHandler)
	}
	note(w, err)
	text, _, _ := strings.Cut(v.Error(), "\n")
	if problem.StatusOf(v.error) == http.StatusInternalServerError {
		s.log.Error("an upload failed", "err", err)
		text = "something is wrong inside this proxy; its log says what"
	}
	return answerJSON(w, http.StatusBadRequest, acpush.Verdict{Reason: v.reason, ServerReason: text, Code: acproxy.Code(v.error)})
}

// takePart receives a part of an upload.
func (s *Server) takePart(w http.ResponseWriter, r *http.Request, id, part string) error {
	u, err := s.uploadOf(w, r, id)
	if err == nil {
		// Each part of it has to come within the patience for a client that does nothing.
		body := &patientBody{r.Body, http.NewResponseController(w), s.cfg.Patience.Stall}
		if err = u.take(part, body, r.ContentLength); err == nil {
			return answerJSON(w, http.StatusOK, acpush.Verdict{Success: true})
		}
		err = &verdictError{err, ""}
	}
	return s.failUpload(w, r, err)
}

// completeUpload says what becomes of an upload.
func (s *Server) completeUpload(w http.ResponseWriter, r *http.Request, id string) error {
	u, err := s.uploadOf(w, r, id)
	if err != nil {
		return s.failUpload(w, r, err)
	}
	var said acpush.Verdict
	text, err := io.ReadAll(io.LimitReader(&patientBody{r.Body, http.NewResponseController(w), s.cfg.Patience.Stall}, maxVerdict+1))
	if err == nil && (len(text) > maxVerdict || json.Unmarshal(text, &said) != nil) {
		err = acproxy.Invalid("what ends an upload is {\"success\": true} or {\"success\": false, \"reason\": \"…\"}")
	}
	if err != nil {
		return s.failUpload(w, r, &verdictError{err, ""})
	}
	if !said.Success {
		why := u.giveUp()
		return answerJSON(w, http.StatusOK, acpush.Verdict{Reason: said.Reason, ServerReason: why})
	}
	taken, err := u.complete(r.Context())
	if err != nil {
		return s.failUpload(w, r, &verdictError{err, said.Reason})
	}
	return answerJSON(w, http.StatusOK, acpush.Verdict{Success: true, Published: Published(taken)})
}

// Published returns what is said of an image that was published.
func Published(t fetch.Taken) *acpush.Details {
	d := &acpush.Details{
		Image: t.Record.Name, Digest: t.Record.Digest, ImageID: t.Record.ImageID, Size: t.Record.Size, Held: t.Held, Kept: t.Kept, Warning: t.Record.RktWarning,
	}
	if ref, err := acproxy.NewRef(t.Record.Name, t.Record.Labels); err == nil {
		d.Image = ref.String()
	}
	for _, signer := range t.Record.Signers {
		d.Signers = append(d.Signers, signer.Fingerprint)
	}
	return d
}

// answerJSON answers with a value in JSON.
func answerJSON(w http.ResponseWriter, status int, value any) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(value); err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, err := w.Write(body.Bytes())
	return gone(err)
}

// ownBase returns the scheme and host of what must not be sent in clear where the client came by TLS: those that it used, or public_url if that is https.
func (s *Server) ownBase(r *http.Request) string {
	if u := s.cfg.PublicURL; u != nil && u.Scheme == "https" {
		return s.publicBase(r)
	}
	return requestScheme(r) + "://" + r.Host
}

// readManifest reads a manifest, of so many bytes at most.
func readManifest(body io.Reader, limit int64) (aci.Manifest, error) {
	text, err := readPart(body, limit, "manifest", "fetch.limits.max_manifest")
	if err != nil {
		return aci.Manifest{}, err
	}
	return aci.ReadManifest(text)
}

func readPart(body io.Reader, limit int64, what, key string) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = &acproxy.Error{Kind: acproxy.ErrInvalid, Code: what + "-too-large", Detail: fmt.Sprintf("the %s is longer than %d bytes, the limit that %s sets", what, limit, key)}
	}
	return text, err
}
