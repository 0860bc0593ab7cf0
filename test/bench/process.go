package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A process is a server that was started for a benchmark, with everything that it has started itself.
type process struct {
	cmd  *exec.Cmd
	log  string        // the file that it writes what it has to say to
	done chan struct{} // closed when it has ended

	after func() error // cleans up after it, nil if there is nothing
}

const (
	// startGrace and stopGrace are how long a server may take to listen, and to end.
	startGrace = time.Minute
	stopGrace  = 10 * time.Second
	pollEvery  = 5 * time.Millisecond
)

// launch starts a server in a directory and waits until it listens on all of the addresses. stop ends it.
func launch(ctx context.Context, dir string, cmd *exec.Cmd, addresses ...string) (*process, error) {
	p := &process{cmd: cmd, log: filepath.Join(dir, "output.log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	dieWithUs(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	// Ends with the process; stop waits for it.
	go func() {
		_ = cmd.Wait() // how it ended is in its state
		close(p.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, startGrace)
	defer cancel()
	for _, address := range addresses {
		if err := p.awaitListening(ctx, address); err != nil {
			return nil, errors.Join(err, p.stop())
		}
	}
	return p, nil
}

func (p *process) awaitListening(ctx context.Context, address string) error {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		if conn, err := net.Dial("tcp", address); err == nil {
			return conn.Close()
		}
		select {
		case <-ticker.C:
		case <-p.done:
			return fmt.Errorf("%s ended (%v) instead of listening:\n%s", p.cmd.Path, p.cmd.ProcessState, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s doesn't listen on %s: %w\n%s", p.cmd.Path, address, ctx.Err(), p.tail())
		}
	}
}

// tail returns the end of what the process has written.
func (p *process) tail() string {
	out, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	const most = 2000
	return string(out[max(0, len(out)-most):])
}

// stop ends the process and waits for it. One that doesn't end when it is told to is killed, which is an error.
func (p *process) stop() error {
	err := p.end()
	if p.after != nil {
		err = errors.Join(err, p.after())
	}
	return err
}

func (p *process) end() error {
	select {
	case <-p.done:
		return nil
	default:
	}
	// It may just have ended by itself.
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopGrace):
	}
	err := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(fmt.Errorf("%s didn't end when it was told to", p.cmd.Path), err)
}

// Ports that servers are given: below those that the system gives to connections by itself (ip(7), ip_local_port_range). One of these could be
// taken by somebody's connection before its server listens, and a client that dials it meanwhile could even be connected with itself.
const (
	firstPort = 20000
	lastPort  = 32000
)

// freeAddress returns an address of the loopback interface that nobody listens on.
func freeAddress() (string, error) {
	var failed error
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(lastPort-firstPort))
		l, err := net.Listen("tcp", address)
		if err == nil {
			return address, l.Close()
		}
		failed = err
	}
	return "", fmt.Errorf("looking for a free port: %w", failed)
}

// tree returns the processes that p consists of: nginx and varnish serve in children of the one that was started.
func (p *process) tree() ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(files) == 0 {
		return nil, errors.Join(err, errors.New("what processes cost is read from /proc, which isn't there"))
	}
	parents := make(map[int]int)
	for _, file := range files {
		fields, err := statFields(file)
		if err != nil {
			continue // it has ended since
		}
		pid, err1 := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		parent, err2 := strconv.Atoi(fields[1])
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		parents[pid] = parent
	}
	own := []int{p.cmd.Process.Pid}
	for i := 0; i < len(own); i++ {
		for pid, parent := range parents {
			if parent == own[i] {
				own = append(own, pid)
			}
		}
	}
	return own, nil
}

// statFields returns the fields of a process's stat that follow its name (proc(5)): state, parent, …
func statFields(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	// The name may hold spaces and parentheses.
	fields := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	const enough = 13
	if len(fields) < enough {
		return nil, fmt.Errorf("%s holds %q", file, b)
	}
	return fields, nil
}

// ticksPerSecond is what Linux counts CPU time in towards programs, on every architecture (USER_HZ).
const ticksPerSecond = 100

// cpu returns the CPU seconds that the process and its children have used so far, in user and kernel mode.
func (p *process) cpu() (float64, error) {
	pids, err := p.tree()
	if err != nil {
		return 0, err
	}
	ticks := 0
	for _, pid := range pids {
		fields, err := statFields(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		for _, field := range fields[11:13] {
			n, err := strconv.Atoi(field)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return float64(ticks) / ticksPerSecond, nil
}

// deferred returns the CPU seconds that the kernel's own threads for work on packets (ksoftirqd) have used so far. On the loopback interface what a server sends is
// taken in by the same processor, in the server's time as long as that keeps up, and by such a thread when it doesn't: what a server costs would depend on how busy
// the machine is. It is 0 where they can't be seen, as in a container.
func deferred() float64 {
	files, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is a good one
	ticks := 0
	for _, file := range files {
		name, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(name), "ksoftirqd/") {
			continue
		}
		fields, err := statFields(filepath.Join(filepath.Dir(file), "stat"))
		if err != nil {
			continue
		}
		for _, field := range fields[11:13] {
			n, _ := strconv.Atoi(field) // numbers, by proc(5)
			ticks += n
		}
	}
	return float64(ticks) / ticksPerSecond
}

// anonymous returns how many bytes of memory some processes have in use that stand for no file.
func anonymous(pids []int) int64 {
	var sum int64
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // it has ended since
		}
		_, rest, _ := strings.Cut(string(b), "RssAnon:")
		// In kB, which are KiB (proc(5)).
		text, _, _ := strings.Cut(rest, "kB")
		if n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64); err == nil {
			sum += n << 10
		}
	}
	return sum
}

// sampleEvery is how often memory is looked at.
const sampleEvery = 10 * time.Millisecond

// watchMemory looks at the memory of a process, and the children that it has by now, until the returned function is called, which returns the
// most that was seen.
func (p *process) watchMemory() (peak func() int64, err error) {
	pids, err := p.tree()
	if err != nil {
		return nil, err
	}
	end := make(chan struct{})
	var most int64
	var watching sync.WaitGroup
	// Ends when peak is called, which waits for it.
	watching.Go(func() {
		ticker := time.NewTicker(sampleEvery)
		defer ticker.Stop()
		for {
			most = max(most, anonymous(pids))
			select {
			case <-ticker.C:
			case <-end:
				return
			}
		}
	})
	return func() int64 {
		close(end)
		watching.Wait()
		return max(most, anonymous(pids))
	}, nil
}
