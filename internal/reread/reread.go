// Package reread keeps what files say, and reads them again when they have changed.
package reread

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// lookEvery is how often files are looked at, at most, while what they say is used.
const lookEvery = time.Second

// Files is what some files say. They are looked at when that is used, at most once a second, so that no notification has to come for a change to count. It is
// safe for concurrent use.
type Files[T any] struct {
	paths  []string
	read   func() (T, error)
	failed func(error)
	now    func() time.Time

	said   atomic.Pointer[T]
	looked atomic.Int64 // nanoseconds since 1970

	mu    sync.Mutex
	state []os.FileInfo // of the files when they were read last; nil for one that wasn't there

	told atomic.Pointer[string] // what failed was told last, "" if they were read since
}

// Open reads files, with a function that turns them into what they say. failed is told when they can't be read after a change: what they said before goes on
// counting. nil means that nobody is told.
func Open[T any](paths []string, read func() (T, error), failed func(error)) (*Files[T], error) {
	f := &Files[T]{paths: paths, read: read, failed: failed, now: time.Now, state: make([]os.FileInfo, len(paths))}
	f.looked.Store(f.now().UnixNano())
	return f, f.Reload()
}

// Get returns what the files say.
func (f *Files[T]) Get() T {
	now := f.now().UnixNano()
	if looked := f.looked.Load(); now-looked >= int64(lookEvery) && f.looked.CompareAndSwap(looked, now) {
		f.tell(f.load(false))
	}
	return *f.said.Load()
}

// Reload reads the files now. If they can't be read, what they said before goes on counting.
func (f *Files[T]) Reload() error { return f.load(true) }

// Prepare reads the files now, and returns what has what they say count from then on.
func (f *Files[T]) Prepare() (commit func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change, err := f.prepare(true)
	if err != nil {
		return nil, err
	}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		change()
	}, nil
}

// tell says of an error, once, why files couldn't be read.
func (f *Files[T]) tell(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	before := f.told.Swap(&text)
	if err != nil && f.failed != nil && (before == nil || *before != text) {
		f.failed(err)
	}
}

func (f *Files[T]) load(always bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	commit, err := f.prepare(always)
	if err == nil {
		commit()
	}
	return err
}

// prepare reads the files if they have changed, or always. The caller holds mu. What can't be read is tried again at the next look: it may have been a lack of
// descriptors that kept it from being read.
func (f *Files[T]) prepare(always bool) (commit func(), err error) {
	state := make([]os.FileInfo, len(f.paths))
	another := always
	for i, path := range f.paths {
		fi, err := os.Stat(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			state[i] = fi
		}
		another = another || changed(f.state[i], state[i])
	}
	if !another {
		return func() {}, nil
	}
	// The state was taken before reading: what is written meanwhile is read again.
	said, err := f.read()
	if err != nil {
		return nil, err
	}
	return func() {
		f.state = state
		f.said.Store(&said)
	}, nil
}

// changed reports whether a file isn't the one that was there before, nil standing for none.
func changed(before, now os.FileInfo) bool {
	if before == nil || now == nil {
		return before != nil || now != nil
	}
	return !os.SameFile(before, now) || before.Size() != now.Size() || !before.ModTime().Equal(now.ModTime())
}
