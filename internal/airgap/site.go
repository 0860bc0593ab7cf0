package airgap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/trust"
)

// A Site is a tree that any web server can serve in the place of publishers: a directory for each host, with discovery pages, and beside them images,
// signatures and keys. A segment of an image name doesn't begin with an underscore, so nothing of that is in the way of a page.
//
//	HOST/index.html, HOST/PATH/index.html   pages
//	HOST/_aci/NAME-VERSION-OS-ARCH.aci      images, and .aci.asc
//	HOST/_keys/FINGERPRINT.asc              keys
type Site struct {
	Dir      string
	FS       durable.FS                  // nil means that of the system
	Progress func(done, of int64)        // may be nil
	Link     func(from, to string) error // makes a second name of a file; nil means os.Link
}

const (
	siteImages = "_aci"
	siteKeys   = "_keys"
	indexFile  = "index.html"
	filePerm   = 0o644
	dirPerm    = 0o755
)

// siteTemplates are what a site's pages say, the first for images with os and arch, as rkt asks for them, the second for those without.
func siteTemplates(prefix, host string) []discovery.Template {
	base := "https://" + host + "/" + siteImages + "/{name}-{version}"
	return []discovery.Template{{Prefix: prefix, URL: base + "-{os}-{arch}.{ext}"}, {Prefix: prefix, URL: base + ".{ext}"}}
}

// Write writes a cargo as a site. What is there already and is the same is left, and nothing is removed. It returns what a site can't say.
func (s Site) Write(ctx context.Context, c *Cargo) (lacks []Lack, err error) {
	if s.FS == nil {
		s.FS = durable.OS{}
	}
	if s.Progress == nil {
		s.Progress = func(int64, int64) {}
	}
	if s.Link == nil {
		s.Link = os.Link
	}
	w := &siteWriting{Site: s, c: c, at: make(map[string]*bundle.Image), dirs: make(map[string]bool)}
	for _, im := range c.Index.Images {
		w.total += im.Size
	}
	for i := range c.Index.Images {
		if ctx.Err() != nil {
			return w.lacks, context.Cause(ctx)
		}
		if err := w.image(ctx, &c.Index.Images[i]); err != nil {
			return w.lacks, err
		}
	}
	return w.lacks, w.pages()
}

type siteWriting struct {
	Site
	c           *Cargo
	at          map[string]*bundle.Image // what is at a path
	names       []string                 // that have images
	dirs        map[string]bool
	done, total int64
	lacks       []Lack
}

func (w *siteWriting) lack(im *bundle.Image, format string, args ...any) {
	w.lacks = append(w.lacks, Lack{What: im.Ref().String(), Code: "not-for-a-site", Detail: fmt.Sprintf(format, args...)})
}

// image writes an image under the URLs that its refs have.
func (w *siteWriting) image(ctx context.Context, im *bundle.Image) error {
	if slices.Contains(strings.Split(im.Name, "/"), indexFile) {
		w.lack(im, "its page would be where another name's is: a segment of its name is %s", indexFile)
		return nil
	}
	refs := append([]acproxy.Ref{im.Ref()}, im.Refs...)
	first := ""
	for i, ref := range refs {
		path, err := w.path(ref)
		switch {
		case err != nil && i == 0:
			w.lack(im, "%v", err)
			return nil
		case err != nil || w.at[path] == im:
			continue
		case w.at[path] != nil:
			// Only what the templates ask for tells images apart.
			w.lack(im, "%v would be at %s, where %v is already: version, os and arch are all that a site's URLs tell apart", ref, path, w.at[path].Ref())
			continue
		}
		w.at[path] = im
		if first == "" {
			first = path
			err = w.write(ctx, im, path)
		} else {
			err = w.again(im, first, path)
		}
		if err != nil {
			return fmt.Errorf("writing %s: %w", path, err)
		}
	}
	if first != "" && !slices.Contains(w.names, im.Name) {
		w.names = append(w.names, im.Name)
	}
	w.done += im.Size
	w.Progress(w.done, w.total)
	return nil
}

