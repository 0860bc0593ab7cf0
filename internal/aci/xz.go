package aci

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// An xzReader reads xz streams (The .xz File Format, version 1.2.1) one after the other until the source ends. The container is read here
// and only its LZMA2 data by the library, because the library's own container reader allocates whatever dictionary a block asks for, keeps
// a record of every block, and can't tell what follows the last stream. Filters other than LZMA2 are refused, as the library does.
type xzReader struct {
	br            *bufio.Reader
	pos           func() int64 // compressed bytes taken from br
	maxDictionary int64

	stream *xzStream // nil between streams
	begun  bool      // a stream was there
	block  *xzBlock  // nil between blocks

	out  int64 // uncompressed bytes of all streams
	dict int64 // bytes of dictionary allocated so far
}

type xzStream struct {
	flags   byte // which check its blocks carry
	blocks  int64
	records hash.Hash // of the sizes of its blocks, to be compared with the index
}

type xzBlock struct {
	lzma2        *lzma.Reader2
	check        hash.Hash // nil if blocks carry none
	headerSize   int64
	begin        int64 // where its LZMA2 data begins
	compressed   int64 // as the header says; -1 if it doesn't
	uncompressed int64 // as the header says; -1 if it doesn't
	out          int64
}

const (
	xzHeaderSize    = 12
	xzFilterLZMA2   = 0x21
	xzMaxDictCode   = 40
	xzFreeDict      = 1 << 30 // dictionaries allocated before they are weighed against what came out
	xzDictPerOutput = 64
)

func corruptXZ(format string, args ...any) error {
	return violation(RuleCorrupt, "xz: "+format, args...)
}

