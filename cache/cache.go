// Package cache keeps images on disk: the exact bytes, what is known of them, and an index that can be lost.
package cache

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
)

// A Record is what a store knows of an image. Records are values, but the maps and slices of one that a Store returned are shared with
// others: they must not be changed. [Store.Update] hands out a copy that may be.
type Record struct {
	Digest  acproxy.Digest  `json:"digest"`  // of the exact bytes published
	ImageID acproxy.ImageID `json:"imageID"` // zero until the image was inspected

	Name         string            `json:"name"`             // the manifest's
	Labels       map[string]string `json:"labels,omitempty"` // the manifest's
	Dependencies []Dependency      `json:"dependencies,omitempty"`
	Size         int64             `json:"size"`                   // bytes of the blob
	Compression  string            `json:"compression,omitempty"`  // of the blob, "" until it was inspected
	Uncompressed int64             `json:"uncompressed,omitempty"` // bytes of the tar, 0 until it was inspected

	Signed          bool           `json:"signed"`
	SignatureDigest acproxy.Digest `json:"signatureDigest"` // SHA-256 of the signature as published; zero without one
	Signers         []Signer       `json:"signers,omitempty"`
	RktWarning      string         `json:"rktWarning,omitempty"` // why rkt's own check will refuse what is accepted here
	Policy          string         `json:"policy,omitempty"`     // what was asked of the signature when the image was accepted
	// Hashed are the hash states from which the signature can be judged again without reading the blob.
	Hashed Hashes `json:"hashed,omitempty"`

	Source   string    `json:"source,omitempty"` // the URL it came from
	Modified time.Time `json:"modified,omitzero"`
	ETag     string    `json:"etag,omitempty"`

	Fetched  time.Time `json:"fetched,omitzero"`
	Verified time.Time `json:"verified,omitzero"`
	// Used is when the image was last touched. It is kept apart and written in batches: [Store.Record] and [Disk.Images] bring it up to date,
	// other look-ups leave it as it was when the record last changed.
	Used time.Time `json:"used,omitzero"`

	Inspected bool   `json:"inspected"` // image ID and tar rules have been checked
	Pinned    bool   `json:"pinned,omitempty"`
	State     State  `json:"state"`
	Code      string `json:"code,omitempty"`   // why it is quarantined, for programs
	Reason    string `json:"reason,omitempty"` // why it is quarantined, for people
}

// State says whether an image may be served.
type State string

const (
	OK          State = "ok"          // it may
	Quarantined State = "quarantined" // it may not; its bytes are kept
)

// The codes of images that are quarantined because their bytes are not there. Such an image counts as not found, so that it is fetched again.
const (
	CodeMissing = "blob-missing" // the blob's file is gone
	CodeDamaged = "blob-damaged" // the blob's file has another size than was written; it was moved to the quarantine directory
	CodeCorrupt = "blob-corrupt" // the blob's file has other bytes than were written, or can't be read; it was moved to the quarantine directory
	// CodeForbidden: this process may not open the blob's file, which is where it was. Once it may, the image is whole again.
	CodeForbidden = "blob-forbidden"
)

// Quarantined reports whether the image must not be served. Its bytes are kept.
func (r Record) Quarantined() bool { return r.State == Quarantined }

// Lost reports whether the image's bytes are not there any more, so that it has to be fetched again.
func (r Record) Lost() bool { return r.lost() }

func (r Record) lost() bool {
	return r.Quarantined() && slices.Contains([]string{CodeMissing, CodeDamaged, CodeCorrupt, CodeForbidden}, r.Code)
}

// A Dependency is another image that an image needs (appc specification, "Image Manifest Schema", dependencies).
type Dependency struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	ImageID acproxy.ImageID   `json:"imageID"`        // zero if the manifest leaves it open
	Size    int64             `json:"size,omitempty"` // bytes, 0 if the manifest leaves it open
}

// A Signer is a trusted key whose signature over an image was found good.
type Signer struct {
	Fingerprint string    `json:"fingerprint"` // of the primary key, lower-case hex
	KeyID       string    `json:"keyID,omitempty"`
	UserID      string    `json:"userID,omitempty"`
	Prefix      string    `json:"prefix"` // the prefix for which the key is trusted
	Signed      time.Time `json:"signed,omitzero"`
	Algorithm   string    `json:"algorithm,omitempty"`
}

