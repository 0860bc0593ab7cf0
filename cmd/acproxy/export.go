package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/warm"
)

// signerFile is where the key lies that signs bundles and receipts, under the data directory.
const signerFile = "bundle.key"

// withParts runs a command on the open parts of a data directory that no server has open.
func (o *options) withParts(do func(p *parts) error) error {
	cfg, err := o.load()
	if err != nil {
		return err
	}
	if _, err := admin.Dial(cfg.Admin.Socket); err == nil {
		return &acproxy.Error{
			Kind: acproxy.ErrBusy, Code: "store-in-use",
			Detail: fmt.Sprintf("a server runs on %s and holds its store: stop it, run this again, and start it", cfg.DataDir),
		}
	} else if !errors.Is(err, acproxy.ErrNotFound) {
		return err
	}
	p, err := newParts(cfg, slog.New(slog.DiscardHandler), true)
	if err != nil {
		return err
	}
	return errors.Join(do(p), p.close())
}

// origin returns what bundles are written from.
func (p *parts) origin() airgap.Store {
	return airgap.Store{Disk: p.store, Judge: p.fetcher.Judged, Keyring: p.keys.Current}
}

// signer returns what signs for this data directory. The key is made when it is asked for first.
func signer(cfg *config.Config) (*bundle.Signer, error) {
	if err := os.MkdirAll(cfg.DataDir, 0o750); err != nil {
		return nil, err
	}
	name, err := os.Hostname()
	if err != nil {
		name = "acproxy"
	}
	return bundle.LoadSigner(filepath.Join(cfg.DataDir, signerFile), "acproxy@"+name)
}

// exporting is one run of acproxy export.
type exporting struct {
	cmd    *cobra.Command
	to     string
	format string

	refs     []string
	list     string
	prefixes []string
	pinned   bool
	all      bool
	alone    bool

	since      string
	signers    []string
	unsigned   bool
	volumeSize string
	parity     int
	dryRun     bool
	asJSON     bool
}

const (
	formatBundle = "bundle"
	formatSite   = "site"
)

func newExport(o *options) *cobra.Command {
	e := new(exporting)
	cmd := &cobra.Command{
		Use:   "export DESTINATION [IMAGE…]",
		Short: "Write images into a bundle, to be carried where no network goes",
		Long: `export writes images into a bundle: the exact bytes, their signatures, the keys that made them, what discovery knows of their names, and the images
that they depend on. acproxy import takes it in on the other side, which believes nothing of it: its own keys and policies decide.

DESTINATION is a file, or - for standard output. With --volume-size it is what the names of several files begin with: DESTINATION.001 and so on, and
DESTINATION.volumes. With --parity as many of them may get lost or damaged. The same images give the same bytes. An export that was interrupted goes on
where it was when it is run again.

IMAGE is a name with labels, as name[:version][,label=value…]. It stands for the image that it answers here, else for all held images that it fits.

With --format=site DESTINATION is a directory, and what is written is a tree for any web server: discovery pages, images, signatures and keys, with a directory
for each host.

The exit code is 3 if something that was asked for could not be carried; the rest is written.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			e.cmd, e.to, e.refs = cmd, args[0], args[1:]
			if err := e.check(); err != nil {
				return err
			}
			return o.withCarriage(cmd.Context(), e.run)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&e.list, "list", "", "file with a list of images, as acproxy warm takes it, - for standard input")
	flags.StringArrayVar(&e.prefixes, "prefix", nil, "all images whose name lies under this prefix; may be given more than once")
	flags.BoolVar(&e.pinned, "pinned", false, "all images that are pinned")
	flags.BoolVar(&e.all, "all", false, "all images")
	flags.BoolVar(&e.alone, "no-dependencies", false, "leave out the images that the chosen ones depend on")
	flags.StringVar(&e.since, "since", "", "bundle or receipt of what the other side has: that is left out")
	flags.StringArrayVar(&e.signers, "signer", nil, "key, as acproxy export key prints it, that has to have signed the receipt or bundle of --since")
	flags.BoolVar(&e.unsigned, "unsigned", false, "don't sign the bundle")
	flags.StringVar(&e.volumeSize, "volume-size", "", "size of the volumes, such as 4GiB (default: one file)")
	flags.IntVar(&e.parity, "parity", 0, "number of volumes that may get lost or damaged")
	flags.StringVar(&e.format, "format", formatBundle, "what is written: bundle, or site for a tree that any web server can serve")
	flags.BoolVar(&e.dryRun, "dry-run", false, "write nothing, and say what would be written")
	flags.BoolVar(&e.asJSON, "json", false, "print one JSON object per line: each image, what is lacking, then the sum")
	cmd.AddCommand(newExportKey(o))
	return cmd
}

func newExportKey(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "key",
		Short: "Show the key with which this acproxy signs bundles and receipts",
		Long: `key prints the public key, for --signer on the other side. It is made when it is asked for first. What it signs says where something comes from; whether an
image is acceptable is decided by OpenPGP keys alone.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			s, err := signer(cfg)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), s.Verifier())
			return err
		},
	}
}

