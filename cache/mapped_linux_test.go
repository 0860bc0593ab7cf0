package cache

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// residentOf returns how many bytes of the maps of a file are in memory (proc_pid_smaps(5)).
func residentOf(t *testing.T, name string) int64 {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var sum int64
	ours := false
	for line := range strings.Lines(string(smaps)) {
		key, value, _ := strings.Cut(line, ":")
		switch {
		case strings.Contains(key, "-"):
			ours = strings.HasSuffix(line, " "+name+"\n")
		case ours && key == "Rss":
			var kib int64
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatal(err)
			}
			sum += kib << 10
		}
	}
	return sum
}

// rowsOfAKilobyte puts rows into a bucket.
func rowsOfAKilobyte(n int) func(*bolt.Tx) error {
	return func(tx *bolt.Tx) error {
		value := bytes.Repeat([]byte{1}, 1024)
		for i := range n {
			if err := put(tx, bucketManifests, fmt.Appendf(nil, "%08d", i), value); err != nil {
				return err
			}
		}
		return nil
	}
}

func readAll(tx *bolt.Tx) error {
	return scan(tx, bucketManifests, nil, nil, func(_, _ []byte) error { return nil })
}

func TestMapIsGivenBack(t *testing.T) {
	x := newTestIndex(t)
	const rows = 8 << 10
	if err := x.update(rowsOfAKilobyte(rows)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		max      int64
		min, had int64 // what is resident in the end
	}{
		{"not as long as it is small", 1 << 30, rows << 10, 1 << 30},
		{"when it has grown", 0, 0, mindEvery * 64 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// Other tests map files too, so that nothing is assumed of how much there is.
			x.mapped.max, x.mapped.before = tt.max, 0
			if err := x.view(readAll); err != nil {
				t.Fatal(err)
			}
			for range mindEvery {
				if err := x.view(func(*bolt.Tx) error { return nil }); err != nil {
					t.Fatal(err)
				}
			}
			if got := residentOf(t, x.path); got < tt.min || got > tt.had {
				t.Errorf("%d bytes of the index are resident, want %d to %d", got, tt.min, tt.had)
			}
			// What was given back is there when it is asked for.
			if err := x.view(readAll); err != nil {
				t.Error(err)
			}
			if err := x.update(func(tx *bolt.Tx) error { return put(tx, bucketRefs, []byte("a"), []byte("b")) }); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestMapIsGivenBackWhileItMoves: the map moves when the file outgrows it, and all that time pages of it are given back.
func TestMapIsGivenBackWhileItMoves(t *testing.T) {
	x := newTestIndex(t)
	x.mapped.max, x.mapped.before = 0, 0
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		// Ends when done is closed; waited for below.
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := x.view(func(tx *bolt.Tx) error { _, err := get(tx, bucketManifests, []byte("00000001")); return err }); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	// Every transaction writes pages of its own, which makes more than is mapped at first.
	value := bytes.Repeat([]byte{1}, 1<<20)
	for i := range minMap>>20 + 8 {
		err := x.update(func(tx *bolt.Tx) error { return put(tx, bucketManifests, fmt.Appendf(nil, "%08d", i), value) })
		if err != nil {
			t.Error(err)
			break
		}
	}
	close(done)
	wg.Wait()
	if fi, err := os.Stat(x.path); err != nil || fi.Size() < minMap {
		t.Errorf("the file has %d bytes, %v: the test is too small", fi.Size(), err)
	}
}

func TestStatmThatCannotBeReadCountsNothing(t *testing.T) {
	empty, err := os.Create(filepath.Join(t.TempDir(), "statm"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := empty.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	}()
	if got := residentFiles(empty); got != 0 {
		t.Errorf("an empty file counts %d", got)
	}
	if got := residentFiles(nil); got != 0 {
		t.Errorf("no file counts %d", got)
	}
	if got := residentFiles(openStatm()); got <= 0 {
		t.Errorf("this process has %d bytes of files mapped, want some: its own", got)
	}
}
