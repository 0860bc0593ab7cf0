package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// oci returns the URL of something that the OCI distribution API has of an image.
func (s *scene) oci(name, kind, what string) string {
	return s.plain() + "/v2/" + name + "/" + kind + "/" + what
}

// ociImage is an image as a client of the OCI distribution API has it.
type ociImage struct {
	name, digest string // of the manifest
	raw          []byte // the manifest
	manifest     imagespec.Manifest
	config       imagespec.Image
	layers       [][]byte
}

// A puller pulls images by the OCI distribution API. Its methods may be called by several goroutines.
type puller struct {
	s      *scene
	http   *http.Client
	header http.Header
}

// puller returns one that shows some header, names and values in turn.
func (s *scene) puller(header ...string) *puller {
	p := &puller{s: s, http: s.client(), header: http.Header{}}
	for i := 0; i+1 < len(header); i += 2 {
		p.header.Add(header[i], header[i+1])
	}
	return p
}

// get returns a whole answer, which has to be what its digest and length say, and the digest.
func (p *puller) get(ctx context.Context, url, mediaType string) (body []byte, digest string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	maps.Copy(req.Header, p.header)
	resp, err := p.http.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return nil, "", fmt.Errorf("%s: after %d bytes: %w", url, len(body), err)
	}
	digest = "sha256:" + sumOf(body)
	switch {
	case resp.StatusCode != http.StatusOK:
		return nil, "", fmt.Errorf("%s: %s\n%s", url, resp.Status, body)
	case resp.Header.Get("Docker-Content-Digest") != digest:
		return nil, "", fmt.Errorf("%s: what has the digest %s is called %q", url, digest, resp.Header.Get("Docker-Content-Digest"))
	case resp.ContentLength != int64(len(body)):
		return nil, "", fmt.Errorf("%s: Content-Length %d for %d bytes", url, resp.ContentLength, len(body))
	case resp.Header.Get("Content-Type") != mediaType:
		return nil, "", fmt.Errorf("%s: Content-Type %q, want %s", url, resp.Header.Get("Content-Type"), mediaType)
	}
	return body, digest, nil
}

// pull pulls an image by a tag, or by the digest of its manifest.
func (p *puller) pull(ctx context.Context, name, reference string) (im ociImage, err error) {
	im.name = name
	if im.raw, im.digest, err = p.get(ctx, p.s.oci(name, "manifests", reference), imagespec.MediaTypeImageManifest); err != nil {
		return im, err
	}
	if strings.Contains(reference, ":") && im.digest != reference {
		return im, fmt.Errorf("asked for %s, and got %s", reference, im.digest)
	}
	if err = json.Unmarshal(im.raw, &im.manifest); err != nil {
		return im, err
	}
	blob := func(d imagespec.Descriptor) ([]byte, error) {
		body, digest, err := p.get(ctx, p.s.oci(name, "blobs", d.Digest.String()), d.MediaType)
		if err == nil && (digest != d.Digest.String() || int64(len(body)) != d.Size) {
			err = fmt.Errorf("a blob of %s that has to be %d bytes with %v is %d with %s", name, d.Size, d.Digest, len(body), digest)
		}
		return body, err
	}
	config, err := blob(im.manifest.Config)
	if err == nil {
		err = json.Unmarshal(config, &im.config)
	}
	for _, d := range im.manifest.Layers {
		var layer []byte
		if err == nil {
			layer, err = blob(d)
		}
		im.layers = append(im.layers, layer)
	}
	return im, err
}

// pullOCI pulls an image by the OCI distribution API, and checks what it got: that its layers are those of some appc images.
func (s *scene) pullOCI(name, reference string, layers ...image) ociImage {
	s.t.Helper()
	im, err := s.puller().pull(s.context(), name, reference)
	if err != nil {
		s.t.Fatal(err)
	}
	wantLayers(s.t, im, layers...)
	return im
}

// wantLayers checks that an OCI image has the layers that some appc images make, and says so.
func wantLayers(t testing.TB, im ociImage, of ...image) {
	t.Helper()
	if len(im.layers) != len(of) || len(im.config.RootFS.DiffIDs) != len(of) {
		t.Fatalf("%s has %d layers, and %d in its configuration, want %d", im.name, len(im.layers), len(im.config.RootFS.DiffIDs), len(of))
	}
	for i, layer := range im.layers {
		if got, want := filesOf(t, layer, ""), filesOf(t, of[i].aci, "rootfs"); !slices.Equal(got, want) {
			t.Errorf("layer %d of %s has\n%s\nwant what is in the rootfs of %s:\n%s", i, im.name, strings.Join(got, "\n"), of[i].name, strings.Join(want, "\n"))
		}
		if got, want := im.config.RootFS.DiffIDs[i].String(), "sha256:"+sumOf(layer); got != want {
			t.Errorf("the configuration of %s says %s of layer %d, want %s", im.name, got, i, want)
		}
	}
	own := of[len(of)-1]
	for name, want := range map[string]string{"io.acproxy.image-name": own.name, "io.acproxy.image-id": own.id.String(), "io.acproxy.digest": "sha256:" + own.sum} {
		if got := im.manifest.Annotations[name]; got != want {
			t.Errorf("the annotation %s of %s is %q, want %q", name, im.name, got, want)
		}
	}
}

// filesOf describes everything in a tar, or below a directory of it, in order.
func filesOf(t testing.TB, archive []byte, below string) []string {
	t.Helper()
	var plain io.Reader = bytes.NewReader(archive)
	if bytes.HasPrefix(archive, []byte("\x1f\x8b")) {
		plain = must(gzip.NewReader(plain))(t)
	}
	within := func(name string) (string, bool) {
		name = strings.TrimSuffix(name, "/")
		if below == "" {
			return name, true
		}
		if name == below {
			return ".", true
		}
		return strings.CutPrefix(name, below+"/")
	}
	var out []string
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		name, ok := within(h.Name)
		if !ok {
			continue
		}
		target := h.Linkname
		if h.Typeflag == tar.TypeLink {
			target, _ = within(target)
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, r); err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%s %c → %q, %o %d:%d %q:%q, device %d/%d, %d, %v, %d bytes %x", name, h.Typeflag, target,
			h.Mode, h.Uid, h.Gid, h.Uname, h.Gname, h.Devmajor, h.Devminor, h.ModTime.Unix(), h.PAXRecords["SCHILY.xattr.user.note"], h.Size, hash.Sum(nil)))
	}
}

// filed is the Spec of an image with every kind of file that root can make anywhere.
func filed(name string) acitest.Spec {
	spec := app(name)
	run, again := acitest.File("rootfs/bin/run", "#!/bin/sh\n"), acitest.Link("rootfs/bin/again", "rootfs/bin/run")
	for _, h := range []*tar.Header{&run.Header, &again.Header} {
		h.Mode, h.Uid, h.Gid, h.Uname = 0o4755, 17, 5, "runner"
	}
	long := acitest.File("rootfs/"+strings.Repeat("long/", 30)+"name", "at the end of a long path")
	spec.Extra = []acitest.Entry{acitest.Dir("rootfs/bin"), run, acitest.Symlink("rootfs/bin/sh", "/bin/run"), again, long}
	return spec
}

// noted is filed, with what can't be made everywhere.
func noted(name string) acitest.Spec {
	spec := filed(name)
	note := acitest.File("rootfs/noted", "has an extended attribute")
	note.Header.PAXRecords = map[string]string{"SCHILY.xattr.user.note": "well"}
	spec.Extra = append(spec.Extra, note, acitest.Device("rootfs/null"))
	return spec
}

