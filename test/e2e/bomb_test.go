package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"maps"
	"net/http"
	"slices"
	"testing"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// bomb returns an image of 10 MB that holds 10 GiB of zeroes, which breaks no rule of the format. Its gzip is of many members, all but the first and the last
// the same one.
func bomb(t testing.TB, name string, manifestLast bool) []byte {
	t.Helper()
	const zeroes, perMember = 10 << 30, 16 << 20
	manifest := acitest.Spec{Name: name, Labels: standard("1.0.0")}.ManifestJSON()
	var plain bytes.Buffer
	entry := func(w *tar.Writer, h tar.Header, body []byte) {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	described := tar.Header{Typeflag: tar.TypeReg, Name: "manifest", Mode: 0o644, Size: int64(len(manifest))}
	member := func(write func(w *tar.Writer)) []byte {
		plain.Reset()
		write(tar.NewWriter(&plain))
		return zipped(t, &plain)
	}
	head := member(func(w *tar.Writer) {
		if !manifestLast {
			entry(w, described, manifest)
		}
		entry(w, tar.Header{Typeflag: tar.TypeDir, Name: "rootfs", Mode: 0o755}, nil)
		// Its content is in the members that follow, so this writer never gets to see its end. The size of 10 GiB is a multiple of a block.
		entry(w, tar.Header{Typeflag: tar.TypeReg, Name: "rootfs/zeroes", Mode: 0o644, Size: zeroes}, nil)
	})
	tail := member(func(w *tar.Writer) {
		if manifestLast {
			entry(w, described, manifest)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	})
	body := zipped(t, bytes.NewReader(make([]byte, perMember)))
	return slices.Concat(head, bytes.Repeat(body, zeroes/perMember), tail)
}

func zipped(t testing.TB, r io.Reader) []byte {
	t.Helper()
	var out bytes.Buffer
	w := must(gzip.NewWriterLevel(&out, gzip.BestCompression))(t)
	if _, err := io.Copy(w, r); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestBomb fetches an image of 10 MB that holds 10 GiB. Somebody whose signature counts made it, so its bytes may go to who asked for them before it was
// read to its end; but it is never held as an image that is well, and reading it takes neither the memory nor the time of 10 GiB.
func TestBomb(t *testing.T) {
	t.Parallel()
	const ratio, size = "bomb-ratio", "too-large"
	for _, tt := range []struct {
		name         string
		config       string
		manifestLast bool
		unsigned     bool
		mesos        bool
		want         []string // of the first answer
		then         string   // how it ends
		long         bool     // only in the long form of this test
	}{
		{"the manifest comes first", "", false, false, false, []string{whole, short, "502 " + ratio}, ratio, false},
		{"the manifest comes last", "", true, false, false, []string{short, "502 " + ratio}, ratio, true},
		{"its ratio is allowed, its size is not", "fetch: {max_image_size: 64MiB, limits: {max_ratio: 100000, max_uncompressed: 256MiB}}", true, false, false, []string{short, "502 " + size}, size, false},
		{"nothing is delivered before all is checked", "fetch: {delivery: verify-first}", false, false, false, []string{"502 " + ratio}, ratio, true},
		{"nobody signed it", "trust: {signature: optional}", false, true, false, []string{"502 " + ratio}, ratio, true},
		{"Mesos asks for it", "", false, false, true, []string{"403 " + ratio, "403 quarantined", "502 " + ratio}, ratio, false},
	} {
		if tt.long && !inChaos(false, true) {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t, tt.config)
			const name = imageHost + "/bomb"
			p := publisher.Image{Name: name, Labels: maps.Clone(standard("1.0.0")), ACI: bomb(t, name, tt.manifestLast)}
			if n := len(p.ACI); n < 9<<20 || n > 12<<20 {
				t.Fatalf("the bomb has %d bytes", n)
			}
			if !tt.unsigned {
				p.Signature = s.sign(s.key, p.ACI, trusttest.SignOptions{})
			}
			// Its image ID, which publishImage would find out, takes long to compute.
			im := image{name: name, labels: p.Labels, aci: p.ACI, sum: sumOf(p.ACI), published: must(s.publisher.Add(p))(t)}
			held := s.publish(app("held"))
			s.hold(held)
			peak := s.watch()
			url := s.direct(im, "aci")
			if tt.mesos {
				url = s.plain() + "/.acproxy/mesos/" + name + "-1.0.0-linux-amd64.aci"
			}
			answers := make(chan node.Answer, 1)
			// Ends with the answer, which is waited for below.
			go func() { answers <- s.get(url) }()
			wantImage(t, s.get(s.direct(held, "aci")), held)
			a := <-answers
			if got := outcome(a, im); !slices.Contains(tt.want, got) {
				t.Errorf("the answer is %s, want one of %q: %s", got, tt.want, described(a))
			}
			// Whoever asks when it has been read gets no byte of it, and is told why.
			eventually(t, "it is refused", func() bool { a = s.get(s.direct(im, "aci")); return a.Err == nil && a.Status >= http.StatusBadRequest })
			if !bytes.Contains(a.Body, []byte(tt.then)) {
				t.Errorf("it is refused with %s, which doesn't tell %q", described(a), tt.then)
			}
			s.holdsOnly(held)
			wantPeak(t, peak(), 96<<20)
		})
	}
}
