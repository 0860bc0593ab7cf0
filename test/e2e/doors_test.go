package e2e

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// fetchAsRkt has a node fetch an image by name, and checks that it got the image and that rkt would take it.
func (s *scene) fetchAsRkt(n *node.Node, im image) node.Fetched {
	s.t.Helper()
	keys := must(node.ReadKeys(s.key.Armored()))(s.t)
	f, err := n.Fetch(s.context(), im.name, im.labels, keys)
	if err != nil {
		s.t.Errorf("rkt fetch %s: %v", im.name, err)
		return f
	}
	wantImage(s.t, f.Image, im)
	if f.Signer != s.key.KeyID() {
		s.t.Errorf("rkt fetch %s: signed by %s, want %s", im.name, f.Signer, s.key.KeyID())
	}
	return f
}

func TestHostBasedDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	base := s.publish(large("base", 300<<10))
	web := app("web")
	web.Dependencies = []acitest.Dependency{{Name: base.name, Labels: base.labels}}
	top := s.publish(web)
	for _, tt := range []struct {
		name string
		node node.Options
		want string
	}{
		{"HTTP/2", node.Options{HTTP2: true}, "HTTP/2.0"},
		{"HTTP/1.1", node.Options{}, "HTTP/1.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := s.newNode(tt.node)
			f := s.fetchAsRkt(n, top)
			if f.Image.Proto != tt.want {
				t.Errorf("the image came over %s, want %s", f.Image.Proto, tt.want)
			}
			if got := f.Endpoint.Image; !strings.HasPrefix(got, "https://"+imageHost+"/.acproxy/images/"+top.name+".aci?") {
				t.Errorf("discovery points to %s, want a URL of the host that was asked", got)
			}
			// What rkt does next: it reads the manifest and resolves the dependency by discovery.
			got := must(acitest.Manifest(bytes.NewReader(f.Image.Body)))(t)
			dependency := got.Dependencies[0]
			s.fetchAsRkt(n, image{name: dependency.ImageName.String(), labels: acitest.Labels(dependency.Labels), aci: base.aci, sum: base.sum})
		})
	}
	for _, im := range []image{base, top} {
		if n := s.publisher.Count(im.blob()); n != 1 {
			t.Errorf("the publisher was asked for %s %d times, want once", im.name, n)
		}
	}
}

func TestHostBasedDoorWithGivenCertificate(t *testing.T) {
	t.Parallel()
	s := stage(t, "listen: [{address: '127.0.0.1:0', tls: files, cert_file: $DIR/cert.pem, key_file: $DIR/key.pem}]")
	cert, key := selfSigned(t, imageHost)
	s.write("cert.pem", cert)
	s.write("key.pem", key)
	s.start()
	im := s.publish(app("app"))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	s.fetchAsRkt(s.newNode(node.Options{CAs: pool, HTTP2: true}), im)

	if a := s.get("https://" + imageHost + "/app?ac-discovery=1"); a.Err == nil {
		t.Error("a node that trusts the local CA alone was answered, so the given certificate was not used")
	}
}

// selfSigned returns a certificate for a host that vouches for itself, and its key, in PEM.
func selfSigned(t testing.TB, host string) (cert, key []byte) {
	t.Helper()
	private := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private))(t)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))(t)})
}

func TestHostBasedDoorOverPlainHTTP(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	page := s.get("http://" + imageHost + "/app?ac-discovery=1")
	wantStatus(t, page, http.StatusOK)
	want := im.name + " http://" + imageHost + "/.acproxy/images/" + "{name}.{ext}?version={version}&os={os}&arch={arch}"
	if tags := tagsOf(t, page.Body)["ac-discovery"]; len(tags) != 1 || tags[0] != want {
		t.Fatalf("tags %q, want %q", tags, want)
	}
	at := "http://" + imageHost + directPath(im.name, im.labels, "aci")
	wantImage(t, s.get(at), im)
	wantStatus(t, s.get(strings.Replace(at, ".aci?", ".aci.asc?", 1)), http.StatusOK)
}

