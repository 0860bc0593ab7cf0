package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// TestSessionOfTheTrustDocument runs the session of docs/trust.md with the real gpg and this acproxy.
func TestSessionOfTheTrustDocument(t *testing.T) {
	testtools.Need(t, "gpg", "bash", "tar", "awk", "sed")
	// The agent's socket needs a short path.
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", filepath.Join(dir, "gnupg"), "--kill", "all").Run()
		_ = os.RemoveAll(dir)
	})
	play(t, dir, "../../docs/trust.md", 20, fmt.Sprintf("acproxy() { command acproxy --data-dir %q \"$@\"; }\n", filepath.Join(dir, "data")))
}

// TestSessionOfTheAirGapDocument runs the session of docs/air-gap.md, from a store that was filled by serving to one that never saw a publisher.
func TestSessionOfTheAirGapDocument(t *testing.T) {
	testtools.Need(t, "bash", "tar")
	dir := t.TempDir()
	s := &scene{dir: dir}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.close() })
	var err error
	if s.key, err = trusttest.NewKey(trusttest.Options{Name: "Example Publisher", Email: "images@example.com"}); err != nil {
		t.Fatal(err)
	}
	app := acitest.Dependency{Name: "example.com/app", Labels: labelsOf("1.0.0")}
	for _, im := range []struct {
		name, version string
		spec          acitest.Spec
	}{
		{"app", "1.0.0", acitest.Spec{Files: map[string]string{"hello.txt": "hello\n"}}},
		{"app", "2.0.0", acitest.Spec{Files: map[string]string{"hello.txt": "hello again\n"}}},
		{"web", "1.0.0", acitest.Spec{Files: map[string]string{"index.html": "hello\n"}, Dependencies: []acitest.Dependency{app}}},
	} {
		im.spec.Name, im.spec.Labels = "example.com/"+im.name, labelsOf(im.version)
		bytesOf, err := acitest.Build(im.spec)
		if err != nil {
			t.Fatal(err)
		}
		signature, err := s.key.Sign(bytes.NewReader(bytesOf), trusttest.SignOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.publisher.Add(publisher.Image{Name: im.spec.Name, Labels: im.spec.Labels, ACI: bytesOf, Signature: signature}); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"connected.yaml": fmt.Sprintf(publisherConfig, filepath.Join(dir, "connected"), s.publisher.Addr(), s.caFile()),
		"isolated.yaml":  "data_dir: isolated\noffline: true\n",
		"cluster.txt":    "example.com/web:1.0.0        # needs example.com/app, which comes along\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	holdAll(t, filepath.Join(dir, "connected.yaml"), s.key, "web.aci?version=1.0.0", "app.aci?version=1.0.0", "app.aci?version=2.0.0")
	play(t, dir, "../../docs/air-gap.md", 10, "FINGERPRINT="+s.key.Fingerprint()+"\n")
}

// holdAll fills the store of a configuration by serving images of example.com.
func holdAll(t *testing.T, file string, key *trusttest.Key, images ...string) {
	t.Helper()
	cfg, err := (&options{configFile: file}).load()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Add(trustDirs(cfg), "example.com", key.Armored()); err != nil {
		t.Fatal(err)
	}
	cfg.Admin.Listen = nil
	n, err := start(cfg, func() (*config.Config, error) { return cfg, nil }, &logs{Logger: slog.New(slog.DiscardHandler), level: new(slog.LevelVar)})
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range images {
		url := n.addresses()[0] + "/.acproxy/images/example.com/" + image + "&os=linux&arch=amd64"
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v\n%s", url, resp.Status, err, body)
		}
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
}

// play runs a document's session in one shell, in a directory and after a prelude, and compares what it prints: … stands for any text, as a line of its
// own for any number of lines. A session has so many commands at least.
func play(t *testing.T, dir, document string, least int, prelude string) {
	t.Helper()
	steps := session(t, document, least)
	var script strings.Builder
	// TestMain has put acproxy, which is this binary, into the PATH.
	script.WriteString(prelude)
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
func session(t *testing.T, file string, least int) []step {
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
	if len(steps) < least {
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