// check returns what is wrong with the command line.
func (e *exporting) check() error {
	chosen := len(e.refs) > 0 || e.list != "" || len(e.prefixes) > 0 || e.pinned || e.all
	switch {
	case !chosen:
		return usagef("which images? Name them, or choose by --list, --prefix, --pinned or --all")
	case e.format != formatBundle && e.format != formatSite:
		return usagef("--format is %s or %s, not %q", formatBundle, formatSite, e.format)
	case e.format == formatSite && (e.to == "-" || e.since != "" || e.volumeSize != "" || e.parity != 0):
		return usagef("a site is a directory: --since, --volume-size and --parity are for bundles")
	case e.to == "-" && (e.volumeSize != "" || e.parity != 0):
		return usagef("standard output takes no volumes")
	case e.to == "-" && e.asJSON:
		return usagef("--json prints to standard output, and so would the bundle")
	case e.parity < 0:
		return usagef("--parity %d is less than nothing", e.parity)
	case e.parity > 0 && e.volumeSize == "":
		return usagef("--parity needs --volume-size: it is volumes that it rebuilds")
	case len(e.signers) > 0 && e.since == "":
		return usagef("--signer is for what --since names")
	}
	for _, prefix := range e.prefixes {
		if err := acproxy.CheckName(prefix); err != nil {
			return usagef("--prefix: %w", err)
		}
	}
	return nil
}

// choice returns what is to be carried.
func (e *exporting) choice() (airgap.Choice, error) {
	c := airgap.Choice{Prefixes: e.prefixes, Pinned: e.pinned, All: e.all, Alone: e.alone}
	for _, text := range e.refs {
		ref, err := acproxy.ParseRef(text)
		if err != nil {
			return c, usagef("%w", err)
		}
		c.Refs = append(c.Refs, ref)
	}
	if e.list != "" {
		refs, err := readList(e.list, e.cmd.InOrStdin())
		if err != nil {
			return c, err
		}
		c.Refs = append(c.Refs, refs...)
	}
	return c, nil
}

// leave leaves out of a cargo what the other side has.
func (e *exporting) leave(cargo *airgap.Cargo) error {
	if e.since == "" {
		return nil
	}
	held, id, err := readSince(e.since, e.signers)
	if err != nil {
		return fmt.Errorf("--since %s: %w", e.since, err)
	}
	cargo.Leave(held, id)
	return nil
}

