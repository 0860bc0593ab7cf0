package cache

import (
	"bytes"
	"encoding/binary"
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
	Sidecar int64 // its bytes
}

// blockSize is what a file's size is rounded up to: file systems give out no less.
const blockSize = 4096

func blocks(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

// blobBytes is the space that the bytes of an image take.
func (r Record) blobBytes() int64 {
	if r.lost() && r.Code != CodeForbidden {
		return 0
	}
	return blocks(r.Size)
}

// totals are kept with every change of a record, because counting would take a scan.
type totals struct {
	Images, Quarantined, Blobs, Sidecars int64
	Pinned                               int64 // bytes of blobs and sidecars of what is pinned
}

func (t *totals) add(h held, n int64) {
	t.Images += n
	t.Blobs += n * h.blobBytes()
	t.Sidecars += n * blocks(h.Sidecar)
	if h.Quarantined() {
		t.Quarantined += n
	}
	if h.Pinned {
		t.Pinned += n * h.bytes()
	}
}

// bytes is the space that the files of an image take.
func (h held) bytes() int64 { return h.blobBytes() + blocks(h.Sidecar) }

// Words of the state bucket.
const (
	stateTotals   = "totals"
	stateComplete = "complete" // the index knows of every image: it is not being rebuilt
	stateOpen     = "open"     // somebody has the store open, or didn't close it
	stateRefused  = "refused"  // the number of the last refusal
)

// getRow reads a row with what takes it apart, and reports whether there is one.
func getRow[T any](tx *bolt.Tx, bucket string, key []byte, take func(*decoder) T) (v T, ok bool, err error) {
	b, err := get(tx, bucket, key)
	if b == nil || err != nil {
		return v, false, err
	}
	v, err = decodeRow(bucket, key, b, take)
	return v, err == nil, err
}

func decodeRow[T any](bucket string, key, value []byte, take func(*decoder) T) (v T, err error) {
	return decodeWith(&decoder{}, bucket, key, value, take)
}

// decodeWith is decodeRow with a decoder that was used before.
func decodeWith[T any](d *decoder, bucket string, key, value []byte, take func(*decoder) T) (v T, err error) {
	d.left, d.bad = string(value), false
	v = take(d)
	if !d.ok() {
		return v, broken("the row of %s at %.40x can't be taken apart", bucket, key)
	}
	return v, nil
}

// getJSON reads a row of one of the buckets that hold JSON into v, which stays as it is if there is none.
func getJSON(tx *bolt.Tx, bucket string, key []byte, v any) error {
	b, err := get(tx, bucket, key)
	if b == nil || err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return broken("the row of %s at %.40x: %v", bucket, key, err)
	}
	return nil
}

func putJSON(tx *bolt.Tx, bucket string, key []byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return put(tx, bucket, key, b)
}

func appendTotals(b []byte, t totals) []byte {
	for _, n := range []int64{t.Images, t.Quarantined, t.Blobs, t.Sidecars, t.Pinned} {
		b = binary.AppendVarint(b, n)
	}
	return b
}

func takeTotals(d *decoder) totals {
	return totals{Images: d.varint(), Quarantined: d.varint(), Blobs: d.varint(), Sidecars: d.varint(), Pinned: d.varint()}
}

// What a row of records says by single bits.
const (
	rowSigned = 1 << iota
	rowInspected
	rowPinned
	rowImageID
	rowSignatureDigest
)

