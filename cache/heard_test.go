package cache_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

func heardOf(name string) cache.Discovered {
	return cache.Discovered{Name: name, When: when, Templates: []cache.Template{{Prefix: "example.com", URL: "https://storage.example.net/{name}-{version}.{ext}"}}}
}

func knownNames(known []cache.Discovered) []string {
	var names []string
	for _, k := range known {
		names = append(names, k.Name)
	}
	slices.Sort(names)
	return names
}

// TestNamesOfStrangersTakeNoSpace has more names looked up than can be remembered, none of which an image is held of.
func TestNamesOfStrangersTakeNoSpace(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, Grace: -1})
	w.commit(image("app", 4*mib))
	before := w.usage()
	const names = 20_000
	name := func(i int) string { return fmt.Sprintf("example.com/stranger%d", i) }
	for i := range names {
		if err := w.Learn(heardOf(name(i))); err != nil {
			t.Fatal(err)
		}
	}
	if gone := w.gone(); gone != "" {
		t.Errorf("%s went for it", gone)
	}
	if u := w.usage(); u.Names != before.Names || u.Total() != before.Total() {
		t.Errorf("it takes %d bytes, for names %d, and before %d and %d", u.Total(), u.Names, before.Total(), before.Names)
	}
	if _, ok := w.Known(name(names - 1)); !ok {
		t.Error("the last one is not known")
	}
	if _, ok := w.Known(name(0)); ok {
		t.Error("the first one is still known")
	}
	if n := len(w.KnownUnderHost("example.com")); n < 1000 || n >= names {
		t.Errorf("%d names are known under their host", n)
	}
	w.counted("after all")
}

// TestNamesAreWrittenDownWithTheirImages goes through the ways in which a name gets an image, and loses it.
func TestNamesAreWrittenDownWithTheirImages(t *testing.T) {
	const name = "example.com/app"
	one, two := cachetest.NewImage(name, "1", 100), cachetest.NewImage(name, "2", 100)
	commit := func(img cachetest.Image) func(*cache.Disk) error {
		return func(d *cache.Disk) error { return cachetest.Commit(t.Context(), d, img) }
	}
	remove := func(img cachetest.Image) func(*cache.Disk) error {
		return func(d *cache.Disk) error { return d.Delete(t.Context(), img.Record.Digest) }
	}
	learn := func(d *cache.Disk) error { return d.Learn(heardOf(name)) }
	for _, tt := range []struct {
		name    string
		do      []func(*cache.Disk) error
		written bool
	}{
		{"no image", []func(*cache.Disk) error{learn}, false},
		{"learned, then the image", []func(*cache.Disk) error{learn, commit(one)}, true},
		{"the image, then learned", []func(*cache.Disk) error{commit(one), learn}, true},
		{"one of two images is deleted", []func(*cache.Disk) error{commit(one), learn, commit(two), remove(one)}, true},
		{"the last image is deleted", []func(*cache.Disk) error{commit(one), learn, commit(two), remove(one), remove(two)}, false},
		{"deleted and there again", []func(*cache.Disk) error{commit(one), learn, remove(one), commit(two)}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir, cache.Options{})
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, do := range tt.do {
				if err := do(d); err != nil {
					t.Fatal(err)
				}
			}
			knows := func(d *cache.Disk, want bool) {
				t.Helper()
				if k, ok := d.Known(name); ok != want || ok && (k.Name != name || !k.When.Equal(when) || len(k.Templates) != 1) {
					t.Errorf("Known = %+v, %v, want %v", k, ok, want)
				}
				for _, host := range []string{"example.com", "Storage.example.net"} {
					if got := strings.Join(knownNames(d.KnownUnderHost(host)), " "); (got == name) != want {
						t.Errorf("under %s %q is known", host, got)
					}
				}
			}
			knows(d, true)
			closeStore(t, d)
			if files := names(t, dir, "names"); len(files) != map[bool]int{true: 1}[tt.written] {
				t.Errorf("files: %q", files)
			}
			d = open(t, dir, cache.Options{})
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			knows(d, tt.written)
			closeStore(t, d)
			_, f, _ := check(t, dir, false)
			for _, f := range f.all {
				t.Errorf("fsck finds %s in %s: %s", f.Code, f.Path, f.Detail)
			}
		})
	}
}
