package trust

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // the hashes that signatures name
	_ "crypto/sha256"
	_ "crypto/sha3"
	_ "crypto/sha512"
	"encoding"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// ErrNotHashed says that a decision needs a hash of the image's bytes that [Hashed] doesn't hold, because the signature is another one than
// the [Hasher] was made for: the bytes have to be read again. It is no verdict, and matches none of the sentinels of package acproxy.
var ErrNotHashed = errors.New("the bytes have not been hashed as the signature asks")

// A signature is one signature packet, as far as it could be read.
type signature struct {
	packet  *packet.Signature // nil if problem says why it can't count
	problem Outcome           // 0 if it can be verified
	detail  string
}

// readSignatures reads the signature packets of a signature file, in order. The error is a *Refusal without a name.
func readSignatures(data []byte) ([]signature, error) {
	if len(data) > MaxSignature {
		return nil, refuse(MalformedSignature, "the signature is longer than the %d bytes allowed", MaxSignature)
	}
	blocks, err := dearmor(data)
	if err != nil {
		return nil, refuse(MalformedSignature, "the signature can't be read: %v", err)
	}
	var sigs []signature
	left := MaxPackets
	for _, b := range blocks {
		if b.kind != openpgp.SignatureType && b.kind != "" {
			return nil, refuse(UnsupportedSignature, "not a detached signature but %s: publish the output of gpg --armor --detach-sign", describeBlock(b.kind))
		}
		found, err := readPackets(b.body, &left)
		if err != nil {
			return nil, err
		}
		sigs = append(sigs, found...)
	}
	if len(sigs) == 0 {
		return nil, refuse(MalformedSignature, "there is no signature in the signature file")
	}
	return sigs, nil
}

func readPackets(body []byte, left *int) ([]signature, error) {
	packets := packet.NewOpaqueReader(bytes.NewReader(body))
	var sigs []signature
	for ; *left > 0; *left-- {
		p, err := packets.Next()
		if err == io.EOF {
			return sigs, nil
		}
		if err != nil && len(sigs) > 0 {
			// What follows a whole signature can only add to it.
			return sigs, nil
		}
		if err != nil {
			return nil, refuse(MalformedSignature, "the signature can't be read: %v", err)
		}
		switch p.Tag {
		case tagSignature:
			sigs = append(sigs, readSignature(p))
		case tagMarker, tagTrust, tagPadding:
		default:
			return nil, refuse(UnsupportedSignature, "not a detached signature but %s: publish the output of gpg --armor --detach-sign", describePacket(p.Tag))
		}
	}
	return sigs, nil
}

// readSignature reads one packet. Its first bytes are looked at before the library does, which can't say what it doesn't know.
func readSignature(p *packet.OpaquePacket) signature {
	body := p.Contents
	if len(body) < 4 {
		return signature{problem: MalformedSignature, detail: "the signature packet is too short"}
	}
	if version := body[0]; version != 4 {
		return signature{problem: UnsupportedSignature, detail: fmt.Sprintf("it is a version %d signature, only version 4 is in use for images: sign it again", version)}
	}
	switch body[3] {
	case 1:
		return signature{problem: WeakAlgorithm, detail: "it is made with MD5, which anybody can forge: sign it again"}
	case 3:
		return signature{problem: WeakAlgorithm, detail: "it is made with RIPEMD-160, which is obsolete: sign it again"}
	}
	switch kind := packet.SignatureType(body[1]); kind {
	case packet.SigTypeBinary:
	case packet.SigTypeText:
		return signature{problem: UnsupportedSignature, detail: "it is a signature over text with its line ends changed, not over the file's bytes: sign without --textmode"}
	default:
		return signature{problem: UnsupportedSignature, detail: fmt.Sprintf("it is a signature of type %#02x, not one over a file", byte(kind))}
	}
	parsed, err := p.Parse()
	if err != nil {
		return signature{problem: MalformedSignature, detail: fmt.Sprintf("the signature packet can't be read: %v", err)}
	}
	sig, ok := parsed.(*packet.Signature)
	if !ok || sig.IssuerKeyId == nil {
		return signature{problem: MalformedSignature, detail: "it doesn't say which key made it"}
	}
	if !understood(sig) {
		return signature{problem: UnsupportedSignature, detail: "it carries a critical notation that isn't known here"}
	}
	if !sig.Hash.Available() {
		return signature{problem: UnsupportedSignature, detail: fmt.Sprintf("its hash %v isn't known here", sig.Hash)}
	}
	return signature{packet: sig}
}

