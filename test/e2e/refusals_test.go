package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// TestRefusedBySignature is about images of which a look at the signature says that they are not acceptable.
func TestRefusedBySignature(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	expired := must(trusttest.NewKey(trusttest.Options{Created: time.Now().Add(-48 * time.Hour), Expires: time.Now().Add(-time.Hour)}))(t)
	revoked := must(trusttest.NewKey(trusttest.Options{}))(t)
	if err := revoked.Revoke(); err != nil {
		t.Fatal(err)
	}
	elsewhere := must(trusttest.NewKey(trusttest.Options{}))(t)
	s.trust(expired, imageHost)
	s.trust(revoked, imageHost)
	s.trust(elsewhere, "example.com/ap")
	s.start()
	by := func(key *trusttest.Key, opts trusttest.SignOptions) func([]byte) []byte {
		return func(aci []byte) []byte { return s.sign(key, aci, opts) }
	}
	for i, tt := range []struct {
		name      string
		signature func(aci []byte) []byte
		status    int
		code      string
	}{
		{"signed by a stranger", by(stranger(t), trusttest.SignOptions{}), 403, "unknown-key"},
		{"signed by a key that is trusted for another prefix", by(elsewhere, trusttest.SignOptions{}), 403, "unknown-key"},
		{"signed by an expired key", by(expired, trusttest.SignOptions{Time: time.Now().Add(-24 * time.Hour)}), 403, "key-expired"},
		{"signed by a revoked key", by(revoked, trusttest.SignOptions{}), 403, "key-revoked"},
		{"the signature has expired", by(s.key, trusttest.SignOptions{Time: time.Now().Add(-30 * time.Minute), Lifetime: time.Minute}), 403, "signature-expired"},
		{"signed with SHA-1", by(s.key, trusttest.SignOptions{Hash: crypto.SHA1}), 403, "weak-algorithm"},
		{"signed tomorrow", by(s.key, trusttest.SignOptions{Time: time.Now().Add(24 * time.Hour)}), 403, "not-yet-valid"},
		{"no signature at all", func([]byte) []byte { return nil }, 403, "unsigned"},
		{"a page in place of the signature", func([]byte) []byte { return []byte("<html>welcome</html>") }, 403, "malformed-signature"},
		{"an empty signature", func([]byte) []byte { return []byte{} }, 403, "malformed-signature"},
		{"a key in place of the signature", func([]byte) []byte { return s.key.Armored() }, 403, "unsupported-signature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := app(fmt.Sprintf("app%d", i))
			spec.Labels = standard("1.0.0")
			aci := acitest.Must(t, spec)
			im := s.publishImage(publisherImage(spec, aci, tt.signature(aci)))
			wantProblem(t, s.get(s.direct(im, "aci.asc")), tt.status, tt.code)
			wantProblem(t, s.get(s.direct(im, "aci")), tt.status, tt.code)
			wantStatus(t, s.do(http.MethodHead, s.direct(im, "aci")), tt.status)
			for _, r := range s.publisher.Requests() {
				// A HEAD tells an unsigned image from one that isn't there.
				if r.At() == im.blob() && r.Method != http.MethodHead {
					t.Errorf("the publisher was asked for the image: %v: not one byte of it may be", r)
				}
			}
		})
	}
	code, listed := s.cli("refusals")
	if code != 0 || !strings.Contains(listed, "unknown-key") || !strings.Contains(listed, "key-revoked") {
		t.Errorf("acproxy refusals (exit code %d) doesn't tell of them:\n%s", code, listed)
	}
}

