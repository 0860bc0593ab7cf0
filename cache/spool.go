package cache

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// spoolExt ends the names of spools, which are among what isn't whole yet: what a process has left of them, the next one removes.
const spoolExt = ".spool"

// A Spool is a file of bytes that can be made again, kept to be read more often than they are made. It counts as space that is taken, as all else does, but
// nothing is evicted for it, and it goes before anything else when something needs the space. It doesn't outlive the process, so that nothing of it is synced.
//
// One goroutine writes it and calls Keep or Discard. After Keep, Open and Discard may be called by any, at any time.
type Spool struct {
	disk  *Disk
	what  string
	path  string
	file  durable.File
	lease *lease
	size  int64
	// promised is what counts for it, in bytes.
	promised int64

	// These are guarded by the mutex of the disk.
	used time.Time
	gone bool
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
		d.space.releaseSpool(s.promised)
		return nil, noSpace(err)
	}
	return s, nil
}

// promise asks for the space that the spool needs to have some size, and is not there yet.
func (s *Spool) promise(size int64) error {
	need := blocks(size) - s.promised
	if need <= 0 {
		return nil
	}
	if !s.disk.space.promiseSpool(need) {
		return &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: codeQuota, Detail: "there is no free space for " + s.what}
	}
	s.promised += need
	return nil
}

// Write appends to the spool. It returns an error matching [acproxy.ErrNoSpace] if there is no space that is free.
func (s *Spool) Write(b []byte) (int, error) {
	if size := s.size + int64(len(b)); blocks(size) > s.promised {
		if err := s.promise(max(size, s.promised+promiseStep)); err != nil {
			return 0, err
		}
	}
	n, err := s.file.WriteAt(b, s.size)
	s.size += int64(n)
	return n, noSpace(err)
}

// Keep ends the writing. From now on the spool can be read, and evicted.
func (s *Spool) Keep() error {
	d := s.disk
	if err := s.file.Close(); err != nil {
		return errors.Join(noSpace(err), s.Discard())
	}
	s.file = nil
	d.space.releaseSpool(s.promised - blocks(s.size))
	s.promised = blocks(s.size)
	d.mu.Lock()
	closed := d.closed
	if s.used = d.now(); closed {
		s.gone = true
	} else {
		d.spools[s.path] = s
	}
	d.mu.Unlock()
	if closed {
		return errors.Join(errClosed, s.remove())
	}
	return nil
}

// Size returns how many bytes the spool has.
func (s *Spool) Size() int64 { return s.size }

// Open opens the spool. The caller closes the file; until then the spool is in use. It returns an error matching [acproxy.ErrNotFound] if the spool is gone.
func (s *Spool) Open() (*Blob, error) {
	d := s.disk
	d.mu.Lock()
	gone := s.gone
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
		if fi, err = f.Stat(); err == nil && fi.Size() != s.size {
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

// Discard removes the spool. Files of it that are open stay readable, and count until they are closed. A spool that is gone is no error.
func (s *Spool) Discard() error {
	d := s.disk
	d.mu.Lock()
	gone := s.gone
	s.gone = true
	delete(d.spools, s.path)
	d.mu.Unlock()
	if gone {
		return nil
	}
	if s.file != nil {
		// Nobody reads what it has.
		_ = s.file.Close()
		s.file = nil
	}
	return s.remove()
}

// remove removes the file. What can't be removed goes on being counted; the next start sees to it.
func (s *Spool) remove() error {
	if err := s.disk.removeIfThere(s.path); err != nil {
		return err
	}
	d, onDisk := s.disk, min(s.promised, blocks(s.size))
	// What somebody has open still counts until he closes it, and no longer as something that can be made again.
	d.space.mu.Lock()
	d.space.spooled -= s.promised
	d.space.mu.Unlock()
	d.space.release(s.promised - onDisk + d.leases.unlinked(s.lease, onDisk))
	return nil
}

// spools chooses from the spools that nobody reads, the least recently used first.
func (p *planner) spools() {
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range slices.SortedFunc(maps.Values(d.spools), func(a, b *Spool) int { return a.used.Compare(b.used) }) {
		if !p.enough() && !d.leases.busy(s.lease) {
			p.choose(victim{bytes: blocks(s.size), spool: s}, func() Eviction { return s.eviction(s.used) })
		}
	}
}

func (s *Spool) eviction(used time.Time) Eviction {
	return Eviction{Kind: EvictSpool, Bytes: blocks(s.size), File: s.what, Used: used}
}

// evictSpool removes a spool, unless somebody has opened it since.
func (d *Disk) evictSpool(s *Spool) (Eviction, error) {
	d.mu.Lock()
	ok := !s.gone && !d.leases.busy(s.lease)
	if ok {
		s.gone = true
		delete(d.spools, s.path)
	}
	used := s.used
	d.mu.Unlock()
	if !ok {
		return Eviction{}, nil
	}
	return s.eviction(used), s.remove()
}