func TestHostBasedDoorForAnotherPort(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	// A node whose DNS leads to acproxy on an unusual port puts that port into Host; templates have to keep it.
	n := s.newNode(node.Options{Resolve: func(hostport string) (string, bool) {
		return s.server().address("https"), hostport == imageHost+":8443"
	}})
	page := n.Get(s.context(), "https://"+imageHost+":8443/app?ac-discovery=1", nil, nil)
	wantStatus(t, page, http.StatusOK)
	tags := tagsOf(t, page.Body)["ac-discovery"]
	if len(tags) != 1 || !strings.HasPrefix(tags[0], im.name+" https://"+imageHost+":8443/.acproxy/images/") {
		t.Errorf("tags %q, want one that points to port 8443", tags)
	}
}

func TestDirectDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	for _, ext := range []string{"aci", "aci.asc"} {
		got, head := s.get(s.direct(im, ext)), s.do(http.MethodHead, s.direct(im, ext))
		if !wantStatus(t, got, http.StatusOK) || !wantStatus(t, head, http.StatusOK) {
			continue
		}
		if head.Bytes != 0 {
			t.Errorf("HEAD of %s has a body of %d bytes", ext, head.Bytes)
		}
		for _, name := range []string{"Content-Length", "Etag", "Last-Modified", "Content-Type", "Accept-Ranges"} {
			if got.Header.Get(name) == "" || got.Header.Get(name) != head.Header.Get(name) {
				t.Errorf("%s of %s: GET says %q, HEAD %q", name, ext, got.Header.Get(name), head.Header.Get(name))
			}
		}
	}
	wantImage(t, s.get(s.direct(im, "aci")), im)
	signature := s.get(s.direct(im, "aci.asc"))
	if !strings.HasPrefix(string(signature.Body), "-----BEGIN PGP SIGNATURE-----") {
		t.Errorf("the signature is %q, want an armored one", signature.Body)
	}
	wantImage(t, s.get(s.plain()+"/.acproxy/images/"+im.name+".aci?os=linux&arch=amd64"), im)
	wantImage(t, s.get(s.plain()+"/.acproxy/images/"+im.name+".aci?version=latest&os=linux&arch=amd64"), im)
	// The publisher's only template has a variable for os.
	wantProblem(t, s.get(s.plain()+"/.acproxy/images/"+im.name+".aci?version=1.0.0"), http.StatusNotFound, "no-template")

	noarch := app("noarch")
	noarch.Labels = map[string]string{"version": "1.0.0"}
	everywhere := s.publish(noarch)
	wantImage(t, s.get(s.direct(everywhere, "aci")), everywhere)
	wantImage(t, s.get(s.plain()+"/.acproxy/images/"+everywhere.name+".aci"), everywhere)
}

func TestBinarySignatureIsServedArmored(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	spec := app("app")
	spec.Labels = standard("1.0.0")
	aci := acitest.Must(t, spec)
	im := s.publishImage(publisherImage(spec, aci, s.sign(s.key, aci, trusttest.SignOptions{Binary: true})))
	s.fetchAsRkt(s.node, im)
}

