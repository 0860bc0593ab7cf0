package acitest_test

import (
	"bytes"
	"io"
	"maps"
	"testing"

	"github.com/acproxy/acproxy/internal/aci/acitest"
)

func TestAnImageIsTheSameEveryTime(t *testing.T) {
	s := acitest.Spec{
		Name: "example.com/app", Labels: map[string]string{"version": "1", "os": "linux", "arch": "amd64"},
		Files: map[string]string{"b": "2", "a": "1", "c/d": "3"}, RootfsSize: 100_000, Seed: 7,
	}
	for _, compression := range []string{acitest.None, acitest.Gzip, acitest.XZ} {
		s.Compression = compression
		first := acitest.Must(t, s)
		var again bytes.Buffer
		id, err := acitest.Write(&again, s)
		if err != nil || !bytes.Equal(first, again.Bytes()) {
			t.Errorf("%s: two images differ (%v)", compression, err)
		}
		if read, err := acitest.ID(first); err != nil || read != id {
			t.Errorf("%s: ID = %v, %v; written was %v", compression, read, err, id)
		}
		m, err := acitest.Manifest(bytes.NewReader(first))
		if err != nil || m.Name.String() != s.Name || !maps.Equal(acitest.Labels(m.Labels), s.Labels) {
			t.Errorf("%s: manifest = %+v, %v", compression, m, err)
		}
		other := s
		other.Seed = 8
		if bytes.Equal(first, acitest.Must(t, other)) {
			t.Errorf("%s: another seed makes the same image", compression)
		}
	}
}

func TestNoiseDoesNotCompress(t *testing.T) {
	s := acitest.Spec{RootfsSize: 1 << 20}
	if n := len(acitest.Must(t, s)); n < 1<<20 {
		t.Errorf("1 MiB of noise makes an image of %d bytes", n)
	}
}

func TestWhatCantBeMade(t *testing.T) {
	if _, err := acitest.Build(acitest.Spec{Compression: "bzip2"}); err == nil {
		t.Error("Build with bzip2 = nil, want an error: there is no writer")
	}
	if _, err := acitest.Manifest(bytes.NewReader(acitest.Must(t, acitest.Spec{NoManifest: true}))); err == nil {
		t.Error("Manifest of an image without one = nil")
	}
	bz, s := acitest.Bzip2()
	if m, err := acitest.Manifest(bytes.NewReader(bz)); err != nil || m.Name.String() != s.Name {
		t.Errorf("Manifest of the bzip2 image = %+v, %v", m, err)
	}
}

func BenchmarkWrite110MiB(b *testing.B) {
	s := acitest.Spec{RootfsSize: 110 << 20}
	b.SetBytes(s.RootfsSize)
	for b.Loop() {
		if _, err := acitest.Write(io.Discard, s); err != nil {
			b.Fatal(err)
		}
	}
}
