package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/trust"
)

// importing is one run of acproxy import.
type importing struct {
	cmd     *cobra.Command
	o       *options
	to      *carriage
	intake  airgap.Intake
	signers []string
	keysTo  string
	receipt string
	repair  bool
	watch   string
	settle  time.Duration
	remove  bool
	asJSON  bool

	out  io.Writer
	enc  *json.Encoder // nil if it is for people
	err  error         // of printing
	last bundle.Receipt
}

func newImport(o *options) *cobra.Command {
	i := new(importing)
	cmd := &cobra.Command{
		Use:   "import BUNDLE…",
		Short: "Take images in from a bundle that acproxy export has written",
		Long: `import takes images in from bundles. Nothing of a bundle is believed: each image goes through the check of one that is fetched, by the keys and policies of
this side, and through the same commit. An image is taken in whole and verified, or not at all, and one that can't be is no hindrance to the others. An import that was
interrupted goes on when it is run again: what is held is not read.

BUNDLE is a file, what the names of its volumes begin with, one of the volumes (the others are looked for beside it and beside those that are named too), or - for
standard input. What is damaged or missing is rebuilt from parity volumes as it is read; --repair writes it anew beside the others.

A ref without a version moves on to an image only if a trusted key signed that later than the one it answers: old bundles take nothing back, unless
--allow-older says so. Keys in a bundle are never trusted for being there; --keys-to writes them out, to be looked at and given to acproxy trust add.

--receipt writes what the store holds afterwards, signed, for acproxy export --since on the other side. Without a BUNDLE that is all it does.

With --watch a directory is looked into, over and over: a bundle is taken in once it is complete there, and then moved to done/ or failed/ under it.

The exit code is 0 if everything in the bundle is held now, 3 if only some of it is, and 1 if nothing is.`,
		Args: args(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			i.cmd = cmd
			if err := i.check(args); err != nil {
				return err
			}
			i.o = o
			if i.watch != "" {
				return i.watching()
			}
			return o.withCarriage(cmd.Context(), func(to *carriage) error { return i.run(to, args) })
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&i.intake.DryRun, "dry-run", false, "take nothing in, and say what would be")
	flags.BoolVar(&i.intake.Pin, "pin", false, "pin what is taken in, so that it isn't evicted")
	flags.BoolVar(&i.intake.AllowOlder, "allow-older", false, "let refs without a version go back to images that were signed earlier")
	flags.StringArrayVar(&i.signers, "signer", nil, "key, as acproxy export key prints it, that has to have signed the bundle; one of several is enough")
	flags.StringVar(&i.keysTo, "keys-to", "", "directory to write the keys to that the bundle carries")
	flags.StringVar(&i.receipt, "receipt", "", "file to write a receipt to, - for standard output")
	flags.BoolVar(&i.repair, "repair", false, "write volumes anew that are missing or damaged")
	flags.StringVar(&i.watch, "watch", "", "directory to take bundles in from as they come, until Ctrl-C")
	flags.DurationVar(&i.settle, "settle", airgap.DefaultSettle, "with --watch: for how long a bundle that isn't complete must not have changed to be taken in as far as it goes")
	flags.BoolVar(&i.remove, "remove", false, "with --watch: remove bundles that were taken in as a whole, in place of moving them to done/")
	flags.BoolVar(&i.asJSON, "json", false, "print one JSON object per line: each image, what is wrong with the bundle, then the sum")
	return cmd
}

// check returns what is wrong with the command line.
func (i *importing) check(args []string) error {
	switch {
	case len(args) == 0 && i.watch == "" && i.receipt == "":
		return usagef("what is to be imported? Name a bundle, or a directory with --watch")
	case len(args) > 0 && i.watch != "":
		return usagef("--watch takes what comes into its directory: leave out %s", args[0])
	case i.watch == "" && (i.remove || i.cmd.Flags().Changed("settle")):
		return usagef("--settle and --remove are for --watch")
	case i.watch != "" && i.intake.DryRun:
		return usagef("--watch and --dry-run exclude each other")
	case i.receipt == "-" && i.asJSON:
		return usagef("--json prints to standard output, and so would --receipt -")
	case i.intake.DryRun && (i.receipt != "" || i.repair):
		return usagef("--dry-run writes nothing: leave out --receipt and --repair")
	}
	return nil
}

func (i *importing) run(to *carriage, args []string) error {
	i.to = to
	i.open()
	ctx := i.cmd.Context()
	var sums []airgap.Summary
	for _, b := range bundlesOf(args) {
		sum, err := i.one(ctx, b)
		if err != nil {
			return errors.Join(err, i.err)
		}
		sums = append(sums, sum)
	}
	if err := i.writeReceipt(ctx); err != nil {
		return err
	}
	return errors.Join(verdict(sums), i.err)
}

// open decides where it prints.
func (i *importing) open() {
	i.out = i.cmd.OutOrStdout()
	if i.receipt == "-" {
		i.out = i.cmd.ErrOrStderr()
	}
	if i.asJSON {
		i.enc = json.NewEncoder(i.out)
	}
}

// watching takes in what comes into a directory. Without a server the store is open only as long as there is something for it.
func (i *importing) watching() error {
	i.open()
	if err := os.MkdirAll(i.watch, 0o755); err != nil {
		return err
	}
	w := airgap.Watch{Dir: i.watch, Settle: i.settle, Remove: i.remove, Told: func(name string, err error) {
		i.print(map[string]string{"waiting": name, "detail": err.Error()}, "waiting  %s: %v\n", name, err)
	}}
	w.Take = func(ctx context.Context, name string) (good bool, err error) {
		err = i.o.withCarriage(ctx, func(to *carriage) error {
			i.to = to
			sum, err := i.one(ctx, carrier{name: name, dirs: []string{i.watch}})
			if acproxy.KindOf(err) == acproxy.ErrInvalid {
				// It won't get better by being tried again.
				i.print(map[string]string{"damage": err.Error()}, "damage   %v\n", err)
				return nil
			}
			good = err == nil && sum.Good()
			return errors.Join(err, i.writeReceipt(ctx))
		})
		return good, errors.Join(err, i.err)
	}
	return w.Run(i.cmd.Context())
}

// verdict returns the error that an import ends with, whose output has said the rest.
func verdict(sums []airgap.Summary) error {
	good := !slices.ContainsFunc(sums, func(s airgap.Summary) bool { return !s.Good() })
	some := slices.ContainsFunc(sums, airgap.Summary.Some)
	switch {
	case good:
		return nil
	case some:
		return silent(partly(errors.New("not everything could be taken in")))
	}
	return silent(errors.New("nothing could be taken in"))
}

// carrier is the files of one bundle.
type carrier struct {
	name string // "-" is standard input
	dirs []string
}

// bundleName returns what the names of a bundle's files begin with, given one of them.
func bundleName(path string) string {
	if _, err := os.Lstat(path); err != nil {
		return path
	}
	return filepath.Join(filepath.Dir(path), airgap.BundleOf(filepath.Base(path)))
}

// bundlesOf returns the bundles that are named, each once.
func bundlesOf(args []string) []carrier {
	var all []carrier
	for _, arg := range args {
		path := bundleName(arg)
		name, dir := filepath.Base(path), filepath.Dir(path)
		if arg == "-" {
			name, dir = "-", ""
		}
		i := slices.IndexFunc(all, func(c carrier) bool { return c.name == name })
		if i < 0 {
			all = append(all, carrier{name: name})
			i = len(all) - 1
		}
		if !slices.Contains(all[i].dirs, dir) {
			all[i].dirs = append(all[i].dirs, dir)
		}
	}
	return all
}

// one takes one bundle in.
func (i *importing) one(ctx context.Context, c carrier) (sum airgap.Summary, err error) {
	source := bundle.Plain(i.cmd.InOrStdin())
	problems := func() []bundle.Problem { return nil }
	if c.name != "-" {
		v, err := bundle.OpenVolumes(c.name, c.dirs...)
		if err != nil {
			return sum, err
		}
		defer v.Close()
		if i.repair && v.Table() != nil {
			repaired, err := v.Repair(c.dirs[0])
			for _, name := range repaired {
				i.print(map[string]string{"repaired": name}, "repaired %s\n", name)
			}
			if err != nil {
				// Whole images may be had all the same.
				i.print(map[string]string{"unrepaired": err.Error()}, "damage   %v\n", err)
			}
		}
		source, problems = v, v.Problems
	}
	r, err := bundle.NewReader(source, i.signers)
	if err != nil {
		for _, p := range problems() {
			i.print(map[string]bundle.Problem{"problem": p}, "damage   %v\n", p)
		}
		return sum, fmt.Errorf("%s: %w", c.name, err)
	}
	i.print(map[string]any{"bundle": r.ID, "signed": r.Signed, "images": len(r.Index.Images), "size": r.Size},
		"bundle   %v, signed by %v, %s, %s\n", r.ID, r.Signed, count(len(r.Index.Images), "image"), bytesText(r.Size))
	bar := newProgress(i.cmd.ErrOrStderr(), "importing")
	in := i.intake
	in.Progress = func(done, of int64, _ bundle.Image) { bar.set(done, of) }
	in.Told = func(o airgap.Outcome) { i.outcome(bar.over(i.out), o) }
	in.Key = func(key bundle.Key, armored []byte) { i.key(key, armored) }
	sum, err = in.Take(ctx, i.to.destination, r)
	bar.end()
	for _, p := range problems() {
		i.print(map[string]bundle.Problem{"problem": p}, "damage   %v\n", p)
	}
	for _, d := range sum.Damage {
		i.print(map[string]string{"damage": d}, "damage   %s\n", d)
	}
	i.last.Bundle = r.ID
	i.sum(sum)
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("it was ended; run again it goes on where it was")
	}
	return sum, err
}

