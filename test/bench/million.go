package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

// This file measures a store of very many images: how soon after a start it answers, how fast it looks refs up that are chosen at random among all
// of them, and how much memory that takes. The store works in a process of its own, one for each run.

// The contestants are what the store was left like.
const (
	closedName  = "closed in good order"
	killedName  = "killed"
	missingName = "index missing"
)

var (
	lookUps   = metric{"look-ups", "/s", true}                            // all processors
	oneCore   = metric{"look-ups on one core", "/s", true}                //
	eachCPU   = metric{"CPU of a look-up", "µs", false}                   // of those on one core, with the collecting of garbage
	openTime  = metric{"open", "ms", false}                               // until somebody may ask
	firstHit  = metric{"first hit", "ms", false}                          // from then on, until a ref is resolved and its blob open
	firstMiss = metric{"first miss", "ms", false}                         // until one that isn't held is said not to be, after the first hit
	ready     = metric{"until the store has verified itself", "s", false} // from opening it, or until the index is made
	resident  = metric{"memory", "MB", false}                             // resident, mapped files included, after the look-ups
	peak      = metric{"most memory", "MB", false}                        // ever
)

func millionBenchmarks(o options) []benchmark {
	listening := "answers within a second of the start"
	return []benchmark{{
		name: "million", what: fmt.Sprintf("a store of %d images: start, look-ups at random, memory", o.held),
		groups:  []string{groupStore},
		metrics: []metric{lookUps, oneCore, eachCPU, openTime, firstHit, firstMiss, ready, resident, peak},
		goals: []goal{
			{of: closedName, metric: lookUps.name, plus: 200_000},
			{of: closedName, metric: resident.name, plus: 200},
			{of: closedName, metric: firstHit.name, plus: 1000, why: listening},
			{of: killedName, metric: firstHit.name, plus: 1000, why: listening},
			{of: missingName, metric: firstHit.name, plus: 1000, why: listening},
		},
		setUp: setUpMillion,
	}}
}

// sparseSize is how long the blobs say that they are. They take no space.
const sparseSize = 10 << 20

func setUpMillion(ctx context.Context, o options) (stage, error) {
	spec := storeSpec{Dir: o.store, Images: o.held, Seconds: o.seconds}
	if spec.Dir == "" {
		spec.Dir = filepath.Join(o.dir, "store")
	}
	if _, err := os.Stat(filepath.Join(spec.Dir, "VERSION")); errors.Is(err, fs.ErrNotExist) {
		took, err := timed(func() error { return cachetest.Lay(spec.Dir, spec.Images, sparseSize) })
		if err != nil {
			return stage{}, err
		}
		o.note("laying out %d images took %.1f s", spec.Images, took)
	}
	// The first one makes the index, and with it the table of refs.
	if _, err := runStore(ctx, spec); err != nil {
		return stage{}, err
	}
	run := func(name string, prepare func() error) contestant {
		return contestant{name, func(ctx context.Context) (measures, error) {
			if err := prepare(); err != nil {
				return nil, err
			}
			spec := spec
			spec.Measure, spec.Missing = true, name == missingName
			return runStore(ctx, spec)
		}}
	}
	return stage{
		contestants: []contestant{
			run(closedName, func() error { return nil }),
			run(killedName, func() error {
				killed := spec
				killed.Die = true
				_, err := runStore(ctx, killed)
				return err
			}),
			run(missingName, func() error { return os.Remove(filepath.Join(spec.Dir, "index.db")) }),
		},
		close: func() error { return nil },
	}, nil
}

// storeSpec is what the process that has the store open is told.
type storeSpec struct {
	Dir     string
	Images  int
	Seconds float64 // for how long refs are looked up
	Measure bool    // else the store is only brought into order
	Missing bool    // the index is; what isn't held is known to be that only when it is made
	Die     bool    // instead of closing the store
}

// runStore runs a process with the store.
func runStore(ctx context.Context, spec storeSpec) (measures, error) {
	cmd, err := roleCommand(roleStore, spec)
	if err != nil {
		return nil, err
	}
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	dieWithUs(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("%w: %s", err, &complaints))
	}
	var m measures
	return m, json.Unmarshal(out.Bytes(), &m)
}

