package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/acproxy/acproxy"
)

// image is everything there is about one image but for its bytes: the rows of the index, and the content of a sidecar.
type image struct {
	Record    Record       `json:"record"`
	Manifest  text         `json:"manifest"`
	Signature text         `json:"signature,omitempty"`
	Refs      []Resolution `json:"refs,omitempty"`

	sidecar int64 // bytes of the sidecar, once it was written or read
}

// maxSidecar is more than a sidecar with the largest manifest and signature that are accepted has.
const maxSidecar = 64 << 20

// text is bytes that are text in all but odd cases, and are written as such into JSON where they are: sidecars are for people too.
type text []byte

// MarshalJSON writes a string, or {"base64": …} for what would not survive as one.
func (t text) MarshalJSON() ([]byte, error) {
	if utf8.Valid(t) {
		return json.Marshal(string(t))
	}
	return json.Marshal(struct {
		Base64 []byte `json:"base64"`
	}{t})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (t *text) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var v struct {
			Base64 []byte `json:"base64"`
		}
		err := json.Unmarshal(b, &v)
		*t = v.Base64
		return err
	}
	var s string
	err := json.Unmarshal(b, &s)
	*t = nil
	if s != "" {
		*t = text(s)
	}
	return err
}

// envelope is the outside of a file that the index can be rebuilt from. The checksum is that of the content as it stands in the file.
type envelope struct {
	Format  int             `json:"format"`
	CRC32C  string          `json:"crc32c"`
	Content json.RawMessage `json:"content"`
}

// format is the version of what is in the envelopes; head has it too.
const format = 1

// seal returns a file with v as its content.
func seal(v any) ([]byte, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sum := fmt.Sprintf("%08x", crc32.Checksum(content, castagnoli))
	return slices.Concat([]byte(head), []byte(sum), []byte(headEnd), content, []byte(tail)), nil
}

// head is how seal begins a file, but for the checksum, and tail how it ends it.
const (
	head    = `{"format":1,"crc32c":"`
	headEnd = `","content":`
	tail    = "}\n"
)

// unseal reads a file that seal made into v.
func unseal(file []byte, v any) error {
	// As long as nobody has laid it out anew, the content needs no search.
	const at = len(head) + 8 + len(headEnd)
	if len(file) > at+len(tail) && string(file[:len(head)]) == head && string(file[at-len(headEnd):at]) == headEnd && string(file[len(file)-len(tail):]) == tail {
		content := file[at : len(file)-len(tail)]
		if fmt.Sprintf("%08x", crc32.Checksum(content, castagnoli)) == string(file[len(head):at-len(headEnd)]) {
			return json.Unmarshal(content, v)
		}
	}
	var e envelope
	if err := json.Unmarshal(file, &e); err != nil {
		return err
	}
	if e.Format != format {
		return fmt.Errorf("format %d is not one that this version of acproxy reads", e.Format)
	}
	if sum := fmt.Sprintf("%08x", crc32.Checksum(e.Content, castagnoli)); sum != e.CRC32C {
		return fmt.Errorf("the checksum of the content is %s, and not %q as written beside it", sum, e.CRC32C)
	}
	return json.Unmarshal(e.Content, v)
}

// parseSidecar reads the sidecar of a blob.
func parseSidecar(file []byte, digest acproxy.Digest) (*image, error) {
	var img image
	if err := unseal(file, &img); err != nil {
		return nil, err
	}
	if img.Record.Digest != digest {
		return nil, fmt.Errorf("it is about %v", img.Record.Digest)
	}
	if err := acproxy.CheckName(img.Record.Name); err != nil {
		return nil, err
	}
	for _, r := range img.Refs {
		if r.Digest != digest || r.Ref.IsZero() {
			return nil, fmt.Errorf("its ref %q is of %v", r.Ref, r.Digest)
		}
	}
	img.sidecar = int64(len(file))
	return &img, nil
}

// errUnreadable is matched by errors about a file of the store that trying again won't help against.
var errUnreadable = errors.New("can't be read")

func unreadable(err error) bool { return errors.Is(err, errUnreadable) }

// readSealed reads a file that seal made and has it parsed. The error, which begins with what the file is, matches errUnreadable if trying again won't help: it
// is about the content, or about a file that can't be opened or read any more.
func readSealed(what, path string, parse func(file []byte) error) error {
	file, err := readSmall(path, maxSidecar)
	switch {
	case err == nil:
		err = parse(file)
	case !beyondHope(err):
		return err
	}
	if err != nil {
		err = fmt.Errorf("%s %w: %w", what, errUnreadable, err)
	}
	return err
}

// errTooLong is matched by the error about a file that is longer than any of its kind.
var errTooLong = errors.New("it is too long")

// readSmall reads a file of at most limit bytes.
func readSmall(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Most of them are read at once, and found to have ended by the second time.
	b := make([]byte, 0, min(limit+1, 8<<10))
	for {
		n, err := f.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		switch {
		case int64(len(b)) > limit:
			return nil, fmt.Errorf("%w: %s has more than %d bytes", errTooLong, name, limit)
		case err == io.EOF:
			return b, nil
		case err != nil:
			return nil, err
		case len(b) == cap(b):
			b = slices.Grow(b, len(b))
		}
	}
}
