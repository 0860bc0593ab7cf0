package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// A Schedule says how what is kept is read again, so that what the disk has lost is found before somebody asks for it.
type Schedule struct {
	Every time.Duration // within which time every image is read; 0 reads none
	Rate  int64         // bytes in a second at most; 0 sets no limit. If it is too little for Every, it takes longer.
}

// The codes of findings that are about what is known of an image. Those about its bytes are the codes of quarantined images.
const (
	CodeSidecarMissing    = "sidecar-missing"    // what is known of the image is in the index only
	CodeSidecarUnreadable = "sidecar-unreadable" // the sidecar is damaged
	CodeSidecarDiffers    = "sidecar-differs"    // the sidecar says something else than the index
	CodeImageIDDiffers    = "image-id-differs"   // the bytes are right, and have another image ID than was noted
	CodeFound             = "blob-found"         // bytes of an image that is marked as lost
	CodeUnstable          = "blob-unstable"      // the bytes were read twice, and were wrong once
)

// A Finding is something that is not as it should be in a store.
type Finding struct {
	Code     string         `json:"code"`
	Path     string         `json:"path"` // of the file, in the store's directory; "" if it is about none
	Image    string         `json:"image,omitempty"`
	Digest   acproxy.Digest `json:"digest,omitzero"`
	Detail   string         `json:"detail"`           // what is wrong
	Repair   string         `json:"repair,omitempty"` // what is done about it
	Repaired bool           `json:"repaired"`         // whether it was
	Note     bool           `json:"note,omitempty"`   // it is worth knowing, and nothing is wrong
}

// A Scrubbed is what reading all images has come to, so far or in the end.
type Scrubbed struct {
	Images   int64         `json:"images"`   // images read whose bytes are as they should be
	Bytes    int64         `json:"bytes"`    // bytes read
	Problems int64         `json:"problems"` // findings
	Gone     int64         `json:"gone"`     // images that were evicted, deleted or replaced while they were read
	Known    int64         `json:"known"`    // images whose bytes were known to be lost before
	OfImages int64         `json:"ofImages"` // images there are
	OfBytes  int64         `json:"ofBytes"`  // bytes there are, about
	Took     time.Duration `json:"took,omitempty"`
}

// Scrubbing is how far the reading in the background has come.
type Scrubbing struct {
	Position float64   `json:"position"`          // of the images that there are, which part has been read in this round
	Began    time.Time `json:"began,omitzero"`    // when this round began
	Finished time.Time `json:"finished,omitzero"` // when the last round ended, zero if none has
	Scrubbed Scrubbed  `json:"scrubbed"`          // since the store was opened, that on demand included
}

// ScrubOptions say how to read all images at once. The zero value is fine.
type ScrubOptions struct {
	Rate     int64          // bytes in a second at most; 0 sets no limit
	Progress func(Scrubbed) // is told how far it has come, after each image and now and then within one; nil means nobody is told
	Found    func(Finding)  // is told what is found, as it is found; nil means nobody is told
}

// scrub is the state of reading what is kept.
type scrub struct {
	one   chan struct{} // holds something while an image is read: one at a time
	early chan struct{} // tells the reading in the background that something is due that wasn't

	mu      sync.Mutex
	all     bool // somebody reads all images on demand
	demands int  // how often somebody has read all images on demand, so that a new round has begun
	state   Scrubbing
	failed  map[acproxy.Digest]time.Time // images that could not be read or repaired, and when to try again
}

// again notes that the reading or the repair of an image has failed with an error, so that it is tried again before its turn; with nil, that it hasn't.
func (s *scrub) again(digest acproxy.Digest, now time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		delete(s.failed, digest)
		return
	}
	if s.failed == nil {
		s.failed = make(map[acproxy.Digest]time.Time)
	}
	s.failed[digest] = now.Add(scrubAgain)
	select {
	case s.early <- struct{}{}:
	default: // it has been told already
	}
}

