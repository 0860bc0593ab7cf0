//go:build !linux

package main

import (
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"
)

// endsWithUs keeps the terminal's signals from a process; only Linux can end it with this one.
func endsWithUs() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// onSmallDisk can't be done here: the command doesn't start, and the drill fills the disk in its other way.
func onSmallDisk(cmd *exec.Cmd, _, _ string) { cmd.Path = "" }

// inside returns what a path that a process sees is called out here.
func inside(_ int, path string) string { return path }

// newOnSmallDisk returns nothing, as onSmallDisk does.
func newOnSmallDisk() *cobra.Command {
	return &cobra.Command{Use: "on-small-disk", Short: "Does nothing here", Hidden: true}
}