// appendHeld appends the row of a record, but for the digest, which is its key.
func appendHeld(b []byte, h held) []byte {
	bits := bit(rowSigned, h.Signed) | bit(rowInspected, h.Inspected) | bit(rowPinned, h.Pinned) |
		bit(rowImageID, !h.ImageID.IsZero()) | bit(rowSignatureDigest, !h.SignatureDigest.IsZero())
	b = binary.AppendUvarint(b, bits)
	if bits&rowImageID != 0 {
		b = append(b, h.ImageID[:]...)
	}
	if bits&rowSignatureDigest != 0 {
		b = append(b, h.SignatureDigest[:]...)
	}
	b = binary.AppendVarint(b, h.Sidecar)
	b = binary.AppendVarint(b, h.Size)
	b = binary.AppendVarint(b, h.Uncompressed)
	b = appendString(b, h.Name)
	b = appendStringMap(b, h.Labels)
	b = binary.AppendUvarint(b, uint64(len(h.Dependencies)))
	for _, dep := range h.Dependencies {
		b = appendString(b, dep.Name)
		b = appendStringMap(b, dep.Labels)
		b = binary.AppendVarint(b, dep.Size)
		if dep.ImageID.IsZero() {
			b = append(b, 0)
		} else {
			b = append(append(b, 1), dep.ImageID[:]...)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(h.Signers)))
	for _, s := range h.Signers {
		for _, text := range []string{s.Fingerprint, s.KeyID, s.UserID, s.Prefix, s.Algorithm} {
			b = appendString(b, text)
		}
		b = appendTime(b, s.Signed)
	}
	b = appendPacked(b, h.Hashed)
	for _, text := range []string{h.Compression, h.RktWarning, h.Policy, h.Source, h.ETag, string(h.State), h.Code, h.Reason} {
		b = appendString(b, text)
	}
	for _, t := range []time.Time{h.Modified, h.Fetched, h.Verified, h.Used} {
		b = appendTime(b, t)
	}
	return b
}

func bit(which uint64, set bool) uint64 {
	if set {
		return which
	}
	return 0
}

func takeHeld(d *decoder) held {
	var h held
	bits := d.uvarint()
	h.Signed, h.Inspected, h.Pinned = bits&rowSigned != 0, bits&rowInspected != 0, bits&rowPinned != 0
	if bits&rowImageID != 0 {
		d.array(h.ImageID[:])
	}
	if bits&rowSignatureDigest != 0 {
		d.array(h.SignatureDigest[:])
	}
	h.Sidecar, h.Size, h.Uncompressed = d.varint(), d.varint(), d.varint()
	h.Name, h.Labels = d.string(), d.labels()
	h.Dependencies = d.dependencies()
	h.Signers = decoded(d, 6, func(d *decoder) Signer {
		return Signer{Fingerprint: d.string(), KeyID: d.string(), UserID: d.string(), Prefix: d.string(), Algorithm: d.string(), Signed: d.time()}
	})
	h.Hashed = Hashes(d.packed((*decoder).skipBytesMap))
	h.Compression, h.RktWarning, h.Policy, h.Source, h.ETag = d.string(), d.string(), d.string(), d.string(), d.string()
	h.State, h.Code, h.Reason = State(d.string()), d.string(), d.string()
	h.Modified, h.Fetched, h.Verified, h.Used = d.time(), d.time(), d.time(), d.time()
	return h
}

// appendResolution appends the row of a resolution, but for the ref, which is its key.
func appendResolution(b []byte, r Resolution) []byte {
	b = append(b, r.Digest[:]...)
	b = appendString(b, r.Source)
	for _, t := range []time.Time{r.Modified, r.Validated, r.Gone} {
		b = appendTime(b, t)
	}
	b = appendPacked(b, r.Validators)
	return binary.AppendVarint(b, r.Pointed)
}

func takeResolution(d *decoder) Resolution {
	var r Resolution
	d.array(r.Digest[:])
	r.Source = d.string()
	r.Modified, r.Validated, r.Gone = d.time(), d.time(), d.time()
	r.Validators = Validators(d.packed((*decoder).skipStringMap))
	r.Pointed = d.varint()
	return r
}

// Bounds of the copies of a record that are beside its refs. A row without one is as good, and costs a second read.
const (
	// maxCopied bounds the row of a record that is copied, in bytes: two rows have to fit onto a page, or it takes two.
	maxCopied = 1536
	// maxCopies is beside how many of an image's refs there is a copy: that of all its labels, those without a version, and what nodes ask for. Whoever wants to can
	// ask for an image by every choice of its labels, and each change of the record writes all copies of it.
	maxCopies = 4
)

