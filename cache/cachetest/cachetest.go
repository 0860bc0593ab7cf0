// Package cachetest is what every store of images has to pass, and images to try stores with.
package cachetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// An Image is an image to commit.
type Image struct {
	Blob      []byte
	Record    cache.Record
	Manifest  []byte
	Signature []byte
	Refs      []cache.Resolution
}

// start is when all of this happens.
var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// NewImage returns a signed and inspected image of some random bytes, the same for the same arguments, with a ref for its version and one for
// the latest.
func NewImage(name, version string, size int) Image {
	seed := sha256.Sum256([]byte(name + " " + version))
	blob := make([]byte, size)
	_, _ = rand.NewChaCha8(seed).Read(blob)
	img := Image{
		Blob:      blob,
		Manifest:  fmt.Appendf(nil, "{\n \"acKind\": \"ImageManifest\", \"name\": %q, \"labels\": [{\"name\":\"version\",\"value\":%q}]\n}\n", name, version),
		Signature: fmt.Appendf(nil, "-----BEGIN PGP SIGNATURE-----\n\n%x\n-----END PGP SIGNATURE-----\n", seed),
	}
	img.Record = cache.Record{
		Digest: sha256.Sum256(blob), ImageID: sha512.Sum512(blob), Name: name, Size: int64(size),
		Labels:       map[string]string{"version": version, "os": "linux", "arch": "amd64"},
		Dependencies: []cache.Dependency{{Name: "example.com/base", Labels: map[string]string{"version": "1"}, Size: 7}},
		Compression:  "gzip", Uncompressed: 3 * int64(size), Inspected: true,
		Signed: true, SignatureDigest: sha256.Sum256(img.Signature),
		Signers: []cache.Signer{{Fingerprint: strings.Repeat("ab", 20), KeyID: "abababababababab", UserID: "Carly <carly@example.com>", Prefix: "example.com", Signed: start, Algorithm: "RSA"}},
		Hashed:  cache.HashesOf(map[string][]byte{"sha256": seed[:]}),
		Source:  "https://example.com/" + version + ".aci", Modified: start.Add(-time.Hour), ETag: `"` + version + `"`,
		Fetched: start, Verified: start, Used: start, State: cache.OK,
	}
	for _, s := range []string{name + ":" + version, name} {
		img.Refs = append(img.Refs, cache.Resolution{Ref: MustRef(s), Source: img.Record.Source, Modified: img.Record.Modified, Validated: start})
	}
	return img
}

// MustRef parses a ref that is known to be valid.
func MustRef(s string) acproxy.Ref {
	ref, err := acproxy.ParseRef(s)
	if err != nil {
		panic(err)
	}
	return ref
}

// Commit commits an image and returns Commit's error, or that of what comes before it.
func Commit(ctx context.Context, store cache.Store, img Image) error {
	p, err := store.Begin(ctx, cache.Arrival{})
	if err != nil {
		return err
	}
	if _, err := p.Write(img.Blob); err != nil {
		return errors.Join(err, p.Discard())
	}
	refs := append([]cache.Resolution(nil), img.Refs...)
	return p.Commit(ctx, img.Record, img.Manifest, img.Signature, refs...)
}

// Check returns an error if the store doesn't hold the image as it was committed, or doesn't answer its refs with it. A ref that another image
// has taken since can be left out of it.
func Check(ctx context.Context, store cache.Store, img Image) error {
	want := img.Record
	for _, r := range img.Refs {
		got, rec, err := store.Resolve(ctx, r.Ref)
		if err != nil {
			return err
		}
		if got.Digest != want.Digest || got.Source != r.Source || !got.Modified.Equal(r.Modified) {
			return fmt.Errorf("Resolve(%v) = %+v, want %+v", r.Ref, got, r)
		}
		if err := same(rec, want); err != nil {
			return fmt.Errorf("Resolve(%v): %w", r.Ref, err)
		}
	}
	rec, err := store.Record(want.Digest)
	if err != nil {
		return err
	}
	if err := same(rec, want); err != nil {
		return fmt.Errorf("Record: %w", err)
	}
	manifest, err := store.Manifest(want.Digest)
	if err != nil {
		return fmt.Errorf("Manifest: %w", err)
	}
	if !bytes.Equal(manifest, img.Manifest) {
		return fmt.Errorf("Manifest = %q, want %q", manifest, img.Manifest)
	}
	signature, err := store.Signature(want.Digest)
	switch {
	case len(img.Signature) == 0 && err == nil:
		return fmt.Errorf("an unsigned image has the signature %q", signature)
	case len(img.Signature) == 0 && errors.Is(err, acproxy.ErrNotFound):
	case err != nil:
		return fmt.Errorf("Signature: %w", err)
	case !bytes.Equal(signature, img.Signature):
		return fmt.Errorf("Signature = %q, want %q", signature, img.Signature)
	}
	f, err := store.OpenBlob(want.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, img.Blob) {
		return fmt.Errorf("OpenBlob gave %d bytes that are not the %d committed", len(got), len(img.Blob))
	}
	return nil
}

