package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/warm"
)

// fetching is one run of acproxy fetch.
type fetching struct {
	cmd       *cobra.Command
	dir       string
	platforms []string
	deps      bool
	force     bool
}

func newFetch(o *options) *cobra.Command {
	f := new(fetching)
	cmd := &cobra.Command{
		Use:   "fetch IMAGE…",
		Short: "Fetch images, and write them into files",
		Long: `fetch has images fetched and checked as for any node, by the server if one runs, and writes each of them into a directory, as NAME-VERSION-OS-ARCH.aci, with its
signature beside it, as .aci.asc. NAME is the last part of the image's name.

IMAGE is a name with labels, as name[:version][,label=value…]. A file that is there already stays if it has the same bytes; one with others is an error, unless --force
replaces it. The exit code is 1 if any of them could not be had; the rest is written.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.cmd = cmd
			spec := warm.Spec{Name: "fetch"}
			for _, arg := range args {
				if _, err := acproxy.ParseRef(arg); err != nil {
					return usagef("%w", err)
				}
				spec.Images = append(spec.Images, warm.Entry{Image: arg, Alone: !f.deps})
			}
			for _, platform := range f.platforms {
				p, err := warm.ParsePlatform(platform)
				if err != nil {
					return usagef("--platform: %w", err)
				}
				spec.Platforms = append(spec.Platforms, p)
			}
			return o.withWarmer(cmd.Context(), true, func(from warmer) error { return f.run(from, spec) })
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.dir, "output", "o", ".", "directory to write to; it is made if it isn't there")
	flags.StringArrayVar(&f.platforms, "platform", nil, "platform for images that don't say, as os/arch in appc's words, or none; may be given more than once (default: warm.platforms of the configuration)")
	flags.BoolVar(&f.deps, "deps", false, "write the images that they depend on, too")
	flags.BoolVar(&f.force, "force", false, "replace files that have other bytes")
	return cmd
}

func (f *fetching) run(from warmer, spec warm.Spec) error {
	ctx := f.cmd.Context()
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return err
	}
	job, err := from.Warm(spec)
	if err != nil {
		return err
	}
	var results []warm.Result
	out := &warmReport{w: f.cmd.OutOrStdout()}
	out.each = func(r warm.Result) bool {
		results = append(results, r)
		return r.Outcome == warm.Failed
	}
	if _, err := follow(ctx, from, job.ID, out, f.cmd.ErrOrStderr()); err != nil {
		_, cancelled := from.CancelWarm(job.ID)
		return errors.Join(err, cancelled)
	}
	failed := false
	written := make(map[string]acproxy.Digest)
	for _, r := range results {
		if r.Outcome == warm.Failed {
			failed = true
			continue
		}
		if err := f.write(ctx, from, r, written); err != nil {
			failed = true
			fmt.Fprintf(f.cmd.ErrOrStderr(), "acproxy: %s: %v\n", r.Image, err)
		}
	}
	if failed {
		return silent(errors.New("not all images could be had"))
	}
	return out.err
}

// fileName returns the name of an image's file, without what it ends with.
func fileName(rec cache.Record) string {
	parts := []string{rec.Name[strings.LastIndexByte(rec.Name, '/')+1:]}
	for _, label := range []string{acproxy.LabelVersion, acproxy.LabelOS, acproxy.LabelArch} {
		if value := rec.Labels[label]; value != "" {
			parts = append(parts, value)
		}
	}
	return strings.Map(func(c rune) rune {
		if c == '/' || c == '\\' || c < ' ' {
			return '_'
		}
		return c
	}, strings.Join(parts, "-"))
}

// write writes an image and its signature.
func (f *fetching) write(ctx context.Context, from warmer, r warm.Result, written map[string]acproxy.Digest) error {
	rec, err := from.Record(r.Digest)
	if err != nil {
		return err
	}
	path := filepath.Join(f.dir, fileName(rec)+".aci")
	if before, ok := written[path]; ok {
		if before == r.Digest {
			return nil
		}
		return fmt.Errorf("%s is the file of another of these images: fetch it into another directory", path)
	}
	written[path] = r.Digest
	there, err := sumOf(path)
	switch {
	case err == nil && there != r.Digest && !f.force:
		return fmt.Errorf("%s is there already, and is another image: --force replaces it", path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	case err != nil || there != r.Digest:
		if err := f.blob(ctx, from, r.Digest, path); err != nil {
			return err
		}
	}
	text := path
	if rec.Signed {
		signature, err := from.Signature(r.Digest)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(nil, path+".asc", signature, 0o644); err != nil {
			return err
		}
		text += ", " + filepath.Base(path) + ".asc"
	}
	_, err = fmt.Fprintf(f.cmd.OutOrStdout(), "%s  %s\n", text, bytesText(rec.Size))
	return err
}

// sumOf returns the SHA-256 of a file.
func sumOf(path string) (sum acproxy.Digest, err error) {
	file, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer file.Close()
	h := sha256.New()
	_, err = io.Copy(h, file)
	h.Sum(sum[:0])
	return sum, err
}

// blob writes the bytes of an image: a file of that name has all of them, or isn't there.
func (f *fetching) blob(ctx context.Context, from warmer, digest acproxy.Digest, path string) (err error) {
	blob, err := from.Blob(digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	file, err := os.CreateTemp(filepath.Dir(path), ".acproxy-fetch-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(file, h), &untilDone{ctx, blob})
	if err == nil && acproxy.Digest(h.Sum(nil)) != digest {
		err = fmt.Errorf("the bytes of %v came as others", digest)
	}
	if err = errors.Join(err, file.Chmod(0o644), file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

// untilDone is a reader that ends with an error once ctx is done.
type untilDone struct {
	ctx context.Context
	io.Reader
}

// Read implements io.Reader.
func (u *untilDone) Read(p []byte) (int, error) {
	if err := context.Cause(u.ctx); err != nil {
		return 0, err
	}
	return u.Reader.Read(p)
}
