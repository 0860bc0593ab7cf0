package oci

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/appc/spec/pkg/acirenderer"
	"github.com/appc/spec/schema"
	"github.com/appc/spec/schema/types"
	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/testtools"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// layerOf returns the layer of an image.
func layerOf(t testing.TB, blob []byte, keep ...*paths) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeLayer(&b, bytes.NewReader(blob), int64(len(blob)), aci.Limits{}, keep); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entries returns a line for each entry of a tar.
func entries(t testing.TB, layer []byte) []string {
	t.Helper()
	var out []string
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%c %s %o %d:%d %s:%s %d", h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid, h.Uname, h.Gname, h.ModTime.Unix())
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		if h.Typeflag == tar.TypeChar {
			line += fmt.Sprintf(" %d,%d", h.Devmajor, h.Devminor)
		}
		for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if strings.HasPrefix(key, xattrPrefix) {
				line += " " + key + "=" + h.PAXRecords[key]
			}
		}
		if len(body) > 0 && len(body) < 100 {
			line += fmt.Sprintf(" %q", body)
		} else if len(body) > 0 {
			line += fmt.Sprintf(" (%d)", len(body))
		}
		out = append(out, line)
	}
}

// everything is an image with a file of each kind.
func everything() acitest.Spec {
	return acitest.Spec{
		Labels: map[string]string{"version": "1"},
		Before: []acitest.Entry{{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}}},
		Extra: []acitest.Entry{
			acitest.Dir("./rootfs/etc/"),
			{Header: tar.Header{Typeflag: tar.TypeReg, Name: "rootfs/etc/passwd", Mode: 0o640, Uid: 12, Gid: 34, Uname: "mail", Gname: "adm", ModTime: time.Unix(1_400_000_000, 999_999_999), Format: tar.FormatPAX}, Body: []byte("root")},
			acitest.Symlink("rootfs/etc/up", "../../../etc/shadow"),
			acitest.Link("rootfs/etc/shadow", "./rootfs/etc/passwd"),
			acitest.Device("rootfs/dev/null"),
			{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "rootfs/dev/fifo", Mode: 0o600}},
			{Header: tar.Header{Typeflag: tar.TypeReg, Name: "rootfs/bin/ping", Mode: 0o4755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "comment": "lost"}, Format: tar.FormatPAX}, Body: []byte("ping")},
			{Header: tar.Header{Typeflag: tar.TypeReg, Name: "rootfs/" + strings.Repeat("long/", 60) + "ä", Mode: 0o644, Format: tar.FormatPAX}, Body: []byte("x")},
		},
	}
}

