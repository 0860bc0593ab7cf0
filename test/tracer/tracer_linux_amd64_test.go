package tracer_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/tracer"
)

// tracee names the environment variable by which this test's binary is told to be the program that is traced, in a directory.
const tracee = "ACPROXY_TRACEE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(tracee); dir != "" {
		os.Exit(change(dir, os.Getenv("ACPROXY_TRACEE_WORKERS") != ""))
	}
	os.Exit(m.Run())
}

// change changes files, in a known order or by several goroutines at once, and says what failed.
func change(dir string, together bool) int {
	if together {
		var workers sync.WaitGroup
		for i := range 8 {
			workers.Go(func() {
				for j := range 5 {
					_ = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d-%d", i, j)), []byte("some text"), 0o600)
				}
			})
		}
		workers.Wait()
		return 0
	}
	failed := 0
	say := func(err error) {
		if err != nil {
			failed = 1
			fmt.Println(err)
		}
	}
	_, err := os.Stat(dir)
	say(err)
	say(os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	f, err := os.Create(filepath.Join(dir, "sub", "file"))
	say(err)
	n, err := f.Write([]byte("ten bytes\n"))
	say(err)
	if err == nil && n != 10 {
		say(fmt.Errorf("%d bytes were written", n))
	}
	say(f.Sync())
	say(f.Close())
	say(os.Rename(filepath.Join(dir, "sub", "file"), filepath.Join(dir, "file")))
	d, err := os.Open(dir)
	say(err)
	say(d.Sync())
	say(d.Close())
	say(os.Remove(filepath.Join(dir, "file")))
	say(os.WriteFile(dir+"-beside", nil, 0o600))
	return failed
}

// calls are those of change.
var calls = []string{
	"mkdirat sub", "openat sub/file", "write sub/file", "fsync sub/file", "renameat sub/file → file", "fsync .", "unlinkat file",
}

// reads are those of its calls that only read.
var reads = []string{"newfstatat .", "newfstatat file", "openat ."}

// trace runs change under the tracer to its end.
func trace(t *testing.T, fault tracer.Fault, env ...string) (p *tracer.Process, dir, output string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(append(os.Environ(), tracee+"="+dir), env...)
	p, err = tracer.Start(cmd, dir, &fault)
	if errors.Is(err, syscall.EPERM) {
		t.Skipf("this machine doesn't let a process trace its child: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Exited():
	case <-time.After(time.Minute):
		t.Fatal("the program doesn't end")
	}
	b, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return p, dir, string(b)
}

func names(calls []tracer.Call) []string {
	var out []string
	for _, c := range calls {
		out = append(out, c.String())
	}
	return out
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestCounts(t *testing.T) {
	p, _, output := trace(t, tracer.Fault{})
	if got := names(p.Calls()); !slices.Equal(got, calls) {
		t.Errorf("calls %q, want %q", got, calls)
	}
	if status := p.Status(); !status.Exited() || status.ExitStatus() != 0 || output != "" || len(p.Hits()) != 0 {
		t.Errorf("it ended with %v, hits %v, and said %q", status, p.Hits(), output)
	}
}

// TestReads has only those calls count that read, and one of them fail.
func TestReads(t *testing.T) {
	p, _, output := trace(t, tracer.Fault{Reads: true})
	if got := names(p.Calls()); !slices.Equal(got, reads) || output != "" {
		t.Errorf("calls %q, want %q; it said %q", got, reads, output)
	}
	p, _, output = trace(t, tracer.Fault{At: 1, Errno: syscall.EACCES, Reads: true})
	if got := names(p.Hits()); !slices.Equal(got, reads[:1]) || !strings.Contains(output, "permission denied") {
		t.Errorf("hits %q, want %q; it said %q", got, reads[:1], output)
	}
}

func TestKillsBeforeAndAfter(t *testing.T) {
	// What is there when the calls up to a number are done.
	done := func(dir string) []string {
		var made []string
		for _, name := range []string{"sub", "sub/file", "file"} {
			if exists(filepath.Join(dir, name)) {
				made = append(made, name)
			}
		}
		if b, err := os.ReadFile(filepath.Join(dir, "sub", "file")); err == nil && len(b) > 0 {
			made = append(made, "content")
		}
		return made
	}
	want := [][]string{nil, {"sub"}, {"sub", "sub/file"}, {"sub", "sub/file", "content"}, {"sub", "sub/file", "content"}, {"sub", "file"}, {"sub", "file"}, {"sub"}}
	for at := 1; at <= len(calls); at++ {
		for _, after := range []bool{false, true} {
			p, dir, _ := trace(t, tracer.Fault{At: at, Kill: true, After: after})
			done, want := done(dir), want[at-1:][map[bool]int{true: 1}[after]]
			if !slices.Equal(done, want) {
				t.Errorf("killed at call %d, after it %v: there are %q, want %q", at, after, done, want)
			}
			if status := p.Status(); !status.Signaled() || status.Signal() != syscall.SIGKILL {
				t.Errorf("it ended with %v, want it killed", status)
			}
			if got := names(p.Hits()); len(got) != 1 || got[0] != calls[at-1] {
				t.Errorf("the call that was hit is %q, want %q", got, calls[at-1])
			}
		}
	}
}

func TestFails(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault tracer.Fault
		says  []string // in this order
		hits  int
		there []string
	}{
		{"once", tracer.Fault{At: 5, Errno: syscall.EIO}, []string{"rename", "input/output error", "remove", "no such file"}, 1, []string{"sub", "sub/file"}},
		{"from then on", tracer.Fault{At: 5, Onward: true, Errno: syscall.EROFS}, []string{"rename", "read-only", "sync", "read-only", "remove", "read-only"}, 4, []string{"sub", "sub/file"}},
		{"though done", tracer.Fault{At: 5, After: true, Errno: syscall.ENOSPC}, []string{"rename", "no space left"}, 1, []string{"sub"}},
		{"half a write", tracer.Fault{At: 3, Short: true}, nil, 1, []string{"sub"}},
		{"half of what can't be halved", tracer.Fault{At: 4, Short: true}, nil, 0, []string{"sub"}},
		{"one of a kind", tracer.Fault{At: 2, Errno: syscall.EIO, Only: func(c tracer.Call) bool { return c.Name == "fsync" }}, []string{"sync", "input/output error"}, 1, []string{"sub"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, dir, output := trace(t, tt.fault)
			rest := output
			for _, word := range tt.says {
				_, after, ok := strings.Cut(rest, word)
				if !ok {
					t.Errorf("it said %q, without %q where that has to be", output, word)
				}
				rest = after
			}
			if len(tt.says) == 0 && output != "" {
				t.Errorf("it said %q", output)
			}
			if got := p.Hits(); len(got) != tt.hits {
				t.Errorf("hits %q, want %d", names(got), tt.hits)
			}
			for _, name := range []string{"sub", "sub/file", "file"} {
				if there := exists(filepath.Join(dir, name)); there != slices.Contains(tt.there, name) {
					t.Errorf("%s is there: %v", name, there)
				}
			}
		})
	}
}

// TestCountsAllThreads has threads write at once: none of their calls is missed, and a kill leaves exactly those before it.
func TestCountsAllThreads(t *testing.T) {
	const all = 8 * 5 * 2 // a file is opened and written
	p, _, _ := trace(t, tracer.Fault{}, "ACPROXY_TRACEE_WORKERS=8")
	if got := len(p.Calls()); got != all {
		t.Errorf("%d calls, want %d", got, all)
	}
	for _, at := range []int{1, 17, 40, all} {
		p, dir, _ := trace(t, tracer.Fault{At: at, Kill: true}, "ACPROXY_TRACEE_WORKERS=8")
		opened := len(slices.DeleteFunc(p.Calls()[:at-1], func(c tracer.Call) bool { return c.Name != "openat" }))
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		// Other threads may have been in the middle of a call.
		if made := len(entries); made > opened+8 || made < opened-8 {
			t.Errorf("killed at call %d, %d files opened before: %d are there", at, opened, made)
		}
	}
}

func TestSignalAndAwait(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "echo > "+dir+"/file; exec sleep 60")
	p, err := tracer.Start(cmd, dir, &tracer.Fault{})
	if errors.Is(err, syscall.EPERM) {
		t.Skipf("this machine doesn't let a process trace its child: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Await(t.Context(), func(calls []tracer.Call) bool { return len(calls) == 2 }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if status := p.Status(); !status.Signaled() || status.Signal() != syscall.SIGTERM {
			t.Errorf("it ended with %v, want it ended by SIGTERM", status)
		}
	}
	if _, err := tracer.Start(exec.Command("/nothing"), dir, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Start of nothing = %v, want an error that it doesn't exist", err)
	}
}

// TestSeesWhatStraceSees has strace write down all that the program does, and compares.
func TestSeesWhatStraceSees(t *testing.T) {
	testtools.Need(t, "strace")
	for _, tt := range []struct {
		reads bool
		calls []string
	}{{false, calls}, {true, reads}} {
		dir := filepath.Join(t.TempDir(), "dir")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		log := filepath.Join(t.TempDir(), "log")
		cmd := exec.Command("strace", "-f", "-y", "-qq", "-e", "trace=?"+strings.Join(tracer.Names(tt.reads), ",?"), "-o", log, os.Args[0])
		cmd.Env = append(os.Environ(), tracee+"="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		var seen []string
		for line := range bytes.Lines(b) {
			_, call, _ := strings.Cut(string(line), " ")
			name, args, ok := strings.Cut(strings.TrimSpace(call), "(")
			other := name == "openat" && strings.Contains(args, "O_RDONLY") != tt.reads
			if ok && strings.Contains(args, dir) && !strings.Contains(args, dir+"-beside") && !other {
				seen = append(seen, name)
			}
		}
		var want []string
		for _, call := range tt.calls {
			name, _, _ := strings.Cut(call, " ")
			want = append(want, name)
		}
		if !slices.Equal(seen, want) {
			t.Errorf("strace saw %q, the tracer %q", seen, want)
		}
	}
}
