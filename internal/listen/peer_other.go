//go:build !linux

package listen

import "net"

func peerOf(*net.UnixConn) peer { return "unix" }
