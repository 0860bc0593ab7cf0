package access

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// lookEvery is how often a file is looked at, at most, while it is used.
const lookEvery = time.Second

// file is what a file says, read again when it has changed. It is safe for concurrent use.
type file[T any] struct {
	path  string
	parse func(path string, content []byte) (T, error)
	now   func() time.Time
	// failed is told when a changed file can't be read. What it said before goes on counting.
	failed func(error)

	said   atomic.Pointer[T]
	looked atomic.Int64 // nanoseconds since 1970

	mu    sync.Mutex
	state os.FileInfo // of the file when it was read last, whatever came of it; nil if there was none
}

// changed reports whether a file isn't the one that was there before, nil standing for none.
func changed(before, now os.FileInfo) bool {
	if before == nil || now == nil {
		return before != nil || now != nil
	}
	return !os.SameFile(before, now) || before.Size() != now.Size() || !before.ModTime().Equal(now.ModTime())
}

// maxFile bounds a file of users or tokens.
const maxFile = 16 << 20

// get returns what the file says.
func (f *file[T]) get() T {
	now := f.now().UnixNano()
	if looked := f.looked.Load(); now-looked >= int64(lookEvery) && f.looked.CompareAndSwap(looked, now) {
		if err := f.load(false); err != nil && f.failed != nil {
			f.failed(err)
		}
	}
	return *f.said.Load()
}

// load reads the file if it has changed, or in any case. A file that isn't there says nothing.
func (f *file[T]) load(always bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		state, err = nil, nil
	}
	if err != nil || !always && f.said.Load() != nil && !changed(f.state, state) {
		return err
	}
	var content []byte
	if state != nil {
		if content, err = readBounded(f.path, maxFile); err != nil {
			return err
		}
	}
	f.state = state
	said, err := f.parse(f.path, content)
	if err != nil {
		return err
	}
	f.said.Store(&said)
	return nil
}
