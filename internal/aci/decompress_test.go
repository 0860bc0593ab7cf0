package aci_test

import (
	"bytes"
	_ "embed" // for what bzip2 and xz made
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/ulikunitz/xz"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
)

// What no Go package writes was made by bzip2 and xz; testdata/README says how.
var (
	//go:embed testdata/two-streams.aci.bz2
	bzip2OfTwoStreams []byte
	//go:embed testdata/zeros.tar.bz2
	zerosBzip2 []byte
	//go:embed testdata/few-zeros.tar.bz2
	fewZerosBzip2 []byte
)

// zeros returns a number of zeros, compressed in each way. bz is what bzip2 made of them.
func zeros(t *testing.T, size int, bz []byte) map[string][]byte {
	pack := func(open func(io.Writer) (io.WriteCloser, error)) []byte {
		var b bytes.Buffer
		w, err := open(&b)
		if err == nil {
			_, err = w.Write(make([]byte, size))
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	return map[string][]byte{
		"gzip":  pack(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriterLevel(w, 9) }),
		"xz":    pack(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }),
		"bzip2": bz,
	}
}

// inflate reads all of it and returns how many bytes came out.
func inflate(t *testing.T, data []byte, lim aci.Limits) (int64, error) {
	t.Helper()
	r, _, err := aci.Decompress(bytes.NewReader(data), lim)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, r)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	return n, err
}

func TestBombs(t *testing.T) {
	for name, bomb := range zeros(t, 11<<20, zerosBzip2) {
		// A read that passes the 10 MiB may bring some more.
		if n, err := inflate(t, bomb, aci.Limits{}); rule(err) != aci.RuleBombRatio || n > 10<<20+64<<10 {
			t.Errorf("%s: %d bytes came out and %v, want %s after about 10 MiB", name, n, err, aci.RuleBombRatio)
		}
	}
}

func TestBombsAtTheLimits(t *testing.T) {
	const size = 1 << 20
	for name, bomb := range zeros(t, size, fewZerosBzip2) {
		ratio := float64(size) / float64(len(bomb))
		tests := []struct {
			name string
			lim  aci.Limits
			want string
		}{
			{"small enough for any ratio", aci.Limits{}, ""},
			// The last checksum is read after the last zero has come out: the ratio is a little higher then than it is in the end.
			{"a ratio it doesn't reach", aci.Limits{MaxRatio: ratio * 1.5, RatioFrom: size - 1}, ""},
			{"a ratio it reaches", aci.Limits{MaxRatio: ratio * 0.9, RatioFrom: size - 1}, aci.RuleBombRatio},
			{"a ratio from its size on", aci.Limits{MaxRatio: 1, RatioFrom: size}, ""},
			{"exactly its size", aci.Limits{MaxUncompressed: size}, ""},
			{"a byte less than its size", aci.Limits{MaxUncompressed: size - 1}, aci.RuleTooLarge},
		}
		for _, tt := range tests {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				n, err := inflate(t, bomb, tt.lim)
				if rule(err) != tt.want || err == nil && n != size {
					t.Errorf("%d bytes came out and %v, want rule %q", n, err, tt.want)
				}
				if limit := tt.lim.MaxUncompressed; limit != 0 && n > limit {
					t.Errorf("%d bytes came out, the limit is %d", n, limit)
				}
			})
		}
	}
}

func TestDecompressTellsByTheFirstBytes(t *testing.T) {
	for name, tt := range map[string]struct {
		data string
		want string
	}{
		"nothing":             {"", aci.RuleTruncated},
		"a page":              {"<!DOCTYPE html><title>404 Not Found</title>" + strings.Repeat(" ", 600), aci.RuleNotAnImage},
		"zip":                 {"PK\x03\x04" + strings.Repeat("\x00", 600), aci.RuleNotAnImage},
		"zstd":                {"\x28\xb5\x2f\xfd" + strings.Repeat("\x00", 600), aci.RuleNotAnImage},
		"zeros":               {strings.Repeat("\x00", 10240), aci.RuleNotAnImage},
		"a gzip header only":  {"\x1f\x8b", aci.RuleTruncated},
		"gzip, wrong method":  {"\x1f\x8b\x07" + strings.Repeat("\x00", 20), aci.RuleCorrupt},
		"xz, wrong checksum":  {"\xfd7zXZ\x00\x00\x04abcd", aci.RuleCorrupt},
		"bzip2, wrong level":  {"BZh0abcdefgh", aci.RuleCorrupt},
		"a gzip name too far": {"\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x03name without an end", aci.RuleTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			r, how, err := aci.Decompress(strings.NewReader(tt.data), aci.Limits{})
			if err == nil {
				_, err = io.Copy(io.Discard, r)
			}
			if rule(err) != tt.want {
				t.Errorf("Decompress = %q, %v; want rule %s", how, err, tt.want)
			}
		})
	}
}

