package server

import (
	"net/http"
	"net/url"
	"testing"
)

// BenchmarkAnswers answers the small requests of nodes from what is held, all that net/http does for a connection left out, and the access log, too.
func BenchmarkAnswers(b *testing.B) {
	held := newHeldScene(b, func(c *Config) { c.Access = func(Access) {} })
	handler, etag := held.server.Handler(Front{}), held.etag
	const image = imagesPath + "example.com/app.aci?version=1.0.0&os=linux&arch=amd64"
	for _, bench := range []struct {
		name, path string
		header     http.Header
		status     int
	}{
		{"page", "/app?ac-discovery=1", nil, http.StatusOK},
		{"signature", imagesPath + "example.com/app.aci.asc?version=1.0.0&os=linux&arch=amd64", nil, http.StatusOK},
		{"not modified", image, http.Header{"If-None-Match": {etag}}, http.StatusNotModified},
		{"range", image, http.Header{"Range": {"bytes=100-1123"}}, http.StatusPartialContent},
		{"head", image, nil, http.StatusOK},
	} {
		b.Run(bench.name, func(b *testing.B) {
			u, err := url.Parse(bench.path)
			if err != nil {
				b.Fatal(err)
			}
			method := http.MethodGet
			if bench.name == "head" {
				method = http.MethodHead
			}
			r := (&http.Request{
				Method: method, URL: u, RequestURI: bench.path, Host: "example.com", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, RemoteAddr: "192.0.2.1:1234",
				Header: bench.header,
			}).WithContext(b.Context())
			if r.Header == nil {
				r.Header = http.Header{}
			}
			w := new(discarding)
			b.ReportAllocs()
			for b.Loop() {
				w.header, w.status = make(http.Header), 0
				handler.ServeHTTP(w, r)
			}
			if w.status != bench.status {
				b.Fatalf("%s was answered with %d: %v", bench.path, w.status, w.header)
			}
		})
	}
}

// discarding is a ResponseWriter that keeps the head of an answer.
type discarding struct {
	header http.Header
	status int
}

func (w *discarding) Header() http.Header         { return w.header }
func (w *discarding) WriteHeader(status int)      { w.status = status }
func (w *discarding) Write(p []byte) (int, error) { return len(p), nil }