// A Resolution is what a ref answers.
type Resolution struct {
	Ref       acproxy.Ref    `json:"ref"`
	Digest    acproxy.Digest `json:"digest"`
	Source    string         `json:"source,omitempty"` // the URL that the ref stood for at its publisher
	Modified  time.Time      `json:"modified,omitzero"`
	Validated time.Time      `json:"validated,omitzero"` // when the publisher last said that this is still the answer
	Gone      time.Time      `json:"gone,omitzero"`      // since when the publisher has said that there is no such image; zero if it hasn't
	// Validators are what the publisher sent to compare with later, by names that the fetching side chooses.
	Validators Validators `json:"validators,omitempty"`
	// Pointed orders the answers that one ref has had. The store sets it.
	Pointed int64 `json:"pointed"`
}

// A Template is one endpoint that a publisher's discovery page names.
type Template struct {
	Prefix string `json:"prefix"`
	URL    string `json:"url"`
}

// Discovered is what meta-discovery has found out about an image name.
type Discovered struct {
	Name      string     `json:"name"`
	Templates []Template `json:"templates,omitempty"` // in the publisher's order
	Keys      []string   `json:"keys,omitempty"`      // URLs of keys
	Page      string     `json:"page,omitempty"`      // the URL of the page that said so
	When      time.Time  `json:"when,omitzero"`
}

// Refused is an image that was not accepted, and why.
type Refused struct {
	Ref    acproxy.Ref `json:"ref"`
	When   time.Time   `json:"when"`
	Code   string      `json:"code"`
	Detail string      `json:"detail"`
	Source string      `json:"source,omitempty"`
	Signer string      `json:"signer,omitempty"`
}

// MaxRefusals is how many refusals a store remembers.
const MaxRefusals = 1000

// Usage is the space that a store takes, in bytes of whole file system blocks, and what it holds.
type Usage struct {
	Blobs       int64 `json:"blobs"`
	Sidecars    int64 `json:"sidecars"`
	Index       int64 `json:"index"` // with indexes that were set aside
	Partials    int64 `json:"partials"`
	Spools      int64 `json:"spools"`      // what can be made again, such as the layers of OCI images
	Quarantine  int64 `json:"quarantine"`  // the quarantine directory; quarantined images whose bytes are whole count as blobs
	Names       int64 `json:"names"`       // what discovery found out about names
	Directories int64 `json:"directories"` // the directories themselves
	Open        int64 `json:"open"`        // files that were removed and are still open, and what is just being written or removed
	Pinned      int64 `json:"pinned"`      // of blobs and sidecars, those that are pinned
	Promised    int64 `json:"promised"`    // promised to what is being written, and not on the disk yet
	Images      int64 `json:"images"`      // number of images, quarantined ones included
	Quarantined int64 `json:"quarantined"` // number of quarantined images
	Room        Room  `json:"room"`

	Scrub Scrubbing `json:"scrub"` // how far reading all of it again has come
}

// Total returns the sum of all bytes on the disk.
func (u Usage) Total() int64 {
	return u.Blobs + u.Sidecars + u.Index + u.Partials + u.Spools + u.Quarantine + u.Names + u.Directories + u.Open
}

// Room is how much more a store may take. A limit that isn't set is 0.
type Room struct {
	MaxSize int64 `json:"maxSize"` // bytes that the store may take, what is promised included
	MinFree int64 `json:"minFree"` // bytes of the file system that are left to others
	Free    int64 `json:"free"`    // bytes of the file system that are free now
	High    int   `json:"high"`    // per cent
	Low     int   `json:"low"`     // per cent
}

