package oci

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/appc/spec/schema"
	"github.com/appc/spec/schema/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy"
)

// The media types of what a bridge answers with.
const (
	MediaTypeManifest = imagespec.MediaTypeImageManifest
	MediaTypeIndex    = imagespec.MediaTypeImageIndex
	MediaTypeConfig   = imagespec.MediaTypeImageConfig
	MediaTypeLayer    = imagespec.MediaTypeImageLayer
)

// The annotations of a manifest that say which appc image it stands for.
const (
	AnnotationName    = "io.acproxy.image-name"
	AnnotationImageID = "io.acproxy.image-id" // by which rkt calls it
	AnnotationDigest  = "io.acproxy.digest"   // SHA-256 of the bytes that were signed
)

// A Platform is what images are asked for, in appc's words, which are those of the labels os and arch.
type Platform struct{ OS, Arch string }

// ParsePlatform reads os/arch, such as linux/amd64.
func ParsePlatform(s string) (Platform, error) {
	os, arch, ok := strings.Cut(s, "/")
	p := Platform{os, arch}
	if _, known := architectures[arch]; !ok || os == "" || !known {
		return Platform{}, acproxy.Invalid("%.64q is no platform: name it as os/arch in appc's words, such as linux/amd64 or linux/aarch64", s)
	}
	return p, nil
}

// String returns os/arch.
func (p Platform) String() string { return p.OS + "/" + p.Arch }

// fits reports whether an image with some labels is for the platform: by what they say, and an image that doesn't say is for every platform.
func (p Platform) fits(labels map[string]string) bool {
	os, arch := labels[acproxy.LabelOS], labels[acproxy.LabelArch]
	return (os == "" || os == p.OS) && (arch == "" || arch == p.Arch)
}

// architectures are what appc's names of architectures (appc specification, "Image Manifest Schema", labels) are in OCI's words, which are Go's.
var architectures = map[string]imagespec.Platform{
	"amd64": {Architecture: "amd64"}, "x86_64": {Architecture: "amd64"}, "i386": {Architecture: "386"},
	"aarch64": {Architecture: "arm64", Variant: "v8"}, "aarch64_be": {Architecture: "arm64be", Variant: "v8"},
	"armv6l": {Architecture: "arm", Variant: "v6"}, "armv7l": {Architecture: "arm", Variant: "v7"}, "armv7b": {Architecture: "armbe", Variant: "v7"},
	"ppc64": {Architecture: "ppc64"}, "ppc64le": {Architecture: "ppc64le"}, "s390x": {Architecture: "s390x"},
}

// platformOf returns what an image is for: by its own labels, and where it has none, as for images that are for every architecture, what it was asked for.
func platformOf(labels map[string]string, asked Platform) (imagespec.Platform, error) {
	os, arch := labels[acproxy.LabelOS], labels[acproxy.LabelArch]
	if os == "" {
		os = asked.OS
	}
	if arch == "" {
		arch = asked.Arch
	}
	p, ok := architectures[arch]
	if !ok {
		return p, unconvertible("its manifest says arch=%.64q, and OCI has no word for that", arch)
	}
	p.OS = os
	return p, nil
}

// A descriptor is the name of a blob, and its length in bytes.
type descriptor struct {
	Digest acproxy.Digest `json:"digest"`
	Size   int64          `json:"size"`
}

func (d descriptor) as(mediaType string) imagespec.Descriptor {
	return imagespec.Descriptor{MediaType: mediaType, Digest: digest.Digest(d.Digest.String()), Size: d.Size}
}

// configOf returns the OCI image configuration of an image that is rendered from pieces, itself the last of them. It says what the manifest says, as far as
// OCI has words for it (OCI image specification 1.1, "Image Configuration"): what is run, as whom, where, with what environment, which ports and volumes it
// has. Isolators, event handlers and supplementary groups are what a pod has to say to today's runtimes.
func configOf(m *schema.ImageManifest, pieces []piece, platform imagespec.Platform) ([]byte, error) {
	out := imagespec.Image{Platform: platform, RootFS: imagespec.RootFS{Type: "layers"}}
	out.Author, _ = m.Annotations.Get("authors")
	created, err := createdOf(m)
	if err != nil {
		return nil, err
	}
	out.Created = created
	for _, p := range pieces {
		out.RootFS.DiffIDs = append(out.RootFS.DiffIDs, digest.Digest(p.Layer.Digest.String()))
		out.History = append(out.History, imagespec.History{Created: created, CreatedBy: "appc image " + p.what() + " " + p.ImageID.String()})
	}
	out.Config.Labels = labelsOf(m)
	if m.App != nil {
		if err := runAs(&out.Config, m.App); err != nil {
			return nil, err
		}
	}
	return document(out)
}

