//go:build unix

package cache_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
)

var update = flag.Bool("update", false, "keep what the present schema writes in testdata")

// archived is what want.json says of an archived store.
type archived struct {
	Images []struct {
		Record    cache.Record
		Manifest  []byte
		Signature []byte
		Refs      []cache.Resolution
	}
	Known    []cache.Discovered
	Refusals []cache.Refused
}

// unpack unpacks an archive into an empty directory.
func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(read(t, archive)))
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(path, 0o750); err != nil {
				t.Fatal(err)
			}
			continue
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		write(t, path, content)
	}
}

// checkArchived fails the test if a store doesn't answer as it did when it was archived. Before the index is complete it knows all of it but
// for what no sidecar has.
func checkArchived(t *testing.T, d *cache.Disk, want archived, complete bool) {
	t.Helper()
	for _, w := range want.Images {
		for _, r := range w.Refs {
			got, rec, err := d.Resolve(t.Context(), r.Ref)
			rec.Used = w.Record.Used
			if err != nil || !reflect.DeepEqual(got, r) || !reflect.DeepEqual(rec, w.Record) {
				t.Errorf("Resolve(%v) = %+v,\n%+v, %v, want %+v,\n%+v", r.Ref, got, rec, err, r, w.Record)
			}
		}
		rec, err := d.Record(w.Record.Digest)
		if !complete {
			rec.Used = w.Record.Used
		}
		if err != nil || !reflect.DeepEqual(rec, w.Record) {
			t.Errorf("Record(%v) =\n%+v, %v, want\n%+v", w.Record.Digest, rec, err, w.Record)
		}
		if manifest, err := d.Manifest(w.Record.Digest); err != nil || !bytes.Equal(manifest, w.Manifest) {
			t.Errorf("Manifest(%v) = %q, %v, want %q", w.Record.Digest, manifest, err, w.Manifest)
		}
		if signature, err := d.Signature(w.Record.Digest); !bytes.Equal(signature, w.Signature) || (err == nil) != w.Record.Signed {
			t.Errorf("Signature(%v) = %q, %v, want %q", w.Record.Digest, signature, err, w.Signature)
		}
	}
	for _, want := range want.Known {
		if got, ok := d.Known(want.Name); !ok || !reflect.DeepEqual(got, want) {
			t.Errorf("Known(%s) = %+v, %v, want %+v", want.Name, got, ok, want)
		}
	}
	if !complete {
		return
	}
	if got, err := d.Refusals(); err != nil || !reflect.DeepEqual(got, want.Refusals) {
		t.Errorf("Refusals = %+v, %v, want %+v", got, err, want.Refusals)
	}
	if got, _, err := d.Images(cache.Filter{}, "", 0); err != nil || len(got) != len(want.Images) {
		t.Errorf("Images = %d records, %v, want %d", len(got), err, len(want.Images))
	}
	if u, err := d.Usage(); err != nil || u.Images != int64(len(want.Images)) {
		t.Errorf("Usage = %+v, %v, want %d images", u, err, len(want.Images))
	}
}

// TestIndexesOfEverySchema opens what each version of the index has left. See testdata/README.md.
func TestIndexesOfEverySchema(t *testing.T) {
	if *update {
		archiveStore(t)
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
			d := open(t, store, cache.Options{})
			checkArchived(t, d, want, false)
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkArchived(t, d, want, true)
			refused := cache.Refused{Ref: cachetest.MustRef("example.com/x"), When: when, Code: "unknown-key"}
			if err := d.Refuse(refused); err != nil {
				t.Fatal(err)
			}
			want.Refusals = slices.Insert(want.Refusals, 0, refused)
			closeStore(t, d)

			d = open(t, store, cache.Options{})
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkArchived(t, d, want, true)
			closeStore(t, d)
			for _, name := range names(t, store) {
				if strings.HasPrefix(name, "index.db.") {
					t.Errorf("%s is left", name)
				}
			}
		})
	}
}