// answerRow returns the row of a ref: its resolution, and a copy of the row of the record that it answers, so that who asks for a ref reads one page
// and not two. There is no copy of a record that is longer than maxCopied, nor of none.
func answerRow(r Resolution, record []byte) []byte {
	b := appendResolution(nil, r)
	if len(record) > maxCopied {
		return b
	}
	return append(b, record...)
}

// answer is what a ref answers.
type answer struct {
	to    Resolution
	rec   Record
	whole bool // rec is there too
}

func takeAnswer(d *decoder) (a answer) {
	a.to = takeResolution(d)
	if d.left != "" {
		a.rec, a.whole = takeHeld(d).Record, true
		a.rec.Digest = a.to.Digest
	}
	return a
}

// takeAnswered is takeAnswer for those who want to know no more than the resolution.
func takeAnswered(d *decoder) Resolution {
	r := takeResolution(d)
	d.left = ""
	return r
}

// appendKnown appends the row of what discovery has found out, but for the name, which is its key.
func appendKnown(b []byte, k Discovered) []byte {
	b = binary.AppendUvarint(b, uint64(len(k.Templates)))
	for _, t := range k.Templates {
		b = appendString(appendString(b, t.Prefix), t.URL)
	}
	b = binary.AppendUvarint(b, uint64(len(k.Keys)))
	for _, key := range k.Keys {
		b = appendString(b, key)
	}
	return appendTime(appendString(b, k.Page), k.When)
}

func takeKnown(d *decoder) Discovered {
	return Discovered{
		Templates: decoded(d, 2, func(d *decoder) Template { return Template{Prefix: d.string(), URL: d.string()} }),
		Keys:      decoded(d, 1, (*decoder).string),
		Page:      d.string(), When: d.time(),
	}
}

func getRecord(tx *bolt.Tx, digest acproxy.Digest) (h held, ok bool, err error) {
	h, ok, err = getRow(tx, bucketRecords, digest[:], takeHeld)
	h.Digest = digest
	return h, ok, err
}

// hasRecord is getRecord for those who want to know no more.
func hasRecord(tx *bolt.Tx, digest acproxy.Digest) (bool, error) {
	b, err := get(tx, bucketRecords, digest[:])
	return b != nil, err
}

// getResolution returns what the ref with this key answers.
func getResolution(tx *bolt.Tx, key []byte) (r Resolution, ok bool, err error) {
	r, ok, err = getRow(tx, bucketRefs, key, takeAnswered)
	if !ok || err != nil {
		return r, false, err
	}
	if r.Ref, err = acproxy.ParseRef(string(key)); err != nil {
		return r, false, broken("the ref %.100q: %v", key, err)
	}
	return r, true, nil
}

func getKnown(tx *bolt.Tx, name []byte) (k Discovered, ok bool, err error) {
	k, ok, err = getRow(tx, bucketKnown, name, takeKnown)
	k.Name = string(name)
	return k, ok, err
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
		r, ok, err := getResolution(tx, key[len(digest):])
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
	var sum totals
	digest := img.Record.Digest
	if err := dropRecord(tx, digest, &sum); err != nil {
		return nil, err
	}
	if displaced, err = putRows(tx, img, &sum); err != nil {
		return nil, err
	}
	if sum.Images == 0 {
		// It was there before. It may answer more refs than img knows of.
		if err := dropCopies(tx, img); err != nil {
			return nil, err
		}
	}
	return displaced, addTotals(tx, sum)
}

// dropCopies removes the copies of a record that are beside refs which the image itself doesn't name: they are of the record as it was.
func dropCopies(tx *bolt.Tx, img *image) error {
	digest := img.Record.Digest
	named := make(map[string]bool, len(img.Refs))
	for _, r := range img.Refs {
		named[r.Ref.String()] = true
	}
	var others [][]byte
	err := scan(tx, bucketHeld, digest[:], nil, func(key, _ []byte) error {
		if ref := key[len(digest):]; !named[string(ref)] {
			others = append(others, bytes.Clone(ref))
		}
		return nil
	})
	for _, key := range others {
		if err != nil {
			break
		}
		var r Resolution
		var ok bool
		if r, ok, err = getRow(tx, bucketRefs, key, takeAnswered); ok && r.Digest == digest {
			err = put(tx, bucketRefs, key, answerRow(r, nil))
		}
	}
	return err
}