func TestDirectDoorWithHostileLabels(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, tt := range []struct{ name, version, query string }{
		{"a plus sign", "1.0+git", "version=1.0%2Bgit"},
		{"a plus sign, as it is", "1.0+git", "version=1.0+git"},
		{"a slash", "a/b", "version=a%2Fb"},
		{"an ampersand", "a&os=windows", "version=a%26os%3Dwindows"},
		{"a percent sign", "100%", "version=100%25"},
		{"a space", "a b", "version=a%20b"},
		{"a question mark and a hash", "a?b#c", "version=a%3Fb%23c"},
		{"braces", "{name}", "version=%7Bname%7D"},
		{"letters beyond ASCII", "ü", "version=%C3%BC"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := app("hostile")
			spec.Labels = standard(tt.version)
			im := s.publish(spec)
			got := s.get(s.plain() + "/.acproxy/images/" + im.name + ".aci?" + tt.query + "&os=linux&arch=amd64")
			wantImage(t, got, im)
		})
	}
	err := filepath.WalkDir(s.path("data"), func(path string, entry fs.DirEntry, err error) error {
		if strings.Contains(path, "passwd") || strings.Contains(path, "git") || strings.Contains(path, "windows") {
			t.Errorf("a label became the name of %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	t.Run("a label that nobody publishes", func(t *testing.T) {
		wantProblem(t, s.get(s.plain()+"/.acproxy/images/example.com/hostile.aci?version=a%2Fb%2Fc&os=linux&arch=amd64"), http.StatusNotFound, "no-signature-found")
	})
	for _, query := range []string{"version=..%2F..%2Fetc%2Fpasswd", "version=../../etc/passwd", "version=..", "version=a%2F..%2Fb"} {
		t.Run("a path that climbs: "+query, func(t *testing.T) {
			before := s.publisher.Count("storage.*")
			wantProblem(t, s.get(s.plain()+"/.acproxy/images/example.com/hostile.aci?"+query+"&os=linux&arch=amd64"), http.StatusNotFound, "no-template")
			if n := s.publisher.Count("storage.*"); n != before {
				t.Errorf("the publisher was asked %d times, want never", n-before)
			}
		})
	}
}

func TestDirectDoorWithAnyLabel(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	spec := app("app")
	spec.Labels = map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64", "channel": "beta"}
	im := s.publish(spec)
	wantImage(t, s.get(s.direct(im, "aci")), im)
	// The publisher's template doesn't use the label, so what it gives has to be held against the manifest.
	other := s.get(s.plain() + "/.acproxy/images/" + im.name + ".aci?version=1.0.0&os=linux&arch=amd64&channel=alpha")
	wantProblem(t, other, http.StatusBadGateway, "wrong-labels")
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, tt := range []struct {
		name, path string
		status     int
		code       string
	}{
		{"a name in capitals", "/.acproxy/images/Example.com/App.aci", 400, "invalid"},
		{"a name that climbs", "/.acproxy/images/example.com/../../etc/passwd.aci", 400, "invalid"},
		{"a name that climbs, encoded", "/.acproxy/images/example.com/%2e%2e/%2e%2e/etc/passwd.aci", 400, "invalid"},
		{"no name", "/.acproxy/images/.aci", 400, "invalid"},
		{"no extension", "/.acproxy/images/example.com/app", 400, "invalid"},
		{"a broken escape", "/.acproxy/images/example.com/app.aci?version=%zz", 400, "invalid"},
		{"a label called ext", "/.acproxy/images/example.com/app.aci?ext=x", 400, "invalid"},
		{"a label called name", "/.acproxy/images/example.com/app.aci?name=x", 400, "invalid"},
		{"a label twice", "/.acproxy/images/example.com/app.aci?os=linux&os=darwin", 400, "invalid"},
		{"a label with a control character", "/.acproxy/images/example.com/app.aci?version=%00", 400, "invalid"},
		{"a label of 257 bytes", "/.acproxy/images/example.com/app.aci?version=" + strings.Repeat("1", 257), 400, "invalid"},
		{"an image ID of 11 digits", "/.acproxy/images/sha512-0123456789a.aci", 400, "invalid"},
		{"an image ID that is none", "/.acproxy/images/sha512-xyzxyzxyzxyz.aci", 400, "invalid"},
		{"an image ID of 129 digits", "/.acproxy/images/sha512-" + strings.Repeat("0", 129) + ".aci", 400, "invalid"},
		{"an image ID that isn't held", "/.acproxy/images/sha512-0123456789ab.aci", 404, "image-id-unknown"},
		{"Mesos without a version", "/.acproxy/mesos/example.com/app.aci", 400, "invalid"},
		{"a page that isn't there", "/.acproxy/nothing", 404, "no-such-page"},
		{"a page that isn't there either", "/nothing", 404, "no-such-page"},
		{"a key that isn't trusted", "/.acproxy/keys/" + strings.Repeat("0", 40) + ".asc", 404, "no-such-key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantProblem(t, s.get(s.plain()+tt.path), tt.status, tt.code)
		})
	}
	t.Run("discovery of this machine", func(t *testing.T) {
		// 127.0.0.1 is a proper AC identifier, so that it is up to the dial rules to say no.
		if a := s.get(s.plain() + "/?ac-discovery=1"); a.Err != nil || a.Status != http.StatusForbidden {
			t.Errorf("%s, want 403", described(a))
		}
	})
	t.Run("POST", func(t *testing.T) {
		a := s.do(http.MethodPost, s.plain()+"/.acproxy/images/example.com/app.aci")
		wantProblem(t, a, http.StatusMethodNotAllowed, "method-not-allowed")
		wantHeader(t, a, "Allow", "GET, HEAD")
	})
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times for what can't be meant", n)
	}
}

