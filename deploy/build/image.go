package main

import (
	"bytes"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// user is who acproxy runs as in the image: nobody in particular, as in other images without a system.
const user = 65532

// imageFiles returns what is in the image: acproxy, the authorities that it knows publishers by, and where it keeps its images. There is no shell.
func (r *release) imageFiles(p product) []file {
	return []file{
		{path: "etc/acproxy/config.yaml", mode: 0o644, content: r.imageConfig},
		{path: "etc/group", mode: 0o644, content: []byte("root:x:0:\nacproxy:x:65532:\n")},
		{path: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0:root:/:/sbin/nologin\nacproxy:x:65532:65532:acproxy:/var/lib/acproxy:/sbin/nologin\n")},
		{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, content: authorities()},
		{path: "usr/bin/acproxy", mode: 0o755, content: p.binary},
		{path: "usr/share/doc/acproxy/NOTICES", mode: 0o644, content: r.notices},
		{path: "usr/share/doc/acproxy/acproxy.cdx.json", mode: 0o644, content: p.sbom},
		{path: "var/lib/acproxy", mode: os.ModeDir | 0o700, uid: user},
	}
}

// authorities returns the certificate authorities of Mozilla as the Go team keeps them, in PEM. Those that Mozilla trusts for certificates of before some
// day only are left out: PEM can't say so.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint != nil {
			continue
		}
		// Writing into memory doesn't fail.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
	}
	return b.Bytes()
}

// runtimeConfig is how the image is run. deploy/oci/Dockerfile says the same.
func (r *release) runtimeConfig() v1.Config {
	return v1.Config{
		User:         "65532:65532",
		Entrypoint:   []string{"/usr/bin/acproxy"},
		Cmd:          []string{"serve", "--config", "/etc/acproxy/config.yaml"},
		Env:          []string{"PATH=/usr/bin", "XDG_DATA_HOME=/var/lib"},
		ExposedPorts: map[string]struct{}{"8080/tcp": {}, "9404/tcp": {}},
		Volumes:      map[string]struct{}{"/var/lib/acproxy": {}},
		WorkingDir:   "/var/lib/acproxy",
		StopSignal:   "SIGTERM",
		Healthcheck: &v1.HealthConfig{
			Test: []string{"CMD", "/usr/bin/acproxy", "healthcheck", "--socket", "/var/lib/acproxy/admin.sock"}, Interval: 30 * time.Second, Timeout: 5 * time.Second, StartPeriod: 10 * time.Second, Retries: 3,
		},
		Labels: map[string]string{
			"org.opencontainers.image.title":         "acproxy",
			"org.opencontainers.image.description":   description,
			"org.opencontainers.image.version":       r.version.String(),
			"org.opencontainers.image.created":       r.date.Format(time.RFC3339),
			"org.opencontainers.image.licenses":      "Apache-2.0",
			"org.opencontainers.image.source":        homepage,
			"org.opencontainers.image.documentation": homepage + "/blob/main/docs/install.md",
		},
	}
}

// image writes an OCI image layout with one image for each architecture, under one index.
func (r *release) image(dir string, products []product) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range products {
		packed, err := r.tar(r.imageFiles(p))
		if err != nil {
			return err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil }, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(9))
		if err != nil {
			return err
		}
		img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		img, err = mutate.ConfigFile(img, &v1.ConfigFile{
			OS: "linux", Architecture: p.arch, Created: v1.Time{Time: r.date}, Config: r.runtimeConfig(), RootFS: v1.RootFS{Type: "layers"},
		})
		if err != nil {
			return err
		}
		img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: r.date}, CreatedBy: "acproxy " + r.version.String()}})
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: p.arch}}})
	}
	annotated, ok := mutate.Annotations(index, map[string]string{
		"org.opencontainers.image.version": r.version.String(), "org.opencontainers.image.source": homepage, "org.opencontainers.image.licenses": "Apache-2.0",
	}).(v1.ImageIndex)
	if !ok {
		return errors.New("annotations made no index of an index")
	}
	// What an earlier build left would be listed beside it.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendIndex(annotated, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": r.version.Tag()}))
}