func TestDecompressAfterClose(t *testing.T) {
	r, _, err := aci.Decompress(bytes.NewReader(acitest.Must(t, acitest.Spec{})), aci.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 10)); n != 0 || err == nil || err == io.EOF {
		t.Errorf("Read after Close = %d, %v; want an error", n, err)
	}
}

func TestDecompressSourceFailsAtOnce(t *testing.T) {
	broken := errors.New("broken")
	_, _, err := aci.Decompress(iotest.ErrReader(broken), aci.Limits{})
	if !errors.Is(err, broken) || errors.Is(err, acproxy.ErrPublisher) {
		t.Errorf("Decompress = %v, want the source's error", err)
	}
}

// What xz itself makes, with several blocks, with and without their sizes in the headers, with each check, with padding between streams.
func TestXZMadeByXZ(t *testing.T) {
	files, err := filepath.Glob("testdata/xz/*.xz")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files in testdata/xz: %v", err)
	}
	want := strings.Repeat("compressed by xz\n", 500)
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			read := func(data []byte) (string, error) {
				r, _, err := aci.Decompress(bytes.NewReader(data), aci.Limits{})
				if err != nil {
					return "", err
				}
				got, err := io.ReadAll(r)
				return string(got), err
			}
			if got, err := read(data); err != nil || got != want {
				t.Fatalf("%d bytes and %v, want %d", len(got), err, len(want))
			}
			for i := range data {
				flipped := bytes.Clone(data)
				flipped[i] ^= 1
				// A check that is absent protects nothing but the container.
				if got, err := read(flipped); err == nil && got != want && !strings.Contains(name, "none") {
					t.Errorf("bit flipped in byte %d: accepted", i)
				}
				// What ends with padding or an empty stream is whole without them.
				if got, err := read(data[:i]); err == nil && got == want && !strings.Contains(name, "padding") && !strings.Contains(name, "empty") {
					t.Errorf("cut at byte %d of %d: accepted", i, len(data))
				}
			}
		})
	}
}

// dictionaryOf returns an xz stream whose only block asks for a dictionary of the coded size.
func dictionaryOf(code byte, blocks int) []byte {
	sealed := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b)) }
	s := append([]byte("\xfd7zXZ\x00"), sealed([]byte{0, 0})...)
	for range blocks {
		s = append(s, sealed([]byte{2, 0, 0x21, 1, code, 0, 0, 0})...)
		s = append(s, 1, 0, 0, 'x', 0, 0, 0, 0) // one chunk of one byte, as it is; the end; padding
	}
	return s
}

func TestXZDictionaries(t *testing.T) {
	for _, tt := range []struct {
		name   string
		code   byte
		blocks int
		want   string
	}{
		{"8 MiB", 22, 1, aci.RuleTruncated}, // the stream has no index: what counts is how far it came
		{"128 MiB, the limit", 30, 1, aci.RuleTruncated},
		{"192 MiB", 31, 1, aci.RuleDictionary},
		{"4 GiB", 40, 1, aci.RuleDictionary},
		{"no size at all", 41, 1, aci.RuleUnsupported},
		{"16 blocks of 64 MiB", 28, 16, aci.RuleTruncated},
		{"17 blocks of 64 MiB", 28, 17, aci.RuleDictionary},
		{"100,000 blocks of 4 KiB", 0, 100_000, aci.RuleTruncated},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, _, err := aci.Decompress(bytes.NewReader(dictionaryOf(tt.code, tt.blocks)), aci.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err = io.Copy(io.Discard, r); rule(err) != tt.want {
				t.Errorf("reading it = %v, want rule %s", err, tt.want)
			}
		})
	}
}

func FuzzDecompress(f *testing.F) {
	for _, image := range images(f) {
		f.Add(image)
	}
	f.Add(dictionaryOf(20, 2))
	lim := aci.Limits{MaxUncompressed: 1 << 20, MaxDictionary: 1 << 20}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, how, err := aci.Decompress(bytes.NewReader(data), lim)
		var n int64
		if err == nil {
			n, err = io.Copy(io.Discard, r)
		}
		switch {
		case n > lim.MaxUncompressed:
			t.Errorf("%d bytes came out, the limit is %d", n, lim.MaxUncompressed)
		case err != nil && !errors.Is(err, acproxy.ErrPublisher):
			t.Errorf("Decompress = %q, %v; want a violation: the source never fails", how, err)
		case err == nil && how == aci.XZ:
			// What is accepted of xz, the library's own container reader accepts too.
			zr, err := xz.NewReader(bytes.NewReader(data))
			if err != nil {
				t.Fatalf("the library says %v", err)
			}
			if m, err := io.Copy(io.Discard, zr); err != nil || m != n {
				t.Errorf("%d bytes, the library says %d and %v", n, m, err)
			}
		}
	})
}