func TestDirectDoorByImageID(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	at := func(id string) string { return s.plain() + "/.acproxy/images/" + id + ".aci" }
	whole := im.id.String()
	for _, id := range []string{whole, whole[:len("sha512-")+12], whole[:len("sha512-")+32]} {
		wantImage(t, s.get(at(id)), im)
		wantStatus(t, s.do(http.MethodHead, at(id)), http.StatusOK)
		if a := s.get(at(id) + ".asc"); wantStatus(t, a, http.StatusOK) && !strings.Contains(string(a.Body), "BEGIN PGP SIGNATURE") {
			t.Errorf("the signature by image ID is %q", a.Body)
		}
	}
	wantProblem(t, s.get(at(whole[:len("sha512-")+11])), http.StatusBadRequest, "invalid")
	other := "sha512-" + strings.Repeat("0", 12)
	wantProblem(t, s.get(at(other)), http.StatusNotFound, "image-id-unknown")
}

// twins are two files that give images of which the IDs begin with the same twelve digits. They were found by trying 32 million.
var twins = []string{"0000000000661f91", "0000000001f9f40b"}

const twinDigits = "sha512-36dd4eec62c1"

func TestAmbiguousImageID(t *testing.T) {
	t.Parallel()
	s := newScene(t, "freshness: {on_change: follow, ttl: 0s, max_stale: 0s}")
	var images []image
	for i, content := range twins {
		spec := acitest.Spec{Name: imageHost + "/twin", Labels: standard("1.0.0"), Compression: acitest.None, Files: map[string]string{"twin": content}}
		aci := acitest.Must(t, spec)
		if id := must(acitest.ID(aci))(t); !strings.HasPrefix(id.String(), twinDigits) {
			t.Fatalf("twin %d has the ID %s, want one that begins with %s: test images are made differently than when the twins were found", i, id, twinDigits)
		}
		// The one published later takes the place of the one before, under a ref that always asks the publisher.
		im := s.publishImage(publisherImage(spec, aci, s.sign(s.key, aci, trusttest.SignOptions{})))
		wantImage(t, s.get(s.plain()+"/.acproxy/images/"+im.name+".aci?os=linux&arch=amd64"), im)
		images = append(images, im)
	}
	eventually(t, "both IDs are known", func() bool {
		return s.get(s.plain()+"/.acproxy/images/"+images[0].id.String()+".aci").Status == 200 &&
			s.get(s.plain()+"/.acproxy/images/"+images[1].id.String()+".aci").Status == 200
	})
	wantProblem(t, s.get(s.plain()+"/.acproxy/images/"+twinDigits+".aci"), http.StatusBadRequest, "invalid")
	for _, im := range images {
		wantImage(t, s.get(s.plain()+"/.acproxy/images/"+im.id.String()[:len(twinDigits)+1]+".aci"), im)
	}
}

