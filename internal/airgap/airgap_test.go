package airgap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A shelf is an Origin in memory.
type shelf struct {
	records []cache.Record
	refs    map[acproxy.Ref]acproxy.Digest
	blobs   map[acproxy.Digest][]byte
	known   map[string]cache.Discovered

	signatures map[acproxy.Digest][]byte
}

func newShelf() *shelf {
	return &shelf{refs: make(map[acproxy.Ref]acproxy.Digest), blobs: make(map[acproxy.Digest][]byte), known: make(map[string]cache.Discovered), signatures: make(map[acproxy.Digest][]byte)}
}

// put puts an image on the shelf, and returns its record to be changed.
func (s *shelf) put(t testing.TB, name string, labels map[string]string, refs ...string) *cache.Record {
	t.Helper()
	blob := fmt.Appendf(nil, "the bytes of %s %v", name, labels)
	rec := cache.Record{
		Digest: sha256.Sum256(blob), ImageID: sha512.Sum512(blob), Name: name, Labels: labels, Size: int64(len(blob)), Signed: true, Inspected: true, State: cache.OK,
		Modified: time.Unix(1_500_000_000, 0), Signers: []cache.Signer{{Fingerprint: strings.Repeat("a", 40)}},
	}
	s.signatures[rec.Digest] = sign(t, blob)
	rec.SignatureDigest = sha256.Sum256(s.signatures[rec.Digest])
	s.blobs[rec.Digest] = blob
	s.records = append(s.records, rec)
	s.known[name] = cache.Discovered{Name: name, Templates: []cache.Template{{Prefix: name, URL: "https://example.com/{name}-{version}.{ext}"}}}
	full, err := acproxy.NewRef(name, labels)
	if err != nil {
		t.Fatal(err)
	}
	s.refs[full] = rec.Digest
	for _, r := range refs {
		s.refs[mustRef(t, r)] = rec.Digest
	}
	return &s.records[len(s.records)-1]
}

// sign returns a signature, such as nobody has to accept here.
func sign(t testing.TB, blob []byte) []byte {
	t.Helper()
	key, err := signing()
	if err != nil {
		t.Fatal(err)
	}
	b, err := key.Sign(bytes.NewReader(blob), trusttest.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var signing = sync.OnceValues(func() (*trusttest.Key, error) { return trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA}) })

func mustRef(t testing.TB, s string) acproxy.Ref {
	t.Helper()
	ref, err := acproxy.ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func (s *shelf) Ready(context.Context) error { return nil }

func (s *shelf) Images(filter cache.Filter, _ string, _ int) (out []cache.Record, next string, err error) {
	for _, rec := range s.records {
		if acproxy.HasPrefix(rec.Name, filter.Prefix) {
			out = append(out, rec)
		}
	}
	return out, "", nil
}

func (s *shelf) record(digest acproxy.Digest) cache.Record {
	return s.records[slices.IndexFunc(s.records, func(r cache.Record) bool { return r.Digest == digest })]
}

func (s *shelf) Resolve(_ context.Context, ref acproxy.Ref) (cache.Resolution, cache.Record, error) {
	digest, ok := s.refs[ref]
	if !ok {
		return cache.Resolution{}, cache.Record{}, &acproxy.Error{Kind: acproxy.ErrNotFound}
	}
	return cache.Resolution{Ref: ref, Digest: digest}, s.record(digest), nil
}

func (s *shelf) Match(ref acproxy.Ref) (out []cache.Record, err error) {
	for _, rec := range s.records {
		if ref.Matches(rec.Name, rec.Labels) == nil {
			out = append(out, rec)
		}
	}
	return out, nil
}

func (s *shelf) Answers(digest acproxy.Digest) (out []cache.Resolution, err error) {
	for ref, is := range s.refs {
		if is == digest {
			out = append(out, cache.Resolution{Ref: ref, Digest: digest})
		}
	}
	return out, nil
}

func (s *shelf) Signature(digest acproxy.Digest) ([]byte, error) { return s.signatures[digest], nil }

func (s *shelf) Open(digest acproxy.Digest) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s.blobs[digest])), nil
}

