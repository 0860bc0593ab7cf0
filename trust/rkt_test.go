package trust

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	rktopenpgp "golang.org/x/crypto/openpgp" //nolint:staticcheck // what rkt runs

	"github.com/acproxy/acproxy/trust/trusttest"
)

// An rkt is rkt's key store, as its source and its directories on disk show it to work: what it writes, and what it reads for a name.
type rkt struct {
	t             *testing.T
	system, local string // with trustedkeys below them, as /usr/lib/rkt and /etc/rkt
}

// store does what rkt trust does with a key; rkt's package makes its directories group-writable and set-group-ID.
func (r rkt) store(base, place string, key []byte) {
	r.t.Helper()
	entities, err := rktopenpgp.ReadArmoredKeyRing(bytes.NewReader(key))
	if err != nil {
		r.t.Fatal(err)
	}
	r.write(base, place, fmt.Sprintf("%x", entities[0].PrimaryKey.Fingerprint), key)
}

// mask does what people do who follow rkt's documentation: touch.
func (r rkt) mask(place, fingerprint string) { r.t.Helper(); r.write(r.local, place, fingerprint, nil) }

func (r rkt) write(base, place, name string, content []byte) {
	r.t.Helper()
	dir := filepath.Join(base, "trustedkeys", place)
	mkdir(r.t, dir)
	for at := dir; at != base; at = filepath.Dir(at) {
		chmod(r.t, at, 0o775|os.ModeSetgid)
	}
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
		r.t.Fatal(err)
	}
	chmod(r.t, filepath.Join(dir, name), 0o664)
}

func (r rkt) dirs() Dirs {
	return Dirs{System: filepath.Join(r.system, "trustedkeys"), Local: filepath.Join(r.local, "trustedkeys")}
}

