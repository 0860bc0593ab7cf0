package e2e

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/test/node"
)

// isolated is a side that dials nobody.
const isolated = "offline: true"

// exported stops a scene's server and exports from its store.
func (s *scene) exported(bundle string, args ...string) string {
	s.t.Helper()
	s.server().end(sigterm)
	code, out := s.cli(append([]string{"export", bundle}, args...)...)
	if code != 0 {
		s.t.Fatalf("acproxy export = %d\n%s", code, out)
	}
	return out
}

// imports takes a bundle in, which has to end with an exit code.
func (s *scene) imports(want int, args ...string) string {
	s.t.Helper()
	code, out := s.cli(append([]string{"import"}, args...)...)
	if code != want {
		s.t.Errorf("acproxy import = %d, want %d\n%s", code, want, out)
	}
	return out
}

func TestAirGap(t *testing.T) {
	t.Parallel()
	connected, other := newScene(t, ""), stage(t, isolated)
	base := connected.publish(large("base", 3<<20))
	spec := app("web")
	spec.Dependencies = []acitest.Dependency{{Name: base.name, Labels: base.labels}}
	web := connected.publish(spec)
	spec.Labels = standard("2.0.0")
	web2 := connected.publish(spec)
	connected.trust(stranger(t), imageHost+"/odd")
	if code, out := connected.cli("reload"); code != 0 {
		t.Fatalf("acproxy reload = %d\n%s", code, out)
	}
	odd := connected.publishAs(app("odd"), stranger(t))
	for _, im := range []image{base, web, web2} {
		connected.fetchAsRkt(connected.node, im)
		connected.inspected(im)
	}
	connected.hold(odd)
	latest := image{name: web.name, labels: map[string]string{"os": "linux", "arch": "amd64"}, aci: web2.aci, sum: web2.sum}
	connected.fetchAsRkt(connected.node, latest)

	bundle := connected.path("monday.tar")
	// The dependency comes along by itself.
	out := connected.exported(bundle, web.name+":1.0.0", web.name, odd.name, "--volume-size", "1MiB", "--parity", "2")
	for _, im := range []image{base, web, web2, odd} {
		if !strings.Contains(out, "carried  "+im.name+":"+im.labels["version"]) {
			t.Errorf("%s isn't carried:\n%s", im.name, out)
		}
	}
	asked := len(connected.publisher.Requests())
	// Two volumes don't arrive.
	for _, name := range []string{".001", ".003"} {
		if err := os.Remove(bundle + name); err != nil {
			t.Fatal(err)
		}
	}
	out = other.imports(3, bundle, "--receipt", other.path("receipt.json"))
	if !strings.Contains(out, "3 images imported") || !strings.Contains(out, "1 refused") || !strings.Contains(out, "rebuilt from parity") {
		t.Errorf("acproxy import says\n%s", out)
	}
	other.start()
	for _, im := range []image{base, web, web2, latest} {
		f := other.fetchAsRkt(other.node, im)
		wantHeader(t, f.Image, "Cache-Status", hit)
	}
	if code := problemCode(other.get(other.direct(odd, "aci"))); code != "offline" {
		t.Errorf("what was refused: problem %q, want that it isn't here", code)
	}
	if _, err := other.node.Discover(odd.name, odd.labels); err == nil {
		t.Error("it has a discovery page for what was refused")
	}

	if now := len(connected.publisher.Requests()); now != asked {
		t.Errorf("the publisher was asked %d times meanwhile", now-asked)
	}

	// The next one brings what has come since, and moves what was the latest.
	connected.start()
	spec.Labels = standard("3.0.0")
	web3 := connected.publish(spec)
	connected.fetchAsRkt(connected.node, web3)
	connected.inspected(web3)
	connected.server().end(sigterm)
	connected.configure("freshness: {ttl: 0s, max_stale: 0s}") // it asks what is the latest each time
	connected.start()
	latest.aci, latest.sum = web3.aci, web3.sum
	connected.fetchAsRkt(connected.node, latest)
	asked = len(connected.publisher.Requests())
	tuesday := connected.path("tuesday.tar")
	out = connected.exported(tuesday, "--prefix", imageHost+"/web", "--since", other.path("receipt.json"))
	if !strings.Contains(out, "written  1 image, ") || !strings.Contains(out, "3 more that the other side has") {
		t.Errorf("a delta: acproxy export says\n%s", out)
	}
	other.server().end(sigterm)
	other.imports(0, tuesday)
	// The old bundle again takes nothing back.
	out = other.imports(3, bundle)
	if !strings.Contains(out, "stays what it is: that was signed later") {
		t.Errorf("the old bundle: acproxy import says\n%s", out)
	}
	other.start()
	for _, im := range []image{base, web, web2, web3, latest} {
		other.fetchAsRkt(other.node, im)
	}
	if now := len(connected.publisher.Requests()); now != asked {
		t.Errorf("the publisher was asked %d times meanwhile", now-asked)
	}
	if n := len(other.publisher.Requests()); n > 0 {
		t.Errorf("the isolated side has asked a publisher: %v", other.publisher.Requests())
	}
	other.server().end(sigterm)
	if code, out := other.cli("fsck"); code != 0 {
		t.Errorf("acproxy fsck = %d\n%s", code, out)
	}
}

