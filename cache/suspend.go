package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
)

// DefaultKeepPartials is for how long what has arrived of an image is kept without being taken up again.
const DefaultKeepPartials = 24 * time.Hour

// suspended is a partial file that nobody writes.
type suspended struct {
	path    string
	size    int64
	since   time.Time // when it was last written
	arrival Arrival
	lease   *lease // of those who still read it
}

// bytes is the space that its files take.
func (s suspended) bytes() int64 { return blocks(s.size) + noteBytes }

// Resume implements [Store].
func (d *Disk) Resume(ctx context.Context, key string) (*Partial, error) {
	s, ok, err := d.take(ctx, key)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, notFound("not-suspended", fmt.Sprintf("nothing has arrived of %q", key))
	}
	p := &Partial{disk: d, ctx: ctx, temp: s.path, path: s.path, arrival: s.arrival, behind: behind{begun: s.size}, lease: s.lease}
	p.size.Store(s.size)
	p.noted.Store(noteBytes)
	// What it has counts as what was promised to it.
	d.space.mu.Lock()
	d.space.suspended -= s.bytes()
	p.promised = s.bytes()
	d.space.arriving[p] = struct{}{}
	d.space.mu.Unlock()
	if err := p.promise(max(s.size, s.arrival.Size)); err != nil {
		p.putBack(s)
		return nil, err
	}
	switch p.file, err = d.fsys.OpenFile(s.path); {
	case err == nil:
		return p, p.register()
	case acproxy.Shortage(err), errors.Is(err, syscall.EROFS):
		// That says nothing of the file. It can be had another time.
		p.putBack(s)
	default:
		err = errors.Join(err, d.removePartial(s.path))
		p.forgo()
	}
	return nil, fmt.Errorf("resuming an image: %w", noSpace(err))
}

// putBack makes what was taken up something that can be resumed again.
func (p *Partial) putBack(s suspended) {
	d := p.disk
	d.space.add(-p.detach(s.bytes()))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suspended[s.arrival.Key] = s
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
	return d.removeSuspended(s)
}

// removeSuspended removes what has arrived of an image.
func (d *Disk) removeSuspended(s suspended) error {
	if err := d.removePartial(s.path); err != nil {
		// It goes on being counted; the next start sees to it.
		return err
	}
	gone := s.bytes() - blocks(s.size) + d.leases.unlinked(s.lease, blocks(s.size))
	d.space.mu.Lock()
	d.space.suspended -= s.bytes()
	d.space.mu.Unlock()
	d.space.release(gone)
	return nil
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
	defer func() {
		close(d.cleaned)
		d.space.counted(func() {})
	}()
	if d.readOnly {
		return
	}
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
	var arrival Arrival
	var fi fs.FileInfo
	err := patiently(func() (err error) {
		arrival, fi, err = d.partialNote(path)
		return err
	})
	if err != nil {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, twice := d.suspended[arrival.Key]; twice {
		return false
	}
	d.log.Info("keeping what has arrived of an image", "ref", arrival.Ref, "bytes", fi.Size(), "of", arrival.Size)
	s := suspended{path: path, size: fi.Size(), since: fi.ModTime(), arrival: arrival, lease: new(lease)}
	d.suspended[arrival.Key] = s
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.loose += s.bytes()
	d.space.suspended += s.bytes()
	return true
}

// partialNote returns the note of a partial file. It returns an error if the file is of no use.
func (d *Disk) partialNote(path string) (arrival Arrival, fi fs.FileInfo, err error) {
	note, err := readSmall(notePath(path), maxSidecar)
	if err == nil {
		err = unseal(note, &arrival)
	}
	if err == nil {
		fi, err = os.Lstat(path)
	}
	switch {
	case err != nil:
	case !fi.Mode().IsRegular(), arrival.Key == "", fi.Size() == 0, arrival.Size >= 0 && fi.Size() > arrival.Size:
		err = errors.New("it can't be the beginning of what its note is about")
	case d.now().Sub(fi.ModTime()) >= d.keepPartials:
		err = errors.New("it is too old")
	}
	return arrival, fi, err
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
		if err := d.removeSuspended(s); err != nil {
			d.log.Error("removing a partial file", "file", s.path, "err", err)
		}
	}
}
