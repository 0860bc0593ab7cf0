package cache

import "syscall"

// errUnclean is what the file systems of Linux say of a file of which their own notes are damaged.
const errUnclean = syscall.EUCLEAN