// TestRefusedByContent is about images whose signature looks good and whose bytes are not.
func TestRefusedByContent(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	signed := func(spec acitest.Spec) publisher.Image {
		aci := acitest.Must(t, spec)
		return publisherImage(spec, aci, s.sign(s.key, aci, trusttest.SignOptions{}))
	}
	for i, tt := range []struct {
		name   string
		size   int64
		change func(im *publisher.Image, spec acitest.Spec)
		status int
		code   string
	}{
		{"a byte changed after signing", 300 << 10, func(im *publisher.Image, _ acitest.Spec) { im.ACI[len(im.ACI)/2] ^= 1 }, 403, "bad-signature"},
		{"a byte changed in a small image", 0, func(im *publisher.Image, _ acitest.Spec) { im.ACI[len(im.ACI)-5] ^= 1 }, 403, "bad-signature"},
		{"a byte more at the end", 0, func(im *publisher.Image, _ acitest.Spec) { im.ACI = append(im.ACI, 0) }, 403, "bad-signature"},
		{"the end is missing", 300 << 10, func(im *publisher.Image, _ acitest.Spec) { im.ACI = im.ACI[:len(im.ACI)-1] }, 403, "bad-signature"},
		{"the signature is another image's", 0, func(im *publisher.Image, _ acitest.Spec) {
			im.Signature = s.sign(s.key, []byte("something else"), trusttest.SignOptions{})
		}, 403, "bad-signature"},
		{"another image's name in the manifest", 0, func(im *publisher.Image, spec acitest.Spec) {
			spec.Name += "-renamed"
			*im = signed(spec)
			im.Name = strings.TrimSuffix(im.Name, "-renamed")
		}, 502, "wrong-name"},
		{"another image's name in the manifest of a large one", 500 << 10, func(im *publisher.Image, spec acitest.Spec) {
			spec.Name += "-renamed"
			*im = signed(spec)
			im.Name = strings.TrimSuffix(im.Name, "-renamed")
		}, 502, "wrong-name"},
		{"another version in the manifest", 0, func(im *publisher.Image, spec acitest.Spec) {
			spec.Labels = standard("0.9.0")
			*im = signed(spec)
			im.Labels = standard("1.0.0")
		}, 502, "wrong-labels"},
		{"no version in the manifest", 0, func(im *publisher.Image, spec acitest.Spec) {
			spec.Labels = map[string]string{"os": "linux", "arch": "amd64"}
			*im = signed(spec)
			im.Labels = standard("1.0.0")
		}, 502, "wrong-labels"},
		{"no manifest", 0, func(im *publisher.Image, spec acitest.Spec) {
			spec.NoManifest = true
			*im = signed(spec)
		}, 502, "no-manifest"},
		{"not an image", 0, func(im *publisher.Image, _ acitest.Spec) {
			im.ACI = []byte("<html>come back later</html>")
			im.Signature = s.sign(s.key, im.ACI, trusttest.SignOptions{})
		}, 502, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := large(fmt.Sprintf("app%d", i), tt.size)
			spec.Labels = standard("1.0.0")
			p := signed(spec)
			tt.change(&p, spec)
			im := s.publishImage(p)
			// What left before the verdict must not end well.
			if a := s.get(s.direct(im, "aci")); a.Err == nil && a.Status == http.StatusOK {
				t.Errorf("all %d bytes were delivered", a.Bytes)
			}
			again := s.get(s.direct(im, "aci"))
			// The first answer is cut as soon as the manifest is read, and whoever comes before the verdict is cut as well.
			eventually(t, "there is a verdict", func() bool {
				if again.Err != nil {
					again = s.get(s.direct(im, "aci"))
				}
				return again.Err == nil
			})
			wantStatus(t, again, tt.status)
			if got := problemCode(again); tt.code != "" && got != tt.code {
				t.Errorf("problem %q, want %q\n%s", got, tt.code, again.Body)
			}
			if n := s.publisher.Count(im.blob()); n != 1 {
				t.Errorf("the publisher was asked for the image %d times, want once", n)
			}
		})
	}
	if code, listed := s.cli("images"); code != 0 || !strings.Contains(listed, "0 images") {
		t.Errorf("acproxy images (exit code %d) lists something:\n%s", code, listed)
	}
}

func TestTamperedImageNeverEndsCleanly(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		fault  publisher.Fault
		secure bool
	}{
		{"HTTP/1.1 with a length", publisher.Fault{}, false},
		{"HTTP/1.1 without a length", publisher.Fault{NoContentLength: true}, false},
		{"HTTP/2 with a length", publisher.Fault{}, true},
		{"HTTP/2 without a length", publisher.Fault{NoContentLength: true}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t, "")
			im := s.publish(large("app", 1<<20))
			tt.fault.StallAfter, tt.fault.FlipBitAt = publisher.At(stalled), publisher.At(800<<10)
			trouble := s.publisher.Misbehave(publisher.URL(im.blob()), tt.fault)
			url := s.direct(im, "aci")
			if tt.secure {
				url = "https://" + imageHost + directPath(im.name, im.labels, "aci")
			}
			resp := s.open(s.context(), url)
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK || tt.secure != (resp.ProtoMajor == 2) {
				t.Fatalf("%s over %s, want 200", resp.Status, resp.Proto)
			}
			if (tt.fault.NoContentLength) != (resp.ContentLength < 0) {
				t.Errorf("Content-Length %d", resp.ContentLength)
			}
			first := must(io.CopyN(io.Discard, resp.Body, 1000))(t)
			within(t, "the publisher stalls", trouble.Stalled())
			trouble.Release()
			rest, err := io.Copy(io.Discard, resp.Body)
			if err == nil {
				t.Error("the body of a tampered image ended as if it were whole")
			}
			if first+rest > int64(len(im.aci))-64<<10 {
				t.Errorf("%d of %d bytes left, more than may before the verdict", first+rest, len(im.aci))
			}
			wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "bad-signature")
		})
	}
}