func describePacket(tag uint8) string {
	switch tag {
	case tagOnePass, tagLiteral:
		return "a message with its signature inside"
	case tagCompressed:
		return "a compressed message"
	case tagPublicKey, tagSecretKey:
		return "a key"
	}
	return fmt.Sprintf("an OpenPGP packet of type %d", tag)
}

func describeBlock(kind string) string {
	switch kind {
	case "PGP MESSAGE":
		return "a message with its signature inside"
	case "PGP SIGNED MESSAGE":
		return "a cleartext-signed text"
	case openpgp.PublicKeyType, openpgp.PrivateKeyType:
		return "a key"
	}
	return "a " + printable(kind)
}

func refuse(outcome Outcome, format string, args ...any) *Refusal {
	return &Refusal{Outcome: outcome, Detail: fmt.Sprintf(format, args...)}
}

// A block is the content of one piece of ASCII armor; kind is "" if there was none.
type block struct {
	kind string
	body []byte
}

const (
	armorBegin = "-----BEGIN "
	armorEnd   = "-----END "
)

// dearmor returns what is in a file, which may be binary, or armored in one or several blocks.
func dearmor(data []byte) ([]block, error) {
	if len(data) == 0 {
		return nil, errors.New("it is empty")
	}
	// Every binary packet begins with the top bit set (RFC 9580 section 4.2), no line of armor does.
	if data[0]&0x80 != 0 {
		return []block{{body: data}}, nil
	}
	var blocks []block
	for _, text := range splitArmor(data) {
		if tooLongALine(text) {
			return nil, fmt.Errorf("a line of the ASCII armor is longer than the %d bytes allowed", maxArmorLine)
		}
		b, err := armor.Decode(bytes.NewReader(text))
		if err == io.EOF {
			continue
		}
		if err != nil {
			return nil, err
		}
		if b.Type != openpgp.SignatureType && b.Type != openpgp.PublicKeyType && b.Type != openpgp.PrivateKeyType {
			// Whoever asked wants none of this, and what follows may not even be armor.
			return append(blocks, block{kind: b.Type}), nil
		}
		body, err := io.ReadAll(b.Body)
		if err != nil {
			return nil, fmt.Errorf("the ASCII armor is damaged: %w", err)
		}
		blocks = append(blocks, block{kind: b.Type, body: body})
		if len(blocks) > MaxPackets {
			return nil, fmt.Errorf("there are more than %d blocks of ASCII armor", MaxPackets)
		}
	}
	if len(blocks) == 0 {
		return nil, errors.New("it is neither OpenPGP nor ASCII armor")
	}
	return blocks, nil
}

// maxArmorLine is how many bytes a line of armor may have. Nobody writes more than 76, except in a comment; the decoder takes time with the
// square of a header line's length, for a megabyte seconds.
const maxArmorLine = 16 << 10

// tooLongALine reports whether a piece of armor has a line that no decoder should be given.
func tooLongALine(text []byte) bool {
	for line := range bytes.Lines(text) {
		if bytes.HasPrefix(line, []byte(armorEnd)) {
			return false
		}
		if len(line) > maxArmorLine {
			return true
		}
	}
	return false
}

// splitArmor cuts a text before every line that begins armor. What stands before the first is left out.
func splitArmor(data []byte) [][]byte {
	var parts [][]byte
	start := -1
	for at := 0; at < len(data); {
		line := data[at:]
		if end := bytes.IndexByte(line, '\n'); end >= 0 {
			line = line[:end+1]
		}
		if bytes.HasPrefix(bytes.TrimLeft(line, " \t"), []byte(armorBegin)) {
			if start >= 0 {
				parts = append(parts, data[start:at])
			}
			start = at
		}
		at += len(line)
	}
	if start >= 0 {
		parts = append(parts, data[start:])
	}
	return parts
}

