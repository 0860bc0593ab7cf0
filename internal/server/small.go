package server

import (
	"bytes"
	"maps"
	"net/http"
	"strconv"
	"time"
)

// small is an answer that is kept as it is sent: its bytes, and the fields of its header, ready to be shared by all who ask. Nobody may change it once it
// was served.
type small struct {
	header http.Header
	body   []byte
}

func newSmall(contentType, etag string, body []byte) *small {
	return &small{header: http.Header{
		"Content-Type": {contentType}, "Etag": {etag}, "Accept-Ranges": {"bytes"}, "Content-Length": {strconv.Itoa(len(body))},
	}, body: body}
}

// conditions are the fields by which a request asks for something other than all of it, whatever it has (RFC 9110, sections 13 and 14).
var conditions = []string{"Range", "If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "If-Range"}

// serve sends the answer, or what a conditional request gets of it.
func (a *small) serve(w http.ResponseWriter, r *http.Request, modified time.Time) {
	h := w.Header()
	maps.Copy(h, a.header)
	if rec, ok := w.(*recorder); ok && rec.private && a.header["Cache-Control"] != nil {
		h["Cache-Control"] = []string{"private, " + a.header["Cache-Control"][0]}
	}
	for _, field := range conditions {
		if r.Header[field] != nil {
			delete(h, "Content-Length")
			http.ServeContent(w, r, "", modified, bytes.NewReader(a.body))
			return
		}
	}
	if !modified.IsZero() {
		h["Last-Modified"] = []string{modified.UTC().Format(http.TimeFormat)}
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	_, err := w.Write(a.body)
	_ = gone(err)
}
