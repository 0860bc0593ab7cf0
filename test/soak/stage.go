package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

const (
	soakHost     = "example.com"
	soakVersions = 3
)

// An image is one that the publisher has.
type image struct {
	n       int // which name
	name    string
	version string
	content []byte
	bytes   int64
	blob    string // host and path at the publisher
}

// A stage is the publisher, the server as a process, and what they need.
type stage struct {
	o         options
	dir       string
	binary    string
	publisher *publisher.Publisher
	spoiled   map[string]bool   // the names of blobs that were
	keys      [2]*trusttest.Key // the names with even and with odd numbers are signed by one each
	images    []image

	// restarting is held for writing while the server is down.
	restarting sync.RWMutex
	mu         sync.Mutex
	cmd        *exec.Cmd
	exited     chan error
	address    string
	// distrusted says since when the odd names' key has not been trusted; zero if it is.
	distrusted time.Time
}

func newStage(o options) (st *stage, err error) {
	st = &stage{o: o, binary: o.binary, spoiled: make(map[string]bool)}
	// Not below a long path: a socket's name is short.
	if st.dir, err = os.MkdirTemp("", "acproxy-soak-"); err != nil {
		return st, err
	}
	if st.binary == "" {
		st.binary = filepath.Join(st.dir, "acproxy")
		if out, err := exec.Command("go", "build", "-o", st.binary, "github.com/acproxy/acproxy/cmd/acproxy").CombinedOutput(); err != nil {
			return st, fmt.Errorf("building acproxy: %w: %s", err, out)
		}
	}
	if st.publisher, err = publisher.Start(publisher.Options{}); err != nil {
		return st, err
	}
	for i := range st.keys {
		if st.keys[i], err = trusttest.NewKey(trusttest.Options{}); err != nil {
			return st, err
		}
	}
	if err := st.publish(); err != nil {
		return st, err
	}
	if err := st.trustAll(); err != nil {
		return st, err
	}
	if err := os.WriteFile(filepath.Join(st.dir, "ca.pem"), st.publisher.CAPEM(), 0o600); err != nil {
		return st, err
	}
	return st, os.WriteFile(st.config(), fmt.Appendf(nil, `
data_dir: %[1]s/data
listen: [{address: "127.0.0.1:0", tls: none}]
admin: {listen: []}
dial:
  hosts: {%[2]s: %[3]q, storage.%[2]s: %[3]q}
  stall_timeout: 2s
  timeout: 3s
  breaker: {open: 200ms, max_open: 1s}
fetch: {retry_wait: 50ms, retry_for: 10s}
discovery: {negative_ttl: 1s}
freshness: {ttl: 3s, max_stale: 5s}
cache: {max_size: %[4]d, min_free: 0, grace: 1s, access_flush: 1s}
scrub: {every: 15s, rate: 50MiB}
log: {format: json, level: warn}
stop_grace: 2s
publishers:
  - {prefix: %[2]s, ca_file: %[1]s/ca.pem, allow_addresses: [127.0.0.0/8]}
`, st.dir, soakHost, st.publisher.Addr(), o.maxSize), 0o600)
}

func (st *stage) config() string { return filepath.Join(st.dir, "config.yaml") }
func (st *stage) socket() string { return filepath.Join(st.dir, "data", "admin.sock") }
func (st *stage) dirs() trust.Dirs {
	return trust.Dirs{Local: filepath.Join(st.dir, "data", "trustedkeys")}
}

// prefix returns the names that a key is trusted for: odd and even ones lie under different ones.
func prefix(n int) string { return soakHost + "/" + []string{"even", "odd"}[n%2] }

func (st *stage) publish() error {
	for n := range st.o.images {
		name := fmt.Sprintf("%s/app%d", prefix(n), n)
		for v := range soakVersions {
			labels := map[string]string{"version": fmt.Sprint(v + 1), "os": "linux", "arch": "amd64"}
			blob, err := acitest.Build(acitest.Spec{Name: name, Labels: labels, RootfsSize: st.o.size/2 + int64(n*v)*st.o.size/200, Seed: uint64(n*soakVersions + v)})
			if err != nil {
				return err
			}
			at, err := st.publisher.AddSigned(publisher.Image{Name: name, Labels: labels, ACI: blob}, st.keys[n%2])
			if err != nil {
				return err
			}
			im := image{n: n, name: name, version: labels["version"], content: blob, bytes: int64(len(blob)), blob: strings.TrimPrefix(at.URL, "https://")}
			st.images = append(st.images, im)
		}
		st.publisher.SetLatest(name, "1")
	}
	return nil
}

// trustAll has both keys trusted.
func (st *stage) trustAll() error {
	// Noted before: the server sees the file as soon as it is there.
	st.mu.Lock()
	st.distrusted = time.Time{}
	running := st.cmd != nil
	st.mu.Unlock()
	for i, key := range st.keys {
		if _, err := trust.Add(st.dirs(), prefix(i), key.Armored()); err != nil {
			return err
		}
	}
	if running {
		return st.reload()
	}
	return nil
}