func TestPublishersOwnURLs(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	for name, n := range map[string]*node.Node{"proxy": s.proxied(node.Options{}), "host-based": s.node} {
		t.Run(name, func(t *testing.T) {
			wantStatus(t, n.Get(s.context(), "https://"+imageHost+"/app?ac-discovery=1", nil, nil), http.StatusOK)
			wantStatus(t, n.Get(s.context(), im.published.SignatureURL, nil, nil), http.StatusOK)
			wantImage(t, n.Get(s.context(), im.published.URL, nil, nil), im)
			wantStatus(t, n.Do(s.context(), http.MethodHead, im.published.URL, nil, nil), http.StatusOK)
			wantProblem(t, n.Get(s.context(), "https://storage.example.com/another/thing.aci", nil, nil), http.StatusNotFound, "no-template-gives-this-url")
		})
	}
	if n := s.publisher.Count(im.blob()); n != 1 {
		t.Errorf("the publisher was asked for the image %d times, want once", n)
	}
}

func TestPublishersOwnURLsWithHostilePaths(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	s.publish(app("app"))
	n := s.proxied(node.Options{})
	wantStatus(t, n.Get(s.context(), "https://"+imageHost+"/app?ac-discovery=1", nil, nil), http.StatusOK)
	for _, path := range []string{
		"/example.com/app/../../etc/passwd/1/2/image.aci", "/example.com/app/..%2f..%2fetc/linux/amd64/image.aci", "//example.com/app/1.0.0/linux/amd64/image.aci",
	} {
		if a := n.Get(s.context(), "https://storage.example.com"+path, nil, nil); a.Status != 404 && a.Status != 400 {
			t.Errorf("%s = %s, want 400 or 404", path, described(a))
		}
	}
}

func TestMesosDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, tt := range []struct{ name, image, version string }{
		{"a plain name", "app", "1.0.0"},
		{"dashes in the name", "my-little-app", "1.0.0"},
		{"dashes in the version", "app", "1.0-rc1-2"},
		{"dashes in both", "my-app", "v2-beta-3"},
		{"a version that is a word", "my-app", "stable"},
		{"a name that looks as if it had a version", "app-2", "7"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := app(tt.image)
			spec.Labels = standard(tt.version)
			im := s.publish(spec)
			at := s.plain() + "/.acproxy/mesos/" + im.name + "-" + tt.version + "-linux-amd64.aci"
			cold := s.get(at)
			wantImage(t, cold, im)
			wantImage(t, s.get(at), im)
			head := s.do(http.MethodHead, at)
			wantStatus(t, head, http.StatusOK)
			wantHeader(t, head, "Content-Length", fmt.Sprint(len(im.aci)))
			wantStatus(t, s.get(at+".asc"), http.StatusOK)
			wantHeader(t, cold, "X-Acproxy-Recompressed-From", "")
		})
	}
	t.Run("latest", func(t *testing.T) {
		im := s.publish(app("newest"))
		wantImage(t, s.get(s.plain()+"/.acproxy/mesos/"+im.name+"-latest-linux-amd64.aci"), im)
	})
	t.Run("nobody publishes it", func(t *testing.T) {
		a := s.get(s.plain() + "/.acproxy/mesos/example.com/not-there-1.0-linux-amd64.aci")
		if a.Err != nil || a.Status != http.StatusNotFound {
			t.Errorf("%s, want 404", described(a))
		}
	})
}

func TestMesosDoorRecompresses(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, compression := range []string{acitest.XZ, acitest.None} {
		t.Run(compression, func(t *testing.T) {
			spec := large("as-"+compression, 200<<10)
			spec.Compression = compression
			im := s.publish(spec)
			at := s.plain() + "/.acproxy/mesos/" + im.name + "-1.0.0-linux-amd64.aci"
			for _, which := range []string{"cold", "held"} {
				a := s.get(at)
				wantStatus(t, a, http.StatusOK)
				wantHeader(t, a, "X-Acproxy-Recompressed-From", compression)
				wantHeader(t, a, "X-Appc-Image-Id", im.id.String())
				wantHeader(t, a, "Content-Encoding", "")
				zip, err := gzip.NewReader(bytes.NewReader(a.Body))
				if err != nil {
					t.Fatalf("%s: what Mesos got is no gzip: %v", which, err)
				}
				hash := sha512.New()
				if _, err := io.Copy(hash, zip); err != nil {
					t.Fatal(err)
				}
				if id := acproxy.ImageID(hash.Sum(nil)); id != im.id {
					t.Errorf("%s: unpacked, it is image %v, want %v", which, id, im.id)
				}
			}
			head := s.do(http.MethodHead, at)
			wantStatus(t, head, http.StatusOK)
			wantHeader(t, head, "X-Acproxy-Recompressed-From", compression)
			if head.Bytes != 0 {
				t.Errorf("HEAD has a body of %d bytes", head.Bytes)
			}
			// Every other door gives the bytes as published.
			wantImage(t, s.get(s.direct(im, "aci")), im)
		})
	}
}

