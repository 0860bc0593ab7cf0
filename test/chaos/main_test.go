//go:build linux && amd64

package chaos

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// everything reports whether every call of every operation is to be tried, in every way. Otherwise it is some, so that it takes about a minute.
func everything() bool { return os.Getenv("ACPROXY_CHAOS") != "" }

// binary is the acproxy under test. TestMain sets it before any test runs. It is never one that looks for races: that would be many times slower, and
// they are looked for elsewhere.
var binary string

func TestMain(m *testing.M) {
	http.DefaultTransport = &http.Transport{DialContext: dialLoopback}
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "acproxy-chaos-bin-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary = filepath.Join(dir, "acproxy")
	build := exec.Command("go", "build", "-o", binary, "github.com/acproxy/acproxy/cmd/acproxy")
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("building acproxy: %w\n%s", err, out)
	}
	defer func() { err = errors.Join(err, closeWorlds()) }()
	code = m.Run()
	tally.print(os.Stdout)
	return code, nil
}

// dialLoopback connects to this machine and nothing else.
func dialLoopback(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().IsLoopback() {
		return nil, fmt.Errorf("a test may not dial %s", address)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}
