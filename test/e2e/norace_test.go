//go:build !race

package e2e

// raceEnabled says whether this test binary looks for data races; then the server under test does, too.
const raceEnabled = false
