package trust

import (
	"bytes"
	"crypto"
	"crypto/dsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func fingerprints(keys []Key) string {
	var all []string
	for _, k := range keys {
		all = append(all, k.Prefix+" "+string(k.Fingerprint[:4]))
	}
	return strings.Join(all, ", ")
}

func TestReadKeys(t *testing.T) {
	key := newKey(t, trusttest.Options{SigningSubkey: true, Name: "Carly\x1b[31m", Email: "c@example.com", Expires: now})
	second := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	for name, file := range map[string][]byte{
		"armored": key.Armored(), "binary": key.Binary(), "with text before": append([]byte("Our key:\n\n"), key.Armored()...),
		"the same key twice": append(key.Binary(), key.Binary()...),
	} {
		keys, err := ReadKeys(file)
		if err != nil || len(keys) != 1 {
			t.Errorf("%s: ReadKeys = %d keys, %v", name, len(keys), err)
			continue
		}
		k := keys[0]
		if string(k.Fingerprint) != key.Fingerprint() || k.Algorithm != "RSA 2048" || !k.Expires.Equal(now) || k.Revoked || len(k.SigningIDs) != 2 || k.SigningIDs[1] != key.KeyID() {
			t.Errorf("%s: ReadKeys = %+v", name, k)
		}
		if len(k.UserIDs) != 1 || strings.Contains(k.UserIDs[0], "\x1b") || !strings.Contains(k.UserIDs[0], "c@example.com") {
			t.Errorf("%s: user IDs %q", name, k.UserIDs)
		}
		if again, err := ReadKeys(k.Armored()); err != nil || len(again) != 1 || again[0].Fingerprint != k.Fingerprint {
			t.Errorf("%s: Armored can't be read back: %v", name, err)
		}
		if err := k.RktReadable(); err != nil {
			t.Errorf("%s: RktReadable = %v", name, err)
		}
	}
	for name, file := range map[string][]byte{
		"two keys in one block":  append(key.Binary(), second.Binary()...),
		"two keys in two blocks": append(key.Armored(), second.Armored()...),
	} {
		keys, err := ReadKeys(file)
		if err != nil || len(keys) != 2 || string(keys[0].Fingerprint) != key.Fingerprint() || string(keys[1].Fingerprint) != second.Fingerprint() {
			t.Errorf("%s: ReadKeys = %s, %v", name, fingerprints(keys), err)
			continue
		}
		if keys[1].RktReadable() == nil || keys[1].Algorithm != "Ed25519" {
			t.Errorf("%s: the second key is %s and rkt can read it", name, keys[1].Algorithm)
		}
	}
	for name, test := range map[string]struct {
		file []byte
		want string
	}{
		"a secret key":                   {key.SecretArmored(), "SECRET"},
		"a secret key behind a public":   {append(key.Armored(), second.SecretArmored()...), "SECRET"},
		"empty":                          {nil, "empty"},
		"a web page":                     {[]byte("<html>"), "neither"},
		"a signature":                    {sign(t, key, trusttest.SignOptions{}), "PGP SIGNATURE"},
		"a binary signature":             {sign(t, key, trusttest.SignOptions{Binary: true}), "packet of type 2"},
		"half a key":                     {key.Binary()[:200], "not a public key"},
		"a key without a user ID":        {key.Binary()[:subkeyPrefix(t, key)], "can't be read"},
		"a good key and then half a one": {append(key.Binary(), second.Binary()[:40]...), "not a public key"},
	} {
		if _, err := ReadKeys(test.file); !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: ReadKeys = %v, want something about %q", name, err, test.want)
		}
	}
}

// subkeyPrefix returns the length of the primary key's packet.
func subkeyPrefix(t *testing.T, k *trusttest.Key) int {
	t.Helper()
	b := k.Binary()
	return 3 + (int(b[1])-192)<<8 + int(b[2]) + 192
}

