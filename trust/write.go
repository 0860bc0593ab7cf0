package trust

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// Add trusts the public keys in a key file for the image names under a prefix, for every name if the prefix is "", and returns them. Each
// primary key gets a file of its own in the local directory, in armor, as rkt would write it: a file that holds one armored key is kept
// byte for byte. It replaces a file of the same name, and so ends a mask. What Add has written survives a power loss. It returns an error
// matching [acproxy.ErrInvalid] for what [ReadKeys] refuses, for a prefix that is not an image name, and if there is no local directory.
func Add(dirs Dirs, prefix string, key []byte) ([]Key, error) {
	keys, err := ReadKeys(key)
	if err != nil {
		return nil, err
	}
	for i := range keys {
		name, err := localPath(dirs, prefix, keys[i].Fingerprint)
		if err != nil {
			return nil, err
		}
		content := keys[i].Armored()
		if len(keys) == 1 && bytes.Contains(key, []byte(armorBegin)) && bytes.Count(key, []byte(armorBegin)) == 1 {
			content = key
		}
		if err := mkdirAll(filepath.Dir(name)); err != nil {
			return nil, fmt.Errorf("adding key %s: %w", keys[i].Fingerprint, err)
		}
		if err := put(dirs, name, content); err != nil {
			return nil, fmt.Errorf("adding key %s: %w", keys[i].Fingerprint, err)
		}
		keys[i].Prefix, keys[i].File, keys[i].Origin = prefix, name, Local
	}
	return keys, nil
}

// Remove ends the trust in a key for exactly this prefix, by removing its file from the local directory. It returns an error matching
// [acproxy.ErrNotFound] if there is no such file, and one matching [acproxy.ErrInvalid] if the system's directory has the key in the same
// place, which only [Mask] can switch off, or if the file is a mask, which [Unmask] takes away.
func Remove(dirs Dirs, prefix string, fpr Fingerprint) error {
	name, err := localPath(dirs, prefix, fpr)
	if err != nil {
		return err
	}
	if systemHas(dirs, prefix, fpr) {
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "system-key", Detail: fmt.Sprintf("key %s comes with the system, in %s, which acproxy only reads: switch it off with acproxy trust mask %s%s", fpr, dirs.System, prefixFlag(prefix), fpr)}
	}
	switch size, err := sizeOf(name); {
	case err != nil:
		return notThere(dirs, prefix, fpr, err)
	case size == 0:
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "mask", Detail: fmt.Sprintf("%s is empty: it masks a key; acproxy trust unmask %s%s trusts that key again", name, prefixFlag(prefix), fpr)}
	}
	return remove(name)
}

// Mask switches a key off for the image names under a prefix, for every name that no prefix key is for if the prefix is "", by an empty
// file in the local directory. It is the way to distrust a key that comes with the system, and can also except a prefix from a key that is
// trusted for more. It returns an error matching [acproxy.ErrNotFound] if no such key is trusted there, and one matching
// [acproxy.ErrInvalid] if the key is a local one, which [Remove] takes away.
func Mask(dirs Dirs, prefix string, fpr Fingerprint) error {
	name, err := localPath(dirs, prefix, fpr)
	if err != nil {
		return err
	}
	if size, err := sizeOf(name); err == nil && size > 0 && !systemHas(dirs, prefix, fpr) {
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "local-key", Detail: fmt.Sprintf("key %s is in the local directory: acproxy trust rm %s%s removes it", fpr, prefixFlag(prefix), fpr)}
	}
	ring, err := Load(dirs)
	if err != nil {
		return err
	}
	if !ring.covers(prefix, fpr) {
		return notThere(dirs, prefix, fpr, fs.ErrNotExist)
	}
	if err := mkdirAll(filepath.Dir(name)); err != nil {
		return fmt.Errorf("masking key %s: %w", fpr, err)
	}
	if err := put(dirs, name, nil); err != nil {
		return fmt.Errorf("masking key %s: %w", fpr, err)
	}
	return nil
}

