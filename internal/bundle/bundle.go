// Package bundle reads and writes images that travel without a network: one stream of exact bytes, in volumes that may get lost.
//
// A bundle is a plain tar whose first member, the index, says what all the others are, how large, and with which digest. There is one way only to write a
// bundle of some content, so a reader compares where others parse: no name, size or type in the tar is ever believed. docs/bundle-format.md has the format.
package bundle

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// Limits of what a bundle may hold.
const (
	MaxIndex     = 64 << 20 // bytes of an index: about a hundred thousand images
	MaxLine      = 1 << 20  // bytes of one line of an index or a receipt
	MaxNote      = 16 << 10 // bytes of the note that signs an index
	MaxSignature = 1 << 20  // bytes of an image's signature, and of a key
	MaxImage     = 1 << 45  // bytes of an image
	MaxTemplates = 64       // templates of one name
	MaxVolumes   = 999      // volumes of one bundle, without those of parity
	MaxShards    = 256      // volumes of one bundle, with those of parity, if it has some
)

// The codes of errors about bundles.
const (
	CodeNotBundle  = "not-a-bundle"      // it isn't one, or of another version
	CodeDamaged    = "bundle-damaged"    // bytes are not what they were
	CodeIncomplete = "bundle-incomplete" // bytes are not there
	CodeTooLarge   = "bundle-too-large"  // it would break a limit of the format
	CodeUnknownKey = "bundle-signer"     // it isn't signed by the key that was asked for
)

func failure(code, format string, args ...any) error {
	return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: code, Detail: fmt.Sprintf(format, args...)}
}

// An Index says what is in a bundle.
type Index struct {
	// Since is what the bundle goes on from: the ID of a bundle or the digest of a receipt. Images that are there already are named and not carried. Zero
	// if everything is carried.
	Since  acproxy.Digest
	Keys   []Key   // by fingerprint
	Names  []Name  // by name
	Images []Image // by ref and digest
}

// A Key is an OpenPGP key that signed a carried image. It is there to be looked at: nobody trusts it for that.
type Key struct {
	Fingerprint string         `json:"fingerprint"` // lower-case hex
	Digest      acproxy.Digest `json:"digest"`      // of the armored key
	Size        int64          `json:"size"`
	Prefixes    []string       `json:"prefixes,omitempty"` // of image names, for which the exporting side trusts it
}

// A Template is one endpoint that a publisher's discovery page names.
type Template struct {
	Prefix string `json:"prefix"`
	URL    string `json:"url"`
}

// A Name is what the exporting side knows of an image name from discovery.
type Name struct {
	Name      string     `json:"name"`
	Templates []Template `json:"templates"` // in the publisher's order
}

// A Signature is the detached signature of an image, as published.
type Signature struct {
	Digest acproxy.Digest `json:"digest"`
	Size   int64          `json:"size"`
}

// An Image is one that a bundle carries, or that a delta says is there already.
type Image struct {
	Digest  acproxy.Digest    `json:"digest"` // of the exact bytes published
	Size    int64             `json:"size"`
	ImageID acproxy.ImageID   `json:"imageID"`
	Name    string            `json:"name"`             // the manifest's
	Labels  map[string]string `json:"labels,omitempty"` // the manifest's
	// Refs are what else the image answers on the exporting side, beside all its labels: sorted. One without a version is what was the latest there.
	Refs      []acproxy.Ref `json:"refs,omitempty"`
	Signature *Signature    `json:"signature,omitempty"` // nil if the image isn't signed
	Signers   []string      `json:"signers,omitempty"`   // fingerprints of the keys for whose signature the exporting side accepted it
	Modified  time.Time     `json:"modified,omitzero"`   // the publisher's Last-Modified
	// At is where the image begins in the tar, counted from the end of the note. The bundle sets it.
	At int64 `json:"at,omitempty"`
	// Absent says that the image isn't carried: the other side has it.
	Absent bool `json:"absent,omitempty"`
}

// Ref returns the ref of all the image's labels, the zero Ref if they are none.
func (im Image) Ref() acproxy.Ref {
	ref, err := acproxy.NewRef(im.Name, im.Labels)
	if err != nil {
		return acproxy.Ref{}
	}
	return ref
}

// order is what images are sorted by.
func (im Image) order() string { return im.Ref().String() + "\x00" + im.Digest.Hex() }

// ID returns what a bundle is called: the SHA-256 of its index.
func ID(index []byte) acproxy.Digest { return sha256.Sum256(index) }

// The names of the members.
const (
	indexName = "acproxy-bundle/index.jsonl"
	noteName  = "acproxy-bundle/index.note"
	keyDir    = "keys/"
	imageDir  = "images/"
)

// A Kind says what a member is.
type Kind int

// What members there are beside the index and its note.
const (
	KindKey Kind = iota
	KindSignature
	KindImage
)

// String returns the kind in words.
func (k Kind) String() string { return [...]string{"key", "signature", "image"}[k] }

// A Member is one file of a bundle.
type Member struct {
	Kind   Kind
	Digest acproxy.Digest // of its bytes
	Size   int64
	Key    *Key   // for a key
	Image  *Image // for an image and its signature
}

// Name returns the member's name in the tar.
func (m Member) Name() string {
	switch m.Kind {
	case KindKey:
		return keyDir + m.Key.Fingerprint + ".asc"
	case KindSignature:
		return imageDir + m.Image.Digest.Hex() + ".aci.asc"
	}
	return imageDir + m.Image.Digest.Hex() + ".aci"
}

// members returns what stands in the tar behind the note, in order: keys, then each image behind its signature.
func (x *Index) members() []Member {
	var all []Member
	for i := range x.Keys {
		k := &x.Keys[i]
		all = append(all, Member{Kind: KindKey, Digest: k.Digest, Size: k.Size, Key: k})
	}
	for i := range x.Images {
		im := &x.Images[i]
		if im.Absent {
			continue
		}
		if im.Signature != nil {
			all = append(all, Member{Kind: KindSignature, Digest: im.Signature.Digest, Size: im.Signature.Size, Image: im})
		}
		all = append(all, Member{Kind: KindImage, Digest: im.Digest, Size: im.Size, Image: im})
	}
	return all
}

func isFingerprint(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}
