package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// syncEvery is how much is written to a partial file before what there is of it is synced, beside the writing, so that the sync at the end is short: a
// quarter of a second otherwise, for 500 MB, while everybody waits for the last bytes. Telling the system to begin writing back (sync_file_range) helps less.
const syncEvery = 32 << 20

// An Arrival says what is arriving, so that it can be taken up again where a cut connection, or the end of the process, has left it.
type Arrival struct {
	// Key is what the bytes are, in the words of whoever fetches them: the same key stands for the same bytes. An arrival without a key can't be
	// taken up again.
	Key    string      `json:"key,omitempty"`
	Ref    acproxy.Ref `json:"ref,omitzero"` // a ref that asked for it
	Source string      `json:"source,omitempty"`
	Size   int64       `json:"size"` // bytes there will be, -1 if nobody has said
	// Validators are what the publisher sent to tell other bytes by, as in a Resolution.
	Validators map[string]string `json:"validators,omitempty"`
	Began      time.Time         `json:"began,omitzero"`
}

// A Partial is an image that is arriving: a temporary file that becomes a blob when it is committed. One goroutine writes it and ends it; Open
// and Size may be called by any at any time.
//
// Beside the file of an arrival that has a key lies a note of the arrival. A file with a readable note is kept when the process ends, and can be had by
// [Disk.Resume] later. Neither is synced: what is resumed is judged like everything else, and a file that lost bytes with the power doesn't pass.
type Partial struct {
	disk    *Disk
	ctx     context.Context // bounds the waits for space
	file    durable.File
	temp    string // where the file is until it is committed
	size    atomic.Int64
	noted   atomic.Int64 // bytes of the note
	behind  behind       // syncs the file beside the writing
	room    int64        // how long the file may become by what was promised; of the goroutine that writes
	arrival Arrival      // as it was last noted
	lease   *lease
	before  *lease // of those who read the blob in whose place the file has come
	old     int64  // bytes of that blob

	promised int64 // bytes that count for it; guarded by the mutex of the disk's space

	mu        sync.Mutex
	path      string // "" once it was discarded
	committed acproxy.Digest
	ended     bool
}

var errEnded = errors.New("the partial image was committed, suspended or discarded already")

// Begin implements [Store].
func (d *Disk) Begin(ctx context.Context, arrival Arrival) (*Partial, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := d.forget(ctx, arrival.Key); err != nil {
		return nil, err
	}
	path := d.temp() + partialExt
	p := &Partial{disk: d, ctx: ctx, temp: path, path: path, arrival: Arrival{Ref: arrival.Ref, Source: arrival.Source}, lease: new(lease)}
	if err := p.promise(max(0, arrival.Size)); err != nil {
		return nil, err
	}
	if err := p.create(arrival); err != nil && (!d.relief(ctx, err, blockSize) || p.create(arrival) != nil) {
		p.forgo()
		return nil, fmt.Errorf("beginning an image: %w", noSpace(err))
	}
	return p, p.register()
}

// create makes the file and its note.
func (p *Partial) create(arrival Arrival) error {
	var err error
	if p.file, err = p.disk.fsys.Create(p.temp, filePerm); err != nil {
		return err
	}
	if err := p.Note(arrival); err != nil {
		return errors.Join(err, p.close(), p.disk.removePartial(p.temp))
	}
	return nil
}

// register discards the partial if the store is closed.
func (p *Partial) register() error {
	p.disk.mu.Lock()
	closed := p.disk.closed
	p.disk.mu.Unlock()
	if closed {
		return errors.Join(errClosed, p.Discard())
	}
	return nil
}

// promise asks for the space that a partial of some size needs, beyond what was promised to it before.
func (p *Partial) promise(size int64) error {
	s := p.disk.space
	s.mu.Lock()
	more := blocks(size) + allowance - p.promised
	s.mu.Unlock()
	if err := s.promise(p.ctx, more, p.what()); err != nil {
		return err
	}
	p.promisedMore(more, size)
	return nil
}

