package aci_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rule returns the rule that err names, "" for no error, and err's text for any other.
func rule(err error) string {
	var v *aci.Violation
	switch {
	case err == nil:
		return ""
	case errors.As(err, &v):
		return v.Rule
	}
	return err.Error()
}

func TestInspectRules(t *testing.T) {
	type spec = acitest.Spec
	entry := func(entries ...acitest.Entry) []acitest.Entry { return entries }
	manifest := string(spec{}.ManifestJSON())
	tests := []struct {
		name string
		spec spec
		want string
	}{
		{"a small image", spec{}, ""},
		{"files below rootfs", spec{Files: map[string]string{"a": "1", "b/c": "2"}}, ""},
		{"the manifest comes last", spec{ManifestLast: true, Files: map[string]string{"a": "1"}}, ""},
		{"zeros after the end", spec{Padding: 9*1024 + 100}, ""},
		{"names that begin with a dot", spec{NoManifest: true, NoRootfs: true, Extra: entry(acitest.Dir("./"), acitest.File("./manifest", manifest), acitest.Dir("./rootfs/"), acitest.File("./rootfs/a", ""))}, ""},
		{"devices and links", spec{Files: map[string]string{"a": ""}, Extra: entry(acitest.Device("rootfs/null"), acitest.Link("rootfs/b", "rootfs/a"), acitest.Link("rootfs/c", "./rootfs/a"), acitest.Symlink("rootfs/d", "../../../etc/passwd"))}, ""},
		{"a name with dots that are no parent", spec{Files: map[string]string{"..a": "", "b...": ""}}, ""},

		{"no manifest", spec{NoManifest: true}, aci.RuleNoManifest},
		{"an empty tar", spec{NoManifest: true, NoRootfs: true, Compression: acitest.Gzip}, aci.RuleNoManifest},
		{"two manifests", spec{Extra: entry(acitest.File("manifest", manifest))}, aci.RuleSecondManifest},
		{"two manifests, one spelled otherwise", spec{Extra: entry(acitest.File("./manifest", manifest))}, aci.RuleSecondManifest},
		{"the manifest is a symbolic link", spec{NoManifest: true, Extra: entry(acitest.Symlink("manifest", "rootfs/m"))}, aci.RuleManifestFile},
		{"the manifest is a directory", spec{NoManifest: true, Extra: entry(acitest.Dir("manifest"))}, aci.RuleManifestFile},
		{"the manifest is a hard link", spec{NoManifest: true, Extra: entry(acitest.Link("manifest", "rootfs/m"))}, aci.RuleManifestFile},
		{"the manifest isn't JSON", spec{Manifest: []byte("hello")}, aci.RuleBadManifest},
		{"no rootfs", spec{NoRootfs: true}, aci.RuleNoRootfs},
		{"no entry for rootfs itself", spec{NoRootfs: true, Files: map[string]string{"a": ""}}, aci.RuleNoRootfs},
		{"rootfs is a file", spec{NoRootfs: true, Extra: entry(acitest.File("rootfs", ""))}, aci.RuleRootfsDirectory},
		{"rootfs is a symbolic link", spec{NoRootfs: true, Extra: entry(acitest.Symlink("rootfs", "/"))}, aci.RuleRootfsDirectory},
		{"a third name at the top", spec{Extra: entry(acitest.File("readme", ""))}, aci.RuleOutsideRootfs},
		{"a neighbour of rootfs", spec{Extra: entry(acitest.File("rootfs2/a", ""))}, aci.RuleOutsideRootfs},
		{"something below the manifest", spec{Extra: entry(acitest.File("manifest/a", ""))}, aci.RuleOutsideRootfs},
		{"the top itself is a file", spec{Extra: entry(acitest.Symlink(".", "/"))}, aci.RuleOutsideRootfs},
		{"the same name twice", spec{Files: map[string]string{"a": ""}, Extra: entry(acitest.File("rootfs/a", ""))}, aci.RuleDuplicateEntry},
		{"the same name twice, spelled otherwise", spec{Files: map[string]string{"a": ""}, Extra: entry(acitest.Dir("rootfs//./a/"))}, aci.RuleDuplicateEntry},
		{"rootfs twice", spec{Extra: entry(acitest.Dir("rootfs/"))}, aci.RuleDuplicateEntry},
		{"an absolute path", spec{Extra: entry(acitest.File("/rootfs/a", ""))}, aci.RuleAbsolutePath},
		{"an absolute manifest", spec{NoManifest: true, Extra: entry(acitest.File("/manifest", manifest))}, aci.RuleAbsolutePath},
		{"a path that goes up", spec{Extra: entry(acitest.File("rootfs/../../etc/passwd", ""))}, aci.RuleDotDot},
		{"a path that goes up and comes back", spec{Extra: entry(acitest.File("rootfs/a/../b", ""))}, aci.RuleDotDot},
		{"a hard link out of rootfs", spec{Extra: entry(acitest.Link("rootfs/a", "etc/passwd"))}, aci.RuleOutsideRootfs},
		{"a hard link to the manifest", spec{Extra: entry(acitest.Link("rootfs/a", "manifest"))}, aci.RuleOutsideRootfs},
		{"a hard link to an absolute path", spec{Extra: entry(acitest.Link("rootfs/a", "/etc/passwd"))}, aci.RuleAbsolutePath},
		{"a hard link that goes up", spec{Extra: entry(acitest.Link("rootfs/a", "rootfs/../manifest"))}, aci.RuleDotDot},
		{"a global header", spec{Extra: entry(acitest.Entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"path": "rootfs/x"}}})}, aci.RuleUnsupported},
		{"no end of the archive", spec{NoEnd: true}, aci.RuleTruncated},
		{"half an end of the archive", spec{NoEnd: true, Padding: 512}, aci.RuleTruncated},
		{"bytes after the end of the tar", spec{Tail: []byte("x")}, aci.RuleTrailingBytes},
		{"bytes far after the end of the tar", spec{Padding: 20000, Tail: []byte{0, 0, 1}}, aci.RuleTrailingBytes},
		{"a second tar after the first", spec{Tail: acitest.Must(t, spec{Compression: acitest.None})}, aci.RuleTrailingBytes},
	}
	for _, tt := range tests {
		for _, compression := range []string{acitest.None, acitest.Gzip, acitest.XZ} {
			if tt.spec.Compression != "" && tt.spec.Compression != compression {
				continue
			}
			t.Run(tt.name+", "+compression, func(t *testing.T) {
				tt.spec.Compression = compression
				image := acitest.Must(t, tt.spec)
				got, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil)
				if rule(err) != tt.want {
					t.Fatalf("Inspect = %v, want rule %q", err, tt.want)
				}
				if err != nil {
					if !errors.Is(err, acproxy.ErrPublisher) || got.Size != 0 {
						t.Errorf("Inspect = %+v and %v, want nothing and an error matching ErrPublisher", got, err)
					}
					return
				}
				if id, err := acitest.ID(image); err != nil || got.ID != id {
					t.Errorf("ID = %v, want %v (%v)", got.ID, id, err)
				}
				if string(got.Compression) != compression || got.Manifest.Name != "example.com/app" {
					t.Errorf("Inspect = %+v, want compression %q and example.com/app", got, compression)
				}
			})
		}
	}
}

