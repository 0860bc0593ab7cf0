package cache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// index is one bbolt file and the goroutine that writes it. Everything that reaches into bbolt's memory map goes through view and update: a
// broken file makes bbolt panic, or the map fault, and both become an error matching errPages here. After that the file is left alone.
type index struct {
	db   *bolt.DB
	path string

	// safe is closed when the shape of the file is known to be harmless. Until then nothing may look into it; that is a matter of the branch
	// pages only, a hundredth of the file.
	safe chan struct{}
	// complete and unclean are what the file said before safe was closed: it knew of every image; the store was not closed properly. That the first is so, no
	// later failure to write changes: nobody is told of an image that the index doesn't know.
	complete, unclean bool
	dead              atomic.Bool
	// stuck is set when bbolt panicked with one of its own locks held: closing it would never end.
	stuck atomic.Bool

	memory    *memory // is told of every change before anybody else is
	space     *space  // is told what every change makes of the sums
	snapshots snapshots
	mapped    mapped

	writes chan *write
	// marked is set when the index says that the store is open, which it does from the first change on; ending, when it is about to say that it was closed
	// properly, and nothing may change any more; failed, when a transaction could not be written, and may have been all the same.
	marked, ending, failed atomic.Bool
	quit                   chan struct{}
	// useless is closed when the index is given up that is not safe to look into.
	useless chan struct{}
	wg      sync.WaitGroup
}

// write is a change that waits for its turn to be written.
type write struct {
	change func(*bolt.Tx) error
	// effects are what the change affects of the answers that are remembered; without any, all of them are.
	effects []effect
	// loose is by how much more, once it is written, counts beside what the index names; less than 0 for what counted by itself until then. change may
	// set it.
	loose int64
	// then, if it isn't nil, is called in the moment in which loose comes to count, with the mutex of the space held.
	then func()
	last bool // nothing is written after it
	done chan error
}

// openTimeout is for how long to wait for somebody else, such as the bbolt command, to let go of the index.
const openTimeout = 2 * time.Second

// minMap is how much address space is mapped at least, so that the map needn't move, and wait for readers, each time the file grows.
const minMap = 64 << 20

// growBy is by how much the file grows at once. bbolt's own 16 MiB would be most of a small store.
const growBy = 1 << 20

// mapped bounds how much of the memory map stays in memory. bbolt reads through it: changes, and look-ups of many rows at once.
type mapped struct {
	max    int64    // bytes
	before int64    // what there was of other files when the index was opened
	statm  *os.File // nil where nobody can tell
	calls  atomic.Int64
}

// mindEvery is how many views go by until somebody minds how much of the map is in memory. That takes two microseconds.
const mindEvery = 64

// trim gives pages of the map back if there are too many. The caller sees to it that the map, of size bytes at least, stays where it is.
func (x *index) trim(size int64) {
	if residentFiles(x.mapped.statm)-x.mapped.before > x.mapped.max {
		giveBack(x.db.Info().Data, size)
	}
}

// openIndex opens an existing file. It reads no more than its head: check has to be called before it can be used. A file that bbolt couldn't
// work with is an error matching errPages.
func openIndex(path string, memory *memory, space *space, maxMapped int64) (*index, error) {
	size, err := checkHead(path)
	if err != nil {
		return nil, err
	}
	x := &index{path: path, safe: make(chan struct{}), memory: memory, space: space, writes: make(chan *write), quit: make(chan struct{}), useless: make(chan struct{})}
	if x.snapshots.f, err = os.Open(path); err != nil {
		return nil, err
	}
	x.snapshots.same = newSame()
	x.mapped.max, x.mapped.statm = maxMapped, openStatm()
	x.mapped.before = residentFiles(x.mapped.statm)
	defer func() {
		if err != nil {
			x.closeFiles()
		}
	}()
	err = x.guard(func() error {
		options := &bolt.Options{
			Timeout: openTimeout, FreelistType: bolt.FreelistMapType, InitialMmapSize: max(minMap, 2*int(size)), NoStatistics: true,
		}
		x.db, err = bolt.Open(path, filePerm, options)
		if errors.Is(err, syscall.EROFS) {
			options.ReadOnly = true
			x.db, err = bolt.Open(path, filePerm, options)
		}
		return err
	})
	if err != nil {
		return nil, notOpened(path, err)
	}
	x.db.AllocSize = growBy
	// Ends with close, which waits for it.
	x.wg.Go(x.writer)
	return x, nil
}

