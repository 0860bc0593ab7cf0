package fetch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// An Image is the answer for one client: a held file, or a file that is still arriving. It is for one goroutine. The caller closes it.
type Image struct {
	Status   Status
	Size     int64     // bytes, -1 if the publisher of an arriving image didn't say
	Modified time.Time // the Last-Modified to answer with, stable under a ref
	// ETag is a strong validator, quoted. It is known before the bytes are: of a signed image it is made from the signature, which stands for
	// exactly these bytes.
	ETag   string
	Record *cache.Record // nil while the image is arriving

	f        *Fetcher
	ref      acproxy.Ref
	file     *cache.Blob
	download *download
	reads    bool     // counts among the download's readers
	passage  *passage // of an image that is not kept
}

// open returns a held image.
func (f *Fetcher) open(req Request, a answer) (*Image, error) {
	rec := &a.record
	im := &Image{
		Status: a.status, Size: rec.Size, Modified: a.resolved.Modified, ETag: etag(rec.Signed, rec.SignatureDigest, rec.Digest), Record: rec,
		f: f,
	}
	if req.Has != "" && req.Has == im.ETag {
		return im, nil
	}
	var err error
	if im.file, err = f.cfg.Store.OpenBlob(rec.Digest); err != nil {
		return nil, fmt.Errorf("opening the image of %s: %w", rec.Name, err)
	}
	return im, nil
}

func etag(signed bool, signature, digest acproxy.Digest) string {
	if signed {
		return `"s-` + hex.EncodeToString(signature[:16]) + `"`
	}
	return `"d-` + hex.EncodeToString(digest[:16]) + `"`
}

// follow returns an arriving image. Where nothing may be delivered before the verdict, it waits for that.
func (f *Fetcher) follow(ctx context.Context, a answer, ref acproxy.Ref) (*Image, error) {
	d := a.download
	im := &Image{Status: a.status, Size: d.size, Modified: a.modified, f: f, ref: ref, download: d}
	// Asked for first: until it is false, the signature may be set at any moment.
	if d.isLater() || d.signature == nil || d.policy.Delivery == VerifyFirst {
		if err := im.Decided(ctx); err != nil {
			return nil, err
		}
		return im, nil
	}
	im.ETag = etag(true, sha256.Sum256(d.signature), acproxy.Digest{})
	file, err := d.partial.Open()
	if err != nil {
		// The download may have ended, and its file be gone, in this moment; then the verdict says why.
		if verdict := im.Decided(ctx); verdict != nil {
			return nil, verdict
		}
		return im, nil
	}
	im.file = file
	d.mu.Lock()
	d.readers++
	d.mu.Unlock()
	im.reads = true
	return im, nil
}

// Passage returns where to read an image from that is passed on without being kept: what may be delivered of it, once and in order. Reading ends with an
// error other than [io.EOF] if the image must not be completed. It is nil for all others.
func (im *Image) Passage() io.Reader {
	if im.passage == nil {
		return nil
	}
	return im.passage
}

// Arriving reports whether the image's bytes are still being received or checked.
func (im *Image) Arriving() bool { return im.Record == nil }

// File returns the file of a held image, at the offset that reading has left it. It has all bytes. It is nil while the image is arriving, and if the
// client has the image already, see [Request].
func (im *Image) File() *os.File {
	if im.Arriving() || im.file == nil {
		return nil
	}
	return im.file.File
}

