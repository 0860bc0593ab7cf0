//go:build !linux

package main

import "os/exec"

// dieWithUs does nothing where processes can't be bound to another one's life.
func dieWithUs(*exec.Cmd) {}
