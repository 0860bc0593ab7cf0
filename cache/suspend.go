package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
)

// DefaultKeepPartials is for how long what has arrived of an image is kept without being taken up again.
const DefaultKeepPartials = 24 * time.Hour

// suspended is a partial file that nobody writes.
type suspended struct {
	path    string
	size    int64
	since   time.Time // when it was last written
	arrival Arrival
}

// Resume implements [Store].
func (d *Disk) Resume(ctx context.Context, key string) (*Partial, error) {
	s, ok, err := d.take(ctx, key)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, notFound("not-suspended", fmt.Sprintf("nothing has arrived of %q", key))
	}
	file, err := d.fsys.OpenFile(s.path)
	if err != nil {
		return nil, fmt.Errorf("resuming an image: %w", errors.Join(err, d.removePartial(s.path)))
	}
	p := &Partial{disk: d, file: file, temp: s.path, path: s.path, arrival: s.arrival, sent: s.size}
	p.size.Store(s.size)
	return p, p.register()
}

// Arrivals implements [Store].
func (d *Disk) Arrivals(ctx context.Context) ([]Arrival, error) {
	if err := d.await(ctx, d.cleaned); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	arrivals := make([]Arrival, 0, len(d.suspended))
	for _, s := range d.suspended {
		arrivals = append(arrivals, s.arrival)
	}
	return arrivals, nil
}

// take hands a suspended arrival to the caller, who has it alone from then on.
func (d *Disk) take(ctx context.Context, key string) (suspended, bool, error) {
	if err := d.await(ctx, d.cleaned); err != nil {
		return suspended{}, false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.suspended[key]
	delete(d.suspended, key)
	return s, ok, nil
}

// forget removes what has arrived of an image that begins anew.
func (d *Disk) forget(ctx context.Context, key string) error {
	if key == "" {
		return nil
	}
	s, ok, err := d.take(ctx, key)
	if !ok {
		return err
	}
	return d.removePartial(s.path)
}

// removePartial removes a partial file and its note. The note goes first: a file without one is removed at the next start.
func (d *Disk) removePartial(path string) error {
	return errors.Join(d.removeIfThere(notePath(path)), d.removeIfThere(path))
}

func (d *Disk) removeIfThere(path string) error {
	if err := d.fsys.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// clean looks through what was being written when the store was last open: arrivals that can be resumed are kept, all else is removed. Close waits
// for all of it.
func (d *Disk) clean(leftovers []fs.DirEntry) {
	defer close(d.cleaned)
	for _, entry := range leftovers {
		path := d.path(partialDir, entry.Name())
		if strings.HasSuffix(entry.Name(), partialExt) && d.readopt(path) {
			continue
		}
		if partial, ok := strings.CutSuffix(path, sidecarExt); ok {
			if _, err := os.Lstat(partial); err == nil {
				// It goes, or stays, with the file that it is about.
				continue
			}
		}
		d.log.Info("removing what was not finished", "file", entry.Name())
		if err := d.removePartial(path); err != nil {
			d.log.Error("removing what was not finished", "file", entry.Name(), "err", err)
		}
	}
}

// readopt takes a partial file that an earlier process has left among those that can be resumed. It reports false if the file is of no use.
func (d *Disk) readopt(path string) bool {
	note, err := readSmall(notePath(path), maxSidecar)
	if err != nil {
		return false
	}
	var arrival Arrival
	fi, err := os.Lstat(path)
	if err != nil || unseal(note, &arrival) != nil || !fi.Mode().IsRegular() {
		return false
	}
	if arrival.Key == "" || fi.Size() == 0 || arrival.Size >= 0 && fi.Size() > arrival.Size || d.now().Sub(fi.ModTime()) >= d.keepPartials {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, twice := d.suspended[arrival.Key]; twice {
		return false
	}
	d.log.Info("keeping what has arrived of an image", "ref", arrival.Ref, "bytes", fi.Size(), "of", arrival.Size)
	d.suspended[arrival.Key] = suspended{path: path, size: fi.Size(), since: fi.ModTime(), arrival: arrival}
	return true
}

// expire removes what has arrived of images that nobody has asked for since.
func (d *Disk) expire() {
	var old []suspended
	d.mu.Lock()
	for key, s := range d.suspended {
		if d.now().Sub(s.since) >= d.keepPartials {
			old = append(old, s)
			delete(d.suspended, key)
		}
	}
	d.mu.Unlock()
	for _, s := range old {
		d.log.Info("removing what has arrived of an image that nobody asked for since", "ref", s.arrival.Ref, "bytes", s.size)
		if err := d.removePartial(s.path); err != nil {
			d.log.Error("removing a partial file", "file", s.path, "err", err)
		}
	}
}
