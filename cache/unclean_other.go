//go:build !linux

package cache

import "syscall"

// errUnclean is what file systems say of a file that they can't read: elsewhere they have no other word for damage of their own.
const errUnclean = syscall.EIO
