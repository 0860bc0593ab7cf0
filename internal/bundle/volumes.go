package bundle

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/reedsolomon"

	"github.com/acproxy/acproxy/internal/durable"
)

// A Problem is something that is wrong with a file of a bundle.
type Problem struct {
	File    string `json:"file"`
	Problem string `json:"problem"`
	Rebuilt bool   `json:"rebuilt,omitempty"` // what it concerns was had all the same, from the parity volumes
}

// String returns it on one line.
func (p Problem) String() string {
	if p.Rebuilt {
		return p.File + ": " + p.Problem + "; rebuilt from parity"
	}
	return p.File + ": " + p.Problem
}

// Volumes is a [Source] of files: one with the whole stream, or volumes of it. What is damaged or missing is rebuilt from parity volumes as it is read, if
// there is enough of them. Without the table of the volumes damage can't be told, and nothing be rebuilt.
type Volumes struct {
	bundle string // the path that the names of the files begin with, with the first directory
	dirs   []string
	table  *Table // nil if there is none
	size   int64
	volume int64 // bytes of each volume but the last

	files  []*os.File // nil where there is none that is usable
	parity []*os.File

	at       int64
	block    []byte // that at is in
	room     []byte // for a block
	blockAt  int64  // where block begins, -1 if there is none
	blockErr error

	problems []Problem
	told     map[string]int // of a file, where in problems it is
	coder    reedsolomon.Encoder
	shards   [][]byte        // room for a block of each volume and parity volume
	lost     map[string]bool // files of which something could not be rebuilt
}

// OpenVolumes opens the files of a bundle, which begin with a name and lie in one of some directories. Close closes them.
func OpenVolumes(name string, dirs ...string) (*Volumes, error) {
	v := &Volumes{bundle: name, dirs: dirs, blockAt: -1, told: make(map[string]int), lost: make(map[string]bool)}
	if err := v.find(); err != nil {
		v.Close()
		return nil, err
	}
	return v, nil
}

// Name returns the name that the files begin with.
func (v *Volumes) Name() string { return v.bundle }

// Table returns the table of the volumes, nil if there is none.
func (v *Volumes) Table() *Table { return v.table }

// Problems returns what was found to be wrong with the files so far.
func (v *Volumes) Problems() []Problem { return slices.Clone(v.problems) }

// Size returns how many bytes there are, as far as can be told without reading.
func (v *Volumes) Size() int64 { return v.size }

// Close closes the files.
func (v *Volumes) Close() {
	for _, f := range slices.Concat(v.files, v.parity) {
		if f != nil {
			_ = f.Close() // it was only read
		}
	}
	v.files, v.parity = nil, nil
}