func TestInspectSays(t *testing.T) {
	dep := acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "2"}, ImageID: acproxy.ImageID{1, 2, 3}, Size: 77}
	s := acitest.Spec{
		Name: "example.com/web", Labels: map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"},
		Dependencies: []acitest.Dependency{dep, {Name: "example.com/noarch"}}, RootfsSize: 1 << 20, Padding: 777,
	}
	for _, compression := range []string{acitest.None, acitest.Gzip, acitest.XZ} {
		for _, members := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s of %d streams", compression, members), func(t *testing.T) {
				s.Compression, s.Members = compression, members
				if compression == acitest.XZ {
					s.RootfsSize = 400 << 10 // enough for the hash to run beside, and slow already
				}
				var b bytes.Buffer
				id, err := acitest.Write(&b, s)
				if err != nil {
					t.Fatal(err)
				}
				var early aci.Manifest
				calls := 0
				got, err := aci.Inspect(&b, aci.Limits{}, func(m aci.Manifest) error { early = m; calls++; return nil })
				if err != nil {
					t.Fatal(err)
				}
				if got.ID != id || got.Entries != 3 || got.Size < s.RootfsSize+777 || calls != 1 || early.Name != got.Manifest.Name {
					t.Errorf("Inspect = %+v after %d calls with %q, want ID %v, 3 entries, and one call", got, calls, early.Name, id)
				}
				m := got.Manifest
				if !bytes.Equal(m.Raw, s.ManifestJSON()) || m.Name != s.Name || !maps.Equal(m.Labels, s.Labels) || len(m.Dependencies) != 2 {
					t.Fatalf("manifest = %+v, want what %+v says", m, s)
				}
				if d := m.Dependencies[0]; d.Name != dep.Name || d.ImageID != dep.ImageID || d.Size != dep.Size || !maps.Equal(d.Labels, dep.Labels) {
					t.Errorf("dependency = %+v, want %+v", d, dep)
				}
				if d := m.Dependencies[1]; !d.ImageID.IsZero() || d.Size != 0 || d.Labels == nil {
					t.Errorf("dependency = %+v, want neither ID nor size", d)
				}
			})
		}
	}
}

