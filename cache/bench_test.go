package cache_test

import (
	"fmt"
	"testing"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

func BenchmarkResolve(b *testing.B) {
	d := open(b, b.TempDir(), cache.Options{FS: cachetest.SparseFS{}})
	if err := cachetest.Fill(b.Context(), d, 2000, 1<<20); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{1, 2000} {
		b.Run(fmt.Sprintf("%d refs", n), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, _, err := d.Resolve(b.Context(), cachetest.SparseRef(i%n)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSignature(b *testing.B) {
	d := open(b, b.TempDir(), cache.Options{})
	img := cachetest.NewImage("example.com/app", "1", 10)
	if err := cachetest.Commit(b.Context(), d, img); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Signature(img.Record.Digest); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenBlob(b *testing.B) {
	d := open(b, b.TempDir(), cache.Options{})
	img := cachetest.NewImage("example.com/app", "1", 10)
	if err := cachetest.Commit(b.Context(), d, img); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		f, err := d.OpenBlob(img.Record.Digest)
		if err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCommit(b *testing.B) {
	d := open(b, b.TempDir(), cache.Options{})
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			img := cachetest.NewImage("example.com/app", fmt.Sprintf("%p-%d", pb, i), 1000)
			if err := cachetest.Commit(b.Context(), d, img); err != nil {
				b.Error(err)
			}
		}
	})
}