func (i *importing) print(value any, format string, args ...any) {
	i.printTo(i.out, value, format, args...)
}

func (i *importing) printTo(w io.Writer, value any, format string, args ...any) {
	switch {
	case i.err != nil:
	case i.enc != nil:
		i.err = i.enc.Encode(value)
	default:
		_, i.err = fmt.Fprintf(w, format, args...)
	}
}

// outcome prints what became of an image.
func (i *importing) outcome(w io.Writer, o airgap.Outcome) {
	text := fmt.Sprintf("%-8s %s  %s  %s", o.Outcome, o.Image, o.ImageID.Short(), bytesText(o.Size))
	if o.Detail != "" {
		text += "\n         " + strings.SplitN(o.Detail, "\n", 2)[0]
	}
	for _, ref := range o.Kept {
		text += fmt.Sprintf("\n         %v stays what it is: that was signed later (--allow-older takes it back)", ref)
	}
	i.printTo(w, map[string]airgap.Outcome{"image": o}, "%s\n", text)
}

// key tells of a key that a bundle carries, and writes it out.
func (i *importing) key(key bundle.Key, armored []byte) {
	are, err := trust.ReadKeys(armored)
	if err == nil && (len(are) != 1 || string(are[0].Fingerprint) != key.Fingerprint) {
		err = errors.New("it is another key")
	}
	if err != nil {
		i.print(map[string]string{"damage": "key " + key.Fingerprint + ": " + err.Error()}, "damage   key %s: %v\n", key.Fingerprint, err)
		return
	}
	trusted := len(i.to.keyring().Held(are[0].Fingerprint)) > 0
	file := ""
	if i.keysTo != "" {
		file = filepath.Join(i.keysTo, key.Fingerprint+".asc")
		err := os.MkdirAll(i.keysTo, 0o755)
		if err == nil {
			err = durable.WriteFile(nil, file, armored, 0o644)
		}
		if err != nil && i.err == nil {
			i.err = err
			return
		}
	}
	if trusted && file == "" {
		return
	}
	text := "not trusted here: compare it with one that came another way, and give it to acproxy trust add"
	if trusted {
		text = "trusted here already"
	}
	i.print(map[string]any{"key": key, "trusted": trusted, "file": file}, "key      %s  %s\n", joinNonEmpty("  ", key.Fingerprint, file), text)
}