// runAs says how an app is run. Its exec is an entry point: what a pod gives as args follows it, as what rkt run gives after -- does.
func runAs(out *imagespec.ImageConfig, app *types.App) error {
	if strings.HasPrefix(app.User, "/") || strings.HasPrefix(app.Group, "/") {
		return unconvertible("its app runs as whoever owns a file (user %.64q, group %.64q), and OCI has no word for that", app.User, app.Group)
	}
	out.User, out.WorkingDir, out.Entrypoint = app.User+":"+app.Group, app.WorkingDirectory, app.Exec
	for _, v := range app.Environment {
		out.Env = append(out.Env, v.Name+"="+v.Value)
	}
	for _, p := range app.Ports {
		if out.ExposedPorts == nil {
			out.ExposedPorts = make(map[string]struct{})
		}
		protocol := strings.ToLower(p.Protocol)
		if !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
			continue
		}
		if p.Count > maxPorts || len(out.ExposedPorts) > maxPorts {
			return unconvertible("its manifest has more than %d ports", maxPorts)
		}
		for i := range p.Count {
			out.ExposedPorts[strconv.FormatUint(uint64(p.Port+i), 10)+"/"+protocol] = struct{}{}
		}
	}
	for _, mount := range app.MountPoints {
		if out.Volumes == nil {
			out.Volumes = make(map[string]struct{})
		}
		out.Volumes[mount.Path] = struct{}{}
	}
	return nil
}

// Bounds of what a manifest can say.
const (
	maxPorts    = 1024
	maxDocument = 4 << 20 // bytes of a document; containerd reads no longer one
)

// document writes a document, unless it is too long.
func document(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, unconvertible("what its manifest says can't be said in JSON: %v", err)
	}
	if len(b) > maxDocument {
		return nil, unconvertible("what its manifest says comes to %d bytes, and clients read no more than %d", len(b), maxDocument)
	}
	return b, nil
}

// labelsOf returns what stands in a manifest for people and programs: its annotations, but for those that have a place of their own, and its app's labels.
func labelsOf(m *schema.ImageManifest) map[string]string {
	out := make(map[string]string)
	for _, a := range m.Annotations {
		if _, ok := annotations[string(a.Name)]; !ok {
			out[string(a.Name)] = a.Value
		}
	}
	if m.App != nil {
		for name, value := range m.App.UserLabels {
			out[name] = value
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// annotations are what the annotations that appc defines are in OCI's words (OCI image specification 1.1, "Annotations").
var annotations = map[string]string{
	"created": imagespec.AnnotationCreated, "authors": imagespec.AnnotationAuthors,
	"homepage": imagespec.AnnotationURL, "documentation": imagespec.AnnotationDocumentation,
}

func createdOf(m *schema.ImageManifest) (*time.Time, error) {
	text, ok := m.Annotations.Get("created")
	if !ok {
		return nil, nil
	}
	// It was checked when the manifest was read.
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return nil, fmt.Errorf("the annotation created: %w", err)
	}
	t = t.UTC()
	return &t, nil
}

// manifestOf returns the OCI image manifest of an image that is rendered from pieces, itself the last of them.
func manifestOf(m *schema.ImageManifest, pieces []piece, config descriptor) ([]byte, error) {
	own := pieces[len(pieces)-1]
	out := imagespec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: MediaTypeManifest, Config: config.as(MediaTypeConfig),
		Annotations: map[string]string{AnnotationName: own.Name, AnnotationImageID: own.ImageID.String(), AnnotationDigest: own.Digest.String()},
	}
	for _, a := range m.Annotations {
		if name, ok := annotations[string(a.Name)]; ok {
			out.Annotations[name] = a.Value
		}
	}
	if version := own.Labels[acproxy.LabelVersion]; version != "" {
		out.Annotations[imagespec.AnnotationVersion] = version
	}
	for _, p := range pieces {
		out.Layers = append(out.Layers, p.Layer.as(MediaTypeLayer))
	}
	return document(out)
}

// indexOf returns the OCI image index of one image for several platforms.
func indexOf(all []*made) ([]byte, error) {
	out := imagespec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: MediaTypeIndex}
	for _, m := range all {
		d := m.descriptor().as(MediaTypeManifest)
		d.Platform = &m.Platform
		out.Manifests = append(out.Manifests, d)
	}
	return document(out)
}
