package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestDiscoveryPage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	const at = "https://storage.example.com/"
	for _, tt := range []struct {
		name      string
		image     string // of example.com
		templates []publisher.Tag
		want      []string // the tags, with $ for where acproxy is and its path of images
	}{
		{
			"one template", "one",
			[]publisher.Tag{{Prefix: "example.com/one", URL: at + "{name}-{version}-{os}-{arch}.{ext}"}},
			[]string{"example.com/one ${name}.{ext}?version={version}&os={os}&arch={arch}"},
		},
		{
			"templates with the same variables", "same",
			[]publisher.Tag{
				{Prefix: "example.com/same", URL: at + "a/{name}/{version}/{os}/{arch}.{ext}"},
				{Prefix: "example.com/same", URL: at + "b/{arch}/{os}/{version}/{name}.{ext}"},
			},
			[]string{"example.com/same ${name}.{ext}?version={version}&os={os}&arch={arch}"},
		},
		{
			"templates with different variables, in the publisher's order", "different",
			[]publisher.Tag{
				{Prefix: "example.com/different", URL: at + "{name}/{version}.{ext}"},
				{Prefix: "example.com/different", URL: at + "{name}/{version}/{os}/{arch}.{ext}"},
				{Prefix: "example.com/different", URL: at + "again/{name}/{version}.{ext}"},
				{Prefix: "example.com/different", URL: at + "{name}/{channel}/{version}.{ext}"},
			},
			[]string{
				"example.com/different ${name}.{ext}?version={version}",
				"example.com/different ${name}.{ext}?version={version}&os={os}&arch={arch}",
				"example.com/different ${name}.{ext}?channel={channel}&version={version}",
			},
		},
		{
			"no name, no labels", "fixed",
			[]publisher.Tag{{Prefix: "example.com/fixed", URL: at + "the-image.{ext}"}},
			[]string{"example.com/fixed $example.com/fixed.{ext}"},
		},
		{
			"a prefix that is shorter than the name", "short/app",
			[]publisher.Tag{{Prefix: "example.com/short", URL: at + "{name}-{version}.{ext}"}},
			[]string{"example.com/short ${name}.{ext}?version={version}"},
		},
		{
			"prefixes of others", "mine",
			[]publisher.Tag{
				{Prefix: "example.com/min", URL: at + "wrong/{name}.{ext}"},
				{Prefix: "example.com/other", URL: at + "wrong/{name}.{ext}"},
				{Prefix: "example.com/mine", URL: at + "{name}-{version}.{ext}"},
			},
			[]string{"example.com/mine ${name}.{ext}?version={version}"},
		},
		{
			"what could end a tag", "quote",
			[]publisher.Tag{{Prefix: "example.com/quote", URL: at + "{name}.{ext}?a=\"><script>alert(1)</script>&b={version}"}},
			[]string{"example.com/quote ${name}.{ext}?version={version}"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := imageHost + "/" + tt.image
			s.publisher.SetPage(publisher.Page{Path: name, Templates: tt.templates})
			a := s.get("https://" + name + "?ac-discovery=1")
			if !wantStatus(t, a, http.StatusOK) {
				return
			}
			want := make([]string, len(tt.want))
			for i, tag := range tt.want {
				want[i] = strings.Replace(tag, "$", "https://"+imageHost+"/.acproxy/images/", 1)
			}
			if got := tagsOf(t, a.Body)["ac-discovery"]; !slices.Equal(got, want) {
				t.Errorf("tags\n%q, want\n%q", got, want)
			}
			if bytes.Contains(a.Body, []byte("<script>")) {
				t.Error("the publisher's script is on the page")
			}
			wantHeader(t, a, "Content-Type", "text/html; charset=utf-8")

			endpoints, err := s.node.Discover(name, standard("1.0.0"))
			if err != nil || len(endpoints) == 0 {
				t.Fatalf("the reference client finds %v, %v", endpoints, err)
			}
			if !strings.HasPrefix(endpoints[0].Image, "https://"+imageHost+"/.acproxy/images/"+name+".aci") {
				t.Errorf("the reference client finds %s", endpoints[0].Image)
			}
			if first, _, _ := strings.Cut(endpoints[0].Image, ".aci"); endpoints[0].Signature != strings.Replace(endpoints[0].Image, first+".aci", first+".aci.asc", 1) {
				t.Errorf("the reference client finds the signature at %s", endpoints[0].Signature)
			}
		})
	}
}

