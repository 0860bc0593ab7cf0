// Package attacks fetches from publishers, and with keys, that are out to deceive. What can be tried on one package alone is tried there;
// docs/trust.md lists all of it.
package attacks

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	host = "example.com"
	app  = host + "/app"
	blob = 1 << 20 // bytes of an image: several times what is held back
)

var labels = map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"}

// A scene is a publisher, and everything of acproxy below HTTP with a fresh store.
type scene struct {
	t         *testing.T
	publisher *publisher.Publisher
	dirs      trust.Dirs
	keys      *trust.Store
	store     *cache.Disk
	fetcher   *fetch.Fetcher
	key       *trusttest.Key // trusted for example.com/app
	stranger  *trusttest.Key
}

func newScene(t *testing.T, policy fetch.Policy) *scene {
	t.Helper()
	s := &scene{t: t, dirs: trust.Dirs{Local: t.TempDir()}, key: newKey(t), stranger: newKey(t)}
	s.publisher = must(publisher.Start(publisher.Options{}))(t)
	t.Cleanup(func() { s.close(s.publisher) })
	s.trust(app, s.key)
	s.keys = must(trust.Open(s.dirs))(t)
	t.Cleanup(func() { s.close(s.keys) })
	s.store = must(cache.Open(t.TempDir(), cache.Options{Log: slog.New(slog.DiscardHandler)}))(t)
	t.Cleanup(func() { s.close(s.store) })
	client := web.New(web.Config{
		Rules: []web.Rule{{RootCAs: s.publisher.CAPool()}},
		Hosts: map[string]string{host: s.publisher.Addr(), "storage." + host: s.publisher.Addr()},
		// Whatever this machine's environment says about proxies.
		Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	t.Cleanup(client.Close)
	finder := discovery.New(discovery.Config{Web: client})
	t.Cleanup(func() { s.close(finder) })
	s.fetcher = fetch.New(fetch.Config{
		Store: s.store, Discovery: finder, Web: client, Keyring: s.keys.Current, Policies: []fetch.Policy{policy}, Log: slog.New(slog.DiscardHandler),
		NegativeTTL: -1,
	})
	t.Cleanup(func() { s.close(s.fetcher) })
	return s
}

func (s *scene) close(c io.Closer) {
	if err := c.Close(); err != nil {
		s.t.Error(err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newKey(t *testing.T) *trusttest.Key {
	t.Helper()
	return must(trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA}))(t)
}

func (s *scene) trust(prefix string, key *trusttest.Key) {
	s.t.Helper()
	must(trust.Add(s.dirs, prefix, key.Armored()))(s.t)
	if s.keys != nil {
		s.keys.Reload()
	}
}

func (s *scene) sign(key *trusttest.Key, signed []byte) []byte {
	s.t.Helper()
	return must(key.Sign(bytes.NewReader(signed), trusttest.SignOptions{}))(s.t)
}

// image returns an image of a name and version, another one for each seed.
func (s *scene) image(name, version string, seed uint64) []byte {
	s.t.Helper()
	own := maps.Clone(labels)
	own["version"] = version
	return acitest.Must(s.t, acitest.Spec{Name: name, Labels: own, RootfsSize: blob, Seed: seed})
}

// publish publishes an image with a signature, whether they belong together or not.
func (s *scene) publish(name, version string, image, signature []byte) {
	s.t.Helper()
	own := maps.Clone(labels)
	own["version"] = version
	must(s.publisher.Add(publisher.Image{Name: name, Labels: own, ACI: image, Signature: signature}))(s.t)
}

func ref(t *testing.T, name, version string) acproxy.Ref {
	t.Helper()
	own := maps.Clone(labels)
	own["version"] = version
	return must(acproxy.NewRef(name, own))(t)
}

// get asks for an image and reads it to the end of what is delivered.
func (s *scene) get(name, version string) ([]byte, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	image, err := s.fetcher.Image(ctx, fetch.Request{Ref: ref(s.t, name, version)})
	if err != nil {
		return nil, err
	}
	got, copyErr := read(ctx, image)
	return got, errors.Join(copyErr, image.Close())
}

// refused checks that an image is not delivered whole, for the reason given, and that nothing of it is kept.
func (s *scene) refused(name, version string, image []byte, code string) {
	s.t.Helper()
	got, err := s.get(name, version)
	if acproxy.Code(err) != code {
		s.t.Errorf("%s: Image = %v (%q), want %q", name, err, acproxy.Code(err), code)
	}
	if len(got) >= len(image) {
		s.t.Errorf("%s: all %d bytes were delivered", name, len(got))
	}
	s.notHeld(image)
}

func (s *scene) notHeld(image []byte) {
	s.t.Helper()
	if rec, err := s.store.Record(sha256.Sum256(image)); err == nil && !rec.Quarantined() {
		s.t.Errorf("the image is held: %+v", rec)
	}
}

// accepted checks that version 1.0.0 of example.com/app is delivered as it was published.
func (s *scene) accepted(image []byte) {
	s.t.Helper()
	got, err := s.get(app, "1.0.0")
	if err != nil || !bytes.Equal(got, image) {
		s.t.Errorf("Image = %d bytes, %v; want the %d published", len(got), err, len(image))
	}
}

// notAsked checks that no byte of an image was asked for.
func (s *scene) notAsked(name string) {
	s.t.Helper()
	if n := s.publisher.Count("storage." + host + "/" + name + "/*.aci"); n != 0 {
		s.t.Errorf("the image of %s was asked for %d times, want not at all", name, n)
	}
}

func TestSignatureOfAnotherFile(t *testing.T) {
	s := newScene(t, fetch.Policy{})
	image, other := s.image(app, "1.0.0", 1), s.image(app, "1.0.0", 2)
	s.publish(app, "1.0.0", image, s.sign(s.key, other))
	s.refused(app, "1.0.0", image, trust.BadSignature.String())
}

func TestSignatureOfAnotherNamesKey(t *testing.T) {
	s := newScene(t, fetch.Policy{})
	other := newKey(t)
	s.trust(host+"/other", other)
	image := s.image(app, "1.0.0", 1)
	s.publish(app, "1.0.0", image, s.sign(other, image))
	s.refused(app, "1.0.0", image, trust.UnknownKey.String())
	s.notAsked(app)
}

func TestSignatureOfANeighboursKey(t *testing.T) {
	s := newScene(t, fetch.Policy{})
	const apple = host + "/apple"
	image := s.image(apple, "1.0.0", 1)
	s.publish(apple, "1.0.0", image, s.sign(s.key, image))
	s.refused(apple, "1.0.0", image, trust.UnknownKey.String())
	s.notAsked(apple)
}

func TestSignatureSwappedBetweenFetches(t *testing.T) {
	t.Run("for a stranger's", func(t *testing.T) {
		s := newScene(t, fetch.Policy{})
		image := s.image(app, "1.0.0", 1)
		good := s.sign(s.key, image)
		s.publish(app, "1.0.0", image, good)
		s.accepted(image)
		s.publish(app, "1.0.0", image, s.sign(s.stranger, image))
		s.accepted(image)
		sig, err := s.fetcher.Signature(t.Context(), fetch.Request{Ref: ref(t, app, "1.0.0")})
		if err != nil || !bytes.Equal(sig.Bytes, good) {
			t.Errorf("Signature = %v, want the one that was verified", err)
		}
	})
	t.Run("for that of an image that is held", func(t *testing.T) {
		s := newScene(t, fetch.Policy{})
		first, second := s.image(app, "1.0.0", 1), s.image(app, "2.0.0", 2)
		good := s.sign(s.key, first)
		s.publish(app, "1.0.0", first, good)
		s.accepted(first)
		s.publish(app, "2.0.0", second, good)
		got, err := s.get(app, "2.0.0")
		if acproxy.Code(err) != "wrong-labels" || len(got) != 0 {
			t.Errorf("Image = %d bytes, %v; want wrong-labels: the signature is version 1.0.0's", len(got), err)
		}
		s.notHeld(second)
	})
	t.Run("for that of another name's image", func(t *testing.T) {
		s := newScene(t, fetch.Policy{})
		const other = host + "/app/other"
		first, second := s.image(app, "1.0.0", 1), s.image(other, "1.0.0", 2)
		good := s.sign(s.key, first)
		s.publish(app, "1.0.0", first, good)
		s.accepted(first)
		s.publish(other, "1.0.0", second, good)
		got, err := s.get(other, "1.0.0")
		if acproxy.Code(err) != "wrong-name" || len(got) != 0 {
			t.Errorf("Image = %d bytes, %v; want wrong-name", len(got), err)
		}
	})
}

func TestKeyFileReplacedDuringAFetch(t *testing.T) {
	for _, test := range []struct {
		name    string
		replace func(s *scene)
		want    string
	}{
		{"removed", func(s *scene) {
			must(0, trust.Remove(s.dirs, app, trust.Fingerprint(s.key.Fingerprint())))(s.t)
		}, trust.UnknownKey.String()},
		{"another key in its place", func(s *scene) {
			must(0, trust.Remove(s.dirs, app, trust.Fingerprint(s.key.Fingerprint())))(s.t)
			s.trust(app, s.stranger)
		}, trust.UnknownKey.String()},
		{"revoked", func(s *scene) {
			must(0, s.key.Revoke())(s.t)
			s.trust(app, s.key)
		}, trust.KeyRevoked.String()},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, fetch.Policy{})
			image := s.image(app, "1.0.0", 1)
			s.publish(app, "1.0.0", image, s.sign(s.key, image))
			stall := s.publisher.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(blob / 2)})
			arriving, err := s.fetcher.Image(t.Context(), fetch.Request{Ref: ref(t, app, "1.0.0")})
			if err != nil {
				t.Fatal(err)
			}
			defer s.close(arriving)
			<-stall.Stalled()
			test.replace(s)
			s.keys.Reload()
			stall.Release()
			got, err := read(t.Context(), arriving)
			if acproxy.Code(err) != test.want || len(got) >= len(image) {
				t.Errorf("%d of %d bytes and %v, want a short body and %s", len(got), len(image), err, test.want)
			}
			s.notHeld(image)
		})
	}
}

