package cache

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// Version is the layout of a store's directory that this package reads and writes.
const Version = 1

// DefaultFlushEvery is how often access times are written.
const DefaultFlushEvery = 30 * time.Second

const (
	filePerm fs.FileMode = 0o640
	dirPerm  fs.FileMode = 0o750
)

// The names in a store's directory. Nothing that somebody outside chose becomes part of a file's name.
const (
	versionFile   = "VERSION"
	lockFile      = "lock"
	indexFile     = "index.db"
	blobDir       = "blobs"      // up to 256 directories, named by the first byte of a digest: the blob by its digest, and beside it its sidecar
	nameDir       = "names"      // what discovery found out about names, by the SHA-256 of the name
	partialDir    = "partial"    // everything that isn't whole yet
	quarantineDir = "quarantine" // broken files, each with a file that says why
	sidecarExt    = ".json"
	reasonExt     = ".reason"
	partialExt    = ".aci" // of partial files; beside each, with sidecarExt, is the note of what it is
)

// Options are the choices in opening a store. The zero value is fine.
type Options struct {
	FS         durable.FS       // nil means the operating system's
	Log        *slog.Logger     // nil means slog.Default
	Now        func() time.Time // nil means time.Now
	FlushEvery time.Duration    // how often access times are written; 0 means DefaultFlushEvery
	// KeepPartials is for how long what has arrived of an image is kept without being taken up again; 0 means DefaultKeepPartials, less than 0 not at
	// all.
	KeepPartials time.Duration
	Quota        Quota // how much space the store may take, until [Disk.SetQuota]
	// Idle keeps the store from scrubbing in the background, and from evicting anything that doesn't stand in the way of something that arrives. It is for
	// those who only look into it.
	Idle bool
	// Evicted is told everything that is evicted. It may be called by any goroutine, must not block for long, and must not call the store. nil means
	// nobody is told.
	Evicted func(Eviction)
	// Scrub is how what is kept is read again in the background.
	Scrub Schedule
	// Inspect reads an image to its end and returns its image ID. nil means that image IDs are not checked again.
	Inspect func(io.Reader) (acproxy.ImageID, error)
	// Lost is told of every image whose bytes turn out to be lost. What Evicted may do, it may. nil means nobody is told.
	Lost func(Record)
	// Free says how many bytes of the file system are free; nil means that the operating system is asked.
	Free func() (int64, error)
	// MaxMapped is about how many bytes of the index stay mapped into memory between uses; 0 means DefaultMaxMapped. A smaller number makes
	// changes and listings of a large store slower, and look-ups of single images not: those go past the map.
	MaxMapped int64

	evictAgain time.Duration // 0 means defaultEvictAgain
}

// DefaultMaxMapped is enough for the whole index of ten thousand images.
const DefaultMaxMapped = 64 << 20

// A Disk is a store in one directory. It is safe for concurrent use by one process; a second one can't open the same directory.
//
// The directory's truth is in the blobs and their sidecars. The index makes it fast to ask; where it is missing or broken it is set aside and
// made again, beside the serving of what is known already. A look-up that finds nothing waits for that, so that nothing is reported missing
// that isn't.
type Disk struct {
	dir          string
	fsys         *failing
	log          *slog.Logger
	now          func() time.Time
	flushEvery   time.Duration
	keepPartials time.Duration
	maxMapped    int64
	idle         bool
	evictAgain   time.Duration
	tellEvicted  func(Eviction)
	tellLost     func(Record)
	inspect      func(io.Reader) (acproxy.ImageID, error)
	schedule     Schedule
	lock         *os.File
	readOnly     bool // the directory was on a read-only file system when it was opened

	// ctx is the life of the background work; Close cancels it and waits for wg.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// cleaned is closed once it is known what the last process has left unfinished.
	cleaned chan struct{}

	locks     locks        // by digest, of an image's files and rows; by the digest of a name, of its file and row. Nobody waits for a second while holding one.
	flushing  sync.Mutex   // held while access times are written
	replacing sync.Mutex   // held while one index takes the place of another
	keeping   sync.Mutex   // held while the table of refs is written
	kept      uint64       // the changes of refs that the table has, guarded by keeping
	measuring sync.RWMutex // held while what only the file system knows is counted; held for reading while that is changed

	space    *space
	leases   leases
	wakeups  chan struct{} // tells the evictor to look what there is to do
	demands  chan demand
	surveyed *survey // the evictor's own
	scrub    scrub

	memory *memory // of what the index says
	heard  heard   // of names
	barred bars    // of what it should say and doesn't

	// known is what can be said of the index. It is replaced with mu held, and read without.
	known atomic.Pointer[knowledge]

	mu        sync.Mutex
	closed    bool
	uncounted bool // space waits for the sums of the index
	touched   map[acproxy.Digest]time.Time
	// beingFlushed are the access times that are being written.
	beingFlushed map[acproxy.Digest]time.Time
	suspended    map[string]suspended // by the key of their arrival
	spools       map[string]*Spool    // by path
	shards       map[string]bool      // the directories of blobs that exist, and whether they survive a crash: who made one may have ended before he knew
	pointed      int64                // the last number given to a Resolution
}

