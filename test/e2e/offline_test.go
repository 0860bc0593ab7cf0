package e2e

import (
	"bytes"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// everything checks that all there is of held images is served, through every door, without asking the publisher.
func (s *scene) everything(t *testing.T, images ...image) {
	t.Helper()
	before := s.publisher.Count("*")
	for _, im := range images {
		s.fetchAsRkt(s.node, im)
		s.fetchAsRkt(s.proxied(node.Options{HTTP2: true}), im)
		for _, url := range []string{
			s.direct(im, "aci"), s.plain() + "/.acproxy/images/" + im.id.String() + ".aci", im.published.URL,
			s.plain() + "/.acproxy/mesos/" + im.name + "-1.0.0-linux-amd64.aci",
		} {
			a := s.get(url)
			wantImage(t, a, im)
			wantHeader(t, a, "Cache-Status", hit)
		}
		wantStatus(t, s.get(im.published.SignatureURL), http.StatusOK)
		if a := s.get("http://" + im.name + "?ac-discovery=1"); wantStatus(t, a, http.StatusOK) && len(tagsOf(t, a.Body)["ac-discovery"]) != 1 {
			t.Errorf("the discovery page of %s has no tag", im.name)
		}
	}
	if n := s.publisher.Count("*"); n != before {
		t.Errorf("the publisher was asked %d times for what is held", n-before)
	}
}

func TestPublisherIsGone(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	small, big := s.publish(app("small")), s.publish(large("big", 1<<20))
	for _, im := range []image{small, big} {
		s.hold(im)
	}
	s.publisher.Stop()
	t.Run("the same server", func(t *testing.T) { s.everything(t, small, big) })
	for _, tt := range []struct {
		name   string
		signal syscall.Signal
		spoil  func(t *testing.T)
	}{
		{"after a restart", sigterm, nil},
		{"after kill -9", sigkill, nil},
		{"after the index was lost", sigterm, func(t *testing.T) {
			if err := os.Remove(s.path("data", "store", "index.db")); err != nil {
				t.Fatal(err)
			}
		}},
		{"after the index was cut", sigkill, func(t *testing.T) {
			if err := os.Truncate(s.path("data", "store", "index.db"), 5000); err != nil {
				t.Fatal(err)
			}
		}},
		{"after the index was overwritten", sigterm, func(t *testing.T) {
			if err := os.WriteFile(s.path("data", "store", "index.db"), bytes.Repeat([]byte("nonsense"), 10_000), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.server().end(tt.signal)
			if tt.spoil != nil {
				tt.spoil(t)
			}
			s.start()
			s.everything(t, small, big)
		})
	}
	t.Run("what isn't held", func(t *testing.T) {
		wantStatus(t, s.get(s.plain()+"/.acproxy/images/example.com/small.aci?version=2.0.0&os=linux&arch=amd64"), http.StatusBadGateway)
		wantProblem(t, s.get("https://example.com/never-asked-for?ac-discovery=1"), http.StatusBadGateway, "publisher-unreachable")
	})
}

func TestOffline(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	s.server().end(sigterm)
	s.configure("{offline: true, freshness: {ttl: 0s, max_stale: 0s}, discovery: {positive_ttl: 0s}}")
	s.start()
	s.publisher.ClearRequests()
	s.everything(t, im)
	// Without a version: what is held is as good as it gets.
	wantImage(t, s.get(s.plain()+"/.acproxy/images/"+im.name+".aci?os=linux&arch=amd64"), im)
	for _, path := range []string{"/.acproxy/images/example.com/app.aci?version=2.0.0&os=linux&arch=amd64", "/.acproxy/images/example.com/other.aci"} {
		wantProblem(t, s.get(s.plain()+path), http.StatusNotFound, "offline")
	}
	wantProblem(t, s.get("https://example.com/other?ac-discovery=1"), http.StatusNotFound, "offline")
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times although acproxy is offline", n)
	}
	conn, a := s.connect("www.example.org:443")
	if conn != nil {
		_ = conn.Close()
	}
	if a.Status < 400 {
		t.Errorf("a tunnel was opened: %s", described(a))
	}
}

func TestKeyIsTakenBack(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	other := must(trusttest.NewKey(trusttest.Options{}))(t)
	s.trust(other, imageHost)
	spec := app("others")
	spec.Labels = standard("1.0.0")
	others := s.publishAs(spec, other)
	s.hold(im)
	eventually(t, "the second key is seen", func() bool { return s.get(s.direct(others, "aci")).Status == http.StatusOK })
	s.publisher.Stop()

	code, out := s.cli("trust", "rm", "--prefix", imageHost, s.key.Fingerprint())
	if code != 0 {
		t.Fatalf("trust rm = %d\n%s", code, out)
	}
	removed := time.Now()
	eventually(t, "the image is refused", func() bool { return s.get(s.direct(im, "aci")).Status == http.StatusForbidden })
	if took := time.Since(removed); took > time.Second && !testtools.Raced {
		t.Errorf("it took %v until the key no longer counted, want a second at most", took)
	}
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "unknown-key")
	wantProblem(t, s.get(s.direct(im, "aci.asc")), http.StatusForbidden, "unknown-key")
	wantStatus(t, s.do(http.MethodHead, s.direct(im, "aci")), http.StatusForbidden)
	wantStatus(t, s.get(s.direct(im, "aci"), "Range", "bytes=0-9"), http.StatusForbidden)
	wantStatus(t, s.get(s.plain()+"/.acproxy/images/"+im.id.String()+".aci"), http.StatusForbidden)
	wantStatus(t, s.get(s.plain()+"/.acproxy/mesos/"+im.name+"-1.0.0-linux-amd64.aci"), http.StatusForbidden)
	wantStatus(t, s.get(s.plain()+"/.acproxy/keys/"+s.key.Fingerprint()+".asc"), http.StatusNotFound)
	wantImage(t, s.get(s.direct(others, "aci")), others)

	file := s.write("key.asc", s.key.Armored())
	if code, out := s.cli("trust", "add", "--prefix", imageHost, "--fingerprint", s.key.Fingerprint(), file); code != 0 {
		t.Fatalf("trust add = %d\n%s", code, out)
	}
	eventually(t, "the image is served again", func() bool { return s.get(s.direct(im, "aci")).Status == http.StatusOK })
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

func TestKeyIsAddedAfterRefusal(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publishAs(app("app"), stranger(t))
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "unknown-key")
	file := s.write("key.asc", stranger(t).Armored())
	if code, out := s.cli("trust", "add", "--prefix", im.name, "--fingerprint", stranger(t).Fingerprint(), file); code != 0 {
		t.Fatalf("trust add = %d\n%s", code, out)
	}
	eventually(t, "the image is served", func() bool { return s.get(s.direct(im, "aci")).Status == http.StatusOK })
}

