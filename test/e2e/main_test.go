// Package e2e runs the built acproxy as nodes and operators do: against a publisher that misbehaves on demand, through every front door.
package e2e

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

	"github.com/acproxy/acproxy/internal/testtools"
)

// coverDir names the environment variable that asks for coverage of the server under test; what it names is where the counters go.
const coverDir = "GOCOVERDIR"

// binary is the acproxy under test. TestMain sets it before any test runs.
var binary string

func TestMain(m *testing.M) {
	guard()
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "acproxy-e2e-bin-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary = filepath.Join(dir, "acproxy")
	args := []string{"build", "-o", binary}
	if testtools.Raced {
		args = append(args, "-race")
	}
	if os.Getenv(coverDir) != "" {
		args = append(args, "-cover", "-coverpkg=github.com/acproxy/acproxy/...")
	}
	build := exec.Command("go", append(args, "github.com/acproxy/acproxy/cmd/acproxy")...)
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("building acproxy: %w\n%s", err, out)
	}
	return m.Run(), nil
}

// guard makes everything in this process that has no dialer of its own fail to reach anything but this machine. The servers under test get a
// configuration in which no name leads anywhere else.
func guard() {
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("a test may not ask for names")
	}}
	http.DefaultTransport = &http.Transport{DialContext: dialLoopback}
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

func TestGuard(t *testing.T) {
	for _, address := range []string{"http://192.0.2.1/", "http://example.com/"} {
		if resp, err := http.Get(address); err == nil {
			_ = resp.Body.Close()
			t.Errorf("Get(%s) was answered", address)
		}
	}
	if _, err := net.LookupHost("example.com"); err == nil {
		t.Error("example.com was looked up")
	}
}
