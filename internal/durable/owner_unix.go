//go:build unix

package durable

import (
	"os"
	"syscall"
)

// openMade opens a directory that was just made, and nothing that was put in its place.
func openMade(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
}

// inherit gives a file that root has just made to whom the directory above it belongs. It goes by the open file: what has its name by now may be something
// else, as the directory isn't root's.
func inherit(f *os.File, above string) error {
	info, err := os.Stat(above)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}