// notOpened is the error of opening an index that bbolt says. It matches errPages if it is about the file.
func notOpened(path string, err error) error {
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("opening %s: another program has had it open for %v: end it, or copy the file for it", path, openTimeout)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, bolterrors.ErrChecksum):
		return broken("%v", err)
	}
	return fmt.Errorf("opening %s: %w", path, brokenBy(err))
}

// readIndex opens an existing file for reading only: nothing is written to it, and what is to be written is never done. It is checked, but for its rows.
func readIndex(ctx context.Context, path string) (*index, error) {
	if _, err := checkHead(path); err != nil {
		return nil, err
	}
	x := &index{path: path, safe: make(chan struct{}), memory: newMemory(), writes: make(chan *write), quit: make(chan struct{}), useless: make(chan struct{})}
	err := x.check(ctx)
	if err == nil {
		x.snapshots.f, err = os.Open(path)
	}
	if err != nil {
		return nil, err
	}
	err = x.guard(func() (err error) {
		x.db, err = bolt.Open(path, filePerm, &bolt.Options{Timeout: openTimeout, ReadOnly: true, NoStatistics: true})
		return err
	})
	if err != nil {
		x.closeFiles()
		return nil, notOpened(path, err)
	}
	x.mapped.max = DefaultMaxMapped
	if err := x.release(); err != nil {
		return nil, errors.Join(err, x.close())
	}
	return x, nil
}

// checkHead looks at what bbolt relies on when it opens a file, and returns the file's size.
func checkHead(path string) (size int64, err error) {
	defer func() { err = brokenBy(err) }()
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	newer, _, err := readMetas(f, fi.Size())
	if err != nil {
		return 0, err
	}
	return fi.Size(), newPages(f, newer).freelist(context.Background())
}

