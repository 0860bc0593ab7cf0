package main

import (
	"os/exec"
	"syscall"
)

// dieWithUs has a process killed when this one is, so that no server is left behind.
func dieWithUs(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
