package trust

import (
	"bytes"
	"encoding/hex"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// costs returns how many bytes of memory f allocates.
func costs(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

const bombSize = 24 << 20

// bomb returns a compressed packet that fits into a signature or key file many times over, and holds bombSize of zeros.
func bomb(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := packet.SerializeCompressed(nopCloser{&b}, packet.CompressionZIP, nil)
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range bombSize >> 20 {
		if _, err := w.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A compressed packet is never opened: nothing that counts is in one.
func TestCompressedPacketsAreNotOpened(t *testing.T) {
	const most = bombSize / 2 // bytes: many times the file
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	keys := ring(t, trusted{"", key.Armored()})
	good := sign(t, key, trusttest.SignOptions{Binary: true})
	zip := bomb(t)
	for where, file := range map[string][]byte{
		"alone": zip, "before a good signature": joinBinary(zip, good), "behind a good signature": joinBinary(good, zip), "in armor": armored("PGP SIGNATURE", zip),
	} {
		var got Outcome
		spent := costs(func() {
			a, err := keys.Judge(Question{Name: "example.com/app", Signature: file, Hashed: hashed(t, file, image), Now: now})
			got = outcome(t, a, err)
		})
		if got != UnsupportedSignature || spent > most {
			t.Errorf("a signature %s: Judge = %v for %d bytes of memory, want %v", where, got, spent, UnsupportedSignature)
		}
	}
	for where, file := range map[string][]byte{"alone": zip, "behind a key": joinBinary(key.Binary(), zip), "in armor": armored("PGP PUBLIC KEY BLOCK", zip)} {
		var err error
		spent := costs(func() { _, err = ReadKeys(file) })
		// Behind a key it may be left unread; it must not be opened.
		if spent > most || where != "behind a key" && !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("a key file %s: ReadKeys = %v for %d bytes of memory", where, err, spent)
		}
	}
}

// However many packets there are, no more than MaxPackets are looked at, and each hash is computed once.
func TestThousandsOfPackets(t *testing.T) {
	good, evil := newKey(t, trusttest.Options{}), newKey(t, trusttest.Options{})
	keys := ring(t, trusted{"", good.Armored()})
	binary := sign(t, good, trusttest.SignOptions{Binary: true})
	// Each of these has to be verified, as it names the trusted key.
	forged := sign(t, evil, trusttest.SignOptions{Binary: true})
	for _, end := range []int{20, 8} {
		from, to := hexBytes(t, evil.Fingerprint()), hexBytes(t, good.Fingerprint())
		forged = bytes.ReplaceAll(forged, from[20-end:], to[20-end:])
	}
	marker := []byte{0x80 | 0x40 | tagMarker, 3, 'P', 'G', 'P'}
	fill := func(packet []byte) []byte { return bytes.Repeat(packet, (MaxSignature-len(binary))/len(packet)) }
	for _, test := range []struct {
		name   string
		packet []byte
		want   Outcome
	}{
		{"markers", marker, MalformedSignature},
		{"forged signatures", forged, BadSignature},
	} {
		file := append(fill(test.packet), binary...)
		if len(file)/len(test.packet) < 1000 {
			t.Fatalf("%s: only %d packets", test.name, len(file)/len(test.packet))
		}
		if h, err := NewHasher(file); err == nil && len(h.hashes) > 1 {
			t.Errorf("%s: %d hashes are computed, want one", test.name, len(h.hashes))
		}
		sigs, err := readSignatures(file)
		if len(sigs) > MaxPackets {
			t.Errorf("%s: %d signatures are looked at (%v), want at most %d", test.name, len(sigs), err, MaxPackets)
		}
		a, err := keys.Judge(Question{Name: "example.com/app", Signature: file, Hashed: hashed(t, file, image), Now: now})
		if got := outcome(t, a, err); got != test.want {
			t.Errorf("%s: Judge = %v (%v), want %v", test.name, got, err, test.want)
		}
	}
}

func hexBytes(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMalformedArmor(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	keys := ring(t, trusted{"", key.Armored()})
	good := string(sign(t, key, trusttest.SignOptions{}))
	body := strings.SplitN(good, "\n", 4)
	withoutEnd, _, _ := strings.Cut(good, "-----END")
	// comment returns the signature with a header line of so many bytes, its end included.
	comment := func(length int) string {
		begin := strings.IndexByte(good, '\n') + 1
		return good[:begin] + "Comment: " + strings.Repeat("A", length-len("Comment: \n")) + "\n" + good[begin:]
	}
	for _, test := range []struct {
		name string
		file string
		want Outcome
	}{
		{"as it is", good, Accepted},
		{"with the line ends of Windows", strings.ReplaceAll(good, "\n", "\r\n"), Accepted},
		// What armor adds to the packets protects nobody: the signature itself does.
		{"without its end", withoutEnd, Accepted},
		{"a wrong checksum", strings.Replace(good, "\n=", "\n=AAAA\n=", 1), Accepted},
		{"without its beginning", good[strings.IndexByte(good, '\n')+1:], MalformedSignature},
		{"a beginning alone", "-----BEGIN PGP SIGNATURE-----\n", MalformedSignature},
		{"a thousand beginnings", strings.Repeat("-----BEGIN PGP SIGNATURE-----\n\n", 1000), MalformedSignature},
		{"nothing inside", "-----BEGIN PGP SIGNATURE-----\n\n-----END PGP SIGNATURE-----\n", MalformedSignature},
		{"a character that is none of base64", strings.Replace(good, body[2][:1], "!", 1), MalformedSignature},
		{"one line of a megabyte", "-----BEGIN PGP SIGNATURE-----\n\n" + strings.Repeat("A", MaxSignature-100) + "\n-----END PGP SIGNATURE-----\n", MalformedSignature},
		{"a header of a megabyte", comment(MaxSignature - 1000), MalformedSignature},
		{"a header as long as allowed", comment(maxArmorLine), Accepted},
		{"a header a byte too long", comment(maxArmorLine + 1), MalformedSignature},
		{"a long line behind the armor", good + strings.Repeat("A", maxArmorLine+1), Accepted},
		{"an unknown kind", strings.ReplaceAll(good, "SIGNATURE", "SIGNATURES"), UnsupportedSignature},
	} {
		a, err := keys.Judge(Question{Name: "example.com/app", Signature: []byte(test.file), Hashed: hashed(t, []byte(test.file), image), Now: now})
		if got := outcome(t, a, err); got != test.want {
			t.Errorf("%s: Judge = %v (%v), want %v", test.name, got, err, test.want)
		}
	}
}