// load returns the fingerprints of the keys that rkt trusts for a name, sorted. Whatever it can't read is an error, for every name.
func (r rkt) load(name string) ([]string, error) {
	host, _, _ := strings.Cut(name, "/")
	trusted := make(map[string]bool)
	for _, step := range []struct{ from, to string }{
		{r.system + "/trustedkeys/root.d", r.system + "/trustedkeys/root.d"},
		{r.local + "/trustedkeys/root.d", r.local + "/trustedkeys/root.d"},
		{r.system + "/trustedkeys/prefix.d/" + host, r.system + "/trustedkeys/prefix.d/" + name},
		{r.local + "/trustedkeys/prefix.d/" + host, r.local + "/trustedkeys/prefix.d/" + name},
	} {
		err := filepath.WalkDir(step.from, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case d.IsDir() && !strings.HasPrefix(step.to, path):
				return filepath.SkipDir
			case d.IsDir():
				return nil
			}
			content, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if len(content) == 0 {
				delete(trusted, d.Name())
				return nil
			}
			entities, err := rktopenpgp.ReadArmoredKeyRing(bytes.NewReader(content))
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			fingerprint := fmt.Sprintf("%x", entities[0].PrimaryKey.Fingerprint)
			if fingerprint != d.Name() {
				return fmt.Errorf("%s holds %s", path, fingerprint)
			}
			trusted[fingerprint] = true
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	var all []string
	for fingerprint := range trusted {
		all = append(all, fingerprint)
	}
	slices.Sort(all)
	return all, nil
}

// same checks that rkt and acproxy trust the same keys for a name.
func (r rkt) same(what, name string, want ...*trusttest.Key) {
	r.t.Helper()
	keyring := load(r.t, r.dirs())
	if problems := keyring.Problems(); len(problems) != 0 {
		r.t.Errorf("%s: Problems = %v", what, problems)
	}
	var ours, wanted []string
	for _, k := range keyring.Keys(name) {
		ours = append(ours, string(k.Fingerprint))
	}
	for _, k := range want {
		wanted = append(wanted, k.Fingerprint())
	}
	slices.Sort(ours)
	slices.Sort(wanted)
	theirs, err := r.load(name)
	if err != nil {
		r.t.Errorf("%s: rkt can't read it: %v", what, err)
	}
	if !slices.Equal(slices.Compact(ours), wanted) {
		r.t.Errorf("%s: for %s acproxy trusts %q, want %q", what, name, ours, wanted)
	}
	if !slices.Equal(theirs, wanted) {
		r.t.Errorf("%s: for %s rkt trusts %q, want %q", what, name, theirs, wanted)
	}
}

func newRkt(t *testing.T) rkt {
	dir := t.TempDir()
	return rkt{t: t, system: dir + "/usr/lib/rkt", local: dir + "/etc/rkt"}
}

func TestADirectoryOfRktWorksUnchanged(t *testing.T) {
	var keys [6]*trusttest.Key
	for i := range keys {
		keys[i] = newKey(t, trusttest.Options{Name: fmt.Sprintf("Key %d", i)})
	}
	root, host, app, gone, excepted, local := keys[0], keys[1], keys[2], keys[3], keys[4], keys[5]
	r := newRkt(t)
	r.store(r.system, "root.d", root.Armored())
	r.store(r.system, "root.d", gone.Armored())
	r.store(r.system, "root.d", excepted.Armored())
	r.store(r.system, "prefix.d/example.com", host.Armored())
	r.store(r.system, "prefix.d/example.com/app", app.Armored())
	r.store(r.local, "prefix.d/example.com/app", local.Armored())
	r.store(r.local, "prefix.d/other.org", host.Armored())
	r.mask("root.d", gone.Fingerprint())
	r.mask("prefix.d/example.com", excepted.Fingerprint())

	const what = "made by rkt"
	r.same(what, "example.com/app", root, host, app, local)
	r.same(what, "example.com/app/web", root, host, app, local)
	r.same(what, "example.com/other", root, host)
	r.same(what, "other.org/app", root, excepted, host)
	r.same(what, "unknown.org/app", root, excepted)

	// The difference that is meant: to rkt, what begins with the same letters is the same prefix.
	theirs, err := r.load("example.com/apple")
	if err != nil || len(theirs) != 4 {
		t.Errorf("for example.com/apple rkt trusts %q (%v), want the keys of example.com/app too", theirs, err)
	}
	if ours := load(t, r.dirs()).Keys("example.com/apple"); len(ours) != 2 {
		t.Errorf("for example.com/apple acproxy trusts %s, want two keys", fingerprints(ours))
	}
}

func TestRktReadsWhatWeWrite(t *testing.T) {
	root, host, app := newKey(t, trusttest.Options{Name: "Root"}), newKey(t, trusttest.Options{Name: "Host", SigningSubkey: true}), newKey(t, trusttest.Options{Name: "App"})
	r := newRkt(t)
	r.store(r.system, "root.d", root.Armored())
	r.store(r.system, "prefix.d/example.com", host.Armored())
	dirs := r.dirs()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	fpr := func(k *trusttest.Key) Fingerprint { return Fingerprint(k.Fingerprint()) }
	r.same("nothing of ours", "example.com/app", root, host)
	// Without armor, and two in a file: rkt would read neither.
	_, err := Add(dirs, "example.com/app", append(app.Binary(), root.Binary()...))
	must(err)
	r.same("added", "example.com/app", root, host, app)
	must(Mask(dirs, "", fpr(root)))
	must(Mask(dirs, "example.com", fpr(host)))
	r.same("masked", "example.com/app", root, app)
	r.same("masked", "example.com/other")
	r.same("masked", "other.org/app")
	must(Remove(dirs, "example.com/app", fpr(root)))
	r.same("removed", "example.com/app", app)
	must(Unmask(dirs, "example.com", fpr(host)))
	must(Unmask(dirs, "", fpr(root)))
	r.same("unmasked", "example.com/app", root, host, app)
}

// A node that shares the directory reads it at any moment, and one file that it can't read stops it.
func TestRktNeverSeesHalfAKey(t *testing.T) {
	key := newKey(t, trusttest.Options{Name: strings.Repeat("Long Name ", 1000)})
	r := newRkt(t)
	done := make(chan error, 1)
	go func() { // It ends by itself, and is waited for below.
		var err error
		for range 100 {
			if _, e := Add(r.dirs(), "example.com/app", key.Armored()); e != nil {
				err = e
			}
		}
		done <- err
	}()
	for {
		if _, err := r.load("example.com/app"); err != nil {
			t.Errorf("rkt: %v", err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			if left, _ := filepath.Glob(r.dirs().Local + "/.*"); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
			return
		default:
		}
	}
}