func TestInspectBzip2(t *testing.T) {
	image, s := acitest.Bzip2()
	s.Compression = acitest.None
	want, err := acitest.ID(acitest.Must(t, s))
	if err != nil {
		t.Fatal(err)
	}
	got, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil)
	if err != nil || got.ID != want || got.Compression != aci.Bzip2 || got.Manifest.Name != s.Name {
		t.Errorf("Inspect = %+v, %v; want %s with ID %v", got, err, s.Name, want)
	}
}

func TestInspectEndsWithTheErrorOfOnManifest(t *testing.T) {
	refused := errors.New("another name was asked for")
	image := acitest.Must(t, acitest.Spec{RootfsSize: 8 << 20, Compression: acitest.None})
	r := &countingReader{r: bytes.NewReader(image)}
	_, err := aci.Inspect(r, aci.Limits{}, func(aci.Manifest) error { return refused })
	if err != refused {
		t.Errorf("Inspect = %v, want the very error of onManifest", err)
	}
	if r.n > 1<<20 {
		t.Errorf("%d bytes were read, want the inspection to end at the manifest", r.n)
	}
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// images returns one small image of each compression, by its name.
func images(t testing.TB) map[string][]byte {
	bz, _ := acitest.Bzip2()
	files := map[string]string{"etc/motd": "hello"}
	return map[string][]byte{
		"none":               acitest.Must(t, acitest.Spec{Compression: acitest.None, Files: files}),
		"gzip":               acitest.Must(t, acitest.Spec{Files: files}),
		"gzip of 3 members":  acitest.Must(t, acitest.Spec{Files: files, Members: 3}),
		"xz":                 acitest.Must(t, acitest.Spec{Compression: acitest.XZ, Files: files}),
		"xz of 3 streams":    acitest.Must(t, acitest.Spec{Compression: acitest.XZ, Files: files, Members: 3}),
		"bzip2":              bz,
		"bzip2 of 2 streams": bzip2OfTwoStreams,
	}
}

func TestTruncatedAnywhereIsNeverAccepted(t *testing.T) {
	for name, image := range images(t) {
		t.Run(name, func(t *testing.T) {
			if _, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil); err != nil {
				t.Fatalf("Inspect of the whole image = %v", err)
			}
			for n := range image {
				_, err := aci.Inspect(bytes.NewReader(image[:n]), aci.Limits{}, nil)
				// The first bytes alone don't say what an image is.
				if got := rule(err); got != aci.RuleTruncated && (n >= 263 || got != aci.RuleNotAnImage) {
					t.Errorf("Inspect of the first %d of %d bytes = %v, want truncated", n, len(image), err)
				}
			}
		})
	}
}

func TestTrailingBytesAreNeverAccepted(t *testing.T) {
	for name, image := range images(t) {
		for _, tail := range []string{"x", "\x00", "PK\x03\x04 something", strings.Repeat("\x00", 512) + "x"} {
			if name == "none" && tail == "\x00" {
				continue // that is padding
			}
			t.Run(fmt.Sprintf("%s and %d bytes", name, len(tail)), func(t *testing.T) {
				_, err := aci.Inspect(io.MultiReader(bytes.NewReader(image), strings.NewReader(tail)), aci.Limits{}, nil)
				// compress/bzip2 takes a single byte for half of what would come next.
				if got := rule(err); got != aci.RuleTrailingBytes && (len(tail) > 1 || got != aci.RuleTruncated) {
					t.Errorf("Inspect = %v, want %s", err, aci.RuleTrailingBytes)
				}
			})
		}
	}
}