func same(got, want cache.Record) error {
	got.Used, want.Used = time.Time{}, time.Time{}
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("the record is\n%+v\nwant\n%+v", got, want)
	}
	return nil
}

// Run runs the suite. open returns an empty store, which it closes when the test ends.
func Run(t *testing.T, open func(t *testing.T) cache.Store) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

var tests = []struct {
	name string
	test func(*testing.T, cache.Store)
}{
	{"an empty store holds nothing", empty},
	{"what was committed is held", committed},
	{"an unsigned image is held", unsigned},
	{"a binary signature and an odd manifest keep every byte", binary},
	{"the same bytes committed twice answer the refs of both", twice},
	{"a discarded image leaves nothing", discarded},
	{"a suspended image is taken up where it was left", resumed},
	{"an image begun anew forgets what had arrived", begunAnew},
	{"an image can be read while it arrives and after", followed},
	{"what doesn't fit together is not committed", misfits},
	{"a ref moves on", moves},
	{"nothing points at what is not held", dangling},
	{"images are found by the beginning of their ID", byImageID},
	{"images are found by their signature", bySignature},
	{"images are found by name and labels", matches},
	{"neighbours of a name are not that name", neighbours},
	{"an update changes a record", updates},
	{"updates at once are all kept", updatesAtOnce},
	{"the last inspection of the same bytes counts", inspectedBefore},
	{"a quarantined image is kept and comes back", quarantines},
	{"what discovery found out is kept", learns},
	{"changes are counted", counted},
	{"a host's names are found by their templates too", hosts},
	{"the last refusals are kept", refusals},
	{"hostile refs are refs", hostile},
	{"many commits at once are all held", crowd},
	{"a call that was called off does nothing", calledOff},
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s = %v, want an error matching %q", what, err, want)
	}
}

func empty(t *testing.T, store cache.Store) {
	ctx := t.Context()
	must(t, store.Ready(ctx))
	img := NewImage("example.com/app", "1.0.0", 10)
	digest := img.Record.Digest
	_, _, err := store.Resolve(ctx, img.Refs[0].Ref)
	wantErr(t, "Resolve", err, acproxy.ErrNotFound)
	_, err = store.Record(digest)
	wantErr(t, "Record", err, acproxy.ErrNotFound)
	_, err = store.Manifest(digest)
	wantErr(t, "Manifest", err, acproxy.ErrNotFound)
	_, err = store.Signature(digest)
	wantErr(t, "Signature", err, acproxy.ErrNotFound)
	_, err = store.OpenBlob(digest)
	wantErr(t, "OpenBlob", err, acproxy.ErrNotFound)
	wantErr(t, "Update", store.Update(ctx, digest, func(*cache.Record) error { return nil }), acproxy.ErrNotFound)
	wantErr(t, "Quarantine", store.Quarantine(ctx, digest, "x", "y"), acproxy.ErrNotFound)
	wantErr(t, "Restore", store.Restore(ctx, digest), acproxy.ErrNotFound)
	store.Touch(digest)
	if _, ok := store.BySignature(img.Record.SignatureDigest); ok {
		t.Error("BySignature found something")
	}
	if _, ok := store.BySignature(acproxy.Digest{}); ok {
		t.Error("BySignature found something without a signature")
	}
	if has, err := store.HasName("example.com/app"); has || err != nil {
		t.Errorf("HasName = %v, %v", has, err)
	}
	for what, look := range map[string]func() ([]cache.Record, error){
		"ByImageID":   func() ([]cache.Record, error) { return store.ByImageID("") },
		"Match":       func() ([]cache.Record, error) { return store.Match(img.Refs[1].Ref) },
		"Uninspected": store.Uninspected,
	} {
		if records, err := look(); len(records) != 0 || err != nil {
			t.Errorf("%s = %v, %v, want nothing", what, records, err)
		}
	}
	if _, ok := store.Known("example.com/app"); ok {
		t.Error("Known found something")
	}
	if known := store.KnownUnderHost("example.com"); len(known) != 0 {
		t.Errorf("KnownUnderHost = %v", known)
	}
	if refusals, err := store.Refusals(); len(refusals) != 0 || err != nil {
		t.Errorf("Refusals = %v, %v", refusals, err)
	}
}

