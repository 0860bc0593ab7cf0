package airgap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy/internal/bundle"
)

// Defaults of a [Watch].
const (
	DefaultEvery  = 2 * time.Second
	DefaultSettle = time.Minute
)

// Directories under that which is watched.
const (
	DoneDir   = "done"   // bundles of which everything was taken in
	FailedDir = "failed" // others
)

// A Watch takes bundles in from a directory as they come, by whatever brings them: they come in any order, slowly, and some of them never as a whole.
type Watch struct {
	Dir string
	// Every is how often it looks; 0 means DefaultEvery.
	Every time.Duration
	// Settle is for how long a bundle that isn't complete must not have changed to be taken for what will ever come of it; 0 means DefaultSettle.
	Settle time.Duration
	// Remove removes what was taken in as a whole, in place of moving it to done/.
	Remove bool
	// Take takes a bundle in. The bundle is tried again if it returns an error, and moved if it doesn't.
	Take func(ctx context.Context, name string) (good bool, err error)
	// Told is told of what can't be done; it may be nil.
	Told func(name string, err error)
	Now  func() time.Time // nil means time.Now
}

// volumeFile matches the files of a bundle in volumes.
var volumeFile = regexp.MustCompile(`^(.+)\.(?:[0-9]{3}|p[0-9]{2,3}|volumes)$`)

// BundleOf returns what the names of a bundle's files begin with, given the name of one of them that is there, or that itself.
func BundleOf(file string) string {
	if m := volumeFile.FindStringSubmatch(file); m != nil {
		return m[1]
	}
	return file
}

// arrived is a bundle in the directory.
type arrived struct {
	name  string
	files []string
	// looks says what the files looked like: names, sizes and times.
	looks string
}

// Run looks until ctx is done, and returns nil then.
func (w Watch) Run(ctx context.Context) error {
	w.Every, w.Settle = cmp.Or(w.Every, DefaultEvery), cmp.Or(w.Settle, DefaultSettle)
	if w.Now == nil {
		w.Now = time.Now
	}
	if w.Told == nil {
		w.Told = func(string, error) {}
	}
	since := make(map[string]seen)
	ticks := time.NewTicker(w.Every)
	defer ticks.Stop()
	for {
		if err := w.look(ctx, since); err != nil {
			return err
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// seen is what a bundle looked like, since when, and whether taking it in has failed as it is.
type seen struct {
	looks string
	since time.Time
	told  string
}

// look takes in what is ready.
func (w Watch) look(ctx context.Context, since map[string]seen) error {
	all, err := scan(w.Dir)
	if err != nil {
		return err
	}
	names := make(map[string]bool)
	for _, a := range all {
		if ctx.Err() != nil {
			return nil
		}
		names[a.name] = true
		before, ok := since[a.name]
		if !ok || before.looks != a.looks {
			before = seen{looks: a.looks, since: w.Now(), told: before.told}
			since[a.name] = before
		}
		// What was copied with its times may be old from the beginning: only what is seen not to change counts.
		if !complete(w.Dir, a.name) && w.Now().Sub(before.since) < w.Settle {
			continue
		}
		good, err := w.Take(ctx, a.name)
		if err == nil {
			err = w.away(a, good)
		}
		if err != nil && ctx.Err() == nil && before.told != err.Error() {
			w.Told(a.name, err)
			before.told = err.Error()
			since[a.name] = before
		}
		if err == nil {
			delete(since, a.name)
		}
	}
	for name := range since {
		if !names[name] {
			delete(since, name)
		}
	}
	return nil
}

// scan returns the bundles in a directory, by name. What begins with a dot or is called as what is being written doesn't count.
func scan(dir string) ([]arrived, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	byName := make(map[string]*arrived)
	for _, e := range entries {
		name := e.Name()
		if !e.Type().IsRegular() || strings.HasPrefix(name, ".") || slices.Contains([]string{".partial", ".unfinished", ".repair", ".tmp", ".part"}, filepath.Ext(name)) {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		of := BundleOf(name)
		a := byName[of]
		if a == nil {
			a = &arrived{name: of}
			byName[of] = a
		}
		a.files = append(a.files, name)
		a.looks += fmt.Sprintln(name, fi.Size(), fi.ModTime().UnixNano())
	}
	var all []arrived
	for _, a := range byName {
		all = append(all, *a)
	}
	slices.SortFunc(all, func(a, b arrived) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// complete reports whether all the bytes of a bundle have come, by their number.
func complete(dir, name string) bool {
	v, err := bundle.OpenVolumes(name, dir)
	if err != nil {
		return false
	}
	defer v.Close()
	if v.Table() != nil {
		return len(v.Problems()) == 0
	}
	if len(v.Problems()) > 0 {
		return false
	}
	r, err := bundle.NewReader(v, nil)
	return err == nil && r.Size == v.Size()
}

// away moves a bundle to where it doesn't come again from, or removes it.
func (w Watch) away(a arrived, good bool) error {
	to := filepath.Join(w.Dir, FailedDir)
	if good {
		to = filepath.Join(w.Dir, DoneDir)
	}
	if good && w.Remove {
		var errs []error
		for _, file := range a.files {
			errs = append(errs, os.Remove(filepath.Join(w.Dir, file)))
		}
		return errors.Join(errs...)
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, file := range a.files {
		errs = append(errs, os.Rename(filepath.Join(w.Dir, file), filepath.Join(to, file)))
	}
	return errors.Join(errs...)
}