// latest returns the URL of an image without a version.
func (s *scene) latest(im image) string {
	return s.plain() + "/.acproxy/images/" + im.name + ".aci?os=linux&arch=amd64"
}

func TestLatestIsAskedForAgain(t *testing.T) {
	t.Parallel()
	s := newScene(t, "freshness: {ttl: 0s, max_stale: 0s}")
	version := func(v string) image {
		spec := large("app", 100<<10)
		spec.Labels, spec.Seed = standard(v), uint64(len(v)*1000)+uint64(v[0])
		return s.publish(spec)
	}
	first := version("1.0.0")
	wantImage(t, s.get(s.latest(first)), first)
	again := s.get(s.latest(first))
	wantImage(t, again, first)
	wantHeader(t, again, "Cache-Status", "acproxy; hit; detail=REVALIDATED")
	wantHeader(t, again, "Cache-Control", "no-cache")
	if n := s.publisher.Count("storage.example.com/example.com/app/latest/linux/amd64/image.aci"); n != 1 {
		t.Errorf("the publisher was asked for the image %d times, want once: the signature says that it is the same", n)
	}

	second := version("2.0.0")
	changed := s.get(s.latest(second))
	wantImage(t, changed, second)
	wantStatus(t, s.get(strings.Replace(s.latest(second), ".aci?", ".aci.asc?", 1)), http.StatusOK)
	if was, err := http.ParseTime(again.Header.Get("Last-Modified")); err == nil {
		if now, err := http.ParseTime(changed.Header.Get("Last-Modified")); err != nil || !now.After(was) {
			t.Errorf("Last-Modified %q after %q: rkt takes other bytes under the same URL only with a later one", changed.Header.Get("Last-Modified"), again.Header.Get("Last-Modified"))
		}
	}
	// The version that was latest is still there.
	wantImage(t, s.get(s.direct(first, "aci")), first)

	t.Run("the publisher is down", func(t *testing.T) {
		s.publisher.Stop()
		a := s.get(s.latest(second))
		wantImage(t, a, second)
		wantHeader(t, a, "Cache-Status", "acproxy; hit; detail=STALE")
		if err := s.publisher.Resume(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestLatestIsGone(t *testing.T) {
	t.Parallel()
	s := newScene(t, "{freshness: {ttl: 0s, max_stale: 0s}, discovery: {negative_ttl: 0s}}")
	im := s.publish(app("app"))
	wantImage(t, s.get(s.latest(im)), im)
	s.publisher.Misbehave(publisher.URL("storage.*"), publisher.Fault{Status: 404})
	wantImage(t, s.get(s.latest(im)), im)
	a := s.get(s.latest(im))
	wantImage(t, a, im)
	wantHeader(t, a, "Cache-Status", "acproxy; hit; detail=GONE")
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

func TestLatestIsFresh(t *testing.T) {
	t.Parallel()
	s := newScene(t, "freshness: {ttl: 1h}")
	im := s.publish(app("app"))
	wantImage(t, s.get(s.latest(im)), im)
	before := s.publisher.Count("*")
	for range 3 {
		a := s.get(s.latest(im))
		wantImage(t, a, im)
		wantHeader(t, a, "Cache-Status", hit)
	}
	if n := s.publisher.Count("*"); n != before {
		t.Errorf("the publisher was asked %d times within the time to live", n-before)
	}
}

func TestLatestIsRefreshedBehind(t *testing.T) {
	t.Parallel()
	s := newScene(t, "freshness: {ttl: 0s, max_stale: 1h}")
	im := s.publish(app("app"))
	wantImage(t, s.get(s.latest(im)), im)
	trouble := s.publisher.Misbehave(publisher.URL("storage.*.asc"), publisher.Fault{StallAfter: publisher.At(1)})
	a := s.get(s.latest(im))
	wantImage(t, a, im)
	wantHeader(t, a, "Cache-Status", "acproxy; hit; detail=STALE")
	within(t, "the publisher is asked behind", trouble.Stalled())
	trouble.End()
}

func TestVersionThatChanges(t *testing.T) {
	t.Parallel()
	for _, onChange := range []string{"refuse", "follow"} {
		t.Run(onChange, func(t *testing.T) {
			s := newScene(t, "freshness: {ttl: 0s, max_stale: 0s, on_change: "+onChange+"}")
			spec := app("app")
			before := s.publish(spec)
			s.hold(before)
			wantImage(t, s.get(s.latest(before)), before)
			spec.Files = map[string]string{"hello.txt": "something else under the same version"}
			after := s.publish(spec)
			if onChange == "follow" {
				wantImage(t, s.get(s.latest(after)), after)
				wantImage(t, s.get(s.direct(after, "aci")), after)
				return
			}
			if a := s.get(s.latest(after)); a.Err == nil && a.Status == http.StatusOK && a.SHA256 == after.sum {
				t.Error("the changed version was delivered")
			}
			wantImage(t, s.get(s.latest(before)), before)
			wantImage(t, s.get(s.direct(before, "aci")), before)
			eventually(t, "the operator is told", func() bool {
				_, listed := s.cli("refusals")
				return strings.Contains(listed, "changed-upstream")
			})
		})
	}
}

func TestSignatureAndImageBelongTogether(t *testing.T) {
	t.Parallel()
	s := newScene(t, "freshness: {ttl: 0s, max_stale: 0s}")
	spec := large("app", 100<<10)
	first := s.publish(spec)
	wantImage(t, s.get(s.latest(first)), first)
	// A node asks for the signature, latest moves on, the node asks for the image.
	wantStatus(t, s.get(strings.Replace(s.latest(first), ".aci?", ".aci.asc?", 1)), http.StatusOK)
	spec.Labels, spec.Seed = standard("2.0.0"), 77
	second := s.publish(spec)
	wantImage(t, s.get(s.latest(second)), first)
}

func TestSameImageUnderTwoRefsIsFetchedOnce(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 200<<10))
	wantImage(t, s.get(s.direct(im, "aci")), im)
	wantImage(t, s.get(s.latest(im)), im)
	if n := s.publisher.Count("storage.*.aci"); n != 1 {
		t.Errorf("the publisher was asked for the image %d times, want once: the same signature is the same image", n)
	}
}