// dueAgain returns an image that is to be tried again now, or after which time the next one is.
func (s *scrub) dueAgain(now time.Time) (digest acproxy.Digest, ok bool, after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	after = scrubLook
	for digest, when := range s.failed {
		if !now.Before(when) {
			return digest, true, 0
		}
		after = min(after, when.Sub(now))
	}
	return digest, false, after
}

// Words of the state bucket.
const (
	stateScrubNext     = "scrub-next"     // the digest to go on with
	stateScrubBegan    = "scrub-began"    // nanoseconds since 1970
	stateScrubFinished = "scrub-finished" // nanoseconds since 1970
)

// Scrub reads all images now, and repairs what it can: bytes that are not what they were are moved to the quarantine directory, and their image counts
// as lost until it is fetched again; what is known of an image is written again from the index. It returns what it has come to when ctx ends it, too. If
// all images are being read already, that is an error matching [acproxy.ErrBusy]. An image that can't be read or repaired doesn't end it: the others are read, and
// the error names all that failed.
func (d *Disk) Scrub(ctx context.Context, o ScrubOptions) (Scrubbed, error) {
	if err := d.Ready(ctx); err != nil {
		return Scrubbed{}, err
	}
	d.scrub.mu.Lock()
	busy := d.scrub.all
	d.scrub.all = true
	d.scrub.mu.Unlock()
	if busy {
		return Scrubbed{}, &acproxy.Error{Kind: acproxy.ErrBusy, Code: "scrubbing", Detail: "all images are being read already: wait for the end of that"}
	}
	defer func() {
		d.scrub.mu.Lock()
		defer d.scrub.mu.Unlock()
		d.scrub.all = false
	}()
	began := d.now()
	u := d.space.usage()
	s := &scrubber{d: d, pace: &pacer{rate: o.Rate}, progress: o.Progress, found: o.Found, sum: Scrubbed{OfImages: u.Images, OfBytes: u.Blobs}}
	var next acproxy.Digest
	var failures []error
	for more := true; more; {
		digest, ok, err := d.scrubAfter(next)
		if err != nil {
			return s.sum, errors.Join(append(failures, err)...)
		}
		if !ok {
			break
		}
		err = s.image(ctx, digest)
		s.sum.Took = d.now().Sub(began)
		switch {
		case ctx.Err() != nil:
			return s.sum, context.Cause(ctx)
		case err != nil:
			failures = append(failures, fmt.Errorf("scrubbing %v: %w", digest, err))
		}
		next, more = following(digest)
	}
	return s.sum, errors.Join(append(failures, d.scrubFinished(began))...)
}

// ScrubImage reads one image now, of which somebody has seen that its bytes may not be what they were, and repairs what it can as [Disk.Scrub] does.
func (d *Disk) ScrubImage(ctx context.Context, digest acproxy.Digest) error {
	return (&scrubber{d: d, pace: &pacer{}}).image(ctx, digest)
}

// scrubFinished notes that all images have been read since some time, so that the reading in the background begins anew.
func (d *Disk) scrubFinished(began time.Time) error {
	d.scrub.mu.Lock()
	d.scrub.state.Began, d.scrub.state.Finished, d.scrub.state.Position = began, d.now(), 0
	d.scrub.demands++
	d.scrub.mu.Unlock()
	return d.saveScrub(acproxy.Digest{})
}

// Scrubbing returns how far the reading in the background has come.
func (d *Disk) Scrubbing() Scrubbing {
	d.scrub.mu.Lock()
	defer d.scrub.mu.Unlock()
	return d.scrub.state
}

// scrubAfter returns the first image at or after a digest.
func (d *Disk) scrubAfter(from acproxy.Digest) (digest acproxy.Digest, ok bool, err error) {
	err = d.view(func(tx *bolt.Tx) error {
		ok = false
		return scan(tx, bucketRecords, nil, from[:], func(key, _ []byte) error {
			ok = true
			if digest, err = digestIn(key); err != nil {
				return err
			}
			return errEnough
		})
	})
	return digest, ok, err
}