func TestABitFlippedAnywhere(t *testing.T) {
	for name, image := range images(t) {
		if name == "none" {
			continue // has no checksum over its content: that is what the signature is for
		}
		t.Run(name, func(t *testing.T) {
			whole, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := range image {
				flipped := bytes.Clone(image)
				flipped[i] ^= 0x10
				got, err := aci.Inspect(bytes.NewReader(flipped), aci.Limits{}, nil)
				// Some bits mean nothing: gzip's time stamp, for one.
				if err == nil && got.ID != whole.ID {
					t.Errorf("bit flipped in byte %d: accepted with another image ID", i)
				}
				if err != nil && !errors.Is(err, acproxy.ErrPublisher) {
					t.Errorf("bit flipped in byte %d: %v, want a violation", i, err)
				}
			}
		})
	}
}

func TestErrorsOfTheSourceAreNotViolations(t *testing.T) {
	gone := fmt.Errorf("the flight was cut: %w", io.ErrUnexpectedEOF)
	for name, image := range images(t) {
		t.Run(name, func(t *testing.T) {
			for n := range len(image) + 1 {
				r := io.MultiReader(bytes.NewReader(image[:n]), iotest.ErrReader(gone))
				_, err := aci.Inspect(r, aci.Limits{}, nil)
				var v *aci.Violation
				if !errors.Is(err, gone) || errors.As(err, &v) || errors.Is(err, acproxy.ErrPublisher) {
					t.Fatalf("a source that fails after %d bytes: Inspect = %v, want the source's error", n, err)
				}
			}
		})
	}
}

func TestASourceThatEndsUnexpectedlyIsTruncated(t *testing.T) {
	for name, image := range images(t) {
		r := io.MultiReader(bytes.NewReader(image[:len(image)-1]), iotest.ErrReader(io.ErrUnexpectedEOF))
		if _, err := aci.Inspect(r, aci.Limits{}, nil); rule(err) != aci.RuleTruncated {
			t.Errorf("%s: Inspect = %v, want truncated", name, err)
		}
	}
}

func TestSourcesThatReadOddly(t *testing.T) {
	for name, image := range images(t) {
		want, err := acitest.ID(image)
		if err != nil {
			t.Fatal(err)
		}
		for how, wrap := range map[string]func(io.Reader) io.Reader{
			"a byte at a time": iotest.OneByteReader, "half": iotest.HalfReader, "the end with the last bytes": iotest.DataErrReader,
		} {
			if got, err := aci.Inspect(wrap(bytes.NewReader(image)), aci.Limits{}, nil); err != nil || got.ID != want {
				t.Errorf("%s, %s: Inspect = %v, %v; want %v", name, how, got.ID, err, want)
			}
		}
	}
}

func TestLimitsAtTheirEdge(t *testing.T) {
	image := acitest.Must(t, acitest.Spec{Files: map[string]string{"a": "1", "b": "2"}, Padding: 5000})
	whole, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	manifest := int64(len(whole.Manifest.Raw))
	ratio := float64(whole.Size) / float64(len(image))
	tests := []struct {
		name string
		lim  aci.Limits
		want string
	}{
		{"as many entries as allowed", aci.Limits{MaxEntries: whole.Entries}, ""},
		{"one entry too many", aci.Limits{MaxEntries: whole.Entries - 1}, aci.RuleTooManyEntries},
		{"a manifest as long as allowed", aci.Limits{MaxManifest: manifest}, ""},
		{"a manifest one byte too long", aci.Limits{MaxManifest: manifest - 1}, aci.RuleManifestTooLarge},
		{"as large as allowed", aci.Limits{MaxUncompressed: whole.Size}, ""},
		{"one byte too large", aci.Limits{MaxUncompressed: whole.Size - 1}, aci.RuleTooLarge},
		{"as well compressed as allowed", aci.Limits{MaxRatio: ratio, RatioFrom: whole.Size - 1}, ""},
		{"too well compressed", aci.Limits{MaxRatio: ratio * 0.9, RatioFrom: whole.Size - 1}, aci.RuleBombRatio},
		{"too well compressed, but small", aci.Limits{MaxRatio: 1, RatioFrom: whole.Size}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := aci.Inspect(bytes.NewReader(image), tt.lim, nil); rule(err) != tt.want {
				t.Errorf("Inspect = %v, want rule %q", err, tt.want)
			}
		})
	}
}

