package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/coreos/ignition/v2/config/v3_0"
)

// TestIgnitionValidates has Ignition itself read the snippets for nodes. test/deploy does what they say, and reads those for version 2 strictly: the module
// that Ignition's own reading of them stands on can't be had any more.
func TestIgnitionValidates(t *testing.T) {
	names, err := filepath.Glob("../rkt/ignition-3.*.json")
	if err != nil || len(names) != 2 {
		t.Fatalf("there are %q, %v", names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, report, err := v3_0.Parse(text); err != nil || len(report.Entries) > 0 {
			t.Errorf("%s: %v\n%s", name, err, report.String())
		}
	}
}
