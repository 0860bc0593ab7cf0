package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/acproxy/acproxy/internal/testtools"
)

// TestSessionOfTheTrustDocument runs the session of docs/trust.md with the real gpg and this acproxy, in one shell, and compares what it prints:
// … stands for any text, as a line of its own for any number of lines.
func TestSessionOfTheTrustDocument(t *testing.T) {
	testtools.Need(t, "gpg", "bash", "tar", "awk", "sed")
	steps := session(t, "../../docs/trust.md")
	// The agent's socket needs a short path.
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", filepath.Join(dir, "gnupg"), "--kill", "all").Run()
		_ = os.RemoveAll(dir)
	})
	var script strings.Builder
	// TestMain has put acproxy, which is this binary, into the PATH.
	fmt.Fprintf(&script, "acproxy() { command acproxy --data-dir %q \"$@\"; }\n", filepath.Join(dir, "data"))
	for i, step := range steps {
		fmt.Fprintf(&script, "%s\necho '%s%d'\n", step.command, mark, i)
	}
	cmd := exec.Command("bash")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(script.String())
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TZ=UTC")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	rest := string(out)
	for i, step := range steps {
		got, after, ok := strings.Cut(rest, fmt.Sprintf("%s%d\n", mark, i))
		if !ok {
			t.Fatalf("$ %s\ndidn't end:\n%s", step.command, rest)
		}
		rest = after
		if !step.matches(got) {
			t.Errorf("$ %s\nprints\n%s\nand the document says\n%s", step.command, got, step.output)
		}
	}
}

const mark = "---- end of step "

// step is a command of the session and what the document says that it prints.
type step struct{ command, output string }

// session returns the commands in the console blocks between <!-- session --> and <!-- end of session -->.
func session(t *testing.T, file string) []step {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, part, _ := strings.Cut(string(text), "<!-- session -->")
	part, _, ok := strings.Cut(part, "<!-- end of session -->")
	if !ok {
		t.Fatalf("%s has no session", file)
	}
	var steps []step
	inside := false
	for line := range strings.Lines(part) {
		command, isCommand := strings.CutPrefix(line, "$ ")
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```console\n"
		case !inside:
		case isCommand:
			steps = append(steps, step{command: strings.TrimSuffix(command, "\n")})
		case len(steps) > 0:
			steps[len(steps)-1].output += line
		}
	}
	if len(steps) < 20 {
		t.Fatalf("the session of %s has %d commands", file, len(steps))
	}
	return steps
}

func (s step) matches(got string) bool {
	var pattern strings.Builder
	for line := range strings.Lines(s.output) {
		if line == "…\n" {
			pattern.WriteString(`(?:.*\n)*?`)
			continue
		}
		pattern.WriteString(strings.ReplaceAll(regexp.QuoteMeta(line), "…", ".*"))
	}
	return regexp.MustCompile(`^` + pattern.String() + `$`).MatchString(got)
}
