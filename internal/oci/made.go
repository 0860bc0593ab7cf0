package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// format numbers the way in which layers and documents are made: another one gives other digests, so that it goes up with every change of either. What was made
// in an older way and is asked for by its digest is answered as it was.
const format = 1

// A made is an OCI image that was made of appc images, or with Children an index of some.
type made struct {
	Format   int                `json:"format"`
	Key      string             `json:"key"`
	Name     string             `json:"name"` // of the appc image
	Platform imagespec.Platform `json:"platform,omitzero"`
	Pieces   []piece            `json:"pieces,omitempty"` // in the order of the layers, the image itself last
	Config   []byte             `json:"config,omitempty"` // exactly as it is served
	Manifest []byte             `json:"manifest"`         // exactly as it is served, an index too
	// Sum is the SHA-256 of Config, a zero byte and Manifest.
	Sum      acproxy.Digest   `json:"sum"`
	Children []acproxy.Digest `json:"children,omitempty"` // the manifests of an index
}

// A piece is one of the images that one is rendered from.
type piece struct {
	Digest  acproxy.Digest    `json:"digest"` // of the blob
	ImageID acproxy.ImageID   `json:"imageID"`
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	Size    int64             `json:"size"` // bytes of the blob
	// Within are the images, itself among them, whose pathWhitelist says which of its files there are: places in the list of pieces.
	Within []int      `json:"within,omitempty"`
	Layer  descriptor `json:"layer"`
}

// what names a piece for people.
func (p piece) what() string {
	if version := p.Labels[acproxy.LabelVersion]; version != "" {
		return p.Name + ":" + version
	}
	return p.Name
}

// ref returns the ref of all its labels.
func (p piece) ref() (acproxy.Ref, error) { return acproxy.NewRef(p.Name, p.Labels) }

func (m *made) descriptor() descriptor { return describe(m.Manifest) }

func (m *made) mediaType() string {
	if m.Children != nil {
		return MediaTypeIndex
	}
	return MediaTypeManifest
}

func describe(b []byte) descriptor {
	return descriptor{Digest: sha256.Sum256(b), Size: int64(len(b))}
}

func (m *made) sum() acproxy.Digest {
	return sha256.Sum256(slices.Concat(m.Config, []byte{0}, m.Manifest))
}

// digests returns what can be asked for by its digest: manifest, configuration and layers.
func (m *made) digests() []acproxy.Digest {
	out := []acproxy.Digest{m.descriptor().Digest}
	if m.Config != nil {
		out = append(out, describe(m.Config).Digest)
	}
	for _, p := range m.Pieces {
		if !slices.Contains(out, p.Layer.Digest) {
			out = append(out, p.Layer.Digest)
		}
	}
	return out
}