var _ Store = (*Disk)(nil)

// Open opens the store in a directory, and makes it if there is none. It returns without having looked at the images, however many; what it
// finds out about them behind, it says in the log. A directory that another process has open, or that a newer version of acproxy has written,
// is an error that says so. The caller closes it.
//
// What is in a store on a read-only file system can be read, if its index is in order; all that would change it is an error matching
// [acproxy.ErrNoSpace], also when the file system can be written again.
func Open(dir string, opts Options) (*Disk, error) {
	d := newDisk(dir, opts)
	if err := d.open(); err != nil {
		d.cancel()
		if d.lock != nil {
			err = errors.Join(err, d.lock.Close())
		}
		return nil, fmt.Errorf("opening the store in %s: %w", dir, noSpace(err))
	}
	return d, nil
}

// newDisk returns a store that isn't open.
func newDisk(dir string, opts Options) *Disk {
	d := &Disk{
		dir: dir, fsys: &failing{FS: opts.FS}, log: opts.Log, now: opts.Now, flushEvery: opts.FlushEvery, keepPartials: opts.KeepPartials, maxMapped: opts.MaxMapped,
		idle: opts.Idle, evictAgain: cmp.Or(opts.evictAgain, defaultEvictAgain), tellEvicted: opts.Evicted, tellLost: opts.Lost, inspect: opts.Inspect, schedule: opts.Scrub, wakeups: make(chan struct{}, 1), demands: make(chan demand), uncounted: true,
		memory: newMemory(), cleaned: make(chan struct{}), touched: make(map[acproxy.Digest]time.Time),
		suspended: make(map[string]suspended), spools: make(map[string]*Spool), shards: make(map[string]bool),
	}
	d.known.Store(&knowledge{changed: make(chan struct{})})
	if opts.FS == nil {
		d.fsys.FS = durable.OS{}
	}
	if d.log == nil {
		d.log = slog.Default()
	}
	if d.now == nil {
		d.now = time.Now
	}
	if d.flushEvery == 0 {
		d.flushEvery = DefaultFlushEvery
	}
	if d.keepPartials == 0 {
		d.keepPartials = DefaultKeepPartials
	}
	if d.maxMapped == 0 {
		d.maxMapped = DefaultMaxMapped
	}
	free := opts.Free
	if free == nil {
		free = freeSpace(dir)
	}
	d.space = newSpace(opts.Quota, free, d.wake)
	d.leases.space = d.space
	d.scrub.one, d.scrub.early = make(chan struct{}, 1), make(chan struct{}, 1)
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

func (d *Disk) open() error {
	if err := d.fsys.MkdirAll(d.dir, dirPerm); err != nil {
		return err
	}
	if d.lock == nil {
		if err := d.lockDir(); err != nil {
			return err
		}
	}
	if err := d.layOut(); err != nil {
		return err
	}
	// What can't be listed keeps nobody from what is held: what was left unfinished stays until the next start, and a shard's directory is made sure of when
	// something is to come into it.
	leftovers := d.listed(partialDir)
	for _, shard := range d.listed(blobDir) {
		d.shards[shard.Name()] = false
	}
	if !d.hasRefTable() {
		d.memory.refChanges.Add(1)
	}
	ix, err := d.openIndex()
	if errors.Is(err, fs.ErrNotExist) {
		d.log.Info("the index is made from what is in the store", "dir", d.dir)
		ix, err = d.newIndex()
	}
	if errors.Is(err, errPages) {
		ix, err = d.anotherIndex(err)
	}
	if err != nil {
		return err
	}
	d.learn(func(k *knowledge) { k.ix = ix })
	// What the index holds, what was left unfinished, and what only the file system knows.
	for range 3 {
		d.space.counting()
	}
	// Each ends with its work, the first three with ctx too, which Close cancels before it waits.
	d.wg.Go(func() { d.begin(ix) })
	d.wg.Go(d.flusher)
	d.wg.Go(d.evictor)
	d.wg.Go(func() { d.clean(leftovers) })
	d.wg.Go(d.measure)
	if !d.idle && !d.readOnly {
		// It ends with ctx, which Close cancels before it waits for it.
		d.wg.Go(d.scrubInTime)
	}
	return nil
}

// listed lists a directory of the store as far as it can be listed.
func (d *Disk) listed(name string) (entries []fs.DirEntry) {
	err := patiently(func() (err error) {
		entries, err = os.ReadDir(d.path(name))
		return err
	})
	if err != nil {
		d.log.Error("a directory of the store can't be listed", "dir", d.path(name), "err", err)
	}
	return entries
}

// path returns the path of something in the store's directory.
func (d *Disk) path(elem ...string) string {
	return filepath.Join(append([]string{d.dir}, elem...)...)
}

func shard(digest acproxy.Digest) string { return digest.Hex()[:2] }

func (d *Disk) blobPath(digest acproxy.Digest) string {
	return d.path(blobDir, shard(digest), digest.Hex())
}

// makeShard makes the directory of a digest if there is none, and one that survives a crash of what there is.
func (d *Disk) makeShard(digest acproxy.Digest) error {
	name := shard(digest)
	d.mu.Lock()
	survives := d.shards[name]
	d.mu.Unlock()
	if survives {
		return nil
	}
	if err := d.fsys.MkdirAll(d.path(blobDir, name), dirPerm); err != nil {
		return err
	}
	if err := d.fsys.SyncDir(d.path(blobDir)); err != nil {
		return err
	}
	d.mu.Lock()
	d.shards[name] = true
	for found := range d.shards {
		d.shards[found] = true
	}
	d.mu.Unlock()
	d.measureDir(filepath.Join(blobDir, name))
	return nil
}

func (d *Disk) sidecarPath(digest acproxy.Digest) string { return d.blobPath(digest) + sidecarExt }

// relative returns a path as seen from the store's directory.
func (d *Disk) relative(path string) string {
	if rel, err := filepath.Rel(d.dir, path); err == nil {
		return rel
	}
	return path
}

// temp returns the name of a file that doesn't exist yet.
func (d *Disk) temp() string { return d.path(partialDir, rand.Text()) }

// lockDir makes sure that no other process works in the directory. The lock ends with the process, however it ends.
func (d *Disk) lockDir() error {
	f, err := os.OpenFile(d.path(lockFile), os.O_RDWR|os.O_CREATE, filePerm)
	if errors.Is(err, syscall.EROFS) {
		d.readOnly = true
		f, err = os.Open(d.path(lockFile))
	}
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return errors.Join(err, f.Close())
		}
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		return errors.Join(fmt.Errorf("process %s has it open: stop that one first, or use another directory", orUnknown(pid)), f.Close())
	}
	d.lock = f
	if d.readOnly {
		d.log.Error("the store is on a read-only file system: what is held is served, and nothing new is kept", "dir", d.dir)
		return nil
	}
	// The number is for people; the lock does without, as it has to where the disk is full.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		d.log.Warn("noting which process has the store open", "file", f.Name(), "err", err)
	}
	return nil
}

