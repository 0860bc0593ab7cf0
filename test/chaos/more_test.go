//go:build linux && amd64

package chaos

import (
	"bytes"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/tracer"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// TestOutOfDescriptors takes the file descriptors away from a server, so that it can neither accept connections nor open files, and gives them back.
func TestOutOfDescriptors(t *testing.T) {
	w := worldOf(t, "cut-through")
	r := w.newRun(t, w.stores["base"].data)
	p := r.serve(w.live)
	r.get(p, held)
	pid := p.cmd.Process.Pid
	limit := func(soft uint64) {
		t.Helper()
		var now unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &now); err != nil {
			t.Fatal(err)
		}
		now.Cur = min(soft, now.Max)
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &now, nil); err != nil {
			t.Fatal(err)
		}
	}
	open, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	impatient := &http.Client{Transport: w.client.Transport, Timeout: 300 * time.Millisecond}
	// With none left it can't be reached; with a few, connections come in and nothing can be opened for them.
	for left := range uint64(8) {
		limit(uint64(len(open)) + left)
		for _, of := range []ref{held, cold} {
			resp, err := impatient.Get(p.url() + of.path())
			if err != nil {
				continue
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			switch {
			case resp.StatusCode == http.StatusOK && (err != nil || bytes.Equal(b, w.images[of].aci)):
			case resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(b), acproxy.CodeShortage) && resp.Header.Get("Retry-After") != "":
			default:
				t.Errorf("with %d descriptors left, %v is answered with %s, %d bytes: %.500q", left, of, resp.Status, len(b), b)
			}
		}
		select {
		case <-p.exited:
			t.Fatalf("with %d descriptors left it ended with %s\n%s", left, describe(p.status), p.output())
		default:
		}
	}
	limit(1 << 16)
	r.wantHeld(p, []ref{held, moving, lost})
	if a := r.get(p, cold); !a.whole() {
		t.Errorf("there are descriptors again, and yet: %v\n%s", a, p.output())
	}
	p.stop()
	p = r.serve(w.alone)
	r.wantHeld(p, w.stores["base"].held)
	r.tidy(p)
}

// TestKillTrustCommands kills the commands that change which keys are trusted at each of their calls: no half of a key is ever there, and the next command
// does what the killed one was to do.
func TestKillTrustCommands(t *testing.T) {
	w := worldOf(t, "cut-through")
	key, err := trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA, Name: "Another"})
	if err != nil {
		t.Fatal(err)
	}
	file, config := w.path("another.asc"), w.path("own-keys.yaml")
	for path, content := range map[string]string{file: string(key.Armored()), config: "log: {format: json}\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	with := w.newRun(t, "")
	add := []string{"trust", "add", "--prefix", "example.org/app", "--yes", file}
	if out, err := with.command(config, add...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, tt := range []struct {
		name, from string
		args       []string
		there      bool // the key, when it is done
	}{
		{"add", "", add, true},
		{"rm", with.data, []string{"trust", "rm", "--prefix", "example.org/app", key.Fingerprint()}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := w.newRun(t, tt.from)
			p := launch(t, r.command(config, tt.args...), true, r.data, &tracer.Fault{})
			if status := p.wait(); !status.Exited() || status.ExitStatus() != 0 {
				t.Fatalf("acproxy %s: %s\n%s", strings.Join(tt.args, " "), describe(status), p.output())
			}
			calls := len(p.tracer.Calls())
			for at := 1; at <= calls; at++ {
				for _, after := range []bool{false, true} {
					if !everything() && after != (at%2 == 0) {
						continue
					}
					r := w.newRun(t, tt.from)
					p := launch(t, r.command(config, tt.args...), true, r.data, &tracer.Fault{At: at, Kill: true, After: after})
					p.wait()
					call := p.tracer.Hits()
					tally.killed("trust " + tt.name)
					r.wantKeys(t, key, nil, call)
					if out, err := r.command(config, "trust", "list").CombinedOutput(); err != nil {
						t.Errorf("killed at %v, after it %v: acproxy trust list: %v\n%s", call, after, err, out)
					}
					r.age(t)
					// What was done already is an error of rm; its second time is what there is to look at.
					_ = r.command(config, tt.args...).Run()
					_ = r.command(config, "trust", "list").Run()
					r.wantKeys(t, key, &tt.there, call)
				}
			}
			tally.calls("trust "+tt.name, calls)
		})
	}
}

// wantKeys checks that the only key there is whole or not there at all; and, unless that is left open, which of both.
func (r *run) wantKeys(t *testing.T, key *trusttest.Key, there *bool, killed []tracer.Call) {
	t.Helper()
	var keys []string
	err := filepath.WalkDir(filepath.Join(r.data, "trustedkeys"), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case os.IsNotExist(err):
			return nil
		case err != nil || entry.IsDir():
			return err
		case strings.HasPrefix(entry.Name(), ".tmp-"):
			if there != nil {
				t.Errorf("killed at %v: %s is left", killed, path)
			}
			return nil
		}
		b, err := os.ReadFile(path)
		if entry.Name() != key.Fingerprint() || !bytes.Equal(b, key.Armored()) {
			t.Errorf("killed at %v: %s holds %q", killed, path, b)
		}
		keys = append(keys, path)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if there != nil && (len(keys) == 1) != *there {
		t.Errorf("killed at %v, and done again: there are %q", killed, keys)
	}
}

// age makes all files of a run hours old.
func (r *run) age(t *testing.T) {
	t.Helper()
	then := time.Now().Add(-3 * time.Hour)
	err := filepath.WalkDir(r.data, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, then, then)
	})
	if err != nil {
		t.Error(err)
	}
}

// neither are the calls on files that neither change nor read any.
var neither = []string{"bind", "close", "connect", "epoll_ctl", "execve", "dup3", "fadvise64", "fcntl", "madvise", "mincore"}

// TestNoCallIsMissed has strace write down all that is done to the files of a server, from its first start to its end: there is no call among it that the
// tracer doesn't know.
func TestNoCallIsMissed(t *testing.T) {
	testtools.Need(t, "strace")
	w := worldOf(t, "cut-through")
	r := w.newRun(t, "")
	log := w.path("strace")
	cmd := r.command(w.live, "serve")
	cmd.Args = append([]string{"strace", "-f", "-y", "-qq", "-e", "trace=%file,%desc,%memory", "-o", log, cmd.Path}, cmd.Args[1:]...)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Path = strace
	p := launch(t, cmd, false, "", nil)
	p.serves()
	if a := r.get(p, cold); !a.whole() {
		t.Fatalf("%v\n%s", a, p.output())
	}
	r.inspected(p, cold)
	b, err := os.ReadFile(filepath.Join(r.data, "store", "lock"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.wait()
	b, err = os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	known := slices.Concat(neither, tracer.Names(false), tracer.Names(true))
	seen := 0
	for line := range strings.Lines(string(b)) {
		_, call, _ := strings.Cut(line, " ")
		name, args, ok := strings.Cut(strings.TrimSpace(call), "(")
		if !ok || strings.HasPrefix(call, "<...") || !strings.Contains(args, r.data+"/") {
			continue
		}
		seen++
		switch {
		case name == "mmap":
			if strings.Contains(args, "PROT_WRITE") && strings.Contains(args, "MAP_SHARED") {
				t.Errorf("a file is changed through memory: %s", line)
			}
		case !slices.Contains(known, name):
			t.Errorf("a call that nobody knows: %s", line)
		}
	}
	if seen < 100 {
		t.Errorf("strace saw only %d calls", seen)
	}
}
