package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
)

// sbomOf returns what a binary is made of, as CycloneDX. It is read out of the binary itself: what isn't linked in isn't there.
func (r *release) sbomOf(p product) ([]byte, error) {
	info, err := buildinfo.Read(bytes.NewReader(p.binary))
	if err != nil {
		return nil, fmt.Errorf("what the %s binary is made of: %w", p.arch, err)
	}
	sum := sha256.Sum256(p.binary)
	self := cyclonedx.Component{
		BOMRef: "acproxy", Type: cyclonedx.ComponentTypeApplication, Name: "acproxy", Version: r.version.String(),
		Description: description, PackageURL: purl(info.Main.Path, "v"+r.version.String()) + "&goos=linux&goarch=" + p.arch,
		Licenses:           &cyclonedx.Licenses{{License: &cyclonedx.License{ID: "Apache-2.0"}}},
		Hashes:             &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}},
		ExternalReferences: &[]cyclonedx.ExternalReference{{Type: cyclonedx.ERTypeVCS, URL: homepage}},
		Properties:         settings(info.Settings),
	}
	// Go's own version, as go1.26.3 or go1.26.3 X:experiment.
	goVersion, _, _ := strings.Cut(strings.TrimPrefix(info.GoVersion, "go"), " ")
	components := []cyclonedx.Component{{
		BOMRef: "std", Type: cyclonedx.ComponentTypeLibrary, Name: "std", Version: goVersion, PackageURL: "pkg:golang/std@" + goVersion, Scope: cyclonedx.ScopeRequired,
	}}
	for _, m := range info.Deps {
		c, err := component(m)
		if err != nil {
			return nil, err
		}
		components = append(components, c)
	}
	refs := make([]string, 0, len(components))
	for _, c := range components {
		refs = append(refs, c.BOMRef)
	}
	bom := cyclonedx.NewBOM()
	bom.SerialNumber = "urn:uuid:" + uuidFrom(sum)
	bom.Metadata = &cyclonedx.Metadata{Timestamp: r.date.Format(time.RFC3339), Component: &self}
	bom.Components = &components
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: "acproxy", Dependencies: &refs}}
	var b bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&b, cyclonedx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func component(m *debug.Module) (cyclonedx.Component, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	// A go.sum line is the base64 of a SHA-256 over the module's files.
	digest, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:"))
	if err != nil || len(digest) != sha256.Size {
		return cyclonedx.Component{}, fmt.Errorf("the sum of %s %s is %q", m.Path, m.Version, m.Sum)
	}
	return cyclonedx.Component{
		BOMRef: purl(m.Path, m.Version), Type: cyclonedx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: purl(m.Path, m.Version), Scope: cyclonedx.ScopeRequired,
		Hashes: &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(digest)}},
	}, nil
}

// settings are how it was built.
func settings(all []debug.BuildSetting) *[]cyclonedx.Property {
	var out []cyclonedx.Property
	for _, s := range all {
		out = append(out, cyclonedx.Property{Name: "acproxy:build:" + s.Key, Value: s.Value})
	}
	return &out
}

// purl is the name of a module as package-url has it.
func purl(path, version string) string {
	return "pkg:golang/" + path + "@" + strings.ReplaceAll(url.PathEscape(version), "+", "%2B") + "?type=module"
}

// uuidFrom makes a UUID (RFC 9562, version 8) of a digest: the same binary has the same SBOM.
func uuidFrom(sum [sha256.Size]byte) string {
	u := sum[:16]
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