// readList reads a list of images, as acproxy warm takes it. What it says beside the images is for that alone.
func readList(file string, stdin io.Reader) ([]acproxy.Ref, error) {
	read := warm.ReadFile
	if file == "-" {
		read = func(string) (warm.List, error) { return warm.ReadList(stdin, "standard input") }
	}
	list, err := read(file)
	if err != nil {
		return nil, err
	}
	images, err := list.Images()
	if err != nil {
		return nil, err
	}
	var refs []acproxy.Ref
	for _, e := range images {
		ref, err := acproxy.ParseRef(e.Image)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Where, err)
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// readSince reads what the other side has.
func readSince(path string, signers []string) (held map[acproxy.Digest]acproxy.Digest, id acproxy.Digest, err error) {
	held = make(map[acproxy.Digest]acproxy.Digest)
	if f, err := os.Open(path); err == nil {
		defer f.Close()
		in := bufio.NewReader(f)
		if beginning, _ := in.Peek(64); bundle.IsReceipt(beginning) {
			r, err := bundle.ReadReceipt(in, signers)
			if err != nil {
				return nil, id, err
			}
			for _, im := range r.Images {
				held[im.Digest] = im.Signature
			}
			return held, r.Digest, nil
		}
	}
	v, err := bundle.OpenVolumes(filepath.Base(bundleName(path)), filepath.Dir(path))
	if err != nil {
		return nil, id, err
	}
	defer v.Close()
	r, err := bundle.NewReader(v, signers)
	if err != nil {
		return nil, id, err
	}
	for _, im := range r.Index.Images {
		held[im.Digest] = acproxy.Digest{}
		if im.Signature != nil {
			held[im.Digest] = im.Signature.Digest
		}
	}
	return held, r.ID, nil
}

func (e *exporting) run(from *carriage) error {
	ctx := e.cmd.Context()
	choice, err := e.choice()
	if err != nil {
		return err
	}
	cargo, err := from.choose(ctx, choice)
	if err != nil {
		return err
	}
	if err := e.leave(cargo); err != nil {
		return err
	}
	// What goes to standard output must not be mixed with words.
	out := &exportReport{w: e.cmd.OutOrStdout()}
	if e.to == "-" {
		out.w = e.cmd.ErrOrStderr()
	}
	if e.asJSON {
		out.enc = json.NewEncoder(out.w)
	}
	out.lacks(cargo.Lacks)
	if len(cargo.Index.Images) == 0 {
		return errors.Join(errors.New("there is nothing to export"), out.err)
	}
	began := time.Now()
	sum := exported{Format: e.format, To: e.to, DryRun: e.dryRun, Lacking: len(cargo.Lacks)}
	sum.count(cargo.Index)
	switch {
	case e.format == formatSite:
		err = e.site(ctx, cargo, out, &sum)
	default:
		err = e.bundle(ctx, from.cfg, cargo, out, &sum)
	}
	if err != nil {
		return err
	}
	sum.Took = time.Since(began)
	out.sum(sum)
	if out.err == nil && slices.ContainsFunc(cargo.Lacks, func(l airgap.Lack) bool { return !l.Note }) {
		return partly(errors.New("not everything that was asked for could be carried"))
	}
	return out.err
}

// bundle writes a bundle.
func (e *exporting) bundle(ctx context.Context, cfg *config.Config, cargo *airgap.Cargo, out *exportReport, sum *exported) error {
	var by *bundle.Signer
	if !e.unsigned {
		var err error
		if by, err = signer(cfg); err != nil {
			return err
		}
		sum.Signer = by.Verifier()
	}
	b, err := bundle.New(cargo.Index, by)
	if err != nil {
		return err
	}
	id := b.ID()
	sum.Bundle, sum.Size = &id, b.Size()
	target := bundle.Output{Path: e.to, Parity: e.parity}
	if e.volumeSize != "" {
		size, err := config.ParseSize(e.volumeSize)
		if err != nil || size == 0 {
			return usagef("--volume-size: %q is no size such as 4GiB", e.volumeSize)
		}
		target.VolumeSize = int64(size)
		sum.Volumes, sum.Parity = int((b.Size()-1)/int64(size)+1), e.parity
	}
	if err := target.Check(b); err != nil {
		return err
	}
	out.images(cargo.Index)
	if e.dryRun {
		return nil
	}
	bar := newProgress(e.cmd.ErrOrStderr(), "exporting")
	defer bar.end()
	target.Progress = bar.set
	if e.to == "-" {
		stream, err := b.Stream(ctx, 0, cargo.Open)
		if err != nil {
			return err
		}
		_, err = io.Copy(e.cmd.OutOrStdout(), &told{Reader: stream, of: b.Size(), bar: bar})
		return errors.Join(err, stream.Close())
	}
	err = target.Write(ctx, b, cargo.Open)
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("it was ended; run again it goes on where it was")
	}
	return err
}