// TestAirGapHostileBundle changes a bundle in many ways. Whatever comes of it, the store is in order, and holds nothing but what the publisher published.
func TestAirGapHostileBundle(t *testing.T) {
	t.Parallel()
	connected := newScene(t, "")
	images := []image{connected.publish(large("one", 100<<10)), connected.publish(large("two", 50<<10)), connected.publish(app("three"))}
	for _, im := range images {
		connected.hold(im)
	}
	bundle := connected.path("b.tar")
	connected.exported(bundle, "--all")
	whole := must(os.ReadFile(bundle))(t)
	other := stage(t, isolated)
	random := rand.New(rand.NewPCG(1, 2))
	const tries = 40
	for try := range tries {
		damaged := slices.Clone(whole)
		what := ""
		switch at := random.IntN(len(whole)); try % 5 {
		case 0:
			damaged[at] ^= 1 << random.IntN(8)
			what = fmt.Sprintf("a bit of byte %d flipped", at)
		case 1:
			damaged = damaged[:at]
			what = fmt.Sprintf("cut after %d bytes", at)
		case 2:
			n := min(4096, len(whole)-at)
			clear(damaged[at : at+n])
			what = fmt.Sprintf("%d zeros at byte %d", n, at)
		case 3:
			damaged = append(damaged[:at], whole[at/2:]...)
			what = fmt.Sprintf("bytes from %d on again after %d", at/2, at)
		case 4:
			// Two blocks change places.
			a, b := at/512*512, random.IntN(len(whole))/512*512
			if min(len(whole)-a, len(whole)-b) >= 512 {
				copy(damaged[a:a+512], whole[b:b+512])
				copy(damaged[b:b+512], whole[a:a+512])
			}
			what = fmt.Sprintf("the blocks at %d and %d changed places", a, b)
		}
		file := other.write("damaged.tar", damaged)
		code, out := other.cli("import", file)
		if code != 0 && code != 1 && code != 3 || strings.Contains(out, "panic") {
			t.Errorf("%s: acproxy import = %d\n%s", what, code, out)
		}
		if code == 0 && !slices.Equal(damaged, whole) && try%5 != 0 && try%5 != 4 && try%5 != 2 {
			t.Errorf("%s: nobody notices\n%s", what, out)
		}
	}
	if code, out := other.cli("fsck"); code != 0 {
		t.Errorf("acproxy fsck = %d\n%s", code, out)
	}
	other.imports(0, bundle)
	other.start()
	for _, im := range images {
		other.fetchAsRkt(other.node, im)
	}
	other.server().end(sigterm)
	if code, out := other.cli("images"); code != 0 || !strings.Contains(out, "3 images") {
		t.Errorf("acproxy images = %d\n%s", code, out)
	}
}

// TestStaticSite has the reference client fetch from a tree that any web server can serve.
func TestStaticSite(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	web := s.publish(large("team/web", 200<<10))
	plain := s.publish(acitest.Spec{Name: imageHost + "/plain", Labels: map[string]string{"version": "1+2", "os": "linux", "arch": "amd64"}})
	for _, im := range []image{web, plain} {
		s.hold(im)
	}
	latest := image{name: web.name, labels: map[string]string{"os": "linux", "arch": "amd64"}, aci: web.aci, sum: web.sum}
	s.fetchAsRkt(s.node, latest)
	site := s.path("site")
	s.exported(site, "--format=site", "--all")
	// Nodes that encode nothing could never ask for it.
	s.start()
	s.hold(s.publish(acitest.Spec{Name: imageHost + "/odd", Labels: map[string]string{"version": "%2F", "os": "linux", "arch": "amd64"}}))
	s.server().end(sigterm)
	if code, out := s.cli("export", site, "--format=site", "--all"); code != 3 || !strings.Contains(out, "can't be in the name of a file") {
		t.Errorf("a label with a percent sign: acproxy export = %d\n%s", code, out)
	}

	ca := must(localca.Load(s.path("data", "ca")))(t)
	server := httptest.NewUnstartedServer(http.FileServer(http.Dir(filepath.Join(site, imageHost))))
	server.TLS = &tls.Config{GetCertificate: ca.GetCertificate}
	server.StartTLS()
	t.Cleanup(server.Close)
	n := s.newNode(node.Options{Resolve: func(hostport string) (string, bool) {
		return server.Listener.Addr().(*net.TCPAddr).String(), hostport == imageHost+":443"
	}})
	for _, im := range []image{web, plain, latest} {
		s.fetchAsRkt(n, im)
	}
	keys, err := n.Keys(web.name)
	if err != nil || len(keys) != 1 {
		t.Fatalf("keys: %q, %v", keys, err)
	}
	a := n.Get(s.context(), keys[0], nil, nil)
	if wantStatus(t, a, http.StatusOK) && string(a.Body) != string(s.key.Armored()) && !strings.Contains(string(a.Body), "PUBLIC KEY") {
		t.Errorf("the key at %s is %q", keys[0], a.Body)
	}
	// A name that has no page of its own is asked for at its host, and there is none.
	if _, err := n.Fetch(s.context(), imageHost+"/nothing", standard("1"), nil); err == nil {
		t.Error("what isn't there was fetched")
	}
}
