package cache

import (
	"container/list"
	"errors"
	"reflect"
	"slices"
	"strings"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// maxHeard is how many bytes of what discovery has found out about names, of which no image is held, are remembered.
const maxHeard = 4 << 20

// heard is what discovery has found out about names and is not written down: nobody needs a right to have a name looked up, so that what is on the disk goes
// by the images that are held. Those that were heard of first are forgotten first.
type heard struct {
	mu     sync.Mutex
	bytes  int
	names  map[string]*list.Element // of hearsay, by name
	order  list.List                // of hearsay, the oldest first
	byHost map[string]map[string]*list.Element
}

type hearsay struct {
	Discovered
	bytes int
	hosts []string // where its images may be
}

func newHearsay(k Discovered) *hearsay {
	host, _, _ := strings.Cut(k.Name, "/")
	h := &hearsay{Discovered: k, hosts: k.hosts()}
	if host = strings.ToLower(host); !slices.Contains(h.hosts, host) {
		h.hosts = append(h.hosts, host)
	}
	// What it takes beside its text, in about: itself, and its places in the maps.
	h.bytes = 512 + len(k.Name) + len(k.Page)
	for _, t := range k.Templates {
		h.bytes += 64 + len(t.Prefix) + len(t.URL)
	}
	for _, key := range k.Keys {
		h.bytes += 16 + len(key)
	}
	return h
}

// put remembers what is known of a name, in place of what was. It reports false if that was the same.
func (x *heard) put(k Discovered) bool {
	// What it is made of may be a small part of a page.
	h := newHearsay(cloneDiscovered(k))
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.names[k.Name]; e != nil && reflect.DeepEqual(e.Value.(*hearsay).Discovered, k) {
		return false
	}
	x.forget(k.Name)
	if x.names == nil {
		x.names, x.byHost = make(map[string]*list.Element), make(map[string]map[string]*list.Element)
	}
	e := x.order.PushBack(h)
	x.names[k.Name] = e
	for _, host := range h.hosts {
		if x.byHost[host] == nil {
			x.byHost[host] = make(map[string]*list.Element)
		}
		x.byHost[host][k.Name] = e
	}
	for x.bytes += h.bytes; x.bytes > maxHeard; {
		x.forget(x.order.Front().Value.(*hearsay).Name)
	}
	return true
}

// forget forgets a name. The caller holds mu.
func (x *heard) forget(name string) {
	e := x.names[name]
	if e == nil {
		return
	}
	h := x.order.Remove(e).(*hearsay)
	x.bytes -= h.bytes
	delete(x.names, name)
	for _, host := range h.hosts {
		if delete(x.byHost[host], name); len(x.byHost[host]) == 0 {
			delete(x.byHost, host)
		}
	}
}

// written forgets a name of which that is on the disk.
func (x *heard) written(k Discovered) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.names[k.Name]; e != nil && e.Value.(*hearsay).When.Equal(k.When) {
		x.forget(k.Name)
	}
}

func (x *heard) get(name string) (Discovered, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.names[name]; e != nil {
		return e.Value.(*hearsay).Discovered, true
	}
	return Discovered{}, false
}

// under returns what was heard of names that have images at one of some hosts.
func (x *heard) under(hosts ...string) []Discovered {
	x.mu.Lock()
	defer x.mu.Unlock()
	var known []Discovered
	seen := make(map[string]bool)
	for _, host := range hosts {
		for name, e := range x.byHost[host] {
			if !seen[name] {
				seen[name] = true
				known = append(known, e.Value.(*hearsay).Discovered)
			}
		}
	}
	return known
}

func cloneDiscovered(k Discovered) Discovered {
	k.Name, k.Page = strings.Clone(k.Name), strings.Clone(k.Page)
	k.Templates, k.Keys = slices.Clone(k.Templates), slices.Clone(k.Keys)
	for i, t := range k.Templates {
		k.Templates[i] = Template{strings.Clone(t.Prefix), strings.Clone(t.URL)}
	}
	for i, key := range k.Keys {
		k.Keys[i] = strings.Clone(key)
	}
	return k
}

// keepHeard writes down what was heard of a name, of which an image is held now.
func (d *Disk) keepHeard(name string) {
	if k, ok := d.heard.get(name); ok {
		if err := d.Learn(k); err != nil {
			// It is known until it is forgotten, and can be asked for again.
			d.log.Warn("writing down what discovery found out", "name", name, "err", err)
		}
	}
}

// dropKnown removes what is known of a name from the index if no image of it is held any more, and returns it.
func dropKnown(tx *bolt.Tx, name string) (k Discovered, dropped bool, err error) {
	held := false
	err = scan(tx, bucketNames, append([]byte(name), 0), nil, func(_, _ []byte) error {
		held = true
		return errEnough
	})
	if held || err != nil {
		return k, false, err
	}
	k, ok, err := getKnown(tx, []byte(name))
	if !ok || err != nil {
		return k, false, err
	}
	for _, host := range k.hosts() {
		if err := remove(tx, bucketHosts, hostKey(host, name)); err != nil {
			return k, false, err
		}
	}
	return k, true, remove(tx, bucketKnown, []byte(name))
}

// removeNames removes the files of names that were dropped.
func (d *Disk) removeNames(dropped []Discovered) error {
	var errs []error
	for _, k := range dropped {
		errs = append(errs, d.removeName(k.Name))
	}
	if len(dropped) > 0 {
		errs = append(errs, d.fsys.SyncDir(d.path(nameDir)))
	}
	return errors.Join(errs...)
}

func (d *Disk) removeName(name string) error {
	// Who holds this lock waits for nothing that needs another one.
	defer d.locks.lock(nameDigest(name))()
	known := false
	err := d.view(func(tx *bolt.Tx) (err error) {
		_, known, err = getKnown(tx, []byte(name))
		return err
	})
	if known || err != nil {
		return err // it was learned anew in between
	}
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	bytes := weigh(d.namePath(name))
	if err := d.removeIfThere(d.namePath(name)); err != nil {
		return err
	}
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.names -= bytes
	return nil
}
