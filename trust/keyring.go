package trust

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
)

// Dirs says where trusted keys lie on disk, in rkt's layout:
//
//	root.d/FINGERPRINT                   trusted for every image
//	prefix.d/example.com/app/FINGERPRINT trusted for example.com/app and what lies under it
//
// A file holds one or several public keys and is called by the fingerprint of the first, in lower case. An empty file masks: it takes away
// the trust in the key of that fingerprint that was read before it, in the order system root, local root, system prefix, local prefix,
// shorter prefixes before longer ones. So an empty local file switches off the system's file of the same place and name, and one under a
// prefix switches off a root key for that prefix. A later file of the same name replaces an earlier one.
//
// This is how rkt reads its keys, with three differences: prefixes match by whole segments of the image name; all keys of a file count; and
// within one of the two directories a longer prefix always comes after a shorter one, where rkt goes by the order of names on disk.
type Dirs struct {
	// System is the directory that comes with the system and that acproxy only reads, as /usr/lib/rkt/trustedkeys. "" is none.
	System string
	// Local is the directory that acproxy writes to, as /etc/rkt/trustedkeys. "" is none.
	Local string
}

const (
	rootDir   = "root.d"
	prefixDir = "prefix.d"
)

// A Problem is a file or directory among the trusted keys that can't count. The trust that it may have been meant to give is not given, and
// what it may have been meant to take away is taken away: it masks like an empty file, a directory all that was read before it.
type Problem struct {
	File   string `json:"file"`
	Detail string `json:"detail"` // what is wrong with it and what to do
}

// String returns the file and the detail.
func (p Problem) String() string { return p.File + ": " + p.Detail }

// A Keyring is the set of trusted keys at one moment. It never changes and is safe for concurrent use. The zero Keyring trusts nobody.
type Keyring struct {
	files    []*keyFile // in the order in which they count
	byKeyID  map[uint64][]candidate
	byFile   map[string][]*keyFile // by file name, and by the fingerprint of every key in it
	closed   []*keyFile            // directories that mask everything before them
	revoked  map[Fingerprint]bool  // by any copy of the key, wherever it lies
	problems []Problem
	id       string
}

// A keyFile is one file of trusted keys, or one that masks.
type keyFile struct {
	place  place
	name   string // the file's name
	path   string
	sum    [sha256.Size]byte
	certs  []*certificate // none if the file masks
	broken bool           // it masks because it can't be read
	closed bool           // a directory that can't be read: it masks everything
}

// A place says when a file counts.
type place struct {
	step   int // 0 system root, 1 local root, 2 system prefix, 3 local prefix
	depth  int // the number of segments of the prefix
	prefix string
}

func (p place) origin() Origin {
	if p.step%2 == 0 {
		return System
	}
	return Local
}

func (p place) compare(q place) int {
	return cmp.Or(cmp.Compare(p.step, q.step), cmp.Compare(p.depth, q.depth))
}

// A candidate is a public key that may have made a signature.
type candidate struct {
	file *keyFile
	cert *certificate
	pub  *publicKey
}

// Load reads the trusted keys of both directories. A directory that is missing holds none. What can't be read or isn't as it should be is
// reported by [Keyring.Problems] and never gives trust; Load returns an error only if one of the directories is there and can't be opened.
func Load(dirs Dirs) (*Keyring, error) {
	return newLoader(dirs).load()
}

func newKeyring(files []*keyFile, problems []Problem) *Keyring {
	k := &Keyring{
		files: files, problems: problems,
		byKeyID: make(map[uint64][]candidate), byFile: make(map[string][]*keyFile), revoked: make(map[Fingerprint]bool),
	}
	slices.SortStableFunc(k.files, func(a, b *keyFile) int {
		return cmp.Or(a.place.compare(b.place), cmp.Compare(a.place.prefix, b.place.prefix), cmp.Compare(a.name, b.name))
	})
	sum := sha256.New()
	for _, f := range k.files {
		fmt.Fprintf(sum, "%d %q %q %t %x\n", f.place.step, f.place.prefix, f.name, f.closed, f.sum)
		if f.closed {
			k.closed = append(k.closed, f)
			continue
		}
		k.byFile[f.name] = append(k.byFile[f.name], f)
		for _, c := range f.certs {
			if name := string(c.fingerprint); name != f.name {
				k.byFile[name] = append(k.byFile[name], f)
			}
			if c.revoked {
				k.revoked[c.fingerprint] = true
			}
			for _, pub := range c.all() {
				k.byKeyID[pub.id] = append(k.byKeyID[pub.id], candidate{file: f, cert: c, pub: pub})
			}
		}
	}
	k.id = hex.EncodeToString(sum.Sum(nil))
	return k
}

