package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// need is testtools.Need of acproxy's own module, which this one doesn't depend on.
func need(tb testing.TB, names ...string) {
	tb.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("ACPROXY_TEST_REQUIRE_TOOLS") != "" {
				tb.Fatalf("%s is not installed, and ACPROXY_TEST_REQUIRE_TOOLS forbids skipping", name)
			}
			tb.Skipf("%s is not installed", name)
		}
	}
}

// needRoom skips what mounts, makes networks and changes users, where that may not be done.
func needRoom(t *testing.T) {
	t.Helper()
	need(t, "unshare", "mount", "chroot", "setpriv", "ip", "curl")
	if os.Geteuid() != 0 {
		t.Skip("only root may change users")
	}
	out, err := exec.Command("unshare", "--mount", "--net", "--pid", "--fork", "--propagation", "private", "sh", "-euc", `
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" overlay "$1/root"
ip link set lo up`, "sh", t.TempDir()).CombinedOutput()
	if err != nil {
		t.Skipf("this machine doesn't let a process mount anything for itself: %v\n%s", err, out)
	}
}

const (
	testVersion = "1.2.3-rc.1"
	testDate    = "1700000000"
)

// built is what one build of the source has made, for all tests.
var built struct {
	once sync.Once
	dir  string // of everything
	out  string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		if err := os.RemoveAll(built.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// dist returns the directory of what is released, for this machine's architecture alone.
func dist(t *testing.T) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "acproxy-dist-"); built.err != nil {
			return
		}
		source := filepath.Join(built.dir, "source")
		if built.err = copySource(source); built.err != nil {
			return
		}
		built.out = filepath.Join(built.dir, "out")
		built.err = buildIn(source, built.out)
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.out
}

// buildIn builds source as make dist does, in a process of its own.
func buildIn(source, out string, env ...string) error {
	program := filepath.Join(built.dir, "build")
	if _, err := os.Stat(program); err != nil {
		if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
	}
	cmd := exec.Command(program, "-source", source, "-out", out, "-version", testVersion, "-arch", runtime.GOARCH)
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH="+testDate), env...)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, text)
	}
	return nil
}

// copySource copies the source as it lies here, changes that are not committed included, with the history that go build reads the commit from.
func copySource(to string) error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	if out, err := exec.Command("git", "clone", "-q", "--no-checkout", root, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying the source: %w\n%s", err, out)
	}
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	names, err := list.Output()
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(names), "\x00"), "\x00") {
		content, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed, and not yet committed
		}
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, name), content, 0o644); err != nil {
			return err
		}
	}
	reset := exec.Command("git", "reset", "-q")
	reset.Dir = to
	if out, err := reset.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// TestReproducible builds the same source again: somewhere else, with another umask, time zone and language, and with settings of Go that would change the
// result. Every byte has to be the same. With ACPROXY_TEST_COLD set nothing is used that was compiled before, which takes minutes.
func TestReproducible(t *testing.T) {
	need(t, "git", "bash")
	first := dist(t)
	source := filepath.Join(t.TempDir(), "some where", "else")
	if err := copySource(source); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "out")
	cmd := exec.Command("bash", "-c", `umask 077; exec "$0" "$@"`, filepath.Join(built.dir, "build"), "-source", source, "-out", second, "-version", testVersion, "-arch", runtime.GOARCH)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+testDate, "TZ=Asia/Tokyo", "LANG=de_DE.UTF-8", "GOFLAGS=-buildvcs=false", "GOAMD64=v3", "CGO_ENABLED=1", "HOME="+t.TempDir(),
		"GOMODCACHE="+goEnv(t, "GOMODCACHE"), "GOPROXY=off")
	cache := goEnv(t, "GOCACHE")
	if os.Getenv("ACPROXY_TEST_COLD") != "" {
		cache = t.TempDir()
	}
	cmd.Env = append(cmd.Env, "GOCACHE="+cache)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	a, b := tree(t, first), tree(t, second)
	for name, content := range a {
		switch other, ok := b[name]; {
		case !ok:
			t.Errorf("the second build lacks %s", name)
		case !bytes.Equal(content.content, other.content):
			t.Errorf("%s differs: %d and %d bytes", name, len(content.content), len(other.content))
		case content.mode != other.mode && !strings.HasPrefix(name, "oci/"):
			t.Errorf("%s has mode %v, then %v", name, content.mode, other.mode)
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			t.Errorf("the first build lacks %s", name)
		}
	}
	if len(a) < 8 {
		t.Errorf("only %d files were compared", len(a))
	}
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// tree returns all files under a directory.
func tree(t *testing.T, dir string) map[string]file {
	t.Helper()
	all := make(map[string]file)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		all[filepath.ToSlash(rel)] = file{path: rel, mode: info.Mode(), content: content}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// name returns the one file of what is released that a pattern means.
func name(t *testing.T, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dist(t), pattern))
	if err != nil || len(names) != 1 {
		t.Fatalf("%s means %q, %v", pattern, names, err)
	}
	return names[0]
}