func (p *Partial) promisedMore(more, size int64) {
	s := p.disk.space
	s.mu.Lock()
	p.promised += more
	s.arriving[p] = struct{}{}
	s.mu.Unlock()
	p.room = blocks(size)
}

// what says what arrives, for people.
func (p *Partial) what() string {
	switch {
	case !p.arrival.Ref.IsZero():
		return "the image of " + p.arrival.Ref.String()
	case p.arrival.Source != "":
		return "the image at " + p.arrival.Source
	}
	return "an image"
}

// onDisk is the space that the partial's files take.
func (p *Partial) onDisk() int64 { return blocks(p.Size()) + p.noted.Load() }

// noteBytes is the space that the note of an arrival takes.
const noteBytes = blockSize

// forgo gives back what was promised.
func (p *Partial) forgo() { p.disk.space.add(-p.detach(0)) }

// detach ends the counting of what was promised to the partial, of which so much goes on to count as suspended. It returns the rest, which counts until
// it is released.
func (p *Partial) detach(keep int64) (rest int64) {
	s := p.disk.space
	s.mu.Lock()
	defer s.mu.Unlock()
	rest = p.promised - keep
	p.promised = 0
	s.suspended += keep
	delete(s.arriving, p)
	return rest
}

// Arrival returns what is arriving, as it was last noted. It is for the goroutine that writes.
func (p *Partial) Arrival() Arrival { return p.arrival }

// Note keeps what is known of the arrival now in the place of what was known.
//
//	note: create, write, rename
func (p *Partial) Note(arrival Arrival) error {
	if arrival.Key == "" {
		p.arrival = arrival
		return nil
	}
	note, err := seal(arrival)
	if err != nil {
		return err
	}
	temp := p.disk.temp()
	file, err := p.disk.fsys.Create(temp, filePerm)
	if err != nil {
		return noSpace(err)
	}
	_, err = file.Write(note)
	if err = errors.Join(err, file.Close()); err == nil {
		err = p.disk.fsys.Rename(temp, notePath(p.temp))
	}
	if err != nil {
		// What can't be removed is removed at the next start.
		_ = p.disk.fsys.Remove(temp)
		return noSpace(err)
	}
	p.arrival = arrival
	p.noted.Store(noteBytes)
	return nil
}

// notePath returns where the note of a partial file is.
func notePath(partial string) string { return partial + sidecarExt }

// Write appends to the image. If it becomes longer than was said when it began, space for it is asked for in steps, and waited for. A full disk and an
// exhausted quota are errors matching [acproxy.ErrNoSpace].
func (p *Partial) Write(b []byte) (int, error) {
	if size := p.Size() + int64(len(b)); size > p.room {
		if err := p.grow(size); err != nil {
			return 0, err
		}
	}
	n, err := p.write(b)
	if err != nil && p.disk.relief(p.ctx, err, int64(len(b)-n)) {
		var more int
		more, err = p.write(b[n:])
		n += more
	}
	return n, noSpace(err)
}

func (p *Partial) write(b []byte) (int, error) {
	n, err := p.file.WriteAt(b, p.size.Load())
	if size := p.size.Add(int64(n)); err == nil && size-p.behind.begun >= syncEvery {
		err = p.behind.sync(p.file, size)
	}
	return n, err
}

// behind syncs a file beside its being written. It belongs to the goroutine that writes.
type behind struct {
	begun   int64      // how long the file was when a sync was last begun
	syncing chan error // gives what came of it; nil if none has begun
	failed  error
}

// sync begins to sync what there is of the file, unless that goes on already, and returns what went wrong before.
func (b *behind) sync(file durable.File, size int64) error {
	if b.syncing != nil {
		select {
		case b.failed = <-b.syncing:
			b.syncing = nil
		default:
			return nil
		}
	}
	if b.failed != nil {
		return b.failed
	}
	b.begun = size
	syncing := make(chan error, 1)
	// Ends with the sync; wait waits for it, before the file is closed.
	go func() { syncing <- file.Sync() }()
	b.syncing = syncing
	return nil
}

// wait waits for a sync that goes on. It returns what any of them failed with: the system says that only once.
func (b *behind) wait() error {
	if b.syncing != nil {
		b.failed = <-b.syncing
		b.syncing = nil
	}
	return b.failed
}

