//go:build !unix

package durable

import "os"

// openMade opens a directory that was just made.
func openMade(dir string) (*os.File, error) { return os.Open(dir) }

// inherit has nothing to do where there is no root.
func inherit(*os.File, string) error { return nil }