func (v *Volumes) find() error {
	if f, size, err := v.open(v.bundle); err == nil {
		v.files, v.size, v.volume = []*os.File{f}, size, size
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parity := v.findTable()
	if v.table == nil {
		for _, f := range parity {
			_ = f.Close() // it was only read
		}
		return v.guess()
	}
	v.size, v.volume = v.table.Size, v.table.VolumeSize
	for i, want := range v.table.Volumes {
		v.files = append(v.files, v.openVolume(VolumeFile(v.bundle, i), want.Size))
	}
	for i := range v.table.Parity {
		v.parity = append(v.parity, parity[ParityFile(v.bundle, i)])
	}
	return nil
}

// openVolume opens a volume, nil if it isn't there. One of another size is read as far as it goes.
func (v *Volumes) openVolume(name string, size int64) *os.File {
	f, has, err := v.open(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		v.problem(name, "it is missing")
	case err != nil:
		v.problem(name, err.Error())
	case has != size:
		v.problem(name, fmt.Sprintf("it has %d bytes, and should have %d", has, size))
	}
	return f
}

// open opens a file that has to be a regular one: media bring links and devices along.
func (v *Volumes) open(name string) (*os.File, int64, error) {
	for _, dir := range v.dirs {
		f, size, err := openRegular(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return f, size, err
	}
	return nil, 0, fmt.Errorf("%s: %w in %s", name, fs.ErrNotExist, strings.Join(v.dirs, ", "))
}

func openRegular(path string) (*os.File, int64, error) {
	before, err := os.Lstat(path)
	if err != nil {
		return nil, 0, err
	}
	if !before.Mode().IsRegular() {
		return nil, 0, failure(CodeNotBundle, "%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	after, err := f.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = fmt.Errorf("%s was replaced while it was opened", path)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, after.Size(), nil
}

// findTable finds the table in its file, or in the parity volumes, and opens those that go with it.
func (v *Volumes) findTable() map[string]*os.File {
	own, err := v.readTable()
	if err != nil {
		v.problem(TableFile(v.bundle), err.Error())
	}
	v.table = own
	parity := make(map[string]*os.File)
	tables := make(map[string]*Table)
	votes := make(map[string]int)
	encoded := func(t *Table) string {
		b, _ := t.encode() // what was decoded can be encoded
		return string(b)
	}
	for i := range MaxShards {
		name := ParityFile(v.bundle, i)
		f, size, err := v.open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			v.problem(name, err.Error())
			continue
		}
		parity[name] = f
		t, err := parityTable(f, size)
		if err != nil {
			// Its payload may be whole: the blocks are checked.
			v.problem(name, err.Error())
			continue
		}
		tables[name] = t
		votes[encoded(t)]++
	}
	if v.table == nil {
		for _, t := range tables {
			if v.table == nil || votes[encoded(t)] > votes[encoded(v.table)] {
				v.table = t
			}
		}
	}
	if v.table == nil {
		return parity
	}
	for name, t := range tables {
		if t.Bundle != v.table.Bundle {
			v.problem(name, fmt.Sprintf("it belongs to another bundle, %v", t.Bundle))
			_ = parity[name].Close() // it was only read
			delete(parity, name)
		}
	}
	for i := range v.table.Parity {
		if name := ParityFile(v.bundle, i); parity[name] == nil && v.told[name] == 0 {
			v.problem(name, "it is missing")
		}
	}
	for name, f := range parity {
		if !slices.ContainsFunc(seq(len(v.table.Parity)), func(i int) bool { return ParityFile(v.bundle, i) == name }) {
			v.problem(name, "the bundle has no such volume")
			_ = f.Close() // it was only read
			delete(parity, name)
		}
	}
	return parity
}

func seq(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

func (v *Volumes) readTable() (*Table, error) {
	f, size, err := v.open(TableFile(v.bundle))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("it is missing")
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > maxTable {
		return nil, failure(CodeTooLarge, "it has %d bytes, more than the %d of any table", size, maxTable)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxTable))
	if err != nil {
		return nil, err
	}
	return parseTable(b)
}

// guess opens the volumes that there are when nothing says how many there should be. The first one is as long as the others.
func (v *Volumes) guess() error {
	for i := range MaxVolumes {
		f, size, err := v.open(VolumeFile(v.bundle, i))
		if err != nil && i == 0 {
			if errors.Is(err, fs.ErrNotExist) {
				err = failure(CodeNotBundle, "there is no bundle %s in %s: neither a file of this name, nor %s with the table %s", v.bundle, strings.Join(v.dirs, ", "), VolumeFile(v.bundle, 0), TableFile(v.bundle))
			}
			return err
		}
		if i == 0 {
			v.volume = size
		}
		if err != nil {
			f = nil
		} else {
			v.size = int64(i)*v.volume + size
		}
		v.files = append(v.files, f)
	}
	for len(v.files) > 0 && v.files[len(v.files)-1] == nil {
		v.files = v.files[:len(v.files)-1]
	}
	if v.volume == 0 {
		return failure(CodeIncomplete, "%s is empty", VolumeFile(v.bundle, 0))
	}
	for i, f := range v.files {
		if f == nil {
			v.problem(VolumeFile(v.bundle, i), "it is missing")
		}
	}
	return nil
}

// problem notes what is wrong with a file, once.
func (v *Volumes) problem(file, what string) {
	if v.told[file] == 0 {
		v.problems = append(v.problems, Problem{File: file, Problem: what})
		v.told[file] = len(v.problems)
	}
}

// Skip implements [Source].
func (v *Volumes) Skip(to int64) error {
	if to < v.at {
		return fmt.Errorf("cannot happen: byte %d of a bundle was read already, at %d", to, v.at)
	}
	if to > v.size {
		v.at = v.size
		return io.EOF
	}
	v.at = to
	return nil
}

// Read implements io.Reader.
func (v *Volumes) Read(b []byte) (int, error) {
	if v.at >= v.size {
		return 0, io.EOF
	}
	i := v.at / v.volume
	if v.table == nil {
		return v.readUnchecked(int(i), b)
	}
	in := v.at - i*v.volume
	if begin := i*v.volume + in/checkedBlock*checkedBlock; begin != v.blockAt {
		v.blockAt = begin
		v.block, v.blockErr = v.load(int(i), in/checkedBlock)
	}
	if v.blockErr != nil {
		return 0, v.blockErr
	}
	n := copy(b, v.block[v.at-v.blockAt:])
	v.at += int64(n)
	return n, nil
}

// readUnchecked reads from a volume of which nobody knows what it should hold.
func (v *Volumes) readUnchecked(i int, b []byte) (int, error) {
	file := VolumeFile(v.bundle, i)
	in := v.at - int64(i)*v.volume
	b = b[:min(int64(len(b)), v.volume-in, v.size-v.at)]
	if v.files[i] == nil {
		return 0, failure(CodeIncomplete, "%s is missing, with byte %d of the bundle", file, v.at)
	}
	n, err := v.files[i].ReadAt(b, in)
	v.at += int64(n)
	switch {
	case n > 0:
		return n, nil
	case err == io.EOF:
		return 0, failure(CodeIncomplete, "%s ends after %d bytes", file, in)
	}
	return 0, err
}

// load returns a block of a volume: as it is there, or rebuilt.
func (v *Volumes) load(i int, block int64) ([]byte, error) {
	if v.room == nil {
		v.room = make([]byte, checkedBlock)
	}
	b, err := v.blockOf(v.files, v.table.Volumes, i, block, v.room)
	if err == nil {
		return b, nil
	}
	file := VolumeFile(v.bundle, i)
	v.problem(file, err.Error())
	at := &v.problems[v.told[file]-1]
	b, failed := v.rebuild(i, block)
	if failed != nil {
		at.Rebuilt, v.lost[file] = false, true
		return nil, failure(codeOf(v.files[i]), "%s, with byte %d of the bundle, can't be used: %v; %v", file, int64(i)*v.volume+block*checkedBlock, err, failed)
	}
	at.Rebuilt = !v.lost[file]
	return b, nil
}

func codeOf(f *os.File) string {
	if f == nil {
		return CodeIncomplete
	}
	return CodeDamaged
}

// blockOf reads one block of one file into b, and checks it.
func (v *Volumes) blockOf(files []*os.File, are []Volume, i int, block int64, b []byte) ([]byte, error) {
	if files[i] == nil {
		return nil, errors.New("it is missing")
	}
	at := block * checkedBlock
	b = b[:min(checkedBlock, are[i].Size-at)]
	if n, err := files[i].ReadAt(b, at); n < len(b) {
		if err == io.EOF {
			err = fmt.Errorf("it ends after %d bytes of %d", at+int64(n), are[i].Size)
		}
		return nil, err
	}
	if crc32.Checksum(b, castagnoli()) != are[i].CRC32C[block] {
		return nil, fmt.Errorf("bytes %d to %d are not what they were, or it is of another bundle", at, at+int64(len(b)))
	}
	return b, nil
}

// rebuild returns a block of a volume from the same block of the others and of the parity volumes.
func (v *Volumes) rebuild(i int, block int64) ([]byte, error) {
	volumes, parity := len(v.table.Volumes), len(v.table.Parity)
	if parity == 0 {
		return nil, errors.New("there are no parity volumes to rebuild it from")
	}
	if v.coder == nil {
		var err error
		if v.coder, err = reedsolomon.New(volumes, parity); err != nil {
			return nil, err
		}
	}
	if v.shards == nil {
		v.shards = make([][]byte, volumes+parity)
	}
	size := min(checkedBlock, v.table.sizeOf(0)-block*checkedBlock)
	shards := make([][]byte, volumes+parity)
	good := 0
	for j := 0; j < len(shards) && good < volumes; j++ {
		if j == i {
			continue
		}
		files, are, k := v.files, v.table.Volumes, j
		if j >= volumes {
			files, are, k = v.parity, v.table.Parity, j-volumes
		}
		if v.shards[j] == nil {
			v.shards[j] = make([]byte, checkedBlock)
		}
		has := int64(0)
		// The last volume is shorter: zeros stand for what it lacks.
		if block*checkedBlock < are[k].Size {
			b, err := v.blockOf(files, are, k, block, v.shards[j])
			if err != nil {
				continue
			}
			has = int64(len(b))
		}
		shards[j] = v.shards[j][:size]
		clear(shards[j][has:])
		good++
	}
	if good < volumes {
		return nil, fmt.Errorf("%d volumes are needed to rebuild it, those of parity included, and %d can be used", volumes, good)
	}
	required := make([]bool, volumes+parity)
	required[i] = true
	if err := v.coder.ReconstructSome(shards, required); err != nil {
		return nil, err
	}
	b := shards[i][:min(checkedBlock, v.table.Volumes[i].Size-block*checkedBlock)]
	if crc32.Checksum(b, castagnoli()) != v.table.Volumes[i].CRC32C[block] {
		return nil, errors.New("what the other volumes give isn't what it was either")
	}
	return b, nil
}

// Repair writes the volumes anew that are missing or damaged, into a directory, and returns their names. Parity volumes are not repaired: they are not needed
// then.
func (v *Volumes) Repair(dir string) (repaired []string, err error) {
	if v.table == nil {
		return nil, failure(CodeIncomplete, "there is no table of the volumes, by which they could be repaired")
	}
	for i, want := range v.table.Volumes {
		whole, err := v.intact(i)
		if err != nil {
			return repaired, err
		}
		if whole {
			continue
		}
		if err := v.repair(dir, i, want); err != nil {
			return repaired, err
		}
		repaired = append(repaired, VolumeFile(v.bundle, i))
	}
	return repaired, nil
}

// intact reads a volume.
func (v *Volumes) intact(i int) (bool, error) {
	want := v.table.Volumes[i]
	if f := v.files[i]; f != nil {
		fi, err := f.Stat()
		if err != nil {
			return false, err
		}
		if fi.Size() != want.Size {
			return false, nil
		}
	}
	room := make([]byte, checkedBlock)
	for block := range want.CRC32C {
		if _, err := v.blockOf(v.files, v.table.Volumes, i, int64(block), room); err != nil {
			v.problem(VolumeFile(v.bundle, i), err.Error())
			return false, nil
		}
	}
	return true, nil
}

func (v *Volumes) repair(dir string, i int, want Volume) (err error) {
	name := VolumeFile(v.bundle, i)
	path := filepath.Join(dir, name)
	temp := path + ".repair"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fsys := durable.OS{}
	out, err := fsys.Create(temp, filePerm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// The first error is the one to tell.
			_ = out.Close()
			_ = fsys.Remove(temp)
		}
	}()
	sum := sha256.New()
	for block := range want.CRC32C {
		b, err := v.load(i, int64(block))
		if err != nil {
			return err
		}
		sum.Write(b)
		if _, err := out.Write(b); err != nil {
			return err
		}
	}
	v.blockAt = -1
	if [sha256.Size]byte(sum.Sum(nil)) != want.Digest {
		return failure(CodeDamaged, "%s, rebuilt, is not what it was", name)
	}
	if err := errors.Join(out.Sync(), out.Close()); err != nil {
		return err
	}
	if err := errors.Join(fsys.Rename(temp, path), fsys.SyncDir(dir)); err != nil {
		return err
	}
	fresh, _, err := openRegular(path)
	if err != nil {
		return err
	}
	if v.files[i] != nil {
		_ = v.files[i].Close() // it was only read
	}
	v.files[i] = fresh
	v.problem(name, "it was damaged")
	v.problems[v.told[name]-1].Rebuilt = true
	return nil
}