// createIndex makes an empty index under a name of its own first: bbolt's own way of making a file is not safe against power loss.
func createIndex(fsys durable.FS, temp, path string) error {
	db, err := bolt.Open(temp, filePerm, &bolt.Options{Timeout: openTimeout, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucket([]byte(name)); err != nil {
				return err
			}
		}
		return setState(tx, stateSchema)
	})
	if err = errors.Join(err, db.Sync(), db.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := fsys.Rename(temp, path); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// check finds out whether anything in the shape of the index could bring the process down. Whatever keeps it from finding out counts as that, unless it says
// nothing of the index.
func (x *index) check(ctx context.Context) error {
	f, err := os.Open(x.path)
	if err != nil {
		return unusable(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return unusable(err)
	}
	newer, _, err := readMetas(f, fi.Size())
	if err == nil {
		p := newPages(f, newer)
		if err = p.freelist(ctx); err == nil {
			err = p.walk(ctx, nil)
		}
	}
	if ctx.Err() != nil {
		return err
	}
	return unusable(err)
}

// release lets looks, views and updates into the index.
func (x *index) release() error {
	if err := x.snapshots.take(x.memory.generation.Load()); err != nil {
		return unusable(err)
	}
	close(x.safe)
	return nil
}

// verify reads the whole index, beside its use, and returns an error matching errPages if any row of it is not as it was written, or can't be read.
func (x *index) verify(ctx context.Context) (err error) {
	if !x.db.IsReadOnly() {
		// On a read-only file system no other can be made, and what can be read of this one is served.
		defer func() { err = brokenBy(err) }()
	}
	f, err := os.Open(x.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return x.view(func(tx *bolt.Tx) error {
		// While this transaction is open, the pages of its tree are not written again.
		m, err := metaOf(f, uint64(tx.ID()))
		if err != nil {
			return err
		}
		names := make(map[string]bool)
		p := newPages(f, m)
		err = p.walk(ctx, func(bucket string, key, value []byte) error {
			if !names[bucket] {
				if !slices.Contains(buckets, bucket) {
					return broken("there is no bucket %q", bucket)
				}
				names[bucket] = true
			}
			_, err := opened(bucket, key, value)
			return err
		})
		if err != nil {
			return err
		}
		if err := p.freelist(ctx); err != nil {
			return err
		}
		return p.complete()
	})
}

// metaOf returns the meta page of a transaction that is open.
func metaOf(f *os.File, txid uint64) (meta, error) {
	for try := 0; ; try++ {
		fi, err := f.Stat()
		if err != nil {
			return meta{}, err
		}
		newer, older, err := readMetas(f, fi.Size())
		switch {
		case err == nil && newer.txid == txid:
			return newer, nil
		case err == nil && older.txid == txid:
			return older, nil
		case try == 100:
			// A page that is being written may be read half; a hundred times it isn't.
			return meta{}, errors.Join(err, broken("transaction %d has no meta page", txid))
		}
	}
}

// look looks single rows up. It is several times as fast as a view, and takes no memory map; see look.go.
func (x *index) look(do func(*look) error) error {
	if err := x.enter(); err != nil {
		return err
	}
	if x.dead.Load() {
		return broken("it was found broken before")
	}
	err := x.snapshots.look(do)
	if errors.Is(err, errPages) {
		x.dead.Store(true)
	}
	return err
}

// enter waits until it is safe to look into the index.
func (x *index) enter() error {
	select {
	case <-x.safe:
		return nil
	default:
	}
	select {
	case <-x.safe:
		return nil
	case <-x.useless:
		return broken("it can't be used, and no other one can be made")
	case <-x.quit:
		return errClosed
	}
}

// giveUp ends the waiting for an index that will not be released. Only the goroutine that would release it calls it.
func (x *index) giveUp() {
	select {
	case <-x.useless:
	default:
		close(x.useless)
	}
}

// view reads from the index.
func (x *index) view(read func(*bolt.Tx) error) error {
	if err := x.enter(); err != nil {
		return err
	}
	return x.peek(read)
}

// peek is view for an index that was checked and not released yet.
func (x *index) peek(read func(*bolt.Tx) error) error {
	if x.dead.Load() {
		return broken("it was found broken before")
	}
	var tx *bolt.Tx
	err := x.guard(func() (err error) {
		if tx, err = x.db.Begin(false); err != nil {
			return err
		}
		if x.mapped.calls.Add(1)%mindEvery == 0 {
			x.trim(tx.Size())
		}
		return read(tx)
	})
	switch {
	case tx != nil:
		if rollback := tx.Rollback(); err == nil {
			err = rollback
		}
	case errors.Is(err, errPages):
		x.stuck.Store(true)
	}
	return err
}

// update writes to the index, together with whatever else waits to be written: they share one sync. change may be called more than once. It
// returns when the change is on disk, or can't be; it can't be called off in between, because nobody could say then which it was. All answers that
// are remembered are forgotten, unless it is said which ones the change affects.
func (x *index) update(change func(*bolt.Tx) error, effects ...effect) error {
	return x.commit(&write{change: change, effects: effects})
}

// commit is update for a change that says what it means for the space that is taken.
func (x *index) commit(w *write) error {
	if x.db.IsReadOnly() {
		return noSpace(syscall.EROFS)
	}
	w.done = make(chan error, 1)
	select {
	case x.writes <- w:
		return <-w.done
	case <-x.quit:
		return errClosed
	}
}

// mark makes the index say that the store is open, before files change of which the index knows later: whoever finds that at the next start compares them. The
// caller holds the lock of the image that they are of.
func (x *index) mark() error {
	switch {
	case x.ending.Load():
		return errClosed
	case x.marked.Load():
		return nil
	}
	return x.update(func(*bolt.Tx) error { return nil }, effect{})
}

// end makes the index say that the store was closed properly, if agree says, when nothing more can be changed, that the files and the index do.
func (x *index) end(agree func() bool) error {
	x.ending.Store(true)
	return x.commit(&write{last: true, effects: []effect{{}}, change: func(tx *bolt.Tx) error {
		if x.failed.Load() || !agree() {
			return nil
		}
		return remove(tx, bucketState, []byte(stateOpen))
	}})
}

// maxTogether bounds the changes that share a transaction.
const maxTogether = 256

func (x *index) writer() {
	select {
	case <-x.safe:
	case <-x.quit:
		return
	}
	for {
		var together []*write
		select {
		case w := <-x.writes:
			together = append(together, w)
		case <-x.quit:
			return
		}
	gather:
		for len(together) < maxTogether && !together[len(together)-1].last {
			select {
			case w := <-x.writes:
				together = append(together, w)
			default:
				break gather
			}
		}
		err := x.run(together)
		for _, w := range together {
			if err != nil && len(together) > 1 {
				// One of them may have spoilt it for all.
				w.done <- x.run([]*write{w})
			} else {
				w.done <- err
			}
		}
		if together[len(together)-1].last {
			return
		}
	}
}

// run writes changes in one transaction.
func (x *index) run(changes []*write) error {
	if x.dead.Load() {
		return broken("it was found broken before")
	}
	var tx *bolt.Tx
	x.snapshots.begun.Add(1)
	var t totals
	err := x.guard(func() (err error) {
		if tx, err = x.db.Begin(true); err != nil {
			return err
		}
		if !x.marked.Load() {
			if err := setState(tx, stateOpen); err != nil {
				return err
			}
		}
		for _, w := range changes {
			if err := w.change(tx); err != nil {
				return err
			}
		}
		if t, err = getTotals(tx); err != nil {
			return err
		}
		if err = withCause(tx.Commit()); err != nil {
			x.failed.Store(true)
		}
		return err
	})
	switch {
	case err == nil:
		x.marked.Store(true)
		x.space.committed(t, x.diskBytes(), changes)
	case tx != nil:
		// If Commit got as far as closing it, this does nothing and says so.
		_ = x.guard(tx.Rollback)
	case errors.Is(err, errPages):
		x.stuck.Store(true)
	}
	if err == nil {
		// Only the next transaction can move the map, and this is where it would begin.
		x.trim(x.snapshots.size())
	}
	// After a failure too: it may have been done all the same.
	generation := x.memory.generation.Add(1)
	if taken := patiently(func() error { return x.snapshots.take(generation) }); taken != nil {
		// Whether it was written or not: without a snapshot nobody who looks would ever come to an end.
		x.snapshots.lost.Store(true)
		x.dead.Store(true)
		err = errors.Join(err, broken("what is in it can't be read: %v", taken))
	}
	var effects []effect
	for _, w := range changes {
		if len(w.effects) == 0 {
			effects = nil
			break
		}
		effects = append(effects, w.effects...)
	}
	x.memory.forget(generation, effects)
	return noSpace(err)
}

// patiently does again what has failed for too little of something, for a second.
func patiently(do func() error) error {
	const tries, pause = 20, 50 * time.Millisecond
	err := do()
	for try := 1; try < tries && acproxy.Shortage(err); try++ {
		time.Sleep(pause)
		err = do()
	}
	return err
}

// diskBytes is the space that the file takes.
func (x *index) diskBytes() int64 {
	fi, err := os.Stat(x.path)
	if err != nil {
		// It was set aside in this moment, and is counted as that.
		return 0
	}
	return diskBytes(fi)
}

// guard calls into bbolt. A panic there, and a fault of its memory map, means that the file is broken.
func (x *index) guard(call func() error) (err error) {
	before := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(before)
		if r := recover(); r != nil {
			err = broken("%v", r)
		}
		if errors.Is(err, errPages) {
			x.dead.Store(true)
		}
	}()
	return call()
}

// withCause gives an error of bbolt its cause back where that is in the text only, as with "file resize error: no space left on device".
func withCause(err error) error {
	if err == nil {
		return nil
	}
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO} {
		if text, ok := strings.CutSuffix(err.Error(), errno.Error()); ok && !errors.Is(err, errno) {
			return fmt.Errorf("%s%w", text, errno)
		}
	}
	return err
}

// close ends the writer and closes the file, once its readers are done.
func (x *index) close() error {
	close(x.quit)
	x.wg.Wait()
	x.closeFiles()
	if x.stuck.Load() {
		return nil
	}
	return x.db.Close()
}

// closeFiles closes the files that are only read.
func (x *index) closeFiles() {
	x.snapshots.f.Close()
	if x.mapped.statm != nil {
		x.mapped.statm.Close()
	}
}

// buckets are all that the index holds. A key is as described; every value begins with a checksum of key and value. What is not said to be JSON is
// as codec.go has it. Whoever changes what a value is made of changes the schema.
var buckets = []string{
	bucketState, bucketRecords, bucketManifests, bucketSignatures, bucketRefs, bucketHeld, bucketIDs, bucketSigned, bucketNames,
	bucketUninspected, bucketQuarantined, bucketUsed, bucketKnown, bucketHosts, bucketRefused, bucketPinned, bucketOrder, bucketDependents,
}

const (
	bucketState       = "state"       // a word → what it means
	bucketRecords     = "records"     // digest → held
	bucketManifests   = "manifests"   // digest → JSON as in the image
	bucketSignatures  = "signatures"  // digest → as published
	bucketRefs        = "refs"        // ref → Resolution, and a copy of the row of records
	bucketHeld        = "held"        // digest, ref → nothing: the refs that an image answers
	bucketIDs         = "ids"         // image ID, digest → nothing
	bucketSigned      = "signed"      // digest of a signature, digest → nothing
	bucketNames       = "names"       // name, 0, version, 0, digest → nothing
	bucketUninspected = "uninspected" // digest → nothing
	bucketQuarantined = "quarantined" // digest → nothing
	bucketUsed        = "used"        // digest → nanoseconds since 1970
	bucketKnown       = "known"       // name → Discovered
	bucketHosts       = "hosts"       // host of a template, 0, name → nothing
	bucketRefused     = "refused"     // number → JSON of Refused
	bucketPinned      = "pinned"      // digest → nothing
	bucketOrder       = "order"       // class, nanoseconds since 1970 of the last use, digest → nothing: the order of eviction, without what is pinned
	bucketDependents  = "dependents"  // name of a dependency, 0, digest of the image that has it → nothing
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const sumSize = 4

// sealed returns a value as it is stored. The checksum covers bucket and key, so that a value can't stand in another one's place.
func sealed(bucket string, key, value []byte) []byte {
	b := make([]byte, sumSize, sumSize+len(value))
	order.PutUint32(b, checksum(bucket, key, value))
	return append(b, value...)
}

// opened returns a value as it was before sealed, or an error matching errPages.
func opened(bucket string, key, stored []byte) ([]byte, error) {
	if len(stored) < sumSize || order.Uint32(stored) != checksum(bucket, key, stored[sumSize:]) {
		return nil, broken("the row of %s at %.40x has a wrong checksum", bucket, key)
	}
	return stored[sumSize:], nil
}

func checksum(bucket string, key, value []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(bucket))
	sum = crc32.Update(sum, castagnoli, key)
	return crc32.Update(sum, castagnoli, value)
}

// table is a bucket whose rows carry checksums.
type table struct {
	name string
	b    *bolt.Bucket
}

func tableOf(tx *bolt.Tx, name string) (table, error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return table{}, broken("the bucket %s is missing", name)
	}
	return table{name, b}, nil
}

