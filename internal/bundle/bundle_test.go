package bundle

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// goods are what test bundles are made of, by digest.
type goods map[acproxy.Digest][]byte

func (g goods) put(b []byte) acproxy.Digest {
	d := acproxy.Digest(sha256.Sum256(b))
	g[d] = b
	return d
}

func (g goods) open(m Member) (io.ReadCloser, error) {
	b, ok := g[m.Digest]
	if !ok {
		return nil, fmt.Errorf("no %s", m.Name())
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// sample returns an index of images with these sizes, and what they are made of.
func sample(t testing.TB, sizes ...int) (*Index, goods) {
	t.Helper()
	g := make(goods)
	key := []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")
	x := &Index{
		Keys:  []Key{{Fingerprint: strings.Repeat("ab", 20), Digest: g.put(key), Size: int64(len(key)), Prefixes: []string{"example.com"}}},
		Names: []Name{{Name: "example.com/app", Templates: []Template{{Prefix: "example.com", URL: "https://example.com/{name}-{version}.{ext}"}}}},
	}
	for i, size := range sizes {
		blob, signature := random(uint64(i), size), fmt.Appendf(nil, "signature %d", i)
		im := Image{
			Digest: g.put(blob), Size: int64(size), ImageID: sha512.Sum512(blob), Name: "example.com/app", Labels: map[string]string{"version": fmt.Sprint(i), "os": "linux"},
			Modified: time.Unix(1_500_000_000, 5),
		}
		if i%3 != 2 {
			im.Signature, im.Signers = &Signature{Digest: g.put(signature), Size: int64(len(signature))}, []string{x.Keys[0].Fingerprint}
		}
		if i == 0 {
			ref, err := acproxy.ParseRef("example.com/app,os=linux")
			if err != nil {
				t.Fatal(err)
			}
			im.Refs = []acproxy.Ref{ref}
		}
		x.Images = append(x.Images, im)
	}
	return x, g
}

func mustNew(t testing.TB, x *Index, s *Signer) *Bundle {
	t.Helper()
	b, err := New(x, s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func streamed(t testing.TB, b *Bundle, from int64, open Opener) []byte {
	t.Helper()
	r, err := b.Stream(t.Context(), from, open)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func signer(t testing.TB, name string) *Signer {
	t.Helper()
	s, err := LoadSigner(filepath.Join(t.TempDir(), "key"), name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// readAll reads a whole bundle and returns what was good, and the errors of what was not, by the names of members.
func readAll(s Source) (good map[string][]byte, bad map[string]error, err error) {
	r, err := NewReader(s, nil)
	if err != nil {
		return nil, nil, err
	}
	good, bad = make(map[string][]byte), make(map[string]error)
	for _, m := range r.Members() {
		from, err := r.Open(m)
		var b []byte
		if err == nil {
			b, err = io.ReadAll(from)
		}
		if err == nil && acproxy.Digest(sha256.Sum256(b)) != m.Digest {
			err = errors.New("other bytes")
		}
		if err != nil {
			bad[m.Name()] = err
			continue
		}
		good[m.Name()] = b
	}
	if err := r.End(); err != nil {
		bad["end"] = err
	}
	return good, bad, nil
}

func TestStreamIsTheSameTarFromAnyByte(t *testing.T) {
	x, g := sample(t, 1, 511, 512, 513, 3000)
	b := mustNew(t, x, signer(t, "here"))
	all := streamed(t, b, 0, g.open)
	if int64(len(all)) != b.Size() {
		t.Fatalf("the stream has %d bytes, Size says %d", len(all), b.Size())
	}
	// Deterministic, whatever the order in which things were found.
	y, _ := sample(t, 1, 511, 512, 513, 3000)
	slices.Reverse(y.Images)
	if again := mustNew(t, y, nil); again.ID() != b.ID() {
		t.Errorf("the ID is %v, and %v with the images in another order", b.ID(), again.ID())
	}
	for from := int64(0); from <= b.Size(); from += 97 {
		if !bytes.Equal(streamed(t, b, from, g.open), all[from:]) {
			t.Fatalf("the stream from byte %d on is another", from)
		}
	}
	tr := tar.NewReader(bytes.NewReader(all))
	var names []string
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if len(names) != 2+1+5+4 || names[0] != indexName || names[1] != noteName {
		t.Errorf("a tar reader finds %q", names)
	}
	good, bad, err := readAll(Plain(bytes.NewReader(all)))
	if err != nil || len(bad) > 0 || len(good) != 1+5+4 {
		t.Errorf("reading it gives %d members, %v, %v", len(good), bad, err)
	}
}

func TestLargeMembersHaveTheHeaderThatWasCounted(t *testing.T) {
	for _, size := range []int64{1, maxOctal, maxOctal + 1, MaxImage} {
		name := Member{Kind: KindSignature, Image: &Image{}}.Name()
		h := header(name, size)
		if int64(len(h)) != headerSize(size) {
			t.Errorf("the header of %d bytes has %d bytes, and %d were counted", size, len(h), headerSize(size))
		}
		got, err := tar.NewReader(bytes.NewReader(h)).Next()
		if err != nil || got.Size != size || got.Name != name {
			t.Errorf("a tar reader finds %v, %v for %d bytes", got, err, size)
		}
	}
}

func TestEveryFlippedByteIsNoticed(t *testing.T) {
	x, g := sample(t, 700, 300)
	b := mustNew(t, x, nil)
	all := streamed(t, b, 0, g.open)
	want, _, _ := readAll(Plain(bytes.NewReader(all)))
	for at := range all {
		damaged := bytes.Clone(all)
		damaged[at] ^= 0x10
		good, bad, err := readAll(Plain(bytes.NewReader(damaged)))
		if err != nil {
			continue // the index or what is before it
		}
		for name, is := range good {
			if !bytes.Equal(is, want[name]) {
				t.Fatalf("byte %d flipped: %s has other bytes", at, name)
			}
		}
		if len(good) < len(want)-1 {
			t.Errorf("byte %d flipped: only %d of %d members can be read: %v", at, len(good), len(want), bad)
		}
		if len(bad) == 0 && !isPadding(b, int64(at)) {
			t.Errorf("byte %d flipped, and nobody notices", at)
		}
	}
}

// isPadding reports whether a byte fills up a block behind a member: what stands there is of no account.
func isPadding(b *Bundle, at int64) bool {
	for _, p := range b.parts() {
		if at >= p.at && at < p.at+p.size {
			return p.member == nil && p.size < blockSize
		}
	}
	return false
}

func TestEveryTruncationIsNoticed(t *testing.T) {
	x, g := sample(t, 700, 300)
	b := mustNew(t, x, nil)
	all := streamed(t, b, 0, g.open)
	for n := range all {
		good, bad, err := readAll(Plain(bytes.NewReader(all[:n])))
		if err == nil && len(bad) == 0 {
			t.Fatalf("cut after %d bytes, and nobody notices (%d members)", n, len(good))
		}
		for _, err := range bad {
			if acproxy.Code(err) != CodeIncomplete {
				t.Fatalf("cut after %d bytes: %v", n, err)
			}
		}
	}
	if _, bad, err := readAll(Plain(bytes.NewReader(append(bytes.Clone(all), 0)))); err != nil || acproxy.Code(bad["end"]) != CodeDamaged {
		t.Errorf("a byte too much: %v, %v", bad, err)
	}
}

func TestChangedStore(t *testing.T) {
	x, g := sample(t, 700)
	b := mustNew(t, x, nil)
	for name, change := range map[string]func([]byte) []byte{
		"other bytes": func(b []byte) []byte { b = bytes.Clone(b); b[5]++; return b },
		"shorter":     func(b []byte) []byte { return b[:100] },
		"empty":       func([]byte) []byte { return nil },
	} {
		g := maps(g)
		g[x.Images[0].Digest] = change(g[x.Images[0].Digest])
		r, err := b.Stream(t.Context(), 0, g.open)
		if err == nil {
			_, err = io.ReadAll(r)
			r.Close()
		}
		if acproxy.Code(err) != CodeDamaged {
			t.Errorf("%s: %v, want code %s", name, err, CodeDamaged)
		}
	}
}

func maps(g goods) goods {
	out := make(goods)
	for k, v := range g {
		out[k] = v
	}
	return out
}

func TestIndexLimits(t *testing.T) {
	for name, change := range map[string]func(x *Index){
		"a digest twice":             func(x *Index) { x.Images[1].Digest = x.Images[0].Digest },
		"a fingerprint with a path":  func(x *Index) { x.Keys[0].Fingerprint = "../../../../etc/passwd" },
		"a name with a path":         func(x *Index) { x.Images[0].Name = "../etc" },
		"a size below 0":             func(x *Index) { x.Images[0].Size = -1 },
		"a size of 0":                func(x *Index) { x.Images[0].Size = 0 },
		"a size beyond all":          func(x *Index) { x.Images[0].Size = MaxImage + 1 },
		"a signature beyond all":     func(x *Index) { x.Images[0].Signature.Size = MaxSignature + 1 },
		"a key beyond all":           func(x *Index) { x.Keys[0].Size = MaxSignature + 1 },
		"no image ID":                func(x *Index) { x.Images[0].ImageID = acproxy.ImageID{} },
		"a template for others":      func(x *Index) { x.Names[0].Templates[0].Prefix = "example.org" },
		"a template with a password": func(x *Index) { x.Names[0].Templates[0].URL = "https://u:p@example.com/{name}" },
		"a template of a file":       func(x *Index) { x.Names[0].Templates[0].URL = "file:///{name}" },
		"no template":                func(x *Index) { x.Names[0].Templates = nil },
		"too many templates":         func(x *Index) { x.Names[0].Templates = slices.Repeat(x.Names[0].Templates, MaxTemplates+1) },
		"a name twice":               func(x *Index) { x.Names = append(x.Names, x.Names[0]) },
		"a ref of another image": func(x *Index) {
			x.Images[0].Refs = []acproxy.Ref{ref(t, "example.com/app:7")}
		},
		"a ref twice": func(x *Index) { x.Images[0].Refs = slices.Repeat(x.Images[0].Refs, 2) },
	} {
		x, _ := sample(t, 10, 20)
		change(x)
		if b, err := x.Encode(); acproxy.Code(err) != CodeNotBundle {
			t.Errorf("%s: it is encoded, as\n%s\n%v", name, b, err)
		}
	}
	x, _ := sample(t, 10)
	x.Names[0].Templates = slices.Repeat(x.Names[0].Templates, MaxTemplates)
	x.Images[0].Size, x.Images[0].Signature.Size = MaxImage, MaxSignature
	if _, err := x.Encode(); err != nil {
		t.Errorf("at the limits: %v", err)
	}
}

func ref(t testing.TB, s string) acproxy.Ref {
	t.Helper()
	r, err := acproxy.ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSigned(t *testing.T) {
	x, g := sample(t, 10)
	here, there := signer(t, "here + now"), signer(t, "there")
	signed := streamed(t, mustNew(t, x, here), 0, g.open)
	plain := streamed(t, mustNew(t, x, nil), 0, g.open)
	for _, tt := range []struct {
		name   string
		stream []byte
		keys   []string
		want   Signed
		code   string
	}{
		{"nobody signed, nobody asks", plain, nil, Signed{}, ""},
		{"nobody signed, and somebody should", plain, []string{here.Verifier()}, Signed{}, CodeUnknownKey},
		{"signed, nobody asks", signed, nil, Signed{By: nameOf(t, here)}, ""},
		{"signed by the right one", signed, []string{there.Verifier(), here.Verifier()}, Signed{By: nameOf(t, here), Verified: true}, ""},
		{"signed by another", signed, []string{there.Verifier()}, Signed{}, CodeUnknownKey},
	} {
		r, err := NewReader(Plain(bytes.NewReader(tt.stream)), tt.keys)
		if acproxy.Code(err) != tt.code {
			t.Errorf("%s: %v, want code %q", tt.name, err, tt.code)
			continue
		}
		if err == nil && r.Signed != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, r.Signed, tt.want)
		}
	}
	if again, err := LoadSigner(filepath.Join(t.TempDir(), "none", "key"), "x"); err == nil {
		t.Errorf("a key in a directory that isn't there: %v", again)
	}
}

func nameOf(t testing.TB, s *Signer) string {
	t.Helper()
	parts := strings.SplitN(s.Verifier(), "+", 3)
	return parts[0] + "+" + parts[1]
}

func TestVolumes(t *testing.T) {
	x, g := sample(t, 3<<20+5, 1<<20, 100, 2<<20)
	b := mustNew(t, x, nil)
	all := streamed(t, b, 0, g.open)
	write := func(t *testing.T, o Output) (dir string) {
		t.Helper()
		dir = t.TempDir()
		o.Path = filepath.Join(dir, "b.tar")
		if err := o.Write(t.Context(), b, g.open); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	read := func(t *testing.T, dir string) (*Volumes, map[string][]byte, map[string]error) {
		t.Helper()
		v, err := OpenVolumes("b.tar", dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { v.Close() })
		good, bad, err := readAll(v)
		if err != nil {
			t.Fatal(err, v.Problems())
		}
		return v, good, bad
	}
	const members = 1 + 4 + 3
	t.Run("one file", func(t *testing.T) {
		dir := write(t, Output{})
		if is, err := os.ReadFile(filepath.Join(dir, "b.tar")); err != nil || !bytes.Equal(is, all) {
			t.Errorf("the file is another: %v", err)
		}
		if _, good, bad := read(t, dir); len(good) != members || len(bad) > 0 {
			t.Errorf("%d members, %v", len(good), bad)
		}
		wantFiles(t, dir, "b.tar")
	})
	t.Run("together they are the tar", func(t *testing.T) {
		dir := write(t, Output{VolumeSize: 2 << 20, Parity: 2})
		wantFiles(t, dir, "b.tar.001", "b.tar.002", "b.tar.003", "b.tar.004", "b.tar.p01", "b.tar.p02", "b.tar.volumes")
		var together []byte
		for i := range 4 {
			part, err := os.ReadFile(filepath.Join(dir, VolumeFile("b.tar", i)))
			if err != nil {
				t.Fatal(err)
			}
			together = append(together, part...)
		}
		if !bytes.Equal(together, all) {
			t.Error("they are another stream")
		}
		if _, err := exec.LookPath("tar"); err == nil {
			out, err := exec.Command("sh", "-c", "cat "+filepath.Join(dir, "b.tar.0*")+" | tar tf -").CombinedOutput()
			if err != nil || strings.Count(string(out), "\n") != 2+members {
				t.Errorf("tar tf says %v\n%s", err, out)
			}
		}
		if v, good, bad := read(t, dir); len(good) != members || len(bad) > 0 || len(v.Problems()) > 0 {
			t.Errorf("%d members, %v, %v", len(good), bad, v.Problems())
		}
		// A second time there is nothing left to do, and something else is not written over.
		if err := (Output{Path: filepath.Join(dir, "b.tar"), VolumeSize: 2 << 20, Parity: 2}).Write(t.Context(), b, nil); err != nil {
			t.Errorf("the same again: %v", err)
		}
		if err := (Output{Path: filepath.Join(dir, "b.tar"), VolumeSize: 3 << 20, Parity: 2}).Write(t.Context(), b, nil); !errors.Is(err, ErrOther) {
			t.Errorf("others in its place: %v", err)
		}
	})
	for name, harm := range map[string]func(t *testing.T, dir string){
		"two volumes are lost":  func(t *testing.T, dir string) { remove(t, dir, "b.tar.001", "b.tar.003") },
		"the table and one":     func(t *testing.T, dir string) { remove(t, dir, "b.tar.volumes", "b.tar.004") },
		"a volume and a parity": func(t *testing.T, dir string) { remove(t, dir, "b.tar.002", "b.tar.p01") },
		"a volume is cut":       func(t *testing.T, dir string) { truncate(t, dir, "b.tar.002", 1<<20+7) },
		"a volume is empty":     func(t *testing.T, dir string) { truncate(t, dir, "b.tar.001", 0) },
		"volumes are mixed up":  func(t *testing.T, dir string) { swap(t, dir, "b.tar.001", "b.tar.003") },
		"a volume is a link":    func(t *testing.T, dir string) { remove(t, dir, "b.tar.002"); link(t, dir, "/dev/zero", "b.tar.002") },
		"every volume is damaged": func(t *testing.T, dir string) {
			flip(t, dir, "b.tar.001", 5)
			flip(t, dir, "b.tar.002", 2<<20-1)
			flip(t, dir, "b.tar.003", 77)
		},
		"a parity volume and data": func(t *testing.T, dir string) { flip(t, dir, "b.tar.p02", 5); flip(t, dir, "b.tar.003", 5) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := write(t, Output{VolumeSize: 2 << 20, Parity: 2})
			if name == "every volume is damaged" {
				// Three in one row are too many, and these are in two.
				unflip(t, dir, all)
			}
			harm(t, dir)
			v, good, bad := read(t, dir)
			if len(good) != members || len(bad) > 0 {
				t.Errorf("%d members, %v", len(good), bad)
			}
			if len(v.Problems()) == 0 {
				t.Error("and nobody tells")
			}
			for _, p := range v.Problems() {
				if strings.HasPrefix(p.File, "b.tar.0") && !p.Rebuilt {
					t.Errorf("not said to be rebuilt: %v", p)
				}
			}
			repaired, err := v.Repair(dir)
			if err != nil || len(repaired) == 0 {
				t.Fatalf("Repair = %q, %v", repaired, err)
			}
			var together []byte
			for i := range 4 {
				part, err := os.ReadFile(filepath.Join(dir, VolumeFile("b.tar", i)))
				if err != nil {
					t.Fatal(err)
				}
				together = append(together, part...)
			}
			if !bytes.Equal(together, all) {
				t.Error("after the repair they are another stream")
			}
		})
	}
	t.Run("one volume too many is lost", func(t *testing.T) {
		dir := write(t, Output{VolumeSize: 2 << 20, Parity: 1})
		remove(t, dir, "b.tar.002", "b.tar.003")
		v, good, bad := read(t, dir)
		// What lies in the others whole can be had.
		if len(good) == 0 || len(bad) == 0 {
			t.Errorf("%d members, %v", len(good), bad)
		}
		for name, err := range bad {
			if acproxy.Code(err) != CodeIncomplete || !strings.Contains(err.Error(), "b.tar.00") {
				t.Errorf("%s: %v, want what is missing", name, err)
			}
		}
		if _, err := v.Repair(dir); err == nil {
			t.Error("it was repaired all the same")
		}
	})
	t.Run("no table, no parity", func(t *testing.T) {
		dir := write(t, Output{VolumeSize: 2 << 20})
		remove(t, dir, "b.tar.volumes", "b.tar.003")
		if _, good, bad := read(t, dir); len(good) == 0 || len(bad) == 0 || len(good)+len(bad) != members {
			t.Errorf("%d members, %v", len(good), bad)
		}
	})
	t.Run("volumes of another bundle", func(t *testing.T) {
		dir, other := write(t, Output{VolumeSize: 2 << 20, Parity: 1}), t.TempDir()
		y, h := sample(t, 5<<20, 1<<20)
		if err := (Output{Path: filepath.Join(other, "b.tar"), VolumeSize: 2 << 20, Parity: 1}).Write(t.Context(), mustNew(t, y, nil), h.open); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"b.tar.002", "b.tar.p01"} {
			remove(t, dir, name)
			if err := os.Rename(filepath.Join(other, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		v, _, bad := read(t, dir)
		if len(bad) == 0 {
			t.Error("they were taken for its own")
		}
		if text := fmt.Sprint(v.Problems()); !strings.Contains(text, "belongs to another bundle") {
			t.Errorf("problems: %v", text)
		}
	})
	t.Run("nothing there", func(t *testing.T) {
		if _, err := OpenVolumes("b.tar", t.TempDir()); acproxy.Code(err) != CodeNotBundle {
			t.Errorf("%v", err)
		}
	})
	t.Run("limits", func(t *testing.T) {
		for _, o := range []Output{{Parity: 1}, {VolumeSize: b.Size()/MaxVolumes - 1}, {VolumeSize: 1 << 20, Parity: MaxShards - 6}} {
			if err := o.Check(b); acproxy.Code(err) != CodeTooLarge {
				t.Errorf("%+v: %v", o, err)
			}
		}
		for _, o := range []Output{{VolumeSize: b.Size()/MaxVolumes + 1}, {VolumeSize: 1 << 20, Parity: MaxShards - 7}} {
			if err := o.Check(b); err != nil {
				t.Errorf("%+v: %v", o, err)
			}
		}
	})
}

func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, want) {
		t.Errorf("there are %q, want %q", names, want)
	}
}

func remove(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func truncate(t *testing.T, dir, name string, size int64) {
	t.Helper()
	if err := os.Truncate(filepath.Join(dir, name), size); err != nil {
		t.Fatal(err)
	}
}

func swap(t *testing.T, dir, a, b string) {
	t.Helper()
	for _, r := range [][2]string{{a, "x"}, {b, a}, {"x", b}} {
		if err := os.Rename(filepath.Join(dir, r[0]), filepath.Join(dir, r[1])); err != nil {
			t.Fatal(err)
		}
	}
}

func link(t *testing.T, dir, to, name string) {
	t.Helper()
	if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func flip(t *testing.T, dir, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// unflip checks that the volumes are whole before they are harmed.
func unflip(t *testing.T, dir string, all []byte) {
	t.Helper()
	first, err := os.ReadFile(filepath.Join(dir, "b.tar.001"))
	if err != nil || !bytes.HasPrefix(all, first) {
		t.Fatal("not whole to begin with", err)
	}
}

// TestWritingSurvives has each call of the writing fail, fail though done, or be the last before the power is cut, and then writes on what is left.
func TestWritingSurvives(t *testing.T) {
	x, g := sample(t, 30<<10, 10<<10, 100<<10)
	b := mustNew(t, x, nil)
	want := t.TempDir()
	out := func(dir string) Output {
		return Output{Path: filepath.Join(dir, "b.tar"), VolumeSize: 60 << 10, Parity: 1, NoteEvery: 16 << 10}
	}
	if err := out(want).Write(t.Context(), b, g.open); err != nil {
		t.Fatal(err)
	}
	counting := broken(t, t.TempDir())
	o := out(counting.dir)
	o.FS = counting
	if err := o.Write(t.Context(), b, g.open); err != nil {
		t.Fatal(err)
	}
	calls := len(counting.Calls())
	if calls < 50 {
		t.Fatalf("only %d calls", calls)
	}
	for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.FailThoughDone, durabletest.PowerCut} {
		for at := 1; at <= calls; at++ {
			fsys := broken(t, t.TempDir())
			fsys.Break(at, mode, errors.New("broken"))
			o := out(fsys.dir)
			o.FS = fsys
			_ = o.Write(t.Context(), b, g.open) // that it fails is what is wanted; not all calls are waited for
			// Each call sees each of them, with one of the modes.
			survival := []durabletest.Survival{durabletest.Nothing(), durabletest.Everything(), durabletest.Some(uint64(at))}[(at+int(mode))%3]
			left := t.TempDir()
			if err := fsys.Crash(left, survival); err != nil {
				t.Fatal(err)
			}
			again := out(left)
			again.FS = unsynced{}
			if err := again.Write(t.Context(), b, g.open); err != nil {
				t.Fatalf("call %d (%s) %v, %v: going on: %v", at, counting.Calls()[at-1], mode, survival, err)
			}
			same(t, want, left)
		}
	}
}

// unsynced waits for no disk.
type unsynced struct{ durable.OS }

func (unsynced) SyncDir(string) error { return nil }

func (u unsynced) Create(name string, perm fs.FileMode) (durable.File, error) {
	f, err := u.OS.Create(name, perm)
	if err != nil {
		return nil, err
	}
	return unsyncedFile{f}, nil
}

func (u unsynced) OpenFile(name string) (durable.File, error) {
	f, err := u.OS.OpenFile(name)
	if err != nil {
		return nil, err
	}
	return unsyncedFile{f}, nil
}

type unsyncedFile struct{ durable.File }

func (unsyncedFile) Sync() error { return nil }

type brokenFS struct {
	*durabletest.FS
	dir string
}

func broken(t *testing.T, dir string) brokenFS {
	t.Helper()
	f, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	return brokenFS{f, dir}
}

func same(t *testing.T, want, is string) {
	t.Helper()
	entries, err := os.ReadDir(want)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		a, errA := os.ReadFile(filepath.Join(want, e.Name()))
		b, errB := os.ReadFile(filepath.Join(is, e.Name()))
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Fatalf("%s is another file than without the interruption (%v, %v)", e.Name(), errA, errB)
		}
	}
	wantFiles(t, is, names...)
}

// TestGoesOnWhereItWas interrupts a writing in the middle, and looks at what is asked for again.
func TestGoesOnWhereItWas(t *testing.T) {
	x, g := sample(t, 1<<20, 2<<20, 1<<20)
	b := mustNew(t, x, nil)
	o := Output{Path: filepath.Join(t.TempDir(), "b.tar"), NoteEvery: 256 << 10}
	ctx, cancel := context.WithCancel(t.Context())
	o.Progress = func(done, of int64) {
		if done > 3<<20 {
			cancel()
		}
	}
	if err := o.Write(ctx, b, g.open); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted: %v", err)
	}
	var asked []string
	var first int64 = -1
	o.Progress = func(done, of int64) {
		if first < 0 {
			first = done
		}
	}
	err := o.Write(t.Context(), b, func(m Member) (io.ReadCloser, error) {
		asked = append(asked, m.Name())
		return g.open(m)
	})
	if err != nil {
		t.Fatal(err)
	}
	if first < 3<<20-512<<10 || len(asked) > 4 {
		t.Errorf("it went on at byte %d and asked for %q", first, asked)
	}
	is, err := os.ReadFile(o.Path)
	if err != nil || !bytes.Equal(is, streamed(t, b, 0, g.open)) {
		t.Error("it is another stream", err)
	}
	// Another bundle at the same place is not mixed with it.
	y, h := sample(t, 1<<20)
	if err := (Output{Path: o.Path}).Write(t.Context(), mustNew(t, y, nil), h.open); !errors.Is(err, ErrOther) {
		t.Errorf("another bundle in its place: %v", err)
	}
}

// FuzzReader is given an index and what follows its note. The headers and the note are made to fit: nothing else would be looked at.
func FuzzReader(f *testing.F) {
	x, g := sample(f, 700, 300, 20)
	add := func() {
		b := mustNew(f, x, nil)
		f.Add(b.encoded, streamed(f, b, b.base(), g.open))
	}
	add()
	x.Since, x.Images[1].Absent = acproxy.Digest{1}, true
	add()
	f.Fuzz(func(t *testing.T, index, rest []byte) {
		var stream bytes.Buffer
		note := []byte(statement(index, bytes.Count(index, []byte("\n{\"image\""))))
		for _, own := range []struct {
			name string
			b    []byte
		}{{indexName, index}, {noteName, note}} {
			stream.Write(header(own.name, int64(len(own.b))))
			stream.Write(own.b)
			stream.Write(make([]byte, padded(int64(len(own.b)))-int64(len(own.b))))
		}
		stream.Write(rest)
		good, bad, err := readAll(Plain(&stream))
		x, parsed := Parse(index)
		if (err == nil) != (parsed == nil) {
			t.Fatalf("reading: %v, parsing its index: %v", err, parsed)
		}
		if err != nil {
			return
		}
		encoded, err := x.Encode()
		if err != nil || !bytes.Equal(encoded, index) {
			t.Fatalf("the index that was read is written as another: %v", err)
		}
		if len(bad) > 0 {
			return
		}
		// What is whole is what would be written, up to padding.
		g := make(goods)
		for _, b := range good {
			g.put(b)
		}
		if again := streamed(t, mustNew(t, x, nil), 0, g.open); len(again)-len(rest) != 2*blockSize+int(padded(int64(len(index)))+padded(int64(len(note)))) {
			t.Fatalf("%d bytes would be written, and %d were read", len(again), len(rest))
		}
	})
}

func FuzzTable(f *testing.F) {
	x, g := sample(f, 3<<20)
	dir := f.TempDir()
	o := Output{Path: filepath.Join(dir, "b.tar"), VolumeSize: 1 << 20, Parity: 1}
	if err := o.Write(f.Context(), mustNew(f, x, nil), g.open); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(TableFile(o.Path))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := parseTable(b)
		if err != nil {
			return
		}
		encoded, err := table.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseTable(encoded)
		if err != nil || again.Size != table.Size || len(again.Volumes) != len(table.Volumes) {
			t.Fatalf("%v", err)
		}
	})
}

func TestReceipt(t *testing.T) {
	here := signer(t, "here")
	r := &Receipt{Time: time.Unix(1_700_000_000, 0).UTC(), Bundle: acproxy.Digest{1}, Images: []Held{
		{Digest: acproxy.Digest{9}, Signature: acproxy.Digest{8}, Refs: []acproxy.Ref{ref(t, "example.com/b:1"), ref(t, "example.com/a:1")}}, {Digest: acproxy.Digest{3}},
	}}
	for _, s := range []*Signer{nil, here} {
		b, err := r.Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if !IsReceipt(b) {
			t.Error("it isn't recognized")
		}
		got, err := ReadReceipt(bytes.NewReader(b), nil)
		if err != nil || !got.Time.Equal(r.Time) || got.Bundle != r.Bundle || len(got.Images) != 2 || got.Images[0].Digest[0] != 3 || len(got.Images[1].Refs) != 2 {
			t.Errorf("read back: %+v, %v", got, err)
		}
		_, err = ReadReceipt(bytes.NewReader(b), []string{here.Verifier()})
		if wantErr := s == nil; (err != nil) != wantErr {
			t.Errorf("signed by %v: %v", s, err)
		}
		// Every flipped bit and every truncation is noticed.
		for at := range b {
			damaged := bytes.Clone(b)
			damaged[at] ^= 0x04
			if _, err := ReadReceipt(bytes.NewReader(damaged), nil); err == nil && at < bytes.LastIndex(b, []byte(`{"note"`)) {
				t.Fatalf("byte %d (%q) flipped, and nobody notices", at, b[at])
			}
			if _, err := ReadReceipt(bytes.NewReader(b[:at]), nil); err == nil {
				t.Fatalf("cut after %d bytes, and nobody notices", at)
			}
		}
	}
}

func FuzzReceipt(f *testing.F) {
	b, err := (&Receipt{Images: []Held{{Digest: acproxy.Digest{9}}}}).Encode(signer(f, "here"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ReadReceipt(bytes.NewReader(b), nil)
		if err != nil {
			return
		}
		again, err := r.Encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if s, err := ReadReceipt(bytes.NewReader(again), nil); err != nil || len(s.Images) != len(r.Images) {
			t.Fatalf("%+v, %v", s, err)
		}
	})
}
