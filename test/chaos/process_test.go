//go:build linux && amd64

package chaos

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/tracer"
)

// patience is how long anything that has to happen may take.
const patience = 30 * time.Second

// A process is an acproxy that runs.
type process struct {
	t      testing.TB
	tracer *tracer.Process // nil if it runs by itself
	cmd    *exec.Cmd

	exited chan struct{} // closed when the process is over and its log is read
	status syscall.WaitStatus

	mu        sync.Mutex
	log       bytes.Buffer
	messages  map[string]bool
	addresses []string
	changed   chan struct{} // closed and replaced with every line of the log
}

// launch starts a command of the binary. With a fault it is traced from its first call on; tracing without one begins with Arm.
func launch(t testing.TB, cmd *exec.Cmd, traced bool, dir string, fault *tracer.Fault) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, exited: make(chan struct{}), messages: make(map[string]bool), changed: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if traced {
		p.tracer, err = tracer.Start(cmd, dir, fault)
	} else {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		r.Close()
		if traced && errors.Is(err, syscall.EPERM) {
			t.Skipf("this machine doesn't let a process trace its child: %v", err)
		}
		t.Fatal(err)
	}
	// Ends with the process, which closes its end of the pipe; end waits for it.
	go func() {
		defer close(p.exited)
		p.read(r)
		r.Close()
		if traced {
			p.status = p.tracer.Status()
			return
		}
		_ = cmd.Wait() // how it ended is in ProcessState
		p.status, _ = cmd.ProcessState.Sys().(syscall.WaitStatus)
	}()
	t.Cleanup(p.cleanup)
	return p
}

func (p *process) read(r *os.File) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct {
			Msg       string
			Addresses []string
		}
		p.mu.Lock()
		p.log.Write(lines.Bytes())
		p.log.WriteByte('\n')
		if json.Unmarshal(lines.Bytes(), &line) == nil {
			p.messages[line.Msg] = true
			if line.Msg == "serving" {
				p.addresses = line.Addresses
			}
		}
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// says waits until the log has a message. It reports false if the process ended without it.
func (p *process) says(message string) bool {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		p.mu.Lock()
		said, changed := p.messages[message], p.changed
		p.mu.Unlock()
		if said {
			return true
		}
		select {
		case <-changed:
		case <-p.exited:
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.messages[message]
		case <-timeout:
			p.t.Fatalf("acproxy doesn't say %q:\n%s", message, p.output())
		}
	}
}

// serves waits until the process serves, and fails the test if it ends instead.
func (p *process) serves() {
	p.t.Helper()
	if !p.says("serving") {
		p.t.Fatalf("acproxy ended instead of serving: %v\n%s", describe(p.status), p.output())
	}
}

// url returns the URL of the listener, without a slash at the end.
func (p *process) url() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.addresses) == 0 {
		return "http://127.0.0.1:1"
	}
	return p.addresses[0]
}

func (p *process) signal(signal syscall.Signal) {
	p.t.Helper()
	var err error
	if p.tracer != nil {
		err = p.tracer.Signal(signal)
	} else if err = p.cmd.Process.Signal(signal); errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	if err != nil {
		p.t.Error(err)
	}
}

// end ends the process with a signal and returns how it went.
func (p *process) end(signal syscall.Signal) syscall.WaitStatus {
	p.t.Helper()
	p.signal(signal)
	return p.wait()
}

// wait waits for the end of the process.
func (p *process) wait() syscall.WaitStatus {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.t.Errorf("acproxy doesn't end:\n%s", p.output())
		p.signal(syscall.SIGKILL)
		<-p.exited
	}
	return p.status
}

// stop ends the process politely and checks how it goes.
func (p *process) stop() {
	p.t.Helper()
	if status := p.end(syscall.SIGTERM); !status.Exited() || status.ExitStatus() != 0 {
		p.t.Errorf("acproxy ended with %v after SIGTERM, want exit code 0\n%s", describe(status), p.output())
	}
}

// sane checks that nothing in the log tells of a mistake in the program.
func (p *process) sane() {
	p.t.Helper()
	for _, bad := range []string{"DATA RACE", "panic: ", "http: panic serving", "fatal error: ", "SIGBUS", "SIGSEGV"} {
		if strings.Contains(p.output(), bad) {
			p.t.Errorf("acproxy's log says %q:\n%s", bad, p.output())
			return
		}
	}
}

// cleanup ends the process if the test hasn't.
func (p *process) cleanup() {
	select {
	case <-p.exited:
	default:
		p.signal(syscall.SIGKILL)
		<-p.exited
	}
	p.sane()
}

func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return "signal " + status.Signal().String()
	}
	return fmt.Sprintf("exit code %d", status.ExitStatus())
}