// needing returns a Spec with dependencies.
func needing(spec acitest.Spec, needed ...image) acitest.Spec {
	for _, im := range needed {
		spec.Dependencies = append(spec.Dependencies, acitest.Dependency{Name: im.name, Labels: im.labels})
	}
	return spec
}

// wantConverted checks how many images the server has made OCI images of since it was started.
func (s *scene) wantConverted(images int) {
	s.t.Helper()
	made := func() int { return strings.Count(s.server().output(), `"msg":"an OCI image was made"`) }
	// What the server has said may be on its way yet.
	eventually(s.t, fmt.Sprintf("the log tells of %d OCI images that were made", images), func() bool { return made() >= images })
	if got := made(); got != images {
		s.t.Errorf("the log tells of %d OCI images that were made, want %d", got, images)
	}
}

// wantLayersMade checks how many layers the server has made since it was started.
func (s *scene) wantLayersMade(layers int) {
	s.t.Helper()
	if got := s.metric(`acproxy_oci_layer_seconds_count{outcome="made"}`); got != float64(layers) {
		s.t.Errorf("%v layers were made, want %d", got, layers)
	}
}

// wantAskedOnce checks that the publisher was asked once for each image and its signature.
func (s *scene) wantAskedOnce(images ...image) {
	s.t.Helper()
	for _, im := range images {
		for _, pattern := range []string{im.blob(), im.signature()} {
			if n := s.publisher.Count(pattern); n != 1 {
				s.t.Errorf("the publisher was asked for %s %d times, want once", pattern, n)
			}
		}
	}
}

// ociError is an error as the OCI distribution specification has it, with a problem for its detail.
type ociError struct {
	Code, Message string
	Detail        struct {
		Type, Detail string
		Status       int
	}
}

// ociErrorOf returns the error that an answer is.
func ociErrorOf(a node.Answer) (e ociError, err error) {
	var body struct{ Errors []ociError }
	if err := json.Unmarshal(a.Body, &body); err != nil {
		return e, err
	}
	if len(body.Errors) != 1 {
		return e, fmt.Errorf("there are %d errors, want 1", len(body.Errors))
	}
	return body.Errors[0], nil
}

// wantOCIError checks that an answer is an error with a code of the OCI distribution specification, and one of a problem.
func wantOCIError(t testing.TB, a node.Answer, status int, code, problem string) {
	t.Helper()
	if !wantStatus(t, a, status) {
		return
	}
	wantHeader(t, a, "Content-Type", "application/json")
	e, err := ociErrorOf(a)
	if err != nil || e.Code != code || e.Message == "" || e.Message != e.Detail.Detail || e.Detail.Status != status || e.Detail.Type != "urn:acproxy:problem:"+problem {
		t.Errorf("%s %s: %v, want %s with the problem %s, a message, and both the same\n%s", a.Method, a.URL, err, code, problem, a.Body)
	}
}

// TestOCIDoor pulls an image that needs another one: cold, held, and when its publisher is gone.
func TestOCIDoor(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		keep  string
		again int // how many layers are made again after a restart, for whoever asks for them first
	}{"layers are kept": {"1h", 2}, "layers are not kept": {"0s", 0}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			throughTheOCIDoor(t, tt.keep, tt.again)
		})
	}
}

func throughTheOCIDoor(t *testing.T, keep string, again int) {
	s := newScene(t, "{freshness: {ttl: 0s}, discovery: {positive_ttl: 0s}, oci: {keep: "+keep+"}}")
	base := s.publish(noted("base"))
	top := s.publish(needing(large("web", 300<<10), base))
	cold := s.get(s.oci(top.name, "manifests", "1.0.0"))
	wantStatus(t, cold, http.StatusOK)
	wantHeader(t, cold, "Cache-Status", miss)
	wantHeader(t, cold, "Docker-Distribution-Api-Version", "registry/2.0")
	wantHeader(t, cold, "Vary", "Accept")
	im := s.pullOCI(top.name, "1.0.0", base, top)
	if !bytes.Equal(im.raw, cold.Body) {
		t.Error("the manifest is another one the second time")
	}
	if im.config.OS != "linux" || im.config.Architecture != "amd64" {
		t.Errorf("it is for %s/%s, want linux/amd64", im.config.OS, im.config.Architecture)
	}
	if got := s.pullOCI(top.name, im.digest, base, top); !bytes.Equal(got.raw, im.raw) {
		t.Error("its digest gives another manifest than its tag")
	}
	// rkt and containerd may share an acproxy: what one fetched the other has.
	s.fetchAsRkt(s.node, top)
	s.wantAskedOnce(base, top)
	s.wantConverted(1)
	s.wantLayersMade(2)

	held := func(t *testing.T) {
		t.Helper()
		s.publisher.ClearRequests()
		warm := s.get(s.oci(top.name, "manifests", "1.0.0"))
		wantStatus(t, warm, http.StatusOK)
		wantHeader(t, warm, "Cache-Status", hit)
		wantHeader(t, warm, "Docker-Content-Digest", im.digest)
		for _, reference := range []string{"1.0.0", im.digest} {
			if got := s.pullOCI(top.name, reference, base, top); !bytes.Equal(got.raw, im.raw) {
				t.Errorf("%s gives another manifest now", reference)
			}
		}
		if n := s.publisher.Count("*.aci*"); n != 0 {
			t.Errorf("the publisher was asked for images and signatures %d times: %v", n, s.publisher.Requests())
		}
	}
	t.Run("held", held)
	s.publisher.Stop()
	t.Run("the publisher is gone", held)
	s.wantConverted(1)
	for _, signal := range []syscall.Signal{sigterm, sigkill} {
		s.restart(signal)
		// The digest first: what was made is known without a tag.
		if got := s.pullOCI(top.name, im.digest, base, top); !bytes.Equal(got.raw, im.raw) {
			t.Error("after a restart the digest gives something else")
		}
		t.Run("after a restart", held)
		s.wantConverted(0)
		s.wantLayersMade(again)
	}
	// A name of its own shares the layer, and needs an image of its own.
	if got := s.pullOCI(base.name, "1.0.0", base); got.manifest.Layers[0].Digest != im.manifest.Layers[0].Digest {
		t.Error("the same image has two layers")
	}
	s.wantConverted(1)
	s.wantLayersMade(again)
}

// TestOCIOffline: what is held is had, by tag and digest, when nobody may be asked.
func TestOCIOffline(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	base := s.publish(app("base"))
	top := s.publish(needing(app("web"), base))
	s.hold(base)
	s.hold(top)
	s.server().end(sigterm)
	s.configure("offline: true")
	s.start()
	s.publisher.ClearRequests()
	im := s.pullOCI(top.name, "1.0.0", base, top)
	s.pullOCI(top.name, im.digest, base, top)
	wantOCIError(t, s.get(s.oci(top.name, "manifests", "2.0.0")), http.StatusNotFound, "MANIFEST_UNKNOWN", "offline")
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times: %v", n, s.publisher.Requests())
	}
	if _, out := s.cli("missing"); strings.Contains(out, top.name+" ") || strings.Contains(out, base.name) {
		t.Errorf("what is held is listed as missing:\n%s", out)
	}
	// What isn't held any more can't be had by a digest that somebody remembers.
	s.delete(base)
	for _, url := range []string{s.oci(top.name, "manifests", im.digest), s.oci(top.name, "manifests", "1.0.0")} {
		a := s.get(url)
		wantOCIError(t, a, http.StatusNotFound, "MANIFEST_UNKNOWN", "offline")
		if !strings.Contains(string(a.Body), base.name) {
			t.Errorf("the error doesn't say that %s is what is missing: %s", base.name, a.Body)
		}
	}
	wantOCIError(t, s.get(s.oci(top.name, "blobs", im.manifest.Layers[1].Digest.String())), http.StatusNotFound, "BLOB_UNKNOWN", "offline")
}