// sync makes sure that all of the file is on the disk.
func (p *Partial) sync() error {
	if err := p.behind.wait(); err != nil {
		return err
	}
	return p.file.Sync()
}

// close closes the file.
func (p *Partial) close() error {
	// What it failed with is of interest to those only for whom the file has to be on the disk, now or later; they ask before.
	_ = p.behind.wait()
	return p.file.Close()
}

// grow asks for the space of an image that becomes longer than was known.
func (p *Partial) grow(size int64) error {
	// A whole step, if it costs nobody anything.
	if step := blocks(size) + promiseStep - p.room; p.disk.space.tryPromise(step) {
		p.promisedMore(step, size+promiseStep)
		return nil
	}
	return p.promise(size)
}

// Size returns how many bytes have been written.
func (p *Partial) Size() int64 { return p.size.Load() }

// Open opens the image for reading, while it is written and after it was committed. The file has an offset of its own; the caller closes it,
// before or after the image is committed or discarded; until then it is in use. After Discard, and if the committed image is not held any more, it
// returns an error matching [acproxy.ErrNotFound].
func (p *Partial) Open() (*Blob, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	discarded := notFound("discarded", "the arriving image was discarded")
	ls, l := &p.disk.leases, p.lease
	switch {
	case p.path == "":
		return nil, discarded
	case p.committed.IsZero():
		ls.join(l)
	default:
		if l = ls.take(p.committed, false); l == nil {
			return nil, discarded
		}
	}
	f, err := os.Open(p.path)
	if err != nil {
		ls.give(l, false)
		if errors.Is(err, fs.ErrNotExist) {
			err = discarded
		}
		return nil, err
	}
	return ls.blob(f, l), nil
}

// end makes sure that the image is committed or discarded once.
func (p *Partial) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return errEnded
	}
	p.ended = true
	return nil
}

// Discard removes the image. After Commit and Suspend it does nothing.
func (p *Partial) Discard() error {
	if p.end() != nil {
		return nil
	}
	return p.drop()
}

// Suspend ends the writing and keeps what has arrived for [Disk.Resume]. An arrival without a key, or of which nothing has come, is discarded, and so is one
// that Suspend returns an error of: some of it may never come to the disk. After Commit and Discard it does nothing.
func (p *Partial) Suspend() error {
	if p.arrival.Key == "" || p.Size() == 0 || p.disk.keepPartials < 0 {
		return p.Discard()
	}
	if p.end() != nil {
		return nil
	}
	// The system tells once what a sync failed with: whoever takes the file up again would commit bytes that may never have come to the disk.
	if err := errors.Join(p.behind.wait(), p.close()); err != nil {
		return errors.Join(noSpace(err), p.drop())
	}
	d := p.disk
	left := suspended{path: p.temp, size: p.Size(), since: d.now(), arrival: p.arrival, lease: p.lease}
	d.space.release(p.detach(left.bytes()))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suspended[p.arrival.Key] = left
	return nil
}

func (p *Partial) drop() error {
	p.mu.Lock()
	p.path = ""
	p.mu.Unlock()
	err := p.close()
	if errors.Is(err, fs.ErrClosed) {
		err = nil
	}
	err = errors.Join(err, p.removeNote(), p.disk.removeIfThere(p.temp))
	// Who still reads it keeps its bytes on the disk.
	open := blocks(p.Size())
	p.disk.space.add(open - p.disk.leases.unlinked(p.lease, open) + p.displaced())
	p.forgo()
	return err
}

func (p *Partial) removeNote() error {
	if p.arrival.Key == "" {
		return nil
	}
	return p.disk.removeIfThere(notePath(p.temp))
}

