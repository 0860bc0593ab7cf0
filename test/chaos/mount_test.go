//go:build linux && amd64

package chaos

import (
	"bufio"
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/tracer"
)

// A room is a place with mounts of its own, which nobody outside sees, and which end with it.
type room struct {
	t   *testing.T
	pid int
}

// newRoom makes a room and runs a shell script in it, which finds its arguments as $1, $2 and so on. The test is skipped where it may not, or where what the
// script mounts can't be.
func newRoom(t *testing.T, script string, args ...string) *room {
	t.Helper()
	testtools.Need(t, "unshare", "nsenter", "mount")
	options := []string{"--mount", "--propagation", "private"}
	if os.Geteuid() != 0 {
		options = append(options, "--user", "--map-root-user")
	}
	shell := append([]string{"sh", "-e", "-c", script + "\necho ready\nexec cat", "sh"}, args...)
	cmd := exec.Command("unshare", append(options, shell...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	if line != "ready\n" {
		stdin.Close()
		_ = cmd.Wait()
		t.Skipf("this machine doesn't let a process mount anything for itself: %s", strings.TrimSpace(stderr.String()))
	}
	return &room{t: t, pid: cmd.Process.Pid}
}

// enter makes a command run in the room.
func (m *room) enter(cmd *exec.Cmd) *exec.Cmd {
	m.t.Helper()
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		m.t.Fatal(err)
	}
	options := []string{"nsenter", "--target", fmt.Sprint(m.pid), "--mount"}
	if os.Geteuid() != 0 {
		options = append(options, "--user", "--preserve-credentials")
	}
	cmd.Path, cmd.Args = nsenter, append(append(options, cmd.Path), cmd.Args[1:]...)
	return cmd
}

// run runs a shell script in the room.
func (m *room) run(script string, args ...string) {
	m.t.Helper()
	if out, err := m.enter(exec.Command("sh", append([]string{"-e", "-c", script, "sh"}, args...)...)).CombinedOutput(); err != nil {
		m.t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// serve starts a server of a run in the room.
func (m *room) serve(r *run, config string) *process {
	m.t.Helper()
	p := launch(m.t, m.enter(r.command(config, "serve")), false, "", nil)
	p.serves()
	return p
}

// wantReadOnly checks that a server gives what is held, and says of an image that it would have to fetch why it can't.
func (r *run) wantReadOnly(p *process, missing ref) {
	r.t.Helper()
	r.wantHeld(p, r.w.stores["base"].held)
	a := r.get(p, missing)
	if code, _ := a.problem(); a.status != http.StatusInsufficientStorage || code != "store-read-only" {
		r.t.Errorf("on a read-only file system: %v, want a problem with status 507 and the code store-read-only\n%s", a, p.output())
	}
	for path, want := range map[string]int{"/.acproxy/healthz": http.StatusOK, "/.acproxy/readyz": http.StatusServiceUnavailable} {
		resp, err := r.w.client.Get(p.url() + path)
		if err != nil {
			r.t.Error(err)
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			r.t.Errorf("on a read-only file system %s is answered with %d, want %d", path, resp.StatusCode, want)
		}
	}
}

// TestBecomesReadOnly makes every change of a file fail as it does when a file system has become read-only under a server.
func TestBecomesReadOnly(t *testing.T) {
	w := worldOf(t, "cut-through")
	r := w.newRun(t, w.stores["base"].data)
	p := r.trace(w.live, nil)
	p.serves()
	p.says("the index is complete")
	p.tracer.Arm(tracer.Fault{At: 1, Onward: true, Errno: syscall.EROFS})
	r.wantReadOnly(p, cold)
	// What asks for the latest gets what there is.
	if a := r.get(p, moving.at("")); !a.whole() {
		t.Errorf("the latest that is held is not served: %v\n%s", a, p.output())
	}
	p.tracer.Disarm()
	if a := r.get(p, cold); !a.whole() {
		t.Errorf("it can be written again, and yet: %v\n%s", a, p.output())
	}
	r.tidy(p)
}

// TestBrokenFileSystem has a real file system become read-only because of an error on it.
func TestBrokenFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount an image of a file system")
	}
	// No reason to install anything: the tracer has shown the same before, on any machine.
	for _, program := range []string{"mkfs.ext4", "findmnt"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	w := worldOf(t, "cut-through")
	r := w.newRun(t, w.stores["base"].data)
	disk := w.path("disk")
	m := newRoom(t, `
truncate -s 32M "$1"
mkfs.ext4 -q "$1"
mkdir "$1.old"
mount --move "$2" "$1.old" 2>/dev/null || cp -a "$2" "$1.old/"
mount -o loop,errors=remount-ro "$1" "$2"
cp -a "$1.old/$(basename "$2")/." "$2/"`, disk, r.data)
	p := m.serve(r, w.live)
	r.get(p, held)
	m.run(`source=$(findmnt -n -o SOURCE "$1"); echo an error > "/sys/fs/ext4/${source#/dev/}/trigger_fs_error"`, r.data)
	r.wantReadOnly(p, cold)
	if status := p.end(syscall.SIGTERM); !status.Exited() {
		t.Errorf("it ended with %s", describe(status))
	}
}

// TestStartsReadOnly starts on a store that can't be written.
func TestStartsReadOnly(t *testing.T) {
	w := worldOf(t, "cut-through")
	for _, from := range []string{"base", "killed", "half"} {
		t.Run(from, func(t *testing.T) {
			r := w.newRun(t, w.stores[from].data)
			m := newRoom(t, `mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"`, r.data)
			p := m.serve(r, w.live)
			r.wantReadOnly(p, torn)
			p.stop()
			// Nothing was lost by that.
			p = r.serve(w.alone)
			r.wantHeld(p, w.stores[from].held)
			p.stop()
		})
	}
}

// TestSmallFileSystem fills a small file system, and makes room again.
func TestSmallFileSystem(t *testing.T) {
	w := worldOf(t, "verify-first")
	r := w.newRun(t, w.stores["base"].data)
	m := newRoom(t, `mount -t tmpfs -o size=8m,mode=700 none "$1"; dd if=/dev/zero of="$1/ballast" bs=1M count=2 2>/dev/null`, r.data)
	p := m.serve(r, w.live)
	var kept []ref
	var full ref
	for i := range 100 {
		of := w.publish(t, ref{fmt.Sprintf("filling%d", i), "1.0.0"}, 512<<10).ref
		a := r.get(p, of)
		if a.whole() {
			kept = append(kept, of)
			continue
		}
		if _, ok := a.problem(); !ok || a.status != http.StatusInsufficientStorage {
			t.Errorf("on a full file system: %v, want a problem with status 507", a)
		}
		full = of
		break
	}
	if len(kept) == 0 || full == (ref{}) {
		t.Fatalf("%d images found room on 8 MiB", len(kept))
	}
	t.Logf("%d images of 512 KiB found room on 8 MiB", len(kept))
	for range 3 {
		r.get(p, full)
		r.wantHeld(p, kept)
	}
	// Nor is what is held out of reach after a restart, polite or not.
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		m.run(`dd if=/dev/zero of="$1/more" bs=4k 2>/dev/null || true`, r.data)
		p.end(signal)
		p = m.serve(r, w.live)
		r.wantHeld(p, kept)
		if a := r.get(p, full); a.status != http.StatusInsufficientStorage {
			t.Errorf("started on a full file system: %v, want a problem with status 507", a)
		}
	}
	m.run(`rm "$1/ballast" "$1/more"`, r.data)
	if a := r.get(p, full); !a.whole() {
		t.Errorf("there is room again, and yet: %v\n%s", a, p.output())
	}
	p.stop()
	p = m.serve(r, w.alone)
	r.wantHeld(p, append(kept, full))
	r.data = filepath.Join(fmt.Sprintf("/proc/%d/root", m.pid), r.data)
	r.tidy(p)
}