// Decided waits for the verdict on an arriving image and makes it a held one, or returns why it isn't.
func (im *Image) Decided(ctx context.Context) error {
	if !im.Arriving() {
		return nil
	}
	if im.passage != nil {
		return noRoom(im.passage.ref)
	}
	select {
	case <-im.download.decided:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d := im.download
	rec, err := d.outcome()
	if err == nil {
		err = im.ref.Matches(rec.Name, rec.Labels)
	}
	if err != nil {
		return err
	}
	if im.file == nil {
		if im.file, err = d.f.cfg.Store.OpenBlob(rec.Digest); err != nil {
			return err
		}
	}
	im.Record, im.Size, im.ETag = &rec, rec.Size, etag(rec.Signed, rec.SignatureDigest, rec.Digest)
	return nil
}

// Inspected waits until a decided image's tar was inspected to its end, so that its image ID and compression are known, or returns why it
// was quarantined.
func (im *Image) Inspected(ctx context.Context) error {
	if im.download != nil {
		im.download.hurry()
	}
	if err := im.Decided(ctx); err != nil {
		return err
	}
	if im.Record.Inspected {
		return nil
	}
	if d := im.download; d != nil {
		select {
		case <-d.finished:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	} else if result, err := im.f.inspectHeld(ctx, *im.Record); ctx.Err() == nil {
		im.f.inspected(*im.Record, result, err)
	}
	rec, err := im.f.cfg.Store.Record(im.Record.Digest)
	if err != nil {
		return err
	}
	if err := im.f.acceptable(rec); err != nil {
		return err
	}
	if !rec.Inspected {
		return &acproxy.Error{Kind: acproxy.ErrBusy, Code: "not-inspected", Detail: "the image of " + rec.Name + " could not be inspected yet", RetryAfter: time.Second}
	}
	im.Record = &rec
	return nil
}

// Await waits until more than offset bytes of the image may be delivered and returns how many that are. Once all of them may be and there
// are no more than offset, it returns [io.EOF]. Any other error means that the image must not be completed: reset the connection.
func (im *Image) Await(ctx context.Context, offset int64) (int64, error) {
	if !im.Arriving() {
		return atLeast(im.Size, offset)
	}
	for {
		d := im.download
		d.mu.Lock()
		changed, manifest := d.changed, d.manifest
		deliverable := d.deliverable()
		d.mu.Unlock()
		if manifest != nil {
			if err := im.ref.Matches(manifest.Name, manifest.Labels); err != nil {
				return 0, err
			}
		}
		select {
		case <-d.decided:
			if err := im.Decided(ctx); err != nil {
				return 0, err
			}
			return atLeast(im.Size, offset)
		default:
		}
		if deliverable > offset {
			return deliverable, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// deliverable returns how many bytes may be delivered before there is a verdict: all but the last ones, so that nobody has the whole image before. Where
// its size isn't known, any may be the last. The caller holds the mutex.
func (d *download) deliverable() int64 {
	if d.size < 0 {
		return d.written - d.f.cfg.HoldBack
	}
	return min(d.written, d.size-d.f.cfg.HoldBack)
}

func atLeast(size, offset int64) (int64, error) {
	if size <= offset {
		return size, io.EOF
	}
	return size, nil
}

// Growing returns the file of an image for reading what Await says is there.
func (im *Image) Growing() *os.File { return im.file.File }

// Close closes the image's file. The fetching of an arriving image goes on.
func (im *Image) Close() error {
	if im.passage != nil {
		return im.passage.close()
	}
	if im.reads {
		im.reads = false
		im.download.leave()
	}
	if im.file == nil {
		return nil
	}
	return im.file.Close()
}

// leave counts one of the readers less.
func (d *download) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.readers--; d.readers == 0 && d.quiet != nil {
		close(d.quiet)
		d.quiet = nil
	}
}

// readersFor is how long the inspection lets those who read the image go first. The slow ones among them take little of the processor.
const readersFor = 5 * time.Second

// awaitReaders waits until those who began to read the image while it arrived have it, or for some time.
func (d *download) awaitReaders() {
	d.mu.Lock()
	if d.readers == 0 {
		d.mu.Unlock()
		return
	}
	if d.quiet == nil {
		d.quiet = make(chan struct{})
	}
	quiet := d.quiet
	d.mu.Unlock()
	timer := time.NewTimer(readersFor)
	defer timer.Stop()
	select {
	case <-quiet:
	case <-timer.C:
	case <-d.urgent:
	case <-d.ctx.Done():
	}
}

// follower reads a download as it arrives, all of it, without regard to what may be delivered: the inspection's view.
type follower struct {
	d      *download
	file   *cache.Blob
	offset int64
	idle   bool // the manifest has been read: the rest can wait
}

// Read waits for bytes that haven't been read yet. It returns io.EOF after the last byte of a body that ended well, and the download's error
// otherwise.
func (r *follower) Read(p []byte) (int, error) {
	if r.idle {
		// What is left to inspect must not take the processor from what nodes are waiting for: the verdict, and then the bytes.
		select {
		case <-r.d.decided:
		case <-r.d.urgent:
		case <-r.d.ctx.Done():
			return 0, context.Cause(r.d.ctx)
		}
		r.d.awaitReaders()
		r.idle = false
	}
	for {
		// Reading what is there already may take long, too, and nobody may want it any more.
		if r.d.ctx.Err() != nil {
			return 0, context.Cause(r.d.ctx)
		}
		r.d.mu.Lock()
		written, complete, changed := r.d.written, r.d.complete, r.d.changed
		r.d.mu.Unlock()
		if r.offset < written {
			n, err := r.file.ReadAt(p[:min(int64(len(p)), written-r.offset)], r.offset)
			r.offset += int64(n)
			if n > 0 {
				return n, nil
			}
			if err == io.EOF {
				// That is this machine's fault and must not look like the end of what the publisher sent.
				err = fmt.Errorf("%s has lost bytes that were written to it, it ends after %d", r.file.Name(), r.offset)
			}
			return 0, err
		}
		if complete {
			return 0, io.EOF
		}
		// The verdict that ends a download early comes with a cancelled context.
		select {
		case <-changed:
		case <-r.d.ctx.Done():
			return 0, context.Cause(r.d.ctx)
		}
	}
}
