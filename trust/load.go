package trust

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// settled is how long a file has to be left alone before its times are believed: one that changes twice within a tick of the file system's
// clock looks unchanged the second time.
const settled = 2 * time.Second

// A loader reads the trusted keys and remembers what it has read, so that the next time only what has changed is opened. That makes looking
// often cheap, and it makes a passing shortage (no file descriptors, an I/O error) harmless: a file that is provably the one that was read
// before, by its inode, size and times, stays as it was, and everything else that can't be read trusts nothing.
type loader struct {
	dirs  Dirs
	files map[string]*readFile // by path
	lists map[string]*readList

	seen  map[string]identity // all that the last load looked at, with what was there
	retry bool                // the last load met something that may be different the next time although it doesn't look so
	watch []string            // the directories of the last load
}

type readFile struct {
	is      identity
	settled bool    // is can be relied on
	file    keyFile // without its place
	problem string
}

type readList struct {
	is      identity
	settled bool
	names   []string
}

func newLoader(dirs Dirs) *loader {
	return &loader{dirs: dirs, files: make(map[string]*readFile), lists: make(map[string]*readList)}
}

// A walk is one load of one directory.
type walk struct {
	*loader
	base     string
	root     *os.Root // opened when something has to be read
	files    []*keyFile
	problems []Problem
	used     map[string]bool
	errs     []error
}

// load reads both directories. The keyring is never nil, and safe to use even with an error.
func (l *loader) load() (*Keyring, error) {
	l.seen, l.retry, l.watch = make(map[string]identity), false, nil
	var files []*keyFile
	var problems []Problem
	var errs []error
	used := make(map[string]bool)
	for step, dir := range []string{l.dirs.System, l.dirs.Local} {
		if dir == "" {
			continue
		}
		w := &walk{loader: l, base: dir, used: used}
		w.walkDir(step)
		if w.root != nil {
			errs = append(errs, w.root.Close())
		}
		files, problems, errs = append(files, w.files...), append(problems, w.problems...), append(errs, w.errs...)
	}
	maps.DeleteFunc(l.files, func(p string, _ *readFile) bool { return !used[p] })
	maps.DeleteFunc(l.lists, func(p string, _ *readList) bool { return !used[p] })
	return newKeyring(files, problems), errors.Join(errs...)
}

// changed reports whether anything may be different from what the last load saw. It opens nothing.
func (l *loader) changed() bool {
	if l.retry {
		return true
	}
	for p, was := range l.seen {
		if identify(p) != was {
			return true
		}
	}
	return false
}

// walkDir reads one of the two directories; step is its place among the root directories.
func (w *walk) walkDir(step int) {
	if w.see(w.base).missing {
		return
	}
	w.watch = append(w.watch, w.base)
	if err := w.safe(w.base, os.Stat); err != nil {
		if !isPathError(err) && !w.isDir("") {
			w.errs = append(w.errs, fmt.Errorf("reading the trusted keys: %s: %w", w.base, err))
		}
		w.close(place{step: step}, w.base, err)
		w.close(place{step: step + 2}, w.base, err)
		return
	}
	w.walkRoot(step)
	w.walkPrefix(prefixDir, "", step+2)
	if w.seen[w.path(rootDir)].missing && w.seen[w.path(prefixDir)].missing && w.isDir("trustedkeys") {
		w.problem(w.base, "it holds neither "+rootDir+" nor "+prefixDir+": if this is rkt's configuration directory, write "+w.path("trustedkeys"))
	}
}

func (w *walk) walkRoot(step int) {
	at := place{step: step}
	for _, name := range w.list(rootDir, at) {
		rel := path.Join(rootDir, name)
		if w.isDir(rel) {
			w.problem(w.path(rel), "there are no directories in "+rootDir+": keys for a prefix go into "+prefixDir)
			continue
		}
		w.file(rel, at)
	}
}

func (w *walk) walkPrefix(dir, prefix string, step int) {
	at := place{step: step, depth: depth(prefix), prefix: prefix}
	for _, name := range w.list(dir, at) {
		rel, below := path.Join(dir, name), path.Join(prefix, name)
		switch {
		case !w.isDir(rel) && prefix == "":
			w.problem(w.path(rel), "it lies directly in "+prefixDir+": a key that is trusted for every image goes into "+rootDir)
		case !w.isDir(rel):
			w.file(rel, at)
		case acproxy.CheckName(below) != nil:
			w.problem(w.path(rel), fmt.Sprintf("%q is not the prefix of an image name", clip(below)))
		default:
			w.walkPrefix(rel, below, step)
		}
	}
}

// list returns the names in a directory, sorted.
func (w *walk) list(rel string, at place) []string {
	full := w.path(rel)
	is := w.see(full)
	if is.missing {
		return nil
	}
	w.used[full] = true
	w.watch = append(w.watch, full)
	if err := w.safe(full, os.Lstat); err != nil {
		w.close(at, full, err)
		return nil
	}
	if known, ok := w.lists[full]; ok && known.is == is && known.settled {
		return known.names
	}
	names, err := w.readNames(rel)
	if err != nil {
		delete(w.lists, full)
		w.close(at, full, err)
		return nil
	}
	w.lists[full] = &readList{is: is, settled: w.settles(is), names: names}
	return names
}

