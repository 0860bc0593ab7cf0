package cache

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// spoolExt ends the names of spools, which are among what isn't whole yet: what a process has left of them, the next one removes.
const spoolExt = ".spool"

// A Spool is a file of bytes that can be made again, kept to be read more often than they are made. It counts as space that is taken, as all else does, but
// nothing is evicted for it, and it goes before anything else when something needs the space, even while it is written. It doesn't outlive the process, so that
// nothing of it is synced.
//
// One goroutine writes it and calls Keep or Discard. After Keep, Open and Discard may be called by any, at any time.
type Spool struct {
	disk  *Disk
	what  string
	path  string
	lease *lease
	size  atomic.Int64
	gone  atomic.Bool // set once, with the mutex of the disk held

	// promised is what counts for it, in bytes; guarded by the mutex of the disk's space.
	promised int64

	// These are guarded by the mutex of the disk.
	used, kept time.Time

	mu   sync.Mutex   // held while the file is written, closed or removed
	file durable.File // nil once it is closed
}

// Spool begins a spool of so many bytes; less than 0 means that nobody knows how many. What it is stands in the log when it is evicted. It returns an error
// matching [acproxy.ErrNoSpace] if there is no space that is free.
func (d *Disk) Spool(what string, size int64) (*Spool, error) {
	if d.readOnly {
		return nil, noSpace(syscall.EROFS)
	}
	s := &Spool{disk: d, what: what, path: d.temp() + spoolExt, lease: new(lease)}
	if err := s.promise(max(0, size)); err != nil {
		return nil, err
	}
	var err error
	if s.file, err = d.fsys.Create(s.path, filePerm); err != nil {
		d.space.promiseSpool(s, -s.promised)
		return nil, noSpace(err)
	}
	d.mu.Lock()
	closed := d.closed
	s.used = d.now()
	d.spools[s.path] = s
	d.mu.Unlock()
	if closed {
		return nil, errors.Join(errClosed, s.Discard())
	}
	return s, nil
}

// promise asks for the space that the spool needs to have some size, and is not there yet.
func (s *Spool) promise(size int64) error {
	need := blocks(size) - s.counts()
	if need > 0 && !s.disk.space.promiseSpool(s, need) {
		return &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: codeQuota, Detail: "there is no free space for " + s.what}
	}
	return nil
}

// counts returns how many bytes count for the spool.
func (s *Spool) counts() int64 {
	s.disk.space.mu.Lock()
	defer s.disk.space.mu.Unlock()
	return s.promised
}

// Write appends to the spool. It returns an error matching [acproxy.ErrNoSpace] if there is no space that is free, or what it had was needed for something else.
func (s *Spool) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone.Load() {
		return 0, &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: codeQuota, Detail: "the space of " + s.what + " was needed for something else"}
	}
	at := s.size.Load()
	if size, has := at+int64(len(b)), s.counts(); blocks(size) > has {
		// A whole step, if that is free, too.
		if s.promise(max(size, has+promiseStep)) != nil {
			if err := s.promise(size); err != nil {
				return 0, err
			}
		}
	}
	n, err := s.file.WriteAt(b, at)
	s.size.Add(int64(n))
	return n, noSpace(err)
}

// Keep ends the writing. From now on the spool can be read.
func (s *Spool) Keep() error {
	s.mu.Lock()
	if s.gone.Load() {
		s.mu.Unlock()
		return notFound("spool-gone", s.what+" is not kept any more")
	}
	err := s.file.Close()
	s.file = nil
	s.mu.Unlock()
	if err != nil {
		return errors.Join(noSpace(err), s.Discard())
	}
	d := s.disk
	d.mu.Lock()
	closed := d.closed
	// Who has evicted it in this moment has given all of it back.
	if !s.gone.Load() {
		d.space.promiseSpool(s, blocks(s.Size())-s.counts())
		s.used = d.now()
		s.kept = s.used
	}
	d.mu.Unlock()
	if closed {
		return errors.Join(errClosed, s.Discard())
	}
	return nil
}

// Size returns how many bytes the spool has.
func (s *Spool) Size() int64 { return s.size.Load() }

// Open opens the spool. The caller closes the file; until then the spool is in use. It returns an error matching [acproxy.ErrNotFound] if the spool is gone.
func (s *Spool) Open() (*Blob, error) {
	d := s.disk
	d.mu.Lock()
	gone := s.gone.Load()
	if !gone {
		s.used = d.now()
		d.leases.join(s.lease)
	}
	d.mu.Unlock()
	if gone {
		return nil, notFound("spool-gone", s.what+" is not kept any more")
	}
	f, err := os.Open(s.path)
	if err == nil {
		var fi fs.FileInfo
		if fi, err = f.Stat(); err == nil && fi.Size() != s.Size() {
			err = errors.Join(fs.ErrNotExist, f.Close())
		}
	}
	if err != nil {
		d.leases.give(s.lease, false)
		if errors.Is(err, fs.ErrNotExist) {
			// Somebody has taken it away, or has changed it: it is of no use.
			return nil, errors.Join(notFound("spool-gone", s.what+" is not there any more"), s.Discard())
		}
		return nil, err
	}
	return d.leases.blob(f, s.lease), nil
}

// Used returns when the spool was opened last, or kept.
func (s *Spool) Used() time.Time {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.used
}

// Kept returns when the spool was kept.
func (s *Spool) Kept() time.Time {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.kept
}

// Discard removes the spool. Files of it that are open stay readable, and count until they are closed. A spool that is gone is no error.
func (s *Spool) Discard() error {
	_, err := s.leave(true)
	return err
}

// leave removes the spool, with force even if somebody reads it. It reports false if somebody does, or the spool is gone already. What can't be removed goes on
// being counted; the next start sees to it.
func (s *Spool) leave(force bool) (left bool, err error) {
	d := s.disk
	d.mu.Lock()
	if s.gone.Load() || !force && d.leases.busy(s.lease) {
		d.mu.Unlock()
		return false, nil
	}
	s.gone.Store(true)
	delete(d.spools, s.path)
	d.mu.Unlock()
	// Once this is had nobody writes, and nobody will.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil {
		// Nobody reads what it has.
		_ = s.file.Close()
		s.file = nil
	}
	if err := d.removeIfThere(s.path); err != nil {
		return true, err
	}
	has, onDisk := s.counts(), blocks(s.Size())
	onDisk = min(has, onDisk)
	// What somebody has open still counts until he closes it, and no longer as something that can be made again.
	d.space.add(onDisk)
	d.space.promiseSpool(s, -has)
	if free := d.leases.unlinked(s.lease, onDisk); free > 0 {
		d.space.release(free)
	}
	return true, nil
}

// spools chooses from the spools that nobody reads, the least recently used first.
func (p *planner) spools() {
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range slices.SortedFunc(maps.Values(d.spools), func(a, b *Spool) int { return a.used.Compare(b.used) }) {
		if !p.enough() && !d.leases.busy(s.lease) {
			bytes := s.counts()
			p.choose(victim{bytes: bytes, spool: s}, func() Eviction { return s.eviction(bytes, s.used) })
		}
	}
}

func (s *Spool) eviction(bytes int64, used time.Time) Eviction {
	return Eviction{Kind: EvictSpool, Bytes: bytes, File: s.what, Used: used}
}

// evictSpool removes a spool, unless somebody has opened it since.
func (d *Disk) evictSpool(s *Spool) (Eviction, error) {
	bytes, used := s.counts(), s.Used()
	left, err := s.leave(false)
	if !left {
		return Eviction{}, err
	}
	return s.eviction(bytes, used), err
}