// path returns where the image of a ref is, below the directory.
func (w *siteWriting) path(ref acproxy.Ref) (string, error) {
	var first error
	for _, t := range siteTemplates(ref.Name(), ref.Host()) {
		text, err := t.Expand(ref, discovery.ExtImage)
		if err != nil {
			first = cmpErr(first, err)
			continue
		}
		u, err := url.Parse(text)
		if err != nil {
			return "", err
		}
		path := ref.Host() + u.Path
		// A label's value is a stranger's, and a server decodes what a template has encoded. rkt encodes nothing, so that what would need it is never asked for.
		if strings.Count(u.Path, "/") != strings.Count(ref.Name(), "/")+2 || !filepath.IsLocal(path) || strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || strings.ContainsRune(`\%?#`, r) || r == 0x7f }) {
			return "", fmt.Errorf("its labels can't be in the name of a file: %q", u.Path)
		}
		return path, nil
	}
	return "", first
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func (w *siteWriting) file(path string) string { return filepath.Join(w.Dir, filepath.FromSlash(path)) }

func (w *siteWriting) mkdir(path string) error {
	dir := filepath.Dir(w.file(path))
	if w.dirs[dir] {
		return nil
	}
	w.dirs[dir] = true
	return w.FS.MkdirAll(dir, dirPerm)
}

// write writes an image and its signature, unless they are there. The image comes last: who sees it finds its signature.
func (w *siteWriting) write(ctx context.Context, im *bundle.Image, path string) error {
	if err := w.mkdir(path); err != nil {
		return err
	}
	if im.Signature != nil {
		from, err := w.c.Open(bundle.Member{Kind: bundle.KindSignature, Digest: im.Signature.Digest, Size: im.Signature.Size, Image: im})
		if err != nil {
			return err
		}
		b, err := io.ReadAll(io.LimitReader(from, bundle.MaxSignature))
		if err = errors.Join(err, from.Close()); err != nil {
			return err
		}
		// Nodes read it armored only.
		if b, err = trust.ArmorSignature(b); err != nil {
			return err
		}
		if err := w.small(path+".asc", b); err != nil {
			return err
		}
	}
	if fi, err := os.Lstat(w.file(path)); err == nil && fi.Mode().IsRegular() && fi.Size() == im.Size && fi.ModTime().Equal(modified(im)) {
		return nil
	}
	from, err := w.c.from.Open(im.Digest)
	if err != nil {
		return err
	}
	return errors.Join(w.copy(ctx, from, im, path), from.Close())
}

// modified returns the time that a site's file has.
func modified(im *bundle.Image) time.Time {
	if im.Modified.IsZero() {
		return time.Unix(0, 0)
	}
	return im.Modified
}

// copy writes an image as a file that appears whole or not at all.
func (w *siteWriting) copy(ctx context.Context, from io.Reader, im *bundle.Image, path string) (err error) {
	to := w.file(path)
	temp := to + ".partial"
	if err := w.FS.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := w.FS.Create(temp, filePerm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// The first error is the one to tell.
			_ = w.FS.Remove(temp)
		}
	}()
	n := int64(0)
	err = sameBytes(io.TeeReader(&counted{Reader: from, told: func(n int64) { w.Progress(w.done+n, w.total) }}, writerFunc(func(b []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		m, err := f.WriteAt(b, n)
		n += int64(m)
		return m, err
	})), im.Digest)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Chtimes(temp, modified(im), modified(im)); err != nil {
		return err
	}
	if err := w.FS.Rename(temp, to); err != nil {
		return err
	}
	return w.FS.SyncDir(filepath.Dir(to))
}

type writerFunc func([]byte) (int, error)

