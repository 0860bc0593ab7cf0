package oci

import (
	"bytes"
	"io"
	"testing"

	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
)

// BenchmarkLayer makes the layer of an image of 32 MiB of files which compress to a third or so, as programs do.
func BenchmarkLayer(b *testing.B) {
	for _, compression := range []string{acitest.Gzip, acitest.None} {
		b.Run(compression, func(b *testing.B) {
			spec := acitest.Spec{Compression: compression, Files: make(map[string]string)}
			noise := make([]byte, 1<<20)
			if _, err := io.ReadFull(acitest.Noise(1), noise); err != nil {
				b.Fatal(err)
			}
			// A third noise, the rest repeats what came shortly before.
			var file bytes.Buffer
			for i := 0; file.Len() < 8<<20; i += 64 {
				piece := noise[i%len(noise)/64*64:][:64]
				file.Write(piece)
				file.Write(piece[:32])
				file.Write(piece)
				file.Write(piece[16:48])
			}
			for _, name := range []string{"a", "b", "c", "d"} {
				spec.Files[name] = file.String()
			}
			blob := acitest.Must(b, spec)
			var size counter
			size.w = io.Discard
			if err := writeLayer(&size, bytes.NewReader(blob), int64(len(blob)), aci.Limits{}, nil); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(size.n)/float64(len(blob)), "ratio")
			b.SetBytes(size.n)
			b.ReportAllocs()
			for b.Loop() {
				if err := writeLayer(io.Discard, bytes.NewReader(blob), int64(len(blob)), aci.Limits{}, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
