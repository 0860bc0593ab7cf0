package trust

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy/trust/trusttest"
)

// await returns the next keyring that a store tells about and that satisfies ok, or fails the test after the second that is promised.
func await(t *testing.T, told <-chan *Keyring, what string, ok func(*Keyring) bool) {
	t.Helper()
	deadline := time.After(time.Second)
	for {
		select {
		case k := <-told:
			if ok(k) {
				return
			}
		case <-deadline:
			t.Errorf("%s: not seen within a second", what)
			return
		}
	}
}

func openStore(t *testing.T, dirs Dirs, notified bool) (*Store, <-chan *Keyring) {
	t.Helper()
	s, err := open(dirs, notified)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close again = %v", err)
		}
	})
	told := make(chan *Keyring, 100)
	s.OnChange(func(k *Keyring) { told <- k })
	return s, told
}

func TestStoreSeesEveryChange(t *testing.T) {
	for _, notified := range []bool{true, false} {
		name := "with notifications"
		if !notified {
			name = "by looking alone"
		}
		t.Run(name, func(t *testing.T) {
			a, b := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
			dir := t.TempDir()
			dirs := Dirs{System: filepath.Join(dir, "s"), Local: filepath.Join(dir, "not/there/yet")}
			s, told := openStore(t, dirs, notified)
			count := func(n int) func(*Keyring) bool {
				return func(k *Keyring) bool { return len(k.Keys("example.com/app")) == n }
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			_, err := Add(dirs, "example.com/app", a.Armored())
			must(err)
			await(t, told, "a key in directories that are new", count(1))
			_, err = Add(dirs, "", b.Armored())
			must(err)
			await(t, told, "a second key", count(2))
			must(Remove(dirs, "example.com/app", Fingerprint(a.Fingerprint())))
			await(t, told, "a key that was removed", count(1))
			file := keyPath(dirs.Local, "", Fingerprint(b.Fingerprint()))
			must(b.Revoke())
			must(os.WriteFile(file, b.Armored(), 0o644))
			await(t, told, "a key that was revoked in place", func(k *Keyring) bool { return count(1)(k) && k.Keys("example.com/app")[0].Revoked })
			must(os.Chmod(file, 0o666))
			await(t, told, "a file that everybody can write to", func(k *Keyring) bool { return count(0)(k) && len(k.Problems()) == 1 })
			must(os.Chmod(file, 0o644))
			await(t, told, "and not any more", count(1))
			must(os.Rename(file, file+".bak"))
			await(t, told, "a file that was renamed", count(0))
			must(os.Rename(file+".bak", file))
			await(t, told, "and renamed back", count(1))
			must(os.RemoveAll(dirs.Local))
			await(t, told, "the directory removed", count(0))
			if s.Current().ID() != load(t, dirs).ID() {
				t.Error("the store's keyring is another one than what is on disk")
			}
		})
	}
}

func TestReloadIsAtOnce(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dirs := Dirs{Local: t.TempDir()}
	s, _ := openStore(t, dirs, true)
	if _, err := Add(dirs, "", key.Armored()); err != nil {
		t.Fatal(err)
	}
	if got := s.Reload(); len(got.All()) != 1 || s.Current() != got {
		t.Errorf("Reload = %s", fingerprints(got.All()))
	}
	if again := s.Reload(); again != s.Current() {
		t.Error("nothing changed, and the keyring is another one")
	}
}

func TestACancelledListenerIsNotCalled(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dirs := Dirs{Local: t.TempDir()}
	s, told := openStore(t, dirs, true)
	cancel := s.OnChange(func(*Keyring) { t.Error("called") })
	cancel()
	if _, err := Add(dirs, "", key.Armored()); err != nil {
		t.Fatal(err)
	}
	await(t, told, "the other listener", func(k *Keyring) bool { return len(k.All()) == 1 })
}

// A loader that can't open anything any more keeps what provably hasn't changed, and nothing else.
func TestRunningOutOfFilesTakesNoKeyAway(t *testing.T) {
	keep, change, gone := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dirs := Dirs{Local: t.TempDir()}
	for prefix, key := range map[string]*trusttest.Key{"keep.example.com": keep, "change.example.com": change, "gone.example.com": gone} {
		if _, err := Add(dirs, prefix, key.Armored()); err != nil {
			t.Fatal(err)
		}
	}
	l := newLoader(dirs)
	if _, err := l.load(); err != nil {
		t.Fatal(err)
	}
	if !l.changed() {
		t.Error("files that were changed a moment ago are believed to be settled")
	}
	// Time passes for all of them, as far as the loader can tell.
	for _, f := range l.files {
		f.settled = true
	}
	for _, d := range l.lists {
		d.settled = true
	}
	l.retry = false
	if l.changed() {
		t.Error("nothing changed, and the loader says so")
	}
	changed := keyPath(dirs.Local, "change.example.com", Fingerprint(change.Fingerprint()))
	if err := os.WriteFile(changed, []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	k, err := l.load()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err != nil || len(k.Problems()) != 1 || !strings.Contains(k.Problems()[0].Detail, "too many open files") {
		t.Errorf("load = %v, Problems = %v", err, k.Problems())
	}
	want := func(what string, k *Keyring, counts map[string]int) {
		t.Helper()
		for name, n := range counts {
			if got := k.Keys(name); len(got) != n {
				t.Errorf("%s: %s: Keys = %s, want %d", what, name, fingerprints(got), n)
			}
		}
	}
	want("nothing can be opened", k, map[string]int{"keep.example.com": 1, "change.example.com": 0, "gone.example.com": 1})
	if !l.changed() {
		t.Error("a file that couldn't be read is not tried again")
	}
	if err := os.RemoveAll(filepath.Join(dirs.Local, prefixDir, "gone.example.com")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(changed, change.Armored(), 0o644); err != nil {
		t.Fatal(err)
	}
	if k, err = l.load(); err != nil {
		t.Fatal(err)
	}
	want("all can be opened again", k, map[string]int{"keep.example.com": 1, "change.example.com": 1, "gone.example.com": 0})
}