func committed(t *testing.T, store cache.Store) {
	for _, img := range []Image{NewImage("example.com/app", "1.0.0", 100_000), NewImage("example.com/empty", "1", 0)} {
		must(t, Commit(t.Context(), store, img))
		must(t, Check(t.Context(), store, img))
	}
	if has, err := store.HasName("example.com/app"); !has || err != nil {
		t.Errorf("HasName = %v, %v, want true", has, err)
	}
}

func unsigned(t *testing.T, store cache.Store) {
	img := unsign(NewImage("example.com/app", "1.0.0", 100))
	must(t, Commit(t.Context(), store, img))
	must(t, Check(t.Context(), store, img))
}

func unsign(img Image) Image {
	img.Signature = nil
	img.Record.Signed, img.Record.SignatureDigest, img.Record.Signers, img.Record.Hashed = false, acproxy.Digest{}, nil, ""
	return img
}

func binary(t *testing.T, store cache.Store) {
	img := NewImage("example.com/app", "1.0.0", 100)
	img.Signature = []byte{0x89, 0x01, 0xff, 0x00, '\n', 0xfe}
	img.Record.SignatureDigest = sha256.Sum256(img.Signature)
	img.Manifest = []byte("{\"name\": \"<b>&amp;\u2028\", \"odd\": \"\xff\"}\r\n\t ")
	must(t, Commit(t.Context(), store, img))
	must(t, Check(t.Context(), store, img))
}

func twice(t *testing.T, store cache.Store) {
	ctx := t.Context()
	img := NewImage("example.com/app", "1.0.0", 1000)
	must(t, Commit(ctx, store, img))
	again := unsign(img)
	again.Refs = []cache.Resolution{{Ref: MustRef("example.com/app:1.0.0,os=linux"), Source: "https://mirror.example.com/app.aci", Modified: start}}
	must(t, Commit(ctx, store, again))
	all := img
	all.Refs = append(all.Refs[:len(all.Refs):len(all.Refs)], again.Refs...)
	must(t, Check(ctx, store, all))
	records, err := store.Match(MustRef("example.com/app"))
	if len(records) != 1 || err != nil {
		t.Errorf("Match = %d records, %v, want 1", len(records), err)
	}
}

func discarded(t *testing.T, store cache.Store) {
	p, err := store.Begin(t.Context(), cache.Arrival{})
	must(t, err)
	_, err = p.Write([]byte("some of it"))
	must(t, err)
	f, err := p.Open()
	must(t, err)
	defer f.Close()
	must(t, p.Discard())
	must(t, p.Discard())
	if b, err := io.ReadAll(f); string(b) != "some of it" || err != nil {
		t.Errorf("a file opened before reads %q, %v", b, err)
	}
	_, err = p.Open()
	wantErr(t, "Open", err, acproxy.ErrNotFound)
	img := NewImage("example.com/app", "1", 10)
	if err := p.Commit(t.Context(), img.Record, img.Manifest, img.Signature); err == nil {
		t.Error("Commit after Discard succeeded")
	}
	_, err = store.Record(img.Record.Digest)
	wantErr(t, "Record", err, acproxy.ErrNotFound)
}

// arriving begins an image whose first bytes have arrived.
func arriving(t *testing.T, store cache.Store, key string, blob []byte) *cache.Partial {
	t.Helper()
	p, err := store.Begin(t.Context(), cache.Arrival{
		Key: key, Ref: MustRef("example.com/app"), Source: "https://example.com/app.aci", Size: 300_000, Validators: map[string]string{"ETag": `"1"`}, Began: start,
	})
	must(t, err)
	_, err = p.Write(blob)
	must(t, err)
	return p
}

