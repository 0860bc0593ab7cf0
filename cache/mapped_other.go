//go:build !linux

package cache

import "os"

func residentFiles(*os.File) int64 { return 0 }

func openStatm() *os.File { return nil }

func giveBack(uintptr, int64) {}
