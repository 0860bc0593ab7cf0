package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// unpacked returns a directory with the content of the archive.
func unpacked(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("tar", "-xzf", name(t, "*.tar.gz"), "-C", dir, "--strip-components", "1").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// TestPages has mandoc look at all manual pages, for mistakes and for the style of what it doesn't like. Lines are as long as the help's.
func TestPages(t *testing.T) {
	need(t, "mandoc")
	pages, err := filepath.Glob(filepath.Join(unpacked(t), "man/man1/*.1.gz"))
	if err != nil || len(pages) < 30 {
		t.Fatalf("there are %d pages, %v", len(pages), err)
	}
	if out, err := exec.Command("gzip", append([]string{"-d"}, pages...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for i := range pages {
		pages[i] = strings.TrimSuffix(pages[i], ".gz")
	}
	out, err := exec.Command("mandoc", append([]string{"-Tlint"}, pages...)...).CombinedOutput()
	complaints := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(out)), "\n"), func(line string) bool {
		return line == "" || strings.Contains(line, "input text line longer than 80 bytes")
	})
	if len(complaints) > 0 {
		t.Errorf("mandoc: %v\n%s", err, strings.Join(complaints, "\n"))
	}
	// Each page that is named has to be there.
	named := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^\.BR (\S+) \(1\)|See \\fB(\S+)\\fR\(1\)`).FindAllStringSubmatch(string(text), -1) {
			named++
			file := filepath.Join(filepath.Dir(page), strings.ReplaceAll(m[1]+m[2], `\-`, "-")+".1")
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s names %s, which is no page", filepath.Base(page), m[1]+m[2])
			}
		}
	}
	if named < len(pages) {
		t.Errorf("%d pages name only %d others", len(pages), named)
	}
}

// TestBashCompletes presses tab in a real bash.
func TestBashCompletes(t *testing.T) {
	need(t, "bash")
	library := "/usr/share/bash-completion/bash_completion"
	if _, err := os.Stat(library); err != nil {
		t.Skip("bash-completion is not installed")
	}
	dir := unpacked(t)
	complete := func(line string) []string {
		t.Helper()
		cmd := exec.Command("bash", "--norc", "-c", `
. "$1"; . "$2"
COMP_LINE=$3 COMP_POINT=${#3} COMP_TYPE=9 COMP_KEY=9
read -ra COMP_WORDS <<<"$3"
[[ $3 == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { :; }
__start_acproxy
printf '%s\n' "${COMPREPLY[@]}"`, "bash", library, filepath.Join(dir, "bash-completion/completions/acproxy"), line)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "XDG_DATA_HOME="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", line, err, out)
		}
		return strings.Fields(string(out))
	}
	for _, test := range []struct {
		line string
		want []string
	}{
		{"acproxy heal", []string{"healthcheck"}},
		{"acproxy trust unm", []string{"unmask"}},
		{"acproxy serve --data", []string{"--data-dir"}},
		{"acproxy pin ", nil},
	} {
		if got := complete(test.line); !slices.Equal(got, test.want) {
			t.Errorf("%q is completed to %q, want %q", test.line, got, test.want)
		}
	}
}

// TestOtherShellsReadTheirCompletions has zsh and fish read theirs, where they are installed.
func TestOtherShellsReadTheirCompletions(t *testing.T) {
	dir := unpacked(t)
	for shell, args := range map[string][]string{
		"zsh":  {"-n", filepath.Join(dir, "zsh/vendor-completions/_acproxy")},
		"fish": {"--no-execute", filepath.Join(dir, "fish/vendor_completions.d/acproxy.fish")},
	} {
		if _, err := exec.LookPath(shell); err != nil {
			t.Logf("%s is not installed", shell)
			continue
		}
		if out, err := exec.Command(shell, args...).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
}

// TestNotices wants the licence of each module that is linked in.
func TestNotices(t *testing.T) {
	dir := unpacked(t)
	text, err := os.ReadFile(filepath.Join(dir, "NOTICES"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "version", "-m", name(t, "acproxy-*-linux-"+runtime.GOARCH)).Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == "dep" && !strings.Contains(string(text), "\n"+f[1]+" "+f[2]+": ") {
			t.Errorf("NOTICES has nothing of %s %s", f[1], f[2])
		}
	}
}
