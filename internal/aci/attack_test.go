package aci_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"io"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
)

// member returns a gzip member, with everything in its header that a header may have.
func member(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Name, w.Comment, w.Extra = "evil\x01.tar", "hello", []byte("extra")
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A gzip of several members is the members one after the other, as gunzip has it: however the tar is cut, it is the same image, and what
// stands between members or behind the last is refused.
func TestGzipOfSeveralMembers(t *testing.T) {
	tar := acitest.Must(t, acitest.Spec{Compression: acitest.None, Files: map[string]string{"etc/motd": "hello"}})
	want := acproxy.ImageID(sha512.Sum512(tar))
	other := acitest.Must(t, acitest.Spec{Compression: acitest.None, Name: "example.com/evil"})
	cut := func(ends ...int) []byte {
		var image []byte
		from := 0
		for _, end := range append(ends, len(tar)) {
			image = append(image, member(t, tar[from:end])...)
			from = end
		}
		return image
	}
	whole := member(t, tar)
	for _, test := range []struct {
		name  string
		image []byte
		want  string // the rule it breaks
	}{
		{"one member", whole, ""},
		{"cut in the first header", cut(100), ""},
		{"cut in the manifest", cut(700), ""},
		{"cut into single blocks", cut(512, 1024, 1536), ""},
		{"empty members before, between and after", cut(0, 1024, 1024, len(tar)), ""},
		{"zeros behind the last member", append(bytes.Clone(whole), make([]byte, 512)...), aci.RuleTrailingBytes},
		{"text behind the last member", append(bytes.Clone(whole), "more"...), aci.RuleTrailingBytes},
		{"a byte between two members", append(append(member(t, tar[:1024]), 0), member(t, tar[1024:])...), aci.RuleTrailingBytes},
		{"a second image in another member", append(bytes.Clone(whole), member(t, other)...), aci.RuleTrailingBytes},
		{"the last member is cut off", cut(1024)[:len(cut(1024))-9], aci.RuleTruncated},
		{"the checksum of a member that isn't the last is wrong", flip(cut(1024), len(member(t, tar[:1024]))-8), aci.RuleCorrupt},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := aci.Inspect(bytes.NewReader(test.image), aci.Limits{}, nil)
			if rule(err) != test.want {
				t.Fatalf("Inspect = %v, want rule %q", err, test.want)
			}
			if err == nil && got.ID != want {
				t.Errorf("ID = %v, want %v: the tar is the same", got.ID, want)
			}
			// What is accepted here, gunzip reads in the same way.
			if err == nil {
				zr, err := gzip.NewReader(bytes.NewReader(test.image))
				if err != nil {
					t.Fatal(err)
				}
				if unzipped, err := io.ReadAll(zr); err != nil || !bytes.Equal(unzipped, tar) {
					t.Errorf("gunzip gives %d bytes, %v; want the tar's %d", len(unzipped), err, len(tar))
				}
			}
		})
	}
}

func flip(image []byte, at int) []byte {
	image = bytes.Clone(image)
	image[at] ^= 1
	return image
}