// ID returns a digest of everything in the keyring that a decision can depend on: two keyrings with the same ID decide alike, so that
// verdicts can be kept under it.
func (k *Keyring) ID() string { return k.id }

// Problems returns what lies among the trusted keys and can't count.
func (k *Keyring) Problems() []Problem { return slices.Clone(k.problems) }

// Keys returns the keys that are trusted for an image name: those of the longest prefix first, root keys last, each in the order of
// fingerprints. Revoked and expired keys are among them, as they decide how a signature is refused.
func (k *Keyring) Keys(name string) []Key {
	var keys []Key
	for _, f := range slices.Backward(k.files) {
		for _, c := range f.certs {
			if k.counts(f, c, name) {
				keys = append(keys, k.key(f, c))
			}
		}
	}
	slices.SortStableFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(len(b.Prefix), len(a.Prefix)), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	return keys
}

// All returns every key that is trusted for anything, by prefix and fingerprint: a key once for each prefix that it is trusted for.
func (k *Keyring) All() []Key {
	var keys []Key
	for _, f := range k.files {
		for _, c := range f.certs {
			if k.counts(f, c, f.place.prefix) {
				keys = append(keys, k.key(f, c))
			}
		}
	}
	slices.SortStableFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(a.Prefix, b.Prefix), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	return keys
}

// Key returns the key with a fingerprint, as it is trusted for its shortest prefix, and whether there is one.
func (k *Keyring) Key(fpr Fingerprint) (Key, bool) {
	all := k.All()
	i := slices.IndexFunc(all, func(key Key) bool { return key.Fingerprint == fpr })
	if i < 0 {
		return Key{}, false
	}
	return all[i], true
}

func (k *Keyring) key(f *keyFile, c *certificate) Key {
	key := c.key()
	key.Prefix, key.File, key.Origin, key.Revoked = f.place.prefix, f.path, f.place.origin(), k.revoked[c.fingerprint]
	return key
}

// counts reports whether a key of a file is trusted for a name: the file's prefix covers the name, and no later file that covers it too
// replaces or masks the key. "" is a name that only root files cover.
func (k *Keyring) counts(f *keyFile, c *certificate, name string) bool {
	return acproxy.HasPrefix(name, f.place.prefix) && k.maskedBy(f, c, name) == nil
}

// maskedBy returns the later file that takes the key's place for a name, nil if there is none.
func (k *Keyring) maskedBy(f *keyFile, c *certificate, name string) *keyFile {
	for _, later := range k.closed {
		if later.place.compare(f.place) > 0 && acproxy.HasPrefix(name, later.place.prefix) {
			return later
		}
	}
	for _, files := range [...][]*keyFile{k.byFile[f.name], k.byFile[string(c.fingerprint)]} {
		for _, later := range files {
			if later.place.compare(f.place) > 0 && acproxy.HasPrefix(name, later.place.prefix) {
				return later
			}
		}
	}
	return nil
}

// prefixesOf returns the prefixes that keys with an ID are trusted for, "" for every name.
func (k *Keyring) prefixesOf(id uint64) []string {
	var prefixes []string
	for _, c := range k.byKeyID[id] {
		if k.counts(c.file, c.cert, c.file.place.prefix) {
			prefixes = append(prefixes, c.file.place.prefix)
		}
	}
	slices.Sort(prefixes)
	return slices.Compact(prefixes)
}

func depth(prefix string) int {
	if prefix == "" {
		return 0
	}
	return strings.Count(prefix, "/") + 1
}
