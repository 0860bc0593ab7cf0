package trust

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

// How often a Store looks at its directories, and how long it lets a burst of notifications pass first. Notifications are for speed alone:
// they don't reach every file system, and looking does.
const (
	lookEvery = 400 * time.Millisecond
	burst     = 20 * time.Millisecond
)

// A Store is a live view of the trusted keys: what changes on disk, by whoever's hand, counts within a second. It is safe for concurrent
// use.
//
// A change is seen by the inodes, sizes and times of files and directories. A key file that can't be read any more, or a directory that
// can't be listed, trusts nothing from then on, and all that it might mask is masked; but what provably hasn't changed isn't read again, so
// that running out of file descriptors doesn't make the keys go away.
type Store struct {
	current atomic.Pointer[Keyring]

	loading sync.Mutex // guards loader
	loader  *loader

	mu        sync.Mutex // guards listeners
	listeners []*listener

	news    chan struct{}     // holds one element if there may be something to tell the listeners
	watcher *fsnotify.Watcher // nil if there are no notifications
	stop    chan struct{}
	stopped sync.WaitGroup
	once    sync.Once
}

type listener struct{ call func(*Keyring) }

// Open reads the trusted keys and keeps reading them until the store is closed. It returns an error if one of the directories is there and
// can't be read.
func Open(dirs Dirs) (*Store, error) { return open(dirs, true) }

func open(dirs Dirs, notified bool) (*Store, error) {
	l := newLoader(dirs)
	ring, err := l.load()
	if err != nil {
		return nil, err
	}
	s := &Store{loader: l, news: make(chan struct{}, 1), stop: make(chan struct{})}
	s.current.Store(ring)
	if notified {
		// Without a watcher, when the system has no more to give, looking suffices.
		s.watcher, _ = fsnotify.NewWatcher()
		s.watch()
	}
	// The goroutine ends when Close closes s.stop, and Close waits for it.
	s.stopped.Go(func() { s.run(ring) })
	return s, nil
}

// Current returns the keys as they are now. It costs nothing.
func (s *Store) Current() *Keyring { return s.current.Load() }

// Reload looks at the directories now, whether they seem to have changed or not, and returns what it found.
func (s *Store) Reload() *Keyring { return s.reload(true) }

// OnChange makes the store call f after a change of what [Keyring.ID] or [Keyring.Problems] return, with the keyring as it is then. Changes
// in quick succession may come as one call. The calls come one at a time, from a goroutine of the store, and must not call Close. OnChange
// returns a function that ends them; one may be on its way even then.
func (s *Store) OnChange(f func(*Keyring)) (cancel func()) {
	l := &listener{call: f}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listeners = append(s.listeners, l)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.listeners = slices.DeleteFunc(s.listeners, func(o *listener) bool { return o == l })
	}
}

// Close ends the watching and waits until it has ended. [Store.Current] keeps returning the last keys.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() {
		close(s.stop)
		s.stopped.Wait()
		if s.watcher != nil {
			err = s.watcher.Close()
		}
	})
	return err
}

func (s *Store) run(told *Keyring) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var events chan fsnotify.Event
	var errs chan error
	if s.watcher != nil {
		events, errs = s.watcher.Events, s.watcher.Errors
	}
	var settle <-chan time.Time
	for {
		select {
		case <-s.stop:
			return
		case <-events:
			if settle == nil {
				settle = time.After(burst)
			}
		case <-errs: //nolint:errcheck // what it says doesn't matter
			// Events were lost; the next look finds what they would have told.
		case <-settle:
			settle = nil
			s.reload(false)
		case <-look.C:
			s.reload(false)
		case <-s.news:
			if ring := s.Current(); ring != told {
				told = ring
				s.tell(ring)
			}
		}
	}
}

func (s *Store) reload(always bool) *Keyring {
	s.loading.Lock()
	defer s.loading.Unlock()
	before := s.current.Load()
	if !always && !s.loader.changed() {
		return before
	}
	// The keyring is complete without the error: what couldn't be read is among its problems, and masks.
	ring, _ := s.loader.load()
	s.watch()
	if ring.id == before.id && slices.Equal(ring.problems, before.problems) {
		return before
	}
	s.current.Store(ring)
	select {
	case s.news <- struct{}{}:
	default:
	}
	return ring
}

func (s *Store) tell(ring *Keyring) {
	s.mu.Lock()
	listeners := slices.Clone(s.listeners)
	s.mu.Unlock()
	for _, l := range listeners {
		l.call(ring)
	}
}

// watch asks to be told about changes in all directories that were read.
func (s *Store) watch() {
	if s.watcher == nil {
		return
	}
	watched := s.watcher.WatchList()
	for _, dir := range s.loader.watch {
		if !slices.Contains(watched, dir) {
			// A directory that can't be watched is looked at.
			_ = s.watcher.Add(dir)
		}
	}
}