func TestAManifestLongerThanItsLimitIsNotRead(t *testing.T) {
	s := acitest.Spec{Manifest: bytes.Repeat([]byte(" "), 1<<20+1)}
	if _, err := aci.Inspect(bytes.NewReader(acitest.Must(t, s)), aci.Limits{}, nil); rule(err) != aci.RuleManifestTooLarge {
		t.Errorf("Inspect = %v, want %s", err, aci.RuleManifestTooLarge)
	}
}

// A sparse file may claim to be 8 EiB of holes: that must cost no more than its header.
func TestASparseFileCostsWhatItHolds(t *testing.T) {
	header := tar.Header{Typeflag: tar.TypeReg, Name: "rootfs/sparse", Mode: 0o644, Format: tar.FormatPAX}
	image := acitest.Must(t, acitest.Spec{Compression: acitest.None, Extra: []acitest.Entry{{Header: header}}, NoEnd: true})
	// archive/tar writes no sparse files: the last header becomes a GNU one by hand.
	block := image[len(image)-512:]
	block[156] = tar.TypeGNUSparse
	copy(block[257:], "ustar  \x00")
	copy(block[386:], "00000000000\x00"+"00000000000\x00") // one piece, empty
	copy(block[483:], "\x80\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00")
	copy(block[148:], "        ")
	sum := 0
	for _, c := range block {
		sum += int(c)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
	image = append(image, make([]byte, 1024)...)
	if _, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil); err != nil {
		t.Errorf("Inspect = %v, want the holes to be skipped", err)
	}
}

func TestViolationSaysWhere(t *testing.T) {
	long := strings.Repeat("a/", 400)
	_, err := aci.Inspect(bytes.NewReader(acitest.Must(t, acitest.Spec{Extra: []acitest.Entry{acitest.File(long+"\nb", "")}})), aci.Limits{}, nil)
	var v *aci.Violation
	if !errors.As(err, &v) || v.Code() != aci.RuleOutsideRootfs || !strings.HasPrefix(v.Entry, "a/a/") || len(v.Entry) > 200 {
		t.Fatalf("Inspect = %#v, want a violation at a clipped name", err)
	}
	if !strings.Contains(err.Error(), v.Entry) || !strings.Contains(err.Error(), v.Rule) {
		t.Errorf("Error = %q, want the rule and the entry in it", err)
	}
}

func FuzzInspect(f *testing.F) {
	for _, image := range images(f) {
		f.Add(image)
	}
	f.Add(acitest.Must(f, acitest.Spec{Compression: acitest.None, Extra: []acitest.Entry{acitest.Link("rootfs/a", "manifest"), acitest.File("../a", "")}}))
	lim := aci.Limits{MaxUncompressed: 1 << 20, MaxEntries: 1000, MaxDictionary: 1 << 20}
	f.Fuzz(func(t *testing.T, image []byte) {
		got, err := aci.Inspect(bytes.NewReader(image), lim, nil)
		if err != nil {
			if !errors.Is(err, acproxy.ErrPublisher) {
				t.Fatalf("Inspect = %v, want a violation: the source never fails", err)
			}
			return
		}
		// What was accepted, appc's own reader reads in the same way.
		if id, err := acitest.ID(image); err != nil || id != got.ID {
			t.Errorf("ID = %v, want %v (%v)", got.ID, id, err)
		}
		if m, err := acitest.Manifest(bytes.NewReader(image)); err != nil || m.Name.String() != got.Manifest.Name {
			t.Errorf("manifest = %+v, want %+v (%v)", got.Manifest, m, err)
		}
	})
}

func BenchmarkInspect(b *testing.B) {
	files := map[string]string{"etc/motd": strings.Repeat("the quick brown fox jumps over the lazy dog\n", 1<<16)}
	for _, bm := range []struct {
		name string
		spec acitest.Spec
	}{
		{"small gzip", acitest.Spec{}},
		{"16 MiB of noise, gzip", acitest.Spec{RootfsSize: 16 << 20}},
		{"16 MiB of noise, none", acitest.Spec{RootfsSize: 16 << 20, Compression: acitest.None}},
		{"3 MiB of text, gzip", acitest.Spec{Files: files}},
		{"3 MiB of text, xz", acitest.Spec{Files: files, Compression: acitest.XZ}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			image := acitest.Must(b, bm.spec)
			b.SetBytes(int64(len(image)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := aci.Inspect(bytes.NewReader(image), aci.Limits{}, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