// putRows is putImage for an image that has no record in the index. What it adds to the totals it adds to sum.
func putRows(tx *bolt.Tx, img *image, sum *totals) (displaced []acproxy.Digest, err error) {
	digest := img.Record.Digest
	h := held{img.Record, img.sidecar}
	record := appendHeld(nil, h)
	if err := put(tx, bucketRecords, digest[:], record); err != nil {
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
	sum.add(h, 1)
	if err := putOrder(tx, img.Record); err != nil {
		return nil, err
	}
	for i, r := range img.Refs {
		if i == maxCopies {
			record = nil
		}
		loser, err := putRef(tx, r, record)
		if err != nil {
			return nil, err
		}
		if !loser.IsZero() && !slices.Contains(displaced, loser) {
			displaced = append(displaced, loser)
		}
	}
	return displaced, nil
}

// putRef lets a ref answer an image from now on, unless a later answer is known. record is the row of the image's record. It returns the image that
// lost the ref by that, if any.
func putRef(tx *bolt.Tx, r Resolution, record []byte) (loser acproxy.Digest, err error) {
	key := []byte(r.Ref.String())
	before, ok, err := getRow(tx, bucketRefs, key, takeAnswered)
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
		// What is known of the answer stays; what is known of the image may be new.
		return loser, put(tx, bucketRefs, key, answerRow(before, record))
	}
	if err := put(tx, bucketRefs, key, answerRow(r, record)); err != nil {
		return loser, err
	}
	return loser, put(tx, bucketHeld, append(r.Digest[:], key...), nil)
}

// dropRecord removes an image from every bucket but those of its refs, and from sum.
func dropRecord(tx *bolt.Tx, digest acproxy.Digest, sum *totals) error {
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
	sum.add(h, -1)
	return dropOrder(tx, h.Record)
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
	var sum totals
	if err := dropRecord(tx, digest, &sum); err != nil {
		return err
	}
	if err := remove(tx, bucketUsed, digest[:]); err != nil {
		return err
	}
	return addTotals(tx, sum)
}

func getTotals(tx *bolt.Tx) (t totals, err error) {
	t, _, err = getRow(tx, bucketState, []byte(stateTotals), takeTotals)
	return t, err
}

func addTotals(tx *bolt.Tx, sum totals) error {
	if sum == (totals{}) {
		return nil
	}
	t, err := getTotals(tx)
	if err != nil {
		return err
	}
	t = totals{t.Images + sum.Images, t.Quarantined + sum.Quarantined, t.Blobs + sum.Blobs, t.Sidecars + sum.Sidecars, t.Pinned + sum.Pinned}
	return put(tx, bucketState, []byte(stateTotals), appendTotals(nil, t))
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
	if r.Pinned {
		keys = append(keys, bucketKey{bucketPinned, digest})
	}
	for _, name := range dependencyNames(r) {
		keys = append(keys, bucketKey{bucketDependents, dependentKey(name, digest)})
	}
	return keys
}

// dependentKey finds the images that depend on one of some name. A name that is none, which nothing keeps out of a manifest, may be of any length.
func dependentKey(name string, digest []byte) []byte {
	return slices.Concat([]byte(name[:min(len(name), acproxy.MaxNameLength)]), []byte{0}, digest)
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
	before, ok, err := getKnown(tx, []byte(found.Name))
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
	return put(tx, bucketKnown, []byte(found.Name), appendKnown(nil, found))
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
	t, _ := timeIn(b)
	return t, err
}

func timeIn(b []byte) (t time.Time, ok bool) {
	if len(b) != 8 {
		return t, false
	}
	return time.Unix(0, int64(order.Uint64(b))).UTC(), true
}
