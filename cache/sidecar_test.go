package cache

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"

	"github.com/acproxy/acproxy"
)

func TestTextKeepsEveryByte(t *testing.T) {
	for _, s := range []string{"", "plain", "two\nlines\r\n", "<&>\u2028\x00", "\xff\xfe", `{"base64":"eA=="}`, "ä"} {
		b, err := json.Marshal(text(s))
		if err != nil {
			t.Fatal(err)
		}
		var got text
		if err := json.Unmarshal(b, &got); err != nil || string(got) != s {
			t.Errorf("%q became %q, %v", s, got, err)
		}
	}
}

func TestEnvelopeNoticesEveryFlippedBit(t *testing.T) {
	img := &image{Record: Record{Digest: acproxy.Digest{1}, Name: "example.com/app", Labels: map[string]string{"version": "1"}}, Manifest: text("{}")}
	file, err := seal(img)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(file) {
		spoilt := bytes.Clone(file)
		spoilt[bit/8] ^= 1 << (bit % 8)
		got, err := parseSidecar(spoilt, img.Record.Digest)
		if err != nil {
			continue
		}
		// White space may become other white space, and a name be written in another case.
		got.sidecar = 0
		if !reflect.DeepEqual(got, img) {
			t.Fatalf("with bit %d flipped it reads as %+v: %s", bit, got, spoilt)
		}
	}
}

func FuzzSidecar(f *testing.F) {
	img := &image{Record: Record{Digest: acproxy.Digest{1}, Name: "example.com/app"}, Manifest: text("{}"), Signature: text("\xff")}
	file, err := seal(img)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		got, err := parseSidecar(file, img.Record.Digest)
		if err != nil {
			return
		}
		again, err := seal(got)
		if err != nil {
			t.Fatal(err)
		}
		third, err := parseSidecar(again, img.Record.Digest)
		if err != nil {
			t.Fatalf("what was read can't be read again: %v\n%s", err, again)
		}
		third.sidecar = got.sidecar
		if !reflect.DeepEqual(got, third) {
			t.Errorf("read again it is %+v, and was %+v", third, got)
		}
	})
}