// Commit makes the image one that is held: its record, its manifest, its signature as published (nil if there is none) and the refs that it
// answers, whose digest Commit sets. When it returns nil, all of it survives a crash; when it returns an error, the image is discarded. If the
// same bytes are held already, the refs are added to those there are, and what the last inspection found out is kept.
//
//	fsync blob ─▶ sidecar: create, write, fsync, rename, fsync directory ─▶ rename blob ─▶ fsync directory ─▶ index transaction (shared), fsync
//
// The sidecar is durable before the blob gets its name, and the index names nothing before both are in place. So a crash leaves one of these:
// nothing but temporary files; a sidecar without a blob, which the next start removes; or all of it, which the next start takes into the index.
func (p *Partial) Commit(ctx context.Context, rec Record, manifest, signature []byte, refs ...Resolution) error {
	if err := p.end(); err != nil {
		return err
	}
	rec, err := p.checked(ctx, rec, signature, refs)
	if err != nil {
		return errors.Join(err, p.drop())
	}
	// The longest wait, and nobody needs to wait for it in turn.
	if err = p.sync(); err == nil {
		err = p.close()
	}
	if err != nil {
		return errors.Join(noSpace(err), p.drop())
	}
	displaced, err := p.settle(ctx, rec, manifest, signature, refs)
	if err != nil {
		return fmt.Errorf("committing %v: %w", rec.Digest, errors.Join(noSpace(err), p.drop()))
	}
	if err := p.removeNote(); err != nil {
		// The image is held all the same, and the next start removes it.
		p.disk.log.Error("removing the note of an arrival", "digest", rec.Digest, "err", err)
	}
	p.disk.keepHeard(rec.Name)
	p.disk.rewrite(displaced)
	return nil
}

func (p *Partial) checked(ctx context.Context, rec Record, signature []byte, refs []Resolution) (Record, error) {
	if ctx.Err() != nil {
		return rec, context.Cause(ctx)
	}
	if err := acproxy.CheckName(rec.Name); err != nil {
		return rec, err
	}
	switch {
	case rec.Digest.IsZero():
		return rec, acproxy.Invalid("the record of %s has no digest", rec.Name)
	case rec.Size != p.Size():
		return rec, acproxy.Invalid("the record of %s says %d bytes, and %d were written", rec.Name, rec.Size, p.Size())
	case rec.Signed != (len(signature) > 0):
		return rec, acproxy.Invalid("the record of %s doesn't agree with its signature of %d bytes", rec.Name, len(signature))
	}
	for i := range refs {
		if refs[i].Ref.IsZero() {
			return rec, acproxy.Invalid("a resolution of %s has no ref", rec.Name)
		}
		refs[i].Digest = rec.Digest
	}
	if rec.State == "" {
		rec.State = OK
	}
	return rec, p.disk.number(refs)
}

// settle makes sure that there is space for what is known of the image, and lands it: twice if the disk is full and room can be made on it.
func (p *Partial) settle(ctx context.Context, rec Record, manifest, signature []byte, refs []Resolution) (displaced []acproxy.Digest, err error) {
	if err := p.promiseRest(ctx, manifest, signature, refs); err != nil {
		return nil, err
	}
	for again := false; ; again = true {
		img := &image{Record: rec, Manifest: manifest, Signature: signature, Refs: slices.Clone(refs)}
		before, err := p.land(img, &displaced)
		switch {
		case err == nil:
			return displaced, nil
		case !again && p.disk.relief(ctx, err, blocks(img.sidecar)):
		case before == nil || before.Record.lost():
			return nil, errors.Join(err, p.undo(rec.Digest))
		default:
			return nil, err
		}
	}
}

// promiseRest asks for the space of sidecar and rows, and gives back what was promised for more bytes than have come.
func (p *Partial) promiseRest(ctx context.Context, manifest, signature []byte, refs []Resolution) error {
	about := len(manifest) + len(signature)
	for _, r := range refs {
		about += len(r.Ref.String()) + len(r.Source)
	}
	// In a sidecar quotes are escaped, and pages of the index are seldom full.
	need := blocks(p.Size()) + max(allowance, noteBytes+2*blocks(2*int64(about))+2*housekeepingPerImage)
	s := p.disk.space
	s.mu.Lock()
	more := need - p.promised
	s.mu.Unlock()
	if err := s.promise(ctx, more, p.what()); err != nil {
		return err
	}
	s.mu.Lock()
	p.promised += more
	s.mu.Unlock()
	return nil
}