// get returns a value, nil if there is none. It is valid until the transaction ends.
func get(tx *bolt.Tx, bucket string, key []byte) ([]byte, error) {
	t, err := tableOf(tx, bucket)
	if err != nil {
		return nil, err
	}
	stored := t.b.Get(key)
	if stored == nil {
		return nil, nil
	}
	return opened(bucket, key, stored)
}

func put(tx *bolt.Tx, bucket string, key, value []byte) error {
	t, err := tableOf(tx, bucket)
	if err != nil {
		return err
	}
	return t.b.Put(key, sealed(bucket, key, value))
}

func remove(tx *bolt.Tx, bucket string, key []byte) error {
	t, err := tableOf(tx, bucket)
	if err != nil {
		return err
	}
	return t.b.Delete(key)
}

// dense has pages of buckets filled nearly whole when they are split, in this transaction.
func dense(tx *bolt.Tx, buckets ...string) error {
	for _, bucket := range buckets {
		t, err := tableOf(tx, bucket)
		if err != nil {
			return err
		}
		t.b.FillPercent = 0.95
	}
	return nil
}

// errEnough ends a scan.
var errEnough = errors.New("enough")

// scan calls fn for the rows whose keys begin with prefix and are not before from, in order, until fn returns an error; errEnough is none.
func scan(tx *bolt.Tx, bucket string, prefix, from []byte, fn func(key, value []byte) error) error {
	t, err := tableOf(tx, bucket)
	if err != nil {
		return err
	}
	c := t.b.Cursor()
	start := prefix
	if string(from) > string(prefix) {
		start = from
	}
	for key, stored := c.Seek(start); key != nil && len(key) >= len(prefix) && string(key[:len(prefix)]) == string(prefix); key, stored = c.Next() {
		value, err := opened(bucket, key, stored)
		if err != nil {
			return err
		}
		if err := fn(key, value); err != nil {
			if err == errEnough {
				return nil
			}
			return err
		}
	}
	return nil
}

// brokenName returns where an index that is no longer used is kept.
func brokenName(path string, now time.Time) string {
	return path + ".broken-" + now.UTC().Format("20060102T150405Z") + "-" + rand.Text()[:6]
}
