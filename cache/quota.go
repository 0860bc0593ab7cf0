package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy"
)

// Defaults of a [Quota].
const (
	DefaultHigh  = 95
	DefaultLow   = 90
	DefaultGrace = 5 * time.Minute
)

// A Quota says how much space a store may take, and what may go when there is too little of it. The zero Quota sets no limit.
//
// What counts is everything under the store's directory, in whole blocks: blobs, sidecars, the index, what is arriving or has arrived in part, as much
// as was promised to it, and the quarantine directory. Space is promised before anything is written.
type Quota struct {
	MaxSize int64 // bytes that the store may take; 0 sets no limit of its own
	MinFree int64 // bytes of the file system that are left to others; 0 means that it may be filled
	// High and Low are in per cent of what the store may take by the two above, whichever is less. Above High images are evicted until no more than
	// Low is taken. 0 means DefaultHigh and DefaultLow.
	High, Low int
	// Grace is for how long after it was fetched or last used an image is not evicted; 0 means DefaultGrace, less than 0 not at all.
	Grace time.Duration
	// LastCopies lets images be evicted that their publisher has no more.
	LastCopies bool
}

func (q Quota) withDefaults() Quota {
	if q.High == 0 {
		q.High = DefaultHigh
	}
	if q.Low == 0 {
		q.Low = DefaultLow
	}
	switch {
	case q.Grace == 0:
		q.Grace = DefaultGrace
	case q.Grace < 0:
		q.Grace = 0
	}
	return q
}

func (q Quota) limits() bool { return q.MaxSize > 0 || q.MinFree > 0 }

// What is promised beyond the bytes of images.
const (
	// housekeeping is promised to what is written without asking: the pages that the index rewrites before it lets go of the old ones, and what is
	// noted about images that are held already.
	housekeeping = 1 << 20
	// allowance is promised to an arriving image beside its bytes, for its note, its sidecar and its rows in the index. What an unusually large
	// manifest needs beyond is asked for when it is committed.
	allowance = 64 << 10
	// housekeepingPerImage is promised to the rows of an image that is committed, beside what they hold.
	housekeepingPerImage = 16 << 10
	// pointAllowance is promised to a change that adds refs to an image, or the first word of a name.
	pointAllowance = 16 << 10
	// promiseStep is how much is promised at once to an arriving image whose size nobody has said.
	promiseStep = 8 << 20
)

// space counts what a store takes and what is promised. Whoever writes something asks first; if it doesn't fit, the evictor is told, and he waits
// for its answer.
type space struct {
	// limit is the quota that counts. It is replaced with mu held, and read without.
	limit atomic.Pointer[Quota]
	free  func() (int64, error) // of the file system
	wake  func()                // the evictor

	mu      sync.Mutex
	unknown int           // parts that aren't counted yet
	failed  error         // why one of them can't be, for now
	known   chan struct{} // closed when all are, or one can't be; replaced when that is over
	closed  bool
	waiting []*promise
	// loosened goes up when something may have lost what kept it from being evicted.
	loosened uint64

	// What is on the disk, in bytes of whole blocks.
	totals     totals // the blobs and sidecars that the index names
	index      int64
	aside      int64 // indexes that were set aside
	quarantine int64 // the quarantine directory
	names      int64
	dirs       map[string]int64
	dirSum     int64
	// loose is what the totals don't name, or no more: what is promised to arriving images, the part of it that is written included; what is left of
	// others; sidecars that are being written; files that were removed and are still open.
	loose     int64
	arriving  map[*Partial]struct{} // of what is loose, that which isn't all written
	suspended int64                 // of what is loose, what nobody writes any more
	spooled   int64                 // of what is loose, what can be made again
	spools    map[*Spool]struct{}   // that for which something counts
}

// promise is somebody who waits for space.
type promise struct {
	n    int64
	what string // for the error
	done chan error
	// over is set, under the space's mutex, when the answer is given or not wanted any more.
	over bool
}

func newSpace(quota Quota, free func() (int64, error), wake func()) *space {
	s := &space{
		free: free, wake: wake, known: make(chan struct{}), dirs: make(map[string]int64), arriving: make(map[*Partial]struct{}), spools: make(map[*Spool]struct{}),
	}
	s.setQuota(quota)
	return s
}

// quota returns the quota that counts now.
func (s *space) quota() Quota { return *s.limit.Load() }

// setQuota puts another quota in the place of the one that counts, and has whoever waits for space answered by it.
func (s *space) setQuota(q Quota) {
	q = q.withDefaults()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit.Store(&q)
	// By another one something else may be evicted.
	s.loosened++
}

