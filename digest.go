package acproxy

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"strings"
)

const (
	imageIDPrefix = "sha512-"
	digestPrefix  = "sha256:"
)

// MinImageIDPrefix is the fewest hex digits by which an image may be asked for. rkt itself prints 12.
const MinImageIDPrefix = 12

// An ImageID names an image by its content: the SHA-512 of its uncompressed tar (appc specification, "Image ID").
// The zero ImageID means that it is not known yet.
type ImageID [sha512.Size]byte

// ParseImageID reads an image ID as [ImageID.String] prints it. It returns an error matching [ErrInvalid] for anything else.
func ParseImageID(s string) (ImageID, error) {
	var id ImageID
	digits, ok := strings.CutPrefix(s, imageIDPrefix)
	if !ok || len(digits) != hex.EncodedLen(len(id)) || !isLowerHex(digits) {
		return ImageID{}, Invalid("image ID %q is not sha512- and %d lower-case hex digits", clip(s), hex.EncodedLen(len(id)))
	}
	_, err := hex.Decode(id[:], []byte(digits))
	return id, err
}

// ParseImageIDPrefix reads the beginning of an image ID, sha512- and at least [MinImageIDPrefix] hex digits, and returns the digits.
// It returns an error matching [ErrInvalid] for anything else.
func ParseImageIDPrefix(s string) (string, error) {
	digits, ok := strings.CutPrefix(s, imageIDPrefix)
	if !ok || len(digits) > hex.EncodedLen(sha512.Size) || !isLowerHex(digits) {
		return "", Invalid("image ID %q is not sha512- and up to %d lower-case hex digits", clip(s), hex.EncodedLen(sha512.Size))
	}
	if len(digits) < MinImageIDPrefix {
		return "", Invalid("image ID %q is too short to be safe: give at least %d hex digits after sha512-", clip(s), MinImageIDPrefix)
	}
	return digits, nil
}

// String returns sha512- and 128 lower-case hex digits, or "" for the zero ImageID.
func (id ImageID) String() string {
	if id.IsZero() {
		return ""
	}
	return imageIDPrefix + hex.EncodeToString(id[:])
}

// Short returns the ID with the first 12 hex digits only, for people.
func (id ImageID) Short() string {
	if id.IsZero() {
		return ""
	}
	return imageIDPrefix + hex.EncodeToString(id[:MinImageIDPrefix/2])
}

// IsZero reports whether the image ID is not known.
func (id ImageID) IsZero() bool { return id == ImageID{} }

// MarshalText returns the ID as String does.
func (id ImageID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads the ID as ParseImageID does; empty text is the zero ImageID.
func (id *ImageID) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ImageID{}
		return nil
	}
	parsed, err := ParseImageID(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// A Digest names a blob by the SHA-256 of the exact bytes published. It is how OCI names blobs (image-spec, "Digests").
type Digest [sha256.Size]byte

// ParseDigest reads a digest as [Digest.String] prints it. It returns an error matching [ErrInvalid] for anything else.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	digits, ok := strings.CutPrefix(s, digestPrefix)
	if !ok || len(digits) != hex.EncodedLen(len(d)) || !isLowerHex(digits) {
		return Digest{}, Invalid("digest %q is not sha256: and %d lower-case hex digits", clip(s), hex.EncodedLen(len(d)))
	}
	_, err := hex.Decode(d[:], []byte(digits))
	return d, err
}

// String returns sha256: and 64 lower-case hex digits.
func (d Digest) String() string { return digestPrefix + d.Hex() }

// Hex returns the 64 hex digits alone.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether the digest is not known.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText returns the digest as String does, "" for the zero Digest.
func (d Digest) MarshalText() ([]byte, error) {
	if d.IsZero() {
		return nil, nil
	}
	return []byte(d.String()), nil
}

// UnmarshalText reads the digest as ParseDigest does; empty text is the zero Digest.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*d = Digest{}
		return nil
	}
	parsed, err := ParseDigest(string(text))
	if err != nil {
		return err
	}
	*d = parsed
	return nil
}

func isLowerHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
