package bundle

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unicode"

	"golang.org/x/mod/sumdb/note"

	"github.com/acproxy/acproxy/internal/durable"
)

// A Signer signs bundles and receipts, as notes of golang.org/x/mod/sumdb/note: with Ed25519. What it signs says where something comes from; whether an image is
// acceptable is never decided by it.
type Signer struct {
	signer   note.Signer
	verifier string
}

// LoadSigner returns the signer whose key is in a file, which is made if it isn't there: with a name, of which what a key's name can't hold is left out.
func LoadSigner(file, name string) (*Signer, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		var private string
		if private, _, err = note.GenerateKey(rand.Reader, keyName(name)); err != nil {
			return nil, err
		}
		b = []byte(private + "\n")
		err = durable.WriteFile(nil, file, b, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("the key that signs bundles: %w", err)
	}
	s, err := newSigner(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, fmt.Errorf("the key that signs bundles, in %s: %w", file, err)
	}
	return s, nil
}

func keyName(name string) string {
	name = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) || r == '+' || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, name)
	if name == "" {
		return "acproxy"
	}
	return name
}

func newSigner(private string) (*Signer, error) {
	signer, err := note.NewSigner(private)
	if err != nil {
		return nil, err
	}
	verifier, err := verifierOf(private)
	if err != nil {
		return nil, err
	}
	return &Signer{signer: signer, verifier: verifier}, nil
}

// Verifier returns the key that others check signatures with: NAME+HASH+KEY.
func (s *Signer) Verifier() string { return s.verifier }

// Sign returns a text as a signed note.
func (s *Signer) Sign(text string) ([]byte, error) {
	return note.Sign(&note.Note{Text: text}, s.signer)
}

// A Signed says what is known of who signed something.
type Signed struct {
	By       string `json:"by,omitempty"` // NAME+HASH of the key, "" if nobody signed
	Verified bool   `json:"verified"`     // by a key that was given; otherwise anybody may have written that name
}

// String returns it in words.
func (s Signed) String() string {
	switch {
	case s.By == "":
		return "nobody"
	case s.Verified:
		return s.By
	}
	return s.By + " (says who wrote it: not checked against a key)"
}

// check returns who signed a text, if it is not the text alone, by the keys, given as verifiers, that are asked for. With such keys it is an error if none of them did.
func check(signed []byte, text string, keys []string) (Signed, error) {
	var verifiers []note.Verifier
	for _, key := range keys {
		v, err := note.NewVerifier(key)
		if err != nil {
			return Signed{}, fmt.Errorf("%.80q is no key as acproxy export key prints it: %w", key, err)
		}
		verifiers = append(verifiers, v)
	}
	if string(signed) == text {
		if len(keys) > 0 {
			return Signed{}, failure(CodeUnknownKey, "nobody signed it, and it has to be signed by %s", names(keys))
		}
		return Signed{}, nil
	}
	n, err := note.Open(signed, note.VerifierList(verifiers...))
	var unverified *note.UnverifiedNoteError
	if errors.As(err, &unverified) {
		n, err = unverified.Note, nil
	}
	switch {
	case err != nil:
		return Signed{}, failure(CodeDamaged, "its note can't be read, or its signature is wrong: %v", err)
	case n.Text != text:
		return Signed{}, failure(CodeDamaged, "its note is for something else")
	case len(n.Sigs) > 0:
		return Signed{By: fmt.Sprintf("%s+%08x", n.Sigs[0].Name, n.Sigs[0].Hash), Verified: true}, nil
	case len(keys) > 0:
		return Signed{}, failure(CodeUnknownKey, "it is signed by %.200s, and has to be by %s", by(n.UnverifiedSigs), names(keys))
	}
	return Signed{By: by(n.UnverifiedSigs)}, nil
}

func by(sigs []note.Signature) string {
	if len(sigs) == 0 {
		return ""
	}
	return fmt.Sprintf("%s+%08x", sigs[0].Name, sigs[0].Hash)
}

// names returns the names of keys, without what they consist of.
func names(keys []string) string {
	var out []string
	for _, key := range keys {
		// NAME+HASH+KEY, where KEY may hold more of these.
		if parts := strings.SplitN(key, "+", 3); len(parts) == 3 {
			key = parts[0] + "+" + parts[1]
		}
		out = append(out, key)
	}
	return strings.Join(out, " or ")
}

// verifierOf returns the public key to a private one, PRIVATE+KEY+NAME+HASH+KEY, where KEY is the algorithm, 1, and an Ed25519 seed, in base64.
func verifierOf(private string) (string, error) {
	parts := strings.SplitN(private, "+", 5)
	if len(parts) != 5 {
		return "", errors.New("it is not PRIVATE+KEY+NAME+HASH+KEY")
	}
	key, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(key) != 1+ed25519.SeedSize {
		return "", errors.New("it is no Ed25519 key")
	}
	return note.NewEd25519VerifierKey(parts[2], ed25519.NewKeyFromSeed(key[1:]).Public().(ed25519.PublicKey))
}

// statement is what a note says of an index or the body of a receipt, signed or not: a note has to be short.
func statement(body []byte, images int) string {
	format, _, _ := bytes.Cut(bytes.TrimPrefix(body, []byte(`{"format":"`)), []byte(`"`))
	return fmt.Sprintf("%s v%d\n%v\n%d bytes, %d images\n", format, formatVersion, ID(body), len(body), images)
}