// A Store holds images. It is safe for concurrent use. What a method reports as done survives a crash from then on, access times and
// refusals excepted.
type Store interface {
	// Resolve returns what a ref answers and the image. The image may be quarantined: whoever serves it has to look. It returns an error
	// matching [acproxy.ErrNotFound] if the ref has no answer or the answer's bytes are gone; of bytes that are gone it returns beside the error what
	// the answer was. While the store isn't [Store.Ready] it waits before it says so.
	Resolve(ctx context.Context, ref acproxy.Ref) (Resolution, Record, error)
	// Ready waits until the store can say what it does not hold; what it is known to hold can be had before.
	Ready(ctx context.Context) error

	// Record returns an image by its digest, or an error matching [acproxy.ErrNotFound].
	Record(digest acproxy.Digest) (Record, error)
	// ByImageID returns the images whose image ID begins with some hex digits, quarantined ones too; none is no error. Whether several are
	// one too many is for the caller to say. At most a hundred are returned.
	ByImageID(hexPrefix string) ([]Record, error)
	// BySignature returns an image that came with exactly this signature, given by its SHA-256. Quarantined images don't count.
	BySignature(signature acproxy.Digest) (acproxy.Digest, bool)
	// Match returns the images that a ref may be answered with: their manifests' name and labels are as it asks. Quarantined ones are not
	// among them.
	Match(ref acproxy.Ref) ([]Record, error)
	// HasName reports whether any image with this name is held, be it quarantined.
	HasName(name string) (bool, error)
	// Uninspected returns the images whose inspection is not finished, quarantined ones excepted.
	Uninspected() ([]Record, error)
	// Lost returns the images whose bytes are lost, so that they have to be fetched again.
	Lost() ([]Record, error)
	// Images returns up to limit images, 0 for all, by name and version: those after the place that the call before returned, "" for the first
	// call. It returns "" as the next place when there are no more.
	Images(filter Filter, after string, limit int) (records []Record, next string, err error)
	// Manifest returns the image manifest as it is in the image, or an error matching [acproxy.ErrNotFound].
	Manifest(digest acproxy.Digest) ([]byte, error)
	// Signature returns the signature as published, or an error matching [acproxy.ErrNotFound] if there is none.
	Signature(digest acproxy.Digest) ([]byte, error)
	// OpenBlob opens the exact bytes of an image, quarantined or not. The caller closes the file; until then the image is in use. It returns an error
	// matching [acproxy.ErrNotFound] if they are not there, or not all of them; the image is quarantined then.
	OpenBlob(digest acproxy.Digest) (*Blob, error)

	// Begin starts an image that is about to arrive. The caller ends it with Commit, Suspend or Discard. What has arrived under the same key
	// before is removed. There has to be space for all of it, as far as its size is known; Begin waits until other images were evicted for it, and
	// returns an error matching [acproxy.ErrNoSpace] that says what holds the space if that isn't possible. ctx bounds the waits for space of
	// the writing, too.
	Begin(ctx context.Context, arrival Arrival) (*Partial, error)
	// Resume takes up an image again that has arrived in part, under the key of its arrival. The caller ends it as one that he began. It returns an
	// error matching [acproxy.ErrNotFound] if there is none, and one matching [acproxy.ErrNoSpace], as Begin does, if the rest of it has no space.
	Resume(ctx context.Context, key string) (*Partial, error)
	// Arrivals returns what can be resumed, in no order.
	Arrivals(ctx context.Context) ([]Arrival, error)
	// Point makes refs answer what is held already, or changes what is known of an answer. It returns an error matching
	// [acproxy.ErrNotFound] if an image is not held.
	Point(ctx context.Context, resolutions ...Resolution) error
	// Update changes a record by calling change with a copy, more than once if somebody else changes it at the same time. The digest can't
	// change. It returns change's error, and one matching [acproxy.ErrNotFound] if the image is not held.
	Update(ctx context.Context, digest acproxy.Digest, change func(*Record) error) error
	// Quarantine marks an image as not to be served and keeps it.
	Quarantine(ctx context.Context, digest acproxy.Digest, code, reason string) error
	// Restore takes the mark away again. An image whose bytes are gone stays quarantined, which is an error matching [acproxy.ErrNotFound].
	Restore(ctx context.Context, digest acproxy.Digest) error
	// Touch notes that an image was used now.
	Touch(digest acproxy.Digest)

	// Changes returns how often what the store says of images, refs and names has changed, or may have. While it is the same, so is the rest: it goes up when a
	// change can be seen, and before whoever made it is told. Ask for it before asking for anything else.
	Changes() uint64

	// Learn keeps what discovery has found out about a name, in place of what was known.
	Learn(found Discovered) error
	// Known returns what discovery has found out about a name.
	Known(name string) (Discovered, bool)
	// KnownUnderHost returns what is known of names at a host: those that begin with it, and those with a template whose URL is there.
	KnownUnderHost(host string) []Discovered

	// Refuse notes a refusal. The last [MaxRefusals] are kept.
	Refuse(refused Refused) error
	// Refusals returns the refusals, the latest first.
	Refusals() ([]Refused, error)
}

var errClosed = errors.New("the store is closed")

func notFound(code, detail string) error {
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: code, Detail: detail}
}

func notHeld(digest acproxy.Digest) error {
	return notFound("not-held", "no image with digest "+digest.String()+" is held")
}

// noSpace gives an error that comes from a disk that takes nothing more, because it is full, a user's quota is exhausted or it is read-only, its kind.
// Others are returned as they are.
func noSpace(err error) error {
	switch {
	case errors.Is(err, acproxy.ErrNoSpace):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: "disk-full", Detail: "the disk of the store is full: free some of it, or move the store", Err: err}
	case errors.Is(err, syscall.EROFS):
		return &acproxy.Error{
			Kind: acproxy.ErrNoSpace, Code: "store-read-only", Err: err,
			Detail: "the file system of the store is read-only, so that nothing new can be kept: make it writable again, and look for errors of its disk",
		}
	}
	return err
}
