package bundle

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/acproxy/acproxy"
)

const receiptFormat = "acproxy-receipt"

// A Receipt says what a store holds, so that the next bundle for it can leave that out.
type Receipt struct {
	Time   time.Time
	Bundle acproxy.Digest // the ID of the bundle that was taken in before, zero if there was none
	Images []Held         // by digest

	Digest acproxy.Digest // of all lines but the last; set by [ReadReceipt]
	Signed Signed         // set by ReadReceipt
}

// Held is one image of a receipt.
type Held struct {
	Digest    acproxy.Digest `json:"digest"`
	Signature acproxy.Digest `json:"signature"` // its digest, zero if there is none
	Refs      []acproxy.Ref  `json:"refs,omitempty"`
}

type receiptLine struct {
	Format  string          `json:"format,omitempty"`
	Version int             `json:"version,omitempty"`
	Time    time.Time       `json:"time,omitzero"`
	Bundle  *acproxy.Digest `json:"bundle,omitempty"`
	Image   *Held           `json:"image,omitempty"`
	Note    string          `json:"note,omitempty"`
}

// Encode returns the receipt as it is written, signed if there is a signer.
func (r *Receipt) Encode(signer *Signer) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	first := receiptLine{Format: receiptFormat, Version: formatVersion, Time: r.Time.UTC().Truncate(time.Second)}
	if !r.Bundle.IsZero() {
		first.Bundle = &r.Bundle
	}
	slices.SortFunc(r.Images, func(a, b Held) int { return bytes.Compare(a.Digest[:], b.Digest[:]) })
	lines := []receiptLine{first}
	for i := range r.Images {
		slices.SortFunc(r.Images[i].Refs, compareRefs)
		lines = append(lines, receiptLine{Image: &r.Images[i]})
	}
	for _, l := range lines {
		if err := enc.Encode(l); err != nil {
			return nil, err
		}
	}
	note := statement(b.Bytes(), len(r.Images))
	if signer != nil {
		signed, err := signer.Sign(note)
		if err != nil {
			return nil, err
		}
		note = string(signed)
	}
	if err := enc.Encode(receiptLine{Note: note}); err != nil {
		return nil, err
	}
	if b.Len() > MaxIndex {
		return nil, failure(CodeTooLarge, "a receipt of %d images has %d bytes, and may have %d", len(r.Images), b.Len(), MaxIndex)
	}
	return b.Bytes(), nil
}

// IsReceipt reports whether a file that begins so is meant to be a receipt.
func IsReceipt(beginning []byte) bool {
	return bytes.HasPrefix(beginning, []byte(`{"format":"`+receiptFormat+`"`))
}

// ReadReceipt reads a receipt. With keys, given as verifiers, it has to be signed by one of them.
func ReadReceipt(from io.Reader, keys []string) (*Receipt, error) {
	b, err := io.ReadAll(io.LimitReader(from, MaxIndex+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxIndex {
		return nil, failure(CodeTooLarge, "the receipt has more than the %d bytes of any receipt", MaxIndex)
	}
	r := new(Receipt)
	body, note, err := r.parse(b)
	if err != nil {
		return nil, failure(CodeNotBundle, "the receipt: %v", err)
	}
	r.Digest = ID(b[:body])
	r.Signed, err = check([]byte(note), statement(b[:body], len(r.Images)), keys)
	if err != nil {
		return nil, fmt.Errorf("the receipt: %w", err)
	}
	return r, nil
}

// parse reads the lines, and returns how many bytes come before the last one, and the note that is in that.
func (r *Receipt) parse(b []byte) (body int, note string, err error) {
	lines := bufio.NewReaderSize(bytes.NewReader(b), 64<<10)
	at := 0
	for n := 1; ; n++ {
		text, err := readLine(lines)
		if err == io.EOF {
			return 0, "", errors.New("it ends without its note")
		}
		var l receiptLine
		if err == nil {
			err = strictly(text, &l)
		}
		if err == nil && n == 1 && (l.Format != receiptFormat || l.Version != formatVersion) {
			err = fmt.Errorf("it is of format %.40q, version %d; this acproxy reads %s, version %d", l.Format, l.Version, receiptFormat, formatVersion)
		}
		if err != nil {
			return 0, "", fmt.Errorf("line %d: %w", n, err)
		}
		switch {
		case n == 1:
			r.Time = l.Time
			if l.Bundle != nil {
				r.Bundle = *l.Bundle
			}
		case l.Image != nil && !l.Image.Digest.IsZero():
			r.Images = append(r.Images, *l.Image)
		case l.Note != "":
			if _, err := lines.ReadByte(); err != io.EOF {
				return 0, "", errors.New("something follows its note")
			}
			return at, l.Note, nil
		default:
			return 0, "", fmt.Errorf("line %d says nothing", n)
		}
		at += len(text) + 1
	}
}
