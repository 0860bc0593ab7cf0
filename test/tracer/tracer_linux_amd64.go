package tracer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Call is one system call that changes files, or opens one for changing it; or, where a Fault asks for those, one that only reads.
type Call struct {
	Name string // as strace calls it
	Path string // the file, relative to the directory
	To   string // the new name, if it is one that renames or links
}

// String returns the call on one line.
func (c Call) String() string {
	if c.To != "" {
		return c.Name + " " + c.Path + " → " + c.To
	}
	return c.Name + " " + c.Path
}

// A Fault is what happens at a call. The zero Fault is none.
type Fault struct {
	At     int           // the number of the call, counted from 1 since Arm
	Onward bool          // at all later ones too
	Kill   bool          // the process is killed
	Errno  syscall.Errno // the call returns this error
	After  bool          // it is done first: killed once it is done; done, and reported as failed all the same
	Short  bool          // a write of several bytes does half of them, which is no error; other calls are left alone
	Reads  bool          // the calls that only read count, and no others
	// Only says which calls count, nil all.
	Only func(Call) bool
}

// A Process is a program that runs under the tracer. It is safe for concurrent use.
type Process struct {
	pid    int
	dir    string
	exited chan struct{}

	mu      sync.Mutex
	fault   *Fault // nil while disarmed
	calls   []Call
	hits    []Call
	hit     chan struct{} // closed with the first hit since Arm
	changed chan struct{} // closed and replaced with every call
	status  syscall.WaitStatus
}

// Start starts a command whose calls on files under a directory count. With a fault, counting begins with the first of them; otherwise with Arm. The
// command's Stdin, Stdout and Stderr have to be files or nil; its Wait must not be called. It returns an error matching [syscall.EPERM] if this
// machine doesn't let a process trace its child.
func Start(cmd *exec.Cmd, dir string, fault *Fault) (*Process, error) {
	p := &Process{dir: dir + "/", exited: make(chan struct{}), changed: make(chan struct{})}
	p.arm(fault)
	started := make(chan error)
	// Ends with the process, which Wait waits for.
	go p.trace(cmd, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("tracing %s: %w", cmd.Path, err)
	}
	return p, nil
}

// Pid returns the number of the process.
func (p *Process) Pid() int { return p.pid }

// Signal sends a signal to the process. If it is over that is no error.
func (p *Process) Signal(signal syscall.Signal) error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	if err := syscall.Kill(p.pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// Exited returns a channel that is closed when the process is over.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Status returns how the process ended. It may be called once it is over.
func (p *Process) Status() syscall.WaitStatus {
	<-p.exited
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

// Arm begins to count from 1, with a fault, which may be the zero one.
func (p *Process) Arm(fault Fault) { p.arm(&fault) }

func (p *Process) arm(fault *Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault, p.calls, p.hits, p.hit = fault, nil, nil, make(chan struct{})
}

// Disarm ends the fault and the counting. What was counted is kept.
func (p *Process) Disarm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = nil
}

// Calls returns the calls that were counted since Arm.
func (p *Process) Calls() []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.calls)
}

// Hits returns the calls since Arm at which the fault happened.
func (p *Process) Hits() []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.hits)
}

// Hit returns a channel that is closed when the fault of the last Arm happens for the first time.
func (p *Process) Hit() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hit
}

