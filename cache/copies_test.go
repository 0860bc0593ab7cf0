package cache

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// smallImage returns an image that answers refs, the first of them most lately.
func smallImage(t testing.TB, reason string, refs ...string) *image {
	t.Helper()
	img := &image{Record: Record{Digest: sha256.Sum256([]byte(reason)), Name: "example.com/app", Labels: map[string]string{"version": "1"}, Size: 7, State: OK, Reason: reason}}
	for i, s := range refs {
		ref, err := acproxy.ParseRef(s)
		if err != nil {
			t.Fatal(err)
		}
		img.Refs = append(img.Refs, Resolution{Ref: ref, Digest: img.Record.Digest, Source: "https://example.com/" + s, Pointed: int64(100 - i)})
	}
	return img
}

// answerOf returns the row of a ref.
func answerOf(t testing.TB, x *index, ref string) (a answer, ok bool) {
	t.Helper()
	err := x.look(func(l *look) (err error) {
		a, ok, err = lookUp(l, bucketRefs, []byte(ref), takeAnswer)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return a, ok
}

// TestRefsHaveTheRecordBesideThem: whatever changes a record changes the copies of it that are beside its refs.
func TestRefsHaveTheRecordBesideThem(t *testing.T) {
	const one, two, three = "example.com/app:1", "example.com/app", "example.com/app:1,os=linux"
	put := func(t *testing.T, x *index, img *image) {
		t.Helper()
		err := x.update(func(tx *bolt.Tx) error {
			_, err := putImage(tx, img)
			if err != nil {
				return err
			}
			return consistentRows(tx)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name  string
		after func(img *image) // what is written later
		want  map[string]int64 // Pointed by ref
	}{
		{"the same refs", func(*image) {}, map[string]int64{one: 100, two: 99, three: 98}},
		{"refs that are newer", func(img *image) {
			for i := range img.Refs {
				img.Refs[i].Pointed += 1000
			}
		}, map[string]int64{one: 1100, two: 1099, three: 1098}},
		{"refs that are older", func(img *image) {
			for i := range img.Refs {
				img.Refs[i].Pointed -= 50
			}
		}, map[string]int64{one: 100, two: 99, three: 98}},
		{"fewer refs", func(img *image) { img.Refs = img.Refs[:1] }, map[string]int64{one: 100, two: 99, three: 98}},
		{"no refs", func(img *image) { img.Refs = nil }, map[string]int64{one: 100, two: 99, three: 98}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := newTestIndex(t)
			img := smallImage(t, "", one, two, three)
			put(t, x, img)
			img = smallImage(t, "", one, two, three)
			img.Record.State, img.Record.Code, img.Record.Reason, img.Record.Pinned = Quarantined, "tar", "two manifests", true
			img.sidecar = 1234
			tt.after(img)
			put(t, x, img)
			for ref, pointed := range tt.want {
				a, ok := answerOf(t, x, ref)
				// Beside a ref that the image doesn't name any more there is no copy, rather than one of the record as it was.
				named := slices.ContainsFunc(img.Refs, func(r Resolution) bool { return r.Ref.String() == ref })
				if !ok || a.whole != named || named && !reflect.DeepEqual(a.rec, img.Record) || a.to.Pointed != pointed {
					t.Errorf("%s: %v, pointed at %d, want %d, whole %v, with\n%+v, want\n%+v", ref, ok, a.to.Pointed, pointed, a.whole, a.rec, img.Record)
				}
			}
		})
	}
	t.Run("more refs than have a copy", func(t *testing.T) {
		x := newTestIndex(t)
		var refs []string
		for i := range maxCopies + 3 {
			refs = append(refs, fmt.Sprintf("example.com/app:1,l%d=x", i))
		}
		img := smallImage(t, "", refs...)
		put(t, x, img)
		img.Record.Pinned = true
		slices.Reverse(img.Refs)
		put(t, x, img)
		copies := 0
		for _, ref := range refs {
			a, ok := answerOf(t, x, ref)
			if a.whole {
				copies++
			}
			if !ok || a.to.Digest != img.Record.Digest || a.whole && !a.rec.Pinned {
				t.Errorf("%s: %v, %+v", ref, ok, a)
			}
		}
		if copies != maxCopies {
			t.Errorf("%d copies, want %d", copies, maxCopies)
		}
	})
	t.Run("a ref that moves to another image and back", func(t *testing.T) {
		x := newTestIndex(t)
		first, second := smallImage(t, "first", one, two), smallImage(t, "second", two)
		second.Refs[0].Pointed = 200
		put(t, x, first)
		put(t, x, second)
		first.Record.Size++
		put(t, x, first) // its ref is older: it stays where it is
		for ref, want := range map[string]Record{one: first.Record, two: second.Record} {
			if a, ok := answerOf(t, x, ref); !ok || !reflect.DeepEqual(a.rec, want) || a.to.Digest != want.Digest {
				t.Errorf("%s answers %+v, want %+v", ref, a.rec, want)
			}
		}
		first.Refs[1].Pointed = 300
		put(t, x, first)
		if a, ok := answerOf(t, x, two); !ok || !reflect.DeepEqual(a.rec, first.Record) {
			t.Errorf("%s answers %+v, want %+v", two, a.rec, first.Record)
		}
		if err := x.update(func(tx *bolt.Tx) error { return dropImage(tx, first.Record.Digest) }); err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{one, two} {
			if a, ok := answerOf(t, x, ref); ok {
				t.Errorf("%s still answers %+v", ref, a)
			}
		}
	})
}

// TestLongRecordsAreLookedUpApart: a row of maxCopied bytes has its copies, a longer one has none, and is found all the same. A record may grow
// beyond that, and shrink again.
func TestLongRecordsAreLookedUpApart(t *testing.T) {
	d, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	// What is put into the index here has no files, which is not to be noticed.
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	const ref = "example.com/app:1"
	fill := maxCopied - len(appendHeld(nil, held{Record: smallImage(t, "", ref).Record})) - 1 // the length takes two bytes then
	for _, tt := range []struct {
		n     int
		whole bool
	}{{0, true}, {fill, true}, {fill + 1, false}, {64 << 10, false}, {fill, true}} {
		img := smallImage(t, "", ref)
		img.Record.Reason = strings.Repeat("x", tt.n)
		if n := len(appendHeld(nil, held{Record: img.Record})); tt.n == fill && n != maxCopied {
			t.Fatalf("the row has %d bytes, which doesn't try the edge", n)
		}
		ix := d.index()
		err := ix.update(func(tx *bolt.Tx) error {
			_, err := putImage(tx, img)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := answerOf(t, ix, ref); !ok || a.whole != tt.whole {
			t.Errorf("%d bytes more: %v, and the record is beside the ref %v, want %v", tt.n, ok, a.whole, tt.whole)
		}
		for range 3 {
			// The third time it is remembered.
			to, rec, err := d.Resolve(t.Context(), img.Refs[0].Ref)
			if err != nil || !reflect.DeepEqual(rec, img.Record) || !reflect.DeepEqual(to, img.Refs[0]) {
				t.Errorf("%d bytes more: Resolve = %+v, %+.200v, %v", tt.n, to, rec, err)
			}
		}
		if err := ix.view(consistentRows); err != nil {
			t.Error(err)
		}
	}
}

// TestSharedPartsOfRowsAreTheSame: it makes no difference whether what rows have in common is shared.
func TestSharedPartsOfRowsAreTheSame(t *testing.T) {
	d := decoder{same: newSame()}
	random := rand.New(rand.NewPCG(5, 6))
	var rows [][]byte
	for seed := range uint64(60) {
		kinds := rowKinds()
		kind := kinds[0]
		rows = append(rows, kind.encode(kind.random(rand.New(rand.NewPCG(seed, 0)))))
	}
	for i := range 20 {
		// Many that have few labels and dependencies.
		var h held
		h.Labels = map[string]string{"version": fmt.Sprint(i % 3), "os": "linux"}
		if i%2 == 0 {
			h.Dependencies = []Dependency{{Name: "example.com/base", Labels: map[string]string{"version": fmt.Sprint(i % 5)}, ImageID: acproxy.ImageID{byte(i % 4)}}}
		}
		rows = append(rows, appendHeld(nil, h))
	}
	shared := 0
	for range 4000 {
		row := slices.Clone(rows[random.IntN(len(rows))])
		if random.IntN(8) == 0 {
			// What is broken is so either way.
			row[random.IntN(len(row))] ^= 1 << random.IntN(8)
			row = row[:1+random.IntN(len(row))]
		}
		want, wantErr := decodeRow(bucketRecords, nil, row, takeHeld)
		got, err := decodeWith(&d, bucketRecords, nil, row, takeHeld)
		if (err == nil) != (wantErr == nil) || err == nil && !reflect.DeepEqual(got, want) {
			t.Fatalf("%x\nread as %+v, %v, want %+v, %v", row, got, err, want, wantErr)
		}
		again, _ := decodeWith(&d, bucketRecords, nil, row, takeHeld)
		if len(got.Labels) > 0 && reflect.ValueOf(got.Labels).Pointer() == reflect.ValueOf(again.Labels).Pointer() {
			shared++
		}
	}
	if shared == 0 {
		t.Error("nothing was shared")
	}
}

// TestFindAmongKeys compares the search in branch pages with one that looks at every key.
func TestFindAmongKeys(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	word := func() string {
		b := make([]byte, random.IntN(12))
		for i := range b {
			b[i] = "\x00ab\xff"[random.IntN(4)]
		}
		return string(b)
	}
	for round := range 300 {
		// One that is longer than what a branch has of it beside its keys, too.
		prefix := strings.Repeat(word(), []int{0, 1, 2, 20}[random.IntN(4)])
		var keys []string
		for range 1 + random.IntN(80) {
			if key := prefix + word(); key != "" {
				keys = append(keys, key)
			}
		}
		if len(keys) == 0 {
			continue
		}
		slices.Sort(keys)
		keys = slices.Compact(keys)
		var asBytes [][]byte
		for _, key := range keys {
			asBytes = append(asBytes, []byte(key))
		}
		b := newBranch(7, asBytes, make([]uint64, len(keys)))
		for i, key := range keys {
			if got := (bound{b, i}).key(); string(got) != key {
				t.Fatalf("round %d: key %d of %q is %q", round, i, keys, got)
			}
		}
		asked := append(slices.Clone(keys), "", prefix, prefix[:len(prefix)/2], "\x00", "\xff\xff\xff\xff\xff\xff\xff\xff\xff")
		for range 100 {
			asked = append(asked, prefix+word(), word(), keys[random.IntN(len(keys))]+word())
		}
		for _, key := range asked {
			for _, before := range []bool{false, true} {
				want := 0
				for i, k := range keys {
					if k < key || k == key && !before {
						want = i
					}
				}
				if got := b.find([]byte(key), before); got != want {
					t.Fatalf("round %d: find(%q, %v) among %q = %d, want %d", round, key, before, keys, got, want)
				}
			}
		}
	}
}

// BenchmarkTakeAnswer takes the row of a ref apart.
func BenchmarkTakeAnswer(b *testing.B) {
	img := smallImage(b, "x", "example.com/app:1")
	rec := &img.Record
	rec.Hashed, rec.Signers = HashesOf(map[string][]byte{"SHA-512": make([]byte, 204)}), []Signer{{Fingerprint: strings.Repeat("ab", 20), Signed: time.Unix(1, 0)}}
	img.Refs[0].Validators = ValidatorsOf(map[string]string{"ETag": `"1"`, "Last-Modified": "Sun, 01 Mar 2026 11:00:00 GMT"})
	row := answerRow(img.Refs[0], appendHeld(nil, held{Record: *rec}))
	d := decoder{same: newSame()}
	b.ReportAllocs()
	for b.Loop() {
		if a, err := decodeWith(&d, bucketRefs, nil, row, takeAnswer); err != nil || !a.whole {
			b.Fatal(err)
		}
	}
}
