package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const (
	homepage    = "https://github.com/acproxy/acproxy"
	description = "image discovery and caching registry proxy for appc images"
)

// read returns a file of the source.
func (r *release) read(name string) ([]byte, error) {
	return os.ReadFile(filepath.Join(r.source, filepath.FromSlash(name)))
}

// from returns a file of the source where it is installed.
func (r *release) from(name, installed string) (file, error) {
	content, err := r.read(name)
	return file{path: installed, mode: 0o644, content: content}, err
}

// archive returns a tar of all that somebody without a package installs by hand, under one directory.
func (r *release) archive(base string, p product) ([]byte, error) {
	all := []file{{path: "acproxy", mode: 0o755, content: p.binary}, {path: "NOTICES", mode: 0o644, content: r.notices}, {path: "acproxy.cdx.json", mode: 0o644, content: p.sbom}}
	for _, name := range []string{"LICENSE", "README.md", "CHANGELOG.md", "config.example.yaml"} {
		f, err := r.from(name, name)
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	units, err := r.units("systemd/")
	if err != nil {
		return nil, err
	}
	all = append(all, units...)
	for _, f := range r.pages {
		f.path = strings.TrimPrefix(f.path, "usr/share/")
		all = append(all, f)
	}
	for i := range all {
		all[i].path = path.Join(base, all[i].path)
	}
	packed, err := r.tar(all)
	if err != nil {
		return nil, err
	}
	return compressed(packed), nil
}

// units returns what systemd reads, under a directory.
func (r *release) units(dir string) ([]file, error) {
	names, err := filepath.Glob(filepath.Join(r.source, "deploy", "systemd", "acproxy.*"))
	if err != nil {
		return nil, err
	}
	var out []file
	for _, name := range names {
		f, err := r.from("deploy/systemd/"+filepath.Base(name), dir+filepath.Base(name))
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no unit in deploy/systemd")
	}
	return out, nil
}

// tar packs files and the directories above them, in order, all of one time and of root.
func (r *release) tar(files []file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	made := make(map[string]bool)
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if dir == "." || made[dir] {
			return nil
		}
		if err := mkdir(path.Dir(dir)); err != nil {
			return err
		}
		made[dir] = true
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: r.date, Format: tar.FormatPAX})
	}
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.path, b.path) })
	for _, f := range files {
		if err := mkdir(path.Dir(f.path)); err != nil {
			return nil, err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: f.path, Mode: int64(f.mode.Perm()), Size: int64(len(f.content)), ModTime: r.date, Format: tar.FormatPAX}
		if f.mode.IsDir() {
			header.Typeflag, header.Name = tar.TypeDir, f.path+"/"
			made[f.path] = true
		}
		if f.uid != 0 {
			header.Uid, header.Gid = f.uid, f.uid
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// writeTree writes files below a directory, with the owners that they have in the image.
func writeTree(dir string, files []file) error {
	for _, f := range files {
		name := filepath.Join(dir, filepath.FromSlash(f.path))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if !f.mode.IsDir() {
			if err := writeFile(name, f.content, f.mode); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(name, f.mode.Perm()); err != nil {
			return err
		}
		if err := os.Chmod(name, f.mode.Perm()); err != nil {
			return err
		}
		if f.uid != 0 {
			if err := os.Chown(name, f.uid, f.uid); err != nil {
				return err
			}
		}
	}
	return nil
}

// packLayout returns the files of an OCI image layout as a tar, as podman load and skopeo read it.
func (r *release) packLayout(dir string) ([]byte, error) {
	var files []file
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		files = append(files, file{path: filepath.ToSlash(rel), mode: 0o644, content: content})
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.tar(files)
}

// sumsOf returns what sha256sum prints for files in a directory.
func sumsOf(dir string, names []string) ([]byte, error) {
	var b bytes.Buffer
	for _, name := range names {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		hash := sha256.New()
		_, err = io.Copy(hash, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%x  %s\n", hash.Sum(nil), name)
	}
	return b.Bytes(), nil
}