func TestLayerIsWhatIsInRootfs(t *testing.T) {
	want := []string{
		"5 ./ 755 0:0 : 1467288000",
		"5 etc/ 755 0:0 : 1467288000",
		`0 etc/passwd 640 12:34 mail:adm 1400000000 "root"`,
		"2 etc/up 777 0:0 : 1467288000 -> ../../../etc/shadow",
		"1 etc/shadow 644 0:0 : 1467288000 -> etc/passwd",
		"3 dev/null 666 0:0 : 1467288000 1,3",
		"6 dev/fifo 600 0:0 : 1467288000",
		"0 bin/ping 4755 0:0 : 1467288000 SCHILY.xattr.security.capability=\x01\x00\x00\x02 \"ping\"",
		"0 " + strings.Repeat("long/", 60) + `ä 644 0:0 : 1467288000 "x"`,
	}
	for _, compression := range []string{acitest.Gzip, acitest.XZ, acitest.None} {
		spec := everything()
		spec.Compression = compression
		layer := layerOf(t, acitest.Must(t, spec))
		if got := entries(t, layer); !slices.Equal(got, want) {
			t.Errorf("%s: the layer has\n%s\nwant\n%s", compression, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		// Nodes know layers by their digests: they must never change. If this fails, it isn't the number that is wrong.
		const golden = "9663eb7503c2455c5770b3eca460b581eb88a64dd0f0fe936bd3e9a4482cc206"
		if got := hex.EncodeToString(sum(layer)); got != golden {
			t.Errorf("%s: the layer is %s, and was %s", compression, got, golden)
		}
	}
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

func TestSparseFileHasZeros(t *testing.T) {
	// GNU's old format: 4 bytes at 0 and 4 at 1 MiB.
	layer := layerOf(t, sparseImage(t, 1<<20+4))
	r := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Name != "sparse" {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil || h.Typeflag != tar.TypeReg || len(b) != 1<<20+4 || string(b[:4]) != "head" || string(b[1<<20:]) != "tail" || len(bytes.Trim(b[4:1<<20], "\x00")) != 0 {
			t.Errorf("the file is of type %c and has %d bytes, %v", h.Typeflag, len(b), err)
		}
		return
	}
}

// sparseImage returns an image with a sparse file of some size, of which the first and the last four bytes are there. The format is GNU's, which package tar reads
// and doesn't write.
func sparseImage(t testing.TB, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeReg, Name: "manifest", Mode: 0o644, Size: int64(len(acitest.Spec{}.ManifestJSON()))},
		{Typeflag: tar.TypeDir, Name: "rootfs", Mode: 0o755},
		{Typeflag: tar.TypeReg, Name: "rootfs/sparse", Mode: 0o644, Size: 8, Format: tar.FormatGNU},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		switch h.Name {
		case "manifest":
			_, _ = w.Write(acitest.Spec{}.ManifestJSON())
		case "rootfs/sparse":
			_, _ = w.Write([]byte("headtail"))
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	raw := b.Bytes()
	at := bytes.LastIndex(raw, []byte("rootfs/sparse"))
	block := raw[at : at+512]
	block[156] = tar.TypeGNUSparse
	octal := func(at int, n int64) { copy(block[at:], fmt.Sprintf("%011o ", n)) }
	octal(386, 0)
	octal(398, 4)
	octal(410, size-4)
	octal(422, 4)
	octal(483, size)
	copy(block[148:156], "        ")
	checksum := 0
	for _, c := range block {
		checksum += int(c)
	}
	copy(block[148:156], fmt.Sprintf("%06o\x00 ", checksum))
	if _, err := aci.Inspect(bytes.NewReader(raw), aci.Limits{}, nil); err != nil {
		t.Fatalf("the sparse image is none: %v", err)
	}
	return raw
}

func TestWhatHasNoLayer(t *testing.T) {
	linked := acitest.Spec{Extra: []acitest.Entry{acitest.File("rootfs/a", "a"), acitest.Link("rootfs/b", "rootfs/a")}}
	for _, tt := range []struct {
		name string
		blob []byte
		keep []*paths
		want string
	}{
		{"a whiteout", acitest.Must(t, acitest.Spec{Files: map[string]string{"etc/.wh.passwd": ""}}), nil, `has a file "/etc/.wh.passwd"`},
		{"a directory that is one", acitest.Must(t, acitest.Spec{Extra: []acitest.Entry{acitest.Dir("rootfs/.wh.a")}}), nil, `has a file "/.wh.a"`},
		{"holes that are too large", sparseImage(t, 1<<33), nil, "holes that are too large"},
		{"overlayfs's word for a file that is gone", acitest.Must(t, acitest.Spec{Extra: []acitest.Entry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "rootfs/a", Mode: 0o600}}}}), nil, `numbers 0 and 0, "/a"`},
		{"a link to what is not kept", acitest.Must(t, linked), []*paths{newPaths([]string{"/b"}, true)}, `keeps "/b", a hard link to "/a"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := writeLayer(io.Discard, bytes.NewReader(tt.blob), int64(len(tt.blob)), aci.Limits{}, tt.keep)
			if !errors.Is(err, acproxy.ErrNotFound) || acproxy.Code(err) != codeUnconvertible || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want one that says %q", err, tt.want)
			}
		})
	}
	// At the edge of what is allowed.
	blob := sparseImage(t, 10<<20)
	if err := writeLayer(io.Discard, bytes.NewReader(blob), int64(len(blob)), aci.Limits{}, nil); err != nil {
		t.Errorf("a hole of 10 MiB: %v", err)
	}
	blob = sparseImage(t, 10<<20+1)
	if err := writeLayer(io.Discard, bytes.NewReader(blob), int64(len(blob)), aci.Limits{}, nil); acproxy.Code(err) != codeUnconvertible {
		t.Errorf("a hole of a byte more: %v", err)
	}
}

// A shelf is a registry of images for the renderer that appc's authors wrote.
type shelf struct {
	images map[string][]byte // by key, which is the image ID
	byName map[string]string
}

func (s *shelf) GetImageManifest(key string) (*schema.ImageManifest, error) {
	return acitest.Manifest(bytes.NewReader(s.images[key]))
}

func (s *shelf) GetACI(name types.ACIdentifier, _ types.Labels) (string, error) {
	key, ok := s.byName[name.String()]
	if !ok {
		return "", errors.New("there is no " + name.String())
	}
	return key, nil
}

func (s *shelf) ReadStream(key string) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s.images[key])), nil
}

func (s *shelf) ResolveKey(key string) (string, error) { return key, nil }

func (s *shelf) HashToKey(h hash.Hash) string { return "sha512-" + hex.EncodeToString(h.Sum(nil)) }

func (s *shelf) add(t testing.TB, spec acitest.Spec) {
	t.Helper()
	spec.Compression = acitest.None
	blob := acitest.Must(t, spec)
	id, err := acitest.ID(blob)
	if err != nil {
		t.Fatal(err)
	}
	s.images[id.String()], s.byName[spec.Name] = blob, id.String()
}

// render returns the files that a node would have, by appc's own renderer: path → content, directories left out.
func (s *shelf) render(t testing.TB, name string) map[string]string {
	t.Helper()
	rendered, err := acirenderer.GetRenderedACI(types.ACIdentifier(name), nil, s)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for _, files := range rendered {
		for r := tar.NewReader(bytes.NewReader(s.images[files.Key])); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			below, ok := inRootfs(h.Name)
			if _, there := files.FileMap[path.Clean(h.Name)]; !ok || !there || h.Typeflag == tar.TypeDir {
				continue
			}
			body, _ := io.ReadAll(r)
			out[below] = string(body)
		}
	}
	return out
}

// applied returns the files that a runtime has which applies layers one after the other, directories left out.
func applied(t testing.TB, layers [][]byte) map[string]string {
	t.Helper()
	out := make(map[string]string)
	for _, layer := range layers {
		for r := tar.NewReader(bytes.NewReader(layer)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := path.Clean(h.Name)
			for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
				delete(out, dir) // a file in whose place a directory has come
			}
			if h.Typeflag == tar.TypeDir {
				delete(out, name)
				continue
			}
			for other := range out {
				if strings.HasPrefix(other, name+"/") {
					delete(out, other)
				}
			}
			body, _ := io.ReadAll(r)
			out[name] = string(body)
		}
	}
	return out
}

// TestRendersAsAppc makes images that need one another at random, and compares what a runtime has that applies the layers with what the renderer gives that appc's
// authors wrote.
func TestRendersAsAppc(t *testing.T) {
	seeds := uint64(30)
	if testtools.Brief() {
		seeds = 6
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 7))
			s := newScene(t)
			shelf := &shelf{images: make(map[string][]byte), byName: make(map[string]string)}
			names := []string{"example.com/a", "example.com/b", "example.com/c", "example.com/d", "example.com/e"}
			for i, name := range names {
				spec := acitest.Spec{Name: name, Files: make(map[string]string)}
				dirs := make(map[string]bool)
				for range 1 + rnd.IntN(6) {
					file := []string{"x", "y", "dir/x", "dir/y", "dir/sub/x", "other/x", "other"}[rnd.IntN(7)]
					if _, both := spec.Files["other"]; both && strings.HasPrefix(file, "other/") {
						continue
					}
					if _, both := spec.Files["other/x"]; both && file == "other" {
						continue
					}
					spec.Files[file] = name + " " + file
					for dir := path.Dir(file); dir != "."; dir = path.Dir(dir) {
						dirs[dir] = true
					}
				}
				for _, dir := range slices.Sorted(maps.Keys(dirs)) {
					spec.Before = append(spec.Before, acitest.Dir("rootfs/"+dir))
				}
				for _, below := range names[:i] {
					if rnd.IntN(2) == 0 {
						spec.Dependencies = append(spec.Dependencies, acitest.Dependency{Name: below})
					}
				}
				rnd.Shuffle(len(spec.Dependencies), func(i, j int) {
					spec.Dependencies[i], spec.Dependencies[j] = spec.Dependencies[j], spec.Dependencies[i]
				})
				// Of several whitelists appc's renderer looks at the outermost alone, and takes one for that of images beside it, too; its specification does
				// neither (TestWhitelists).
				if i == len(names)-1 && rnd.IntN(2) == 0 {
					spec.Manifest = whitelisted(t, spec, "/x", "/dir", "/dir/x", "/other", "/other/x")
				}
				shelf.add(t, spec)
				s.put(spec)
			}
			want, got := shelf.render(t, "example.com/e"), applied(t, s.layers("example.com/e"))
			if !maps.Equal(got, want) {
				t.Errorf("a runtime has\n%s\nand a node\n%s", lines(got), lines(want))
			}
		})
	}
}

// TestWhitelists has what an image lists be all that there is of it and of those below it, and of no others (appc specification, "Image Manifest Schema",
// pathWhitelist).
func TestWhitelists(t *testing.T) {
	s := newScene(t)
	files := func(name string) map[string]string {
		return map[string]string{"x": name, "y": name, "dir/" + name: name, "empty-" + name: ""}
	}
	s.put(acitest.Spec{Name: "example.com/base", Files: files("base"), Before: []acitest.Entry{acitest.Dir("rootfs/dir"), acitest.Dir("rootfs/other")}})
	inner := acitest.Spec{Name: "example.com/inner", Files: files("inner"), Dependencies: []acitest.Dependency{{Name: "example.com/base"}}}
	inner.Manifest = whitelisted(t, inner, "/y", "/dir/base", "dir/inner")
	s.put(inner)
	outer := acitest.Spec{Name: "example.com/outer", Files: files("outer"), Before: []acitest.Entry{acitest.Dir("rootfs/tmp")}, Dependencies: []acitest.Dependency{{Name: "example.com/base"}, {Name: "example.com/inner"}}}
	outer.Manifest = whitelisted(t, outer, "/x", "/dir/base", "/dir/outer")
	s.put(outer)
	for name, want := range map[string]string{
		"example.com/inner": "dir/base: base\ndir/inner: inner\ny: inner",
		"example.com/outer": "dir/base: base\ndir/outer: outer\nx: outer",
	} {
		if got := lines(applied(t, s.layers(name))); got != want {
			t.Errorf("%s has\n%s\nwant\n%s", name, got, want)
		}
	}
	layers := s.layers("example.com/outer")
	var got []string
	for _, layer := range layers {
		for _, line := range entries(t, layer) {
			got = append(got, strings.Fields(line)[1])
		}
	}
	// base, once by itself and once below inner; inner; outer. A directory that leads to what is listed is there as it was, and so are an image's own.
	if got, want := strings.Join(got, " "), "dir/ ./ dir/base x dir/ ./ dir/base ./ tmp/ ./ dir/outer x"; len(layers) != 4 || got != want {
		t.Errorf("%d layers, with\n%s\nwant\n%s", len(layers), got, want)
	}
}

func lines(files map[string]string) string {
	var out []string
	for name, content := range files {
		out = append(out, name+": "+content)
	}
	slices.SortFunc(out, cmp.Compare[string])
	return strings.Join(out, "\n")
}

// FuzzLayer converts whatever package aci takes for an image, and looks at what comes out.
func FuzzLayer(f *testing.F) {
	for _, compression := range []string{acitest.Gzip, acitest.None} {
		spec := everything()
		spec.Compression = compression
		f.Add(acitest.Must(f, spec))
	}
	f.Add(sparseImage(f, 1<<20))
	lim := aci.Limits{MaxUncompressed: 1 << 20, MaxEntries: 1000}
	f.Fuzz(func(t *testing.T, blob []byte) {
		if _, err := aci.Inspect(bytes.NewReader(blob), lim, nil); err != nil {
			t.Skip()
		}
		var first, second bytes.Buffer
		err := writeLayer(&first, bytes.NewReader(blob), int64(len(blob)), lim, nil)
		if err != nil {
			if acproxy.Code(err) != codeUnconvertible && !strings.Contains(err.Error(), "writing ") {
				t.Fatalf("a proper image has no layer: %v", err)
			}
			return
		}
		if err := writeLayer(&second, bytes.NewReader(blob), int64(len(blob)), lim, nil); err != nil || !bytes.Equal(first.Bytes(), second.Bytes()) {
			t.Fatalf("a second time it is another layer: %v", err)
		}
		for r := tar.NewReader(&first); ; {
			h, err := r.Next()
			if err == io.EOF {
				return
			}
			if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
				t.Fatalf("the layer can't be read: %v", err)
			}
			for _, name := range []string{h.Name, h.Linkname} {
				if h.Typeflag == tar.TypeSymlink && name == h.Linkname {
					continue
				}
				if strings.HasPrefix(name, "/") || slices.Contains(strings.Split(name, "/"), "..") || strings.HasPrefix(path.Base(name), whiteoutPrefix) {
					t.Fatalf("the layer has %q", name)
				}
			}
		}
	})
}