func (x *xzReader) Read(p []byte) (int, error) {
	for {
		if x.block == nil {
			if err := x.next(); err != nil {
				return 0, err
			}
			continue
		}
		n, err := x.block.lzma2.Read(p)
		x.out += int64(n)
		x.block.out += int64(n)
		if x.block.check != nil {
			x.block.check.Write(p[:n])
		}
		if err == io.EOF {
			err = x.endBlock()
			x.block = nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// next goes on to the next block, over the ends of streams. It returns io.EOF if there is none.
func (x *xzReader) next() error {
	if x.stream == nil {
		if err := x.beginStream(); err != nil {
			return err
		}
		x.begun = true
	}
	size, err := x.br.ReadByte()
	if err != nil {
		return noEOF(err)
	}
	if size != 0 {
		return x.beginBlock(size)
	}
	if err := x.endStream(); err != nil {
		return err
	}
	x.stream = nil
	return nil
}

// beginStream reads padding and a stream header (sections 2.1.1 and 2.2).
func (x *xzReader) beginStream() error {
	for x.begun {
		head, err := x.br.Peek(4)
		if len(head) == 0 {
			return err
		}
		if err != nil && err != io.EOF {
			return err
		}
		if !bytes.Equal(head, []byte{0, 0, 0, 0}) {
			if !bytes.HasPrefix([]byte(xzMagic), head) {
				return violation(RuleTrailingBytes, "%q follows the end of the compressed stream", head)
			}
			break
		}
		if _, err := x.br.Discard(4); err != nil {
			return err
		}
	}
	var header [xzHeaderSize]byte
	if _, err := io.ReadFull(x.br, header[:]); err != nil {
		return noEOF(err)
	}
	flags := header[6:8]
	switch {
	case string(header[:6]) != xzMagic && x.begun:
		return violation(RuleTrailingBytes, "%q follows the end of the compressed stream", header[:6])
	case string(header[:6]) != xzMagic:
		return corruptXZ("no stream header")
	case crc32.ChecksumIEEE(flags) != binary.LittleEndian.Uint32(header[8:]):
		return corruptXZ("the checksum of the stream header is wrong")
	case flags[0] != 0 || flags[1] > 0x0f:
		return violation(RuleUnsupported, "xz: stream flags %#x are none that the format knows", flags)
	}
	if _, known := newCheck(flags[1]); !known {
		return violation(RuleUnsupported, "xz: check %d is none of CRC32, CRC64 and SHA-256", flags[1])
	}
	x.stream = &xzStream{flags: flags[1], records: sha256.New()}
	return nil
}

// beginBlock reads a block header (section 3.1) whose first byte was size, and allocates the block's dictionary.
func (x *xzReader) beginBlock(size byte) error {
	var room [1024]byte
	header := room[:(int(size)+1)*4]
	header[0] = size
	if _, err := io.ReadFull(x.br, header[1:]); err != nil {
		return noEOF(err)
	}
	body, sum := header[:len(header)-4], header[len(header)-4:]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(sum) {
		return corruptXZ("the checksum of a block header is wrong")
	}
	flags := body[1]
	if flags&0x3f != 0 {
		return violation(RuleUnsupported, "xz: a block has filters other than LZMA2 alone (flags %#x)", flags)
	}
	rest := bytes.NewReader(body[2:])
	b := &xzBlock{headerSize: int64(len(header)), compressed: -1, uncompressed: -1}
	for _, f := range []struct {
		present byte
		to      *int64
	}{{0x40, &b.compressed}, {0x80, &b.uncompressed}} {
		if flags&f.present == 0 {
			continue
		}
		var err error
		if *f.to, err = readXZInt(rest); err != nil {
			return corruptXZ("a size in a block header is wrong")
		}
	}
	var filter [3]byte // its ID, the size of its properties, its property: the dictionary size (section 5.3.1)
	if _, err := io.ReadFull(rest, filter[:]); err != nil {
		return corruptXZ("a block header ends within its filter")
	}
	if filter[0] != xzFilterLZMA2 || filter[1] != 1 || filter[2] > xzMaxDictCode {
		return violation(RuleUnsupported, "xz: filter %#x is not LZMA2", filter)
	}
	for rest.Len() > 0 {
		if pad, _ := rest.ReadByte(); pad != 0 {
			return corruptXZ("the padding of a block header is not zero")
		}
	}
	dict, err := x.dictionary(filter[2], b.uncompressed)
	if err != nil {
		return err
	}
	b.begin = x.pos()
	if b.lzma2, err = (lzma.Reader2Config{DictCap: dict}).NewReader2(x.br); err != nil {
		return noEOF(err)
	}
	b.check, _ = newCheck(x.stream.flags)
	x.block = b
	return nil
}

// dictionary returns how large a dictionary to allocate for a block. What refers back can't reach behind the block's beginning, so a block
// that says how large it is needs no more than that. Blocks may be as small as a few bytes and ask for a new dictionary each: what they
// have been given in all is weighed against what came out of them.
func (x *xzReader) dictionary(code byte, uncompressed int64) (int, error) {
	size := int64(1)<<32 - 1
	if code < xzMaxDictCode {
		size = int64(2|code&1) << (code/2 + 11)
	}
	if size > x.maxDictionary {
		return 0, violation(RuleDictionary, "xz: a block asks for a dictionary of %d bytes, the limit is %d", size, x.maxDictionary)
	}
	if uncompressed >= 0 {
		size = min(size, uncompressed)
	}
	size = max(size, lzma.MinDictCap)
	x.dict += size
	if x.dict > xzFreeDict+xzDictPerOutput*x.out {
		return 0, violation(RuleDictionary, "xz: its blocks ask for dictionaries of %d bytes in all, and only %d bytes have come out", x.dict, x.out)
	}
	return int(size), nil
}

// endBlock reads what follows a block's LZMA2 data: padding and check (sections 3.3 and 3.4).
func (x *xzReader) endBlock() error {
	b := x.block
	compressed := x.pos() - b.begin
	switch {
	case !b.lzma2.EOS():
		return io.ErrUnexpectedEOF
	case b.compressed >= 0 && b.compressed != compressed, b.uncompressed >= 0 && b.uncompressed != b.out:
		return corruptXZ("a block is not as large as its header says")
	}
	var tail [3 + sha256.Size]byte
	pad := int(-compressed & 3)
	var sum []byte
	if b.check != nil {
		sum = b.check.Sum(nil)
	}
	if _, err := io.ReadFull(x.br, tail[:pad+len(sum)]); err != nil {
		return noEOF(err)
	}
	for _, c := range tail[:pad] {
		if c != 0 {
			return corruptXZ("the padding of a block is not zero")
		}
	}
	if !bytes.Equal(tail[pad:pad+len(sum)], sum) {
		return corruptXZ("the checksum of a block is wrong")
	}
	x.stream.blocks++
	x.stream.record(b.headerSize+compressed+int64(len(sum)), b.out)
	return nil
}

func (s *xzStream) record(unpadded, uncompressed int64) {
	s.records.Write(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(unpadded)), uint64(uncompressed)))
}

// endStream reads a stream's index, whose first byte was read already, and its footer (sections 4 and 2.1.2).
func (x *xzReader) endStream() error {
	index := &checkedReader{br: x.br, crc: crc32.NewIEEE()}
	index.add(0)
	n, err := readXZInt(index)
	if err != nil {
		return err
	}
	if n != x.stream.blocks {
		return corruptXZ("the index lists %d blocks, there were %d", n, x.stream.blocks)
	}
	listed := xzStream{records: sha256.New()}
	for range n {
		unpadded, err := readXZInt(index)
		if err != nil {
			return err
		}
		uncompressed, err := readXZInt(index)
		if err != nil {
			return err
		}
		listed.record(unpadded, uncompressed)
	}
	if !bytes.Equal(listed.records.Sum(nil), x.stream.records.Sum(nil)) {
		return corruptXZ("the index lists other sizes than its blocks have")
	}
	for index.n%4 != 0 {
		c, err := index.ReadByte()
		if err != nil {
			return noEOF(err)
		}
		if c != 0 {
			return corruptXZ("the padding of the index is not zero")
		}
	}
	var tail [4 + xzHeaderSize]byte
	if _, err := io.ReadFull(x.br, tail[:]); err != nil {
		return noEOF(err)
	}
	footer := tail[4:]
	switch {
	case binary.LittleEndian.Uint32(tail[:4]) != index.crc.Sum32():
		return corruptXZ("the checksum of the index is wrong")
	case binary.LittleEndian.Uint32(footer[:4]) != crc32.ChecksumIEEE(footer[4:10]):
		return corruptXZ("the checksum of the stream footer is wrong")
	case (int64(binary.LittleEndian.Uint32(footer[4:8]))+1)*4 != index.n+4:
		return corruptXZ("the stream footer gives another size of the index")
	case footer[8] != 0 || footer[9] != x.stream.flags || string(footer[10:]) != "YZ":
		return corruptXZ("the stream footer is not that of the stream")
	}
	return nil
}

// A checkedReader reads bytes and sums them.
type checkedReader struct {
	br  *bufio.Reader
	crc hash.Hash32
	n   int64
}

func (c *checkedReader) ReadByte() (byte, error) {
	b, err := c.br.ReadByte()
	if err == nil {
		c.add(b)
	}
	return b, err
}

func (c *checkedReader) add(b byte) {
	c.n++
	c.crc.Write([]byte{b})
}

// readXZInt reads a number of at most 63 bits (section 1.2).
func readXZInt(r io.ByteReader) (int64, error) {
	var v uint64
	for shift := 0; shift < 63; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, noEOF(err)
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return int64(v), nil
		}
	}
	return 0, corruptXZ("a number is longer than 63 bits")
}

var crc64Table = crc64.MakeTable(crc64.ECMA)

// newCheck returns the hash of a block check, nil for none, and whether there is such a check (section 2.1.1.2).
func newCheck(flags byte) (hash.Hash, bool) {
	switch flags {
	case 0:
		return nil, true
	case 1:
		return littleEndian{crc32.NewIEEE()}, true
	case 4:
		return littleEndian{crc64.New(crc64Table)}, true
	case 10:
		return sha256.New(), true
	}
	return nil, false
}

// littleEndian is a hash whose sum is written backwards, as xz does with CRCs.
type littleEndian struct{ hash.Hash }

func (l littleEndian) Sum(b []byte) []byte {
	sum := l.Hash.Sum(nil)
	for i := range sum {
		b = append(b, sum[len(sum)-1-i])
	}
	return b
}
