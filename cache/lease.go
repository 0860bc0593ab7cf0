package cache

import (
	"os"
	"sync"

	"github.com/acproxy/acproxy"
)

// A Blob is the open file of an image, held or arriving. As long as it is open the image is in use: it is not evicted, and if an operator deletes
// it, the space that it takes counts as taken. The caller closes it.
type Blob struct {
	*os.File
	once   sync.Once
	closed error
	done   func()
}

// Close closes the file. Only the first call does anything; the others return what it returned.
func (b *Blob) Close() error {
	b.once.Do(func() {
		b.closed = b.File.Close()
		b.done()
	})
	return b.closed
}

// leases know which files are open, so that what is in use stays, and what has no name any more and yet is open is counted.
type leases struct {
	space *space

	mu   sync.Mutex
	open map[acproxy.Digest]*lease // of blobs at their place that are open, or about to lose their place
}

// A lease counts who has one file open. Its fields are guarded by the mutex of its leases.
type lease struct {
	readers  int            // those for whom the file has to stay
	watchers int            // those who can do without it
	digest   acproxy.Digest // under which it is among the open ones; zero if the file is no blob, or not at its place any more
	going    bool           // the file is about to lose its place
	missed   bool           // it kept an image from being evicted
	left     int64          // bytes to release when nobody has the file open any more, because it has no name
}

func (l *lease) idle() bool { return l.readers == 0 && l.watchers == 0 }

func (l *lease) add(watch bool, n int) {
	if watch {
		l.watchers += n
	} else {
		l.readers += n
	}
}

// take notes that somebody is about to open a blob. It returns nil if the blob is about to lose its place; who has the lock of its digest never
// sees that. After opening, stands says whether the file is the one that the lease is for.
func (ls *leases) take(digest acproxy.Digest, watch bool) *lease {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.entry(digest)
	if l.going {
		return nil
	}
	l.add(watch, 1)
	return l
}

func (ls *leases) entry(digest acproxy.Digest) *lease {
	l := ls.open[digest]
	if l == nil {
		if ls.open == nil {
			ls.open = make(map[acproxy.Digest]*lease)
		}
		l = &lease{digest: digest}
		ls.open[digest] = l
	}
	return l
}

// join is take for the file of an arriving image.
func (ls *leases) join(l *lease) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.readers++
}

// stands reports whether the blob of a lease is at its place and stays there for now.
func (ls *leases) stands(l *lease) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return !l.digest.IsZero() && !l.going
}

// give ends what take or join began.
func (ls *leases) give(l *lease, watch bool) {
	ls.mu.Lock()
	l.add(watch, -1)
	var left int64
	if l.idle() {
		left, l.left = l.left, 0
		if !l.digest.IsZero() && !l.going {
			delete(ls.open, l.digest)
		}
	}
	missed := l.missed && l.readers == 0
	ls.mu.Unlock()
	if left > 0 {
		ls.space.release(left)
	}
	if missed {
		ls.space.loosen()
	}
}

// blob returns an open file with the lease that was taken for it.
func (ls *leases) blob(f *os.File, l *lease) *Blob {
	return &Blob{File: f, done: func() { ls.give(l, false) }}
}

// inUse reports whether a blob has to stay because somebody reads it. If so, the end of that is told to space.
func (ls *leases) inUse(digest acproxy.Digest) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.open[digest]
	if l == nil || l.readers == 0 {
		return false
	}
	l.missed = true
	return true
}

// busy reports whether anybody has the file of an arriving image open.
func (ls *leases) busy(l *lease) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return !l.idle()
}

// leave notes that a blob is about to lose its place: nobody can open it until gone, replaced or stays is called. It reports false, and changes
// nothing, if somebody reads it and force isn't set. The caller holds the lock of its digest.
func (ls *leases) leave(digest acproxy.Digest, force bool) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.entry(digest)
	if l.readers > 0 && !force {
		return false
	}
	l.going = true
	return true
}

// stays takes back what leave said.
func (ls *leases) stays(digest acproxy.Digest) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.open[digest]
	if l == nil {
		return
	}
	l.going = false
	if l.idle() {
		delete(ls.open, digest)
	}
}

// gone notes that a blob's file, of some size, has lost its place. It returns the size if nobody has the file open; otherwise 0, and the size is
// released with the last one to close it.
func (ls *leases) gone(digest acproxy.Digest, size int64) (free int64) {
	return ls.unlinked(ls.replaced(digest, new(lease)), size)
}

// replaced notes that an arriving image has come to the place of a blob, with those who read it. It returns the lease of the blob that was there; who
// calls it tells unlinked of that one.
func (ls *leases) replaced(digest acproxy.Digest, by *lease) *lease {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.entry(digest)
	l.digest, l.going = acproxy.Digest{}, false
	delete(ls.open, digest)
	if !by.idle() {
		by.digest = digest
		ls.open[digest] = by
	}
	return l
}

// unlinked is gone for a file that is not at the place of a blob.
func (ls *leases) unlinked(l *lease, size int64) (free int64) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if l.idle() {
		return size
	}
	l.left += size
	return 0
}