// sum prints what a bundle came to.
func (i *importing) sum(s airgap.Summary) {
	verb := "imported"
	if s.DryRun {
		verb = "would be imported"
	}
	text := fmt.Sprintf("%s %s, %s; %d held already", count(s.Imported, "image"), verb, bytesText(s.Bytes), s.Held)
	for _, n := range []struct {
		n    int
		what string
	}{{s.Refused, "refused"}, {s.Damaged, "damaged"}, {s.Missing, "missing"}, {s.Failed, "failed"}} {
		if n.n > 0 {
			text += fmt.Sprintf("; %d %s", n.n, n.what)
		}
	}
	i.print(s, "%s\n", text)
}

// writeReceipt writes what the store holds now.
func (i *importing) writeReceipt(ctx context.Context) error {
	if i.receipt == "" {
		return nil
	}
	by, err := signer(i.to.cfg)
	if err != nil {
		return err
	}
	r, err := i.to.receipt(ctx)
	if err != nil {
		return err
	}
	r.Time, r.Bundle = time.Now(), i.last.Bundle
	b, err := r.Encode(by)
	if err != nil {
		return err
	}
	if i.receipt == "-" {
		_, err = i.cmd.OutOrStdout().Write(b)
		return err
	}
	if fi, err := os.Lstat(i.receipt); err == nil && !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is there, and is no regular file", i.receipt)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := durable.WriteFile(nil, i.receipt, b, 0o644); err != nil {
		return err
	}
	i.print(map[string]any{"receipt": i.receipt, "images": len(r.Images)}, "receipt  %s, %s\n", i.receipt, count(len(r.Images), "image"))
	return nil
}
