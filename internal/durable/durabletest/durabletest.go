// Package durabletest is a file system that fails, fails although it was done, and loses power on demand.
package durabletest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/acproxy/acproxy/internal/durable"
)

// ErrPower is what every call returns once the power is off.
var ErrPower = errors.New("the power is off")

// A Mode is what happens at the call that is chosen to go wrong.
type Mode int

const (
	Fail           Mode = iota // it does nothing and returns an error; a write does half
	FailThoughDone             // it is done, and returns an error
	PowerCut                   // it is done, and then the power fails: every later call returns ErrPower
)

// String returns the mode in words.
func (m Mode) String() string {
	return [...]string{"fails", "fails though done", "power cut"}[m]
}

// An FS works on a directory of the operating system and remembers what of it has been synced. It counts the calls that change something;
// one of them can be made to go wrong. Directories are not renamed or removed, and files are not linked. What is changed in the directory past
// it is not seen. It is safe for concurrent use.
type FS struct {
	root string

	mu    sync.Mutex
	calls []string
	at    int
	mode  Mode
	err   error
	off   bool
	dirs  map[string]*dir
}

// dir is a directory: as it is, and as it was when it was last synced.
type dir struct{ now, synced map[string]*node }

// node is a file, or the directory of its path.
type node struct {
	isDir       bool
	now, synced []byte
}

var _ durable.FS = (*FS)(nil)

// New returns an FS for a directory. What is in it already counts as synced.
func New(root string) (*FS, error) {
	f := &FS{root: filepath.Clean(root), dirs: make(map[string]*dir)}
	err := filepath.WalkDir(f.root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n := &node{isDir: entry.IsDir()}
		if n.isDir {
			f.dirs[path] = &dir{now: make(map[string]*node), synced: make(map[string]*node)}
		} else if n.now, err = os.ReadFile(path); err != nil {
			return err
		}
		n.synced = n.now
		if path != f.root {
			parent := f.dirs[filepath.Dir(path)]
			parent.now[filepath.Base(path)], parent.synced[filepath.Base(path)] = n, n
		}
		return nil
	})
	return f, err
}

// Break makes the call with this number go wrong, counted from 1 from now on. The error of a failing call is err, or EIO if that is nil.
func (f *FS) Break(at int, mode Mode, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		err = syscall.EIO
	}
	f.calls, f.at, f.mode, f.err = nil, at, mode, err
}

// Calls returns the calls since Break, or New, each with the path it was about.
func (f *FS) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// PowerOff makes every later call return [ErrPower].
func (f *FS) PowerOff() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.off = true
}

// call counts a call and lets it happen or not. half, if there is one, is what a failing call does all the same.
func (f *FS) call(what, path string, do, half func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.off {
		return ErrPower
	}
	rel, _ := filepath.Rel(f.root, path)
	f.calls = append(f.calls, what+" "+rel)
	if len(f.calls) != f.at {
		return do()
	}
	failure := &fs.PathError{Op: what, Path: path, Err: f.err}
	switch f.mode {
	case Fail:
		if half != nil {
			return errors.Join(failure, half())
		}
		return failure
	case FailThoughDone:
		return errors.Join(failure, do())
	}
	f.off = true
	return do()
}

func (f *FS) parent(path string) (*dir, error) {
	d := f.dirs[filepath.Dir(path)]
	if d == nil {
		return nil, &fs.PathError{Op: "model", Path: path, Err: fs.ErrNotExist}
	}
	return d, nil
}

// MkdirAll implements [durable.FS].
func (f *FS) MkdirAll(path string, perm fs.FileMode) error {
	path = filepath.Clean(path)
	return f.call("mkdir", path, func() error {
		if err := os.MkdirAll(path, perm); err != nil {
			return err
		}
		if path != f.root && !strings.HasPrefix(path, f.root+string(filepath.Separator)) {
			return fmt.Errorf("%s is not under %s", path, f.root)
		}
		for ; f.dirs[path] == nil; path = filepath.Dir(path) {
			f.dirs[path] = &dir{now: make(map[string]*node), synced: make(map[string]*node)}
			if parent := f.dirs[filepath.Dir(path)]; parent != nil {
				parent.now[filepath.Base(path)] = &node{isDir: true}
			}
		}
		return nil
	}, nil)
}