// TestRefusalsSinceTheSchemaChangedComeAfterThoseBefore: the index that is being made is in use.
func TestRefusalsSinceTheSchemaChangedComeAfterThoseBefore(t *testing.T) {
	dir := t.TempDir()
	refusal := func(i int) cache.Refused {
		return cache.Refused{Ref: cachetest.MustRef("example.com/x"), When: when.Add(time.Duration(i) * time.Second), Code: fmt.Sprint(i)}
	}
	d := open(t, dir, cache.Options{})
	img := cachetest.NewImage("example.com/app", "1", 10)
	if err := cachetest.Commit(t.Context(), d, img); err != nil {
		t.Fatal(err)
	}
	for i := range cache.MaxRefusals {
		if err := d.Refuse(refusal(i)); err != nil {
			t.Fatal(err)
		}
	}
	closeStore(t, d)
	if err := cache.SetSchema(filepath.Join(dir, "index.db"), cache.Schema-1); err != nil {
		t.Fatal(err)
	}
	unblock := blockOpen(t, filepath.Join(dir, "names", "blocked.json"))
	d = open(t, dir, cache.Options{})
	defer unblock()
	for i := range 3 {
		if err := d.Refuse(refusal(cache.MaxRefusals + i)); err != nil {
			t.Fatal(err)
		}
	}
	unblock()
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Refuse(refusal(cache.MaxRefusals + 3)); err != nil {
		t.Fatal(err)
	}
	got, err := d.Refusals()
	if err != nil || len(got) != cache.MaxRefusals {
		t.Fatalf("Refusals = %d, %v, want %d", len(got), err, cache.MaxRefusals)
	}
	for i, r := range got {
		if want := refusal(cache.MaxRefusals + 3 - i); !reflect.DeepEqual(r, want) {
			t.Fatalf("refusal %d is %+v, want %+v", i, r, want)
		}
	}
}

// olderStays is a file system that doesn't remove an index of an older version.
type olderStays struct{ durable.FS }

func (fsys olderStays) Remove(name string) error {
	if filepath.Base(name) == "index.db.older" {
		return syscall.EIO
	}
	return fsys.FS.Remove(name)
}

// TestRefusalsAreCarriedOverOnce has the index of an older version stay after what it has was carried over, as a kill in between would have it.
func TestRefusalsAreCarriedOverOnce(t *testing.T) {
	dir := t.TempDir()
	refused := func(code string) cache.Refused {
		return cache.Refused{Ref: cachetest.MustRef("example.com/x"), When: when, Code: code}
	}
	d := open(t, dir, cache.Options{})
	if err := d.Refuse(refused("before")); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	if err := cache.SetSchema(filepath.Join(dir, "index.db"), cache.Schema-1); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, cache.Options{FS: olderStays{durable.OS{}}})
	if err := d.ReadyAtOnce(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the older index could not be removed, and Ready = %v", err)
	}
	if err := d.Refuse(refused("since")); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	fsys, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, cache.Options{FS: fsys})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Refusals(); err != nil || !reflect.DeepEqual(got, []cache.Refused{refused("since"), refused("before")}) {
		t.Errorf("Refusals = %+v, %v", got, err)
	}
	calls := fsys.Calls()
	if at := slices.Index(calls, "remove index.db.older"); at < 0 || at+1 == len(calls) || calls[at+1] != "syncdir ." {
		t.Errorf("the older index is not removed for good: %v", calls)
	}
}

// TestNewerIndexIsKeptAndMadeAgain: nobody can read it, and nobody has to throw it away.
func TestNewerIndexIsKeptAndMadeAgain(t *testing.T) {
	dir, images := t.TempDir(), library()
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	closeStore(t, d)
	if err := cache.SetSchema(filepath.Join(dir, "index.db"), cache.Schema+1); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, cache.Options{})
	checkAll(t, d, images)
	closeStore(t, d)
	kept := slices.DeleteFunc(names(t, dir), func(name string) bool { return !strings.HasPrefix(name, "index.db.broken-") })
	if len(kept) != 1 {
		t.Errorf("%v is kept, want one file", kept)
	}
}

// archiveStore writes a store of the present schema into testdata.
func archiveStore(t *testing.T) {
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	clock := when.Add(24*time.Hour + 123456789)
	d, err := cache.Open(store, cache.Options{Log: testLog(t), Now: func() time.Time { clock = clock.Add(time.Second); return clock }})
	if err != nil {
		t.Fatal(err)
	}
	refs := varied(t, d, store, clock)
	closeStore(t, d)

	d = open(t, store, cache.Options{})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	want, err := json.MarshalIndent(answersOf(t, d, refs), "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	write(t, filepath.Join(dir, "want.json"), want)
	if err := os.Remove(filepath.Join(store, "lock")); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	z := gzip.NewWriter(&archive)
	w := tar.NewWriter(z)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join("testdata", fmt.Sprintf("schema%d.tar.gz", cache.Schema)), archive.Bytes())
}