// playStore has a store open, and writes what it has measured.
func playStore(stdin io.Reader, stdout io.Writer) error {
	var spec storeSpec
	if err := json.NewDecoder(stdin).Decode(&spec); err != nil {
		return fmt.Errorf("reading which store to open: %w", err)
	}
	ctx := context.Background()
	started := time.Now()
	since := func() float64 { return time.Since(started).Seconds() }
	m := make(measures)
	d, err := cache.Open(spec.Dir, cache.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	m[openTime.name] = 1e3 * since()
	if spec.Measure {
		if err := askFirst(ctx, d, spec, m); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	if err := d.Ready(ctx); err != nil {
		return errors.Join(err, d.Close())
	}
	m[ready.name] = since()
	if spec.Die {
		if err := json.NewEncoder(stdout).Encode(m); err != nil {
			return err
		}
		os.Exit(0)
	}
	if spec.Measure {
		all := runtime.GOMAXPROCS(1)
		for _, run := range []struct {
			of      metric
			workers int
		}{{oneCore, 1}, {lookUps, all}} {
			runtime.GOMAXPROCS(run.workers)
			rate, cpu, err := lookUpAtRandom(ctx, d, spec, run.workers)
			if err != nil {
				return errors.Join(err, d.Close())
			}
			m[run.of.name] = rate
			if run.workers == 1 {
				m[eachCPU.name] = 1e6 * cpu
			}
		}
		if m[resident.name], m[peak.name], err = ownMemory(); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	if err := d.Close(); err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(m)
}

// askFirst asks a store that has just been opened for something that it holds, and for something that it doesn't.
func askFirst(ctx context.Context, d *cache.Disk, spec storeSpec, m measures) error {
	took, err := timed(func() error {
		_, rec, err := d.Resolve(ctx, cachetest.SparseRef(rand.IntN(spec.Images)))
		if err != nil {
			return err
		}
		f, err := d.OpenBlob(rec.Digest)
		if err != nil {
			return err
		}
		return f.Close()
	})
	m[firstHit.name] = 1e3 * took
	if err != nil || spec.Missing {
		return err
	}
	took, err = timed(func() error {
		if _, _, err := d.Resolve(ctx, cachetest.SparseRef(spec.Images)); !errors.Is(err, acproxy.ErrNotFound) {
			return fmt.Errorf("what isn't held is answered with %w", err)
		}
		return nil
	})
	m[firstMiss.name] = 1e3 * took
	return err
}

// lookUpAtRandom returns how many refs, chosen at random among all, are looked up in a second, and how many seconds of a processor each takes if there is
// one worker. What it takes to make up the refs is not counted.
func lookUpAtRandom(ctx context.Context, d *cache.Disk, spec storeSpec, workers int) (rate, cpu float64, err error) {
	rates := make([]float64, workers)
	cpus := make([]float64, workers)
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for worker := range workers {
		// Ends when its time is over; waited for below.
		wg.Go(func() {
			random := rand.New(rand.NewPCG(rand.Uint64(), uint64(worker)))
			refs := make([]acproxy.Ref, 5000)
			n, took, used := 0, 0.0, 0.0
			for took < spec.Seconds && errs[worker] == nil {
				for i := range refs {
					refs[i] = cachetest.SparseRef(random.IntN(spec.Images))
				}
				before := cpuOfThisProcess()
				var t float64
				t, errs[worker] = timed(func() error {
					for _, ref := range refs {
						if _, _, err := d.Resolve(ctx, ref); err != nil {
							return err
						}
					}
					return nil
				})
				n, took, used = n+len(refs), took+t, used+cpuOfThisProcess()-before
			}
			rates[worker], cpus[worker] = float64(n)/took, used/float64(n)
		})
	}
	wg.Wait()
	for _, r := range rates {
		rate += r
	}
	return rate, cpus[0], errors.Join(errs...)
}

// ownMemory returns how many megabytes are resident, and how many have been at most (proc_pid_status(5)).
func ownMemory() (now, most float64, err error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, 0, err
	}
	of := func(key string) float64 {
		_, rest, _ := strings.Cut(string(status), key+":")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			return 0
		}
		kib, _ := strconv.ParseFloat(fields[0], 64)
		return kib / 1024
	}
	return of("VmRSS"), of("VmHWM"), nil
}
