package acproxy_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/testtools"
)

// TestReadmeBeginsWithTwoCommands holds the two commands that README begins with against what .ci/run calls.
func TestReadmeBeginsWithTwoCommands(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	want := "```sh\ngo run ./cmd/acproxy demo\ngo test ./...\n```"
	if first := fenced.FindString(string(readme)); first != want {
		t.Errorf("the first commands in README are\n%s\nand not\n%s", first, want)
	}
	ci, err := os.ReadFile(".ci/run")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"\ngo run ./cmd/acproxy demo --once\n", "=1 go test -race -timeout 12m \"${raced[@]}\"\n", "=1 go test -timeout 12m ./cmd/acproxy ./test/bench ./test/chaos\n"} {
		if !strings.Contains(string(ci), command) {
			t.Errorf(".ci/run doesn't call %q", strings.TrimSpace(command))
		}
	}
	for _, step := range []string{"go build -o bin/ ./cmd/acproxy ./test/publisher/cmd/publisher\n"} {
		if !strings.Contains(string(readme), step) {
			t.Errorf("README builds its programs in another way than this test: it doesn't say %q", strings.TrimSpace(step))
		}
	}
}

// step is a marked block of README:
//
//	<!-- file: NAME -->             the block is written to a file
//	<!-- start: until "TEXT" -->    it is a program that goes on running; what follows waits until it has printed TEXT
//	<!-- run: … -->                 it is run by bash, each of its commands has to succeed, and all parts of … hold:
//	     needs PROGRAM              skipped, or failed, where the program is missing
//	     prints "TEXT"              it prints TEXT (or 'TEXT')
//	     within a second            what came before takes effect in that time: it is tried again until then
type step struct {
	kind, rest, text string
	line             int
}

var marked = regexp.MustCompile("(?m)^<!-- (file|start|run):? ?(.*?) -->\n```(?:sh|yaml)\n((?:.*\n)*?)```$")

func steps(readme string) []step {
	var out []step
	for _, m := range marked.FindAllStringSubmatchIndex(readme, -1) {
		out = append(out, step{
			kind: readme[m[2]:m[3]], rest: readme[m[4]:m[5]], text: readme[m[6]:m[7]], line: 1 + strings.Count(readme[:m[0]], "\n"),
		})
	}
	return out
}

// patience is more than anything in README takes, on a machine that does other things too.
const patience = time.Minute

// TestReadme does what README says, in its order, in an empty directory, with the programs built from the source as it is and the publisher that
// README uses. Only the ports are others, so that the test disturbs nobody.
func TestReadme(t *testing.T) {
	testtools.Need(t, "bash", "curl", "gzip", "awk", "sed", "cmp")
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	all := steps(string(readme))
	if n := strings.Count(string(readme), "\n<!-- "); n != len(all) || n < 10 {
		t.Fatalf("README has %d marks, and %d of them stand before a block", n, len(all))
	}
	s := &stage{t: t, dir: t.TempDir(), bin: programs(t), ports: otherPorts(t, all)}
	t.Cleanup(s.end)
	for _, st := range all {
		st.text = s.ports.Replace(st.text)
		switch st.kind {
		case "file":
			if err := os.WriteFile(filepath.Join(s.dir, st.rest), []byte(st.text), 0o600); err != nil {
				t.Fatal(err)
			}
		case "start":
			s.start(st)
		case "run":
			s.run(st)
		}
	}
}

var address = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// otherPorts returns what puts free ports into the place of README's.
func otherPorts(t *testing.T, all []step) *strings.Replacer {
	t.Helper()
	var replacements []string
	for _, st := range all {
		for _, a := range address.FindAllString(st.text, -1) {
			if slices.Contains(replacements, a) {
				continue
			}
			// All stay open until all are found, so that no two are the same.
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			replacements = append(replacements, a, l.Addr().String())
		}
	}
	return strings.NewReplacer(replacements...)
}

// stage is where README is played.
type stage struct {
	t        *testing.T
	dir, bin string
	ports    *strings.Replacer
	running  []*background
}