// freeSpace returns a function that says how many bytes of the file system of a directory are free for us.
func freeSpace(dir string) func() (int64, error) {
	return func() (int64, error) {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			return 0, os.NewSyscallError("statfs", err)
		}
		return int64(fs.Bavail) * int64(fs.Bsize), nil //nolint:unconvert // it is an int64 on Linux only
	}
}

// counting says that a part of the sums is not known until counted is called.
func (s *space) counting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unknown == 0 {
		select {
		case <-s.known:
			s.known = make(chan struct{})
		default: // it never was
		}
	}
	s.unknown++
}

// counted ends what counting began, with what was found.
func (s *space) counted(found func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found()
	if s.unknown--; s.unknown == 0 {
		if s.failed == nil {
			close(s.known)
		}
		s.failed = nil
	}
}

// uncountable says why a part of the sums can't be counted. It will be tried again; until then nobody waits for it.
func (s *space) uncountable(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		close(s.known)
	}
	s.failed = err
}

// await returns when the sums are known, unless there is no need to know them. It returns an error if they can't be, for now.
func (s *space) await(ctx context.Context) error {
	if s.quota().MaxSize == 0 {
		return nil
	}
	s.mu.Lock()
	known := s.known
	s.mu.Unlock()
	select {
	case <-known:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.failed
	case <-ctx.Done():
		return fmt.Errorf("waiting for the store to know how much it holds: %w", context.Cause(ctx))
	}
}

// committed takes over what the index says after a transaction, together with what follows from it: whatever the index has come to name, or doesn't
// name any more, counts once at any moment.
func (s *space) committed(t totals, index int64, written []*write) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.totals, s.index = t, index
	for _, w := range written {
		s.loose += w.loose
		if w.then != nil {
			w.then()
		}
	}
}

// taken is what is on the disk and what is promised. The caller holds mu.
func (s *space) taken() int64 {
	return s.totals.Blobs + s.totals.Sidecars + s.fixed() + s.quarantine + s.loose
}

// fixed is the part of taken that no eviction makes smaller. The caller holds mu.
func (s *space) fixed() int64 {
	return s.index + s.aside + s.names + s.dirSum + housekeeping
}

// unwritten is the part of taken that isn't on the disk. The caller holds mu.
func (s *space) unwritten() int64 {
	n := int64(housekeeping)
	for p := range s.arriving {
		n += max(0, p.promised-p.onDisk())
	}
	for spool := range s.spools {
		n += max(0, spool.promised-blocks(spool.Size()))
	}
	return n
}

// room is how much more can be promised, less than 0 if too much is taken, and which of the limits says so. The caller holds mu.
func (s *space) room() (n int64, limit string) {
	q := s.quota()
	n = math.MaxInt64
	if q.MaxSize > 0 {
		n, limit = q.MaxSize-s.taken(), codeQuota
	}
	if q.MinFree > 0 {
		// What can't be asked says nothing against writing; the write will.
		if free, err := s.free(); err == nil {
			if left := free - q.MinFree - s.unwritten(); left < n {
				n, limit = left, codeFree
			}
		}
	}
	return n, limit
}

// spares reports whether half of what is promised to housekeeping is left, within the size that the store may have.
func (s *space) spares() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	most := s.quota().MaxSize
	return most == 0 || s.taken() <= most+housekeeping/2
}

// usage returns what is known of the space that is taken.
func (s *space) usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.quota()
	u := Usage{
		Blobs: s.totals.Blobs, Sidecars: s.totals.Sidecars, Index: s.index + s.aside, Quarantine: s.quarantine, Names: s.names, Directories: s.dirSum,
		Pinned: s.totals.Pinned, Promised: housekeeping, Images: s.totals.Images, Quarantined: s.totals.Quarantined,
		Room: Room{MaxSize: q.MaxSize, MinFree: q.MinFree, High: q.High, Low: q.Low},
	}
	promised := int64(0)
	for p := range s.arriving {
		// Looked at once: it grows meanwhile, and what is on the disk must not count as promised, too.
		written := min(p.promised, p.onDisk())
		u.Partials += written
		u.Promised += p.promised - written
		promised += p.promised
	}
	if q.MaxSize > 0 {
		// What was written without asking is a part of what was promised to that.
		u.Promised -= min(housekeeping, max(0, s.taken()-q.MaxSize))
	}
	u.Partials += s.suspended
	u.Spools = s.spooled
	u.Open = s.loose - promised - s.suspended - s.spooled
	return u
}

// The codes of errors that say that there is no space.
const (
	codeQuota = "quota"
	codeFree  = "min-free"
	limitDisk = "disk-full"
)