func orUnknown(pid []byte) string {
	if pid = bytes.TrimSpace(pid); len(pid) > 0 {
		return string(pid)
	}
	return "(unknown)"
}

// layOut makes the directories that are missing, and checks the version of those that aren't.
func (d *Disk) layOut() error {
	var b []byte
	err := patiently(func() (err error) {
		b, err = readSmall(d.path(versionFile), 64)
		return err
	})
	// A version that can't be read keeps nobody from what is held: index and sidecars say themselves which they are of.
	unreadable := err != nil && beyondHope(err) && !forbidden(err)
	switch {
	case errors.Is(err, fs.ErrNotExist), unreadable:
	case err != nil:
		return err
	default:
		version, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || version < 1 {
			return fmt.Errorf("%s holds %q, which is not the version of a store", d.path(versionFile), b)
		}
		if version > Version {
			return fmt.Errorf("it was written by a newer acproxy: it has version %d, this one reads up to %d; use the newer one", version, Version)
		}
	}
	made := err != nil
	for _, dir := range []string{blobDir, nameDir, partialDir, quarantineDir} {
		if err := d.fsys.MkdirAll(d.path(dir), dirPerm); err != nil {
			return err
		}
	}
	if d.readOnly && (!made || unreadable) {
		return nil
	}
	if unreadable {
		if err := d.setAside(d.path(versionFile), fmt.Sprintf("it can't be read: %v", err)); err != nil {
			return err
		}
	}
	if err := d.fsys.SyncDir(d.dir); err != nil {
		return err
	}
	if !made {
		return nil
	}
	if err := d.fsys.SyncDir(filepath.Dir(d.dir)); err != nil {
		return err
	}
	return durable.Replace(d.fsys, d.temp(), d.path(versionFile), []byte(strconv.Itoa(Version)+"\n"), filePerm)
}

