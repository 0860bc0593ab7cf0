package main

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/goreleaser/nfpm/v2"
	"github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
)

const maintainer = "The acproxy authors <acproxy@users.noreply.github.com>"

// debianFiles returns what the package installs. What lies under etc is the administrator's to change.
func (r *release) debianFiles(p product) ([]file, error) {
	const doc = "usr/share/doc/acproxy/"
	changelog, err := r.read("CHANGELOG.md")
	if err != nil {
		return nil, err
	}
	all := []file{
		{path: "usr/bin/acproxy", mode: 0o755, content: p.binary},
		{path: doc + "NOTICES.gz", mode: 0o644, content: compressed(r.notices)},
		{path: doc + "acproxy.cdx.json", mode: 0o644, content: p.sbom},
		{path: doc + "changelog.gz", mode: 0o644, content: compressed(r.debianChangelog())},
		{path: doc + "CHANGELOG.md.gz", mode: 0o644, content: compressed(changelog)},
		// Keys that the administrator trusts: his commands write them, and the service, which is somebody else, reads them.
		{path: "etc/acproxy/trustedkeys/root.d", mode: os.ModeDir | 0o755},
		{path: "etc/acproxy/trustedkeys/prefix.d", mode: os.ModeDir | 0o755},
	}
	for name, installed := range map[string]string{
		"deploy/debian/config.yaml":       "etc/acproxy/config.yaml",
		"deploy/debian/copyright":         doc + "copyright",
		"deploy/debian/lintian-overrides": "usr/share/lintian/overrides/acproxy",
		"config.example.yaml":             doc + "examples/config.yaml",
	} {
		f, err := r.from(name, installed)
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	units, err := r.units("usr/lib/systemd/system/")
	if err != nil {
		return nil, err
	}
	return append(append(all, units...), r.pages...), nil
}

// debianChangelog is what policy asks for (12.7). CHANGELOG.md says what has changed.
func (r *release) debianChangelog() []byte {
	return fmt.Appendf(nil, "acproxy (%s) unstable; urgency=medium\n\n  * CHANGELOG.md.gz, beside this file, says what is new.\n\n -- %s  %s\n",
		r.version.Debian(), maintainer, r.date.Format(time.RFC1123Z))
}

// debianPackage returns the package and what its file is called.
func (r *release) debianPackage(p product) (content []byte, name string, err error) {
	name = fmt.Sprintf("acproxy_%s_%s.deb", r.version.Debian(), p.arch)
	all, err := r.debianFiles(p)
	if err != nil {
		return nil, name, err
	}
	// nfpm reads files, so they are laid out as they will be.
	root := filepath.Join(r.work, "deb-"+p.arch)
	if err := writeTree(root, all); err != nil {
		return nil, name, err
	}
	var contents files.Contents
	for _, f := range all {
		c := &files.Content{
			Source: filepath.Join(root, filepath.FromSlash(f.path)), Destination: "/" + f.path, Type: files.TypeFile,
			FileInfo: &files.ContentFileInfo{Owner: "root", Group: "root", Mode: f.mode.Perm(), MTime: r.date},
		}
		switch {
		case f.mode.IsDir():
			c.Source, c.Type = "", files.TypeDir
		case strings.HasPrefix(f.path, "etc/"):
			c.Type = files.TypeConfig
		}
		contents = append(contents, c)
	}
	script := func(name string) string { return filepath.Join(r.source, "deploy", "debian", name) }
	info := &nfpm.Info{
		Name: "acproxy", Arch: p.arch, Platform: "linux", Version: r.version.Debian(), VersionSchema: "none", Section: "net", Priority: "optional", Maintainer: maintainer,
		Homepage: homepage, License: "Apache-2.0", MTime: r.date, DisableGlobbing: true,
		Description: description + "\nacproxy finds appc images (the .aci files that rkt, Mesos and others run) by\nmeta-discovery, fetches each of them and its OpenPGP signature once, decides\n" +
			"whether a trusted key signed it, keeps exactly those bytes and serves them to\nevery node, also when the publisher is down.\n",
		Overridables: nfpm.Overridables{
			Contents:   contents,
			Umask:      0o022,
			Recommends: []string{"ca-certificates"},
			Suggests:   []string{"bash-completion"},
			Scripts:    nfpm.Scripts{PostInstall: script("postinst"), PreRemove: script("prerm"), PostRemove: script("postrm")},
			Deb:        nfpm.Deb{Compression: "gzip", Fields: map[string]string{"Multi-Arch": "foreign"}},
		},
	}
	var b bytes.Buffer
	if err := deb.Default.Package(nfpm.WithDefaults(info), &b); err != nil {
		return nil, name, err
	}
	return b.Bytes(), path.Base(name), nil
}
