package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// writebackEvery is how much is written to a partial file before the operating system is told to begin bringing it to the disk, so that the
// sync at the end is short.
const writebackEvery = 8 << 20

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
	file    durable.File
	temp    string // where the file is until it is committed
	size    atomic.Int64
	sent    int64   // how much of it writeback was started for
	arrival Arrival // as it was last noted

	mu    sync.Mutex
	path  string // "" once it was discarded
	ended bool
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
	file, err := d.fsys.Create(path, filePerm)
	if err != nil {
		return nil, fmt.Errorf("beginning an image: %w", noSpace(err))
	}
	p := &Partial{disk: d, file: file, temp: path, path: path}
	if err := p.Note(arrival); err != nil {
		return nil, errors.Join(fmt.Errorf("beginning an image: %w", err), p.Discard())
	}
	return p, p.register()
}

// register makes the partial one of those that count. If the store is closed it is discarded.
func (p *Partial) register() error {
	d := p.disk
	d.mu.Lock()
	closed := d.closed
	if !closed {
		d.partials[p] = struct{}{}
	}
	d.mu.Unlock()
	if closed {
		return errors.Join(errClosed, p.Discard())
	}
	return nil
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
	return nil
}

// notePath returns where the note of a partial file is.
func notePath(partial string) string { return partial + sidecarExt }

// Write appends to the image. A full disk is an error matching [acproxy.ErrNoSpace].
func (p *Partial) Write(b []byte) (int, error) {
	n, err := p.file.WriteAt(b, p.size.Load())
	size := p.size.Add(int64(n))
	if size-p.sent >= writebackEvery {
		durable.StartWriteback(p.file, p.sent, size-p.sent)
		p.sent = size
	}
	return n, noSpace(err)
}

// Size returns how many bytes have been written.
func (p *Partial) Size() int64 { return p.size.Load() }

// Open opens the image for reading, while it is written and after it was committed. The file has an offset of its own; the caller closes it,
// before or after the image is committed or discarded. After Discard it returns an error matching [acproxy.ErrNotFound].
func (p *Partial) Open() (*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.path == "" {
		return nil, notFound("discarded", "the arriving image was discarded")
	}
	return os.Open(p.path)
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

// moved notes where the file is now, "" for nowhere.
func (p *Partial) moved(path string) {
	p.mu.Lock()
	p.path = path
	p.mu.Unlock()
	p.disk.mu.Lock()
	defer p.disk.mu.Unlock()
	delete(p.disk.partials, p)
}

// Discard removes the image. After Commit and Suspend it does nothing.
func (p *Partial) Discard() error {
	if p.end() != nil {
		return nil
	}
	return p.drop()
}

// Suspend ends the writing and keeps what has arrived for [Disk.Resume]. An arrival without a key, or of which nothing has come, is discarded. After
// Commit and Discard it does nothing.
func (p *Partial) Suspend() error {
	if p.arrival.Key == "" || p.Size() == 0 || p.disk.keepPartials < 0 {
		return p.Discard()
	}
	if p.end() != nil {
		return nil
	}
	if err := p.file.Close(); err != nil {
		return errors.Join(err, p.drop())
	}
	d := p.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.partials, p)
	d.suspended[p.arrival.Key] = suspended{path: p.temp, size: p.Size(), since: d.now(), arrival: p.arrival}
	return nil
}

func (p *Partial) drop() error {
	p.moved("")
	err := p.file.Close()
	if errors.Is(err, fs.ErrClosed) {
		err = nil
	}
	return errors.Join(err, p.removeNote(), p.disk.removeIfThere(p.temp))
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
	if err = p.file.Sync(); err == nil {
		err = p.file.Close()
	}
	if err != nil {
		return errors.Join(noSpace(err), p.drop())
	}
	img := &image{Record: rec, Manifest: manifest, Signature: signature, Refs: refs}
	displaced, err := p.land(img)
	if err != nil {
		return fmt.Errorf("committing %v: %w", rec.Digest, errors.Join(noSpace(err), p.drop()))
	}
	if err := p.removeNote(); err != nil {
		// The image is held all the same, and the next start removes it.
		p.disk.log.Error("removing the note of an arrival", "digest", rec.Digest, "err", err)
	}
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

// land brings a synced file and what is known of it to where they belong.
func (p *Partial) land(img *image) (displaced []acproxy.Digest, err error) {
	d, digest := p.disk, img.Record.Digest
	defer d.locks.lock(digest)()
	before, err := d.imageLocked(digest)
	if err != nil {
		return nil, err
	}
	if before != nil {
		img.merge(before)
	}
	err = d.writeSidecar(img)
	if err == nil {
		// An image that is held already gets the new bytes too: these have just been verified.
		err = d.fsys.Rename(p.temp, d.blobPath(digest))
	}
	if err == nil {
		p.moved(d.blobPath(digest))
		err = d.fsys.SyncDir(filepath.Dir(d.blobPath(digest)))
	}
	if err == nil {
		err = d.update(func(tx *bolt.Tx) (err error) {
			displaced, err = putImage(tx, img)
			return err
		})
	}
	if err != nil && before == nil {
		return nil, errors.Join(err, d.undo(digest))
	}
	return displaced, err
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

// undo removes what land has left of an image that isn't held after all. If the index names it nevertheless (its transaction failed and yet was
// done) it is left.
func (d *Disk) undo(digest acproxy.Digest) error {
	named := false
	err := d.view(func(tx *bolt.Tx) (err error) {
		_, named, err = getRecord(tx, digest)
		return err
	})
	if err != nil || named {
		return err
	}
	return d.removeFiles(digest)
}