// following returns the digest after another, false if there is none.
func following(digest acproxy.Digest) (acproxy.Digest, bool) {
	for i := len(digest) - 1; i >= 0; i-- {
		if digest[i]++; digest[i] != 0 {
			return digest, true
		}
	}
	return digest, false
}

// position is where among all digests one lies, from 0 to 1. Digests are spread evenly, so that this is also which part of the images lies before it.
func position(digest acproxy.Digest) float64 {
	var n uint64
	for _, b := range digest[:8] {
		n = n<<8 | uint64(b)
	}
	return float64(n) / (1 << 64)
}

const (
	// scrubLook is after which time it is looked again whether an image has come that is due before the next one.
	scrubLook = time.Hour
	// scrubAgain is after which time an image is read again that could not be read or repaired.
	scrubAgain = 10 * time.Minute
	// scrubSave is how often it is written how far the reading has come.
	scrubSave = 10 * time.Second
)

// scrubInTime reads one image after the other, each at its time: an image is due when that part of the round's time is over which part of the digests
// lies before its own. Who is behind reads as fast as it may.
func (d *Disk) scrubInTime() {
	if d.Ready(d.ctx) != nil {
		return
	}
	s := &scrubber{d: d, pace: &pacer{rate: d.schedule.Rate}}
	for d.schedule.Every <= 0 {
		// Nothing is read but what could not be read or repaired when somebody had to.
		d.pause(scrubLook)
		if d.ctx.Err() != nil {
			return
		}
		if digest, ok, _ := d.scrub.dueAgain(d.now()); ok {
			s.inTime(digest)
		}
	}
	next, err := d.loadScrub()
	if err != nil {
		d.log.Error("reading how far the images were scrubbed", "err", err)
	}
	saved, demands := d.now(), 0
	for d.ctx.Err() == nil {
		if digest, ok, _ := d.scrub.dueAgain(d.now()); ok {
			// One at a time beside the round, which goes on however many there are.
			s.inTime(digest)
		}
		began := d.scrubRound(&next, &demands)
		digest, ok, err := d.scrubAfter(next)
		if err != nil {
			d.log.Error("looking for the next image to scrub", "err", err)
			d.pause(scrubLook)
			continue
		}
		if ends := began.Add(d.schedule.Every); !ok && d.now().Before(ends) {
			// One may still come that belongs into this round.
			d.pause(ends.Sub(d.now()))
			continue
		}
		if !ok {
			next = acproxy.Digest{}
			d.scrubRoundEnds(began)
			continue
		}
		if due := began.Add(time.Duration(position(digest) * float64(d.schedule.Every))); d.now().Before(due) {
			d.pause(due.Sub(d.now()))
			continue
		}
		if s.inTime(digest); d.ctx.Err() != nil {
			break
		}
		if next, ok = following(digest); !ok {
			next = acproxy.Digest{}
			d.scrubRoundEnds(began)
		}
		if d.now().Sub(saved) >= scrubSave {
			saved = d.now()
			d.noteScrub(next)
		}
	}
	d.noteScrub(next)
}

// scrubRound returns when the round began. If somebody has read all images on demand since, or the clock was ahead when it began, that is another one, which
// begins at the first.
func (d *Disk) scrubRound(next *acproxy.Digest, demands *int) (began time.Time) {
	d.scrub.mu.Lock()
	defer d.scrub.mu.Unlock()
	s := &d.scrub.state
	if now := d.now(); s.Began.IsZero() || ahead(now, s.Began) {
		s.Began, *next = now, acproxy.Digest{}
	}
	if *demands != d.scrub.demands {
		*next, *demands = acproxy.Digest{}, d.scrub.demands
	}
	s.Position = position(*next)
	return s.Began
}