// Unmask takes away what [Mask] made. It returns an error matching [acproxy.ErrNotFound] if the key is not masked for exactly this prefix.
func Unmask(dirs Dirs, prefix string, fpr Fingerprint) error {
	name, err := localPath(dirs, prefix, fpr)
	if err != nil {
		return err
	}
	size, err := sizeOf(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmasking key %s: %w", fpr, err)
	}
	if err != nil || size > 0 {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "not-masked", Detail: fmt.Sprintf("key %s is not masked for %s: there is no empty file %s", fpr, shown(prefix), name)}
	}
	return remove(name)
}

// covers reports whether any file gives or gave a key trust for names under a prefix.
func (k *Keyring) covers(prefix string, fpr Fingerprint) bool {
	for _, f := range k.byFile[string(fpr)] {
		if len(f.certs) > 0 && acproxy.HasPrefix(prefix, f.place.prefix) {
			return true
		}
	}
	return false
}

func localPath(dirs Dirs, prefix string, fpr Fingerprint) (string, error) {
	if dirs.Local == "" {
		return "", acproxy.Invalid("there is no local directory for trusted keys")
	}
	if !isFingerprint(string(fpr)) {
		return "", acproxy.Invalid("fingerprint %q is not %d lower-case hex digits", clip(string(fpr)), fingerprintDigits)
	}
	if prefix != "" {
		if err := acproxy.CheckName(prefix); err != nil {
			return "", err
		}
	}
	return keyPath(dirs.Local, prefix, fpr), nil
}

func keyPath(dir, prefix string, fpr Fingerprint) string {
	if prefix == "" {
		return filepath.Join(dir, rootDir, string(fpr))
	}
	return filepath.Join(dir, prefixDir, filepath.FromSlash(prefix), string(fpr))
}

func systemHas(dirs Dirs, prefix string, fpr Fingerprint) bool {
	if dirs.System == "" {
		return false
	}
	size, err := sizeOf(keyPath(dirs.System, prefix, fpr))
	return err == nil && size > 0
}

func sizeOf(name string) (int64, error) {
	info, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func notThere(dirs Dirs, prefix string, fpr Fingerprint, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	detail := fmt.Sprintf("key %s is not trusted for %s", fpr, shown(prefix))
	if ring, err := Load(dirs); err == nil {
		var elsewhere []string
		for _, k := range ring.All() {
			if k.Fingerprint == fpr {
				elsewhere = append(elsewhere, shown(k.Prefix))
			}
		}
		if len(elsewhere) > 0 {
			detail += ", but for " + strings.Join(elsewhere, ", ")
		}
	}
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-key", Detail: detail}
}

// shown returns a prefix as people read it.
func shown(prefix string) string {
	if prefix == "" {
		return "every name (root)"
	}
	return prefix
}

func prefixFlag(prefix string) string {
	if prefix == "" {
		return "--root "
	}
	return "--prefix " + prefix + " "
}

// put replaces a file. Its temporary file stands in the directory itself, where neither rkt nor the loader looks for keys: a node that
// shares the directory would refuse every image for as long as half a key lay beside the others.
func put(dirs Dirs, name string, content []byte) error {
	clean(dirs.Local)
	return durable.Replace(nil, filepath.Join(dirs.Local, durable.TempPrefix+rand.Text()), name, content, 0o644)
}

// leftFor is how old a temporary file is that nobody works on any more.
const leftFor = time.Hour

// clean removes temporary files that were left by commands that were killed.
func clean(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), durable.TempPrefix) {
			continue
		}
		if info, err := entry.Info(); err == nil && time.Since(info.ModTime()) > leftFor {
			// What can't be removed is there for the next one to try.
			_ = os.Remove(filepath.Join(dir, entry.Name()))
		}
	}
}

func remove(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	return durable.OS{}.SyncDir(filepath.Dir(name))
}

// mkdirAll makes a directory and those above it so that they survive a power loss: each new one is synced into the one above it.
func mkdirAll(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	above := filepath.Dir(dir)
	if above == dir {
		return nil
	}
	if err := mkdirAll(above); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.OS{}.SyncDir(above)
}
