package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

// A scene is a bridge in front of a store that nobody but the test puts images into, without signatures. What publishers do is for the tests of package fetch, and
// for those of test/e2e.
type scene struct {
	t       testing.TB
	dir     string
	store   *cache.Disk
	keys    *trust.Store
	finder  *discovery.Finder
	fetcher *fetch.Fetcher
	bridge  *Bridge
	cfg     Config

	converted atomic.Int64 // layers
	missed    atomic.Int64 // names and refs
}

func newScene(t testing.TB, change ...func(*Config)) *scene {
	t.Helper()
	s := &scene{t: t, dir: t.TempDir()}
	quiet := slog.New(slog.DiscardHandler)
	var err error
	if s.store, err = cache.Open(filepath.Join(s.dir, "store"), cache.Options{Log: quiet, Quota: cache.Quota{Grace: -1}}); err != nil {
		t.Fatal(err)
	}
	if s.keys, err = trust.Open(trust.Dirs{Local: filepath.Join(s.dir, "keys")}); err != nil {
		t.Fatal(err)
	}
	client := web.New(web.Config{Offline: true})
	s.finder = discovery.New(discovery.Config{Web: client})
	s.fetcher = fetch.New(fetch.Config{
		Store: s.store, Discovery: s.finder, Web: client, Keyring: s.keys.Current, Offline: true, Log: quiet,
		Missed:   func(acproxy.Ref, bool, error) { s.missed.Add(1) },
		Policies: []fetch.Policy{{Trust: trust.Policy{Signature: trust.Optional}}},
	})
	s.cfg = Config{
		Fetcher: s.fetcher, Store: s.store, Dir: filepath.Join(s.dir, "oci"), Spool: s.store.Spool, Log: quiet, Platforms: []Platform{{"linux", "aarch64"}},
		Converted: func(int64, time.Duration, error) { s.converted.Add(1) },
	}
	for _, c := range change {
		c(&s.cfg)
	}
	s.open()
	t.Cleanup(func() {
		if err := errors.Join(s.bridge.Close(), s.fetcher.Close(), s.finder.Close(), s.store.Close(), s.keys.Close()); err != nil {
			t.Error(err)
		}
		client.Close()
	})
	return s
}

func (s *scene) open() {
	s.t.Helper()
	var err error
	if s.bridge, err = New(s.cfg); err != nil {
		s.t.Fatal(err)
	}
}

// reopen is what a restart is to the bridge.
func (s *scene) reopen() {
	s.t.Helper()
	if err := s.bridge.Close(); err != nil {
		s.t.Fatal(err)
	}
	s.open()
}

// put has an image be held, and answer its name alone, too.
func (s *scene) put(spec acitest.Spec) cache.Record {
	s.t.Helper()
	blob := acitest.Must(s.t, spec)
	c := fetch.Carried{Name: spec.Name, Labels: spec.Labels, Digest: sha256.Sum256(blob), Size: int64(len(blob)), Source: "a test"}
	if ref, err := acproxy.NewRef(spec.Name, nil); err == nil {
		c.Refs = []acproxy.Ref{ref}
	}
	taken, err := s.fetcher.Take(s.t.Context(), c, func() (io.Reader, error) { return bytes.NewReader(blob), nil })
	if err != nil {
		s.t.Fatal(err)
	}
	return taken.Record
}

// whitelisted returns the manifest of an image with a pathWhitelist.
func whitelisted(t testing.TB, spec acitest.Spec, paths ...string) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(spec.ManifestJSON(), &m); err != nil {
		t.Fatal(err)
	}
	m["pathWhitelist"] = paths
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func query(name string) Query {
	return Query{Name: name, May: func(string) error { return nil }}
}

func anything(string) bool { return true }

// manifest pulls a manifest.
func (s *scene) manifest(name, reference string) (*Content, imagespec.Manifest) {
	s.t.Helper()
	c, err := s.bridge.Manifest(s.t.Context(), query(name), reference, anything)
	if err != nil {
		s.t.Fatalf("the manifest %s of %s: %v", reference, name, err)
	}
	b := s.content(c)
	var m imagespec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		s.t.Fatal(err)
	}
	return c, m
}

