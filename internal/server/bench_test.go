package server

import (
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// BenchmarkAnswers answers the small requests of nodes from what is held, all that net/http does for a connection left out, and the access log, too.
func BenchmarkAnswers(b *testing.B) {
	handler, etag := benchHandler(b)
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

// benchHandler returns the handler of a server that holds example.com/app:1.0.0, and its ETag.
func benchHandler(b *testing.B) (handler http.Handler, etag string) {
	b.Helper()
	must := func(err error) {
		if err != nil {
			b.Helper()
			b.Fatal(err)
		}
	}
	pub, err := publisher.Start(publisher.Options{})
	must(err)
	b.Cleanup(func() { must(pub.Close()) })
	key, err := trusttest.NewKey(trusttest.Options{})
	must(err)
	labels := map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"}
	_, err = pub.AddSigned(publisher.Image{
		Name: "example.com/app", Labels: labels, ACI: acitest.Must(b, acitest.Spec{Name: "example.com/app", Labels: labels, RootfsSize: 1 << 20}),
	}, key)
	must(err)
	dirs := trust.Dirs{Local: b.TempDir()}
	_, err = trust.Add(dirs, "example.com", key.Armored())
	must(err)
	keys, err := trust.Open(dirs)
	must(err)
	b.Cleanup(func() { must(keys.Close()) })
	store, err := cache.Open(b.TempDir(), cache.Options{Log: slog.New(slog.DiscardHandler)})
	must(err)
	b.Cleanup(func() { must(store.Close()) })
	hosts := map[string]string{"example.com": pub.Addr(), "storage.example.com": pub.Addr()}
	client := web.New(web.Config{
		Rules: []web.Rule{{RootCAs: pub.CAPool()}}, Hosts: hosts, Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
		DialContext: (&net.Dialer{}).DialContext,
	})
	b.Cleanup(client.Close)
	finder := discovery.New(discovery.Config{Web: client})
	b.Cleanup(func() { must(finder.Close()) })
	fetcher := fetch.New(fetch.Config{
		Store: store, Discovery: finder, Web: client, Keyring: keys.Current, Policies: []fetch.Policy{{TTL: time.Hour}}, Log: slog.New(slog.DiscardHandler),
	})
	b.Cleanup(func() { must(fetcher.Close()) })
	s := New(Config{
		Fetcher: fetcher, Keyring: keys.Current, MaxAge: time.Minute, TTL: time.Hour, Access: func(Access) {},
		Log: slog.New(slog.DiscardHandler),
	})
	b.Cleanup(func() { must(s.Close()) })
	ref, err := acproxy.NewRef("example.com/app", labels)
	must(err)
	im, err := fetcher.Image(b.Context(), fetch.Request{Ref: ref})
	must(err)
	defer im.Close()
	must(im.Inspected(b.Context()))
	return s.Handler(Front{}), im.ETag
}