func TestCurl(t *testing.T) {
	t.Parallel()
	testtools.Need(t, "curl")
	s := newScene(t, "")
	im := s.publish(large("app", 300<<10))
	plain, secure := s.server().address("http"), s.server().address("https")
	ca := s.path("data", "ca", "ca.pem")
	out := filepath.Join(s.dir, "out")
	signature := func(url string) string { return strings.Replace(url, ".aci?", ".aci.asc?", 1) }
	inside := "https://" + imageHost + directPath(im.name, im.labels, "aci")
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"direct", []string{s.direct(im, "aci")}},
		{"host-based", []string{"--cacert", ca, "--connect-to", imageHost + ":443:" + secure, inside}},
		{"host-based, HTTP/1.1", []string{"--http1.1", "--cacert", ca, "--connect-to", imageHost + ":443:" + secure, inside}},
		{"proxy", []string{"--cacert", ca, "--proxy", "http://" + plain, inside}},
		{"proxy, HTTP/1.1 inside", []string{"--http1.1", "--cacert", ca, "--proxy", "http://" + plain, inside}},
		{"proxy, publisher's URL", []string{"--cacert", ca, "--proxy", "http://" + plain, im.published.URL}},
		{"proxy, plain http", []string{"--proxy", "http://" + plain, strings.Replace(inside, "https:", "http:", 1)}},
		{"resumed", []string{"--range", "0-", s.direct(im, "aci")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// Not even a working proxy of this machine may come between.
			args := append([]string{"--noproxy", "", "--silent", "--show-error", "--fail", "--max-time", "30", "--output", out}, tt.args...)
			curl := command()
			curl.Path, curl.Args = must(lookPath("curl"))(t), append([]string{"curl"}, args...)
			if text, err := curl.CombinedOutput(); err != nil {
				t.Fatalf("curl %s: %v\n%s", strings.Join(args, " "), err, text)
			}
			if got := must(os.ReadFile(out))(t); !bytes.Equal(got, im.aci) {
				t.Errorf("curl got %d bytes that are not the image's %d", len(got), len(im.aci))
			}
		})
	}
	wantStatus(t, s.get(signature(s.direct(im, "aci"))), http.StatusOK)
}

func TestOwnPages(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, tt := range []struct{ path, kind, says string }{
		{"/", "text/html; charset=utf-8", "<h1>acproxy</h1>"},
		{"/.acproxy/healthz", "text/plain; charset=utf-8", "ok\n"},
		{"/.acproxy/ca.pem", "application/x-pem-file", "-----BEGIN CERTIFICATE-----"},
	} {
		a := s.get(s.plain() + tt.path)
		wantStatus(t, a, http.StatusOK)
		wantHeader(t, a, "Content-Type", tt.kind)
		if !strings.Contains(string(a.Body), tt.says) {
			t.Errorf("%s is %q, want something with %q", tt.path, a.Body, tt.says)
		}
	}
	onDisk := must(os.ReadFile(s.path("data", "ca", "ca.pem")))(t)
	if a := s.get(s.plain() + "/.acproxy/ca.pem"); !bytes.Equal(a.Body, onDisk) {
		t.Error("ca.pem is not the local CA's certificate")
	}
	if u := must(url.Parse(s.plain()))(t); u.Port() == "0" {
		t.Error("the log tells port 0 as the address")
	}
}
