package cache

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy/internal/durable"
)

// tableOfRefs returns the table of refs that is written of an index.
func tableOfRefs(t testing.TB, x *index) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "refs")
	f, err := durable.OS{}.Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := fillRefs(t.Context(), x, f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestTableOfRefsFindsEachOfThem(t *testing.T) {
	for _, n := range []int{0, 1, 2, 100, 3000} {
		t.Run(fmt.Sprintf("%d refs", n), func(t *testing.T) {
			x := newTestIndex(t)
			var refs []string
			for i := range n {
				// Some that fill half a block, and one that is too long for any.
				ref := fmt.Sprintf("example.com/app%d:1", i*7919%10007)
				switch {
				case i%100 == 50:
					ref += strings.Repeat("x", maxTableRef-len(ref))
				case i == 99:
					ref += strings.Repeat("x", maxTableRef)
				}
				refs = append(refs, ref)
			}
			err := x.update(func(tx *bolt.Tx) error {
				for _, ref := range refs {
					if err := put(tx, bucketRefs, []byte(ref), appendResolution(nil, Resolution{Digest: sha256.Sum256([]byte(ref))})); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			table := tableOfRefs(t, x)
			find := func(ref string) ([]byte, bool) {
				digest, ok := findInTable(bytes.NewReader(table), int64(len(table)), ref)
				return digest[:], ok
			}
			for _, ref := range refs {
				want := sha256.Sum256([]byte(ref))
				got, ok := find(ref)
				if ok != (len(ref) <= maxTableRef) || ok && !bytes.Equal(got, want[:]) {
					t.Errorf("%.40s of %d bytes: %x, %v", ref, len(ref), got, ok)
				}
			}
			for _, ref := range []string{"", "a", "example.com/app1", "example.com/app1:1!", "z"} {
				if got, ok := find(ref); ok != slices.Contains(refs, ref) {
					t.Errorf("%s: %x, %v", ref, got, ok)
				}
			}
		})
	}
}

// FuzzRefTable looks into a table that was changed. It finds what was written, or nothing.
func FuzzRefTable(f *testing.F) {
	x := newTestIndex(f)
	err := x.update(func(tx *bolt.Tx) error {
		for i := range 1000 {
			ref := fmt.Sprintf("example.com/app%d:1", i)
			if err := put(tx, bucketRefs, []byte(ref), appendResolution(nil, Resolution{Digest: sha256.Sum256([]byte(ref))})); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	table := tableOfRefs(f, x)
	f.Add(uint32(0), []byte{1}, uint16(0))
	f.Add(uint32(refBlock+4), []byte{0xff, 0xff}, uint16(500))
	f.Fuzz(func(t *testing.T, at uint32, patch []byte, i uint16) {
		b := bytes.Clone(table)
		copy(b[int(at)%len(b):], patch)
		ref := fmt.Sprintf("example.com/app%d:1", i)
		want := sha256.Sum256([]byte(ref))
		if digest, ok := findInTable(bytes.NewReader(b), int64(len(b)), ref); ok && digest != want {
			t.Errorf("%s answers %v", ref, digest)
		}
	})
}