// ArmorSignature returns a signature file as rkt nodes can be given it: armored input as it is, binary input in ASCII armor. Armor that
// comes in several blocks or without a checksum is made anew around the same packets, because old readers see the first block only and
// want the checksum. It returns a *[Refusal] for what isn't a signature at all.
func ArmorSignature(sig []byte) ([]byte, error) {
	if _, err := readSignatures(sig); err != nil {
		return nil, err
	}
	blocks, err := dearmor(sig)
	if err != nil {
		return nil, err
	}
	if len(blocks) == 1 && blocks[0].kind != "" && hasChecksum(sig) {
		return sig, nil
	}
	var body []byte
	for _, b := range blocks {
		body = append(body, b.body...)
	}
	return armored(openpgp.SignatureType, body), nil
}

func hasChecksum(data []byte) bool {
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) == 5 && line[0] == '=' {
			return true
		}
	}
	return false
}

// Hashed is what has been hashed of an image: for each hash by its name, as in "SHA-512", the state that the hash was in after the last of
// the image's bytes and before anything else. It can be kept as JSON and is a few hundred bytes long.
//
// An OpenPGP signature is not over the hash of the file but over the hash of the file and a trailer: the fields of the signature packet
// that it protects, and their length (RFC 9580 section 5.2.4). From the state before the trailer, every signature that uses this hash can be
// verified, today's and one that the publisher makes tomorrow, without reading the file again. Nothing can be taken from or put before what
// was hashed, so a state is as good as the bytes, as long as it is kept as safely.
type Hashed map[string][]byte

// A Hasher is an [io.Writer] that takes an image's bytes as they arrive and hashes them in the ways that a signature needs. It is not safe
// for concurrent use.
type Hasher struct {
	names  []string
	hashes []hash.Hash
}

var _ io.Writer = (*Hasher)(nil)

// NewHasher returns a hasher for a signature file as it was published. Each hash that one of its packets names is computed once; there are
// seven that OpenPGP knows and go-crypto can verify, so that no signature makes it cost more than that. Without a signature (nil) it hashes
// nothing. It returns a *[Refusal] if the file isn't a detached signature.
func NewHasher(signature []byte) (*Hasher, error) {
	h := new(Hasher)
	if signature == nil {
		return h, nil
	}
	sigs, err := readSignatures(signature)
	if err != nil {
		return nil, err
	}
	for _, s := range sigs {
		if s.packet != nil {
			h.add(s.packet.Hash)
		}
	}
	return h, nil
}

func (h *Hasher) add(f crypto.Hash) {
	for _, name := range h.names {
		if name == f.String() {
			return
		}
	}
	h.names = append(h.names, f.String())
	h.hashes = append(h.hashes, f.New())
}

// Write hashes p. It never fails.
func (h *Hasher) Write(p []byte) (int, error) {
	for _, each := range h.hashes {
		each.Write(p)
	}
	return len(p), nil
}

// SHA256 returns the running SHA-256 of what is written, nil if no signature needs one. Who wants the digest of the same bytes need not compute another.
func (h *Hasher) SHA256() hash.Hash {
	if i := slices.Index(h.names, crypto.SHA256.String()); i >= 0 {
		return h.hashes[i]
	}
	return nil
}

// Hashed returns the state after what has been written so far.
func (h *Hasher) Hashed() (Hashed, error) {
	states := make(Hashed, len(h.names))
	for i, name := range h.names {
		m, ok := h.hashes[i].(encoding.BinaryMarshaler)
		if !ok {
			return nil, fmt.Errorf("hash %s can't be stored", name)
		}
		state, err := m.MarshalBinary()
		if err != nil {
			return nil, fmt.Errorf("storing hash %s: %w", name, err)
		}
		states[name] = state
	}
	return states, nil
}

// resume returns a running hash with everything of the image in it. The error matches ErrNotHashed if the state isn't there.
func (h Hashed) resume(f crypto.Hash) (hash.Hash, error) {
	state, ok := h[f.String()]
	if !ok {
		return nil, fmt.Errorf("%w: %v is not among what was hashed", ErrNotHashed, f)
	}
	running := f.New()
	u, ok := running.(encoding.BinaryUnmarshaler)
	if !ok {
		return nil, fmt.Errorf("%w: %v can't be resumed", ErrNotHashed, f)
	}
	if err := u.UnmarshalBinary(state); err != nil {
		return nil, fmt.Errorf("%w: the stored state of %v is damaged: %w", ErrNotHashed, f, err)
	}
	return running, nil
}