// land brings a synced file and what is known of it to where they belong. It returns what was known of the image before, nil if it was not held.
func (p *Partial) land(img *image, displaced *[]acproxy.Digest) (before *image, err error) {
	d, digest := p.disk, img.Record.Digest
	defer d.locks.lock(digest)()
	if before, err = d.imageLocked(digest); err != nil {
		return before, err
	}
	if before != nil {
		img.merge(before)
	}
	file, err := img.seal()
	if err != nil {
		return before, err
	}
	if err := d.on((*index).mark); err != nil {
		return before, err
	}
	if err := d.writeSidecar(img, file); err != nil {
		return before, err
	}
	if err := p.place(before, digest); err != nil {
		return before, err
	}
	if err := d.fsys.SyncDir(filepath.Dir(d.blobPath(digest))); err != nil {
		return before, err
	}
	// From then on the index counts what was promised until then.
	w := &write{effects: []effect{{digest, img.Refs}}, change: func(tx *bolt.Tx) (err error) {
		*displaced, err = putImage(tx, img)
		return err
	}, then: func() {
		d.space.loose += p.displaced() - p.promised
		p.promised = 0
		delete(d.space.arriving, p)
	}}
	if err := d.commit(w); err != nil {
		return before, err
	}
	d.space.loosen()
	d.measureDir(filepath.Join(blobDir, shard(digest)))
	return before, nil
}

// place gives the file its name. An image that is held already gets the new bytes too: these have just been verified. Those who read the old ones go
// on doing so, and who reads the new ones while they arrive keeps the image from now on.
func (p *Partial) place(before *image, digest acproxy.Digest) error {
	d, path := p.disk, p.disk.blobPath(digest)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.committed.IsZero() {
		return nil
	}
	d.leases.leave(digest, true)
	if err := d.fsys.Rename(p.temp, path); err != nil {
		d.leases.stays(digest)
		return err
	}
	d.bar(digest, "")
	p.path, p.committed = path, digest
	p.before = d.leases.replaced(digest, p.lease)
	if before != nil {
		p.old = before.Record.blobBytes()
	}
	return nil
}

// displaced returns how much of the blob that was there before still has to be counted, because somebody reads it. Until the index knows of the new
// one, it counts the old one.
func (p *Partial) displaced() int64 {
	if p.before == nil {
		return 0
	}
	old := p.old - p.disk.leases.unlinked(p.before, p.old)
	p.before = nil
	return old
}

// merge adds what was known of the same bytes before.
func (img *image) merge(before *image) {
	rec, old := &img.Record, before.Record
	img.Refs = mergeRefs(before.Refs, img.Refs)
	if len(img.Signature) == 0 && len(before.Signature) > 0 {
		img.Signature, rec.Signed, rec.SignatureDigest = before.Signature, old.Signed, old.SignatureDigest
		rec.Signers, rec.Hashed, rec.RktWarning = old.Signers, old.Hashed, old.RktWarning
	}
	rec.Pinned = rec.Pinned || old.Pinned
	if rec.Inspected {
		return
	}
	// The same bytes: what was found in them then would be found again.
	rec.Inspected, rec.ImageID, rec.Compression, rec.Uncompressed = old.Inspected, old.ImageID, old.Compression, old.Uncompressed
	if old.Quarantined() && !old.lost() {
		rec.State, rec.Code, rec.Reason = old.State, old.Code, old.Reason
	}
}

// undo removes what land has left of an image that isn't held after all, of one that is marked as lost its bytes. If the index names it nevertheless (its transaction
// failed and yet was done) it is left.
func (p *Partial) undo(digest acproxy.Digest) error {
	d := p.disk
	defer d.locks.lock(digest)()
	var before held
	named := false
	err := d.view(func(tx *bolt.Tx) (err error) {
		before, named, err = getRecord(tx, digest)
		return err
	})
	switch {
	case err != nil || named && !before.lost():
		return err
	case named:
		return errors.Join(d.removeIfThere(d.blobPath(digest)), d.fsys.SyncDir(filepath.Dir(d.blobPath(digest))))
	}
	return d.removeFiles(digest)
}
