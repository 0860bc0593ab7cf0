package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// cut has a shorter file take the place of another one, if that is still there. It isn't cut itself: what sendfile has queued of it would become zeroes on its
// way, where the kernel keeps files in large pieces.
func cut(name string, bytes int64, temp string) error {
	content, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if err := os.WriteFile(temp, content[:min(int64(len(content)), bytes)], 0o640); err != nil {
		return err
	}
	return errors.Join(unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, name, unix.RENAME_EXCHANGE), os.Remove(temp))
}
