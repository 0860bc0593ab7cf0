package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// An index of an older schema is set aside under a name of its own, and another one is made from the sidecars, as if it were broken; but what no
// sidecar has, when images were last used and what was refused, is carried over. docs/decisions/index.md says why there is no other
// migration.

// olderExt ends the name of an index of an older schema, from which something is still to be carried over.
const olderExt = ".older"

// stateCarried is the word of an index that has all that could be carried over to it: the older one only has to be removed.
const stateCarried = "carried"

// errOlder is matched by the error about an index of an older schema.
var errOlder = errors.New("it is of an older version")

// readableSchema is the oldest schema whose rows are read as they are. A row of a ref in version 2 is one without a copy of the record.
const readableSchema = 2

// fits returns an error matching errPages if an index is not of this schema, or an older one down to least, and errOlder if it is of an older one than that.
func fits(tx *bolt.Tx, least int) error {
	b, err := get(tx, bucketState, []byte(stateSchema))
	if err != nil {
		return err
	}
	switch n, err := strconv.Atoi(string(b)); {
	case err != nil:
		return broken("its version is %q", b)
	case n > schema:
		return broken("it is of version %d, and this acproxy knows those up to %d", n, schema)
	case n < least:
		return fmt.Errorf("%w: %w, %d", errPages, errOlder, n)
	}
	return nil
}

// carryOver takes over what only the index of an older schema has, if there is one, and removes it.
func (d *Disk) carryOver(ix *index) error {
	path := d.path(indexFile + olderExt)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lost, err := d.carryFrom(path, ix)
	if err == nil && acproxy.Shortage(lost) {
		err = lost
	}
	if err != nil {
		return err
	}
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	if lost != nil {
		d.log.Error("when images were last used, and what was refused, before the version changed, is lost", "err", lost)
	}
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	bytes := int64(0)
	if fi, err := os.Lstat(path); err == nil {
		bytes = diskBytes(fi)
	}
	if err := d.fsys.Remove(path); err != nil {
		return err
	}
	d.space.mu.Lock()
	d.space.aside -= bytes
	d.space.mu.Unlock()
	return d.fsys.SyncDir(d.dir)
}

// carryFrom returns as lost why the old index can't be read, and as err why the other one can't be written. What was carried over before is not again: who had
// done so may not have come to remove the old one.
func (d *Disk) carryFrom(path string, ix *index) (lost, err error) {
	done := false
	err = ix.view(func(tx *bolt.Tx) (err error) {
		done, err = isState(tx, stateCarried)
		return err
	})
	if done || err != nil {
		return nil, err
	}
	old, err := openIndex(path, newMemory(), d.space, d.maxMapped)
	if err != nil {
		return err, nil
	}
	defer func() { lost = errors.Join(lost, old.close()) }()
	if err := old.check(d.ctx); err != nil {
		return err, nil
	}
	for after := []byte(nil); ; {
		used, last, err := usedAfter(old, after)
		if err != nil {
			return err, nil
		}
		if len(used) == 0 {
			break
		}
		if err := ix.update(func(tx *bolt.Tx) error { return putUsed(tx, used) }, effect{}); err != nil {
			return nil, err
		}
		after = last
	}
	var refusals []Refused
	err = old.peek(func(tx *bolt.Tx) error {
		refusals, err = getRefusals(tx)
		return err
	})
	if err != nil {
		return err, nil
	}
	return nil, ix.update(func(tx *bolt.Tx) error {
		return errors.Join(prependRefusals(tx, refusals), setState(tx, stateCarried))
	}, effect{})
}

// maxCarried is how many times of last use are carried over in one transaction.
const maxCarried = 4096

// carried is when an image was last used.
type carried struct {
	digest []byte
	t      time.Time
}

// usedAfter returns the next times of last use, and the key of the last of them.
func usedAfter(old *index, after []byte) (used []carried, last []byte, err error) {
	err = old.peek(func(tx *bolt.Tx) error {
		used = nil
		return scan(tx, bucketUsed, nil, after, func(key, value []byte) error {
			if len(used) == maxCarried {
				return errEnough
			}
			if t, ok := timeIn(value); ok && !bytes.Equal(key, after) {
				last = bytes.Clone(key)
				used = append(used, carried{last, t})
			}
			return nil
		})
	})
	return used, last, err
}

// putUsed notes when images were used, where nothing later is known.
func putUsed(tx *bolt.Tx, used []carried) error {
	for _, u := range used {
		h, ok, err := getRecord(tx, acproxy.Digest(u.digest))
		if err == nil && ok {
			err = touch(tx, h.Record, u.t)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// prependRefusals puts refusals before those that there are.
func prependRefusals(tx *bolt.Tx, refusals []Refused) error {
	since, err := getRefusals(tx)
	if err != nil {
		return err
	}
	var keys [][]byte
	err = scan(tx, bucketRefused, nil, nil, func(key, _ []byte) error {
		keys = append(keys, bytes.Clone(key))
		return nil
	})
	for _, key := range keys {
		if err == nil {
			err = remove(tx, bucketRefused, key)
		}
	}
	all := append(slices.Clone(refusals), since...)
	all = all[max(0, len(all)-MaxRefusals):]
	for i, r := range all {
		if err == nil {
			err = putJSON(tx, bucketRefused, refusalKey(uint64(i)+1), r)
		}
	}
	if err != nil {
		return err
	}
	return putJSON(tx, bucketState, []byte(stateRefused), len(all))
}
