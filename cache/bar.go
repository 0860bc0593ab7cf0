package cache

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/acproxy/acproxy"
)

// bars are the images whose bytes are known to be lost and which the index doesn't name as such, because that could not be written. Until it is, or until the
// process ends, they count as lost all the same. It is safe for concurrent use.
type bars struct {
	mu    sync.Mutex
	codes atomic.Pointer[map[acproxy.Digest]string] // why each is lost; replaced with mu held, and read without. nil, as nearly always, is none.
}

// set bars an image, whose bytes are lost in the way that a code says, or no longer if that is "". It returns what code it had.
func (b *bars) set(digest acproxy.Digest, code string) (before string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before = b.code(digest)
	if before == code {
		return before
	}
	codes := make(map[acproxy.Digest]string)
	if now := b.codes.Load(); now != nil {
		codes = maps.Clone(*now)
	}
	if codes[digest] = code; code == "" {
		delete(codes, digest)
	}
	if b.codes.Store(&codes); len(codes) == 0 {
		b.codes.Store(nil)
	}
	return before
}

// code returns why an image is barred, "" if it isn't.
func (b *bars) code(digest acproxy.Digest) string {
	if codes := b.codes.Load(); codes != nil {
		return (*codes)[digest]
	}
	return ""
}

// all returns the barred images.
func (b *bars) all() []acproxy.Digest {
	if codes := b.codes.Load(); codes != nil {
		return slices.SortedFunc(maps.Keys(*codes), compareDigests)
	}
	return nil
}

// bar bars an image as set does, and says so to those who keep answers.
func (d *Disk) bar(digest acproxy.Digest, code string) (before string) {
	if before = d.barred.set(digest, code); before != code {
		d.memory.changes.Add(1)
	}
	return before
}

// told returns a record as others are to see it: that of a barred image says that its bytes are lost.
func (d *Disk) told(rec Record) Record {
	if code := d.barred.code(rec.Digest); code != "" && !rec.lost() {
		rec.State, rec.Code, rec.Reason = Quarantined, code, "the file with its bytes is gone, or isn't what it should be, which could not be noted yet"
	}
	return rec
}
