package cachetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/durable"
)

// Fill commits the images that [SparseImage] returns, n of them, to a store for measuring. On a store with a [SparseFS] their bytes take no
// space.
func Fill(ctx context.Context, store cache.Store, n int, size int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	// Many at once, because commits that wait at the same time share a sync. Each ends when next is closed; waited for below.
	for range 64 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := range next {
				if err := fillOne(ctx, store, SparseImage(i, size)); err != nil {
					cancel(fmt.Errorf("committing image %d: %w", i, err))
				}
			}
		})
	}
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		next <- i
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

var zeros [1 << 20]byte

func fillOne(ctx context.Context, store cache.Store, img Image) error {
	p, err := store.Begin(ctx, cache.Arrival{})
	if err != nil {
		return err
	}
	for left := img.Record.Size; left > 0; {
		n, err := p.Write(zeros[:min(left, int64(len(zeros)))])
		if err != nil {
			return errors.Join(err, p.Discard())
		}
		left -= int64(n)
	}
	return p.Commit(ctx, img.Record, img.Manifest, img.Signature, img.Refs...)
}

// Lay writes the files of a store with the images that [SparseImage] returns, n of them, into an empty directory: blobs that take no space, and
// sidecars, but no index, which a store makes when it is opened. It takes a fortieth of the time that [Fill] needs.
func Lay(dir string, n int, size int64) error {
	var shards [256][]int
	for i := range n {
		first := sparseDigest(i)[0]
		shards[first] = append(shards[first], i)
	}
	next := make(chan int)
	errs := make([]error, len(shards))
	var wg sync.WaitGroup
	// By directory, because a directory takes one new file at a time. Each ends when next is closed; waited for below.
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for shard := range next {
				errs[shard] = layShard(filepath.Join(dir, "blobs", fmt.Sprintf("%02x", shard)), shards[shard], size)
			}
		})
	}
	for shard := range shards {
		next <- shard
	}
	close(next)
	wg.Wait()
	return errors.Join(errs...)
}

func layShard(dir string, images []int, size int64) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	for _, i := range images {
		img := SparseImage(i, size)
		path := filepath.Join(dir, img.Record.Digest.Hex())
		sidecar, err := sidecarOf(img)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path+".json", sidecar, 0o640); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// sidecarOf returns what a store writes beside the blob of an image.
func sidecarOf(img Image) ([]byte, error) {
	content, err := json.Marshal(struct {
		Record    cache.Record       `json:"record"`
		Manifest  string             `json:"manifest"`
		Signature string             `json:"signature"`
		Refs      []cache.Resolution `json:"refs"`
	}{img.Record, string(img.Manifest), string(img.Signature), img.Refs})
	if err != nil {
		return nil, err
	}
	sum := crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli))
	return fmt.Appendf(nil, "{\"format\":1,\"crc32c\":\"%08x\",\"content\":%s}\n", sum, content), nil
}

func sparseDigest(i int) acproxy.Digest { return sha256.Sum256(fmt.Appendf(nil, "sparse image %d", i)) }

// SparseImage returns the i-th image for measuring, without its bytes, which are zeros and don't have the digest they should. What is known of
// it has the size that it usually has; there are a hundred versions of each name. It answers one ref, which [SparseRef] returns.
func SparseImage(i int, size int64) Image {
	ref := SparseRef(i)
	img := NewImage(ref.Name(), ref.Version(), 0)
	img.Record.Digest, img.Record.Size = sparseDigest(i), size
	img.Record.ImageID = sha512.Sum512(img.Record.Digest[:])
	state := slices.Concat(img.Record.ImageID[:], make([]byte, 128), []byte("sha\x07\x00\x00\x00\x00\x00\x00\x00\x00"))
	img.Record.Hashed = cache.HashesOf(map[string][]byte{"SHA-512": state})
	img.Record.Policy = "signed by a key that is trusted for the name"
	img.Record.Source = fmt.Sprintf("https://images.example.com/%s-%s-linux-amd64.aci", ref.Name(), ref.Version())
	img.Manifest = fmt.Appendf(nil, sparseManifest, ref.Name(), ref.Version())
	img.Signature = []byte("-----BEGIN PGP SIGNATURE-----\n\n")
	// As long as one by an RSA key of 4096 bits.
	body := base64.StdEncoding.EncodeToString(bytes.Repeat(img.Record.ImageID[:], 9)[:566])
	for line := range slices.Chunk([]byte(body), 64) {
		img.Signature = append(append(img.Signature, line...), '\n')
	}
	img.Signature = append(img.Signature, "-----END PGP SIGNATURE-----\n"...)
	img.Record.SignatureDigest = sha256.Sum256(img.Signature)
	img.Refs = img.Refs[:1]
	img.Refs[0].Digest, img.Refs[0].Source = img.Record.Digest, img.Record.Source
	img.Refs[0].Validators = cache.ValidatorsOf(map[string]string{"ETag": img.Record.ETag, "Last-Modified": img.Record.Modified.Format(http.TimeFormat)})
	img.Refs[0].Pointed = start.UnixNano() + int64(i)
	return img
}

// SparseRef returns the ref that the i-th image for measuring answers.
func SparseRef(i int) acproxy.Ref {
	return MustRef(fmt.Sprintf("example.com/team%d/app:%d.0.0", i/100, i%100))
}

// sparseManifest is a manifest of the usual size, but for name and version.
const sparseManifest = `{"acKind":"ImageManifest","acVersion":"0.8.11","name":%q,"labels":[{"name":"version","value":%q},{"name":"os","value":"linux"},` +
	`{"name":"arch","value":"amd64"}],"app":{"exec":["/usr/bin/app","--config=/etc/app/config.yaml","--listen=:8080"],"user":"100","group":"300",` +
	`"environment":[{"name":"REDUCE_WORKER_DEBUG","value":"true"}],"mountPoints":[{"name":"work","path":"/var/lib/work","readOnly":false}],` +
	`"ports":[{"name":"health","port":4000,"protocol":"tcp","socketActivated":true}],"isolators":[{"name":"resource/cpu","value":{"request":"250m",` +
	`"limit":"500m"}},{"name":"resource/memory","value":{"request":"1G","limit":"2G"}}]},"dependencies":[{"imageName":"example.com/base",` +
	`"labels":[{"name":"version","value":"1"}],"size":7}],"annotations":[{"name":"authors","value":"Carly Container <carly@example.com>"}]}`

// SparseFS is the operating system's file system without syncs, and with holes in place of written zeros. It is for measuring only.
type SparseFS struct{ durable.OS }

var _ durable.FS = SparseFS{}

// Create implements [durable.FS].
func (s SparseFS) Create(name string, perm fs.FileMode) (durable.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return nil, err
	}
	return &sparseFile{File: f}, nil
}

// SyncDir does nothing.
func (SparseFS) SyncDir(string) error { return nil }

type sparseFile struct {
	*os.File
	size int64
}

func (f *sparseFile) Write(b []byte) (int, error) {
	f.size += int64(len(b))
	if len(b) <= len(zeros) && bytes.Equal(b, zeros[:len(b)]) {
		if err := f.Truncate(f.size); err != nil {
			return 0, err
		}
		_, err := f.Seek(f.size, io.SeekStart)
		return len(b), err
	}
	return f.File.Write(b)
}

func (*sparseFile) Sync() error { return nil }
