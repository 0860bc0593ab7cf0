package cache_test

import (
	"log/slog"
	"testing"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testLog shows what a store says when a test fails.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func open(t testing.TB, dir string, opts cache.Options) *cache.Disk {
	t.Helper()
	if opts.Log == nil {
		opts.Log = testLog(t)
	}
	d, err := cache.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return d
}

func TestConformance(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cache.Store { return open(t, t.TempDir(), cache.Options{}) })
}