func (w *walk) readNames(rel string) ([]string, error) {
	root, err := w.open()
	if err != nil {
		return nil, err
	}
	d, err := root.Open(rel)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	// Names that begin with two dots are how Kubernetes keeps the versions of what it mounts.
	names = slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(name, "..") || strings.HasPrefix(name, durable.TempPrefix)
	})
	slices.Sort(names)
	return names, nil
}

// open returns the directory as a root that symbolic links can't lead out of.
func (w *walk) open() (*os.Root, error) {
	if w.root != nil {
		return w.root, nil
	}
	root, err := os.OpenRoot(w.base)
	if err == nil {
		w.root = root
	}
	return root, err
}

// safe returns an error if a directory is none, or if everybody may add to it and remove from it.
func (w *walk) safe(full string, stat func(string) (fs.FileInfo, error)) error {
	info, err := stat(full)
	switch {
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return errors.New("it is a symbolic link, which is not followed for directories")
	case !info.IsDir():
		return errors.New("it is not a directory")
	case info.Mode().Perm()&0o002 != 0:
		return errors.New("every user of this machine can write to it: chmod o-w")
	}
	return nil
}

func (w *walk) isDir(rel string) bool {
	info, err := os.Stat(w.path(rel))
	return err == nil && info.IsDir()
}

// file reads one key file.
func (w *walk) file(rel string, at place) {
	full, name := w.path(rel), path.Base(rel)
	is := w.see(full)
	if is.missing {
		// It went away since the directory was read.
		w.retry = true
		return
	}
	w.used[full] = true
	known, ok := w.loader.files[full]
	if !ok || known.is != is || !known.settled {
		known = w.read(rel, name)
		known.is, known.settled = is, w.settles(is)
		w.loader.files[full] = known
	}
	if known.problem != "" {
		w.problem(full, known.problem)
		if !isFingerprint(strings.ToLower(name)) {
			return
		}
	}
	f := known.file
	f.place, f.path, f.name, f.broken = at, full, strings.ToLower(name), known.problem != ""
	w.files = append(w.files, &f)
}

func (w *walk) read(rel, name string) *readFile {
	if !isFingerprint(name) {
		return &readFile{problem: fmt.Sprintf("its name is not a fingerprint: %d hex digits in lower case", fingerprintDigits)}
	}
	data, err := w.readAll(rel)
	if err != nil {
		w.retry = w.retry || isPathError(err)
		return &readFile{problem: plainPath(err)}
	}
	if len(data) == 0 {
		return &readFile{}
	}
	certs, err := readCertificates(data)
	if err != nil {
		return &readFile{problem: err.Error()}
	}
	if got := certs[0].fingerprint; string(got) != name {
		return &readFile{problem: fmt.Sprintf("its name is not its fingerprint: it holds key %s", got)}
	}
	return &readFile{file: keyFile{sum: sha256.Sum256(data), certs: certs}}
}

func (w *walk) readAll(rel string) ([]byte, error) {
	// Without O_NONBLOCK a named pipe would hold the loader up until somebody writes to it.
	root, err := w.open()
	if err != nil {
		return nil, err
	}
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Mode().Perm()&0o002 != 0:
		return nil, errors.New("every user of this machine can write to it: chmod o-w")
	case info.Size() > MaxKeyFile:
		return nil, fmt.Errorf("it is longer than the %d bytes allowed", MaxKeyFile)
	}
	return io.ReadAll(io.LimitReader(f, MaxKeyFile+1))
}

// see records what is at a path.
func (w *walk) see(full string) identity {
	is := identify(full)
	w.seen[full] = is
	return is
}

func (w *walk) path(rel string) string { return filepath.Join(w.base, filepath.FromSlash(rel)) }

func (w *walk) problem(file, detail string) {
	w.problems = append(w.problems, Problem{File: file, Detail: detail})
}

// settles reports whether what was read can be kept until it looks different.
func (w *walk) settles(is identity) bool {
	ok := is.settledAt(time.Now())
	w.retry = w.retry || !ok
	return ok
}

// close makes a directory mask all that was read before it, as nobody knows what it would have masked.
func (w *walk) close(at place, full string, err error) {
	if isPathError(err) {
		w.retry = true
		w.errs = append(w.errs, fmt.Errorf("reading the trusted keys: %w", err))
	}
	problem := Problem{File: full, Detail: plainPath(err) + "; until then nothing that it might mask is trusted"}
	if !slices.Contains(w.problems, problem) {
		w.problems = append(w.problems, problem)
	}
	w.files = append(w.files, &keyFile{place: at, path: full, closed: true})
}

// isPathError reports whether an error comes from the operating system, which may answer otherwise the next time.
func isPathError(err error) bool {
	var p *fs.PathError
	return errors.As(err, &p)
}

// plainPath returns an error of package os without its path, which is told beside it.
func plainPath(err error) string {
	var p *fs.PathError
	if errors.As(err, &p) {
		return "it can't be read: " + p.Err.Error()
	}
	return err.Error()
}
