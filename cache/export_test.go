package cache

import (
	"context"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Schema is the version of the index.
const Schema = schema

// ReadIndexes reads the indexes that there are as a start does: the shape of the one in use, all of it, and the one of an older version, which it removes.
func (d *Disk) ReadIndexes(ctx context.Context) []error {
	ix := d.index()
	return []error{ix.check(ctx), ix.verify(ctx), d.carryOver(ix)}
}

// SetSchema makes an index one of another version.
func SetSchema(path string, version int) error {
	db, err := bolt.Open(path, filePerm, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		return put(tx, bucketState, []byte(stateSchema), []byte(strconv.Itoa(version)))
	})
	if err != nil {
		return err
	}
	return db.Close()
}

// EvictAgain has a store look again after that time for what can be evicted when it was not enough.
func EvictAgain(after time.Duration) func(*Options) {
	return func(o *Options) { o.evictAgain = after }
}

// KeptRefs reports whether the table of refs names all that there are, so that nothing is going to write it before more change.
func (d *Disk) KeptRefs() bool {
	d.keeping.Lock()
	defer d.keeping.Unlock()
	return d.kept == d.memory.refChanges.Load()
}

// Unmark makes the index one that has just been opened after the store was closed properly.
func (d *Disk) Unmark() error {
	ix := d.index()
	if err := ix.update(func(tx *bolt.Tx) error { return remove(tx, bucketState, []byte(stateOpen)) }, effect{}); err != nil {
		return err
	}
	ix.marked.Store(false)
	return nil
}

// ReadyAtOnce is Ready; the first failure ends it.
func (d *Disk) ReadyAtOnce(ctx context.Context) error { return d.ready(ctx, false) }

// Counted waits until the store knows how much it takes.
func (d *Disk) Counted(ctx context.Context) error {
	d.space.mu.Lock()
	known := d.space.known
	d.space.mu.Unlock()
	select {
	case <-known:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
