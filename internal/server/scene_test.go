package server

import (
	"log/slog"
	"net"
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

// heldScene is a server that holds example.com/app:1.0.0, for linux and amd64.
type heldScene struct {
	server  *Server
	fetcher *fetch.Fetcher
	finder  *discovery.Finder
	store   *cache.Disk
	keys    *trust.Store
	dirs    trust.Dirs
	dir     string         // of the store
	key     *trusttest.Key // that has signed it
	digest  acproxy.Digest
	etag    string
}

func newHeldScene(tb testing.TB, change func(*Config)) *heldScene {
	tb.Helper()
	must := func(err error) {
		if err != nil {
			tb.Helper()
			tb.Fatal(err)
		}
	}
	pub, err := publisher.Start(publisher.Options{})
	must(err)
	tb.Cleanup(func() { must(pub.Close()) })
	h := &heldScene{dirs: trust.Dirs{Local: tb.TempDir()}}
	h.key, err = trusttest.NewKey(trusttest.Options{})
	must(err)
	labels := map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"}
	_, err = pub.AddSigned(publisher.Image{
		Name: "example.com/app", Labels: labels, ACI: acitest.Must(tb, acitest.Spec{Name: "example.com/app", Labels: labels, RootfsSize: 1 << 20}),
	}, h.key)
	must(err)
	_, err = trust.Add(h.dirs, "example.com", h.key.Armored())
	must(err)
	h.keys, err = trust.Open(h.dirs)
	must(err)
	tb.Cleanup(func() { must(h.keys.Close()) })
	h.dir = tb.TempDir()
	h.store, err = cache.Open(h.dir, cache.Options{Log: slog.New(slog.DiscardHandler)})
	must(err)
	tb.Cleanup(func() { must(h.store.Close()) })
	hosts := map[string]string{"example.com": pub.Addr(), "storage.example.com": pub.Addr()}
	client := web.New(web.Config{
		Rules: []web.Rule{{RootCAs: pub.CAPool()}}, Hosts: hosts, Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
		DialContext: (&net.Dialer{}).DialContext,
	})
	tb.Cleanup(client.Close)
	h.finder = discovery.New(discovery.Config{Web: client})
	tb.Cleanup(func() { must(h.finder.Close()) })
	h.fetcher = fetch.New(fetch.Config{
		Store: h.store, Discovery: h.finder, Web: client, Keyring: h.keys.Current, Policies: heldPolicies, Log: slog.New(slog.DiscardHandler),
	})
	tb.Cleanup(func() { must(h.fetcher.Close()) })
	cfg := Config{Fetcher: h.fetcher, Keyring: h.keys.Current, MaxAge: time.Minute, TTL: time.Hour, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	h.server = New(cfg)
	tb.Cleanup(func() { must(h.server.Close()) })
	ref, err := acproxy.NewRef("example.com/app", labels)
	must(err)
	im, err := h.fetcher.Image(tb.Context(), fetch.Request{Ref: ref})
	must(err)
	defer im.Close()
	must(im.Inspected(tb.Context()))
	h.digest, h.etag = im.Record.Digest, im.ETag
	return h
}

var heldPolicies = []fetch.Policy{{TTL: time.Hour}}