// delete has the server delete an image.
func (s *scene) delete(im image) {
	s.t.Helper()
	client := must(admin.Dial(s.path("data", "admin.sock")))(s.t)
	if err := client.Delete(s.context(), must(acproxy.ParseDigest(blobDigest(im)))(s.t)); err != nil {
		s.t.Fatal(err)
	}
}

// TestOCIForgottenImages asks by their digests for images that were deleted: they are fetched again, as long as their publisher has them as they were.
func TestOCIForgottenImages(t *testing.T) {
	t.Parallel()
	s := newScene(t, "oci: {wait: 1s}")
	base := s.publish(large("base", 600<<10))
	top := s.publish(needing(app("web"), base))
	im := s.pullOCI(top.name, "1.0.0", base, top)
	for _, what := range []string{"the manifest", "a layer"} {
		s.delete(base)
		s.delete(top)
		s.publisher.ClearRequests()
		if what == "a layer" {
			layer := im.manifest.Layers[0]
			a := s.get(s.oci(top.name, "blobs", layer.Digest.String()))
			if wantStatus(t, a, http.StatusOK) && "sha256:"+a.SHA256 != layer.Digest.String() {
				t.Error("the layer is another one")
			}
		}
		s.pullOCI(top.name, im.digest, base, top)
		s.wantAskedOnce(base, top)
	}
	s.wantConverted(1)
	s.wantLayersMade(2)
	// A client isn't kept waiting for ever.
	s.delete(base)
	trouble := s.publisher.Misbehave(publisher.URL(base.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	for _, url := range []string{s.oci(top.name, "manifests", im.digest), s.oci(top.name, "blobs", im.manifest.Layers[0].Digest.String())} {
		began := time.Now()
		a := s.get(url)
		wantOCIError(t, a, http.StatusServiceUnavailable, "UNAVAILABLE", "converting")
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v to say that it takes longer than a second", took)
		}
	}
	trouble.End()
	eventually(t, "the image is back", func() bool { return s.get(s.oci(top.name, "manifests", im.digest)).Status == http.StatusOK })
	s.pullOCI(top.name, im.digest, base, top)
	// The publisher has another image now.
	s.delete(top)
	s.server().end(sigterm)
	s.configure("freshness: {on_change: follow}")
	s.start()
	spec := needing(app("web"), base)
	spec.Files = map[string]string{"hello.txt": "something else under the same version"}
	other := s.publish(spec)
	wantOCIError(t, s.get(s.oci(top.name, "manifests", im.digest)), http.StatusNotFound, "MANIFEST_UNKNOWN", "another-image")
	if got := s.pullOCI(top.name, "1.0.0", base, other); got.digest == im.digest {
		t.Error("another image has the same digest")
	}
	// And now none at all.
	s.delete(base)
	s.publisher.Stop()
	wantOCIError(t, s.get(s.oci(base.name, "manifests", im.digest)), http.StatusNotFound, "MANIFEST_UNKNOWN", "no-such-digest")
	a := s.get(s.oci(top.name, "manifests", "1.0.0"))
	if e, err := ociErrorOf(a); a.Status != http.StatusBadGateway || err != nil || e.Code != "UNAVAILABLE" || !strings.Contains(e.Message, base.name) {
		t.Errorf("with the publisher gone: %s, %v; want 502 and %s named", described(a), err, base.name)
	}
}

// TestOCIHeads compares HEAD with GET, and asks for what one has.
func TestOCIHeads(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	top := s.publish(filed("app"))
	im := s.pullOCI(top.name, "1.0.0", top)
	urls := []string{
		s.plain() + "/v2/", s.plain() + "/v2", s.oci(top.name, "manifests", "1.0.0"), s.oci(top.name, "manifests", im.digest), s.oci(top.name, "tags", "list"),
		s.oci(top.name, "blobs", im.manifest.Config.Digest.String()), s.oci(top.name, "blobs", im.manifest.Layers[0].Digest.String()),
		s.oci(top.name, "manifests", "2.0.0"), s.oci(top.name, "blobs", "sha256:"+strings.Repeat("0", 64)), s.oci(top.name, "referrers", im.digest),
	}
	for _, url := range urls {
		get, head := s.get(url), s.do(http.MethodHead, url)
		if get.Err != nil || head.Err != nil || head.Status != get.Status || head.Bytes != 0 {
			t.Errorf("HEAD %s = %s, want as GET: %s", url, described(head), described(get))
		}
		for _, field := range []string{"Content-Length", "Content-Type", "Docker-Content-Digest", "Etag", "Cache-Control", "Accept-Ranges", "Docker-Distribution-Api-Version"} {
			if url == s.plain()+"/v2/" && field == "Content-Length" || field == "Content-Length" && strings.HasSuffix(url, "/v2") {
				continue // net/http knows it of a body alone
			}
			if get.Header.Get(field) != head.Header.Get(field) {
				t.Errorf("HEAD %s: %s %q, and GET says %q", url, field, head.Header.Get(field), get.Header.Get(field))
			}
		}
		if length := get.Header.Get("Content-Length"); length != "" && length != fmt.Sprint(get.Bytes) {
			t.Errorf("%s: Content-Length %s with %d bytes", url, length, get.Bytes)
		}
	}
	root := s.get(s.plain() + "/v2/")
	wantStatus(t, root, http.StatusOK)
	wantHeader(t, root, "Content-Type", "application/json")
	if strings.TrimSpace(string(root.Body)) != "{}" {
		t.Errorf("the root is %q, want an object", root.Body)
	}
	// Whoever has it needn't fetch it.
	for url, digest := range map[string]string{
		s.oci(top.name, "manifests", "1.0.0"): im.digest, s.oci(top.name, "manifests", im.digest): im.digest,
		s.oci(top.name, "blobs", im.manifest.Layers[0].Digest.String()): im.manifest.Layers[0].Digest.String(),
	} {
		for tag, status := range map[string]int{
			`"` + digest + `"`: 304, `W/"` + digest + `"`: 304, `"x", "` + digest + `"`: 304, "*": 304, `"x"`: 200, digest: 200, `"sha256:` + strings.Repeat("0", 64) + `"`: 200,
		} {
			a := s.get(url, "If-None-Match", tag)
			wantStatus(t, a, status)
			if status == http.StatusNotModified && (a.Bytes != 0 || a.Header.Get("Etag") != `"`+digest+`"`) {
				t.Errorf("%s with If-None-Match %s: %d bytes, ETag %q", url, tag, a.Bytes, a.Header.Get("Etag"))
			}
		}
	}
	s.wantConverted(1)
}

// TestOCIRanges resumes blobs in the middle.
func TestOCIRanges(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	top := s.publish(large("app", 200<<10))
	im := s.pullOCI(top.name, "1.0.0", top)
	blob, layer := s.oci(top.name, "blobs", im.manifest.Layers[0].Digest.String()), im.layers[0]
	size := int64(len(layer))
	etag := `"` + im.manifest.Layers[0].Digest.String() + `"`
	for _, tt := range []struct {
		rng, ifRange string
		status       int
		from, to     int64
	}{
		{"bytes=0-99", "", 206, 0, 100},
		{"bytes=0-0", "", 206, 0, 1},
		{"bytes=-100", "", 206, size - 100, size},
		{fmt.Sprintf("bytes=-%d", size+5), "", 206, 0, size},
		{"bytes=100000-", "", 206, 100_000, size},
		{"bytes=511-513", "", 206, 511, 514},
		{fmt.Sprintf("bytes=%d-", size-1), "", 206, size - 1, size},
		{fmt.Sprintf("bytes=5-%d", size+100), "", 206, 5, size},
		{"bytes=0-", "", 206, 0, size},
		{fmt.Sprintf("bytes=%d-", size), "", 416, 0, 0},
		{fmt.Sprintf("bytes=%d-%d", size+1, size+2), "", 416, 0, 0},
		{"bytes=-0", "", 416, 0, 0},
		// What can't be read counts as if it weren't there (RFC 9110, section 14.2).
		{"bytes=", "", 200, 0, size}, {"bytes=-", "", 200, 0, size}, {"bytes=2-1", "", 200, 0, size}, {"bytes=x-", "", 200, 0, size}, {"bytes=+1-2", "", 200, 0, size},
		{"lines=1-2", "", 200, 0, size}, {"bytes=1", "", 200, 0, size},
		// Several at once may be answered with everything, and so may numbers that no length has.
		{"bytes=0-1,5-6", "", 200, 0, size}, {"bytes=99999999999999999999-", "", 200, 0, size}, {"bytes=0-99999999999999999999", "", 200, 0, size},
		{"bytes=100000-", etag, 206, 100_000, size},
		{"bytes=100000-", `"another"`, 200, 0, size},
		{"bytes=100000-", "W/" + etag, 200, 0, size}, // a weak one is none (RFC 9110, section 13.1.5)
		{"bytes=100000-", "Thu, 30 Jun 2016 12:00:00 GMT", 200, 0, size},
	} {
		t.Run(tt.rng+" "+tt.ifRange, func(t *testing.T) {
			header := []string{"Range", tt.rng}
			if tt.ifRange != "" {
				header = append(header, "If-Range", tt.ifRange)
			}
			a := s.get(blob, header...)
			if !wantStatus(t, a, tt.status) {
				return
			}
			if !bytes.Equal(a.Body, layer[tt.from:tt.to]) {
				t.Errorf("%d other bytes than those from %d to %d", len(a.Body), tt.from, tt.to)
			}
			want := map[int]string{206: fmt.Sprintf("bytes %d-%d/%d", tt.from, tt.to-1, size), 416: fmt.Sprintf("bytes */%d", size)}[tt.status]
			wantHeader(t, a, "Content-Range", want)
			wantHeader(t, a, "Content-Length", fmt.Sprint(tt.to-tt.from))
			wantHeader(t, a, "Docker-Content-Digest", im.manifest.Layers[0].Digest.String())
		})
	}
	// A HEAD has no ranges (RFC 9110, section 14.2).
	head := s.do(http.MethodHead, blob, "Range", "bytes=0-99")
	wantStatus(t, head, http.StatusOK)
	wantHeader(t, head, "Content-Length", fmt.Sprint(size))
	wantStatus(t, s.get(s.oci(top.name, "manifests", im.digest), "Range", "bytes=0-9"), http.StatusPartialContent)
}

const anyManifest = imagespec.MediaTypeImageIndex + ", " + imagespec.MediaTypeImageManifest

// TestOCIPlatforms has one server that looks for images for two platforms.
func TestOCIPlatforms(t *testing.T) {
	t.Parallel()
	s := newScene(t, "oci: {platforms: [linux/amd64, linux/aarch64]}")
	on := func(name, arch string) image {
		spec := app(name)
		spec.Labels = map[string]string{"version": "1.0.0", "os": "linux", "arch": arch}
		if arch == "" {
			spec.Labels = map[string]string{"version": "1.0.0"}
		}
		spec.Files = map[string]string{"arch": arch}
		return s.publish(spec)
	}
	amd64, arm64 := on("both", "amd64"), on("both", "aarch64")
	alone, noarch := on("arm-only", "aarch64"), on("noarch", "")
	index := func(name string) (index imagespec.Index) {
		t.Helper()
		raw, digest, err := s.puller("Accept", anyManifest).get(s.context(), s.oci(name, "manifests", "1.0.0"), imagespec.MediaTypeImageIndex)
		if err != nil {
			t.Fatal(err)
		}
		if again, _, err := s.puller().get(s.context(), s.oci(name, "manifests", digest), imagespec.MediaTypeImageIndex); err != nil || !bytes.Equal(again, raw) {
			t.Errorf("the index by its digest: %v, or other bytes", err)
		}
		if err := json.Unmarshal(raw, &index); err != nil || index.MediaType != imagespec.MediaTypeImageIndex || index.SchemaVersion != 2 {
			t.Fatalf("the index is %s, %v", raw, err)
		}
		return index
	}
	platforms := func(index imagespec.Index) (out []string) {
		for _, m := range index.Manifests {
			out = append(out, m.Platform.OS+"/"+m.Platform.Architecture+"/"+m.Platform.Variant)
		}
		return out
	}
	both := []string{"linux/amd64/", "linux/arm64/v8"}

	t.Run("for both", func(t *testing.T) {
		of := index(amd64.name)
		if got := platforms(of); !slices.Equal(got, both) {
			t.Fatalf("the index is for %v, want %v", got, both)
		}
		for i, im := range []image{amd64, arm64} {
			pulled := s.pullOCI(im.name, of.Manifests[i].Digest.String(), im)
			if got := pulled.config.OS + "/" + pulled.config.Architecture + "/" + pulled.config.Variant; got != both[i] {
				t.Errorf("image %d is for %s, want %s", i, got, both[i])
			}
			if of.Manifests[i].Size != int64(len(pulled.raw)) {
				t.Errorf("the index says %d bytes of a manifest with %d", of.Manifests[i].Size, len(pulled.raw))
			}
		}
		s.wantAskedOnce(amd64, arm64)
	})
	t.Run("for one", func(t *testing.T) {
		of := index(alone.name)
		if got := platforms(of); !slices.Equal(got, both[1:]) {
			t.Fatalf("the index is for %v, want %v", got, both[1:])
		}
		s.pullOCI(alone.name, of.Manifests[0].Digest.String(), alone)
	})
	t.Run("for every one", func(t *testing.T) {
		of := index(noarch.name)
		if got := platforms(of); !slices.Equal(got, both) {
			t.Fatalf("the index is for %v, want %v", got, both)
		}
		first, second := s.pullOCI(noarch.name, of.Manifests[0].Digest.String(), noarch), s.pullOCI(noarch.name, of.Manifests[1].Digest.String(), noarch)
		if first.digest == second.digest || first.manifest.Layers[0].Digest != second.manifest.Layers[0].Digest {
			t.Errorf("the manifests are %s and %s with the layers %v and %v, want two of one layer", first.digest, second.digest, first.manifest.Layers[0].Digest, second.manifest.Layers[0].Digest)
		}
		s.wantAskedOnce(noarch)
	})
	t.Run("what a client reads", func(t *testing.T) {
		const docker = "application/vnd.docker.distribution.manifest.v2+json"
		for _, tt := range []struct{ accept, mediaType string }{
			{anyManifest, imagespec.MediaTypeImageIndex},
			{imagespec.MediaTypeImageIndex, imagespec.MediaTypeImageIndex},
			{imagespec.MediaTypeImageManifest, imagespec.MediaTypeImageManifest},
			{imagespec.MediaTypeImageManifest + ", " + docker, imagespec.MediaTypeImageManifest},
			{imagespec.MediaTypeImageManifest + ", " + imagespec.MediaTypeImageIndex + ";q=0", imagespec.MediaTypeImageManifest},
			{"*/*", imagespec.MediaTypeImageIndex},
			{"application/*", imagespec.MediaTypeImageIndex},
			{"", imagespec.MediaTypeImageIndex},
			{docker, ""},
			{"text/html", ""},
		} {
			var header []string
			if tt.accept != "" {
				header = []string{"Accept", tt.accept}
			}
			a := s.get(s.oci(amd64.name, "manifests", "1.0.0"), header...)
			if tt.mediaType == "" {
				wantOCIError(t, a, http.StatusNotFound, "MANIFEST_UNKNOWN", "not-acceptable")
				continue
			}
			wantStatus(t, a, http.StatusOK)
			wantHeader(t, a, "Content-Type", tt.mediaType)
		}
		// Every type in a field of its own, as containerd and others send them.
		a := s.get(s.oci(amd64.name, "manifests", "1.0.0"), "Accept", docker, "Accept", imagespec.MediaTypeImageManifest)
		wantStatus(t, a, http.StatusOK)
		wantHeader(t, a, "Content-Type", imagespec.MediaTypeImageManifest)
	})
	wantOCIError(t, s.get(s.oci(imageHost+"/none", "manifests", "1.0.0")), http.StatusNotFound, "MANIFEST_UNKNOWN", "not-discovered")
}

// TestOCINames asks for one image by all the ways in which its name can be said.
func TestOCINames(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	spec := app("team/app")
	spec.Labels = standard("1.0.0+build.7")
	im := s.publish(spec)
	deep := s.publish(app("v2/manifests/blobs"))
	secure := s.secureClient()
	for _, tt := range []struct{ name, url, digest string }{
		{"in full", s.oci(im.name, "manifests", "1.0.0_build.7"), ""},
		{"percent-encoded", s.plain() + "/v2/example.com/team%2Fapp/manifests/1.0.0_build.7", ""},
		{"with ns", s.plain() + "/v2/team/app/manifests/1.0.0_build.7?ns=example.com", ""},
		{"with ns and a port", s.plain() + "/v2/team/app/manifests/1.0.0_build.7?ns=example.com:443", ""},
		{"by its host", "https://" + imageHost + "/v2/team/app/manifests/1.0.0_build.7", ""},
		{"by its host, in full", "https://" + imageHost + "/v2/example.com/team/app/manifests/1.0.0_build.7", ""},
		{"by its host and ns", "https://" + imageHost + "/v2/team/app/manifests/1.0.0_build.7?ns=example.com", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := secure
			if strings.HasPrefix(tt.url, "http:") {
				client = s.client()
			}
			p := &puller{s: s, http: client}
			raw, _, err := p.get(s.context(), tt.url, imagespec.MediaTypeImageManifest)
			if err != nil {
				t.Fatal(err)
			}
			var m imagespec.Manifest
			if err := json.Unmarshal(raw, &m); err != nil || m.Annotations["io.acproxy.digest"] != "sha256:"+im.sum || m.Annotations[imagespec.AnnotationVersion] != "1.0.0+build.7" {
				t.Errorf("the manifest is %s, %v", raw, err)
			}
			blob := strings.Replace(tt.url, "/manifests/1.0.0_build.7", "/blobs/"+m.Layers[0].Digest.String(), 1)
			if layer, _, err := p.get(s.context(), blob, imagespec.MediaTypeImageLayer); err != nil || !slices.Equal(filesOf(t, layer, ""), filesOf(t, im.aci, "rootfs")) {
				t.Errorf("its layer: %v, or other files", err)
			}
		})
	}
	s.wantAskedOnce(im)
	s.wantConverted(1)
	// Words of the API in a name.
	s.pullOCI(deep.name, "1.0.0", deep)
	// And the ways in which acproxy has always been asked are as they were.
	s.fetchAsRkt(s.node, deep)
	s.fetchAsRkt(s.node, im)
	// ns is looked up, and never dialled.
	a := s.get(s.plain() + "/v2/team/app/manifests/1.0.0?ns=127.0.0.1:1")
	if a.Status < 400 || a.Status == http.StatusInternalServerError {
		t.Errorf("an address as ns: %s", described(a))
	}
}

