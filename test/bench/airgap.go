package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// airgapImages is over how many images the bytes of the large one are spread.
const airgapImages = 8

// airgapBenchmarks measure what it costs to carry images over an air gap, beside tar and sha256sum of the same files, which are all that others have. Everybody
// has the disk write what there is.
func airgapBenchmarks() []benchmark {
	return []benchmark{
		{
			name: "export", what: "images written as a bundle; all of it on the disk at the end", groups: []string{groupAirgap}, metrics: []metric{hashSpeed}, setUp: setUpExport,
		},
		{
			name: "import", what: "a bundle taken in, everything of it verified; all of it on the disk at the end", groups: []string{groupAirgap}, metrics: []metric{hashSpeed}, setUp: setUpImport,
		},
	}
}

// aSide is one side of an air gap.
type aSide struct {
	store   *cache.Disk
	fetcher *fetch.Fetcher
	keyring *trust.Keyring
}

func newSide(o options, dir string, key *trusttest.Key) (*aSide, error) {
	dirs, err := trustIn(o, key)
	if err != nil {
		return nil, err
	}
	s := new(aSide)
	if s.keyring, err = trust.Load(dirs); err != nil {
		return nil, err
	}
	log := slog.New(slog.DiscardHandler)
	if s.store, err = cache.Open(dir, cache.Options{Log: log, Idle: true}); err != nil {
		return nil, err
	}
	s.fetcher = fetch.New(fetch.Config{Store: s.store, Keyring: func() *trust.Keyring { return s.keyring }, Policies: []fetch.Policy{{Offline: true}}, Log: log})
	return s, s.store.Ready(context.Background())
}

func (s *aSide) close() error { return errors.Join(s.fetcher.Close(), s.store.Close()) }

// stocked returns a side that holds images, which are also files, and how many bytes they have.
func stocked(ctx context.Context, o options) (s *aSide, files []string, size int64, err error) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		return nil, nil, 0, err
	}
	if s, err = newSide(o, filepath.Join(o.dir, "airgap-source"), key); err != nil {
		return nil, nil, 0, err
	}
	plain := filepath.Join(o.dir, "airgap-files")
	if err := os.MkdirAll(plain, 0o755); err != nil {
		return nil, nil, 0, err
	}
	for i := range airgapImages {
		spec := acitest.Spec{Name: fmt.Sprintf("%s/%d", benchName, i), Labels: benchLabels, RootfsSize: o.size / airgapImages, Seed: uint64(i) + 1}
		blob, err := acitest.Build(spec)
		if err != nil {
			return nil, nil, 0, err
		}
		signature, err := key.Sign(bytes.NewReader(blob), trusttest.SignOptions{})
		if err != nil {
			return nil, nil, 0, err
		}
		c := fetch.Carried{Name: spec.Name, Labels: spec.Labels, Digest: sha256.Sum256(blob), Size: int64(len(blob)), Signature: signature, Source: "bench"}
		if _, err := s.fetcher.Take(ctx, c, func() (io.Reader, error) { return bytes.NewReader(blob), nil }); err != nil {
			return nil, nil, 0, err
		}
		file := filepath.Join(plain, fmt.Sprintf("%d.aci", i))
		if err := errors.Join(os.WriteFile(file, blob, 0o600), os.WriteFile(file+".asc", signature, 0o600)); err != nil {
			return nil, nil, 0, err
		}
		files = append(files, file, file+".asc")
		size += int64(len(blob))
	}
	return s, files, size, nil
}

// cargo returns all that a side holds.
func (s *aSide) cargo(ctx context.Context) (*airgap.Cargo, *bundle.Bundle, error) {
	origin := airgap.Store{Disk: s.store, Judge: s.fetcher.Judged, Keyring: func() *trust.Keyring { return s.keyring }}
	c, err := airgap.Choose(ctx, origin, airgap.Choice{All: true})
	if err != nil {
		return nil, nil, err
	}
	b, err := bundle.New(c.Index, nil)
	return c, b, err
}

// fresh runs do with a directory of its own, and returns how fast it was.
func fresh(o options, size int64, do func(dir string) error) (measures, error) {
	dir, err := os.MkdirTemp(o.dir, "airgap-")
	if err != nil {
		return nil, err
	}
	took, err := timed(func() error { return do(dir) })
	return measures{hashSpeed.name: float64(size) / 1e6 / took}, errors.Join(err, os.RemoveAll(dir))
}

