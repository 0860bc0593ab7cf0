package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"

	"github.com/acproxy/acproxy"
)

const (
	tableFormat = "acproxy-bundle-volumes"
	// checkedBlock is how many bytes of a volume one checksum is for: what is damaged is known, and repaired, in pieces of this size.
	checkedBlock = 1 << 20
	// maxTable bounds a table: a thousand volumes and sixteen million checksums.
	maxTable = 160 << 20
	// parityMagic ends a parity volume, behind its table.
	parityMagic = "acproxy-parity1\n"
	// parityFooter is the number of bytes of the table, its SHA-256, and the magic.
	parityFooter = 8 + sha256.Size + len(parityMagic)
)

// A Table says how the stream of a bundle lies in volumes. It is a file of its own beside them, and stands at the end of each parity volume.
type Table struct {
	Format     string         `json:"format"`
	Version    int            `json:"version"`
	Bundle     acproxy.Digest `json:"bundle"`     // the ID
	Size       int64          `json:"size"`       // bytes of the stream
	VolumeSize int64          `json:"volumeSize"` // bytes of each volume but the last
	Volumes    []Volume       `json:"volumes"`
	Parity     []Volume       `json:"parity,omitempty"` // without the tables at their ends
}

// A Volume is one file of a bundle.
type Volume struct {
	Size   int64          `json:"size"`
	Digest acproxy.Digest `json:"digest"`
	CRC32C crcs           `json:"crc32c"` // of each MiB, the last of which may be shorter
}

// encode returns the table as it is written.
func (t *Table) encode() ([]byte, error) {
	b, err := json.Marshal(t)
	return append(b, '\n'), err
}

// parseTable reads a table, and checks that it can be one.
func parseTable(b []byte) (*Table, error) {
	t := new(Table)
	if err := strictly(bytes.TrimSuffix(b, []byte("\n")), t); err != nil {
		return nil, failure(CodeNotBundle, "the table of the volumes: %v", err)
	}
	if err := t.check(); err != nil {
		return nil, failure(CodeNotBundle, "the table of the volumes: %v", err)
	}
	return t, nil
}

func (t *Table) check() error {
	n := int64(len(t.Volumes))
	switch {
	case t.Format != tableFormat || t.Version != formatVersion:
		return fmt.Errorf("it is of format %.40q, version %d; this acproxy reads %s, version %d", t.Format, t.Version, tableFormat, formatVersion)
	case t.VolumeSize < 1 || t.VolumeSize > MaxImage || t.Size < 1 || t.Bundle.IsZero():
		return errors.New("it says nothing of what it is for")
	case n < 1 || n > MaxVolumes || (t.Size-1)/t.VolumeSize != n-1:
		return fmt.Errorf("%d bytes in volumes of %d are not %d volumes", t.Size, t.VolumeSize, n)
	case len(t.Parity) > 0 && len(t.Volumes)+len(t.Parity) > MaxShards:
		return fmt.Errorf("it has %d volumes and %d of parity, more than %d together", n, len(t.Parity), MaxShards)
	}
	for i, v := range t.Volumes {
		if err := v.check(t.sizeOf(i)); err != nil {
			return fmt.Errorf("volume %d: %w", i+1, err)
		}
	}
	for i, v := range t.Parity {
		if err := v.check(t.sizeOf(0)); err != nil {
			return fmt.Errorf("parity volume %d: %w", i+1, err)
		}
	}
	return nil
}

// sizeOf returns how many bytes a volume has, counted from 0.
func (t *Table) sizeOf(i int) int64 { return min(t.VolumeSize, t.Size-int64(i)*t.VolumeSize) }

func (v Volume) check(size int64) error {
	if blocks := (size + checkedBlock - 1) / checkedBlock; v.Size != size || int64(len(v.CRC32C)) != blocks || v.Digest.IsZero() {
		return fmt.Errorf("it has %d bytes with %d checksums, and should have %d with %d", v.Size, len(v.CRC32C), size, blocks)
	}
	return nil
}

// parityEnd returns what stands at the end of a parity volume.
func parityEnd(table []byte) []byte {
	end := binary.BigEndian.AppendUint64(bytes.Clone(table), uint64(len(table)))
	sum := sha256.Sum256(table)
	return append(append(end, sum[:]...), parityMagic...)
}

// parityTable reads the table at the end of a parity volume.
func parityTable(f *os.File, size int64) (*Table, error) {
	no := failure(CodeDamaged, "it doesn't end as a parity volume does")
	footer := make([]byte, parityFooter)
	if size < int64(parityFooter) {
		return nil, no
	}
	if _, err := f.ReadAt(footer, size-int64(parityFooter)); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint64(footer)
	if string(footer[8+sha256.Size:]) != parityMagic || n > maxTable || int64(n) > size-int64(parityFooter) {
		return nil, no
	}
	table := make([]byte, n)
	if _, err := f.ReadAt(table, size-int64(parityFooter)-int64(n)); err != nil {
		return nil, err
	}
	if sha256.Sum256(table) != [sha256.Size]byte(footer[8:]) {
		return nil, no
	}
	return parseTable(table)
}

// VolumeFile returns the name of a volume of a bundle in volumes, counted from 0.
func VolumeFile(bundle string, i int) string { return fmt.Sprintf("%s.%03d", bundle, i+1) }

// ParityFile returns the name of a parity volume, counted from 0.
func ParityFile(bundle string, i int) string { return fmt.Sprintf("%s.p%02d", bundle, i+1) }

// TableFile returns the name of the table of volumes.
func TableFile(bundle string) string { return bundle + ".volumes" }

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// crcs are checksums (CRC-32C), in text eight hex digits each.
type crcs []uint32

// MarshalText implements encoding.TextMarshaler.
func (c crcs) MarshalText() ([]byte, error) {
	var out []byte
	for _, v := range c {
		out = fmt.Appendf(out, "%08x", v)
	}
	return out, nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *crcs) UnmarshalText(text []byte) error {
	if len(text)%8 != 0 {
		return errors.New("checksums have eight hex digits each")
	}
	*c = nil
	for i := 0; i < len(text); i += 8 {
		v, err := strconv.ParseUint(string(text[i:i+8]), 16, 32)
		if err != nil {
			return err
		}
		*c = append(*c, uint32(v))
	}
	return nil
}