func resumed(t *testing.T, store cache.Store) {
	img := NewImage("example.com/app", "1.0.0", 300_000)
	p := arriving(t, store, "a", img.Blob[:1000])
	f, err := p.Open()
	must(t, err)
	defer f.Close()
	want := p.Arrival()
	must(t, p.Suspend())
	must(t, p.Discard())
	arrivals, err := store.Arrivals(t.Context())
	must(t, err)
	if len(arrivals) != 1 || !reflect.DeepEqual(arrivals[0], want) {
		t.Errorf("Arrivals = %+v, want %+v", arrivals, want)
	}
	_, err = store.Resume(t.Context(), "b")
	wantErr(t, "Resume of another key", err, acproxy.ErrNotFound)
	p, err = store.Resume(t.Context(), "a")
	must(t, err)
	if p.Size() != 1000 || !reflect.DeepEqual(p.Arrival(), want) {
		t.Errorf("resumed %d bytes of %+v, want 1000 of %+v", p.Size(), p.Arrival(), want)
	}
	_, err = store.Resume(t.Context(), "a")
	wantErr(t, "Resume of what somebody writes", err, acproxy.ErrNotFound)
	_, err = p.Write(img.Blob[1000:])
	must(t, err)
	must(t, p.Commit(t.Context(), img.Record, img.Manifest, img.Signature, img.Refs...))
	must(t, Check(t.Context(), store, img))
	got, err := io.ReadAll(f)
	if !bytes.Equal(got, img.Blob) || err != nil {
		t.Errorf("a file opened before the suspension reads %d bytes, %v, or others than were written", len(got), err)
	}
	if arrivals, err := store.Arrivals(t.Context()); len(arrivals) != 0 || err != nil {
		t.Errorf("Arrivals after the commit = %+v, %v", arrivals, err)
	}
}

func begunAnew(t *testing.T, store cache.Store) {
	must(t, arriving(t, store, "a", []byte("old")).Suspend())
	p := arriving(t, store, "a", []byte("newer"))
	_, err := store.Resume(t.Context(), "a")
	wantErr(t, "Resume", err, acproxy.ErrNotFound)
	must(t, p.Suspend())
	p, err = store.Resume(t.Context(), "a")
	must(t, err)
	if p.Size() != 5 {
		t.Errorf("resumed %d bytes, want 5", p.Size())
	}
	must(t, p.Discard())
	_, err = store.Resume(t.Context(), "a")
	wantErr(t, "Resume of what was discarded", err, acproxy.ErrNotFound)
	must(t, arriving(t, store, "", []byte("no key")).Suspend())
	must(t, arriving(t, store, "b", nil).Suspend())
	if arrivals, err := store.Arrivals(t.Context()); len(arrivals) != 0 || err != nil {
		t.Errorf("Arrivals = %+v, %v", arrivals, err)
	}
}

func followed(t *testing.T, store cache.Store) {
	img := NewImage("example.com/app", "1.0.0", 300_000)
	p, err := store.Begin(t.Context(), cache.Arrival{})
	must(t, err)
	half := len(img.Blob) / 2
	_, err = p.Write(img.Blob[:half])
	must(t, err)
	f, err := p.Open()
	must(t, err)
	defer f.Close()
	read := func(f io.Reader, n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(f, b); err != nil {
			t.Errorf("reading %d bytes: %v", n, err)
		}
		return b
	}
	got := read(f, half)
	if p.Size() != int64(half) {
		t.Errorf("Size = %d, want %d", p.Size(), half)
	}
	_, err = p.Write(img.Blob[half:])
	must(t, err)
	must(t, p.Commit(t.Context(), img.Record, img.Manifest, img.Signature, img.Refs...))
	if got = append(got, read(f, len(img.Blob)-half)...); !bytes.Equal(got, img.Blob) {
		t.Error("following gave other bytes than were written")
	}
	after, err := p.Open()
	must(t, err)
	defer after.Close()
	if !bytes.Equal(read(after, len(img.Blob)), img.Blob) {
		t.Error("opening after the commit gave other bytes than were written")
	}
	must(t, p.Discard())
	must(t, Check(t.Context(), store, img))
}

func misfits(t *testing.T, store cache.Store) {
	good := NewImage("example.com/app", "1.0.0", 10)
	for name, spoil := range map[string]func(*Image){
		"a byte too many":          func(i *Image) { i.Blob = append([]byte("x"), i.Blob...) },
		"a byte too few":           func(i *Image) { i.Blob = i.Blob[1:] },
		"no digest":                func(i *Image) { i.Record.Digest = acproxy.Digest{} },
		"no name":                  func(i *Image) { i.Record.Name = "" },
		"not a name":               func(i *Image) { i.Record.Name = "../../etc/passwd" },
		"no ref":                   func(i *Image) { i.Refs = []cache.Resolution{{}} },
		"signed without signature": func(i *Image) { i.Signature = nil },
		"unsigned with signature":  func(i *Image) { i.Record.Signed = false },
	} {
		img := good
		spoil(&img)
		wantErr(t, name, Commit(t.Context(), store, img), acproxy.ErrInvalid)
	}
	_, _, err := store.Resolve(t.Context(), good.Refs[0].Ref)
	wantErr(t, "Resolve", err, acproxy.ErrNotFound)
}

