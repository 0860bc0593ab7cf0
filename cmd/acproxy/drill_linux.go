package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"
)

// endsWithUs has a process end when this one does, however it does.
func endsWithUs() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// onSmallDisk changes a command of acproxy to run in namespaces of its own, where a directory is a small file system that nobody else sees. No
// privilege is needed for that where the kernel lets users have namespaces.
func onSmallDisk(cmd *exec.Cmd, dir, size string) {
	cmd.Args = append([]string{cmd.Args[0], "on-small-disk", dir, size}, cmd.Args[1:]...)
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
}

// inside returns what a path that a process sees is called out here.
func inside(pid int, path string) string { return fmt.Sprintf("/proc/%d/root%s", pid, path) }

// newOnSmallDisk is the other end of onSmallDisk: it makes the file system and becomes the command.
func newOnSmallDisk() *cobra.Command {
	cmd := &cobra.Command{
		Use:    "on-small-disk DIR SIZE COMMAND…",
		Short:  "Run a command of acproxy in namespaces that were made for it, with a file system of its own",
		Hidden: true,
		Args:   args(cobra.MinimumNArgs(3)),
		RunE: func(_ *cobra.Command, args []string) error {
			// Outside of a namespace of its own it would be mounted for everybody.
			if os.Getpid() == 1 || !ownUserNamespace() {
				return usagef("on-small-disk is for acproxy drill, which makes namespaces for it")
			}
			if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("keeping mounts to ourselves: %w", err)
			}
			if err := syscall.Mount("acproxy-drill", args[0], "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=0700,size="+args[1]); err != nil {
				return fmt.Errorf("making a small file system: %w", err)
			}
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return syscall.Exec(exe, append([]string{os.Args[0]}, args[2:]...), os.Environ())
		},
	}
	// The flags are those of the command.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// ownUserNamespace reports whether this process is in another user namespace than the first one, whose map has all IDs (user_namespaces(7)).
func ownUserNamespace() bool {
	var inner, outer, n uint64
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	_, err = fmt.Sscan(string(b), &inner, &outer, &n)
	return err == nil && n == 1
}
