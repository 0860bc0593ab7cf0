package cache

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/testtools"
)

// newTestIndex returns an empty index that is open.
func newTestIndex(t testing.TB) *index {
	t.Helper()
	path := filepath.Join(t.TempDir(), "index.db")
	if err := createIndex(durable.OS{}, path+".new", path); err != nil {
		t.Fatal(err)
	}
	return openTestIndex(t, path)
}

// endless is space that is never used up.
func endless() *space {
	return newSpace(Quota{}, func() (int64, error) { return 1 << 50, nil }, func() {})
}

func openTestIndex(t testing.TB, path string) *index {
	t.Helper()
	x, err := openIndex(path, newMemory(), endless(), DefaultMaxMapped)
	if err == nil {
		err = errors.Join(x.check(t.Context()), x.release())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

// rowsOf puts rows of all sizes into a bucket or takes them out of it, at random, and keeps want the same.
func rowsOf(random *rand.Rand, n int, bucket string, want map[string]string) func(tx *bolt.Tx) error {
	return func(tx *bolt.Tx) error {
		for range n {
			key := fmt.Sprintf("key %05d", random.IntN(4000))
			if random.IntN(4) == 0 {
				delete(want, key)
				if err := remove(tx, bucket, []byte(key)); err != nil {
					return err
				}
				continue
			}
			value := bytes.Repeat([]byte{byte(random.Uint32())}, random.IntN(200))
			if random.IntN(100) == 0 {
				value = bytes.Repeat(value, 100)
			}
			want[key] = string(value)
			if err := put(tx, bucket, []byte(key), value); err != nil {
				return err
			}
		}
		return nil
	}
}

// lookedUp returns the value of a key, and whether there is none; either for sure.
func lookedUp(x *index, bucket, key string) (value string, ok bool, err error) {
	err = x.look(func(l *look) error {
		b, err := l.get(bucket, []byte(key))
		value, ok = string(b), b != nil
		if err == nil && !ok {
			err = l.confirm(bucket, []byte(key))
		}
		return err
	})
	return value, ok, err
}

func TestLooksSeeWhatWasWritten(t *testing.T) {
	x := newTestIndex(t)
	want := make(map[string]map[string]string)
	random := rand.New(rand.NewPCG(1, 2))
	for _, bucket := range looked {
		want[bucket] = make(map[string]string)
	}
	for round := range 60 {
		// One bucket stays as small as to stand inside its parent's page, one has no branch pages, one has several levels of them.
		n := []int{1, 20, 700}[round%3]
		bucket := looked[round%3]
		if err := x.update(rowsOf(random, n, bucket, want[bucket])); err != nil {
			t.Fatal(err)
		}
		for _, bucket := range looked {
			for range 100 {
				key := fmt.Sprintf("key %05d", random.IntN(4000))
				got, ok, err := lookedUp(x, bucket, key)
				if wanted, is := want[bucket][key]; err != nil || ok != is || got != wanted {
					t.Fatalf("round %d: %s of %s is %.20q, %v, %v, want %.20q, %v", round, key, bucket, got, ok, err, wanted, is)
				}
			}
		}
	}
	for _, bucket := range looked {
		for key, wanted := range want[bucket] {
			if got, ok, err := lookedUp(x, bucket, key); err != nil || !ok || got != wanted {
				t.Fatalf("%s of %s is %.20q, %v, %v, want %.20q", key, bucket, got, ok, err, wanted)
			}
		}
	}
	deep := x.snapshots.last.Load().trees[looked[2]].root
	if deep == nil || deep.children == nil {
		t.Error("no bucket has more than one level of branch pages: the test is too small")
	}
}

func TestChangeThatFailsIsNotSeen(t *testing.T) {
	x := newTestIndex(t)
	fail := errors.New("no")
	for i := range 5 {
		key := fmt.Appendf(nil, "key %d", i)
		err := x.update(func(tx *bolt.Tx) error { return errors.Join(put(tx, bucketRefs, key, key), fail) })
		if !errors.Is(err, fail) {
			t.Fatalf("update = %v, want its change's error", err)
		}
		if got, ok, err := lookedUp(x, bucketRefs, string(key)); ok || err != nil {
			t.Fatalf("%s is %q, %v", key, got, err)
		}
		if err := x.update(func(tx *bolt.Tx) error { return put(tx, bucketRefs, append(key, '!'), key) }); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := lookedUp(x, bucketRefs, string(key)+"!"); !ok || got != string(key) || err != nil {
			t.Fatalf("%s! is %q, %v, %v", key, got, ok, err)
		}
	}
}

// TestLooksBesideWrites looks rows up while they are written over again and again: what was reported to be written is seen, all rows of one look
// are of one transaction, and no page is seen while something else is written to it.
// TestLookEndsWhenNothingCanBeReadAnyMore: a look whose pages may have been written over, and for which there will be no newer snapshot, ends with an error.
func TestLookEndsWhenNothingCanBeReadAnyMore(t *testing.T) {
	x := newTestIndex(t)
	write := func() error {
		return x.update(func(tx *bolt.Tx) error { return put(tx, bucketState, []byte("word"), []byte("1")) }, effect{})
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	// The file that looks read from goes bad, and the writer's does not.
	if err := x.snapshots.f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := write(); !errors.Is(err, errPages) {
		t.Errorf("a write whose outcome can't be read = %v, want errPages", err)
	}
	x.snapshots.begun.Add(2) // as if others had tried
	done := make(chan error, 1)
	go func() { done <- x.snapshots.look(func(*look) error { return nil }) }()
	select {
	case err := <-done:
		if !errors.Is(err, errPages) {
			t.Errorf("look = %v, want errPages", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the look doesn't end")
	}
	// So that closing it finds it as it should be.
	f, err := os.Open(x.path)
	if err != nil {
		t.Fatal(err)
	}
	x.snapshots.f = f
}

func TestLooksBesideWrites(t *testing.T) {
	x := newTestIndex(t)
	const rows = 600
	var written atomic.Uint64
	change := func(n uint64) func(tx *bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			for i := range rows {
				key := fmt.Appendf(nil, "key %05d", i)
				if (i+int(n))%5 != 0 && i > 0 && i < rows-1 {
					continue
				}
				if err := put(tx, bucketRefs, key, bytes.Repeat(order.AppendUint64(nil, n), 1+int(n+uint64(i))%40)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if err := x.update(change(0)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for reader := range 4 {
		// Ends when done is closed; waited for below.
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(reader), 0))
			for {
				select {
				case <-done:
					return
				default:
				}
				before := written.Load()
				var first, last, some uint64
				err := x.look(func(l *look) error {
					for key, to := range map[string]*uint64{"key 00000": &first, fmt.Sprintf("key %05d", rows-1): &last, fmt.Sprintf("key %05d", 5*(1+random.IntN(rows/5-1))): &some} {
						b, err := l.get(bucketRefs, []byte(key))
						if err != nil || len(b) < 8 {
							return fmt.Errorf("%s is %x, %w", key, b, err)
						}
						*to = order.Uint64(b)
					}
					return nil
				})
				if err != nil || first != last || first < before || some > first {
					t.Errorf("transaction %d was written; a look sees %d, %d and %d, %v", before, first, last, some, err)
					return
				}
			}
		})
	}
	n := uint64(400)
	if testtools.Brief() {
		n = 100
	}
	for i := uint64(1); i <= n; i++ {
		if err := x.update(change(i)); err != nil {
			t.Error(err)
			break
		}
		written.Store(i)
	}
	close(done)
	wg.Wait()
}

// TestBrokenPagesDontLie flips bits of a file and looks for every row: it is found as it was written, or the break is found.
func TestBrokenPagesDontLie(t *testing.T) {
	x := newTestIndex(t)
	want := make(map[string]string)
	random := rand.New(rand.NewPCG(3, 4))
	for range 8 {
		if err := x.update(rowsOf(random, 600, bucketRefs, want)); err != nil {
			t.Fatal(err)
		}
	}
	for _, bucket := range []string{bucketRecords, bucketKnown} {
		if err := x.update(rowsOf(random, 30, bucket, make(map[string]string))); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(x.path)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "broken.db")
	found, unseen := 0, 0
	flips := 120
	if testtools.Brief() {
		flips = 30
	}
	for i := range flips {
		broken := bytes.Clone(whole)
		bit := random.IntN(8 * (len(broken) - 8192))
		if i%2 == 0 {
			// The beginning of a page is where a flip does most.
			bit = random.IntN(len(broken)/4096-2)*8*4096 + random.IntN(8*200)
		}
		broken[8192+bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(path, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		if tryBroken(t, path, want) {
			found++
		} else {
			unseen++
		}
	}
	t.Logf("%d flips were found, %d did nothing", found, unseen)
	if found == 0 || unseen == 0 {
		t.Error("the test tries nothing")
	}
}

// tryBroken reports whether an index was found broken, and fails the test if it says something wrong instead.
func tryBroken(t *testing.T, path string, want map[string]string) (found bool) {
	t.Helper()
	x, err := openIndex(path, newMemory(), endless(), DefaultMaxMapped)
	if err == nil {
		defer func() {
			if err := x.close(); err != nil {
				t.Error(err)
			}
		}()
		if err = x.check(t.Context()); err == nil {
			err = x.release()
		}
	}
	if err != nil {
		if !errors.Is(err, errPages) {
			t.Errorf("opening it: %v", err)
		}
		return true
	}
	for i := range 4000 {
		key := fmt.Sprintf("key %05d", i)
		got, ok, err := lookedUp(x, bucketRefs, key)
		if err != nil {
			if !errors.Is(err, errPages) {
				t.Errorf("looking for %s: %v", key, err)
			}
			return true
		}
		if wanted, is := want[key]; ok != is || got != wanted {
			t.Errorf("%s is %.20q, %v, want %.20q, %v", key, got, ok, wanted, is)
		}
	}
	return false
}

// TestLooksReadWhatBboltWrote compares single look-ups with a walk of the whole file, for trees of all shapes.
func TestLooksReadWhatBboltWrote(t *testing.T) {
	for _, size := range []struct{ buckets, rows int }{{0, 0}, {1, 1}, {1, 5000}, {15, 300}, {400, 3000}} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%d buckets, %d rows, seed %d", size.buckets, size.rows, seed), func(t *testing.T) {
				file, want := boltFile(t, size.buckets, size.rows, seed)
				m, _, err := readMetas(bytes.NewReader(file), int64(len(file)))
				if err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(t.TempDir(), "bolt.db")
				if err := os.WriteFile(path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				l := &look{f: f, snapshot: &snapshot{pageSize: m.pageSize}}
				roots := make(map[string][]byte)
				err = l.rows(m.root, 0, func(_ uint32, key, value []byte) error {
					roots[string(key)] = bytes.Clone(value)
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				for at, wanted := range want {
					bucket, key, _ := bytes.Cut([]byte(at), []byte("/"))
					tree, err := l.tree(roots[string(bucket)], nil)
					if err != nil {
						t.Fatal(err)
					}
					page, _, _, err := l.leaf(tree, key)
					if err != nil {
						t.Fatal(err)
					}
					if got, err := inLeaf(page, key); err != nil || string(got) != wanted {
						t.Fatalf("%s is %.20q, %v, want %.20q", at, got, err, wanted)
					}
					if size.rows > 1000 && len(key)%3 != 0 {
						continue
					}
					page, _, _, err = l.leaf(tree, append(key, '!'))
					if err != nil {
						t.Fatal(err)
					}
					if got, err := inLeaf(page, append(key, '!')); err != nil || got != nil {
						t.Fatalf("%s! is %q, %v", at, got, err)
					}
				}
			})
		}
	}
}

// FuzzLeaf looks into a page that says anything.
func FuzzLeaf(f *testing.F) {
	file, _ := boltFile(f, 1, 300, 1)
	for id := 2; id < len(file)/4096; id++ {
		f.Add(file[id*4096:(id+1)*4096], []byte("key 7"))
	}
	f.Fuzz(func(t *testing.T, page, key []byte) {
		value, err := inLeaf(page, key)
		if err != nil && !errors.Is(err, errPages) || len(value) > len(page) {
			t.Errorf("inLeaf = %d bytes of %d, %v", len(value), len(page), err)
		}
	})
}