// site writes a tree for a web server.
func (e *exporting) site(ctx context.Context, cargo *airgap.Cargo, out *exportReport, sum *exported) error {
	out.images(cargo.Index)
	if e.dryRun {
		return nil
	}
	bar := newProgress(e.cmd.ErrOrStderr(), "writing the site")
	defer bar.end()
	s := airgap.Site{Dir: e.to, Progress: bar.set}
	skipped, err := s.Write(ctx, cargo)
	for _, l := range skipped {
		cargo.Lacks = append(cargo.Lacks, l)
		sum.Lacking++
	}
	out.lacks(skipped)
	return err
}

// told shows how far a stream has been read.
type told struct {
	io.Reader
	n, of int64
	bar   *progress
}

// Read implements io.Reader.
func (t *told) Read(b []byte) (int, error) {
	n, err := t.Reader.Read(b)
	t.n += int64(n)
	t.bar.set(t.n, t.of)
	return n, err
}

// exported is what an export came to.
type exported struct {
	Format  string          `json:"format"`
	To      string          `json:"to"`
	DryRun  bool            `json:"dryRun,omitempty"`
	Bundle  *acproxy.Digest `json:"bundle,omitempty"`
	Signer  string          `json:"signer,omitempty"`
	Images  int             `json:"images"`  // that are carried
	Absent  int             `json:"absent"`  // that the other side has
	Bytes   int64           `json:"bytes"`   // of the images that are carried
	Size    int64           `json:"size"`    // of the bundle
	Volumes int             `json:"volumes"` // 0 is one file
	Parity  int             `json:"parity"`
	Lacking int             `json:"lacking"`
	Took    time.Duration   `json:"took"` // nanoseconds
}

func (s *exported) count(x *bundle.Index) {
	for _, im := range x.Images {
		if im.Absent {
			s.Absent++
			continue
		}
		s.Images++
		s.Bytes += im.Size
	}
}

// exportReport prints what is exported.
type exportReport struct {
	w   io.Writer
	enc *json.Encoder // nil if it is for people
	err error
}

func (r *exportReport) print(value any, format string, args ...any) {
	switch {
	case r.err != nil:
	case r.enc != nil:
		r.err = r.enc.Encode(value)
	default:
		_, r.err = fmt.Fprintf(r.w, format, args...)
	}
}

func (r *exportReport) lacks(lacks []airgap.Lack) {
	for _, l := range lacks {
		word := "lacking"
		if l.Note {
			word = "note"
		}
		r.print(map[string]airgap.Lack{word: l}, "%-8s %v\n", word, l)
	}
}

func (r *exportReport) images(x *bundle.Index) {
	for _, im := range x.Images {
		word := "carried"
		if im.Absent {
			word = "absent"
		}
		r.print(map[string]bundle.Image{word: im}, "%-8s %v  %s  %s\n", word, im.Ref(), im.ImageID.Short(), bytesText(im.Size))
	}
}

func (r *exportReport) sum(s exported) {
	text := fmt.Sprintf("%s, %s", count(s.Images, "image"), bytesText(s.Bytes))
	if s.Absent > 0 {
		text += fmt.Sprintf("; %d more that the other side has", s.Absent)
	}
	if s.Volumes > 0 {
		text += fmt.Sprintf("; %s", count(s.Volumes, "volume"))
		if s.Parity > 0 {
			text += fmt.Sprintf(" and %d of parity", s.Parity)
		}
	}
	if s.Bundle != nil {
		text += fmt.Sprintf("\nbundle   %v", *s.Bundle)
		if s.Signer != "" {
			text += "\nsigner   " + s.Signer
		}
	}
	verb := "written"
	if s.DryRun {
		verb = "would be"
	}
	r.print(s, "%-8s %s\n", verb, text)
}
