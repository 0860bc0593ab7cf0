package main

import (
	"fmt"
	"net"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A stampedConn knows when what was read from it last had arrived: as the system has noted it (SO_TIMESTAMPNS, socket(7)), before whoever reads it had its turn. To
// what waits in a socket the system may append what comes after it, with the time of that: so it had arrived then at the latest.
type stampedConn struct {
	*net.TCPConn
	raw     syscall.RawConn
	control [128]byte
	at      time.Time
}

// stamped has the arrival of what a connection reads be noted.
func stamped(conn net.Conn) (net.Conn, error) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn, nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1) })
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, fmt.Errorf("having arrivals noted: %w", err)
	}
	return &stampedConn{TCPConn: tcp, raw: raw}, nil
}

// Read is the connection's.
func (c *stampedConn) Read(p []byte) (n int, err error) {
	c.at = time.Time{}
	var controls int
	waited := c.raw.Read(func(fd uintptr) bool {
		for {
			n, controls, _, _, err = unix.Recvmsg(int(fd), p, c.control[:], unix.MSG_DONTWAIT)
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	switch {
	case waited != nil:
		return 0, waited
	case err != nil:
		return 0, err
	case n == 0 && len(p) > 0:
		return c.TCPConn.Read(p) // which says what the end is
	}
	messages, err := unix.ParseSocketControlMessage(c.control[:controls])
	if err != nil {
		return n, err
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
			at := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
			c.at = time.Unix(at.Unix())
		}
	}
	return n, nil
}

// arrived returns when all of what was read from a connection by its last Read had arrived, by the wall clock; zero if that isn't known.
func arrived(conn net.Conn) time.Time {
	if c, ok := conn.(*stampedConn); ok {
		return c.at
	}
	return time.Time{}
}