func TestOldHTTPWaitsForTheVerdict(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	ask := func(im image) (status int, body []byte) {
		conn := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(t)
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n\r\n", directPath(im.name, im.labels, "aci"))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode, must(io.ReadAll(resp.Body))(t)
	}
	good, bad := s.publish(large("good", 500<<10)), s.publish(large("bad", 500<<10))
	// Without a length an HTTP/1.0 client can't tell a cut body from a whole one.
	s.publisher.Misbehave(publisher.URL("*.aci"), publisher.Fault{NoContentLength: true})
	s.publisher.Misbehave(publisher.URL(bad.blob()), publisher.Fault{FlipBitAt: publisher.At(100)})
	if status, body := ask(good); status != 200 || !bytes.Equal(body, good.aci) {
		t.Errorf("a good image: %d with %d bytes", status, len(body))
	}
	if status, body := ask(bad); status < 400 {
		t.Errorf("a bad image: %d with %d bytes", status, len(body))
	}
}

func TestPublishersFaults(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {timeout: 700ms, stall_timeout: 700ms, max_retry_after: 0s}\nfetch: {retries: 0}")
	for i, tt := range []struct {
		name   string
		fault  publisher.Fault
		status int // of the answer, unless it is cut off
		good   bool
	}{
		{"404", publisher.Fault{Status: 404}, 404, false},
		{"410", publisher.Fault{Status: 410}, 404, false},
		{"401", publisher.Fault{Status: 401}, 502, false},
		{"403", publisher.Fault{Status: 403}, 502, false},
		{"500", publisher.Fault{Status: 500}, 502, false},
		{"503", publisher.Fault{Status: 503, Header: http.Header{"Retry-After": {"7"}}}, 502, false},
		{"202 on the image", publisher.Fault{Status: 202}, 502, false},
		{"206 though nobody asked for a part", publisher.Fault{Status: 206, Body: []byte("part")}, 502, false},
		{"no answer", publisher.Fault{Delay: time.Hour}, 504, false},
		{"the connection is closed at once", publisher.Fault{CloseConnection: true}, 502, false},
		{"it ends short", publisher.Fault{TruncateAfter: publisher.At(200 << 10)}, 502, false},
		{"it ends short, of no known length", publisher.Fault{TruncateAfter: publisher.At(200 << 10), NoContentLength: true}, 502, false},
		{"it ends short where nobody can tell", publisher.Fault{TruncateAfter: publisher.At(200 << 10), CloseDelimited: true}, 502, false},
		{"it is reset", publisher.Fault{ResetAfter: publisher.At(200 << 10)}, 502, false},
		{"it stalls for ever", publisher.Fault{StallAfter: publisher.At(200 << 10)}, 504, false},
		{"it redirects in a circle", publisher.Fault{RedirectLoop: true}, 502, false},
		{"it redirects to plain http", publisher.Fault{RedirectTo: "http://storage.example.com/x.aci"}, 403, false},
		{"it redirects inward", publisher.Fault{RedirectTo: "https://127.0.0.1/x.aci"}, 403, false},
		{"it is encoded", publisher.Fault{Header: http.Header{"Content-Encoding": {"gzip"}}}, 502, false},
		{"headers without end", publisher.Fault{EndlessHeaders: true}, 502, false},
		{"slowly", publisher.Fault{BytesPerSecond: 600 << 10}, 200, true},
		{"by a redirect", publisher.Fault{RedirectTo: "https://storage.example.com/moved"}, 200, true},
		{"no Last-Modified, no ETag", publisher.Fault{Header: http.Header{"Last-Modified": nil, "Etag": nil}}, 200, true},
		{"a charset and another type", publisher.Fault{Header: http.Header{"Content-Type": {"text/html; charset=utf-16"}}}, 200, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := s.publish(large(fmt.Sprintf("app%d", i), 300<<10))
			if tt.name == "by a redirect" {
				s.publisher.Serve("storage.example.com/moved", "application/octet-stream", im.aci)
			}
			s.publisher.Behave()
			s.publisher.Misbehave(publisher.URL(im.blob()), tt.fault)
			a := s.get(s.direct(im, "aci"))
			switch {
			case tt.good:
				wantImage(t, a, im)
				return
			case a.Err != nil && a.Status == http.StatusOK:
				// Cut off midway, as it should be.
			case tt.fault.EndlessHeaders && a.Status == http.StatusGatewayTimeout:
				// It took longer to read them all than the time allowed.
			default:
				wantStatus(t, a, tt.status)
			}
			s.publisher.Behave()
			switch {
			case tt.fault.EndlessHeaders:
				// The connection they came on may be broken and take the next request with it; the one after that finds another.
				eventually(t, "the publisher is asked on another connection", func() bool { return s.get(s.direct(im, "aci")).Status == http.StatusOK })
			case tt.status == 502 || tt.status == 504:
				// A failure is never remembered: the next request finds the publisher well.
				wantImage(t, s.get(s.direct(im, "aci")), im)
			}
		})
	}
}