// distrust takes the odd names' key away. When it returns, the server decides without it.
func (st *stage) distrust() error {
	if err := trust.Remove(st.dirs(), prefix(1), trust.Fingerprint(st.keys[1].Fingerprint())); err != nil {
		return err
	}
	if err := st.reload(); err != nil {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.distrusted = time.Now()
	return nil
}

func (st *stage) reload() error {
	client, err := admin.Dial(st.socket())
	if err != nil {
		return err
	}
	return client.ReloadKeys()
}

// start starts the server and returns when it serves.
func (st *stage) start() error {
	cmd := exec.Command(st.binary, "serve", "--config", st.config())
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(st.dir, "acproxy.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	began := time.Now()
	exited := make(chan error, 1)
	// Ends with the process, and is waited for by whoever ends that.
	go func() {
		_, _ = io.Copy(log, bufio.NewReader(stderr))
		_ = log.Close()
		exited <- cmd.Wait()
	}()
	st.mu.Lock()
	st.cmd, st.exited, st.address = cmd, exited, ""
	st.mu.Unlock()
	for {
		// Operators' socket is the last one that it opens.
		if address, err := st.listening(cmd.Process.Pid); err == nil && st.operated() {
			st.mu.Lock()
			st.address = address
			st.mu.Unlock()
			return nil
		}
		select {
		case err := <-exited:
			exited <- err
			return fmt.Errorf("the server ended at once (%v): see %s", err, log.Name())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(began) > 20*time.Second {
			return errors.New("the server doesn't serve after 20 s")
		}
	}
}

// operated reports whether the server can be asked by operators.
func (st *stage) operated() bool {
	conn, err := net.Dial("unix", st.socket())
	if err != nil {
		return false
	}
	return conn.Close() == nil
}

// listening returns where the server listens, once it answers there.
func (st *stage) listening(pid int) (string, error) {
	out, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		return "", err
	}
	inodes := make(map[string]bool)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return "", err
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); err == nil && strings.HasPrefix(to, "socket:[") {
			inodes[strings.Trim(to[len("socket:["):], "]")] = true
		}
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[3] != "0A" || !inodes[fields[9]] {
			continue
		}
		_, port, _ := strings.Cut(fields[1], ":")
		n, err := strconv.ParseUint(port, 16, 16)
		if err != nil {
			return "", err
		}
		address := fmt.Sprintf("127.0.0.1:%d", n)
		resp, err := http.Get("http://" + address + "/.acproxy/healthz")
		if err != nil {
			return "", err
		}
		return address, resp.Body.Close()
	}
	return "", errors.New("it doesn't listen yet")
}

// end ends the server with a signal.
func (st *stage) end(signal syscall.Signal) error {
	st.mu.Lock()
	cmd, exited := st.cmd, st.exited
	st.cmd = nil
	st.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(signal); err != nil {
		return err
	}
	select {
	case err := <-exited:
		if signal == syscall.SIGTERM && err != nil {
			return fmt.Errorf("it was told to stop and ended with %w", err)
		}
		return nil
	case <-time.After(30 * time.Second):
		_ = cmd.Process.Kill()
		return fmt.Errorf("it doesn't end on %v", signal)
	}
}

func (st *stage) restart(signal syscall.Signal) error {
	st.restarting.Lock()
	defer st.restarting.Unlock()
	if err := st.end(signal); err != nil {
		return err
	}
	if err := st.check(); err != nil {
		return err
	}
	return st.start()
}

// check has the store of the server that doesn't run checked. A blob that was damaged and not noticed yet is none of its problems.
func (st *stage) check() error {
	// The exit code says no more than what was found does.
	out, err := exec.Command(st.binary, "fsck", "--json", "--config", st.config()).Output()
	var checked bool
	for line := range bytes.Lines(out) {
		var said struct {
			Finding  *cache.Finding `json:"finding"`
			Problems *int64         `json:"problems"`
		}
		if err := json.Unmarshal(line, &said); err != nil {
			return fmt.Errorf("fsck said %q: %w", line, err)
		}
		if f := said.Finding; f != nil && !f.Note && !(st.spoiled[filepath.Base(f.Path)] && (f.Code == cache.CodeMissing || f.Code == cache.CodeDamaged)) {
			return fmt.Errorf("fsck found %s: %s: %s", f.Code, f.Path, f.Detail)
		}
		checked = checked || said.Problems != nil
	}
	if !checked {
		return fmt.Errorf("fsck came to no end: %w", err)
	}
	return nil
}