func TestEndlessSignature(t *testing.T) {
	s := newScene(t, fetch.Policy{})
	image := s.image(app, "1.0.0", 1)
	s.publish(app, "1.0.0", image, s.sign(s.key, image))
	s.publisher.Misbehave(publisher.URL("*.asc"), publisher.Fault{EndlessBody: true, NoContentLength: true})
	if got, err := s.get(app, "1.0.0"); err == nil || len(got) != 0 {
		t.Errorf("Image = %d bytes, %v; want an error", len(got), err)
	}
	s.notAsked(app)
	s.notHeld(image)
	for _, r := range s.publisher.Requests() {
		// What is on its way when the limit is reached lies in buffers.
		if strings.HasSuffix(r.Path, ".asc") && r.Bytes > 16<<20 {
			t.Errorf("%d bytes of the signature were read, the limit is %d", r.Bytes, trust.MaxSignature)
		}
	}
}

func TestManifestNamesAnotherImage(t *testing.T) {
	s := newScene(t, fetch.Policy{})
	other := s.image(app+"/other", "1.0.0", 1)
	s.publish(app, "1.0.0", other, s.sign(s.key, other))
	s.refused(app, "1.0.0", other, "wrong-name")
	later := s.image(app, "2.0.0", 2)
	s.publish(app, "3.0.0", later, s.sign(s.key, later))
	s.refused(app, "3.0.0", later, "wrong-labels")
}

