package acme

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain finds goroutines that a client has left. Those that validate within pebble have no end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.(*VAImpl).processTasks"),
	)
}