// openIndex opens the index that there is.
func (d *Disk) openIndex() (ix *index, err error) {
	err = patiently(func() (err error) {
		ix, err = openIndex(d.path(indexFile), d.memory, d.space, d.maxMapped)
		return err
	})
	return ix, err
}

// newIndex makes an empty index and opens it.
func (d *Disk) newIndex() (*index, error) {
	if err := createIndex(d.fsys, d.temp(), d.path(indexFile)); err != nil {
		return nil, fmt.Errorf("making an index: %w", err)
	}
	return d.openIndex()
}

// anotherIndex sets the index aside and makes an empty one.
func (d *Disk) anotherIndex(cause error) (*index, error) {
	aside := brokenName(d.path(indexFile), d.now())
	if errors.Is(cause, errOlder) {
		aside = d.path(indexFile + olderExt)
		d.log.Info("the index is of an older version and is made again from the sidecars", "err", cause)
	} else {
		d.log.Error("the index is set aside and made again from the sidecars", "kept", aside, "err", cause)
	}
	if err := d.fsys.Rename(d.path(indexFile), aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return d.newIndex()
}

// replace puts an empty index into the place of one that was found broken, unless somebody else has done so, and has it filled.
func (d *Disk) replace(ix *index, cause error) error {
	d.replacing.Lock()
	defer d.replacing.Unlock()
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	switch {
	case closed:
		return errClosed
	case d.index() != ix:
		return nil
	}
	d.measuring.RLock()
	bytes := ix.diskBytes()
	another, err := d.anotherIndex(cause)
	if err == nil {
		d.space.mu.Lock()
		d.space.aside += bytes
		d.space.mu.Unlock()
	}
	d.measuring.RUnlock()
	if err != nil {
		return fmt.Errorf("replacing the index: %w", noSpace(err))
	}
	d.mu.Lock()
	if closed = d.closed; !closed {
		d.learn(func(k *knowledge) { *k = knowledge{ix: another} })
		if !d.uncounted {
			d.uncounted = true
			d.space.counting()
		}
		// Started under mu, so that Close, which sets closed under it, waits for them. The first ends when the last reader of the old index does.
		d.wg.Go(func() { d.retire(ix) })
		d.wg.Go(func() { d.begin(another) })
	}
	d.mu.Unlock()
	if closed {
		return errors.Join(errClosed, another.close())
	}
	return nil
}

func (d *Disk) retire(ix *index) {
	if err := ix.close(); err != nil {
		d.log.Error("closing the index that was set aside", "err", err)
	}
}

// begin checks an index, fills in what it doesn't know, and makes it one whose silence can be believed.
func (d *Disk) begin(ix *index) {
	const shortest, longest = 250 * time.Millisecond, 10 * time.Second
	for pause := shortest; ; pause = min(2*pause, longest) {
		err := d.settle(ix)
		switch {
		case err == nil, errors.Is(err, errClosed), d.ctx.Err() != nil:
			return
		case errors.Is(err, errPages):
			if err = d.replace(ix, err); err == nil {
				return
			}
			if d.readOnly {
				// No other can be put into its place: who asks is told so, and doesn't wait.
				ix.giveUp()
			}
		}
		d.unsettled(ix, noSpace(err))
		d.log.Error("making the index complete: what is in it is served", "again in", pause, "err", err)
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
			return
		}
	}
}