// TestOCITags lists what is held.
func TestOCITags(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	versions := []string{"0.9", "1.0.0", "1.0.0+a", "1.0.0-rc.1", "2.0.0"}
	for _, v := range append(slices.Clone(versions), "3.0.0", "a version that is no tag") {
		spec := app("app")
		spec.Labels, spec.Files = standard(v), map[string]string{"version": v}
		if im := s.publish(spec); v != "3.0.0" {
			s.hold(im)
		}
	}
	list := s.oci(imageHost+"/app", "tags", "list")
	all := []string{"0.9", "1.0.0", "1.0.0-rc.1", "1.0.0_a", "2.0.0"}
	for _, tt := range []struct {
		query string
		tags  []string
		next  string
	}{
		{"", all, ""},
		{"n=5", all, ""},
		{"n=6", all, ""},
		{"n=2", all[:2], "last=1.0.0&n=2"},
		{"n=2&last=1.0.0", all[2:4], "last=1.0.0_a&n=2"},
		{"n=2&last=1.0.0_a", all[4:], ""},
		{"last=1.0.0", all[2:], ""},
		{"last=1.0", all[1:], ""}, // one that isn't there
		{"last=2.0.0", nil, ""},
		{"last=z", nil, ""},
		{"n=0", nil, ""},
	} {
		a := s.get(list + "?" + tt.query)
		wantStatus(t, a, http.StatusOK)
		wantHeader(t, a, "Content-Type", "application/json")
		var got struct {
			Name string
			Tags []string
		}
		if err := json.Unmarshal(a.Body, &got); err != nil || got.Name != imageHost+"/app" || !slices.Equal(got.Tags, tt.tags) || got.Tags == nil {
			t.Errorf("%q gives %s, %v; want %q", tt.query, a.Body, err, tt.tags)
		}
		link := ""
		if tt.next != "" {
			link = "</v2/example.com/app/tags/list?" + tt.next + `>; rel="next"`
		}
		wantHeader(t, a, "Link", link)
	}
	// Page by page, as a client that takes the registry for example.com.
	var seen []string
	for at := "/v2/app/tags/list?n=2&ns=example.com"; at != ""; {
		a := s.get(s.plain() + at)
		var got struct{ Tags []string }
		if err := json.Unmarshal(a.Body, &got); err != nil || len(seen) > 10 {
			t.Fatalf("%s: %s, %v", at, described(a), err)
		}
		seen = append(seen, got.Tags...)
		at, _, _ = strings.Cut(strings.TrimPrefix(a.Header.Get("Link"), "<"), ">")
	}
	if !slices.Equal(seen, all) {
		t.Errorf("page by page there are %q, want %q", seen, all)
	}
	for _, n := range []string{"x", "-1", "", "1.5"} {
		wantOCIError(t, s.get(list+"?n="+n), http.StatusBadRequest, "NAME_INVALID", "invalid")
	}
	wantOCIError(t, s.get(s.oci(imageHost+"/other", "tags", "list")), http.StatusNotFound, "NAME_UNKNOWN", "not-held")
	s.wantConverted(0)
}