// scrubRoundEnds begins the next round.
func (d *Disk) scrubRoundEnds(began time.Time) {
	d.scrub.mu.Lock()
	now := d.now()
	s := &d.scrub.state
	s.Finished, s.Position, s.Began = now, 0, now
	d.scrub.mu.Unlock()
	log := d.log.Info
	if late := now.Sub(began) - d.schedule.Every; late > d.schedule.Every/10 {
		log = d.log.Warn
	}
	log("all images were scrubbed", "took", now.Sub(began), "every", d.schedule.Every, "rate", d.schedule.Rate)
	d.noteScrub(acproxy.Digest{})
}

// pause waits for some time, though no longer than until something else may be due, or until the store is closed.
func (d *Disk) pause(long time.Duration) {
	_, _, again := d.scrub.dueAgain(d.now())
	timer := time.NewTimer(min(long, again))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-d.scrub.early:
	case <-d.ctx.Done():
	}
}

func (d *Disk) noteScrub(next acproxy.Digest) {
	if err := d.saveScrub(next); err != nil && !errors.Is(err, errClosed) {
		d.log.Error("writing how far the images were scrubbed", "err", err)
	}
}

// saveScrub writes how far the reading has come.
func (d *Disk) saveScrub(next acproxy.Digest) error {
	s := d.Scrubbing()
	return d.update(func(tx *bolt.Tx) error {
		err := put(tx, bucketState, []byte(stateScrubNext), next[:])
		if err == nil {
			err = putTime(tx, bucketState, []byte(stateScrubBegan), s.Began)
		}
		if err == nil && !s.Finished.IsZero() {
			err = putTime(tx, bucketState, []byte(stateScrubFinished), s.Finished)
		}
		return err
	})
}

// loadScrub reads where to go on.
func (d *Disk) loadScrub() (next acproxy.Digest, err error) {
	var began, finished time.Time
	err = d.view(func(tx *bolt.Tx) (err error) {
		b, err := get(tx, bucketState, []byte(stateScrubNext))
		if err != nil {
			return err
		}
		copy(next[:], b)
		if began, err = getTime(tx, bucketState, []byte(stateScrubBegan)); err != nil {
			return err
		}
		finished, err = getTime(tx, bucketState, []byte(stateScrubFinished))
		return err
	})
	d.scrub.mu.Lock()
	defer d.scrub.mu.Unlock()
	d.scrub.state.Began, d.scrub.state.Finished, d.scrub.state.Position = began, finished, position(next)
	return next, err
}

// scrubber reads images.
type scrubber struct {
	d        *Disk
	pace     *pacer
	progress func(Scrubbed)
	found    func(Finding)
	sum      Scrubbed
}

// count adds to the sums, the store's included.
func (s *scrubber) count(add func(*Scrubbed)) {
	add(&s.sum)
	s.d.scrub.mu.Lock()
	add(&s.d.scrub.state.Scrubbed)
	s.d.scrub.mu.Unlock()
	if s.progress != nil {
		s.progress(s.sum)
	}
}

// report tells of a finding.
func (s *scrubber) report(f Finding) {
	log := s.d.log.Warn
	if !f.Note {
		log = s.d.log.Error
		s.count(func(sum *Scrubbed) { sum.Problems++ })
	}
	log("the scrub has found something", "code", f.Code, "file", f.Path, "image", f.Image, "detail", f.Detail, "repaired", f.Repaired)
	if s.found != nil {
		s.found(f)
	}
}

// errCondemned ends the reading of a blob that isn't what it should be, after that was reported.
var errCondemned = errors.New("it was condemned")

// errGone ends the reading of a blob that isn't that of its image any more.
var errGone = errors.New("it was evicted, deleted or replaced in the meantime")

// inTime reads an image in the background.
func (s *scrubber) inTime(digest acproxy.Digest) {
	if err := s.image(s.d.ctx, digest); err != nil && s.d.ctx.Err() == nil {
		s.d.log.Error("scrubbing an image", "digest", digest, "err", err)
	}
}

