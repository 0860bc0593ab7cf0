package bundle

import (
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/reedsolomon"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

const (
	filePerm = 0o644
	// noteEvery is how much is written between two notes of how far it has come. An export that was interrupted goes on from the last one.
	noteEvery  = 64 << 20
	copyBuffer = 256 << 10
)

// An Output is where a bundle is written to, as files.
type Output struct {
	Path string // of the one file, or what the volumes' names begin with
	// VolumeSize is how many bytes a volume may have. 0 means one file, without a table.
	VolumeSize int64
	Parity     int        // volumes that may be lost or damaged
	FS         durable.FS // nil means that of the system
	// Progress is told how many bytes of how many were written; what was written by an earlier attempt counts. It may be nil.
	Progress func(done, of int64)
	// NoteEvery is how many bytes are written between two notes of how far it has come; 0 means 64 MiB.
	NoteEvery int64
}

// Check returns why there can't be such an output of a bundle, nil if there can.
func (o Output) Check(b *Bundle) error {
	if o.VolumeSize == 0 {
		if o.Parity > 0 {
			return failure(CodeTooLarge, "parity volumes rebuild lost volumes: they need a volume size")
		}
		return nil
	}
	n := (b.size-1)/o.VolumeSize + 1
	switch {
	case n > MaxVolumes:
		return failure(CodeTooLarge, "%d bytes are %d volumes of %d bytes, and a bundle may have %d: make them larger", b.size, n, o.VolumeSize, MaxVolumes)
	case o.Parity > 0 && n+int64(o.Parity) > MaxShards:
		return failure(CodeTooLarge, "%d volumes and %d of parity are more than %d together: make the volumes larger", n, o.Parity, MaxShards)
	}
	return nil
}

// written says how far the writing of a bundle has come. It is kept beside the volumes until they are whole.
//
//	volume: open or create .partial ─▶ write … fsync ─▶ note ─▶ … ─▶ fsync ─▶ note ─▶ rename ─▶ fsync directory ─▶ the next
//
// What the note says is on the disk, so what is behind it can be cut off and written again: the stream is always the same.
type written struct {
	Head       acproxy.Digest `json:"head"` // of index and note
	Single     bool           `json:"single,omitempty"`
	VolumeSize int64          `json:"volumeSize"`
	Parity     int            `json:"parity"`
	Whole      []Volume       `json:"whole"` // volumes that are
	Partial    *state         `json:"partial,omitempty"`
	Columns    []state        `json:"columns,omitempty"` // of parity volumes
}

// state is how far a file has come, with the states of its hashes.
type state struct {
	Size   int64  `json:"size"`
	SHA256 []byte `json:"sha256"`
	CRC32C crcs   `json:"crc32c"`
	Last   uint32 `json:"last"` // of the bytes since the last whole block
}

// file is a volume that is being written.
type file struct {
	durable.File
	size int64
	sum  hash.Hash
	crcs crcs
	last uint32
}

// Write appends, and sums up.
func (f *file) Write(b []byte) (int, error) {
	n, err := f.WriteAt(b, f.size)
	for done := b[:n]; len(done) > 0; {
		piece := done[:min(int64(len(done)), checkedBlock-f.size%checkedBlock)]
		done = done[len(piece):]
		f.last = crc32.Update(f.last, castagnoli(), piece)
		if f.size += int64(len(piece)); f.size%checkedBlock == 0 {
			f.crcs, f.last = append(f.crcs, f.last), 0
		}
	}
	f.sum.Write(b[:n])
	return n, err
}

func (f *file) state() (state, error) {
	sum, err := f.sum.(encoding.BinaryMarshaler).MarshalBinary()
	return state{Size: f.size, SHA256: sum, CRC32C: f.crcs, Last: f.last}, err
}

// volume returns what the file is when it is whole.
func (f *file) volume() Volume {
	sums := f.crcs
	if f.size%checkedBlock != 0 {
		sums = append(sums[:len(sums):len(sums)], f.last)
	}
	return Volume{Size: f.size, Digest: acproxy.Digest(f.sum.Sum(nil)), CRC32C: sums}
}

// An output is the writing of one bundle.
type output struct {
	Output
	fsys   durable.FS
	b      *Bundle
	single bool // one file and no table
	note   written
}

// ErrOther says that what lies at an output's path belongs to something else.
var ErrOther = errors.New("something else is there")

// Write writes a bundle. What an earlier attempt to write the same bundle has left is gone on with; what was left of another one is an error that matches
// [ErrOther]. When it returns nil, all of it is on the disk.
func (o Output) Write(ctx context.Context, b *Bundle, open Opener) error {
	if err := o.Check(b); err != nil {
		return err
	}
	w := &output{Output: o, fsys: o.FS, b: b}
	if w.fsys == nil {
		w.fsys = durable.OS{}
	}
	if w.NoteEvery == 0 {
		w.NoteEvery = noteEvery
	}
	if w.Progress == nil {
		w.Progress = func(int64, int64) {}
	}
	if w.VolumeSize == 0 {
		w.single, w.VolumeSize = true, b.size
	}
	if done, err := w.takeUp(); done || err != nil {
		return err
	}
	if err := w.volumes(ctx, open); err != nil {
		return err
	}
	if w.single {
		return w.finish()
	}
	table := &Table{Format: tableFormat, Version: formatVersion, Bundle: ID(b.encoded), Size: b.size, VolumeSize: w.VolumeSize, Volumes: w.note.Whole}
	if err := w.parity(ctx, table); err != nil {
		return err
	}
	encoded, err := table.encode()
	if err != nil {
		return err
	}
	if err := w.replace(TableFile(w.Path), encoded); err != nil {
		return err
	}
	return w.finish()
}

// finish removes the note: all is there.
func (w *output) finish() error {
	w.Progress(w.b.size, w.b.size)
	if err := w.fsys.Remove(w.notePath()); err != nil {
		return err
	}
	return w.fsys.SyncDir(filepath.Dir(w.Path))
}

func (w *output) notePath() string { return w.Path + ".unfinished" }

// path returns the name of a volume, counted from 0.
func (w *output) path(i int) string {
	if w.single {
		return w.Path
	}
	return VolumeFile(w.Path, i)
}

// takeUp reads what an earlier attempt has noted. done says that it has finished.
func (w *output) takeUp() (done bool, err error) {
	want := written{Head: w.b.head(), VolumeSize: w.Output.VolumeSize, Parity: w.Parity, Single: w.single}
	b, err := os.ReadFile(w.notePath())
	if err == nil {
		if json.Unmarshal(b, &w.note) != nil || w.note.Head != want.Head || w.note.VolumeSize != want.VolumeSize || w.note.Parity != want.Parity || w.note.Single != want.Single || w.note.check(w) != nil {
			return false, fmt.Errorf("%w: %s says that another export to the same place was not finished, of other images, in other volumes, or of another acproxy; remove it and what lies beside it, or export to another place",
				ErrOther, w.notePath())
		}
		return false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	w.note = want
	if done, err = w.there(); done || err != nil {
		return done, err
	}
	return false, w.keep()
}

// there reports whether the bundle is there already, and returns an error matching [ErrOther] if something else is.
func (w *output) there() (bool, error) {
	last := w.path(0)
	if !w.single {
		last = TableFile(w.Path)
	}
	if _, err := os.Lstat(last); err == nil && w.same() {
		return true, nil
	}
	for _, path := range []string{w.Path, VolumeFile(w.Path, 0), TableFile(w.Path)} {
		_, err := os.Lstat(path)
		if err == nil {
			err = fmt.Errorf("%w: %s is there already, and isn't what would be written; remove it, or export to another place", ErrOther, path)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}

// same reports whether the files at the path are the bundle, by index, note, sizes and table.
func (w *output) same() bool {
	v, err := OpenVolumes(filepath.Base(w.Path), filepath.Dir(w.Path))
	if err != nil {
		return false
	}
	defer v.Close()
	if len(v.Problems()) > 0 || v.size != w.b.size || !w.single && (v.table == nil || v.table.VolumeSize != w.VolumeSize || len(v.table.Parity) != w.Parity) {
		return false
	}
	head := make([]byte, w.b.base())
	if _, err := io.ReadFull(readOnly{v}, head); err != nil {
		return false
	}
	return acproxy.Digest(sha256.Sum256(head)) == w.b.head()
}

// check returns why a note can't be gone on with.
func (n *written) check(w *output) error {
	wrong := errors.New("it says what can't be")
	of := Table{Size: w.b.size, VolumeSize: w.VolumeSize}
	if int64(len(n.Whole)) > (w.b.size-1)/w.VolumeSize+1 || n.Partial != nil && int64(len(n.Whole)) == (w.b.size-1)/w.VolumeSize+1 || len(n.Columns) != 0 && len(n.Columns) != n.Parity {
		return wrong
	}
	for i, v := range n.Whole {
		if v.check(of.sizeOf(i)) != nil {
			return wrong
		}
	}
	for _, s := range n.Columns {
		if s.Size%checkedBlock != 0 || int64(len(s.CRC32C)) != s.Size/checkedBlock || s.Size != n.Columns[0].Size {
			return wrong
		}
	}
	if s := n.Partial; s != nil && (s.Size < 0 || s.Size > of.sizeOf(len(n.Whole)) || int64(len(s.CRC32C)) != s.Size/checkedBlock) {
		return wrong
	}
	return nil
}

// keep notes how far it has come.
func (w *output) keep() error {
	b, err := json.Marshal(w.note)
	if err != nil {
		return err
	}
	return w.replace(w.notePath(), b)
}

// replace writes a small file. What an attempt that was killed has left of it has the same name as the next one's, so that there is never more than one.
func (w *output) replace(path string, b []byte) error {
	temp := path + ".partial"
	if err := w.fsys.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Replace(w.fsys, temp, path, b, filePerm)
}

// volumes writes the stream.
func (w *output) volumes(ctx context.Context, open Opener) error {
	// What was whole and isn't there any more is written again, with what comes behind it.
	for i := range w.note.Whole {
		fi, err := os.Lstat(w.path(i))
		if err == nil && fi.Mode().IsRegular() && fi.Size() == w.note.Whole[i].Size {
			continue
		}
		// It was noted as whole, and not renamed any more.
		if part, err := os.Lstat(w.path(i) + ".partial"); err == nil && part.Mode().IsRegular() && part.Size() == w.note.Whole[i].Size {
			if err := w.name(i); err != nil {
				return err
			}
			continue
		}
		w.note.Whole, w.note.Partial, w.note.Columns = w.note.Whole[:i], nil, nil
		break
	}
	at := int64(len(w.note.Whole)) * w.VolumeSize
	if at >= w.b.size {
		return nil
	}
	if w.note.Partial != nil {
		if fi, err := os.Lstat(w.path(len(w.note.Whole)) + ".partial"); err != nil || !fi.Mode().IsRegular() || fi.Size() < w.note.Partial.Size {
			w.note.Partial = nil
		} else {
			at += w.note.Partial.Size
		}
	}
	stream, err := w.b.Stream(ctx, at, open)
	if err != nil {
		return err
	}
	defer stream.Close()
	buffer := make([]byte, min(copyBuffer, w.NoteEvery))
	for i := len(w.note.Whole); at < w.b.size; i++ {
		end := min(int64(i+1)*w.VolumeSize, w.b.size)
		if err := w.volume(i, stream, &at, end, buffer); err != nil {
			return fmt.Errorf("writing %s: %w", w.path(i), err)
		}
	}
	return nil
}

// volume writes one volume, or the rest of it.
func (w *output) volume(i int, stream io.Reader, at *int64, end int64, buffer []byte) (err error) {
	f, err := w.open(w.path(i)+".partial", w.note.Partial)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for noted := f.size; *at < end; {
		n, err := io.ReadFull(stream, buffer[:min(int64(len(buffer)), end-*at)])
		if err != nil {
			return err
		}
		if _, err := f.Write(buffer[:n]); err != nil {
			return err
		}
		*at += int64(n)
		w.Progress(*at, w.b.size)
		if f.size-noted < w.NoteEvery || *at == end {
			continue
		}
		noted = f.size
		if err := f.Sync(); err != nil {
			return err
		}
		s, err := f.state()
		if err != nil {
			return err
		}
		w.note.Partial = &s
		if err := w.keep(); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	w.note.Whole, w.note.Partial = append(w.note.Whole, f.volume()), nil
	if err := w.keep(); err != nil {
		return err
	}
	return w.name(i)
}

// name gives a whole volume its name.
func (w *output) name(i int) error {
	if err := w.fsys.Rename(w.path(i)+".partial", w.path(i)); err != nil {
		return err
	}
	return w.fsys.SyncDir(filepath.Dir(w.Path))
}

// open opens a file to write, or to go on writing from where it was noted.
func (w *output) open(path string, from *state) (*file, error) {
	f := &file{sum: sha256.New()}
	var err error
	f.File, err = w.fsys.OpenFile(path)
	if errors.Is(err, fs.ErrNotExist) && from == nil {
		f.File, err = w.fsys.Create(path, filePerm)
	}
	if err != nil {
		return nil, err
	}
	if from != nil {
		f.size, f.crcs, f.last = from.Size, from.CRC32C, from.Last
		err = f.sum.(encoding.BinaryUnmarshaler).UnmarshalBinary(from.SHA256)
	}
	if err == nil {
		err = f.Truncate(f.size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// parity writes the parity volumes, each with the table at its end, and completes the table.
func (w *output) parity(ctx context.Context, table *Table) (err error) {
	if w.Parity == 0 {
		return nil
	}
	coder, err := reedsolomon.New(len(table.Volumes), w.Parity)
	if err != nil {
		return err
	}
	v := &Volumes{bundle: filepath.Base(w.Path), table: table, told: make(map[string]int), lost: make(map[string]bool)}
	defer v.Close()
	for i := range table.Volumes {
		f, _, err := openRegular(w.path(i))
		if err != nil {
			return err
		}
		v.files = append(v.files, f)
	}
	columns, err := w.columns()
	defer func() {
		for _, f := range columns {
			err = errors.Join(err, f.Close())
		}
	}()
	if err != nil {
		return err
	}
	if err := w.encode(ctx, coder, v, columns); err != nil {
		return err
	}
	for _, f := range columns {
		table.Parity = append(table.Parity, f.volume())
	}
	encoded, err := table.encode()
	if err != nil {
		return err
	}
	for i, f := range columns {
		if _, err := f.WriteAt(parityEnd(encoded), f.size); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if err := w.fsys.Rename(w.parityPath(i)+".partial", w.parityPath(i)); err != nil {
			return err
		}
	}
	return w.fsys.SyncDir(filepath.Dir(w.Path))
}

func (w *output) parityPath(i int) string { return ParityFile(w.Path, i) }

// columns opens the parity volumes, to go on with where that is possible with all of them.
func (w *output) columns() ([]*file, error) {
	from := w.note.Columns
	for i := range from {
		if fi, err := os.Lstat(w.parityPath(i) + ".partial"); err != nil || !fi.Mode().IsRegular() || fi.Size() < from[i].Size {
			from = nil
			break
		}
	}
	var columns []*file
	for i := range w.Parity {
		var s *state
		if from != nil {
			s = &from[i]
		}
		f, err := w.open(w.parityPath(i)+".partial", s)
		if err != nil {
			return columns, err
		}
		columns = append(columns, f)
	}
	return columns, nil
}

// encode fills the parity volumes, block by block.
func (w *output) encode(ctx context.Context, coder reedsolomon.Encoder, v *Volumes, columns []*file) error {
	shards := make([][]byte, len(v.files)+len(columns))
	rooms := make([][]byte, len(shards))
	for i := range rooms {
		rooms[i] = make([]byte, checkedBlock)
	}
	noted := columns[0].size
	for at := columns[0].size; at < v.table.sizeOf(0); at += checkedBlock {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		size := min(checkedBlock, v.table.sizeOf(0)-at)
		for i := range shards {
			shards[i] = rooms[i][:size]
			has := 0
			if i < len(v.files) && at < v.table.Volumes[i].Size {
				b, err := v.blockOf(v.files, v.table.Volumes, i, at/checkedBlock, rooms[i])
				if err != nil {
					return fmt.Errorf("%s was changed after it was written: %w", w.path(i), err)
				}
				has = len(b)
			}
			clear(shards[i][has:])
		}
		if err := coder.Encode(shards); err != nil {
			return err
		}
		for i, f := range columns {
			if _, err := f.Write(shards[len(v.files)+i]); err != nil {
				return err
			}
		}
		if columns[0].size-noted >= w.NoteEvery && size == checkedBlock {
			noted = columns[0].size
			if err := w.keepColumns(columns); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *output) keepColumns(columns []*file) error {
	w.note.Columns = nil
	for _, f := range columns {
		if err := f.Sync(); err != nil {
			return err
		}
		s, err := f.state()
		if err != nil {
			return err
		}
		w.note.Columns = append(w.note.Columns, s)
	}
	return w.keep()
}