// spoil takes the bytes of an image away from the server, or some of them. What is opened has to be whole, so nobody may get them.
func (st *stage) spoil(random *rand.Rand) (what string, err error) {
	blobs, err := filepath.Glob(filepath.Join(st.dir, "data", "store", "blobs", "*", "*"))
	if err != nil {
		return "", err
	}
	blobs = slices.DeleteFunc(blobs, func(name string) bool { return filepath.Ext(name) != "" })
	if len(blobs) == 0 {
		return "no blob to spoil", nil
	}
	// It may be evicted in this moment.
	blob := blobs[random.IntN(len(blobs))]
	if random.IntN(2) == 0 {
		what, err = "a blob goes away", os.Remove(blob)
	} else {
		what, err = "a blob is cut", cut(blob, random.Int64N(1000), filepath.Join(st.dir, "cut"))
	}
	st.spoiled[filepath.Base(blob)] = true
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return what, err
}

// disturb does one thing that disturbs, and says what.
func (st *stage) disturb(ctx context.Context, random *rand.Rand) (what string, err error) {
	im := st.images[random.IntN(len(st.images))]
	fault := func(f publisher.Fault) {
		trouble := st.publisher.Misbehave(publisher.URL("*.aci"), f)
		select {
		case <-time.After(time.Duration(200+random.IntN(1500)) * time.Millisecond):
		case <-ctx.Done():
		}
		trouble.End()
	}
	at := publisher.At(random.Int64N(im.bytes))
	switch random.IntN(14) {
	case 0:
		return "kill", st.restart(syscall.SIGKILL)
	case 1:
		return "stop", st.restart(syscall.SIGTERM)
	case 2:
		what = "publisher cuts"
		fault(publisher.Fault{TruncateAfter: at})
	case 3:
		what = "publisher resets"
		fault(publisher.Fault{ResetAfter: at})
	case 4:
		what = "publisher flips a bit"
		fault(publisher.Fault{FlipBitAt: publisher.At(*at / 2)})
	case 5:
		what = "publisher stalls"
		fault(publisher.Fault{StallAfter: at})
	case 6:
		what = "publisher answers 503"
		fault(publisher.Fault{Status: http.StatusServiceUnavailable, Header: http.Header{"Retry-After": {"1"}}})
	case 7:
		st.publisher.Stop()
		select {
		case <-time.After(time.Duration(random.IntN(1000)) * time.Millisecond):
		case <-ctx.Done():
		}
		return "publisher down", st.publisher.Resume()
	case 8:
		if err := st.distrust(); err != nil {
			return "key taken away", err
		}
		select {
		case <-time.After(time.Duration(500+random.IntN(1000)) * time.Millisecond):
		case <-ctx.Done():
		}
		return "key taken away and given back", st.trustAll()
	case 9, 10:
		return st.spoil(random)
	default:
		what = "latest moves on"
		st.publisher.SetLatest(im.name, im.version)
	}
	return what, nil
}

// look returns what is to be seen of the server now.
func (st *stage) look() (seen sample, err error) {
	st.restarting.RLock()
	defer st.restarting.RUnlock()
	st.mu.Lock()
	cmd := st.cmd
	st.mu.Unlock()
	if cmd == nil {
		return seen, errors.New("it doesn't run")
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		return seen, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kilobytes, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return seen, err
			}
			seen.anon = kilobytes << 10
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", cmd.Process.Pid))
	if err != nil {
		return seen, err
	}
	seen.descriptors = len(fds)
	client, err := admin.Dial(st.socket())
	if err != nil {
		return seen, err
	}
	usage, err := client.Usage()
	if err != nil {
		return seen, err
	}
	// What it says, or what there is if that is more.
	seen.cache = max(usage.Total(), st.taken())
	return seen, nil
}

// taken is what the store takes on the disk, in blocks, but for its lock and its version, which nobody counts. What goes or comes meanwhile may be missed.
func (st *stage) taken() (sum int64) {
	_ = filepath.WalkDir(filepath.Join(st.dir, "data", "store"), func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() == "lock" || e.Name() == "VERSION" {
			return nil
		}
		if fi, err := e.Info(); err == nil {
			sum += 512 * fi.Sys().(*syscall.Stat_t).Blocks
		}
		return nil
	})
	return sum
}

// idle waits until the server has nothing in progress.
func (st *stage) idle() error {
	var before int
	for range 100 {
		seen, err := st.look()
		if err != nil {
			return err
		}
		if seen.descriptors == before {
			return nil
		}
		before = seen.descriptors
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

func (st *stage) close() error {
	err := st.end(syscall.SIGKILL)
	if st.publisher != nil {
		err = errors.Join(err, st.publisher.Close())
	}
	return errors.Join(err, os.RemoveAll(st.dir))
}

// problem reads the code of an error.
func problem(body io.Reader) string {
	b, _ := io.ReadAll(io.LimitReader(body, 64<<10))
	var p struct {
		Type string `json:"type"`
	}
	if json.NewDecoder(bytes.NewReader(b)).Decode(&p) != nil || p.Type == "" {
		return "?"
	}
	return p.Type[strings.LastIndexByte(p.Type, ':')+1:]
}
