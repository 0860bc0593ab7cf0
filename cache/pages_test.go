package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy/internal/durable"
)

// boltFile returns the content of a bbolt file with some buckets and rows, made in several transactions, some of which delete.
func boltFile(t testing.TB, buckets, rows int, seed uint64) (file []byte, want map[string]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bolt.db")
	db, err := bolt.Open(path, 0o600, &bolt.Options{NoSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(seed, 0))
	want = make(map[string]string)
	for range 4 {
		err := db.Update(func(tx *bolt.Tx) error {
			for i := range buckets {
				name := fmt.Sprintf("bucket %d", i)
				b, err := tx.CreateBucketIfNotExists([]byte(name))
				if err != nil {
					return err
				}
				// The first buckets are large, most are small enough to stand inside their parent's page.
				for range rows / (i*i + 1) {
					key := fmt.Sprintf("key %d", random.IntN(2*rows))
					if random.IntN(4) == 0 {
						delete(want, name+"/"+key)
						if err := b.Delete([]byte(key)); err != nil {
							return err
						}
						continue
					}
					value := bytes.Repeat([]byte{byte(i)}, random.IntN(200))
					if random.IntN(50) == 0 {
						value = bytes.Repeat(value, 100)
					}
					want[name+"/"+key] = string(value)
					if err := b.Put([]byte(key), value); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	file, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return file, want
}

// walkFile reads a file as the index is read before it is trusted, and returns its rows.
func walkFile(file []byte) (map[string]string, error) {
	ctx, r := context.Background(), bytes.NewReader(file)
	newer, _, err := readMetas(r, int64(len(file)))
	if err != nil {
		return nil, err
	}
	head := newPages(r, newer)
	if err := errors.Join(head.freelist(ctx), head.walk(ctx, nil)); err != nil {
		return nil, err
	}
	rows := make(map[string]string)
	p := newPages(r, newer)
	err = p.walk(ctx, func(bucket string, key, value []byte) error {
		rows[bucket+"/"+string(key)] = string(value)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return rows, errors.Join(p.freelist(ctx), p.complete())
}

func TestWalkFindsWhatBboltWrote(t *testing.T) {
	for _, size := range []struct{ buckets, rows int }{{0, 0}, {1, 1}, {1, 5000}, {15, 300}, {200, 50}, {400, 3000}} {
		for seed := range uint64(3) {
			t.Run(fmt.Sprintf("%d buckets, %d rows, seed %d", size.buckets, size.rows, seed), func(t *testing.T) {
				file, want := boltFile(t, size.buckets, size.rows, seed)
				got, err := walkFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if len(got) != len(want) {
					t.Errorf("%d rows, want %d", len(got), len(want))
				}
				for key, value := range want {
					if got[key] != value {
						t.Fatalf("%s has %d bytes, want %d", key, len(got[key]), len(value))
					}
				}
			})
		}
	}
}

// reseal gives the meta pages right checksums again, so that what is broken in them is seen as such.
func reseal(file []byte) {
	for _, at := range []int{0, 4096} {
		body := file[at+pageHeader:]
		sum := fnv.New64a()
		sum.Write(body[:56])
		order.PutUint64(body[56:], sum.Sum64())
	}
}

func TestWalkRefusesWhatWouldBringBboltDown(t *testing.T) {
	file, _ := boltFile(t, 3, 5000, 1)
	newer, _, err := readMetas(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	// A branch page, and the first pointer on it.
	branch := -1
	for id := 2; id < int(newer.highWater); id++ {
		if order.Uint16(file[id*4096+8:]) == branchPage && int(order.Uint64(file[id*4096:])) == id {
			p := newPages(bytes.NewReader(file), newer)
			if p.walk(t.Context(), nil) == nil && p.seen[id/64]&(1<<(id%64)) != 0 {
				branch = id
			}
		}
	}
	if branch < 0 {
		t.Fatal("there is no branch page in use")
	}
	newerAt := 4096 * int(newer.txid%2)
	for _, tt := range []struct {
		name  string
		spoil func(b []byte)
	}{
		{"a branch points at itself", func(b []byte) { order.PutUint64(b[branch*4096+24:], uint64(branch)) }},
		{"a branch points at a meta page", func(b []byte) { order.PutUint64(b[branch*4096+24:], 0) }},
		{"a branch points past the end", func(b []byte) { order.PutUint64(b[branch*4096+24:], 1<<40) }},
		{"two pointers of a branch are the same", func(b []byte) { copy(b[branch*4096+24:branch*4096+32], b[branch*4096+40:branch*4096+48]) }},
		{"a branch has no elements", func(b []byte) { order.PutUint16(b[branch*4096+10:], 0) }},
		{"a branch has more elements than bytes", func(b []byte) { order.PutUint16(b[branch*4096+10:], 0xFFFF) }},
		{"a page overflows for gigabytes", func(b []byte) { order.PutUint32(b[branch*4096+12:], 1<<31) }},
		{"a page is another", func(b []byte) { order.PutUint64(b[branch*4096:], uint64(branch+1)) }},
		{"the list of free pages is endless", func(b []byte) {
			at := int(newer.freelist) * 4096
			order.PutUint16(b[at+10:], 0xFFFF)
			order.PutUint64(b[at+16:], 1<<62)
		}},
		{"a page in use is free", func(b []byte) {
			at := int(newer.freelist) * 4096
			order.PutUint16(b[at+10:], 1)
			order.PutUint64(b[at+16:], uint64(branch))
		}},
		{"the root is past the end", func(b []byte) { order.PutUint64(b[newerAt+pageHeader+16:], 1<<50) }},
		{"the high water mark is past the end", func(b []byte) { order.PutUint64(b[newerAt+pageHeader+40:], 1<<50) }},
		{"pages have no size", func(b []byte) { order.PutUint32(b[pageHeader+8:], 0) }},
		{"pages have three bytes", func(b []byte) { order.PutUint32(b[pageHeader+8:], 3) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := bytes.Clone(file)
			tt.spoil(b)
			reseal(b)
			if _, err := walkFile(b); !errors.Is(err, errPages) {
				t.Errorf("walk = %v, want an error matching errPages", err)
			}
		})
	}
}

// failingReader is a file that can't be read from some place on.
type failingReader struct {
	io.ReaderAt
	from int64
	err  error
}

func (r failingReader) ReadAt(b []byte, at int64) (int, error) {
	if at >= r.from {
		return 0, &os.PathError{Op: "read", Path: "index.db", Err: r.err}
	}
	return r.ReaderAt.ReadAt(b, at)
}

// TestWhatCantBeReadIsBroken tells errors of the disk from those that another time may not come again.
func TestWhatCantBeReadIsBroken(t *testing.T) {
	file, _ := boltFile(t, 20, 2000, 1)
	newer, _, err := readMetas(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		err              error
		broken, unusable bool
	}{
		{syscall.EIO, true, true}, {syscall.EISDIR, true, true}, {errUnclean, true, true}, {context.Canceled, false, true},
		{syscall.ENOMEM, false, false}, {syscall.EMFILE, false, false}, {syscall.ENFILE, false, false},
	} {
		_, _, meta := readMetas(failingReader{bytes.NewReader(file), 0, tt.err}, int64(len(file)))
		page := newPages(failingReader{bytes.NewReader(file), 3 * 4096, tt.err}, newer).walk(t.Context(), nil)
		for _, err := range []error{meta, page} {
			if !errors.Is(err, tt.err) || errors.Is(brokenBy(err), errPages) != tt.broken {
				t.Errorf("%v became %v, and then %v, want it broken: %v", tt.err, err, brokenBy(err), tt.broken)
			}
			if errors.Is(unusable(err), errPages) != tt.unusable {
				t.Errorf("%v became %v, want it broken: %v", err, unusable(err), tt.unusable)
			}
		}
	}
}

// TestPatiently: what there is too little of may be there again soon, and what the disk says it says for good.
func TestPatiently(t *testing.T) {
	for _, tt := range []struct {
		err            error
		failing, tries int
		fails          bool
	}{{nil, 0, 1, false}, {syscall.ENOMEM, 1, 2, false}, {syscall.EMFILE, 5, 6, false}, {syscall.ENOMEM, 100, 20, true}, {syscall.EIO, 1, 1, true}} {
		synctest.Test(t, func(t *testing.T) {
			tries := 0
			err := patiently(func() error {
				if tries++; tries <= tt.failing {
					return &os.PathError{Op: "read", Path: "index.db", Err: tt.err}
				}
				return nil
			})
			if tries != tt.tries || (err != nil) != tt.fails {
				t.Errorf("%v, %d times: %v after %d tries, want an error: %v after %d", tt.err, tt.failing, err, tries, tt.fails, tt.tries)
			}
		})
	}
}

// TestIndexThatCantBeRead has the file be out of reach: that is broken where another can be made, and otherwise what is open of it is used on.
func TestIndexThatCantBeRead(t *testing.T) {
	dir := t.TempDir()
	path, loop := filepath.Join(dir, indexFile), filepath.Join(dir, "loop")
	if err := errors.Join(createIndex(durable.OS{}, filepath.Join(dir, "temp"), path), os.Symlink(loop, loop)); err != nil {
		t.Fatal(err)
	}
	if _, err := openIndex(loop, newMemory(), nil, 0); !errors.Is(err, errPages) {
		t.Errorf("openIndex = %v, want that it is broken", err)
	}
	for _, readOnly := range []bool{false, true} {
		x, err := openIndex(path, newMemory(), nil, 0)
		if readOnly && err == nil {
			if err = x.close(); err == nil {
				x, err = readIndex(t.Context(), path)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		x.path = loop
		if err := x.verify(t.Context()); err == nil || errors.Is(err, errPages) == readOnly || x.dead.Load() {
			t.Errorf("read-only: %v, verify = %v, dead: %v", readOnly, err, x.dead.Load())
		}
		if err := x.close(); err != nil {
			t.Error(err)
		}
	}
}

// FuzzWalk overwrites places of a good file. Whatever they are, reading it ends, and stays within its bounds.
func FuzzWalk(f *testing.F) {
	file, _ := boltFile(f, 3, 500, 1)
	f.Add(uint32(16), []byte{1, 2, 3})
	f.Add(uint32(4096*3+8), []byte{1, 0, 0xff, 0xff})
	f.Add(uint32(len(file)-1), []byte{0})
	patch := binary.LittleEndian.AppendUint64(nil, 3)
	for page := range uint32(len(file) / 4096) {
		f.Add(page*4096+24, patch)
		f.Add(page*4096+8, []byte{branchPage, 0, 1, 0})
	}
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		b := bytes.Clone(file)
		copy(b[int(at)%len(b):], patch)
		reseal(b)
		if _, err := walkFile(b); err != nil && !errors.Is(err, errPages) {
			t.Errorf("walk = %v, want none or one matching errPages", err)
		}
	})
}

func TestErrorsOfBboltKeepTheirCause(t *testing.T) {
	for _, tt := range []struct {
		err, is error
	}{
		{fmt.Errorf("file resize error: %s", syscall.ENOSPC), syscall.ENOSPC},
		{fmt.Errorf("file sync error: %s", &os.PathError{Op: "sync", Path: "index.db", Err: syscall.EIO}), syscall.EIO},
		{&os.PathError{Op: "write", Path: "index.db", Err: syscall.EROFS}, syscall.EROFS},
	} {
		if err := withCause(tt.err); !errors.Is(err, tt.is) || err.Error() != tt.err.Error() {
			t.Errorf("withCause(%v) = %v, which is %v: %v", tt.err, err, tt.is, errors.Is(err, tt.is))
		}
	}
	if err := errors.New("something else"); withCause(err) != err || withCause(nil) != nil {
		t.Errorf("withCause(%v) = %v, withCause(nil) = %v", err, withCause(err), withCause(nil))
	}
}
