package cache

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// held is the row of a record.
type held struct {
	Record
	Sidecar int64 `json:"sidecarSize"`
}

// blockSize is what a file's size is rounded up to: file systems give out no less.
const blockSize = 4096

func blocks(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

// blobBytes is the space that the bytes of an image take.
func (r Record) blobBytes() int64 {
	if r.lost() {
		return 0
	}
	return blocks(r.Size)
}

// totals are kept with every change of a record, because counting would take a scan.
type totals struct {
	Images      int64 `json:"images"`
	Quarantined int64 `json:"quarantined"`
	Blobs       int64 `json:"blobs"`
	Sidecars    int64 `json:"sidecars"`
}

func (t *totals) add(h held, n int64) {
	t.Images += n
	t.Blobs += n * h.blobBytes()
	t.Sidecars += n * blocks(h.Sidecar)
	if h.Quarantined() {
		t.Quarantined += n
	}
}

// Words of the state bucket.
const (
	stateTotals   = "totals"
	stateComplete = "complete" // the index knows of every image: it is not being rebuilt
	stateOpen     = "open"     // somebody has the store open, or didn't close it
	stateRefused  = "refused"  // the number of the last refusal
)

// getJSON reads a row into v and reports whether there is one.
func getJSON(tx *bolt.Tx, bucket string, key []byte, v any) (bool, error) {
	b, err := get(tx, bucket, key)
	if b == nil || err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, broken("the row of %s at %.40x: %v", bucket, key, err)
	}
	return true, nil
}

func putJSON(tx *bolt.Tx, bucket string, key []byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return put(tx, bucket, key, b)
}

func getRecord(tx *bolt.Tx, digest acproxy.Digest) (h held, ok bool, err error) {
	ok, err = getJSON(tx, bucketRecords, digest[:], &h)
	return h, ok, err
}

// getImage reads everything about an image, nil if it is not in the index.
func getImage(tx *bolt.Tx, digest acproxy.Digest) (*image, error) {
	h, ok, err := getRecord(tx, digest)
	if !ok || err != nil {
		return nil, err
	}
	img := &image{Record: h.Record, sidecar: h.Sidecar}
	manifest, err := get(tx, bucketManifests, digest[:])
	if err != nil {
		return nil, err
	}
	signature, err := get(tx, bucketSignatures, digest[:])
	if err != nil {
		return nil, err
	}
	img.Manifest, img.Signature = bytes.Clone(manifest), bytes.Clone(signature)
	err = scan(tx, bucketHeld, digest[:], nil, func(key, _ []byte) error {
		var r Resolution
		ok, err := getJSON(tx, bucketRefs, key[len(digest):], &r)
		if ok && r.Digest == digest {
			img.Refs = append(img.Refs, r)
		}
		return err
	})
	return img, err
}

// putImage writes everything about an image. It returns the images that answered one of its refs before and don't any more, and this one if a
// later answer to one of its refs is known already.
func putImage(tx *bolt.Tx, img *image) (displaced []acproxy.Digest, err error) {
	digest := img.Record.Digest
	if err := dropRecord(tx, digest); err != nil {
		return nil, err
	}
	h := held{img.Record, img.sidecar}
	if err := putJSON(tx, bucketRecords, digest[:], h); err != nil {
		return nil, err
	}
	for _, key := range keysOf(img.Record) {
		if err := put(tx, key.bucket, key.key, nil); err != nil {
			return nil, err
		}
	}
	if err := put(tx, bucketManifests, digest[:], img.Manifest); err != nil {
		return nil, err
	}
	if len(img.Signature) > 0 {
		if err := put(tx, bucketSignatures, digest[:], img.Signature); err != nil {
			return nil, err
		}
	}
	if err := addTotals(tx, h, 1); err != nil {
		return nil, err
	}
	for _, r := range img.Refs {
		loser, err := putRef(tx, r)
		if err != nil {
			return nil, err
		}
		if !loser.IsZero() && !slices.Contains(displaced, loser) {
			displaced = append(displaced, loser)
		}
	}
	return displaced, nil
}

// putRef lets a ref answer an image from now on, unless a later answer is known. It returns the image that lost the ref by that, if any.
func putRef(tx *bolt.Tx, r Resolution) (loser acproxy.Digest, err error) {
	key := []byte(r.Ref.String())
	var before Resolution
	ok, err := getJSON(tx, bucketRefs, key, &before)
	if err != nil {
		return loser, err
	}
	if ok && before.Digest != r.Digest {
		if before.Pointed > r.Pointed {
			return r.Digest, nil
		}
		loser = before.Digest
		if err := remove(tx, bucketHeld, append(before.Digest[:], key...)); err != nil {
			return loser, err
		}
	}
	if ok && before.Digest == r.Digest && before.Pointed > r.Pointed {
		return loser, nil
	}
	if err := putJSON(tx, bucketRefs, key, r); err != nil {
		return loser, err
	}
	return loser, put(tx, bucketHeld, append(r.Digest[:], key...), nil)
}

