package cache_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

// benchImages is how many images the stores of benchmarks hold: ACPROXY_BENCH_IMAGES, or a number that is made quickly and is more than are
// remembered in the form in which they are asked for.
func benchImages(b *testing.B) int {
	b.Helper()
	s := os.Getenv("ACPROXY_BENCH_IMAGES")
	if s == "" {
		return 20_000
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		b.Fatalf("ACPROXY_BENCH_IMAGES=%s is no number of images", s)
	}
	return n
}

// benchStore returns a store with benchImages images. ACPROXY_BENCH_DIR keeps it from one run to the next.
func benchStore(b *testing.B) (d *cache.Disk, n int) {
	b.Helper()
	n = benchImages(b)
	dir := os.Getenv("ACPROXY_BENCH_DIR")
	if dir == "" {
		dir = b.TempDir()
	}
	dir = filepath.Join(dir, fmt.Sprintf("%d", n))
	if _, err := os.Stat(filepath.Join(dir, "VERSION")); err != nil {
		if err := cachetest.Lay(dir, n, 10<<20); err != nil {
			b.Fatal(err)
		}
	}
	d = open(b, dir, cache.Options{Log: slog.New(slog.DiscardHandler)})
	if err := d.Ready(b.Context()); err != nil {
		b.Fatal(err)
	}
	return d, n
}

// someRefs returns refs of a store, chosen at random.
func someRefs(n int) []acproxy.Ref {
	random := rand.New(rand.NewPCG(1, 2))
	refs := make([]acproxy.Ref, 100_000)
	for i := range refs {
		refs[i] = cachetest.SparseRef(random.IntN(n))
	}
	return refs
}

// BenchmarkResolve looks up refs at random, of all and of few, on one processor and on all.
func BenchmarkResolve(b *testing.B) {
	d, n := benchStore(b)
	for _, bb := range []struct {
		name string
		of   int
	}{{"any", n}, {"one of 100", 100}} {
		refs := someRefs(bb.of)
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, _, err := d.Resolve(b.Context(), refs[i%len(refs)]); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(bb.name+", parallel", func(b *testing.B) {
			b.ReportAllocs()
			var at atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				for i := int(at.Add(7919)); pb.Next(); i++ {
					if _, _, err := d.Resolve(b.Context(), refs[i%len(refs)]); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
	b.Run("not held", func(b *testing.B) {
		b.ReportAllocs()
		ref := cachetest.MustRef("example.com/never:1")
		for b.Loop() {
			if _, _, err := d.Resolve(b.Context(), ref); err == nil {
				b.Fatal("it is held")
			}
		}
	})
}

// someDigests returns the digests of images of a store, chosen at random.
func someDigests(n int) []acproxy.Digest {
	random := rand.New(rand.NewPCG(3, 4))
	digests := make([]acproxy.Digest, 10_000)
	for i := range digests {
		digests[i] = cachetest.SparseImage(random.IntN(n), 0).Record.Digest
	}
	return digests
}

// BenchmarkByDigest asks for what is known of images chosen at random, and touches them.
func BenchmarkByDigest(b *testing.B) {
	d, n := benchStore(b)
	digests := someDigests(n)
	for _, bb := range []struct {
		name string
		ask  func(acproxy.Digest) error
	}{
		{"Record", func(digest acproxy.Digest) error { _, err := d.Record(digest); return err }},
		{"Signature", func(digest acproxy.Digest) error { _, err := d.Signature(digest); return err }},
		{"Manifest", func(digest acproxy.Digest) error { _, err := d.Manifest(digest); return err }},
		{"OpenBlob", func(digest acproxy.Digest) error {
			f, err := d.OpenBlob(digest)
			if err != nil {
				return err
			}
			return f.Close()
		}},
		{"Touch", func(digest acproxy.Digest) error { d.Touch(digest); return nil }},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := bb.ask(digests[i%len(digests)]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkImages lists pages of a hundred images.
func BenchmarkImages(b *testing.B) {
	d, _ := benchStore(b)
	b.ReportAllocs()
	after := ""
	for b.Loop() {
		records, next, err := d.Images(cache.Filter{}, after, 100)
		if err != nil || len(records) == 0 {
			b.Fatal(err)
		}
		after = next
	}
}

// BenchmarkCommit commits small images, many at once as they share a sync.
func BenchmarkCommit(b *testing.B) {
	d := open(b, b.TempDir(), cache.Options{})
	b.ReportAllocs()
	b.SetParallelism(32)
	var at atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			img := cachetest.NewImage("example.com/app", fmt.Sprint(at.Add(1)), 1000)
			if err := cachetest.Commit(b.Context(), d, img); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkUpdate changes records of images chosen at random, one after the other.
func BenchmarkUpdate(b *testing.B) {
	d, n := benchStore(b)
	digests := someDigests(n)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		err := d.Update(b.Context(), digests[i%len(digests)], func(r *cache.Record) error {
			r.Pinned = !r.Pinned
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}