// Create implements [durable.FS].
func (f *FS) Create(name string, perm fs.FileMode) (durable.File, error) {
	var file *File
	err := f.call("create", name, func() error {
		parent, err := f.parent(name)
		if err != nil {
			return err
		}
		opened, err := durable.OS{}.Create(name, perm)
		if err != nil {
			return err
		}
		n := &node{}
		parent.now[filepath.Base(name)] = n
		file = &File{File: opened, fs: f, node: n}
		return nil
	}, nil)
	if err != nil {
		if file != nil {
			err = errors.Join(err, file.File.Close())
		}
		return nil, err
	}
	return file, nil
}

// OpenFile implements [durable.FS].
func (f *FS) OpenFile(name string) (durable.File, error) {
	var file *File
	err := f.call("open", name, func() error {
		parent, err := f.parent(name)
		if err != nil {
			return err
		}
		n := parent.now[filepath.Base(name)]
		if n == nil {
			return &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		opened, err := durable.OS{}.OpenFile(name)
		if err != nil {
			return err
		}
		file = &File{File: opened, fs: f, node: n}
		return nil
	}, nil)
	if err != nil {
		if file != nil {
			err = errors.Join(err, file.File.Close())
		}
		return nil, err
	}
	return file, nil
}

// Rename implements [durable.FS]. A file that the FS doesn't know is renamed and stays unknown.
func (f *FS) Rename(from, to string) error {
	return f.call("rename", to, func() error {
		source, err := f.parent(from)
		if err != nil {
			return err
		}
		target, err := f.parent(to)
		if err != nil {
			return err
		}
		if err := os.Rename(from, to); err != nil {
			return err
		}
		if n := source.now[filepath.Base(from)]; n != nil {
			target.now[filepath.Base(to)] = n
			delete(source.now, filepath.Base(from))
		}
		return nil
	}, nil)
}

// Remove implements [durable.FS].
func (f *FS) Remove(name string) error {
	return f.call("remove", name, func() error {
		parent, err := f.parent(name)
		if err != nil {
			return err
		}
		delete(parent.now, filepath.Base(name))
		return os.Remove(name)
	}, nil)
}

// SyncDir implements [durable.FS]. Nothing is synced for real: power is lost in [FS.Crash] only.
func (f *FS) SyncDir(path string) error {
	path = filepath.Clean(path)
	return f.call("syncdir", path, func() error {
		d := f.dirs[path]
		if d == nil {
			if _, err := os.Stat(path); err != nil || strings.HasPrefix(path, f.root) {
				return &fs.PathError{Op: "syncdir", Path: path, Err: fs.ErrNotExist}
			}
			// The directory that holds the root is none of ours.
			return nil
		}
		d.synced = maps.Clone(d.now)
		return nil
	}, nil)
}

// A File is an open file of an [FS].
type File struct {
	durable.File
	fs   *FS
	node *node
}

var _ durable.File = (*File)(nil)

// Write implements [io.Writer].
func (file *File) Write(b []byte) (n int, err error) {
	write := func(b []byte) func() error {
		return func() (err error) {
			n, err = file.File.Write(b)
			file.node.now = append(slices.Clip(file.node.now), b[:n]...)
			return err
		}
	}
	err = file.fs.call("write", file.Name(), write(b), write(b[:len(b)/2]))
	return n, err
}

// WriteAt implements [io.WriterAt].
func (file *File) WriteAt(b []byte, offset int64) (n int, err error) {
	write := func(b []byte) func() error {
		return func() (err error) {
			n, err = file.File.WriteAt(b, offset)
			now := make([]byte, max(len(file.node.now), int(offset)+n))
			copy(now, file.node.now)
			copy(now[offset:], b[:n])
			file.node.now = now
			return err
		}
	}
	err = file.fs.call("writeat", file.Name(), write(b), write(b[:len(b)/2]))
	return n, err
}

// Truncate implements [durable.File].
func (file *File) Truncate(size int64) error {
	return file.fs.call("truncate", file.Name(), func() error {
		now := make([]byte, size)
		copy(now, file.node.now)
		file.node.now = now
		return file.File.Truncate(size)
	}, nil)
}

// Sync implements [durable.File].
func (file *File) Sync() error {
	return file.fs.call("sync", file.Name(), func() error {
		file.node.synced = file.node.now
		return nil
	}, nil)
}

// Close implements [io.Closer]. It is not a call that goes wrong on its own account: it has nothing to lose.
func (file *File) Close() error { return file.File.Close() }

// Survival says what a crash leaves of that which wasn't synced.
type Survival struct {
	name   string
	random *rand.Rand
	all    bool
}

// String returns the survival in words.
func (s Survival) String() string { return s.name }

// Nothing leaves only what was synced.
func Nothing() Survival { return Survival{name: "only what was synced survives"} }

// Everything leaves all: the process was killed, and the machine lived on.
func Everything() Survival { return Survival{name: "everything survives", all: true} }

// Some leaves of each unsynced change of a directory and of each unsynced content, independently, all or nothing; of content also a part, or
// zeros. What was only appended to stays as it was synced. The same seed leaves the same.
func Some(seed uint64) Survival {
	return Survival{name: fmt.Sprintf("some of it survives, seed %d", seed), random: rand.New(rand.NewPCG(seed, 0))}
}

// Crash turns the power off and writes what is left after it to an empty directory.
func (f *FS) Crash(to string, survival Survival) error {
	f.PowerOff()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.crash(f.root, to, survival)
}

// Kill turns the power off for whoever has used f, and writes all there is to an empty directory. It returns an FS for that as the next process finds it after
// this one was killed: nothing is lost, and what wasn't synced still isn't.
func (f *FS) Kill(to string) (*FS, error) {
	if err := f.Crash(to, Everything()); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	next := &FS{root: filepath.Clean(to), dirs: make(map[string]*dir)}
	for path, d := range f.dirs {
		rel, err := filepath.Rel(f.root, path)
		if err != nil {
			return nil, err
		}
		next.dirs[filepath.Join(next.root, rel)] = &dir{now: maps.Clone(d.now), synced: maps.Clone(d.synced)}
	}
	return next, nil
}

func (f *FS) crash(path, to string, s Survival) error {
	if err := os.MkdirAll(to, 0o750); err != nil {
		return err
	}
	d := f.dirs[path]
	left := maps.Clone(d.synced)
	names := slices.Sorted(maps.Keys(d.now))
	for name := range d.synced {
		if d.now[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if d.now[name] == d.synced[name] || !s.keeps() {
			continue
		}
		if left[name] = d.now[name]; left[name] == nil {
			delete(left, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		n, child := left[name], filepath.Join(to, name)
		var err error
		if n.isDir {
			err = f.crash(filepath.Join(path, name), child, s)
		} else {
			err = os.WriteFile(child, s.content(n), 0o640)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s Survival) keeps() bool {
	return s.all || s.random != nil && s.random.IntN(2) == 0
}

func (s Survival) content(n *node) []byte {
	switch {
	case s.all || slices.Equal(n.now, n.synced):
		return n.now
	case s.random == nil:
		return n.synced
	}
	// What was synced and only appended to since is there.
	kept := 0
	if bytes.HasPrefix(n.now, n.synced) {
		kept = len(n.synced)
	}
	switch s.random.IntN(4) {
	case 0:
		return n.synced
	case 1:
		return n.now[:kept+s.random.IntN(len(n.now)-kept+1)]
	case 2:
		return append(n.now[:kept:kept], make([]byte, len(n.now)-kept)...)
	}
	return n.now
}