func moves(t *testing.T, store cache.Store) {
	ctx := t.Context()
	old, next := NewImage("example.com/app", "1.0.0", 10), NewImage("example.com/app", "2.0.0", 20)
	must(t, Commit(ctx, store, old))
	must(t, Commit(ctx, store, next))
	must(t, Check(ctx, store, next))
	old.Refs = old.Refs[:1]
	must(t, Check(ctx, store, old))

	latest := MustRef("example.com/app")
	back := cache.Resolution{
		Ref: latest, Digest: old.Record.Digest, Source: "https://example.com/back", Modified: start.Add(time.Hour), Validated: start,
		Gone: start.Add(time.Minute), Validators: cache.ValidatorsOf(map[string]string{"signature-etag": `"7"`}),
	}
	must(t, store.Point(ctx, back))
	got, rec, err := store.Resolve(ctx, latest)
	must(t, err)
	back.Pointed = got.Pointed
	if !reflect.DeepEqual(got, back) || rec.Digest != old.Record.Digest {
		t.Errorf("Resolve = %+v of %v, want %+v", got, rec.Digest, back)
	}
	next.Refs = next.Refs[:1]
	must(t, Check(ctx, store, next))
}

func dangling(t *testing.T, store cache.Store) {
	ref := MustRef("example.com/app")
	err := store.Point(t.Context(), cache.Resolution{Ref: ref, Digest: acproxy.Digest{1}})
	wantErr(t, "Point", err, acproxy.ErrNotFound)
	_, _, err = store.Resolve(t.Context(), ref)
	wantErr(t, "Resolve", err, acproxy.ErrNotFound)
}

func byImageID(t *testing.T, store cache.Store) {
	ctx := t.Context()
	a, b, c := NewImage("example.com/a", "1", 10), NewImage("example.com/b", "1", 20), NewImage("example.com/c", "1", 30)
	b.Record.ImageID = a.Record.ImageID
	b.Record.ImageID[6] ^= 0x01 // differs from a's in the second digit of the seventh byte
	c.Record.ImageID, c.Record.Inspected = acproxy.ImageID{}, false
	for _, img := range []Image{a, b, c} {
		must(t, Commit(ctx, store, img))
	}
	digits := strings.TrimPrefix(a.Record.ImageID.String(), "sha512-")
	for _, tt := range []struct {
		name, prefix string
		want         int
	}{
		{"all digits", digits, 1},
		{"the shortest that tells them apart", digits[:14], 1},
		{"one digit less", digits[:13], 2},
		{"twelve", digits[:12], 2},
		{"none", "", 2},
		{"another", "0" + strings.Repeat("1", 20), 0},
	} {
		if got, err := store.ByImageID(tt.prefix); len(got) != tt.want || err != nil {
			t.Errorf("%s: ByImageID = %d records, %v, want %d", tt.name, len(got), err, tt.want)
		}
	}
	for _, bad := range []string{"ABCDEF", "xyz", digits + "0", "../.."} {
		_, err := store.ByImageID(bad)
		wantErr(t, "ByImageID of "+bad, err, acproxy.ErrInvalid)
	}
}

func bySignature(t *testing.T, store cache.Store) {
	ctx := t.Context()
	img := NewImage("example.com/app", "1", 10)
	must(t, Commit(ctx, store, img))
	if got, ok := store.BySignature(sha256.Sum256(img.Signature)); !ok || got != img.Record.Digest {
		t.Errorf("BySignature = %v, %v, want %v", got, ok, img.Record.Digest)
	}
	must(t, store.Quarantine(ctx, img.Record.Digest, "test", "a test"))
	if _, ok := store.BySignature(sha256.Sum256(img.Signature)); ok {
		t.Error("BySignature found a quarantined image")
	}
}