// above returns by how much what is taken is above a watermark, given in per cent of what may be taken. The caller holds mu.
func (s *space) above(percent int) int64 {
	if !s.quota().limits() {
		return 0
	}
	room, _ := s.room()
	if room == math.MaxInt64 {
		return 0
	}
	taken := s.taken()
	most := float64(taken+room) * float64(percent) / 100
	return taken - int64(most)
}

// promise promises n bytes, once there is space for them. What it is for stands in the error if there isn't.
func (s *space) promise(ctx context.Context, n int64, what string) error {
	if n <= 0 || !s.quota().limits() {
		s.add(n)
		return nil
	}
	for {
		by := s.limit.Load()
		if err := s.await(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		if s.limit.Load() == by {
			break
		}
		// Another quota may ask for sums that this one didn't need to know.
		s.mu.Unlock()
	}
	switch {
	case len(s.waiting) == 0 && s.fits(n):
		// Even when it is closed: the table of refs is written last.
		s.loose += n
		if s.above(s.quota().High) > 0 {
			s.wake()
		}
		s.mu.Unlock()
		return nil
	case s.closed:
		s.mu.Unlock()
		return errClosed
	}
	p := &promise{n: n, what: what, done: make(chan error, 1)}
	s.waiting = append(s.waiting, p)
	s.mu.Unlock()
	s.wake()
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.over {
		// It was decided in the same moment.
		return <-p.done
	}
	p.over = true
	s.waiting = slices.DeleteFunc(s.waiting, func(w *promise) bool { return w == p })
	return fmt.Errorf("waiting for space for %s: %w", what, context.Cause(ctx))
}

// tryPromise promises n bytes if there is space for them now, and nobody waits for it.
func (s *space) tryPromise(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.quota().limits() {
		s.loose += n
		return true
	}
	if s.closed || s.unknown > 0 && s.quota().MaxSize > 0 || len(s.waiting) > 0 || !s.fits(n) {
		return false
	}
	s.loose += n
	if s.above(s.quota().High) > 0 {
		s.wake()
	}
	return true
}

// promiseSpool promises n bytes more to a spool, for which nothing is to be evicted: if they are free, and leave what is taken below the high watermark. With n
// less than 0 they are given back, whatever else is so.
func (s *space) promiseSpool(spool *Spool, n int64) bool {
	s.mu.Lock()
	q := s.quota()
	if n > 0 && q.limits() && (s.closed || s.unknown > 0 && q.MaxSize > 0 || len(s.waiting) > 0 || !s.fits(n) || s.above(q.High)+n > 0) {
		s.mu.Unlock()
		return false
	}
	spool.promised += n
	s.loose += n
	s.spooled += n
	if spool.promised > 0 {
		s.spools[spool] = struct{}{}
	} else {
		delete(s.spools, spool)
	}
	wake := n < 0 && len(s.waiting) > 0
	s.mu.Unlock()
	if wake {
		s.wake()
	}
	return true
}

func (s *space) fits(n int64) bool {
	room, _ := s.room()
	return n <= room
}

// add counts n bytes that nobody was asked for, or no longer counts them if n is less than 0.
func (s *space) add(n int64) {
	s.mu.Lock()
	s.loose += n
	wake := n < 0 && len(s.waiting) > 0
	s.mu.Unlock()
	if wake {
		s.wake()
	}
}

// release gives back n bytes.
func (s *space) release(n int64) { s.add(-n) }

// loosen notes that something may have become evictable.
func (s *space) loosen() {
	s.mu.Lock()
	s.loosened++
	wake := len(s.waiting) > 0
	s.mu.Unlock()
	if wake {
		s.wake()
	}
}

// next grants the promises that fit, in the order in which they were asked for, and returns the first that doesn't, nil if none is left. Those that
// never will get their error.
func (s *space) next() *promise {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.waiting) > 0 {
		p := s.waiting[0]
		switch {
		case s.fits(p.n):
			s.grant(p)
		case s.quota().MaxSize > 0 && p.n+s.fixed() > s.quota().MaxSize:
			s.refuse(p, &acproxy.Error{
				Kind: acproxy.ErrNoSpace, Code: codeQuota,
				Detail: fmt.Sprintf("%s needs %s, which is more than cache.max_size (%s) leaves for images, were there no others: raise it", p.what, size(p.n), size(s.quota().MaxSize)),
			})
		default:
			return p
		}
	}
	return nil
}

// grant gives a promise. The caller holds mu.
func (s *space) grant(p *promise) {
	s.loose += p.n
	s.end(p, nil)
}

// refuse gives the error that there is no space. The caller holds mu.
func (s *space) refuse(p *promise, err error) { s.end(p, err) }

func (s *space) end(p *promise, err error) {
	p.over = true
	p.done <- err
	s.waiting = slices.DeleteFunc(s.waiting, func(w *promise) bool { return w == p })
}