// TestOCIMistakes asks for what there isn't, and for what can't be.
func TestOCIMistakes(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	one, other := s.publish(app("app")), s.publish(app("other"))
	im := s.pullOCI(one.name, "1.0.0", one)
	s.pullOCI(other.name, "1.0.0", other)
	s.hold(one)
	s.publisher.ClearRequests()
	nothing := "sha256:" + strings.Repeat("0", 64)
	layer, config := im.manifest.Layers[0].Digest.String(), im.manifest.Config.Digest.String()
	for _, tt := range []struct {
		name, url string
		status    int
		code      string
		problem   string
	}{
		{"an unknown digest of a manifest", s.oci(one.name, "manifests", nothing), 404, "MANIFEST_UNKNOWN", "no-such-digest"},
		{"an unknown digest of a blob", s.oci(one.name, "blobs", nothing), 404, "BLOB_UNKNOWN", "no-such-digest"},
		{"a manifest of another name", s.oci(other.name, "manifests", im.digest), 404, "MANIFEST_UNKNOWN", "no-such-digest"},
		{"a configuration of another name", s.oci(other.name, "blobs", config), 404, "BLOB_UNKNOWN", "no-such-digest"},
		{"a layer of another name", s.oci(other.name, "blobs", layer), 404, "BLOB_UNKNOWN", "no-such-digest"},
		{"a manifest among the blobs", s.oci(one.name, "blobs", im.digest), 404, "BLOB_UNKNOWN", "no-such-digest"},
		{"a layer among the manifests", s.oci(one.name, "manifests", layer), 404, "MANIFEST_UNKNOWN", "no-such-digest"},
		{"the digest of the appc image", s.oci(one.name, "blobs", "sha256:"+one.sum), 404, "BLOB_UNKNOWN", "no-such-digest"},
		{"a digest that is too short", s.oci(one.name, "blobs", "sha256:12"), 400, "DIGEST_INVALID", "invalid"},
		{"a digest of another kind", s.oci(one.name, "manifests", "sha512:"+strings.Repeat("0", 128)), 400, "MANIFEST_INVALID", "invalid"},
		{"a digest of another kind among the blobs", s.oci(one.name, "blobs", "sha512:"+strings.Repeat("0", 128)), 400, "DIGEST_INVALID", "invalid"},
		{"a tag that begins with a dot", s.oci(one.name, "manifests", ".1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a tag that begins with a dash", s.oci(one.name, "manifests", "-1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a tag with a plus sign", s.oci(one.name, "manifests", "1+1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a tag that is too long", s.oci(one.name, "manifests", strings.Repeat("1", 129)), 400, "MANIFEST_INVALID", "invalid"},
		{"a name with capitals", s.oci("example.com/App", "manifests", "1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a name that ends in a dash", s.oci("example.com/a-", "manifests", "1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a name with a dot alone", s.oci("example.com/%2e%2e/x", "manifests", "1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a name with a zero", s.oci("example.com/%00", "manifests", "1"), 400, "MANIFEST_INVALID", "invalid"},
		{"a name that is too long", s.oci("example.com/"+strings.Repeat("x", acproxy.MaxNameLength), "blobs", nothing), 400, "DIGEST_INVALID", "invalid"},
		{"ns that is no host", s.plain() + "/v2/app/manifests/1?ns=..%2F..%2Fetc", 400, "MANIFEST_INVALID", "invalid"},
		{"tags of no name", s.oci("example.com/A", "tags", "list"), 400, "NAME_INVALID", "invalid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantOCIError(t, s.get(tt.url), tt.status, tt.code, tt.problem)
		})
	}
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times for what can't be meant: %v", n, s.publisher.Requests())
	}
	t.Run("a tag that isn't there", func(t *testing.T) {
		a := s.get(s.oci(one.name, "manifests", "9.9.9"))
		if e, err := ociErrorOf(a); a.Status != http.StatusNotFound || err != nil || e.Code != "MANIFEST_UNKNOWN" || !strings.Contains(e.Message, "9.9.9") {
			t.Errorf("%s, %v", described(a), err)
		}
	})
	t.Run("a name that isn't there", func(t *testing.T) {
		wantOCIError(t, s.get(s.oci(imageHost+"/nothing", "manifests", "1.0.0")), http.StatusNotFound, "MANIFEST_UNKNOWN", "not-discovered")
	})
	t.Run("writing", func(t *testing.T) {
		for _, tt := range []struct{ method, url string }{
			{http.MethodPost, s.oci(one.name, "blobs", "uploads/")},
			{http.MethodPost, s.oci(one.name, "blobs", "uploads/?mount="+layer+"&from=x")},
			{http.MethodPut, s.oci(one.name, "manifests", "1.0.0")},
			{http.MethodPatch, s.oci(one.name, "blobs", "uploads/1")},
			{http.MethodDelete, s.oci(one.name, "manifests", im.digest)},
			{http.MethodDelete, s.oci(one.name, "blobs", layer)},
			{http.MethodPost, s.plain() + "/v2/"},
		} {
			a := s.do(tt.method, tt.url)
			wantOCIError(t, a, http.StatusMethodNotAllowed, "UNSUPPORTED", "method-not-allowed")
			wantHeader(t, a, "Allow", "GET, HEAD")
		}
		s.pullOCI(one.name, im.digest, one)
	})
	s.wantConverted(2)
}

// TestOCIDisabled: without oci.enabled there is no such API.
func TestOCIDisabled(t *testing.T) {
	t.Parallel()
	s := newScene(t, "oci: {enabled: false}")
	im := s.publish(app("app"))
	for _, url := range []string{s.plain() + "/v2/", s.oci(im.name, "manifests", "1.0.0"), s.oci(im.name, "tags", "list")} {
		wantProblem(t, s.get(url), http.StatusNotFound, "no-such-page")
	}
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times", n)
	}
	s.fetchAsRkt(s.node, im)
}

// TestOCIRefusals: what rkt would be refused isn't had as an OCI image either, and nobody converts it.
func TestOCIRefusals(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	unsigned, strangers := s.publishAs(app("unsigned"), nil), s.publishAs(app("strangers"), stranger(t))
	tampered := s.publish(large("tampered", 200<<10))
	s.publisher.Misbehave(publisher.URL(tampered.blob()), publisher.Fault{FlipBitAt: publisher.At(100_000)})
	broken := app("broken")
	broken.NoRootfs, broken.Files = true, nil
	for name, tt := range map[string]struct {
		im       image
		problems []string
	}{
		"unsigned": {unsigned, []string{"unsigned"}}, "signed by a stranger": {strangers, []string{"unknown-key"}}, "tampered with": {tampered, []string{"bad-signature"}},
		"without rootfs": {s.publish(broken), []string{"no-rootfs", "quarantined"}}, // as it is found out before or after it was kept
	} {
		t.Run(name, func(t *testing.T) {
			a := s.get(s.oci(tt.im.name, "manifests", "1.0.0"))
			if e, err := ociErrorOf(a); a.Status != http.StatusForbidden && a.Status != http.StatusBadGateway || err != nil || !slices.Contains(tt.problems, strings.TrimPrefix(e.Detail.Type, "urn:acproxy:problem:")) {
				t.Errorf("%s, %v; want 403 or 502 and %s", described(a), err, tt.problems)
			}
			// One that needs it isn't had either, and the error says why.
			top := s.publish(needing(app("needs-"+strings.TrimPrefix(tt.im.name, imageHost+"/")), tt.im))
			a = s.get(s.oci(top.name, "manifests", "1.0.0"))
			if e, err := ociErrorOf(a); a.Status != http.StatusForbidden && a.Status != http.StatusBadGateway || err != nil || !strings.Contains(e.Message, top.name+" needs "+tt.im.name) {
				t.Errorf("%s, %v; want 403 or 502, and that %s needs %s", described(a), err, top.name, tt.im.name)
			}
		})
	}
	s.wantConverted(0)
	s.wantLayersMade(0)
	// What OCI has no words for.
	spec := app("whiteout")
	spec.Files[".wh.gone"] = ""
	whiteout := s.publish(spec)
	for range 2 {
		wantOCIError(t, s.get(s.oci(whiteout.name, "manifests", "1.0.0")), http.StatusNotFound, "MANIFEST_UNKNOWN", "no-oci-image")
	}
	s.fetchAsRkt(s.node, whiteout)
	s.wantConverted(0)
	if n := s.metric(`acproxy_oci_layer_seconds_count{outcome="no-oci-image"}`); n != 1 {
		t.Errorf("it was read %v times to find out that it can't be converted, want once", n)
	}
	// A circle of images that need each other.
	round := app("round")
	round.Dependencies = []acitest.Dependency{{Name: imageHost + "/round", Labels: standard("1.0.0")}}
	wantOCIError(t, s.get(s.oci(s.publish(round).name, "manifests", "1.0.0")), http.StatusNotFound, "MANIFEST_UNKNOWN", "no-oci-image")
}

// TestOCIKeyIsTakenBack: no key, no bytes; and a key of what an image needs is a key of the image.
func TestOCIKeyIsTakenBack(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	other := must(trusttest.NewKey(trusttest.Options{}))(t)
	s.trust(other, imageHost+"/base")
	s.start()
	base := s.publishAs(app("base"), other)
	top := s.publish(needing(app("web"), base))
	alone := s.publish(app("alone"))
	s.publisher.ClearRequests()
	im, of, single := s.pullOCI(top.name, "1.0.0", base, top), s.pullOCI(base.name, "1.0.0", base), s.pullOCI(alone.name, "1.0.0", alone)
	s.publisher.Stop()
	everything := func(im ociImage) []string {
		urls := []string{s.oci(im.name, "manifests", "1.0.0"), s.oci(im.name, "manifests", im.digest), s.oci(im.name, "blobs", im.manifest.Config.Digest.String())}
		for _, d := range im.manifest.Layers {
			urls = append(urls, s.oci(im.name, "blobs", d.Digest.String()))
		}
		return urls
	}
	status := func(im ociImage) int {
		return s.get(s.oci(im.name, "blobs", im.manifest.Layers[0].Digest.String())).Status
	}
	refused := func(t *testing.T, im ociImage) {
		t.Helper()
		for _, url := range everything(im) {
			wantOCIError(t, s.get(url), http.StatusForbidden, "DENIED", "unknown-key")
			wantStatus(t, s.do(http.MethodHead, url), http.StatusForbidden)
			wantStatus(t, s.get(url, "Range", "bytes=0-9"), http.StatusForbidden)
			wantStatus(t, s.get(url, "If-None-Match", "*"), http.StatusForbidden)
		}
	}
	served := func(t *testing.T, im ociImage) {
		t.Helper()
		for _, url := range everything(im) {
			wantStatus(t, s.get(url), http.StatusOK)
		}
	}
	for _, tt := range []struct {
		name            string
		key             *trusttest.Key
		prefix          string
		refused, served []ociImage
	}{
		{"of the image that is needed", other, imageHost + "/base", []ociImage{im, of}, []ociImage{single}},
		{"of the image", s.key, imageHost, []ociImage{im, single}, []ociImage{of}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if code, out := s.cli("trust", "rm", "--prefix", tt.prefix, tt.key.Fingerprint()); code != 0 {
				t.Fatalf("trust rm = %d\n%s", code, out)
			}
			eventually(t, "the key is gone", func() bool { return status(tt.refused[0]) != http.StatusOK })
			for _, im := range tt.refused {
				refused(t, im)
			}
			for _, im := range tt.served {
				served(t, im)
			}
			if _, out := s.cli("trust", "list"); strings.Contains(out, tt.key.Fingerprint()) {
				t.Errorf("the key is still listed:\n%s", out)
			}
			if code, out := s.cli("trust", "add", "--prefix", tt.prefix, "--fingerprint", tt.key.Fingerprint(), s.write("key.asc", tt.key.Armored())); code != 0 {
				t.Fatalf("trust add = %d\n%s", code, out)
			}
			eventually(t, "the key is back", func() bool { return status(tt.refused[0]) == http.StatusOK })
			for _, im := range append(tt.refused, tt.served...) {
				served(t, im)
			}
		})
	}
	s.wantConverted(3)
	// A tag isn't listed of what nobody may have.
	if code, out := s.cli("trust", "rm", "--prefix", imageHost, s.key.Fingerprint()); code != 0 {
		t.Fatalf("trust rm = %d\n%s", code, out)
	}
	eventually(t, "no tag is listed", func() bool { return s.get(s.oci(alone.name, "tags", "list")).Status == http.StatusNotFound })
}

// TestOCIAccess: the rules of access are asked on everything, and of everything that an image is made of.
func TestOCIAccess(t *testing.T) {
	t.Parallel()
	s, token := accessScene(t, "")
	open, secret := s.publish(app("app")), s.publish(app("secret/base"))
	needs := s.publish(needing(app("web"), secret)) // in the open, of something secret
	most := s.publish(needing(app("secret/most/app"), open))
	alice, bob, ci := withPassword("alice", "open sesame"), withPassword("bob", "open sesame"), "Bearer "+token
	as := s.puller("Authorization", alice)
	held := make(map[string]ociImage)
	for _, im := range []image{open, secret, needs, most} {
		pulled, err := as.pull(s.context(), im.name, "1.0.0")
		if err != nil {
			t.Fatal(err)
		}
		held[im.name] = pulled
	}
	all := map[string]bool{open.name: true, secret.name: true, needs.name: true, most.name: true}
	for _, tt := range []struct {
		who, shown string
		may        map[string]bool
		status     int
		code       string
		problem    string
	}{
		{"nobody", "", map[string]bool{open.name: true}, http.StatusUnauthorized, "UNAUTHORIZED", "credentials-needed"},
		{"no user and no password", withPassword("", ""), map[string]bool{open.name: true}, http.StatusUnauthorized, "UNAUTHORIZED", "credentials-invalid"},
		{"a wrong password", withPassword("alice", "x"), map[string]bool{open.name: true}, http.StatusUnauthorized, "UNAUTHORIZED", "credentials-invalid"},
		{"bob", bob, map[string]bool{open.name: true}, http.StatusForbidden, "DENIED", "not-allowed"},
		{"ci", ci, map[string]bool{open.name: true, secret.name: true, needs.name: true}, http.StatusForbidden, "DENIED", "not-allowed"},
		{"ci, with the token as password", withPassword("ci", token), map[string]bool{open.name: true, secret.name: true, needs.name: true}, http.StatusForbidden, "DENIED", "not-allowed"},
		{"alice", alice, all, 0, "", ""},
	} {
		t.Run(tt.who, func(t *testing.T) {
			var header []string
			if tt.shown != "" {
				header = []string{"Authorization", tt.shown}
			}
			for name, im := range held {
				urls := []string{s.oci(name, "manifests", "1.0.0"), s.oci(name, "manifests", im.digest), s.oci(name, "blobs", im.manifest.Config.Digest.String())}
				for _, d := range im.manifest.Layers {
					urls = append(urls, s.oci(name, "blobs", d.Digest.String()))
				}
				if name != needs.name { // whose tags aren't secret
					urls = append(urls, s.oci(name, "tags", "list"))
				}
				for _, url := range urls {
					a := s.get(url, header...)
					if tt.may[name] {
						wantStatus(t, a, http.StatusOK)
						if private := strings.HasPrefix(a.Header.Get("Cache-Control"), "private"); private != (name != open.name) && !strings.HasSuffix(url, "list") {
							t.Errorf("%s has Cache-Control %q", url, a.Header.Get("Cache-Control"))
						}
						continue
					}
					wantOCIError(t, a, tt.status, tt.code, tt.problem)
					// Bearer would make clients look for a server that gives tokens.
					if got := a.Header.Values("Www-Authenticate"); tt.status == http.StatusUnauthorized && (len(got) != 1 || !strings.HasPrefix(got[0], "Basic ")) {
						t.Errorf("%s asks for %q, want Basic alone", url, got)
					}
				}
			}
			// Clients look here whether they will be asked who they are.
			root := s.get(s.plain()+"/v2/", header...)
			if tt.status != http.StatusUnauthorized {
				wantStatus(t, root, http.StatusOK)
				return
			}
			wantOCIError(t, root, tt.status, tt.code, tt.problem)
			wantHeader(t, root, "Www-Authenticate", `Basic realm="acproxy", charset="UTF-8"`)
		})
	}
	if log := s.server().output(); strings.Contains(log, token) || strings.Contains(log, "open sesame") || strings.Contains(log, alice[len("Basic "):]) {
		t.Errorf("the log says too much:\n%s", log)
	}
}

// TestOCIHerd asks for one cold image from many clients at once, each for all of it. Some of them leave while the publisher stalls.
func TestOCIHerd(t *testing.T) {
	t.Parallel()
	s := newScene(t, "log: {access: false}")
	base := s.publish(large("base", 1<<20))
	top := s.publish(needing(large("web", 500<<10), base))
	trouble := s.publisher.Misbehave(publisher.URL(base.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	const herd, leaving = 50, 15
	leave, gone := context.WithCancel(s.context())
	defer gone()
	p := s.puller()
	pulled, errs := make([]ociImage, herd), make([]error, herd)
	var asked, left, done sync.WaitGroup
	asked.Add(herd)
	left.Add(leaving)
	for i := range herd {
		ctx := s.context()
		if i < leaving {
			ctx = leave
		}
		ask := sync.OnceFunc(asked.Done)
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { ask() }})
		// Ends with the answers; waited for below.
		done.Go(func() {
			if i < leaving {
				defer left.Done()
			}
			pulled[i], errs[i] = p.pull(ctx, top.name, "1.0.0")
		})
	}
	within(t, "the publisher stalls", trouble.Stalled())
	wait(t, "all clients ask", &asked)
	gone()
	wait(t, "some clients leave", &left)
	trouble.Release()
	wait(t, "all clients end", &done)
	for i := range herd {
		switch {
		case i < leaving && !errors.Is(errs[i], context.Canceled):
			t.Errorf("client %d left midway: %v", i, errs[i])
		case i >= leaving && errs[i] != nil:
			t.Errorf("client %d: %v", i, errs[i])
		case i == leaving:
			wantLayers(t, pulled[i], base, top)
		case i > leaving && pulled[i].digest != pulled[leaving].digest:
			t.Errorf("client %d got another image", i)
		}
	}
	s.wantAskedOnce(base, top)
	s.wantConverted(1)
	s.wantLayersMade(2)
	// Clients that leave in the middle of a layer.
	blob := s.oci(top.name, "blobs", pulled[leaving].manifest.Layers[0].Digest.String())
	for range 5 {
		ctx, cancel := context.WithCancel(s.context())
		resp := s.open(ctx, blob)
		if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
			t.Error(err)
		}
		cancel()
		_ = resp.Body.Close()
	}
	s.pullOCI(top.name, "1.0.0", base, top)
	s.wantConverted(1)
	// After a restart the layers are made again, each once for all who ask for it then.
	s.restart(sigterm)
	var again sync.WaitGroup
	for i := range herd {
		// Ends with the answers; waited for below.
		again.Go(func() {
			if im, err := p.pull(s.context(), top.name, pulled[leaving].digest); err != nil || !bytes.Equal(im.layers[0], pulled[leaving].layers[0]) {
				t.Errorf("client %d, after the restart: %v, or other bytes", i, err)
			}
		})
	}
	wait(t, "all clients end", &again)
	s.wantConverted(0)
	s.wantLayersMade(2)
}

// TestOCIWait: a client is told to come back when an image takes too long, and finds it then.
func TestOCIWait(t *testing.T) {
	t.Parallel()
	s := newScene(t, "oci: {wait: 1s}")
	im := s.publish(large("app", 1<<20))
	for _, tt := range []struct {
		name, pattern string
		after         int64
	}{{"the signature", im.signature(), 10}, {"the image", im.blob(), stalled}} {
		t.Run(tt.name, func(t *testing.T) {
			trouble := s.publisher.Misbehave(publisher.URL(tt.pattern), publisher.Fault{StallAfter: publisher.At(tt.after)})
			began := time.Now()
			a := s.get(s.oci(im.name, "manifests", "1.0.0"))
			wantOCIError(t, a, http.StatusServiceUnavailable, "UNAVAILABLE", "converting")
			wantHeader(t, a, "Retry-After", "10")
			if took := time.Since(began); took < time.Second || took > 8*time.Second {
				t.Errorf("it took %v, want a second", took)
			}
			trouble.Release()
			trouble.End()
		})
	}
	// It has gone on.
	arrived := func(r publisher.Request) bool { return r.At() == im.blob() && r.Done && r.Bytes == int64(len(im.aci)) }
	if err := s.publisher.Wait(s.context(), 1, arrived); err != nil {
		t.Fatal(err)
	}
	s.pullOCI(im.name, "1.0.0", im)
	s.wantAskedOnce(im)
	s.wantConverted(1)
}

// TestOCIDamagedImage: of an image whose bytes got lost on the disk there is no layer that looks well.
func TestOCIDamagedImage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	spec := large("app", 200<<10)
	spec.Compression = acitest.None // what is compressed is found to be damaged as it is read
	damaged, sound := s.publish(spec), s.publish(app("sound"))
	im, other := s.pullOCI(damaged.name, "1.0.0", damaged), s.pullOCI(sound.name, "1.0.0", sound)
	s.server().end(sigterm)
	found := 0
	err := filepath.WalkDir(s.path("data", "store"), func(name string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.Contains(name, damaged.sum) {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(content, damaged.aci) {
			return err
		}
		found++
		content[100_000] ^= 1
		return os.WriteFile(name, content, 0o600)
	})
	if err != nil || found != 1 {
		t.Fatalf("the image is found %d times in the store, %v", found, err)
	}
	s.start()
	a := s.get(s.oci(damaged.name, "blobs", im.manifest.Layers[0].Digest.String()))
	if e, err := ociErrorOf(a); a.Status != http.StatusServiceUnavailable || err != nil || e.Code != "UNAVAILABLE" || !strings.Contains(e.Message, "has lost bytes of the image of "+damaged.name) {
		t.Errorf("the layer of a damaged image: %s, %v; want 503", described(a), err)
	}
	for _, field := range []string{"Docker-Content-Digest", "Etag", "Repr-Digest", "Accept-Ranges"} {
		wantHeader(t, a, field, "")
	}
	wantHeader(t, a, "Cache-Control", "no-store")
	s.pullOCI(sound.name, other.digest, sound)
	// It is looked at, and fetched again.
	eventually(t, "the layer can be had again", func() bool {
		return s.get(s.oci(damaged.name, "blobs", im.manifest.Layers[0].Digest.String())).Status == http.StatusOK
	})
	s.pullOCI(damaged.name, im.digest, damaged)
	if !strings.Contains(s.server().output(), "the scrub has found something") {
		t.Error("the log doesn't say what was wrong")
	}
}