// varied puts a bit of everything into a store, and returns all refs that were ever answered.
func varied(t *testing.T, d *cache.Disk, dir string, clock time.Time) (refs []acproxy.Ref) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	commit := func(img cachetest.Image) cachetest.Image {
		must(cachetest.Commit(ctx, d, img))
		for _, r := range img.Refs {
			if !slices.Contains(refs, r.Ref) {
				refs = append(refs, r.Ref)
			}
		}
		return img
	}
	first := commit(cachetest.NewImage("example.com/alpha", "1", 1000))
	commit(cachetest.NewImage("example.com/alpha", "2", 2000))
	unsigned := cachetest.NewImage("example.com/beta", "1.0.0-rc1+x", 1)
	rec := &unsigned.Record
	unsigned.Signature, rec.Signed, rec.SignatureDigest, rec.Signers, rec.Hashed = nil, false, acproxy.Digest{}, nil, ""
	rec.ETag, rec.Modified, rec.Policy = "", time.Time{}, "unsigned images are accepted"
	commit(unsigned)
	bad := commit(cachetest.NewImage("example.com/gamma", "1", 300))
	must(d.Quarantine(ctx, bad.Record.Digest, "tar", "two manifests"))
	lost := commit(cachetest.NewImage("example.com/delta", "1", 400))
	odd := cachetest.NewImage("example.com/epsilon/web", "7", 500)
	rec = &odd.Record
	rec.ImageID, rec.Inspected, rec.Compression, rec.Uncompressed, rec.Pinned = acproxy.ImageID{}, false, "", 0, true
	rec.RktWarning = "the key is of a kind that rkt can't read"
	rec.Labels = map[string]string{"version": "7", "os": "linux", "arch": "arm64", "channel": "a,b 50%"}
	odd.Manifest, odd.Signature = []byte("{\"acKind\": \"ImageManifest\", \"odd\": \"\xff\xfe\"}"), []byte{0x89, 0x00, 0xff, 0x01}
	full, err := acproxy.NewRef(rec.Name, rec.Labels)
	must(err)
	odd.Refs = append(odd.Refs, cache.Resolution{
		Ref: full, Source: "https://example.com/e.aci", Validators: cache.ValidatorsOf(map[string]string{"ETag": `"x"`}), Validated: clock, Gone: clock.Add(time.Hour),
	})
	commit(odd)
	must(os.Remove(blobPath(dir, lost)))
	if _, err := d.OpenBlob(lost.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Fatalf("OpenBlob = %v, want ErrNotFound", err)
	}
	d.Touch(first.Record.Digest)
	must(d.Learn(cache.Discovered{
		Name: "example.com/alpha", When: clock, Page: "https://example.com/alpha?ac-discovery=1", Keys: []string{"https://example.com/keys.asc"},
		Templates: []cache.Template{{Prefix: "example.com", URL: "https://storage.example.net/{name}-{version}.{ext}"}},
	}))
	must(d.Learn(cache.Discovered{Name: "example.com/none", When: clock}))
	must(d.Refuse(cache.Refused{Ref: refs[0], When: clock, Code: "unknown-key", Detail: "key abcd is not trusted", Source: "https://example.com/1.aci", Signer: "abcd"}))
	must(d.Refuse(cache.Refused{Ref: refs[1], When: clock.Add(time.Minute), Code: "expired", Detail: "the key has expired"}))
	return refs
}

// answersOf asks a store for all that it holds.
func answersOf(t *testing.T, d *cache.Disk, refs []acproxy.Ref) archived {
	t.Helper()
	var all archived
	records, _, err := d.Images(cache.Filter{}, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	all.Images = make([]struct {
		Record    cache.Record
		Manifest  []byte
		Signature []byte
		Refs      []cache.Resolution
	}, len(records))
	for i, rec := range records {
		img := &all.Images[i]
		img.Record = rec
		if img.Manifest, err = d.Manifest(rec.Digest); err != nil {
			t.Fatal(err)
		}
		if img.Signature, err = d.Signature(rec.Digest); err != nil && rec.Signed {
			t.Fatal(err)
		}
		for _, ref := range refs {
			if r, _, err := d.Resolve(context.WithoutCancel(t.Context()), ref); err == nil && r.Digest == rec.Digest {
				img.Refs = append(img.Refs, r)
			}
		}
	}
	for _, name := range []string{"example.com/alpha", "example.com/none"} {
		if k, ok := d.Known(name); ok {
			all.Known = append(all.Known, k)
		}
	}
	if all.Refusals, err = d.Refusals(); err != nil {
		t.Fatal(err)
	}
	return all
}