// Whoever holds a trusted key may still not break the rules of the tar.
func TestSignedImagesThatBreakRules(t *testing.T) {
	manifest := string(acitest.Spec{Name: app, Labels: labels}.ManifestJSON())
	duplicate := strings.Replace(manifest, `"labels":[`, `"labels":[{"name":"version","value":"1.0.0"},`, 1)
	if duplicate == manifest {
		t.Fatal("nothing was duplicated")
	}
	entries := func(all ...acitest.Entry) []acitest.Entry { return all }
	for _, test := range []struct {
		name string
		spec acitest.Spec
		want string
	}{
		{"duplicated labels", acitest.Spec{Manifest: []byte(duplicate)}, aci.RuleBadManifest},
		{"two manifests", acitest.Spec{Extra: entries(acitest.File("manifest", manifest))}, aci.RuleSecondManifest},
		{"an entry outside rootfs", acitest.Spec{Extra: entries(acitest.File("etc/passwd", "x"))}, aci.RuleOutsideRootfs},
		{"an absolute path", acitest.Spec{Extra: entries(acitest.File("/etc/passwd", "x"))}, aci.RuleAbsolutePath},
		{"a path that goes up", acitest.Spec{Extra: entries(acitest.File("rootfs/../../etc/passwd", "x"))}, aci.RuleDotDot},
		{"bytes after the end of the compressed stream", acitest.Spec{Trailing: []byte("more")}, aci.RuleTrailingBytes},
		{"a bomb", acitest.Spec{Padding: 16 << 20}, aci.RuleBombRatio},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.spec.Name, test.spec.Labels = app, labels
			image := acitest.Must(t, test.spec)
			s := newScene(t, fetch.Policy{Delivery: fetch.VerifyFirst})
			s.publish(app, "1.0.0", image, s.sign(s.key, image))
			got, err := s.get(app, "1.0.0")
			if acproxy.Code(err) != test.want || len(got) != 0 {
				t.Errorf("Image = %d bytes, %v (%q), want none and %q", len(got), err, acproxy.Code(err), test.want)
			}
			s.notHeld(image)
		})
	}
}