// settle answers a promise for which room was made, or could not be made.
func (s *space) settle(p *promise, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case p.over:
	case err != nil:
		s.refuse(p, err)
	default:
		s.grant(p)
	}
}

// close refuses all promises from now on.
func (s *space) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for len(s.waiting) > 0 {
		s.refuse(s.waiting[0], errClosed)
	}
}

// size prints bytes for people.
func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, suffix := float64(n)/unit, "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if v < unit {
			break
		}
		v, suffix = v/unit, next
	}
	return fmt.Sprintf("%.1f %s", v, suffix)
}

// diskBytes is the space that a file takes, holes left out.
func diskBytes(fi os.FileInfo) int64 {
	if stat, ok := fi.Sys().(*syscall.Stat_t); ok {
		// In units of 512 bytes, whatever the file system's blocks are (stat(2)).
		return 512 * stat.Blocks
	}
	return blocks(fi.Size())
}

// SetQuota puts another quota in the place of [Options.Quota]. What is too much by it is evicted at once, as far as it may be, in the background; until that is
// done more may be taken than it says. Whoever waits for space gets his answer by the new one.
func (d *Disk) SetQuota(q Quota) {
	d.space.setQuota(q)
	d.wake()
}

// weigh returns the space that a file takes, or a directory with all that is in it.
func weigh(path string) int64 {
	var sum int64
	// What can't be looked at is not counted; it is not much.
	_ = filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if fi, err := e.Info(); err == nil {
			sum += diskBytes(fi)
		}
		return nil
	})
	return sum
}

// measure counts what only the file system can tell, beside the serving, before anything is promised by it.
func (d *Disk) measure() {
	// Nothing of what is counted here is changed meanwhile.
	d.measuring.Lock()
	defer d.measuring.Unlock()
	names, err := sizes(d.path(nameDir), nil)
	if err != nil {
		d.log.Error("counting what is known of names", "err", err)
	}
	quarantine, aside := d.measureAside()
	d.mu.Lock()
	dirs := []string{"", blobDir, nameDir, partialDir, quarantineDir}
	for shard := range d.shards {
		dirs = append(dirs, filepath.Join(blobDir, shard))
	}
	d.mu.Unlock()
	d.space.counted(func() {
		d.space.names, d.space.quarantine, d.space.aside = names, quarantine, aside
	})
	for _, dir := range dirs {
		d.measureDir(dir)
	}
}

// measureAside counts what lies in the quarantine directory, and beside the index. The caller holds measuring.
func (d *Disk) measureAside() (quarantine, aside int64) {
	// What can't be listed isn't counted.
	entries, _ := os.ReadDir(d.path(quarantineDir))
	for _, e := range entries {
		quarantine += weigh(d.path(quarantineDir, e.Name()))
	}
	aside, err := sizes(d.dir, func(name string) bool {
		return name != indexFile && strings.HasPrefix(name, indexFile) || name == refTableFile
	})
	if err != nil {
		d.log.Error("counting the table of refs, and the indexes that were set aside", "err", err)
	}
	return quarantine, aside
}

// measureAgain counts what operators delete behind our back: files that were set aside. If something is set aside in this moment, it leaves that to the next time:
// who waits for that lock keeps others from taking it who may have it already.
func (d *Disk) measureAgain() {
	if !d.measuring.TryLock() {
		return
	}
	defer d.measuring.Unlock()
	quarantine, aside := d.measureAside()
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.quarantine, d.space.aside = quarantine, aside
}

// measureDir counts a directory itself, given by its path in the store's: it grows with what is in it, and seldom shrinks.
func (d *Disk) measureDir(dir string) {
	fi, err := os.Lstat(d.path(dir))
	if err != nil {
		// One that is gone takes nothing, and any other error will be seen by who works there.
		return
	}
	n := diskBytes(fi)
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.dirSum += n - d.space.dirs[dir]
	d.space.dirs[dir] = n
}

// measureDirs counts the directories that grow with what is done in them.
func (d *Disk) measureDirs() {
	for _, dir := range []string{"", nameDir, partialDir, quarantineDir} {
		d.measureDir(dir)
	}
}

// relief makes room on a disk that is full although the quota isn't, once, and reports whether it is worth trying again what failed with err.
func (d *Disk) relief(ctx context.Context, err error, need int64) bool {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return false
	}
	freed, askErr := d.ask(ctx, demand{why: ReasonDiskFull, bytes: max(reliefFactor*need, reliefLeast)})
	if askErr != nil {
		d.log.Error("making room on a full disk", "err", askErr)
	}
	return freed.Bytes > 0
}

// How much more is evicted than is needed when the disk is full, because others want some of it too.
const (
	reliefFactor = 4
	reliefLeast  = 16 << 20
)
