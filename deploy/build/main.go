// Command build makes everything that is released of acproxy, into one directory: the same bytes from the same source, wherever it lies, whoever builds it,
// and whenever.
//
// For each architecture these are a static binary, an archive of it with its manual pages and completions, a Debian package and an SBOM, and for all of them
// together an OCI image, as a directory and as an archive, and SHA256SUMS. It needs Go, and git unless -version and SOURCE_DATE_EPOCH are given.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	flags := flag.NewFlagSet("build", flag.ContinueOnError)
	flags.SetOutput(stderr)
	source := flags.String("source", ".", "directory of acproxy's source")
	out := flags.String("out", "dist", "directory that everything is written into; what is there of the same names is replaced")
	version := flags.String("version", "", "version, as 1.2.3 (default: as the tags of git say)")
	arches := flags.String("arch", "amd64,arm64", "architectures to build for, as Go names them")
	rootfs := flags.String("rootfs", "", "make nothing but the files of the image, for the first architecture, in this directory")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	r := &release{source: *source, arches: strings.Split(*arches, ","), log: stdout}
	if err := r.make(ctx, *out, *version, *rootfs); err != nil {
		fmt.Fprintf(stderr, "build: %v\n", err)
		return 1
	}
	return 0
}

// A release is what is made of one state of the source.
type release struct {
	source  string // where the source lies
	arches  []string
	version version
	date    time.Time // of the commit, or SOURCE_DATE_EPOCH: it stands wherever a format wants a time
	log     io.Writer

	work    string // a temporary directory
	pages   []file // manual pages and completions, where they are installed
	notices []byte // licences of what is linked in

	imageConfig []byte // the configuration in the image
}

// A file is one that is installed.
type file struct {
	path    string // from the root, without a slash before it
	uid     int    // of its owner and group; 0 for root
	mode    os.FileMode
	content []byte
}

// product is what was made for one architecture.
type product struct {
	arch   string
	binary []byte
	sbom   []byte
}

func (r *release) make(ctx context.Context, out, version, rootfs string) (err error) {
	if r.source, err = filepath.Abs(r.source); err != nil {
		return err
	}
	if r.version, err = r.versionOf(ctx, version); err != nil {
		return err
	}
	if r.date, err = r.dateOf(ctx); err != nil {
		return err
	}
	if r.work, err = os.MkdirTemp("", "acproxy-build-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.work)) }()
	fmt.Fprintf(r.log, "acproxy %s of %s\n", r.version, r.date.Format(time.RFC3339))

	var products []product
	for _, arch := range r.arches {
		p := product{arch: arch}
		if p.binary, err = r.build(ctx, "linux", arch); err != nil {
			return err
		}
		products = append(products, p)
	}
	if r.notices, err = r.noticesOf(ctx); err != nil {
		return err
	}
	for i := range products {
		if products[i].sbom, err = r.sbomOf(products[i]); err != nil {
			return err
		}
	}
	if r.imageConfig, err = r.read("deploy/oci/config.yaml"); err != nil {
		return err
	}
	if rootfs != "" {
		return writeTree(rootfs, r.imageFiles(products[0]))
	}
	if r.pages, err = r.pagesOf(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	var made []string
	write := func(name string, content []byte, mode os.FileMode) error {
		made = append(made, name)
		return writeFile(filepath.Join(out, name), content, mode)
	}
	for _, p := range products {
		base := fmt.Sprintf("acproxy-%s-linux-%s", r.version, p.arch)
		archive, err := r.archive(base, p)
		if err != nil {
			return fmt.Errorf("%s.tar.gz: %w", base, err)
		}
		pkg, name, err := r.debianPackage(p)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := errors.Join(write(base, p.binary, 0o755), write(base+".tar.gz", archive, 0o644), write(base+".cdx.json", p.sbom, 0o644), write(name, pkg, 0o644)); err != nil {
			return err
		}
	}
	layout := filepath.Join(out, "oci")
	if err := r.image(layout, products); err != nil {
		return fmt.Errorf("OCI image: %w", err)
	}
	packed, err := r.packLayout(layout)
	if err != nil {
		return err
	}
	if err := write(fmt.Sprintf("acproxy-%s-oci.tar", r.version), packed, 0o644); err != nil {
		return err
	}
	slices.Sort(made)
	sums, err := sumsOf(out, made)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(out, "SHA256SUMS"), sums, 0o644); err != nil {
		return err
	}
	_, err = r.log.Write(sums)
	return err
}

// build returns acproxy for a system. Nothing of the environment has a say in it, but for where Go keeps its caches and gets its modules.
func (r *release) build(ctx context.Context, system, arch string) ([]byte, error) {
	fmt.Fprintf(r.log, "building for %s/%s\n", system, arch)
	name := filepath.Join(r.work, "acproxy-"+system+"-"+arch)
	cmd := r.command(ctx, "go", "build", "-trimpath", "-buildvcs=auto", "-ldflags", "-s -w -buildid= -X main.version="+r.version.String(), "-o", name, "./cmd/acproxy")
	cmd.Env = append(cmd.Env, target(system, arch)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building for %s/%s: %w\n%s", system, arch, err, out)
	}
	return os.ReadFile(name)
}

func target(system, arch string) []string { return []string{"GOOS=" + system, "GOARCH=" + arch} }

// hostBinary returns the name of acproxy for this machine.
func (r *release) hostBinary(ctx context.Context) (string, error) {
	if runtime.GOOS != "linux" || !slices.Contains(r.arches, runtime.GOARCH) {
		if _, err := r.build(ctx, runtime.GOOS, runtime.GOARCH); err != nil {
			return "", err
		}
	}
	return filepath.Join(r.work, "acproxy-"+runtime.GOOS+"-"+runtime.GOARCH), nil
}
