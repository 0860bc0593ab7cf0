package cache_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"context"

	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy/cache"
)

// TestReadOnlyStoresOfEverySchema serves what each version of the index has left on a file system that can't be written: all but the first as it is. Of that one
// nobody waits for what can't be.
func TestReadOnlyStoresOfEverySchema(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount")
	}
	for schema := 1; schema <= cache.Schema; schema++ {
		t.Run(fmt.Sprintf("schema %d", schema), func(t *testing.T) {
			dir := t.TempDir()
			unpack(t, filepath.Join("testdata", fmt.Sprintf("schema%d.tar.gz", schema)), dir)
			var want archived
			if err := json.Unmarshal(read(t, filepath.Join(dir, "want.json")), &want); err != nil {
				t.Fatal(err)
			}
			store := filepath.Join(dir, "store")
			write(t, filepath.Join(store, "lock"), nil)
			for _, sub := range []string{"blobs", "names", "partial", "quarantine"} {
				if err := os.MkdirAll(filepath.Join(store, sub), 0o750); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Mount(store, store, "", unix.MS_BIND, ""); err != nil {
				t.Skipf("mounting: %v", err)
			}
			defer func() {
				if err := unix.Unmount(store, 0); err != nil {
					t.Error(err)
				}
			}()
			if err := unix.Mount("", store, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			d, err := cache.Open(store, cache.Options{Log: testLog(t)})
			if err != nil {
				if schema == 1 {
					return
				}
				t.Fatal(err)
			}
			defer closeStore(t, d)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			for _, w := range want.Images {
				for _, r := range w.Refs {
					_, rec, err := d.Resolve(ctx, r.Ref)
					switch {
					case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded):
						t.Fatalf("Resolve(%v) waits: %v", r.Ref, err)
					case schema == 1 && err == nil:
					case schema > 1 && (err != nil || rec.Digest != w.Record.Digest):
						t.Errorf("Resolve(%v) = %v, %v", r.Ref, rec.Digest, err)
					}
				}
			}
		})
	}
}