// dropRecord removes an image from every bucket but those of its refs.
func dropRecord(tx *bolt.Tx, digest acproxy.Digest) error {
	h, ok, err := getRecord(tx, digest)
	if !ok || err != nil {
		return err
	}
	for _, key := range keysOf(h.Record) {
		if err := remove(tx, key.bucket, key.key); err != nil {
			return err
		}
	}
	for _, bucket := range []string{bucketRecords, bucketManifests, bucketSignatures} {
		if err := remove(tx, bucket, digest[:]); err != nil {
			return err
		}
	}
	return addTotals(tx, h, -1)
}

// dropImage removes an image and its refs.
func dropImage(tx *bolt.Tx, digest acproxy.Digest) error {
	var refs [][]byte
	err := scan(tx, bucketHeld, digest[:], nil, func(key, _ []byte) error {
		refs = append(refs, bytes.Clone(key[len(digest):]))
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range refs {
		if err := remove(tx, bucketHeld, append(digest[:], key...)); err != nil {
			return err
		}
		if err := remove(tx, bucketRefs, key); err != nil {
			return err
		}
	}
	if err := remove(tx, bucketUsed, digest[:]); err != nil {
		return err
	}
	return dropRecord(tx, digest)
}

func addTotals(tx *bolt.Tx, h held, n int64) error {
	var t totals
	if _, err := getJSON(tx, bucketState, []byte(stateTotals), &t); err != nil {
		return err
	}
	t.add(h, n)
	return putJSON(tx, bucketState, []byte(stateTotals), t)
}

type bucketKey struct {
	bucket string
	key    []byte
}

// keysOf returns the rows without a value that find a record.
func keysOf(r Record) []bucketKey {
	digest := r.Digest[:]
	keys := []bucketKey{{bucketNames, nameKey(r.Name, r.Labels[acproxy.LabelVersion], digest)}}
	if !r.ImageID.IsZero() {
		keys = append(keys, bucketKey{bucketIDs, slices.Concat(r.ImageID[:], digest)})
	}
	if !r.SignatureDigest.IsZero() {
		keys = append(keys, bucketKey{bucketSigned, slices.Concat(r.SignatureDigest[:], digest)})
	}
	if !r.Inspected {
		keys = append(keys, bucketKey{bucketUninspected, digest})
	}
	if r.Quarantined() {
		keys = append(keys, bucketKey{bucketQuarantined, digest})
	}
	return keys
}

// nameKey sorts images by name, then version. A version so long that no ref can have it is cut.
func nameKey(name, version string, digest []byte) []byte {
	if len(version) > acproxy.MaxLabelLength {
		version = version[:acproxy.MaxLabelLength]
	}
	return slices.Concat([]byte(name), []byte{0}, []byte(version), []byte{0}, digest)
}

// digestIn returns the digest at the end of a key.
func digestIn(key []byte) (acproxy.Digest, error) {
	var digest acproxy.Digest
	if len(key) < len(digest) {
		return digest, broken("the key %x has no digest", key)
	}
	copy(digest[:], key[len(key)-len(digest):])
	return digest, nil
}

// putKnown writes what discovery has found out about a name.
func putKnown(tx *bolt.Tx, found Discovered) error {
	var before Discovered
	ok, err := getJSON(tx, bucketKnown, []byte(found.Name), &before)
	if err != nil {
		return err
	}
	if ok {
		for _, host := range before.hosts() {
			if err := remove(tx, bucketHosts, hostKey(host, found.Name)); err != nil {
				return err
			}
		}
	}
	for _, host := range found.hosts() {
		if err := put(tx, bucketHosts, hostKey(host, found.Name), nil); err != nil {
			return err
		}
	}
	return putJSON(tx, bucketKnown, []byte(found.Name), found)
}

func hostKey(host, name string) []byte { return slices.Concat([]byte(host), []byte{0}, []byte(name)) }

// anyHost stands for the host of a template that has variables in it.
const anyHost = "*"

// hosts returns the hosts, without ports, that the templates of a name have images at.
func (k Discovered) hosts() []string {
	var hosts []string
	for _, t := range k.Templates {
		_, rest, ok := strings.Cut(t.URL, "://")
		if !ok {
			continue
		}
		// The name begins with a host, so that a template may begin with it too.
		host, _, _ := strings.Cut(strings.ReplaceAll(rest, "{name}", k.Name), "/")
		if _, after, ok := strings.Cut(host, "@"); ok {
			host = after
		}
		host, _, _ = strings.Cut(host, "?")
		host, _, _ = strings.Cut(host, ":")
		host = strings.ToLower(host)
		if strings.Contains(host, "{") {
			host = anyHost
		}
		if host != "" && len(host) <= acproxy.MaxNameLength && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

func putTime(tx *bolt.Tx, bucket string, key []byte, t time.Time) error {
	return put(tx, bucket, key, order.AppendUint64(nil, uint64(t.UnixNano())))
}

func getTime(tx *bolt.Tx, bucket string, key []byte) (time.Time, error) {
	b, err := get(tx, bucket, key)
	if err != nil || len(b) != 8 {
		return time.Time{}, err
	}
	return time.Unix(0, int64(order.Uint64(b))).UTC(), nil
}