func (s *stage) command(text string) *exec.Cmd {
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", text)
	cmd.Dir = s.dir
	cmd.Env = []string{"PATH=" + s.bin + ":" + os.Getenv("PATH"), "HOME=" + s.dir, "LANG=C.UTF-8", "TMPDIR=" + s.dir}
	return cmd
}

// background is a program that goes on running, and what it has printed.
type background struct {
	cmd  *exec.Cmd
	line int
	done chan struct{}

	mu     sync.Mutex
	output bytes.Buffer
	until  string
	seen   chan struct{} // closed when until was printed
}

// Write takes what the program prints.
func (b *background) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.output.Write(p)
	if b.until != "" && bytes.Contains(b.output.Bytes(), []byte(b.until)) {
		b.until = ""
		close(b.seen)
	}
	return len(p), nil
}

func (b *background) printed() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.output.String()
}

func (s *stage) start(st step) {
	s.t.Helper()
	until := quoted(st.rest, "until")
	if len(until) != 1 {
		s.t.Fatalf("README.md:%d: say when the program is ready: <!-- start: until \"TEXT\" -->", st.line)
	}
	b := &background{cmd: s.command("exec " + st.text), line: st.line, until: until[0], seen: make(chan struct{}), done: make(chan struct{})}
	b.cmd.Stdout, b.cmd.Stderr = b, b
	if err := b.cmd.Start(); err != nil {
		s.t.Fatalf("README.md:%d: %v", st.line, err)
	}
	s.running = append(s.running, b)
	// Ends with the program, which end stops and waits for.
	go func() {
		defer close(b.done)
		_ = b.cmd.Wait() // how it ended is told by what it printed
	}()
	select {
	case <-b.seen:
	case <-b.done:
		s.t.Fatalf("README.md:%d: %s ended:\n%s", st.line, strings.TrimSpace(st.text), b.printed())
	case <-time.After(patience):
		s.t.Fatalf("README.md:%d: %s hasn't printed %q within %v:\n%s", st.line, strings.TrimSpace(st.text), until[0], patience, b.printed())
	}
}

// end stops what was started, the last one first, as a person would with Ctrl-C.
func (s *stage) end() {
	for _, b := range slices.Backward(s.running) {
		if err := b.cmd.Process.Signal(syscall.SIGINT); err != nil {
			s.t.Errorf("README.md:%d: stopping: %v", b.line, err)
		}
		<-b.done
		if code := b.cmd.ProcessState.ExitCode(); code != 0 {
			s.t.Errorf("README.md:%d: ended by Ctrl-C its exit code is %d:\n%s", b.line, code, b.printed())
		}
	}
}

func (s *stage) run(st step) {
	s.t.Helper()
	for _, m := range regexp.MustCompile(`needs (\w+)`).FindAllStringSubmatch(st.rest, -1) {
		testtools.Need(s.t, m[1])
	}
	var again <-chan time.Time
	if strings.Contains(st.rest, "within a second") {
		// A machine that is busy with other tests may take longer.
		again = time.After(10 * time.Second)
	}
	for {
		err := s.once(st)
		if err == nil {
			return
		}
		select {
		case <-again:
			s.t.Fatal(err)
		default:
			if again == nil {
				s.t.Fatal(err)
			}
		}
	}
}

func (s *stage) once(st step) error {
	out, err := s.command(st.text).CombinedOutput()
	if err != nil {
		return fmt.Errorf("README.md:%d: %w\n%s\n%s%s", st.line, err, st.text, out, s.logs())
	}
	for _, want := range quoted(st.rest, "prints") {
		if want = s.ports.Replace(want); !strings.Contains(string(out), want) {
			return fmt.Errorf("README.md:%d: it doesn't print %q\n%s\n%s", st.line, want, st.text, out)
		}
	}
	return nil
}

func (s *stage) logs() string {
	var b strings.Builder
	for _, p := range s.running {
		fmt.Fprintf(&b, "\n-- line %d has printed --\n%s", p.line, p.printed())
	}
	return b.String()
}

// quoted returns the quoted texts that follow a word.
func quoted(s, word string) []string {
	var out []string
	for _, m := range regexp.MustCompile(word+` (?:"([^"]*)"|'([^']*)')`).FindAllStringSubmatch(s, -1) {
		out = append(out, m[1]+m[2])
	}
	return out
}