func (d *Disk) settle(ix *index) error {
	select {
	case <-ix.safe: // this is not the first try
	default:
		if err := ix.check(d.ctx); err != nil {
			return err
		}
		err := ix.peek(func(tx *bolt.Tx) error {
			// What can't be written is read as it is.
			least := schema
			if d.readOnly {
				least = readableSchema
			}
			err := fits(tx, least)
			if err == nil {
				ix.complete, err = isState(tx, stateComplete)
			}
			if err == nil {
				ix.unclean, err = isState(tx, stateOpen)
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := ix.release(); err != nil {
			return err
		}
		d.announce(ix, ix.complete, false)
	}
	complete, unclean := ix.complete, ix.unclean
	start := d.now()
	if err := ix.verify(d.ctx); err != nil {
		return err
	}
	if d.readOnly {
		if !complete {
			d.log.Error("the index doesn't name all that is held, and can't be written: what it doesn't name is not served")
		}
		if err := d.countIndex(ix, true); err != nil {
			return err
		}
		d.announce(ix, true, true)
		return nil
	}
	if !complete || unclean {
		if err := d.sweep(ix, complete); err != nil {
			return err
		}
	}
	if err := d.carryOver(ix); err != nil {
		return err
	}
	err := ix.update(func(tx *bolt.Tx) error { return setState(tx, stateComplete) }, effect{})
	if errors.Is(err, errPages) || err != nil && !complete {
		return err
	}
	if err := d.countIndex(ix, err != nil); err != nil {
		return err
	}
	if err != nil {
		d.log.Error("the index can be read, but not written", "err", err)
	}
	d.announce(ix, true, true)
	d.keepRefs(d.ctx, ix)
	d.log.Debug("the index is complete", "took", d.now().Sub(start), "rebuilt", !complete, "swept", unclean)
	return nil
}

// countIndex makes what an index says of the sums count. After a change of the index it does already.
func (d *Disk) countIndex(ix *index, unchanged bool) error {
	if unchanged {
		var t totals
		err := ix.view(func(tx *bolt.Tx) (err error) {
			t, err = getTotals(tx)
			return err
		})
		if err != nil {
			return err
		}
		d.space.committed(t, ix.diskBytes(), nil)
	}
	d.mu.Lock()
	counts := d.index() == ix && d.uncounted
	if counts {
		d.uncounted = false
	}
	d.mu.Unlock()
	if counts {
		d.space.counted(func() {})
	}
	return nil
}

// unsettled tells those who wait for an index to be made complete why it isn't, so that they need not wait for longer than a full disk lasts.
func (d *Disk) unsettled(ix *index, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.index() != ix {
		return
	}
	d.learn(func(k *knowledge) { k.failed = err })
	if d.uncounted {
		d.space.uncountable(err)
	}
}

// announce wakes those who wait for more to be known.
func (d *Disk) announce(ix *index, names, settled bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.index() != ix {
		return
	}
	d.learn(func(k *knowledge) {
		k.names, k.settled = names, settled
		if settled {
			k.failed = nil
		}
	})
}

// knowledge is what can be said of the index at a moment.
type knowledge struct {
	ix      *index
	names   bool          // it names all that is held
	settled bool          // so it does, and all of it was verified
	failed  error         // why it could not be made to name all of that, when that was last tried
	changed chan struct{} // closed when there is something else to be said
}

func (d *Disk) knowledge() knowledge { return *d.known.Load() }

// learn changes what can be said of the index, and wakes those who wait for that. The caller holds mu, or is alone.
func (d *Disk) learn(change func(*knowledge)) {
	k := d.knowledge()
	before := k.changed
	change(&k)
	k.changed = make(chan struct{})
	d.known.Store(&k)
	close(before)
}

// complete reports whether a look-up that found nothing after k was taken has found nothing in an index that names all that is held.
func (d *Disk) complete(k knowledge) bool { return k.names && d.index() == k.ix }

// unsure reports whether a look-up that finds nothing has to make sure of it, because nobody has read the whole index yet.
func (k knowledge) unsure() bool { return k.names && !k.settled }

// Rebuilding reports whether the index is still being verified or made, so that what it doesn't name may be held all the same.
func (d *Disk) Rebuilding() bool {
	return !d.knowledge().settled
}

// Working returns why the store can't do all of its work, nil if it can: it was closed, its index is broken and no other one could be put into its place, or
// nothing can be written, as on a read-only or full file system. Images that are held are had all the same.
func (d *Disk) Working() error {
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	switch {
	case closed:
		return errClosed
	case d.index().dead.Load():
		return errors.New("the index is broken, and could not be replaced yet")
	}
	path := d.temp()
	f, err := d.fsys.Create(path, filePerm)
	if err == nil {
		// A byte, since a full file system has names to give away, and no room.
		_, err = f.Write([]byte{'\n'})
		err = errors.Join(err, f.Close(), d.fsys.Remove(path))
	}
	if err != nil {
		return fmt.Errorf("nothing can be written to the store: %w", noSpace(err))
	}
	return nil
}

// Ready waits until Rebuilding is false, however often it fails to become so.
func (d *Disk) Ready(ctx context.Context) error { return d.ready(ctx, true) }

// ready is Ready; unless patient, the first failure ends it.
func (d *Disk) ready(ctx context.Context, patient bool) error {
	for {
		k := d.knowledge()
		switch {
		case k.settled:
			return nil
		case k.failed != nil && !patient:
			return k.failed
		}
		if err := d.await(ctx, k.changed); err != nil {
			return err
		}
	}
}

func (d *Disk) await(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the store to know what it holds: %w", context.Cause(ctx))
	case <-d.ctx.Done():
		return errClosed
	}
}

func (d *Disk) index() *index { return d.known.Load().ix }

// maxReplacements is how many broken indexes in a row one call puts up with.
const maxReplacements = 3

// view reads from the index. If that is how it turns out to be broken, it reads from the one that takes its place.
func (d *Disk) view(read func(*bolt.Tx) error) error {
	return d.on(func(ix *index) error { return ix.view(read) })
}

// look looks single rows up, and is to the index as view is.
func (d *Disk) look(do func(*look) error) error {
	return d.on(func(ix *index) error { return ix.look(do) })
}

// update writes to the index, and is to it as view is.
func (d *Disk) update(change func(*bolt.Tx) error, effects ...effect) error {
	return d.on(func(ix *index) error { return ix.update(change, effects...) })
}

// commit is update for a change that says what it means for the space that is taken.
func (d *Disk) commit(w *write) error {
	return d.on(func(ix *index) error { return ix.commit(w) })
}

func (d *Disk) on(do func(*index) error) error {
	for try := 0; ; try++ {
		ix := d.index()
		err := do(ix)
		switch {
		case errors.Is(err, errClosed) && d.index() != ix:
			// It was replaced between the two lines above.
		case errors.Is(err, errPages) && try < maxReplacements:
			if err := d.replace(ix, err); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// Close writes access times and closes the store. Whatever is still being written to it is lost. Files that were opened stay open.
func (d *Disk) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.cancel()
	// The flusher ends with ctx, and so does whatever fills the index.
	d.wg.Wait()
	ix := d.index()
	d.mu.Lock()
	settled := d.knowledge().settled
	// Who finds nothing from now on is told that it is closed, and not that nothing is held.
	d.learn(func(k *knowledge) { *k = knowledge{ix: ix} })
	d.mu.Unlock()
	var err error
	if settled && !d.readOnly {
		ctx, cancel := context.WithTimeout(context.Background(), maxKeepRefs)
		d.keepRefs(ctx, ix)
		cancel()
		if err = d.flush(); err == nil {
			// If nothing is under way, and nothing has failed, the files and the index agree, and the next start needn't compare them.
			err = ix.end(func() bool { return d.locks.idle() && !d.fsys.failed.Load() })
		}
	}
	return errors.Join(err, ix.close(), d.lock.Close())
}

// schema is the version of the index. One of another version is made again; see older.go. Version 1 had JSON for rows, in version 2
// refs had no copy of the record that they answer.
const schema = 3

const stateSchema = "schema"

// isState reports whether a word was set by setState.
func isState(tx *bolt.Tx, word string) (bool, error) {
	b, err := get(tx, bucketState, []byte(word))
	n, _ := strconv.Atoi(string(b))
	return n >= readableSchema && n <= schema, err
}

func setState(tx *bolt.Tx, word string) error {
	return put(tx, bucketState, []byte(word), []byte(strconv.Itoa(schema)))
}

// locks are locks by digest.
type locks struct {
	mu sync.Mutex
	m  map[acproxy.Digest]*keyLock
}

type keyLock struct {
	mu   sync.Mutex
	uses int // holders and waiters, guarded by locks.mu
}

// idle reports whether nobody holds a lock, or waits for one.
func (l *locks) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.m) == 0
}

// lock locks a digest and returns what unlocks it.
func (l *locks) lock(digest acproxy.Digest) (unlock func()) {
	l.mu.Lock()
	if l.m == nil {
		l.m = make(map[acproxy.Digest]*keyLock)
	}
	k := l.m[digest]
	if k == nil {
		k = new(keyLock)
		l.m[digest] = k
	}
	k.uses++
	l.mu.Unlock()
	k.mu.Lock()
	return func() {
		k.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.uses--; k.uses == 0 {
			delete(l.m, digest)
		}
	}
}
