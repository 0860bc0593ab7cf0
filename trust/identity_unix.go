//go:build unix

package trust

import (
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// An identity tells whether what lies at a path is still what was read from it. The kernel sets the change time whenever a file's content
// or its mode changes, and no program can choose it.
type identity struct {
	missing     bool
	unreadable  bool
	link        bool // a symbolic link: target's fields are below, the link's own are not told
	device, ino uint64
	mode        uint32
	size        int64
	modified    int64 // nanoseconds since 1970
	changed     int64
}

// identify looks at what lies at a path, and for a symbolic link at what it leads to.
func identify(path string) identity {
	info, err := os.Lstat(path)
	if err != nil {
		missing := errors.Is(err, fs.ErrNotExist)
		return identity{missing: missing, unreadable: !missing}
	}
	link := info.Mode()&fs.ModeSymlink != 0
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{link: link, unreadable: true}
	}
	return identity{
		link: link, device: uint64(st.Dev), ino: st.Ino, mode: uint32(st.Mode), size: st.Size, //nolint:unconvert // the types differ by system
		modified: st.Mtim.Nano(), changed: st.Ctim.Nano(),
	}
}

// settledAt reports whether the identity can be relied on: what lies there was left alone long enough for the next change to show.
func (i identity) settledAt(now time.Time) bool {
	return !i.unreadable && now.Sub(time.Unix(0, i.changed)) > settled
}