// TestPublisherBreaksOff: what the publisher doesn't get to the end of is gone on with, and the node notices nothing.
func TestPublisherBreaksOff(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {timeout: 700ms, stall_timeout: 700ms}\nfetch: {retry_wait: 1ms}")
	at := publisher.At(200 << 10)
	for i, tt := range []struct {
		name  string
		fault publisher.Fault
	}{
		{"it ends short", publisher.Fault{TruncateAfter: at}},
		{"it ends short, of no known length", publisher.Fault{TruncateAfter: at, NoContentLength: true}},
		{"it ends short where nobody can tell", publisher.Fault{TruncateAfter: at, CloseDelimited: true}},
		{"it is reset", publisher.Fault{ResetAfter: at}},
		{"it stalls for ever", publisher.Fault{StallAfter: at}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := s.publish(large(fmt.Sprintf("app%d", i), 300<<10))
			s.publisher.Behave()
			trouble := s.publisher.Misbehave(publisher.URL(im.blob()), tt.fault)
			wantImage(t, s.get(s.direct(im, "aci")), im)
			if trouble.Applied() < 2 {
				t.Error("it did not break off")
			}
		})
	}
}

func TestImageTooLarge(t *testing.T) {
	t.Parallel()
	s := newScene(t, "fetch: {max_image_size: 500KiB, hold_back: 64KiB}")
	for name, fault := range map[string]publisher.Fault{
		"it says so": {}, "it doesn't say so": {NoContentLength: true}, "it never ends": {EndlessBody: true},
	} {
		t.Run(name, func(t *testing.T) {
			im := s.publish(large("app"+strings.ReplaceAll(strings.ReplaceAll(name, " ", ""), "'", ""), 600<<10))
			s.publisher.Misbehave(publisher.URL(im.blob()), fault)
			if a := s.get(s.direct(im, "aci")); a.Err == nil && a.Status == http.StatusOK {
				t.Errorf("all %d bytes were delivered", a.Bytes)
			}
			wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "image-too-large")
		})
	}
}

func TestImageThatBreaksRules(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for name, spec := range map[string]acitest.Spec{
		"outside":   {Extra: []acitest.Entry{acitest.File("etc/passwd", "root")}},
		"climbing":  {Extra: []acitest.Entry{acitest.File("rootfs/../../etc/passwd", "root")}},
		"twice":     {Extra: []acitest.Entry{acitest.File("rootfs/a", "1"), acitest.File("rootfs/a", "2")}},
		"no-rootfs": {NoRootfs: true},
		"link":      {Extra: []acitest.Entry{{Header: tar.Header{Typeflag: tar.TypeLink, Name: "rootfs/x", Linkname: "/etc/shadow", Mode: 0o644}}}},
	} {
		t.Run(name, func(t *testing.T) {
			spec.Name, spec.RootfsSize = imageHost+"/"+name, 300<<10
			im := s.publish(spec)
			// A trusted key vouches for the bytes, so that they may leave before the tar has been read to its end.
			s.get(s.direct(im, "aci"))
			eventually(t, "it is refused", func() bool { return s.get(s.direct(im, "aci")).Status >= 400 })
			a := s.get(s.direct(im, "aci"))
			if a.Status != http.StatusForbidden && a.Status != http.StatusBadGateway {
				t.Errorf("%s, want 403 or 502", described(a))
			}
		})
	}
}

func TestCompressions(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, compression := range []string{acitest.None, acitest.Gzip, acitest.XZ} {
		spec := large(compression, 200<<10)
		spec.Compression = compression
		im := s.publish(spec)
		s.fetchAsRkt(s.node, im)
		s.inspected(im)
	}
	aci, spec := acitest.Bzip2()
	im := s.publishImage(publisherImage(spec, aci, s.sign(s.key, aci, trusttest.SignOptions{})))
	s.fetchAsRkt(s.node, im)
	s.inspected(im)
}