func TestParseFingerprint(t *testing.T) {
	const want = "8b86de38890ddb7291867b025210bd8888182190"
	for _, s := range []string{want, strings.ToUpper(want), "0x" + want, "8B86 DE38 890D DB72 9186  7B02 5210 BD88 8818 2190"} {
		if got, err := ParseFingerprint(s); err != nil || got != want {
			t.Errorf("ParseFingerprint(%q) = %q, %v", s, got, err)
		}
	}
	for _, s := range []string{"", want[:39], want + "0", want[:39] + "g", "88182190", "5210bd8888182190", "../" + want} {
		if got, err := ParseFingerprint(s); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("ParseFingerprint(%q) = %q, %v", s, got, err)
		}
	}
}

func TestMasks(t *testing.T) {
	a := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	b := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	key, fpr := string(a.Armored()), a.Fingerprint()
	both := string(append(a.Armored(), b.Armored()...))
	for _, test := range []struct {
		name  string
		files map[string]string // below the test's directory
		image string
		want  int // how many of the two keys are trusted
	}{
		{"a system root key", map[string]string{"s/root.d/": key}, "example.com/app", 1},
		{"a system root key masked", map[string]string{"s/root.d/": key, "l/root.d/": ""}, "example.com/app", 0},
		{"a system prefix key", map[string]string{"s/prefix.d/example.com/": key}, "example.com/app", 1},
		{"a system prefix key masked", map[string]string{"s/prefix.d/example.com/": key, "l/prefix.d/example.com/": ""}, "example.com/app", 0},
		{"a system prefix key masked for less", map[string]string{"s/prefix.d/example.com/": key, "l/prefix.d/example.com/app/": ""}, "example.com/other", 1},
		{"a system prefix key masked for this", map[string]string{"s/prefix.d/example.com/": key, "l/prefix.d/example.com/app/": ""}, "example.com/app/web", 0},
		{"a mask for a neighbour", map[string]string{"s/prefix.d/example.com/": key, "l/prefix.d/example.com/app/": ""}, "example.com/apple", 1},
		{"a root key masked for a prefix", map[string]string{"s/root.d/": key, "l/prefix.d/example.com/": ""}, "example.com/app", 0},
		{"a root key masked for another prefix", map[string]string{"s/root.d/": key, "l/prefix.d/example.com/": ""}, "other.org/app", 1},
		{"a local root key masked for a prefix", map[string]string{"l/root.d/": key, "l/prefix.d/example.com/": ""}, "example.com/app", 0},
		{"a root mask comes before prefix keys", map[string]string{"s/prefix.d/example.com/": key, "l/root.d/": ""}, "example.com/app", 1},
		{"a local key below a mask", map[string]string{"s/root.d/": key, "l/prefix.d/example.com/": "", "l/prefix.d/example.com/app/": key}, "example.com/app", 1},
		{"a mask below a local key", map[string]string{"l/prefix.d/example.com/": key, "l/prefix.d/example.com/app/": ""}, "example.com/app", 0},
		{"a mask takes both keys of the file", map[string]string{"s/root.d/": both, "l/root.d/": ""}, "example.com/app", 0},
		{"both keys of a file", map[string]string{"s/root.d/": both}, "example.com/app", 2},
		{"a broken local file masks too", map[string]string{"s/root.d/": key, "l/root.d/": "rubbish"}, "example.com/app", 0},
		{"a local copy takes the system's place", map[string]string{"s/root.d/": key, "l/root.d/": key}, "example.com/app", 1},
		{"no directories at all", nil, "example.com/app", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for at, content := range test.files {
				writeFile(t, filepath.Join(dir, at, fpr), content, 0o644)
			}
			keys := load(t, Dirs{System: filepath.Join(dir, "s"), Local: filepath.Join(dir, "l")})
			if got := keys.Keys(test.image); len(got) != test.want {
				t.Errorf("Keys = %s, want %d", fingerprints(got), test.want)
			}
		})
	}
}