// A gzip of several members is accepted as gunzip accepts it. The signature and the digest are over the bytes as published, all members of
// them; the image ID is of the tar that the members give together.
func TestSignedGzipOfSeveralMembers(t *testing.T) {
	s := newScene(t, fetch.Policy{Delivery: fetch.VerifyFirst})
	image := acitest.Must(t, acitest.Spec{Name: app, Labels: labels, Members: 3, RootfsSize: blob})
	s.publish(app, "1.0.0", image, s.sign(s.key, image))
	s.accepted(image)
	rec, err := s.store.Record(sha256.Sum256(image))
	if err != nil {
		t.Fatal(err)
	}
	if id, err := acitest.ID(image); err != nil || rec.ImageID != id {
		t.Errorf("image ID %v, want %v (%v)", rec.ImageID, id, err)
	}
	// Who signs the first member alone has not signed the file.
	own := maps.Clone(labels)
	own["version"] = "2.0.0"
	image = acitest.Must(t, acitest.Spec{Name: app, Labels: own, Members: 3, RootfsSize: blob})
	rest := bytes.NewReader(image)
	first, err := gzip.NewReader(rest)
	if err != nil {
		t.Fatal(err)
	}
	first.Multistream(false)
	if _, err := io.Copy(io.Discard, first); err != nil || rest.Len() == 0 {
		t.Fatalf("%d bytes follow the first member, %v", rest.Len(), err)
	}
	s.publish(app, "2.0.0", image, s.sign(s.key, image[:len(image)-rest.Len()]))
	s.refused(app, "2.0.0", image, trust.BadSignature.String())
}

// read returns what a client is given of an image.
func read(ctx context.Context, image *fetch.Image) ([]byte, error) {
	var got []byte
	for {
		end, err := image.Await(ctx, int64(len(got)))
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		piece := make([]byte, end-int64(len(got)))
		if _, err := image.Growing().ReadAt(piece, int64(len(got))); err != nil {
			return got, err
		}
		got = append(got, piece...)
	}
}