// Await returns once the calls since Arm are as wanted, or the process is over. It returns ctx's error if that ends first.
func (p *Process) Await(ctx context.Context, wanted func([]Call) bool) error {
	for {
		p.mu.Lock()
		done, changed := wanted(p.calls), p.changed
		p.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-p.exited:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// count notes a call, and returns what is to be done about it.
func (p *Process) count(nr, count uint64, call Call) (f Fault, now bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == nil || p.fault.Only != nil && !p.fault.Only(call) {
		return Fault{}, false
	}
	p.calls = append(p.calls, call)
	close(p.changed)
	p.changed = make(chan struct{})
	f = *p.fault
	n := len(p.calls)
	switch {
	case f.At == 0 || n < f.At || n > f.At && !f.Onward:
		return Fault{}, false
	case f.Short && (nr != unix.SYS_WRITE && nr != unix.SYS_PWRITE64 || count < 2):
		return Fault{}, false
	}
	p.hits = append(p.hits, call)
	if len(p.hits) == 1 {
		close(p.hit)
	}
	return f, true
}

// thread is what is known of one thread of the process.
type thread struct {
	begun bool   // its first stop, which comes with its birth, is over
	fault *Fault // what is to be done when the call that it is in is done
}

// options make the stops of calls recognizable, follow new threads, and see to it that the process doesn't outlive the tracer.
const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC |
	unix.PTRACE_O_EXITKILL

func (p *Process) trace(cmd *exec.Cmd, started chan<- error) {
	// Only the thread that started a process may trace it. It is never unlocked: the thread ends with this function.
	runtime.LockOSThread()
	err := p.begin(cmd)
	started <- err
	if err != nil {
		return
	}
	defer close(p.exited)
	threads := map[int]*thread{p.pid: {begun: true}}
	for {
		var status syscall.WaitStatus
		tid, err := syscall.Wait4(-p.pid, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return // there is nobody left to wait for
		case status.Exited() || status.Signaled():
			delete(threads, tid)
			if tid == p.pid {
				p.mu.Lock()
				p.status = status
				p.mu.Unlock()
			}
			continue
		case !status.Stopped():
			continue
		}
		t := threads[tid]
		if t == nil {
			t = new(thread)
			threads[tid] = t
		}
		signal := p.stopped(tid, t, status)
		// Whoever was killed meanwhile isn't there to go on.
		_ = syscall.PtraceSyscall(tid, int(signal))
	}
}

// begin starts the command and brings it to its first call.
func (p *Process) begin(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Ptrace = true
	// In a group of its own, so that waiting for its threads doesn't end the waiting of others for what this thread may have started before.
	cmd.SysProcAttr.Setpgid = true
	if err := cmd.Start(); err != nil {
		return err
	}
	p.pid = cmd.Process.Pid
	// From here on this thread waits for it, and nobody else.
	if err := cmd.Process.Release(); err != nil {
		return err
	}
	var status syscall.WaitStatus
	_, err := syscall.Wait4(p.pid, &status, unix.WALL, nil)
	if err == nil && !status.Stopped() {
		err = fmt.Errorf("it ended before it began, with status %x", status)
	}
	if err == nil {
		err = syscall.PtraceSetOptions(p.pid, options)
	}
	if err == nil {
		err = syscall.PtraceSyscall(p.pid, 0)
	}
	if err != nil {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(p.pid, &status, unix.WALL, nil)
	}
	return err
}

// stopped looks at a thread that has stopped, and returns the signal that it goes on with.
func (p *Process) stopped(tid int, t *thread, status syscall.WaitStatus) syscall.Signal {
	switch signal := status.StopSignal(); {
	case signal == syscall.SIGTRAP|0x80:
		p.atCall(tid, t)
		return 0
	case signal == syscall.SIGTRAP && status.TrapCause() > 0:
		return 0
	case signal == syscall.SIGSTOP && !t.begun:
		t.begun = true
		return 0
	default:
		return signal
	}
}

// callInfo is struct ptrace_syscall_info of linux/ptrace.h.
type callInfo struct {
	op         uint8
	_          [3]uint8
	arch       uint32
	ip, sp     uint64
	nrOrResult uint64
	args       [6]uint64
}

const (
	getCallInfo = 0x420e // PTRACE_GET_SYSCALL_INFO
	infoEntry   = 1
	infoExit    = 2
)

// atCall is called when a thread begins or ends a call.
func (p *Process) atCall(tid int, t *thread) {
	var info callInfo
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PTRACE, getCallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return // killed meanwhile
	}
	switch info.op {
	case infoEntry:
		p.entering(tid, t, info)
	case infoExit:
		p.leaving(tid, t)
	}
}

func (p *Process) entering(tid int, t *thread, info callInfo) {
	t.fault = nil
	p.mu.Lock()
	armed, reads := p.fault != nil, p.fault != nil && p.fault.Reads
	p.mu.Unlock()
	if !armed {
		return
	}
	k, ok := kinds(reads)[info.nrOrResult]
	if !ok || k.counts != nil && !k.counts(info.args) {
		return
	}
	call, ok := p.look(tid, k, info.args)
	if !ok {
		return
	}
	fault, now := p.count(info.nrOrResult, info.args[2], call)
	switch {
	case !now:
	case fault.Kill && !fault.After:
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	case fault.Short:
		p.change(tid, func(regs *syscall.PtraceRegs) { regs.Rdx = info.args[2] / 2 })
	case !fault.Kill && !fault.After:
		// A call that doesn't exist does nothing.
		p.change(tid, func(regs *syscall.PtraceRegs) { regs.Orig_rax = ^uint64(0) })
		t.fault = &fault
	default:
		t.fault = &fault
	}
}

func (p *Process) leaving(tid int, t *thread) {
	fault := t.fault
	t.fault = nil
	switch {
	case fault == nil:
	case fault.Kill:
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	default:
		p.change(tid, func(regs *syscall.PtraceRegs) { regs.Rax = uint64(-int64(fault.Errno)) })
	}
}

// change changes a stopped thread's registers. If it was killed meanwhile, it has none.
func (p *Process) change(tid int, set func(*syscall.PtraceRegs)) {
	var regs syscall.PtraceRegs
	if syscall.PtraceGetRegs(tid, &regs) == nil {
		set(&regs)
		_ = syscall.PtraceSetRegs(tid, &regs)
	}
}

// kind is a system call that may change files, or read them.
type kind struct {
	name string
	// Where its arguments say which file: a descriptor, a path, or a directory's descriptor and a path; -1 is none.
	fd, dir, path int
	toDir, toPath int
	counts        func(args [6]uint64) bool // nil always does
}

func ofFile(name string) kind    { return kind{name, 0, -1, -1, -1, -1, nil} }
func ofPath(name string) kind    { return kind{name, -1, -1, 0, -1, -1, nil} }
func ofPathAt(name string) kind  { return kind{name, -1, 0, 1, -1, -1, nil} }
func ofPaths(name string) kind   { return kind{name, -1, -1, 0, -1, 1, nil} }
func ofPathsAt(name string) kind { return kind{name, -1, 0, 1, 2, 3, nil} }
func opening(k kind, flags int, reads bool) kind {
	k.counts = func(args [6]uint64) bool {
		return reads == (args[flags]&(unix.O_WRONLY|unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC) == 0)
	}
	return k
}

// kinds returns the calls that may change files, by number, or those that may only read them.
func kinds(reads bool) map[uint64]kind {
	if reads {
		return readers
	}
	return known
}

// known are the calls that may change files, by number.
var known = map[uint64]kind{
	unix.SYS_OPEN:            opening(ofPath("open"), 1, false),
	unix.SYS_OPENAT:          opening(ofPathAt("openat"), 2, false),
	unix.SYS_CREAT:           ofPath("creat"),
	unix.SYS_WRITE:           ofFile("write"),
	unix.SYS_WRITEV:          ofFile("writev"),
	unix.SYS_PWRITE64:        ofFile("pwrite64"),
	unix.SYS_PWRITEV:         ofFile("pwritev"),
	unix.SYS_PWRITEV2:        ofFile("pwritev2"),
	unix.SYS_SENDFILE:        ofFile("sendfile"),
	unix.SYS_FSYNC:           ofFile("fsync"),
	unix.SYS_FDATASYNC:       ofFile("fdatasync"),
	unix.SYS_SYNC_FILE_RANGE: ofFile("sync_file_range"),
	unix.SYS_FTRUNCATE:       ofFile("ftruncate"),
	unix.SYS_FALLOCATE:       ofFile("fallocate"),
	unix.SYS_FCHMOD:          ofFile("fchmod"),
	unix.SYS_FCHOWN:          ofFile("fchown"),
	unix.SYS_FSETXATTR:       ofFile("fsetxattr"),
	unix.SYS_COPY_FILE_RANGE: {"copy_file_range", 2, -1, -1, -1, -1, nil},
	unix.SYS_SPLICE:          {"splice", 2, -1, -1, -1, -1, nil},
	unix.SYS_TRUNCATE:        ofPath("truncate"),
	unix.SYS_MKDIR:           ofPath("mkdir"),
	unix.SYS_MKDIRAT:         ofPathAt("mkdirat"),
	unix.SYS_RMDIR:           ofPath("rmdir"),
	unix.SYS_UNLINK:          ofPath("unlink"),
	unix.SYS_UNLINKAT:        ofPathAt("unlinkat"),
	unix.SYS_CHMOD:           ofPath("chmod"),
	unix.SYS_FCHMODAT:        ofPathAt("fchmodat"),
	unix.SYS_FCHMODAT2:       ofPathAt("fchmodat2"),
	unix.SYS_CHOWN:           ofPath("chown"),
	unix.SYS_FCHOWNAT:        ofPathAt("fchownat"),
	unix.SYS_UTIMENSAT:       ofPathAt("utimensat"),
	unix.SYS_RENAME:          ofPaths("rename"),
	unix.SYS_RENAMEAT:        ofPathsAt("renameat"),
	unix.SYS_RENAMEAT2:       ofPathsAt("renameat2"),
	unix.SYS_LINK:            ofPaths("link"),
	unix.SYS_LINKAT:          ofPathsAt("linkat"),
	unix.SYS_SYMLINK:         {"symlink", -1, -1, 1, -1, -1, nil},
	unix.SYS_SYMLINKAT:       {"symlinkat", -1, 1, 2, -1, -1, nil},
}

// readers are the calls that may read files or tell of them, by number. What they may change is told by known.
var readers = map[uint64]kind{
	unix.SYS_OPEN:              opening(ofPath("open"), 1, true),
	unix.SYS_OPENAT:            opening(ofPathAt("openat"), 2, true),
	unix.SYS_READ:              ofFile("read"),
	unix.SYS_READV:             ofFile("readv"),
	unix.SYS_PREAD64:           ofFile("pread64"),
	unix.SYS_PREADV:            ofFile("preadv"),
	unix.SYS_PREADV2:           ofFile("preadv2"),
	unix.SYS_LSEEK:             ofFile("lseek"),
	unix.SYS_MMAP:              {"mmap", 4, -1, -1, -1, -1, nil},
	unix.SYS_SENDFILE:          {"sendfile", 1, -1, -1, -1, -1, nil},
	unix.SYS_COPY_FILE_RANGE:   ofFile("copy_file_range"),
	unix.SYS_SPLICE:            ofFile("splice"),
	unix.SYS_FLOCK:             ofFile("flock"),
	unix.SYS_GETDENTS64:        ofFile("getdents64"),
	unix.SYS_FSTAT:             ofFile("fstat"),
	unix.SYS_FSTATFS:           ofFile("fstatfs"),
	unix.SYS_STAT:              ofPath("stat"),
	unix.SYS_LSTAT:             ofPath("lstat"),
	unix.SYS_NEWFSTATAT:        ofPathAt("newfstatat"),
	unix.SYS_STATX:             ofPathAt("statx"),
	unix.SYS_STATFS:            ofPath("statfs"),
	unix.SYS_ACCESS:            ofPath("access"),
	unix.SYS_FACCESSAT:         ofPathAt("faccessat"),
	unix.SYS_FACCESSAT2:        ofPathAt("faccessat2"),
	unix.SYS_READLINK:          ofPath("readlink"),
	unix.SYS_READLINKAT:        ofPathAt("readlinkat"),
	unix.SYS_INOTIFY_ADD_WATCH: {"inotify_add_watch", -1, -1, 1, -1, -1, nil},
}

// Names returns the names of the calls that count, in order: those that may change files, or those that may only read them.
func Names(reads bool) []string {
	var names []string
	for _, k := range kinds(reads) {
		names = append(names, k.name)
	}
	slices.Sort(names)
	return names
}

// look returns what a call is about. It reports false if that is nothing under the directory.
func (p *Process) look(tid int, k kind, args [6]uint64) (Call, bool) {
	c := Call{Name: k.name}
	switch {
	case k.fd >= 0:
		c.Path = link(tid, fmt.Sprintf("fd/%d", int32(args[k.fd])))
	default:
		c.Path = at(tid, k.dir, k.path, args)
	}
	if k.toPath >= 0 {
		c.To = at(tid, k.toDir, k.toPath, args)
	}
	path, inside := strings.CutPrefix(c.Path, p.dir)
	to, toInside := strings.CutPrefix(c.To, p.dir)
	if c.Path+"/" == p.dir {
		path, inside = ".", true
	}
	c.Path, c.To = path, to
	return c, inside || toInside
}

// at returns the path that a call's arguments stand for.
func at(tid, dir, path int, args [6]uint64) string {
	s := text(tid, args[path])
	if strings.HasPrefix(s, "/") {
		return s
	}
	if dir < 0 || int32(args[dir]) == unix.AT_FDCWD {
		return link(tid, "cwd") + "/" + s
	}
	return link(tid, fmt.Sprintf("fd/%d", int32(args[dir]))) + "/" + s
}

// link reads a link in a thread's part of /proc, "" if there is none.
func link(tid int, name string) string {
	to, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", tid, name))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(to, " (deleted)")
}

// text reads a string of a thread.
func text(tid int, address uint64) string {
	const page = 4096
	var s []byte
	for len(s) < unix.PathMax {
		// Not over the end of a page: what follows may not be there.
		b := make([]byte, page-address%page)
		n, err := unix.ProcessVMReadv(tid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
		if err != nil {
			return ""
		}
		if end := slices.Index(b[:n], 0); end >= 0 {
			return string(append(s, b[:end]...))
		}
		s = append(s, b[:n]...)
		address += uint64(n)
	}
	return ""
}