// content reads a content, by its file if there is one, and checks that it is what it is called.
func (s *scene) content(c *Content) []byte {
	s.t.Helper()
	if err := c.Open(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	var b bytes.Buffer
	var err error
	if f := c.File(); f != nil {
		_, err = io.Copy(&b, f)
	} else {
		_, err = c.Send(s.t.Context(), &b)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if acproxy.Digest(sha256.Sum256(b.Bytes())) != c.Digest || int64(b.Len()) != c.Size {
		s.t.Errorf("%d bytes that are %x, and they were called %v, of %d", b.Len(), sha256.Sum256(b.Bytes()), c.Digest, c.Size)
	}
	return b.Bytes()
}

func (s *scene) blob(name string, d imagespec.Descriptor) []byte {
	s.t.Helper()
	digest, err := acproxy.ParseDigest(d.Digest.String())
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := s.bridge.Blob(s.t.Context(), query(name), digest)
	if err != nil {
		s.t.Fatalf("the blob %v of %s: %v", d.Digest, name, err)
	}
	if c.MediaType != d.MediaType || c.Size != d.Size {
		s.t.Errorf("it is %s of %d bytes, and was said to be %s of %d", c.MediaType, c.Size, d.MediaType, d.Size)
	}
	return s.content(c)
}

// layers pulls an image, all of it, and returns its layers.
func (s *scene) layers(name string) [][]byte {
	s.t.Helper()
	_, m := s.manifest(name, latest)
	var layers [][]byte
	for _, l := range m.Layers {
		layers = append(layers, s.blob(name, l))
	}
	return layers
}

// appManifest says all that a manifest can say of an app.
const appManifest = `{"acKind": "ImageManifest", "acVersion": "0.8.11", "name": "example.com/app",
"labels": [{"name": "version", "value": "1.0+git"}, {"name": "os", "value": "linux"}, {"name": "arch", "value": "aarch64"}],
"app": {"exec": ["/bin/app", "--all"], "user": "100", "group": "daemon", "supplementaryGIDs": [5], "workingDirectory": "/srv",
 "environment": [{"name": "B", "value": "2"}, {"name": "A", "value": "x=y"}],
 "mountPoints": [{"name": "data", "path": "/data"}], "ports": [{"name": "http", "protocol": "TCP", "port": 80}, {"name": "many", "protocol": "udp", "port": 5000, "count": 2}],
 "userLabels": {"team": "web"}},
"dependencies": [{"imageName": "example.com/base"}],
"annotations": [{"name": "created", "value": "2016-03-04T05:06:07+02:00"}, {"name": "authors", "value": "Ann <ann@example.com>"}, {"name": "homepage", "value": "https://example.com/"},
 {"name": "documentation", "value": "https://example.com/docs"}, {"name": "example.com/commit", "value": "abc"}]}`

// putApp has an image with an app, and the one below it, be held.
func (s *scene) putApp() (app, base cache.Record) {
	s.t.Helper()
	base = s.put(acitest.Spec{Name: "example.com/base", Labels: map[string]string{"version": "7"}, Files: map[string]string{"etc/os-release": "base"}})
	app = s.put(acitest.Spec{
		Name: "example.com/app", Labels: map[string]string{"version": "1.0+git", "os": "linux", "arch": "aarch64"}, Manifest: []byte(appManifest), Files: map[string]string{"bin/app": "app"},
	})
	return app, base
}

// TestImageSaysWhatTheManifestSays holds manifest and configuration against what they were: nodes know them by their digests.
func TestImageSaysWhatTheManifestSays(t *testing.T) {
	s := newScene(t)
	app, base := s.putApp()
	c, m := s.manifest("example.com/app", "1.0_git")
	var config imagespec.Image
	raw := s.blob("example.com/app", m.Config)
	if err := json.Unmarshal(raw, &config); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"created":"2016-03-04T03:06:07Z","author":"Ann \u003cann@example.com\u003e","architecture":"arm64","os":"linux","variant":"v8",`+
		`"config":{"User":"100:daemon","ExposedPorts":{"5000/udp":{},"5001/udp":{},"80/tcp":{}},"Env":["B=2","A=x=y"],"Entrypoint":["/bin/app","--all"],"Volumes":{"/data":{}},"WorkingDir":"/srv",`+
		`"Labels":{"example.com/commit":"abc","team":"web"}},"rootfs":{"type":"layers","diff_ids":["%s","%s"]},`+
		`"history":[{"created":"2016-03-04T03:06:07Z","created_by":"appc image example.com/base:7 %v"},{"created":"2016-03-04T03:06:07Z","created_by":"appc image example.com/app:1.0+git %v"}]}`,
		m.Layers[0].Digest, m.Layers[1].Digest, base.ImageID, app.ImageID)
	if string(raw) != want {
		t.Errorf("the configuration is\n%s\nwant\n%s", raw, want)
	}
	wantAnnotations := map[string]string{
		AnnotationName: "example.com/app", AnnotationImageID: app.ImageID.String(), AnnotationDigest: app.Digest.String(),
		imagespec.AnnotationCreated: "2016-03-04T05:06:07+02:00", imagespec.AnnotationAuthors: "Ann <ann@example.com>", imagespec.AnnotationURL: "https://example.com/",
		imagespec.AnnotationDocumentation: "https://example.com/docs", imagespec.AnnotationVersion: "1.0+git",
	}
	if got, want := fmt.Sprint(m.Annotations), fmt.Sprint(wantAnnotations); got != want {
		t.Errorf("the annotations are %s, want %s", got, want)
	}
	if c.MediaType != MediaTypeManifest || m.MediaType != MediaTypeManifest || len(m.Layers) != 2 || m.Layers[0].MediaType != MediaTypeLayer {
		t.Errorf("it is %+v", m)
	}
	for i, want := range []string{"etc/os-release", "bin/app"} {
		if got := strings.Join(entries(t, s.blob("example.com/app", m.Layers[i])), "\n"); !strings.Contains(got, want) {
			t.Errorf("layer %d has\n%s\nand not %s", i, got, want)
		}
	}
	const golden = "sha256:399e7034527761678d26aa932be93119eee4b346ec3660ff66df61d074d6687b"
	if got := c.Digest.String(); got != golden {
		t.Errorf("the manifest is %s, and was %s", got, golden)
	}
}

// TestMadeOnce asks for an image by many clients at once, again, and after a restart.
func TestMadeOnce(t *testing.T) {
	s := newScene(t)
	s.putApp()
	var all sync.WaitGroup
	digests := make(chan acproxy.Digest, 20)
	for range cap(digests) {
		all.Go(func() {
			c, err := s.bridge.Manifest(t.Context(), query("example.com/app"), "1.0_git", anything)
			if err != nil {
				t.Error(err)
				return
			}
			digests <- c.Digest
		})
	}
	all.Wait()
	close(digests)
	first := <-digests
	for d := range digests {
		if d != first {
			t.Errorf("one got %v and another one %v", first, d)
		}
	}
	// The layer below is there already for the next image that needs it.
	s.put(acitest.Spec{Name: "example.com/other", Dependencies: []acitest.Dependency{{Name: "example.com/base"}}})
	if layers := s.layers("example.com/other"); len(layers) != 2 {
		t.Errorf("%d layers", len(layers))
	}
	if n := s.converted.Load(); n != 3 {
		t.Errorf("%d layers were made, want 3", n)
	}
	s.reopen()
	c, m := s.manifest("example.com/app", first.String())
	if again, _ := s.manifest("example.com/app", "1.0_git"); c.Digest != first || again.Digest != first {
		t.Errorf("after a restart it is %v and %v, and was %v", c.Digest, again.Digest, first)
	}
	s.blob("example.com/app", m.Config)
	if n := s.converted.Load(); n != 3 {
		t.Errorf("%d layers were made after a restart, want none", n-3)
	}
	// A layer isn't kept over it: the first to ask has it made, for all.
	for range 3 {
		s.blob("example.com/app", m.Layers[1])
	}
	if n := s.converted.Load(); n != 4 {
		t.Errorf("%d layers were made for who asks for one, want 1", n-3)
	}
}

// TestDamagedDocument changes what was written down.
func TestDamagedDocument(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(file string) error
	}{
		{"removed", os.Remove},
		{"cut", func(file string) error { return os.Truncate(file, 100) }},
		{"emptied", func(file string) error { return os.Truncate(file, 0) }},
		{"changed", func(file string) error {
			b, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, bytes.Replace(b, []byte(`"manifest":"ey`), []byte(`"manifest":"fy`), 1), 0o600)
			}
			return err
		}},
		{"under another name", func(file string) error {
			return os.Rename(file, strings.Replace(file, filepath.Base(file)[:4], "0000", 1))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t)
			s.putApp()
			before, _ := s.manifest("example.com/app", "1.0_git")
			files, err := filepath.Glob(filepath.Join(s.cfg.Dir, "*"))
			if err != nil || len(files) != 1 {
				t.Fatalf("files: %q, %v", files, err)
			}
			if err := tt.do(files[0]); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.cfg.Dir, ".tmp-ABC"), []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.reopen()
			if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), before.Digest.String(), anything); acproxy.Code(err) != "no-such-digest" {
				t.Errorf("by its digest: %v", err)
			}
			after, _ := s.manifest("example.com/app", "1.0_git")
			if after.Digest != before.Digest {
				t.Errorf("it is %v, and was %v", after.Digest, before.Digest)
			}
			s.manifest("example.com/app", before.Digest.String())
			if files, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "*")); len(files) != 1 {
				t.Errorf("files in the end: %q", files)
			}
		})
	}
}

func TestPlatforms(t *testing.T) {
	s := newScene(t, func(c *Config) { c.Platforms = []Platform{{"linux", "amd64"}, {"linux", "aarch64"}} })
	for _, arch := range []string{"amd64", "aarch64"} {
		s.put(acitest.Spec{Name: "example.com/both", Labels: map[string]string{"version": "1", "os": "linux", "arch": arch}, Files: map[string]string{"arch": arch}})
	}
	s.put(acitest.Spec{Name: "example.com/one", Labels: map[string]string{"version": "1", "os": "linux", "arch": "aarch64"}})
	s.put(acitest.Spec{Name: "example.com/any", Labels: map[string]string{"version": "1"}})
	index := func(name string) (acproxy.Digest, []imagespec.Descriptor) {
		c, err := s.bridge.Manifest(t.Context(), query(name), "1", anything)
		if err != nil {
			t.Fatal(err)
		}
		var index imagespec.Index
		if err := json.Unmarshal(s.content(c), &index); err != nil || c.MediaType != MediaTypeIndex || index.MediaType != MediaTypeIndex {
			t.Errorf("%s is %s, %v", name, c.MediaType, err)
		}
		return c.Digest, index.Manifests
	}
	platforms := func(all []imagespec.Descriptor) string {
		var out []string
		for _, d := range all {
			out = append(out, d.Platform.OS+"/"+d.Platform.Architecture+d.Platform.Variant)
		}
		return strings.Join(out, " ")
	}
	digest, both := index("example.com/both")
	if got := platforms(both); got != "linux/amd64 linux/arm64v8" || both[0].Digest == both[1].Digest {
		t.Errorf("both is for %s: %+v", got, both)
	}
	_, one := index("example.com/one")
	if got := platforms(one); got != "linux/arm64v8" {
		t.Errorf("one is for %s", got)
	}
	_, noarch := index("example.com/any")
	if got := platforms(noarch); got != "linux/amd64 linux/arm64v8" {
		t.Errorf("any is for %s", got)
	}
	_, first := s.manifest("example.com/any", noarch[0].Digest.String())
	_, second := s.manifest("example.com/any", noarch[1].Digest.String())
	if first.Layers[0].Digest != second.Layers[0].Digest || first.Config.Digest == second.Config.Digest {
		t.Errorf("of one image for every platform: %+v and %+v", first, second)
	}
	// Who reads no index gets the first manifest, and who reads neither an error.
	c, err := s.bridge.Manifest(t.Context(), query("example.com/both"), "1", func(m string) bool { return m == MediaTypeManifest })
	if err != nil || c.Digest.String() != both[0].Digest.String() {
		t.Errorf("without an index: %+v, %v", c, err)
	}
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/both"), "1", func(string) bool { return false }); acproxy.Code(err) != "not-acceptable" {
		t.Errorf("without anything: %v", err)
	}
	s.reopen()
	if c, err := s.bridge.Manifest(t.Context(), query("example.com/both"), digest.String(), anything); err != nil || c.MediaType != MediaTypeIndex {
		t.Errorf("the index after a restart: %+v, %v", c, err)
	}
}

// TestWhatMayNotBeHad asks for what a client may not have, and for what isn't accepted any more.
func TestWhatMayNotBeHad(t *testing.T) {
	s := newScene(t)
	s.putApp()
	c, m := s.manifest("example.com/app", "1.0_git")
	digest := func(d imagespec.Descriptor) acproxy.Digest {
		parsed, err := acproxy.ParseDigest(d.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		return parsed
	}
	ask := func(q Query) map[string]error {
		out := make(map[string]error)
		_, out["tag"] = s.bridge.Manifest(t.Context(), q, "1.0_git", anything)
		_, out["digest"] = s.bridge.Manifest(t.Context(), q, c.Digest.String(), anything)
		_, out["configuration"] = s.bridge.Blob(t.Context(), q, digest(m.Config))
		_, out["own layer"] = s.bridge.Blob(t.Context(), q, digest(m.Layers[1]))
		_, out["layer below"] = s.bridge.Blob(t.Context(), q, digest(m.Layers[0]))
		return out
	}
	not := errors.New("you may not")
	for _, name := range []string{"example.com/app", "example.com/base"} {
		q := query("example.com/app")
		q.May = func(asked string) error {
			if asked == name {
				return not
			}
			return nil
		}
		for what, err := range ask(q) {
			if !errors.Is(err, not) {
				t.Errorf("who may not have %s asks for the %s: %v", name, what, err)
			}
		}
	}
	// A digest is known under the name of the image that it is in.
	for what, err := range ask(query("example.com/base")) {
		if what != "tag" && acproxy.Code(err) != "no-such-digest" {
			t.Errorf("under another name, the %s: %v", what, err)
		}
	}
	s.fetcher.Change(fetch.Settings{Offline: true})
	for what, err := range ask(query("example.com/app")) {
		if !errors.Is(err, acproxy.ErrRefused) && !errors.Is(err, acproxy.ErrNotFound) && !errors.Is(err, acproxy.ErrOffline) {
			t.Errorf("when only what is signed is accepted, the %s: %v", what, err)
		}
	}
	if _, err := s.bridge.Tags(query("example.com/app")); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("when only what is signed is accepted, the tags: %v", err)
	}
}

func TestTags(t *testing.T) {
	s := newScene(t)
	s.putApp()
	for _, version := range []string{"2.0", "1.0", "1.0-beta", strings.Repeat("9", 200), "a b"} {
		s.put(acitest.Spec{Name: "example.com/app", Labels: map[string]string{"version": version}})
	}
	s.put(acitest.Spec{Name: "example.com/app/below", Labels: map[string]string{"version": "3"}})
	got, err := s.bridge.Tags(query("example.com/app"))
	if want := []string{"1.0", "1.0-beta", "1.0_git", "2.0"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("the tags are %q, %v, want %q", got, err, want)
	}
	if _, err := s.bridge.Tags(query("example.com/nothing")); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("the tags of what isn't held: %v", err)
	}
	for _, tag := range []string{"-1", ".", strings.Repeat("9", 129), "a/b", "1+1"} {
		if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), tag, anything); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("the tag %q: %v", tag, err)
		}
	}
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), "sha512:00", anything); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("a digest of another kind: %v", err)
	}
}

// TestNoSpool has layers not be kept, and be kept for a while.
func TestNoSpool(t *testing.T) {
	t.Run("none", func(t *testing.T) {
		s := newScene(t, func(c *Config) { c.Spool = nil })
		s.putApp()
		_, m := s.manifest("example.com/app", "1.0_git")
		for range 2 {
			s.blob("example.com/app", m.Layers[0])
		}
		if n := s.converted.Load(); n != 2 {
			t.Errorf("%d layers were made to be known, want 2", n)
		}
	})
	t.Run("no space", func(t *testing.T) {
		s := newScene(t)
		s.putApp()
		// Less than is taken: nothing is free for what isn't needed.
		s.store.SetQuota(cache.Quota{MaxSize: 1 << 20, Grace: time.Hour})
		_, m := s.manifest("example.com/app", "1.0_git")
		s.blob("example.com/app", m.Layers[0])
		if u, err := s.store.Usage(); err != nil || u.Spools != 0 {
			t.Errorf("spools of %d bytes, %v", u.Spools, err)
		}
	})
	t.Run("for a while", func(t *testing.T) {
		var ahead atomic.Int64
		s := newScene(t, func(c *Config) {
			c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
			c.Keep = time.Minute
		})
		s.putApp()
		_, m := s.manifest("example.com/app", "1.0_git")
		s.bridge.dropUnused()
		if u, err := s.store.Usage(); err != nil || u.Spools == 0 {
			t.Errorf("nothing is kept: %+v, %v", u, err)
		}
		ahead.Store(int64(time.Minute + time.Second))
		s.bridge.dropUnused()
		if u, err := s.store.Usage(); err != nil || u.Spools != 0 {
			t.Errorf("spools of %d bytes are kept, %v", u.Spools, err)
		}
		s.blob("example.com/app", m.Layers[0])
	})
}

// TestDamagedBefore damages an image before its layer was ever made: nothing of it is remembered.
func TestDamagedBefore(t *testing.T) {
	suspected := make(chan acproxy.Digest, 10)
	s := newScene(t, func(c *Config) {
		c.Suspect = func(_ context.Context, digest acproxy.Digest) error { suspected <- digest; return nil }
	})
	rec := s.put(acitest.Spec{Name: "example.com/app", Compression: acitest.None, Files: map[string]string{"a": strings.Repeat("a", 100_000)}})
	file := filepath.Join(s.dir, "store", "blobs", rec.Digest.Hex()[:2], rec.Digest.Hex())
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[bytes.LastIndexByte(bad, 'a')] ^= 1
	if err := os.WriteFile(file, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), latest, anything); acproxy.Code(err) != "image-damaged" || !errors.Is(err, acproxy.ErrBusy) {
		t.Errorf("error = %v", err)
	}
	if got := <-suspected; got != rec.Digest {
		t.Errorf("%v is suspected", got)
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	s.layers("example.com/app")
	s.reopen()
	s.layers("example.com/app")
}

// TestSharedLayer asks for a layer that several versions have, of which one is gone.
func TestSharedLayer(t *testing.T) {
	s := newScene(t)
	s.put(acitest.Spec{Name: "example.com/base", Files: map[string]string{"base": "base"}})
	var recs []cache.Record
	var manifests []imagespec.Manifest
	for _, version := range []string{"1", "2"} {
		recs = append(recs, s.put(acitest.Spec{Name: "example.com/app", Labels: map[string]string{"version": version}, Dependencies: []acitest.Dependency{{Name: "example.com/base"}}}))
		_, m := s.manifest("example.com/app", version)
		manifests = append(manifests, m)
	}
	if manifests[0].Layers[0].Digest != manifests[1].Layers[0].Digest {
		t.Fatal("they share no layer")
	}
	if err := s.store.Delete(t.Context(), recs[0].Digest); err != nil {
		t.Fatal(err)
	}
	s.missed.Store(0)
	s.blob("example.com/app", manifests[1].Layers[0])
	if n := s.missed.Load(); n != 0 {
		t.Errorf("%d times an image was asked for that nobody wants", n)
	}
}

// TestNamesThatAreNotAllowed asks for what is held, and not allowed any more.
func TestNamesThatAreNotAllowed(t *testing.T) {
	s := newScene(t)
	s.putApp()
	c, m := s.manifest("example.com/app", "1.0_git")
	s.fetcher.Change(fetch.Settings{Offline: true, Allow: []string{"example.org"}, Policies: []fetch.Policy{{Trust: trust.Policy{Signature: trust.Optional}}}})
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), c.Digest.String(), anything); acproxy.Code(err) != "name-not-allowed" {
		t.Errorf("the manifest: %v", err)
	}
	digest, _ := acproxy.ParseDigest(m.Layers[0].Digest.String())
	if _, err := s.bridge.Blob(t.Context(), query("example.com/app"), digest); acproxy.Code(err) != "name-not-allowed" {
		t.Errorf("a layer: %v", err)
	}
	if tags, err := s.bridge.Tags(query("example.com/app")); err == nil {
		t.Errorf("the tags: %q", tags)
	}
}

// TestTagWithAnUnderscore holds several versions that look the same as tags.
func TestTagWithAnUnderscore(t *testing.T) {
	s := newScene(t)
	annotation := func(tag string) string {
		_, m := s.manifest("example.com/app", tag)
		return m.Annotations[imagespec.AnnotationVersion]
	}
	put := func(version string) {
		s.put(acitest.Spec{Name: "example.com/app", Labels: map[string]string{"version": version}})
	}
	put("1+0")
	if got := annotation("1_0"); got != "1+0" {
		t.Errorf("1_0 is %s when only that is held", got)
	}
	put("1_0")
	if got := annotation("1_0"); got != "1_0" {
		t.Errorf("1_0 is %s when it is held itself", got)
	}
}

// TestQueue has clients ask for many images, and leave before the turn of any has come.
func TestQueue(t *testing.T) {
	s := newScene(t)
	for i := range 20 {
		s.put(acitest.Spec{Name: fmt.Sprintf("example.com/app%d", i), Seed: uint64(i), RootfsSize: 1000})
	}
	for range s.bridge.cfg.Parallel {
		s.bridge.turns <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			if _, err := s.bridge.Manifest(ctx, query(fmt.Sprintf("example.com/app%d", i)), latest, anything); !errors.Is(err, context.Canceled) {
				t.Errorf("who has left: %v", err)
			}
		})
	}
	queued := func() int {
		s.bridge.mu.Lock()
		defer s.bridge.mu.Unlock()
		return s.bridge.queued
	}
	until := func(what string, ok func() bool) {
		for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: that doesn't happen; %d wait", what, queued())
			}
		}
	}
	until("all wait", func() bool { return queued() == 20 })
	if u, err := s.store.Usage(); err != nil || u.Spools != 0 {
		t.Errorf("%d bytes are promised to what waits, %v", u.Spools, err)
	}
	cancel()
	all.Wait()
	until("none waits", func() bool { return queued() == 0 })
	for range s.bridge.cfg.Parallel {
		<-s.bridge.turns
	}
	if n := s.converted.Load(); n != 0 {
		t.Errorf("%d images were read for nobody", n)
	}
	s.layers("example.com/app1")
	// A queue that is full says so.
	s.bridge.mu.Lock()
	s.bridge.queued += maxQueued
	s.bridge.mu.Unlock()
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/app2"), latest, anything); acproxy.Code(err) != "too-many-conversions" {
		t.Errorf("when too many wait: %v", err)
	}
	s.bridge.mu.Lock()
	s.bridge.queued -= maxQueued
	s.bridge.mu.Unlock()
	s.layers("example.com/app2")
}

// TestDamagedImage changes a byte of an image that isn't compressed, and has its layer sent without a file.
func TestDamagedImage(t *testing.T) {
	for _, keep := range []bool{true, false} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			s := newScene(t, func(c *Config) {
				if !keep {
					c.Spool = nil
				}
			})
			rec := s.put(acitest.Spec{Name: "example.com/app", Compression: acitest.None, Files: map[string]string{"a": strings.Repeat("a", 100_000)}})
			_, m := s.manifest("example.com/app", latest)
			s.reopen() // what was kept of it is gone
			file := filepath.Join(s.dir, "store", "blobs", rec.Digest.Hex()[:2], rec.Digest.Hex())
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			b[bytes.LastIndexByte(b, 'a')] ^= 1
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
			digest, err := acproxy.ParseDigest(m.Layers[0].Digest.String())
			if err != nil {
				t.Fatal(err)
			}
			c, err := s.bridge.Blob(t.Context(), query("example.com/app"), digest)
			if err != nil {
				t.Fatal(err)
			}
			var sent bytes.Buffer
			if err = c.Open(t.Context()); err == nil && !keep {
				_, err = c.Send(t.Context(), &sent)
			}
			_ = c.Close()
			if err == nil || c.File() != nil || int64(sent.Len()) >= c.Size {
				t.Errorf("%d of %d bytes are sent, %v", sent.Len(), c.Size, err)
			}
		})
	}
}

// TestNobodyIsAskedForWhatIsHeld pulls what is held while nothing is known of its name.
func TestNobodyIsAskedForWhatIsHeld(t *testing.T) {
	s := newScene(t)
	s.putApp()
	if _, ok := s.store.Known("example.com/app"); ok {
		t.Fatal("something is known of the name")
	}
	s.manifest("example.com/app", "1.0_git")
	if n := s.missed.Load(); n != 0 {
		t.Errorf("%d times something was missed that is held", n)
	}
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), "2", anything); !absent(err) || s.missed.Load() == 0 {
		t.Errorf("what isn't held: %v, missed %d times", err, s.missed.Load())
	}
}

// TestWhoWaitsTooLong keeps a client waiting for longer than it may be, and ends the bridge while something is made.
func TestWhoWaitsTooLong(t *testing.T) {
	hold, begun := make(chan struct{}), make(chan struct{}, 10)
	s := newScene(t, func(c *Config) {
		c.Wait = 50 * time.Millisecond
		spool := c.Spool
		c.Spool = func(what string, size int64) (*cache.Spool, error) {
			begun <- struct{}{}
			<-hold
			return spool(what, size)
		}
	})
	s.putApp()
	_, err := s.bridge.Manifest(t.Context(), query("example.com/app"), "1.0_git", anything)
	var e *acproxy.Error
	if !errors.As(err, &e) || e.Kind != acproxy.ErrBusy || e.Code != "converting" || e.RetryAfter == 0 {
		t.Errorf("error = %v, want one that says when to come back", err)
	}
	// A client that leaves ends nothing.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.bridge.Manifest(ctx, query("example.com/app"), "1.0_git", anything); !errors.Is(err, context.Canceled) {
		t.Errorf("who has left: %v", err)
	}
	<-begun
	close(hold)
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := s.bridge.Manifest(t.Context(), query("example.com/app"), "1.0_git", anything); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if err := s.bridge.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.bridge.once(t.Context(), "anything", func(*making) (any, error) { t.Error("it was done"); return nil, nil }); acproxy.Code(err) != "closing" {
		t.Errorf("after the end: %v", err)
	}
}

// TestWhatCannotBeMade asks twice for what has no OCI image.
func TestWhatCannotBeMade(t *testing.T) {
	s := newScene(t)
	s.put(acitest.Spec{Name: "example.com/wh", Files: map[string]string{".wh.x": ""}})
	s.put(acitest.Spec{Name: "example.com/owner", Manifest: []byte(strings.NewReplacer(`"user": "100"`, `"user": "/bin/app"`, "example.com/app", "example.com/owner", `"dependencies": [{"imageName": "example.com/base"}],`, "", `"labels": [{"name": "version", "value": "1.0+git"}, {"name": "os", "value": "linux"}, {"name": "arch", "value": "aarch64"}],`, "").Replace(appManifest))})
	s.put(acitest.Spec{Name: "example.com/needy", Dependencies: []acitest.Dependency{{Name: "example.com/wh", ImageID: acproxy.ImageID{1}}}})
	s.put(acitest.Spec{Name: "example.com/labels", Dependencies: []acitest.Dependency{{Name: "example.com/wh", Labels: map[string]string{"channel": "beta"}}}})
	s.put(acitest.Spec{Name: "example.com/self", Dependencies: []acitest.Dependency{{Name: "example.com/self"}}})
	for name, want := range map[string]string{
		"example.com/wh": codeUnconvertible, "example.com/owner": codeUnconvertible, "example.com/needy": "wrong-image-id", "example.com/self": codeUnconvertible,
	} {
		for range 2 {
			if _, err := s.bridge.Manifest(t.Context(), query(name), latest, anything); acproxy.Code(err) != want {
				t.Errorf("%s: %v (%s), want %s", name, err, acproxy.Code(err), want)
			}
		}
	}
	if _, err := s.bridge.Manifest(t.Context(), query("example.com/labels"), latest, anything); err == nil {
		t.Error("an image is taken that hasn't the labels that are needed")
	}
	if n := s.converted.Load(); n != 2 {
		t.Errorf("%d layers were read, want 2: each once", n)
	}
	if u, err := s.store.Usage(); err != nil || u.Open != 0 {
		t.Errorf("left: %+v, %v", u, err)
	}
}