func matches(t *testing.T, store cache.Store) {
	ctx := t.Context()
	one, two := NewImage("example.com/app", "1.0.0", 10), NewImage("example.com/app", "1.0.0-rc1", 20)
	one.Refs, two.Refs = nil, nil
	two.Record.Labels["arch"] = "arm64"
	must(t, Commit(ctx, store, one))
	must(t, Commit(ctx, store, two))
	for ref, want := range map[string]int{
		"example.com/app":                     2,
		"example.com/app:1.0.0":               1,
		"example.com/app:1.0.0-rc1":           1,
		"example.com/app:1.0":                 0,
		"example.com/app,arch=arm64":          1,
		"example.com/app:1.0.0,arch=arm64":    0,
		"example.com/app,flavour=strawberry":  0,
		"example.com/ap":                      0,
		"example.com/app/more":                0,
		"example.com":                         0,
		"example.com/app:1.0.0,os=linux":      1,
		"example.com/app,os=linux,arch=amd64": 1,
	} {
		if got, err := store.Match(MustRef(ref)); len(got) != want || err != nil {
			t.Errorf("Match(%s) = %d records, %v, want %d", ref, len(got), err, want)
		}
	}
	must(t, store.Quarantine(ctx, one.Record.Digest, "test", "a test"))
	if got, err := store.Match(MustRef("example.com/app:1.0.0")); len(got) != 0 || err != nil {
		t.Errorf("Match = %d records, %v, want no quarantined one", len(got), err)
	}
}

func neighbours(t *testing.T, store cache.Store) {
	must(t, Commit(t.Context(), store, NewImage("example.com/app", "1", 10)))
	for name, want := range map[string]bool{"example.com/app": true, "example.com/apple": false, "example.com/ap": false, "example.com": false, "example.com/app/x": false} {
		if got, err := store.HasName(name); got != want || err != nil {
			t.Errorf("HasName(%s) = %v, %v, want %v", name, got, err, want)
		}
	}
}

func updates(t *testing.T, store cache.Store) {
	ctx := t.Context()
	img := NewImage("example.com/app", "1", 10)
	id := img.Record.ImageID
	img.Record.ImageID, img.Record.Inspected = acproxy.ImageID{}, false
	must(t, Commit(ctx, store, img))
	if got, err := store.Uninspected(); len(got) != 1 || err != nil {
		t.Errorf("Uninspected = %d records, %v, want 1", len(got), err)
	}
	changed := cache.HashesOf(map[string][]byte{"sha256": {1, 2}, "sha512": nil, "sha1": {}})
	must(t, store.Update(ctx, img.Record.Digest, func(r *cache.Record) error {
		r.ImageID, r.Inspected, r.Pinned, r.Size, r.Digest = id, true, true, 999, acproxy.Digest{}
		r.Hashed = changed
		return nil
	}))
	img.Record.ImageID, img.Record.Inspected, img.Record.Pinned = id, true, true
	img.Record.Hashed = changed
	must(t, Check(ctx, store, img))
	if got, err := store.Uninspected(); len(got) != 0 || err != nil {
		t.Errorf("Uninspected = %d records, %v, want none", len(got), err)
	}
	if got, err := store.ByImageID(strings.TrimPrefix(id.String(), "sha512-")); len(got) != 1 || err != nil {
		t.Errorf("ByImageID = %d records, %v, want 1", len(got), err)
	}
	errNo := errors.New("no")
	err := store.Update(ctx, img.Record.Digest, func(r *cache.Record) error {
		r.Name, r.Labels["version"] = "example.com/other", "9"
		return errNo
	})
	wantErr(t, "Update", err, errNo)
	must(t, Check(ctx, store, img))
}