func TestSignatureOptional(t *testing.T) {
	t.Parallel()
	s := newScene(t, "publishers: [{prefix: example.com, ca_file: $CA, signature: optional}]")
	unsigned := s.publishAs(large("unsigned", 300<<10), nil)
	wantImage(t, s.get(s.direct(unsigned, "aci")), unsigned)
	wantProblem(t, s.get(s.direct(unsigned, "aci.asc")), http.StatusNotFound, "unsigned")
	strangers := s.publishAs(app("strangers"), stranger(t))
	wantProblem(t, s.get(s.direct(strangers, "aci")), http.StatusForbidden, "unknown-key")
	tampered := s.publish(app("tampered"))
	s.publisher.Misbehave(publisher.URL(tampered.blob()), publisher.Fault{FlipBitAt: publisher.At(50)})
	if a := s.get(s.direct(tampered, "aci")); a.Err == nil && a.Status < 400 {
		t.Errorf("a tampered image was delivered: %s", described(a))
	}
}

func TestSignatureThatIsNotReady(t *testing.T) {
	t.Parallel()
	s := newScene(t, "fetch: {signature_wait: 5s}")
	im := s.publish(large("app", 300<<10))
	trouble := s.publisher.Misbehave(publisher.URL(im.signature()), publisher.Fault{Status: 202, Times: 3})
	// What rkt does on 202: it fetches the image and asks for the signature once more.
	first := s.get(s.direct(im, "aci.asc"))
	wantStatus(t, first, http.StatusAccepted)
	wantImage(t, s.get(s.direct(im, "aci")), im)
	wantStatus(t, s.get(s.direct(im, "aci.asc")), http.StatusOK)
	if n := trouble.Applied(); n != 3 {
		t.Errorf("the publisher said 202 %d times, want 3", n)
	}
	s.fetchAsRkt(s.node, im)
}

func TestSignatureThatIsNeverReady(t *testing.T) {
	t.Parallel()
	s := newScene(t, "fetch: {signature_wait: 500ms}")
	im := s.publish(large("app", 300<<10))
	s.publisher.Misbehave(publisher.URL(im.signature()), publisher.Fault{Status: 202})
	wantStatus(t, s.get(s.direct(im, "aci.asc")), http.StatusAccepted)
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusGatewayTimeout, "signature-not-ready")
	s.publisher.Behave()
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

func TestSignatureThatIsNotReadyAndThenBad(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publishAs(large("app", 300<<10), stranger(t))
	s.publisher.Misbehave(publisher.URL(im.signature()), publisher.Fault{Status: 202, Times: 1})
	wantStatus(t, s.get(s.direct(im, "aci.asc")), http.StatusAccepted)
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "unknown-key")
}

func TestErrorBodies(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publishAs(app("app"), stranger(t))
	for _, tt := range []struct{ accept, kind, begins string }{
		{"", "application/problem+json", "{\n"},
		{"*/*", "application/problem+json", "{\n"},
		{"application/json", "application/problem+json", "{\n"},
		{"text/plain", "text/plain; charset=utf-8", "403 Forbidden"},
		{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8", "<!doctype html>"},
		{"text/html;q=0.2, text/plain;q=0.9", "text/plain; charset=utf-8", "403 Forbidden"},
		{"image/png", "application/problem+json", "{\n"},
	} {
		t.Run(tt.accept, func(t *testing.T) {
			a := s.get(s.direct(im, "aci"), "Accept", tt.accept)
			wantStatus(t, a, http.StatusForbidden)
			wantHeader(t, a, "Content-Type", tt.kind)
			wantHeader(t, a, "Vary", "Accept")
			wantHeader(t, a, "Cache-Control", "no-store")
			for _, text := range []string{tt.begins, stranger(t).KeyID(), "acproxy trust add"} {
				if !bytes.Contains(a.Body, []byte(text)) {
					t.Errorf("the body doesn't tell %q:\n%s", text, a.Body)
				}
			}
			if !bytes.HasPrefix(a.Body, []byte(tt.begins)) {
				t.Errorf("the body begins otherwise than with %q:\n%s", tt.begins, a.Body)
			}
			for _, tried := range []string{"https://example.com/app?ac-discovery=1", im.published.SignatureURL} {
				if !bytes.Contains(a.Body, []byte(tried)) {
					t.Errorf("the body doesn't tell that %s was tried:\n%s", tried, a.Body)
				}
			}
		})
	}
}