func TestDiscoveryPageTellsKeys(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	second := must(trusttest.NewKey(trusttest.Options{Name: "Second"}))(t)
	s.trust(second, "example.com/app")
	for name, opts := range map[string]trusttest.Options{
		"an Ed25519 key": {Algorithm: trusttest.EdDSA},
		"an ECDSA key":   {Algorithm: trusttest.ECDSA},
		"an expired key": {Created: time.Now().Add(-48 * time.Hour), Expires: time.Now().Add(-time.Hour)},
	} {
		t.Log("trusting", name)
		s.trust(must(trusttest.NewKey(opts))(t), imageHost)
	}
	s.trust(stranger(t), "example.com/apple")
	s.start()
	im := s.publish(app("app"))
	urls, err := s.node.Keys(im.name)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, u := range urls {
		a := s.get(u)
		wantStatus(t, a, http.StatusOK)
		keys, err := node.ReadKeys(a.Body)
		if err != nil || len(keys) != 1 {
			t.Errorf("%s holds %d keys, %v: rkt reads exactly one of a file", u, len(keys), err)
			continue
		}
		got = append(got, fmt.Sprintf("%x", keys[0].PrimaryKey.Fingerprint))
	}
	slices.Sort(got)
	want := []string{s.key.Fingerprint(), second.Fingerprint()}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("keys %q, want those that rkt can read and that are valid: %q", got, want)
	}
	page := s.get("https://" + im.name + "?ac-discovery=1")
	for _, tag := range tagsOf(t, page.Body)["ac-discovery-pubkeys"] {
		prefix, _, _ := strings.Cut(tag, " ")
		if prefix != imageHost && prefix != "example.com/app" {
			t.Errorf("the tag %q has another prefix than those that the keys are trusted for", tag)
		}
	}
}

func TestDiscoveryOfParentPage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	spec := app("deep/down/app")
	im := s.publish(spec)
	// Only the host's own page knows, as with most publishers.
	s.publisher.SetPage(publisher.Page{Path: im.name})
	s.publisher.SetPage(publisher.Page{Path: imageHost, Templates: []publisher.Tag{{Prefix: imageHost, URL: im.published.Template}}})
	s.fetchAsRkt(s.node, im)
}