// Write implements io.Writer.
func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// again gives an image another name: a second one of the same file, or a copy where the file system has none.
func (w *siteWriting) again(im *bundle.Image, first, path string) error {
	if err := w.mkdir(path); err != nil {
		return err
	}
	if im.Signature != nil {
		b, err := os.ReadFile(w.file(first) + ".asc")
		if err != nil {
			return err
		}
		if err := w.small(path+".asc", b); err != nil {
			return err
		}
	}
	if a, err := os.Lstat(w.file(first)); err == nil {
		if b, err := os.Lstat(w.file(path)); err == nil && (os.SameFile(a, b) || b.Size() == im.Size && b.ModTime().Equal(modified(im))) && a.Size() == b.Size() {
			return nil
		}
	}
	temp := w.file(path) + ".partial"
	if err := w.FS.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if w.Link(w.file(first), temp) != nil {
		from, err := os.Open(w.file(first))
		if err != nil {
			return err
		}
		return errors.Join(w.copy(context.Background(), from, im, path), from.Close())
	}
	if err := w.FS.Rename(temp, w.file(path)); err != nil {
		return err
	}
	return w.FS.SyncDir(filepath.Dir(w.file(path)))
}

// small writes a small file, unless it is there.
func (w *siteWriting) small(path string, b []byte) error {
	if err := w.mkdir(path); err != nil {
		return err
	}
	if is, err := os.ReadFile(w.file(path)); err == nil && bytes.Equal(is, b) {
		return nil
	}
	return durable.WriteFile(w.FS, w.file(path), b, filePerm)
}

var sitePage = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{{.Title}}</title>
{{range .Templates}}<meta name="ac-discovery" content="{{.Prefix}} {{.URL}}">
{{end}}{{range .Keys}}<meta name="ac-discovery-pubkeys" content="{{$.Prefix}} {{.}}">
{{end}}</head><body><h1>{{.Title}}</h1><ul>
{{range .Images}}<li>{{.}}</li>
{{end}}</ul></body></html>
`))

// pages writes the keys and the discovery pages: one for each name, and one for each host, for those that ask the host.
func (w *siteWriting) pages() error {
	slices.Sort(w.names)
	keys := make(map[string]bundle.Key)
	for _, k := range w.c.Index.Keys {
		keys[k.Fingerprint] = k
	}
	hosts := make(map[string][]bundle.Image)
	for _, name := range w.names {
		var of []bundle.Image
		for _, im := range w.c.Index.Images {
			if im.Name == name {
				of = append(of, im)
			}
		}
		host, _, below := strings.Cut(name, "/")
		hosts[host] = append(hosts[host], of...)
		if below {
			if err := w.page(name, host, of, keys); err != nil {
				return err
			}
		}
	}
	for host, of := range hosts {
		if err := w.page(host, host, of, keys); err != nil {
			return err
		}
	}
	return nil
}

func (w *siteWriting) page(prefix, host string, images []bundle.Image, keys map[string]bundle.Key) error {
	content := struct {
		Title, Prefix string
		Templates     []discovery.Template
		Keys          []string
		Images        []string
	}{Title: prefix, Prefix: prefix, Templates: siteTemplates(prefix, host)}
	var signers []string
	for _, im := range images {
		content.Images = append(content.Images, im.Ref().String())
		for _, s := range im.Signers {
			if _, ok := keys[s]; ok && !slices.Contains(signers, s) {
				signers = append(signers, s)
			}
		}
	}
	slices.Sort(signers)
	for _, fingerprint := range signers {
		armored := w.c.small[keys[fingerprint].Digest]
		// A key that rkt can't read stops it from taking those behind it.
		if are, err := trust.ReadKeys(armored); err != nil || len(are) != 1 || are[0].RktReadable() != nil {
			continue
		}
		path := host + "/" + siteKeys + "/" + fingerprint + ".asc"
		if err := w.small(path, armored); err != nil {
			return err
		}
		content.Keys = append(content.Keys, "https://"+host+"/"+siteKeys+"/"+fingerprint+".asc")
	}
	var b bytes.Buffer
	if err := sitePage.Execute(&b, content); err != nil {
		return err
	}
	return w.small(prefix+"/"+indexFile, b.Bytes())
}