func updatesAtOnce(t *testing.T, store cache.Store) {
	ctx := t.Context()
	img := NewImage("example.com/app", "1", 10)
	must(t, Commit(ctx, store, img))
	const n = 16
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			err := store.Update(ctx, img.Record.Digest, func(r *cache.Record) error {
				r.Uncompressed++
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	rec, err := store.Record(img.Record.Digest)
	must(t, err)
	if want := img.Record.Uncompressed + n; rec.Uncompressed != want {
		t.Errorf("after %d updates at once the number is %d, want %d", n, rec.Uncompressed, want)
	}
}

func inspectedBefore(t *testing.T, store cache.Store) {
	ctx := t.Context()
	good, bad := NewImage("example.com/good", "1", 10), NewImage("example.com/bad", "1", 10)
	for _, img := range []Image{good, bad} {
		must(t, Commit(ctx, store, img))
	}
	must(t, store.Quarantine(ctx, bad.Record.Digest, "tar", "two manifests"))
	for _, img := range []Image{good, bad} {
		img.Record.ImageID, img.Record.Inspected, img.Record.Compression, img.Record.Uncompressed = acproxy.ImageID{}, false, "", 0
		must(t, Commit(ctx, store, img))
	}
	must(t, Check(ctx, store, good))
	if rec, err := store.Record(bad.Record.Digest); err != nil || !rec.Quarantined() || rec.Code != "tar" {
		t.Errorf("bad bytes that came again uninspected: Record = %v %q, %v, want them still quarantined", rec.State, rec.Code, err)
	}
	must(t, Commit(ctx, store, bad))
	must(t, Check(ctx, store, bad))
}

func quarantines(t *testing.T, store cache.Store) {
	ctx := t.Context()
	img := NewImage("example.com/app", "1", 10)
	must(t, Commit(ctx, store, img))
	must(t, store.Quarantine(ctx, img.Record.Digest, "two-manifests", "the tar has two manifests"))
	quarantined := img
	quarantined.Record.State, quarantined.Record.Code, quarantined.Record.Reason = cache.Quarantined, "two-manifests", "the tar has two manifests"
	must(t, Check(ctx, store, quarantined))
	if has, err := store.HasName("example.com/app"); !has || err != nil {
		t.Errorf("HasName = %v, %v, want true", has, err)
	}
	must(t, store.Restore(ctx, img.Record.Digest))
	must(t, Check(ctx, store, img))
}

func learns(t *testing.T, store cache.Store) {
	k := cache.Discovered{
		Name: "example.com/app", Page: "https://example.com/app?ac-discovery=1", When: start,
		Templates: []cache.Template{{Prefix: "example.com", URL: "https://example.com/{name}-{version}.{ext}"}, {Prefix: "example.com/app", URL: "https://b.example.net/{name}.{ext}"}},
		Keys:      []string{"https://example.com/keys.gpg"},
	}
	check := func() {
		t.Helper()
		if got, ok := store.Known("example.com/app"); !ok || !reflect.DeepEqual(got, k) {
			t.Errorf("Known = %+v, %v, want %+v", got, ok, k)
		}
	}
	must(t, store.Learn(k))
	check()
	k.When = start.Add(time.Second)
	must(t, store.Learn(k))
	check()
	k.Templates = k.Templates[:1]
	must(t, store.Learn(k))
	check()
	if known := store.KnownUnderHost("b.example.net"); len(known) != 0 {
		t.Errorf("KnownUnderHost of a template that is no longer given = %v", known)
	}
	wantErr(t, "Learn without a name", store.Learn(cache.Discovered{}), acproxy.ErrInvalid)
}

func counted(t *testing.T, store cache.Store) {
	img := NewImage("example.com/app", "1.0", 10)
	was := store.Changes()
	for _, change := range []struct {
		name string
		make func() error
	}{
		{"Commit", func() error { return Commit(t.Context(), store, img) }},
		{"Point", func() error {
			return store.Point(t.Context(), cache.Resolution{Ref: MustRef("example.com/app:2.0"), Digest: img.Record.Digest})
		}},
		{"Update", func() error {
			return store.Update(t.Context(), img.Record.Digest, func(rec *cache.Record) error { rec.Source = "https://other.example.com/app.aci"; return nil })
		}},
		{"Quarantine", func() error { return store.Quarantine(t.Context(), img.Record.Digest, "code", "reason") }},
		{"Restore", func() error { return store.Restore(t.Context(), img.Record.Digest) }},
		{"Learn", func() error { return store.Learn(cache.Discovered{Name: "example.com/app", When: time.Now()}) }},
	} {
		must(t, change.make())
		if now := store.Changes(); now == was {
			t.Errorf("after %s there were %d changes, as before", change.name, now)
		} else {
			was = now
		}
	}
	_, err := store.Record(img.Record.Digest)
	must(t, err)
	if now := store.Changes(); now != was {
		t.Errorf("looking made %d changes of %d", now, was)
	}
	if disk, ok := store.(interface {
		Delete(ctx context.Context, digest acproxy.Digest) error
	}); ok {
		must(t, disk.Delete(t.Context(), img.Record.Digest))
		if store.Changes() == was {
			t.Errorf("after Delete there were %d changes, as before", was)
		}
	}
}

func hosts(t *testing.T, store cache.Store) {
	for name, url := range map[string]string{
		"example.com":      "https://example.com/{version}.{ext}",
		"example.com/app":  "https://STORAGE.example.net:8443/{name}.{ext}",
		"example.com/self": "https://{name}-{version}.{ext}",
		"example.com/any":  "https://{os}.example.org/{name}.{ext}",
		"example.com-x":    "https://example.com-x/{version}.{ext}",
		"other.org/app":    "https://user@example.com?{name}",
	} {
		must(t, store.Learn(cache.Discovered{Name: name, When: start, Templates: []cache.Template{{Prefix: name, URL: url}}}))
	}
	for host, want := range map[string][]string{
		"example.com":         {"example.com", "example.com/app", "example.com/self", "example.com/any", "other.org/app"},
		"storage.example.net": {"example.com/app", "example.com/any"},
		"Storage.Example.Net": {"example.com/app", "example.com/any"},
		"linux.example.org":   {"example.com/any"},
		"example.com-x":       {"example.com-x", "example.com/any"},
		"example":             {"example.com/any"},
	} {
		got := make(map[string]int)
		for _, k := range store.KnownUnderHost(host) {
			got[k.Name]++
		}
		for _, name := range want {
			if got[name] != 1 {
				t.Errorf("KnownUnderHost(%s) has %s %d times, want once", host, name, got[name])
			}
			delete(got, name)
		}
		if len(got) != 0 {
			t.Errorf("KnownUnderHost(%s) has also %v", host, got)
		}
	}
}

func refusals(t *testing.T, store cache.Store) {
	var wg sync.WaitGroup
	queue := make(chan int)
	for range 32 {
		wg.Go(func() {
			for i := range queue {
				err := store.Refuse(cache.Refused{Ref: MustRef("example.com/app"), When: start, Code: "unknown-key", Detail: fmt.Sprint(i)})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range cache.MaxRefusals {
		queue <- i
	}
	close(queue)
	wg.Wait()
	got, err := store.Refusals()
	if len(got) != cache.MaxRefusals || err != nil {
		t.Fatalf("Refusals = %d, %v, want %d", len(got), err, cache.MaxRefusals)
	}
	last := cache.Refused{Ref: MustRef("example.com/app:1"), When: start, Code: "no-signature", Detail: "the last", Source: "https://example.com/x.aci", Signer: "abcd"}
	must(t, store.Refuse(last))
	again, err := store.Refusals()
	must(t, err)
	if len(again) != cache.MaxRefusals || !reflect.DeepEqual(again[0], last) || !reflect.DeepEqual(again[1:], got[:len(got)-1]) {
		t.Errorf("one more than %d: Refusals = %d, the latest is %+v", cache.MaxRefusals, len(again), again[0])
	}
}

func hostile(t *testing.T, store cache.Store) {
	img := NewImage("example.com/app", "1", 10)
	img.Record.Labels["version"] = "../../../etc/passwd"
	img.Record.Labels["a"] = strings.Repeat("ä", 20_000)
	img.Refs = []cache.Resolution{
		{Ref: MustRef("example.com/app:../../../etc/passwd")},
		{Ref: MustRef("example.com/app:" + strings.Repeat("%2C", acproxy.MaxLabelLength))},
		{Ref: MustRef("example.com/" + strings.Repeat("a", acproxy.MaxNameLength-12))},
	}
	must(t, Commit(t.Context(), store, img))
	must(t, Check(t.Context(), store, img))
	if got, err := store.Match(MustRef("example.com/app:../../../etc/passwd")); len(got) != 1 || err != nil {
		t.Errorf("Match = %d records, %v, want 1", len(got), err)
	}
	long := NewImage("example.com/long", "9", 11)
	long.Record.Labels["version"] = strings.Repeat("9", 100_000)
	long.Refs = nil
	must(t, Commit(t.Context(), store, long))
	must(t, Check(t.Context(), store, long))
}

func crowd(t *testing.T, store cache.Store) {
	const n = 40
	var images []Image
	for i := range n {
		// Each is committed by two at once, and they all want to be the latest.
		images = append(images, NewImage("example.com/app", fmt.Sprint(i/2), 5000))
	}
	var wg sync.WaitGroup
	for _, img := range images {
		wg.Go(func() {
			if err := Commit(t.Context(), store, img); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	latest, _, err := store.Resolve(t.Context(), MustRef("example.com/app"))
	must(t, err)
	held := false
	for _, img := range images {
		held = held || img.Record.Digest == latest.Digest
		img.Refs = img.Refs[:1]
		must(t, Check(t.Context(), store, img))
	}
	if !held {
		t.Errorf("the latest is %v, which nobody committed", latest.Digest)
	}
}

func calledOff(t *testing.T, store cache.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	img := NewImage("example.com/app", "1", 10)
	p, err := store.Begin(ctx, cache.Arrival{})
	must(t, err)
	_, err = p.Write(img.Blob)
	must(t, err)
	cancel()
	wantErr(t, "Commit", p.Commit(ctx, img.Record, img.Manifest, img.Signature, img.Refs...), context.Canceled)
	_, err = store.Begin(ctx, cache.Arrival{})
	wantErr(t, "Begin", err, context.Canceled)
	_, err = store.Record(img.Record.Digest)
	wantErr(t, "Record", err, acproxy.ErrNotFound)
}