func TestDiscoveryFails(t *testing.T) {
	t.Parallel()
	s := newScene(t, "{dial: {timeout: 500ms}, allow: [example.com, example.org]}")
	page := func(name string) node.Answer { return s.get("https://" + imageHost + "/" + name + "?ac-discovery=1") }
	t.Run("nobody publishes the name", func(t *testing.T) {
		a := page("nothing/here")
		wantStatus(t, a, http.StatusNotFound)
		for _, tried := range []string{"https://example.com/nothing/here?ac-discovery=1", "https://example.com/nothing?ac-discovery=1", "https://example.com?ac-discovery=1"} {
			if !strings.Contains(string(a.Body), `"url": "`+tried+`"`) {
				t.Errorf("the trace doesn't tell of %s:\n%s", tried, a.Body)
			}
		}
	})
	t.Run("the page answers 500", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/broken*"), publisher.Fault{Status: 500})
		a := page("broken/app")
		wantStatus(t, a, http.StatusBadGateway)
		if n := s.publisher.Count("example.com/broken"); n != 0 {
			t.Errorf("the parent page was asked for %d times: an outage is no reason to climb", n)
		}
	})
	t.Run("the page takes too long", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/slow*"), publisher.Fault{Delay: time.Hour})
		wantStatus(t, page("slow/app"), http.StatusGatewayTimeout)
	})
	t.Run("the connection is closed", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/closed*"), publisher.Fault{CloseConnection: true})
		wantStatus(t, page("closed/app"), http.StatusBadGateway)
	})
	t.Run("the page leads to this machine", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/inward*"), publisher.Fault{RedirectTo: "https://127.0.0.1:22/"})
		if a := page("inward/app"); a.Err != nil || a.Status != 403 && a.Status != 502 {
			t.Errorf("%s, want a refusal", described(a))
		}
	})
	t.Run("the page goes on for ever", func(t *testing.T) {
		s.publisher.SetPage(publisher.Page{Path: "example.com/endless", HTML: "<html>"})
		s.publisher.Misbehave(publisher.URL("example.com/endless*"), publisher.Fault{EndlessBody: true})
		wantStatus(t, page("endless"), http.StatusBadGateway)
	})
	t.Run("the page redirects in a circle", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/circle*"), publisher.Fault{RedirectLoop: true})
		wantStatus(t, page("circle"), http.StatusBadGateway)
	})
	t.Run("a name that isn't allowed", func(t *testing.T) {
		a := s.get(s.plain() + "/.acproxy/images/example.net/app.aci?version=1")
		wantProblem(t, a, http.StatusForbidden, "name-not-allowed")
	})
	t.Run("a publisher whose certificate nobody here trusts", func(t *testing.T) {
		s.configure("dial: {hosts: {example.org: $TLS}}")
		s.restart(sigterm)
		a := s.get(s.plain() + "/.acproxy/images/example.org/app.aci?version=1")
		wantStatus(t, a, http.StatusBadGateway)
		if !strings.Contains(a.Detail(), "certificate") {
			t.Errorf("the reason is %q, want one about the certificate", a.Detail())
		}
	})
	t.Run("the publisher is down", func(t *testing.T) {
		s.publisher.Stop()
		wantProblem(t, page("another"), http.StatusBadGateway, "publisher-unreachable")
	})
}

func TestPublicURL(t *testing.T) {
	t.Parallel()
	// The fast path: discovery over TLS, the images over plain http.
	s := stage(t, "public_url: http://images.example.com")
	s.start()
	im := s.publish(large("app", 300<<10))
	f := s.fetchAsRkt(s.node, im)
	if !strings.HasPrefix(f.Endpoint.Image, "http://images.example.com/.acproxy/images/example.com/app.aci?") {
		t.Errorf("discovery points to %s, want the public URL", f.Endpoint.Image)
	}
	urls, err := s.node.Keys(im.name)
	if err != nil || len(urls) != 1 || !strings.HasPrefix(urls[0], "https://"+imageHost+"/") {
		t.Errorf("keys at %q, %v: rkt reads keys over https only", urls, err)
	}
}

func TestFixedTemplates(t *testing.T) {
	t.Parallel()
	s := newScene(t, `publishers: [{prefix: example.com, ca_file: $CA, templates: ["https://storage.example.com/{name}/{version}/{os}/{arch}/image.{ext}"]}]`)
	im := s.publish(app("app"))
	s.fetchAsRkt(s.node, im)
	wantImage(t, s.get(im.published.URL), im)
	if n := s.publisher.Count("example.com/*"); n != 0 {
		t.Errorf("the publisher was asked for discovery %d times, want never", n)
	}
}

// TestKeysThatRktCannotReadComeLast shows trust.publish: all.
func TestKeysThatRktCannotReadComeLast(t *testing.T) {
	s := stage(t, "trust: {publish: all}")
	unreadable := must(trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA}))(t)
	s.trust(unreadable, imageHost)
	second := must(trusttest.NewKey(trusttest.Options{Name: "Second"}))(t)
	s.trust(second, imageHost)
	s.start()
	im := s.publish(app("app"))
	urls, err := s.node.Keys(im.name)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(urls); n != 3 || !strings.HasSuffix(urls[n-1], unreadable.Fingerprint()+".asc") {
		t.Errorf("the page lists %q, want three keys, the last of them %s", urls, unreadable.Fingerprint())
	}
	// The page that was made before is not the one that is given.
	s.reloads("", `trust.publish: "all" → "rkt-readable"`)
	if urls, err = s.node.Keys(im.name); err != nil || len(urls) != 2 {
		t.Errorf("with trust.publish: rkt-readable the page lists %q, %v", urls, err)
	}
}