// image reads an image and repairs what it can. That it went away is no error; one that could not be read or repaired is tried again soon.
func (s *scrubber) image(ctx context.Context, digest acproxy.Digest) error {
	err := s.once(ctx, digest)
	if ctx.Err() == nil {
		s.d.scrub.again(digest, s.d.now(), err)
	}
	return err
}

func (s *scrubber) once(ctx context.Context, digest acproxy.Digest) error {
	select {
	case s.d.scrub.one <- struct{}{}:
		defer func() { <-s.d.scrub.one }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	rec, err := s.d.record(digest)
	if errors.Is(err, acproxy.ErrNotFound) {
		s.count(func(sum *Scrubbed) { sum.Gone++ })
		return nil
	}
	if err != nil {
		return err
	}
	if rec.lost() {
		// Before its sidecar is looked at, which may know more than the index.
		if rec, err = s.regain(rec); err != nil {
			return err
		}
	}
	if err := s.sidecar(digest); err != nil {
		return err
	}
	if rec.lost() {
		s.count(func(sum *Scrubbed) { sum.Known++ })
		return nil
	}
	switch err := s.blob(ctx, rec); {
	case errors.Is(err, errGone):
		s.count(func(sum *Scrubbed) { sum.Gone++ })
	case errors.Is(err, errCondemned):
	case err != nil:
		return err
	default:
		s.count(func(sum *Scrubbed) { sum.Images++ })
	}
	return nil
}

// regain looks at bytes that are there of an image that is marked as lost. It returns what is known of the image then.
func (s *scrubber) regain(rec Record) (Record, error) {
	there, err := s.d.regainIfThere(rec.Digest)
	if !there || err != nil {
		return rec, err
	}
	f := s.d.finding(rec, CodeFound, s.d.blobPath(rec.Digest), "the image is marked as lost, and there are bytes of it")
	f.Repair, f.Repaired = regained, true
	s.report(f)
	now, err := s.d.record(rec.Digest)
	if errors.Is(err, acproxy.ErrNotFound) {
		return rec, nil
	}
	return now, err
}

// regained says what is done about bytes of an image that is marked as lost.
const regained = "if they are its bytes, the image is whole again; else they are moved to the quarantine directory"

// finding returns a finding about an image.
func (d *Disk) finding(rec Record, code, path, detail string) Finding {
	return Finding{Code: code, Path: d.relative(path), Image: nameOf(rec), Digest: rec.Digest, Detail: detail}
}

func nameOf(rec Record) string {
	if v := rec.Labels[acproxy.LabelVersion]; v != "" {
		return rec.Name + ":" + v
	}
	return rec.Name
}

// sidecar holds the sidecar of an image against the index, and writes it again if it isn't the same.
func (s *scrubber) sidecar(digest acproxy.Digest) error {
	d := s.d
	defer d.locks.lock(digest)()
	img, err := d.imageLocked(digest)
	if err != nil || img == nil {
		return err
	}
	f, ok, err := d.sidecarFinding(img)
	if ok || err != nil {
		return err
	}
	f.Repair = "it is written again from the index"
	err = d.rewriteSidecar(img, f)
	f.Repaired = err == nil
	s.report(f)
	return err
}

// sidecarFinding says what is wrong with the sidecar of an image, and true if nothing is.
func (d *Disk) sidecarFinding(img *image) (f Finding, ok bool, err error) {
	digest := img.Record.Digest
	path := d.sidecarPath(digest)
	beside, err := d.readSidecar(digest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d.finding(img.Record, CodeSidecarMissing, path, "it is not there"), false, nil
	case unreadable(err):
		return d.finding(img.Record, CodeSidecarUnreadable, path, err.Error()), false, nil
	case err != nil:
		return f, false, err
	}
	same, err := sameImage(beside, img)
	if err != nil || same {
		return f, same, err
	}
	f = d.finding(img.Record, CodeSidecarDiffers, path, "it says something else than the index, as it may after a crash")
	f.Note = true
	return f, false, nil
}

// rewriteSidecar writes a sidecar again in the place of one with something wrong. The caller holds the lock of the image.
func (d *Disk) rewriteSidecar(img *image, f Finding) error {
	if f.Code == CodeSidecarUnreadable {
		if err := d.setAside(d.sidecarPath(img.Record.Digest), f.Detail); err != nil {
			return err
		}
	}
	return d.on(func(ix *index) error {
		_, err := d.save(ix, img)
		return err
	})
}

// sameImage reports whether two images are the same in all that is known of them.
func sameImage(a, b *image) (bool, error) {
	one, err := seal(a.normal())
	if err != nil {
		return false, err
	}
	other, err := seal(b.normal())
	return string(one) == string(other), err
}

// normal returns a copy that is the same, byte by byte, for what means the same.
func (img *image) normal() *image {
	out := &image{Record: clone(img.Record), Manifest: img.Manifest, Signature: img.Signature, Refs: slices.Clone(img.Refs)}
	r := &out.Record
	for _, t := range []*time.Time{&r.Modified, &r.Fetched, &r.Verified, &r.Used} {
		*t = t.UTC()
	}
	for i := range r.Signers {
		r.Signers[i].Signed = r.Signers[i].Signed.UTC()
	}
	slices.SortFunc(out.Refs, func(a, b Resolution) int { return strings.Compare(a.Ref.String(), b.Ref.String()) })
	for i := range out.Refs {
		ref := &out.Refs[i]
		ref.Modified, ref.Validated, ref.Gone = ref.Modified.UTC(), ref.Validated.UTC(), ref.Gone.UTC()
	}
	return out
}

// blob reads the bytes of an image.
func (s *scrubber) blob(ctx context.Context, rec Record) error {
	d := s.d
	lease := d.leases.take(rec.Digest, true)
	if lease == nil {
		return errGone
	}
	defer d.leases.give(lease, true)
	v, err := d.examine(ctx, rec, s.pace, func(n int) error {
		s.count(func(sum *Scrubbed) { sum.Bytes += int64(n) })
		if !d.leases.stands(lease) {
			return errGone
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case v.code == "":
		// It may have been barred, and somebody has put it right.
		d.bar(rec.Digest, "")
		return nil
	case v.code == CodeUnstable:
		f := d.finding(rec, v.code, d.blobPath(rec.Digest), v.detail)
		f.Repair = unstable
		s.report(f)
		return nil
	case v.code == CodeImageIDDiffers:
		return s.quarantine(ctx, rec, v)
	}
	return s.condemn(rec, v)
}

// verdict is what reading a blob has come to. Its code is "" if all is as it should be.
type verdict struct {
	code, detail string
	file         os.FileInfo // what was there, nil for nothing
}

// examine reads the bytes of an image. read is called after each chunk; its error ends the reading. The error is about what keeps the bytes from being
// read now, and says nothing about them.
func (d *Disk) examine(ctx context.Context, rec Record, pace *pacer, read func(n int) error) (verdict, error) {
	path := d.blobPath(rec.Digest)
	// Looked at before it is opened: opening what isn't a file may never end.
	fi, err := os.Lstat(path)
	v := verdict{file: fi}
	bad := func(code, detail string) (verdict, error) {
		v.code, v.detail = code, detail
		return v, nil
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return bad(CodeMissing, "it is not there")
	case forbidden(err):
		return bad(CodeForbidden, fmt.Sprintf("it may not be looked at: %v", err))
	case beyondHope(err):
		return bad(CodeCorrupt, fmt.Sprintf("it can't be looked at: %v", err))
	case err != nil:
		return v, err
	case !fi.Mode().IsRegular():
		return bad(CodeCorrupt, "it is not a file")
	case fi.Size() != rec.Size:
		return bad(CodeDamaged, fmt.Sprintf("it has %d bytes of %d", fi.Size(), rec.Size))
	}
	f, direct, err := durable.OpenDirect(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return v, errGone
	case forbidden(err):
		return bad(CodeForbidden, fmt.Sprintf("it may not be opened: %v", err))
	case beyondHope(err):
		return bad(CodeCorrupt, fmt.Sprintf("it can't be opened: %v", err))
	case err != nil:
		return v, err
	}
	defer f.Close()
	r := &coldReader{ctx: ctx, f: f, size: fi.Size(), direct: direct, pace: pace, read: read}
	digest, id, err := d.sumBlob(r, rec)
	switch {
	case ctx.Err() != nil:
		return v, context.Cause(ctx)
	case err != nil && !beyondHope(err):
		return v, err
	case err == nil && digest == rec.Digest && (id.IsZero() || id == rec.ImageID):
		return v, nil
	case err == nil && digest == rec.Digest:
		return bad(CodeImageIDDiffers, fmt.Sprintf("its image ID is %v, noted is %v", id, rec.ImageID))
	}
	what := wrongBytes(digest, err)
	// Before it is condemned it is read again, by way of the operating system's memory: maybe it was our own that lost a bit.
	if again, _, err := d.sumBlob(r.again(), Record{}); err == nil && again == rec.Digest {
		return bad(CodeUnstable, "read a first time, "+what+"; read again, it is right")
	}
	return bad(CodeCorrupt, what)
}

// beyondHope reports whether an error of opening or reading a file is about the file, so that it won't go away by itself.
func beyondHope(err error) bool {
	for _, hopeless := range []error{
		errTooLong, syscall.EIO, syscall.EBADMSG, errUnclean, syscall.EACCES, syscall.EPERM, syscall.EISDIR, syscall.ENOTDIR, syscall.ELOOP, syscall.ENXIO,
	} {
		if errors.Is(err, hopeless) {
			return true
		}
	}
	return false
}

// forbidden reports whether an error of opening a file is about who may open it. Whoever may change that can put it right, so it is left where it is.
func forbidden(err error) bool { return errors.Is(err, fs.ErrPermission) }

// leaveAlone says that there is something in the store that can't be opened and is not moved either, and has the next start look at it again.
func (d *Disk) leaveAlone(path string, err error) {
	d.log.Error("a file of the store can't be opened: it is left where it is, and counts as lost until it can", "file", path, "err", err)
	_ = d.fsys.note(err)
}

// unstable says what is done about a blob that was read differently at different times.
const unstable = "nothing is done about it: look after the disk and the memory"

func wrongBytes(digest acproxy.Digest, err error) string {
	if err != nil {
		return fmt.Sprintf("it can't be read: %v", err)
	}
	return fmt.Sprintf("its bytes have the digest %v", digest)
}

// sumBlob reads a blob to its end and returns its digest, and its image ID if that can be found out and is known to be wanted.
func (d *Disk) sumBlob(r io.Reader, rec Record) (acproxy.Digest, acproxy.ImageID, error) {
	var id acproxy.ImageID
	sum := sha256.New()
	body := io.TeeReader(r, sum)
	if d.inspect != nil && rec.Inspected && !rec.Quarantined() {
		// What it finds wrong with the image is either wrong with the bytes, which their digest tells, or has been accepted.
		id, _ = d.inspect(body)
	}
	// It may have ended early.
	_, err := io.Copy(io.Discard, body)
	return acproxy.Digest(sum.Sum(nil)), id, err
}

// condemn takes a blob out of the way that isn't what it should be, unless it is another one by now, and marks its image as lost.
func (s *scrubber) condemn(rec Record, v verdict) error {
	d := s.d
	done, err := d.condemn(rec.Digest, v)
	if err == nil && !done {
		return errGone
	}
	f := d.finding(rec, v.code, d.blobPath(rec.Digest), v.detail)
	f.Repaired = err == nil
	f.Repair = condemned(v.code)
	s.report(f)
	if err == nil {
		err = errCondemned
	}
	return err
}

// allow says what to do about a file that this process may not open.
const allow = "give it to the user that acproxy runs as"

// condemned says what becomes of a blob that isn't what it should be.
func condemned(code string) string {
	switch code {
	case CodeMissing:
		return "the image is marked as lost, and fetched again"
	case CodeForbidden:
		return "it is left where it is; the image is marked as lost, and fetched again, until it may be opened: " + allow
	}
	return "it is moved to the quarantine directory; the image is marked as lost, and fetched again"
}

// condemn is scrubber.condemn. It reports false if there is nothing to condemn any more.
func (d *Disk) condemn(digest acproxy.Digest, v verdict) (bool, error) {
	defer d.locks.lock(digest)()
	img, err := d.imageLocked(digest)
	if err != nil || img == nil || img.Record.lost() {
		return false, err
	}
	fi, err := os.Lstat(d.blobPath(digest))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		v.code = CodeMissing
	case forbidden(err):
		v.code = CodeForbidden
	case err != nil:
		return false, err
	case v.file == nil || !os.SameFile(fi, v.file):
		// It has come again since it was read.
		return false, nil
	}
	return true, d.loseLocked(img, v.code, v.detail)
}

// quarantine keeps an image from being served whose bytes have another image ID than was noted.
func (s *scrubber) quarantine(ctx context.Context, rec Record, v verdict) error {
	d := s.d
	f := d.finding(rec, v.code, d.blobPath(rec.Digest), v.detail)
	f.Repair = "the image is quarantined: its bytes are what was published, and somebody has noted something else"
	err := d.Quarantine(ctx, rec.Digest, f.Code, f.Detail)
	f.Repaired = err == nil
	s.report(f)
	return err
}

// pacer keeps to a number of bytes in a second.
type pacer struct {
	rate int64
	next time.Time // when the next byte may be read
}

// wait waits until it is time to read on after n bytes.
func (p *pacer) wait(ctx context.Context, n int) error {
	if p.rate <= 0 {
		return nil
	}
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	timer := time.NewTimer(p.next.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// coldChunk is how much is read at once past the page cache.
const coldChunk = 1 << 20

// coldReader reads a file that nobody is known to read soon: past the page cache where that can be done, and otherwise without leaving anything in it.
type coldReader struct {
	ctx    context.Context
	f      *os.File
	size   int64
	direct bool
	pace   *pacer
	read   func(n int) error // called after each chunk; its error ends the reading

	buf    []byte
	have   []byte // what of buf wasn't handed out yet
	offset int64
}

// Read implements [io.Reader].
func (r *coldReader) Read(p []byte) (int, error) {
	if len(r.have) == 0 {
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.have)
	r.have = r.have[n:]
	return n, nil
}

func (r *coldReader) fill() error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	if r.offset >= r.size {
		return io.EOF
	}
	if r.buf == nil {
		r.buf = durable.Aligned(coldChunk)
	}
	n, err := r.f.ReadAt(r.buf, r.offset)
	if n == 0 && errors.Is(err, syscall.EINVAL) && r.direct {
		// It could be opened so, and can't be read so; or not from here.
		r.direct = false
		if err = durable.Buffered(r.f); err == nil {
			n, err = r.f.ReadAt(r.buf, r.offset)
		}
	}
	if n == 0 && err != nil {
		return err
	}
	if !r.direct {
		durable.Forget(r.f, r.offset, int64(n))
	}
	r.offset += int64(n)
	r.have = r.buf[:n]
	if r.read != nil {
		if err := r.read(n); err != nil {
			return err
		}
	}
	return r.pace.wait(r.ctx, n)
}

// again returns a reader of the same file from its beginning, by way of the page cache.
func (r *coldReader) again() io.Reader {
	_ = durable.Buffered(r.f) // if it can't be done, it is read as before
	return io.NewSectionReader(r.f, 0, r.size)
}