func setUpExport(ctx context.Context, o options) (stage, error) {
	s, files, size, err := stocked(ctx, o)
	if err != nil {
		return stage{}, err
	}
	c, b, err := s.cargo(ctx)
	if err != nil {
		return stage{}, errors.Join(err, s.close())
	}
	out := stage{close: func() error {
		return errors.Join(s.close(), os.RemoveAll(filepath.Join(o.dir, "airgap-source")), os.RemoveAll(filepath.Join(o.dir, "airgap-files")))
	}}
	if _, err := exec.LookPath("tar"); err == nil {
		out.contestants = append(out.contestants, contestant{"tar, then sha256sum", func(context.Context) (measures, error) {
			return fresh(o, size, func(dir string) error {
				tar := filepath.Join(dir, "b.tar")
				return errors.Join(quiet(exec.Command("tar", append([]string{"cf", tar}, files...)...)), quiet(exec.Command("sha256sum", tar)), quiet(exec.Command("sync", tar)))
			})
		}})
	}
	for _, way := range []struct {
		name   string
		output bundle.Output
	}{
		{acproxyName, bundle.Output{}},
		{acproxyName + ", volumes", bundle.Output{VolumeSize: size/10 + 1}},
		{acproxyName + ", volumes and 2 of parity", bundle.Output{VolumeSize: size/10 + 1, Parity: 2}},
	} {
		out.contestants = append(out.contestants, contestant{way.name, func(ctx context.Context) (measures, error) {
			return fresh(o, size, func(dir string) error {
				way.output.Path = filepath.Join(dir, "b.tar")
				return way.output.Write(ctx, b, c.Open)
			})
		}})
	}
	return out, nil
}

func setUpImport(ctx context.Context, o options) (stage, error) {
	s, files, size, err := stocked(ctx, o)
	if err != nil {
		return stage{}, err
	}
	c, b, err := s.cargo(ctx)
	if err == nil {
		err = os.MkdirAll(filepath.Join(o.dir, "airgap-bundles"), 0o755)
	}
	whole, lossy := filepath.Join(o.dir, "airgap-bundles", "whole.tar"), filepath.Join(o.dir, "airgap-bundles", "lossy.tar")
	if err == nil {
		err = errors.Join(bundle.Output{Path: whole}.Write(ctx, b, c.Open), bundle.Output{Path: lossy, VolumeSize: size/10 + 1, Parity: 2}.Write(ctx, b, c.Open))
	}
	if err == nil {
		err = errors.Join(os.Remove(bundle.VolumeFile(lossy, 2)), os.Remove(bundle.VolumeFile(lossy, 5)))
	}
	if err = errors.Join(err, s.close()); err != nil {
		return stage{}, err
	}
	tar := filepath.Join(o.dir, "airgap-bundles", "plain.tar")
	if err := quiet(exec.Command("tar", append([]string{"cf", tar}, files...)...)); err != nil {
		return stage{}, err
	}
	take := func(name string) func(context.Context) (measures, error) {
		return func(ctx context.Context) (measures, error) {
			return fresh(o, size, func(dir string) (err error) {
				to := &aSide{keyring: s.keyring}
				if to.store, err = cache.Open(filepath.Join(dir, "store"), cache.Options{Log: slog.New(slog.DiscardHandler), Idle: true}); err != nil {
					return err
				}
				to.fetcher = fetch.New(fetch.Config{
					Store: to.store, Keyring: func() *trust.Keyring { return to.keyring }, Policies: []fetch.Policy{{Offline: true}}, Log: slog.New(slog.DiscardHandler),
				})
				defer func() { err = errors.Join(err, to.close()) }()
				v, err := bundle.OpenVolumes(filepath.Base(name), filepath.Dir(name))
				if err != nil {
					return err
				}
				defer v.Close()
				r, err := bundle.NewReader(v, nil)
				if err != nil {
					return err
				}
				sum, err := airgap.Intake{}.Take(ctx, to.fetcher, r)
				if err == nil && sum.Imported != airgapImages {
					err = fmt.Errorf("%+v, want %d images", sum, airgapImages)
				}
				return err
			})
		}
	}
	return stage{
		contestants: []contestant{
			{"sha256sum, then tar", func(context.Context) (measures, error) {
				return fresh(o, size, func(dir string) error {
					return errors.Join(quiet(exec.Command("sha256sum", tar)), quiet(exec.Command("tar", "xf", tar, "-C", dir)), quiet(exec.Command("sync", "-f", dir)))
				})
			}},
			{acproxyName, take(whole)},
			{acproxyName + ", 2 of 10 volumes lost", take(lossy)},
		},
		close: func() error {
			return errors.Join(os.RemoveAll(filepath.Join(o.dir, "airgap-source")), os.RemoveAll(filepath.Join(o.dir, "airgap-files")), os.RemoveAll(filepath.Join(o.dir, "airgap-bundles")))
		},
	}, nil
}
