// Package testtools tells tests whether the programs that they need are installed, and how much time they may take.
package testtools

import (
	"os"
	"os/exec"
	"testing"
)

// Require names the environment variable that forbids skipping: when it is set to anything, a missing program fails the test.
const Require = "ACPROXY_TEST_REQUIRE_TOOLS"

// Need skips the test, with the reason, if one of the named programs is not in the PATH, or fails it if [Require] is set.
func Need(tb testing.TB, names ...string) {
	tb.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if os.Getenv(Require) != "" {
			tb.Fatalf("%s is not installed, and %s forbids skipping", name, Require)
		}
		tb.Skipf("%s is not installed", name)
	}
}

// Brief says whether a test that tries the same with a lot of data should do so with less of it: with -short, and under the race detector, which sees
// nothing new in it.
func Brief() bool { return testing.Short() || Raced }