// keyOf names what is made of pieces, whose layers needn't be known, for a platform.
func keyOf(pieces []piece, platform imagespec.Platform) string {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%s/%s/%s\n", format, platform.OS, platform.Architecture, platform.Variant)
	for _, p := range pieces {
		fmt.Fprintf(h, "%s %v\n", p.Digest.Hex(), p.Within)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// keyOfIndex names an index.
func keyOfIndex(name string, children []acproxy.Digest) string {
	h := sha256.New()
	fmt.Fprintf(h, "%d index %s\n", format, name)
	for _, c := range children {
		fmt.Fprintln(h, c.Hex())
	}
	return hex.EncodeToString(h.Sum(nil))
}

// layerKey names the layer of a piece: its bytes, and the images whose whitelists count.
func layerKey(pieces []piece, i int) string {
	h := sha256.New()
	fmt.Fprintf(h, "%d %s\n", format, pieces[i].Digest.Hex())
	for _, w := range pieces[i].Within {
		fmt.Fprintf(h, "%s %t\n", pieces[w].Digest.Hex(), w == i)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// madeExt ends the names of the files that say what was made.
const madeExt = ".json"

const (
	dirPerm  fs.FileMode = 0o700
	filePerm fs.FileMode = 0o600
)

// read reads what was made under a key. What is damaged is removed: it is made again when somebody asks for it.
func (b *Bridge) read(key string) (*made, error) {
	if b.cfg.Dir == "" {
		return nil, fs.ErrNotExist
	}
	name := b.file(key)
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var m made
	if err = json.Unmarshal(data, &m); err == nil && (m.Key != key || m.sum() != m.Sum) {
		err = errors.New("its checksum is that of something else")
	}
	if err != nil {
		b.log.Error("what is known of an OCI image can't be read, and is forgotten: it is made again for who asks for it by a tag", "file", name, "err", err)
		return nil, errors.Join(fs.ErrNotExist, b.cfg.FS.Remove(name))
	}
	return &m, nil
}

func (b *Bridge) file(key string) string { return filepath.Join(b.cfg.Dir, key+madeExt) }

// keep writes down what was made, and has it be found. A disk that is full, or can't be written, makes it be forgotten when the process ends.
//
//	create ─▶ write ─▶ fsync ─▶ rename ─▶ fsync directory
func (b *Bridge) keep(m *made) {
	m.Format, m.Sum = format, m.sum()
	b.index(m)
	b.remember(m)
	b.mu.Lock()
	b.unkept[m.Key] = m
	b.mu.Unlock()
	if err := b.write(m); err != nil {
		b.log.Warn("what was made could not be written down: it will have to be made again after the next start", "image", m.Name, "err", err)
		return
	}
	b.mu.Lock()
	delete(b.unkept, m.Key)
	b.mu.Unlock()
}

func (b *Bridge) write(m *made) error {
	if b.cfg.Dir == "" {
		return nil
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return durable.WriteFile(b.cfg.FS, b.file(m.Key), data, filePerm)
}

// index has what was made be found by its digests.
func (b *Bridge) index(m *made) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.made[m.Key] {
		return
	}
	b.made[m.Key] = true
	for _, d := range m.digests() {
		b.byDigest[d] = append(b.byDigest[d], place{m.Name, m.Key})
	}
	if m.Format != format {
		return
	}
	for i, p := range m.Pieces {
		b.layers[layerKey(m.Pieces, i)] = p.Layer
	}
}

// load reads what was made before, beside the serving: the files that there were at the start. It ends with the bridge; Close waits for it.
func (b *Bridge) load(files []fs.DirEntry) {
	defer close(b.loaded)
	var indexes []*made
	for _, e := range files {
		if b.ctx.Err() != nil {
			return
		}
		key, ok := strings.CutSuffix(e.Name(), madeExt)
		if !ok {
			// A file that was being written when the last process ended.
			if err := b.cfg.FS.Remove(filepath.Join(b.cfg.Dir, e.Name())); err != nil {
				b.log.Warn("removing what was left unfinished", "file", e.Name(), "err", err)
			}
			continue
		}
		m, err := b.read(key)
		switch {
		case err != nil:
		case m.Children != nil:
			indexes = append(indexes, m)
		default:
			b.take(m, e)
		}
	}
	for _, m := range indexes {
		// An index is of use as long as one of its images is.
		if slices.ContainsFunc(m.Children, func(d acproxy.Digest) bool { return len(b.keys(d, m.Name)) > 0 }) {
			b.index(m)
		} else if err := b.cfg.FS.Remove(b.file(m.Key)); err != nil {
			b.log.Warn("forgetting an index", "image", m.Name, "err", err)
		}
	}
}

// forgetAfter is for how long what was made is remembered at least. After that it is forgotten at the next start if none of the images is held any more that it
// was made of; until then it can be had by its digest whenever they can be fetched again.
const forgetAfter = 90 * 24 * time.Hour

// take takes over what was read from a file, or forgets it.
func (b *Bridge) take(m *made, file fs.DirEntry) {
	if fi, err := file.Info(); err != nil || b.now().Sub(fi.ModTime()) < forgetAfter || b.holds(m) {
		b.index(m)
		return
	}
	b.log.Info("an OCI image is forgotten: the images that it was made of are gone", "image", m.Name)
	if err := b.cfg.FS.Remove(b.file(m.Key)); err != nil {
		b.log.Warn("forgetting an OCI image", "image", m.Name, "err", err)
	}
}

// holds reports whether any of the images is held that something was made of.
func (b *Bridge) holds(m *made) bool {
	return slices.ContainsFunc(m.Pieces, func(p piece) bool {
		_, err := b.cfg.Store.Record(p.Digest)
		return err == nil
	})
}