func TestFilesThatCannotCount(t *testing.T) {
	good, other := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	fpr := good.Fingerprint()
	key := string(good.Armored())
	for _, test := range []struct {
		name string
		make func(t *testing.T, local, outside string)
		want string
	}{
		{"another key's name", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/"+fpr, string(other.Armored()), 0o644) }, "its name is not its fingerprint"},
		{"not a fingerprint", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/publisher.asc", key, 0o644) }, "not a fingerprint"},
		{"upper case", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/"+strings.ToUpper(fpr), key, 0o644) }, "not a fingerprint"},
		{"writable by everybody", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/"+fpr, key, 0o666) }, "chmod o-w"},
		{"rubbish", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/"+fpr, "rubbish", 0o644) }, "not a public key"},
		{"a secret key", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/"+fpr, string(good.SecretArmored()), 0o600) }, "SECRET"},
		{"too long", func(t *testing.T, l, _ string) {
			writeFile(t, l+"/root.d/"+fpr, key+strings.Repeat("\n", MaxKeyFile), 0o644)
		}, "longer than"},
		{"a link that leads out", func(t *testing.T, l, out string) {
			writeFile(t, out+"/"+fpr, key, 0o644)
			mkdir(t, l+"/root.d")
			symlink(t, out+"/"+fpr, l+"/root.d/"+fpr)
		}, "escapes"},
		{"a link to nothing", func(t *testing.T, l, _ string) {
			mkdir(t, l+"/root.d")
			symlink(t, "nothing", l+"/root.d/"+fpr)
		}, "no such file"},
		{"a named pipe", func(t *testing.T, l, _ string) {
			mkdir(t, l+"/root.d")
			if err := syscall.Mkfifo(l+"/root.d/"+fpr, 0o644); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
		{"a directory in root.d", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d/example.com/"+fpr, key, 0o644) }, "no directories"},
		{"a key directly in prefix.d", func(t *testing.T, l, _ string) { writeFile(t, l+"/prefix.d/"+fpr, key, 0o644) }, "directly in prefix.d"},
		{"a prefix that is none", func(t *testing.T, l, _ string) { writeFile(t, l+"/prefix.d/Example.com/"+fpr, key, 0o644) }, "not the prefix"},
		{"a directory that everybody can write to", func(t *testing.T, l, _ string) {
			writeFile(t, l+"/root.d/"+fpr, key, 0o644)
			chmod(t, l+"/root.d", 0o777)
		}, "chmod o-w"},
		{"a linked directory", func(t *testing.T, l, out string) {
			writeFile(t, out+"/"+fpr, key, 0o644)
			mkdir(t, l+"/prefix.d")
			symlink(t, out, l+"/prefix.d/example.com")
		}, "symbolic link"},
		{"root.d is a file", func(t *testing.T, l, _ string) { writeFile(t, l+"/root.d", key, 0o644) }, "not a directory"},
		{"rkt's configuration directory itself", func(t *testing.T, l, _ string) { writeFile(t, l+"/trustedkeys/root.d/"+fpr, key, 0o644) }, "/trustedkeys"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			local := filepath.Join(dir, "local")
			mkdir(t, local)
			test.make(t, local, filepath.Join(dir, "outside"))
			keys := load(t, Dirs{Local: local})
			if got := keys.Keys("example.com/app"); len(got) != 0 {
				t.Errorf("Keys = %s, want none", fingerprints(got))
			}
			problems := fmt.Sprint(keys.Problems())
			if len(keys.Problems()) != 1 || !strings.Contains(problems, test.want) || !strings.Contains(problems, local) {
				t.Errorf("Problems = %s, want one about %q", problems, test.want)
			}
		})
	}
}

func TestADirectoryThatCannotBeTrustedMasksWhatCameBefore(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dir := t.TempDir()
	dirs := Dirs{System: dir + "/s", Local: dir + "/l"}
	writeFile(t, dir+"/s/root.d/"+key.Fingerprint(), string(key.Armored()), 0o644)
	mkdir(t, dir+"/l/prefix.d/example.com/app")
	chmod(t, dir+"/l/prefix.d/example.com/app", 0o777)
	keys := load(t, dirs)
	if got := keys.Keys("example.com/app/web"); len(got) != 0 {
		t.Errorf("Keys = %s: somebody may have removed a mask", fingerprints(got))
	}
	if got := keys.Keys("example.com/other"); len(got) != 1 {
		t.Errorf("Keys = %s: other prefixes have nothing to do with it", fingerprints(got))
	}
}

func TestLoadOfAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trustedkeys")
	writeFile(t, file, "", 0o644)
	if _, err := Load(Dirs{System: file}); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("Load = %v, want an error that names %s", err, file)
	}
	if _, err := Open(Dirs{Local: file}); err == nil {
		t.Error("Open of a file succeeds")
	}
}

func TestKubernetesMounts(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	root := t.TempDir() + "/root.d"
	writeFile(t, root+"/..2026_03_01/"+key.Fingerprint(), string(key.Armored()), 0o644)
	symlink(t, "..2026_03_01", root+"/..data")
	symlink(t, "..data/"+key.Fingerprint(), root+"/"+key.Fingerprint())
	keys := load(t, Dirs{Local: filepath.Dir(root)})
	if len(keys.Keys("example.com/app")) != 1 || len(keys.Problems()) != 0 {
		t.Errorf("Keys = %s, Problems = %v", fingerprints(keys.Keys("example.com/app")), keys.Problems())
	}
}

func TestIDIsOfWhatDecisionsDependOn(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dir := t.TempDir()
	dirs := Dirs{System: dir + "/s", Local: dir + "/l"}
	seen := map[string]string{}
	step := func(name string, same bool, change func()) {
		t.Helper()
		change()
		id := load(t, dirs).ID()
		if before, ok := seen[id]; ok != same {
			t.Errorf("%s: ID is the same as %q: %t, want %t", name, before, ok, same)
		}
		seen[id] = name
	}
	step("empty", false, func() {})
	step("a key", false, func() { writeFile(t, dir+"/s/root.d/"+key.Fingerprint(), string(key.Armored()), 0o644) })
	step("a file that is no key", true, func() { writeFile(t, dir+"/s/root.d/README", "", 0o644) })
	step("touched", true, func() { writeFile(t, dir+"/s/root.d/"+key.Fingerprint(), string(key.Armored()), 0o600) })
	step("masked", false, func() { writeFile(t, dir+"/l/root.d/"+key.Fingerprint(), "", 0o644) })
	step("revoked", false, func() {
		if err := key.Revoke(); err != nil {
			t.Fatal(err)
		}
		writeFile(t, dir+"/s/root.d/"+key.Fingerprint(), string(key.Armored()), 0o644)
	})
}

func TestWriting(t *testing.T) {
	a, b := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), newKey(t, trusttest.Options{})
	dir := t.TempDir()
	dirs := Dirs{System: dir + "/s", Local: dir + "/deep/l"}
	fa, fb := Fingerprint(a.Fingerprint()), Fingerprint(b.Fingerprint())
	const prefix = "example.com/app"

	// Add.
	withText := append([]byte("Our key:\n\n"), a.Armored()...)
	keys, err := Add(dirs, prefix, withText)
	if err != nil {
		t.Fatal(err)
	}
	file := dirs.Local + "/prefix.d/example.com/app/" + a.Fingerprint()
	if len(keys) != 1 || keys[0].File != file || keys[0].Prefix != prefix {
		t.Errorf("Add = %+v", keys)
	}
	if got, _ := os.ReadFile(file); !bytes.Equal(got, withText) {
		t.Errorf("an armored key was not kept as it is: %q", got)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if keys, err = Add(dirs, "", append(a.Binary(), b.Binary()...)); err != nil || len(keys) != 2 {
		t.Fatalf("Add of two keys = %d, %v", len(keys), err)
	}
	if err := RktCheckKey(mustRead(t, dirs.Local+"/root.d/"+b.Fingerprint())); err != nil {
		t.Errorf("rkt can't read what was added: %v", err)
	}
	if k, ok := load(t, dirs).Key(fb); !ok || k.Prefix != "" || k.Origin != Local {
		t.Errorf("Key = %+v, %t", k, ok)
	}
	if got := load(t, dirs).All(); len(got) != 3 {
		t.Errorf("All = %s, want three", fingerprints(got))
	}
	for name, call := range map[string]func() error{
		"a prefix that is none": func() error { _, err := Add(dirs, "../../etc", a.Armored()); return err },
		"a secret key":          func() error { _, err := Add(dirs, prefix, a.SecretArmored()); return err },
		"no local directory":    func() error { _, err := Add(Dirs{System: dir}, prefix, a.Armored()); return err },
		"no fingerprint":        func() error { return Remove(dirs, prefix, "../../../etc/passwd") },
		"masking a local key":   func() error { return Mask(dirs, prefix, fa) },
	} {
		if err := call(); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}

	// Remove.
	if err := Remove(dirs, prefix, fa); err != nil {
		t.Fatal(err)
	}
	err = Remove(dirs, prefix, fa)
	if !errors.Is(err, acproxy.ErrNotFound) || !strings.Contains(err.Error(), "root") {
		t.Errorf("Remove again = %v, want ErrNotFound and where else it is trusted", err)
	}
	if err := Remove(dirs, "", fa); err != nil {
		t.Fatal(err)
	}

	// A system key.
	writeFile(t, dir+"/s/root.d/"+a.Fingerprint(), string(a.Armored()), 0o644)
	if err := Remove(dirs, "", fa); !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), "acproxy trust mask --root "+a.Fingerprint()) {
		t.Errorf("Remove of a system key = %v, want it to say how to mask it", err)
	}
	if err := Mask(dirs, "", "0000000000000000000000000000000000000000"); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Mask of a key that isn't there = %v", err)
	}
	if err := Mask(dirs, "", fa); err != nil {
		t.Fatal(err)
	}
	if got := load(t, dirs).Keys(prefix); len(got) != 1 {
		t.Errorf("masked: Keys = %s", fingerprints(got))
	}
	if err := Unmask(dirs, "", fa); err != nil {
		t.Fatal(err)
	}
	if got := load(t, dirs).Keys(prefix); len(got) != 2 {
		t.Errorf("unmasked: Keys = %s", fingerprints(got))
	}
	if err := Unmask(dirs, "", fa); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Unmask again = %v", err)
	}
	// A root key can be excepted for a prefix.
	if err := Mask(dirs, prefix, fb); err != nil {
		t.Fatal(err)
	}
	if err := Remove(dirs, prefix, fb); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("Remove of a mask = %v", err)
	}
	if got := load(t, dirs).Keys(prefix); len(got) != 1 {
		t.Errorf("excepted: Keys = %s", fingerprints(got))
	}
	if _, err := Add(dirs, prefix, b.Armored()); err != nil {
		t.Fatal(err)
	}
	if got := load(t, dirs).Keys(prefix); len(got) != 2 {
		t.Errorf("adding ends a mask: Keys = %s", fingerprints(got))
	}
	if got, _ := filepath.Glob(dirs.Local + "/root.d/.*"); len(got) != 0 {
		t.Errorf("left behind: %q", got)
	}
}

// TestWritingRemovesWhatWasLeft has temporary files lie about: one that a killed command has left hours ago, and one of a command that is at work.
func TestWritingRemovesWhatWasLeft(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	dirs := Dirs{Local: t.TempDir()}
	left, current := filepath.Join(dirs.Local, ".tmp-LEFT"), filepath.Join(dirs.Local, ".tmp-CURRENT")
	for _, name := range []string{left, current} {
		writeFile(t, name, "half a key", 0o644)
	}
	then := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(left, then, then); err != nil {
		t.Fatal(err)
	}
	if _, err := Add(dirs, "example.com", key.Armored()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Lstat of what was left = %v, want that it is gone", err)
	}
	if _, err := os.Lstat(current); err != nil {
		t.Error(err)
	}
}

func TestRefusalSaysWhichFileSwitchesTheKeyOff(t *testing.T) {
	key := newKey(t, trusttest.Options{})
	dir := t.TempDir()
	dirs := Dirs{System: dir + "/s", Local: dir + "/l"}
	writeFile(t, dir+"/s/root.d/"+key.Fingerprint(), string(key.Armored()), 0o644)
	if err := Mask(dirs, "", Fingerprint(key.Fingerprint())); err != nil {
		t.Fatal(err)
	}
	sig := sign(t, key, trusttest.SignOptions{})
	a, err := load(t, dirs).Judge(Question{Name: "example.com/app", Signature: sig, Now: now})
	if got := outcome(t, a, err); got != UnknownKey || !strings.Contains(err.Error(), dir+"/l/root.d/"+key.Fingerprint()) {
		t.Errorf("Judge = %v", err)
	}
}

func TestZeroKeyringTrustsNobody(t *testing.T) {
	var k Keyring
	sig := sign(t, newKey(t, trusttest.Options{}), trusttest.SignOptions{})
	a, err := k.Judge(Question{Name: "example.com/app", Signature: sig, Now: now})
	if got := outcome(t, a, err); got != UnknownKey {
		t.Errorf("Judge = %v", err)
	}
	if len(k.Keys("example.com/app")) != 0 || len(k.All()) != 0 {
		t.Error("the zero keyring has keys")
	}
}

func mkdir(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func chmod(t testing.TB, name string, perm os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, perm); err != nil {
		t.Fatal(err)
	}
}

func symlink(t testing.TB, to, at string) {
	t.Helper()
	mkdir(t, filepath.Dir(at))
	if err := os.Symlink(to, at); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKeysThatTakeForeverAreRefused(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}).Binary()
	r := bytes.NewReader(key)
	packets := packet.NewOpaqueReader(r)
	for range 2 {
		if _, err := packets.Next(); err != nil {
			t.Fatal(err)
		}
	}
	// What is left is the user ID's self-signature.
	self := key[len(key)-r.Len():]
	repeated := func(n int) []byte { return append(bytes.Clone(key[:len(key)-len(self)]), bytes.Repeat(self, n)...) }
	if _, err := ReadKeys(repeated(maxSelfSignatures)); err != nil {
		t.Errorf("%d self-signatures: %v", maxSelfSignatures, err)
	}
	if _, err := ReadKeys(repeated(maxSelfSignatures + 1)); !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), "self-signatures") {
		t.Errorf("%d self-signatures: %v", maxSelfSignatures+1, err)
	}
	for _, test := range []struct {
		name string
		pub  *packet.PublicKey
		want string
	}{
		{"RSA at the limit", packet.NewRSAPublicKey(now, &rsa.PublicKey{N: ones(maxKeyBits), E: 65537}), "user ID"},
		{"RSA above it", packet.NewRSAPublicKey(now, &rsa.PublicKey{N: ones(maxKeyBits + 1), E: 65537}), "16385 bits"},
		{"DSA", packet.NewDSAPublicKey(now, &dsa.PublicKey{Parameters: dsa.Parameters{P: ones(maxKeyBits + 1), Q: ones(256), G: ones(2)}, Y: ones(3)}), "16385 bits"},
		{"DSA with a long subgroup", packet.NewDSAPublicKey(now, &dsa.PublicKey{Parameters: dsa.Parameters{P: ones(1024), Q: ones(maxSubgroupBits + 1), G: ones(2)}, Y: ones(3)}), "513 bits"},
	} {
		var b bytes.Buffer
		if err := test.pub.Serialize(&b); err != nil {
			t.Fatal(err)
		}
		id := packet.NewUserId("Slow", "", "")
		if err := id.Serialize(&b); err != nil {
			t.Fatal(err)
		}
		// A self-signature that names the key and is no good: the limit has to come before it is verified.
		e := &packet.Signature{Version: 4, SigType: packet.SigTypePositiveCert, PubKeyAlgo: packet.PubKeyAlgoEdDSA, Hash: crypto.SHA256, CreationTime: now, IssuerKeyId: &test.pub.KeyId}
		signer, err := openpgp.NewEntity("x", "", "", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Sign(crypto.SHA256.New(), signer.PrivateKey, nil); err != nil {
			t.Fatal(err)
		}
		if err := e.Serialize(&b); err != nil {
			t.Fatal(err)
		}
		forged := bytes.ReplaceAll(b.Bytes(), signer.PrimaryKey.Fingerprint, test.pub.Fingerprint)
		if _, err := ReadKeys(forged); !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: ReadKeys = %v, want something about %q", test.name, err, test.want)
		}
	}
}

// ones returns a number of so many bits.
func ones(bits uint) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), bits)
	return n.Sub(n, big.NewInt(1))
}