func (s *shelf) Known(name string) (cache.Discovered, bool) {
	k, ok := s.known[name]
	return k, ok
}

func (s *shelf) Key(fingerprint string) ([]byte, []string, bool) {
	return []byte("key " + fingerprint), []string{"example.com"}, true
}

func version(v string) map[string]string { return map[string]string{"version": v} }

func chosen(c *Cargo) (out []string) {
	for _, im := range c.Index.Images {
		word := im.Ref().String()
		if im.Absent {
			word = "-" + word
		}
		out = append(out, word)
	}
	slices.Sort(out)
	return out
}

func TestChoose(t *testing.T) {
	s := newShelf()
	// base needs itself by way of ring, which is a circle.
	base := s.put(t, "example.com/base", version("1"), "example.com/base")
	base.Dependencies = []cache.Dependency{{Name: "example.com/ring"}}
	ring := s.put(t, "example.com/ring", version("1"))
	ring.Dependencies = []cache.Dependency{{Name: "example.com/base", Labels: version("1")}}
	app := s.put(t, "example.com/app", version("1"))
	app.Dependencies = []cache.Dependency{{Name: "example.com/base"}, {Name: "example.com/gone", Labels: version("3")}}
	s.put(t, "example.com/app", version("2")).Pinned = true
	byID := s.put(t, "example.com/by-id", version("1"))
	byID.Dependencies = []cache.Dependency{{Name: "example.com/app", ImageID: s.records[3].ImageID}}
	broken := s.put(t, "example.com/broken", version("1"))
	broken.State, broken.Code, broken.Reason = cache.Quarantined, "outside-rootfs", "it breaks a rule"
	s.put(t, "example.com/early", version("1")).Inspected = false
	lost := s.put(t, "example.com/lost", version("1"))
	lost.State, lost.Code, lost.Reason = cache.Quarantined, cache.CodeMissing, "its file is gone"
	for _, tt := range []struct {
		name   string
		choice Choice
		since  map[acproxy.Digest]acproxy.Digest
		want   []string
		lacks  []string // "!" is a note
	}{
		{"with what it needs", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/app:1")}}, nil,
			[]string{"example.com/app:1", "example.com/base:1", "example.com/ring:1"}, []string{"example.com/gone:3 not-held"}},
		{"alone", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/app:1")}, Alone: true}, nil, []string{"example.com/app:1"}, nil},
		{"all that fit", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/app")}, Alone: true}, nil, []string{"example.com/app:1", "example.com/app:2"}, nil},
		{"pinned", Choice{Pinned: true}, nil, []string{"example.com/app:2"}, nil},
		{"by image ID", Choice{Prefixes: []string{"example.com/by-id"}}, nil, []string{"example.com/app:2", "example.com/by-id:1"}, nil},
		{"a prefix with nothing under it", Choice{Prefixes: []string{"example.com/ap"}}, nil, nil, []string{"example.com/ap not-held"}},
		{"what is not there", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/app:9"), mustRef(t, "example.com/app:9")}}, nil, nil, []string{"example.com/app:9 not-held"}},
		{"what may not be served", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/broken:1"), mustRef(t, "example.com/lost:1"), mustRef(t, "example.com/early:1")}}, nil, nil,
			[]string{"example.com/broken:1 outside-rootfs", "example.com/lost:1 blob-missing", "example.com/early:1 not-inspected"}},
		{"all", Choice{All: true, Alone: true}, nil, []string{"example.com/app:1", "example.com/app:2", "example.com/base:1", "example.com/by-id:1", "example.com/ring:1"},
			[]string{"!example.com/broken:1 outside-rootfs", "!example.com/early:1 not-inspected", "!example.com/lost:1 blob-missing"}},
		{"since", Choice{Refs: []acproxy.Ref{mustRef(t, "example.com/base")}}, map[acproxy.Digest]acproxy.Digest{base.Digest: base.SignatureDigest, ring.Digest: {1}},
			// The ring is held there with another signature, so it is carried again.
			[]string{"-example.com/base:1", "example.com/ring:1"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Choose(t.Context(), s, tt.choice)
			if err != nil {
				t.Fatal(err)
			}
			// What somebody elsewhere is told of it is the same.
			c = overTheWire(t, c, s)
			c.Leave(tt.since, acproxy.Digest{})
			if got := chosen(c); !slices.Equal(got, tt.want) {
				t.Errorf("chosen are %q, want %q", got, tt.want)
			}
			var lacks []string
			for _, l := range c.Lacks {
				word := l.What + " " + l.Code
				if l.Note {
					word = "!" + word
				}
				lacks = append(lacks, word)
			}
			if !slices.Equal(lacks, tt.lacks) {
				t.Errorf("lacking are %q, want %q", lacks, tt.lacks)
			}
			if len(tt.want) == 0 {
				return
			}
			b, err := bundle.New(c.Index, nil)
			if err != nil {
				t.Fatal(err)
			}
			r, err := b.Stream(t.Context(), 0, c.Open)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if n, err := io.Copy(io.Discard, r); err != nil || n != b.Size() {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
}

func TestNothingKnownOfAName(t *testing.T) {
	s := newShelf()
	s.put(t, "example.com/app", version("1"))
	s.known["example.com/app"] = cache.Discovered{Templates: []cache.Template{{Prefix: "example.com/app", URL: "https://user:secret@example.com/{name}"}}}
	c, err := Choose(t.Context(), s, Choice{All: true})
	if err != nil || len(c.Index.Names) != 0 || len(c.Lacks) != 1 || !c.Lacks[0].Note {
		t.Errorf("%+v, %+v, %v", c.Index.Names, c.Lacks, err)
	}
}

// A taker is a Destination that takes in what isn't refused.
type taker struct {
	refuse map[string]error
	held   map[acproxy.Digest]bool
	took   map[acproxy.Digest][]byte
	taught []string
}

func (k *taker) Examine(c fetch.Carried) (bool, error) {
	if k.held[c.Digest] {
		return true, nil
	}
	return false, k.refuse[c.Name]
}

func (k *taker) Verify(_ context.Context, c fetch.Carried, body io.Reader) error {
	b, err := io.ReadAll(body)
	if err == nil && acproxy.Digest(sha256.Sum256(b)) != c.Digest {
		err = &acproxy.Error{Kind: acproxy.ErrInvalid, Code: bundle.CodeDamaged}
	}
	return err
}

func (k *taker) Take(ctx context.Context, c fetch.Carried, open func() (io.Reader, error)) (fetch.Taken, error) {
	if held, err := k.Examine(c); held || err != nil {
		return fetch.Taken{Held: held}, err
	}
	body, err := open()
	if err == nil {
		err = k.Verify(ctx, c, body)
	}
	if err != nil {
		return fetch.Taken{}, err
	}
	k.took[c.Digest] = c.Signature
	k.held[c.Digest] = true
	return fetch.Taken{Moved: c.Refs}, nil
}

func (k *taker) Teach(name string, _ []discovery.Template) (bool, error) {
	k.taught = append(k.taught, name)
	return true, nil
}

func newTaker() *taker {
	return &taker{refuse: make(map[string]error), held: make(map[acproxy.Digest]bool), took: make(map[acproxy.Digest][]byte)}
}

// overTheWire returns a cargo as who reads its waybill has it.
func overTheWire(t *testing.T, c *Cargo, from Source) *Cargo {
	t.Helper()
	text, err := json.Marshal(c.Waybill())
	if err != nil {
		t.Fatal(err)
	}
	var w Waybill
	if err := json.Unmarshal(text, &w); err != nil {
		t.Fatal(err)
	}
	there := w.Cargo(from)
	if len(c.Index.Images) == 0 {
		return there
	}
	here, err := bundle.New(c.Index, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.New(there.Index, nil)
	if err != nil || b.ID() != here.ID() {
		t.Errorf("the bundle is another one by its waybill: %v", err)
	}
	return there
}

func streamOf(t *testing.T, s *shelf, choice Choice) []byte {
	t.Helper()
	c, err := Choose(t.Context(), s, choice)
	if err != nil {
		t.Fatal(err)
	}
	return streamOfCargo(t, c)
}

func streamOfCargo(t *testing.T, c *Cargo) []byte {
	t.Helper()
	b, err := bundle.New(c.Index, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.Stream(t.Context(), 0, c.Open)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func takeIn(t *testing.T, in Intake, k *taker, stream []byte) (Summary, map[string]string) {
	t.Helper()
	r, err := bundle.NewReader(bundle.Plain(bytes.NewReader(stream)), nil)
	if err != nil {
		t.Fatal(err)
	}
	outcomes := make(map[string]string)
	in.Told = func(o Outcome) { outcomes[o.Image] = o.Outcome }
	sum, err := in.Take(t.Context(), k, r)
	if err != nil {
		t.Fatal(err)
	}
	return sum, outcomes
}

func TestTakeIn(t *testing.T) {
	s := newShelf()
	for _, name := range []string{"a", "b", "c", "d"} {
		s.put(t, "example.com/"+name, version("1"))
	}
	stream := streamOf(t, s, Choice{All: true})
	k := newTaker()
	k.refuse["example.com/b"] = &acproxy.Error{Kind: acproxy.ErrRefused, Code: "unknown-key"}
	k.refuse["example.com/d"] = errors.New("the disk is broken")
	k.held[s.records[2].Digest] = true
	sum, outcomes := takeIn(t, Intake{}, k, stream)
	for name, want := range map[string]string{"a": Imported, "b": Refused, "c": Present, "d": Failed} {
		if got := outcomes["example.com/"+name+":1"]; got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if sum.Good() || !sum.Some() || sum.Images != 4 || sum.Imported != 1 || sum.Held != 1 || sum.Refused != 1 || sum.Failed != 1 {
		t.Errorf("sum: %+v", sum)
	}
	if got := k.took[s.records[0].Digest]; !bytes.Equal(got, s.signatures[s.records[0].Digest]) {
		t.Errorf("it came with the signature %q", got)
	}
	// Of names of which nothing is here nothing is learned.
	if !slices.Equal(k.taught, []string{"example.com/a", "example.com/c"}) {
		t.Errorf("taught: %q", k.taught)
	}
}

func TestDryRunTakesNothing(t *testing.T) {
	s := newShelf()
	s.put(t, "example.com/a", version("1"))
	s.put(t, "example.com/b", version("1"))
	stream := streamOf(t, s, Choice{All: true})
	k := newTaker()
	k.held[s.records[1].Digest] = true
	// What is held is read in a dry run all the same: whether the bundle is whole is what was asked.
	at := bytes.Index(stream, s.blobs[s.records[1].Digest])
	stream[at]++
	sum, outcomes := takeIn(t, Intake{DryRun: true}, k, stream)
	if len(k.took) > 0 || len(k.taught) > 0 {
		t.Error("something was taken in")
	}
	if outcomes["example.com/a:1"] != Verified || outcomes["example.com/b:1"] != Damaged || sum.Good() {
		t.Errorf("%v, %+v", outcomes, sum)
	}
}

func TestDelta(t *testing.T) {
	s := newShelf()
	s.put(t, "example.com/a", version("1"))
	s.put(t, "example.com/b", version("1"))
	since := map[acproxy.Digest]acproxy.Digest{s.records[0].Digest: s.records[0].SignatureDigest}
	c, err := Choose(t.Context(), s, Choice{All: true})
	if err != nil {
		t.Fatal(err)
	}
	c.Leave(since, acproxy.Digest{1})
	stream := streamOfCargo(t, c)
	if bytes.Contains(stream, s.blobs[s.records[0].Digest]) {
		t.Error("it carries what is there")
	}
	k := newTaker()
	_, outcomes := takeIn(t, Intake{}, k, stream)
	if outcomes["example.com/a:1"] != Missing || outcomes["example.com/b:1"] != Imported {
		t.Errorf("on a side that lacks it: %v", outcomes)
	}
	k.held[s.records[0].Digest] = true
	if sum, outcomes := takeIn(t, Intake{}, k, stream); !sum.Good() || outcomes["example.com/a:1"] != Present {
		t.Errorf("on a side that has it: %v", outcomes)
	}
}

func TestReceiptOfAStore(t *testing.T) {
	s := newShelf()
	s.put(t, "example.com/a", version("1"), "example.com/a")
	s.put(t, "example.com/b", version("1")).State = cache.Quarantined
	r, err := Receipt(t.Context(), s)
	if err != nil || len(r.Images) != 1 || r.Images[0].Digest != s.records[0].Digest || len(r.Images[0].Refs) != 2 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestSite(t *testing.T) {
	s := newShelf()
	full := map[string]string{"version": "1", "os": "linux", "arch": "amd64"}
	s.put(t, "example.com/app", full, "example.com/app,os=linux,arch=amd64", "example.com/app:1")
	s.put(t, "example.com", version("2"))
	s.put(t, "example.org/deep/er", full)
	for _, odd := range []string{"../../../../etc/x", "a/b", "..", "%2e%2e", "a?b", "a#b", `a\b`} {
		s.put(t, "example.com/odd", map[string]string{"version": odd, "os": "linux", "arch": "amd64"})
	}
	// The same URL twice, and a page where another's directory is.
	s.put(t, "example.com/app", map[string]string{"version": "1", "os": "linux", "arch": "amd64", "channel": "beta"})
	s.put(t, "example.com/app/index.html", full)
	dir := t.TempDir()
	for try := range 2 {
		c, err := Choose(t.Context(), s, Choice{All: true})
		if err != nil {
			t.Fatal(err)
		}
		site := Site{Dir: filepath.Join(dir, "site")}
		if try == 1 {
			site.Link = func(string, string) error { return errors.New("this file system has no second names") }
			if err := os.Remove(filepath.Join(dir, "site/example.com/_aci/example.com/app-latest-linux-amd64.aci")); err != nil {
				t.Fatal(err)
			}
		}
		lacks, err := site.Write(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if len(lacks) < 6+2 {
			t.Errorf("lacking are %v", lacks)
		}
		var files []string
		err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				rel, _ := filepath.Rel(dir, path)
				files = append(files, rel)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			ok := strings.HasPrefix(name, "site/example.com/_aci/example.com/app-") || strings.HasPrefix(name, "site/example.com/_aci/example.com-2.aci") ||
				strings.HasPrefix(name, "site/example.org/_aci/example.org/deep/er-1-linux-amd64.aci") || strings.HasPrefix(name, "site/example.com/_aci/example.com/odd-..") ||
				slices.Contains([]string{"site/example.com/index.html", "site/example.com/app/index.html", "site/example.com/odd/index.html", "site/example.org/index.html", "site/example.org/deep/er/index.html"}, name)
			if !ok {
				t.Errorf("there is %s", name)
			}
		}
		for _, want := range []string{"app-1-linux-amd64.aci", "app-1-linux-amd64.aci.asc", "app-latest-linux-amd64.aci", "app-1.aci"} {
			b, err := os.ReadFile(filepath.Join(dir, "site/example.com/_aci/example.com", want))
			if err != nil || strings.HasSuffix(want, ".aci") && !bytes.Equal(b, s.blobs[s.records[0].Digest]) {
				t.Errorf("%s: %q, %v", want, b, err)
			}
		}
		fi, err := os.Stat(filepath.Join(dir, "site/example.com/_aci/example.com/app-1-linux-amd64.aci"))
		if err != nil || !fi.ModTime().Equal(s.records[0].Modified) {
			t.Errorf("its time is not the publisher's: %v", err)
		}
	}
}
