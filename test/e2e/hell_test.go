package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/testtools"
)

// chaos names the environment variable that asks for the long form of the tests in which everybody misbehaves: all offsets instead of some, more clients,
// more random requests.
const chaos = "ACPROXY_CHAOS"

// inChaos returns the one of two sizes of a test that is asked for.
func inChaos[T any](usual, long T) T {
	if os.Getenv(chaos) != "" {
		return long
	}
	return usual
}

// seedName names the environment variable that repeats the random choices of a test.
const seedName = "ACPROXY_SEED"

// seed returns what random choices are made from, and says it.
func seed(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(os.Getpid())
	if text := os.Getenv(seedName); text != "" {
		seed = must(strconv.ParseUint(text, 10, 64))(t)
	}
	t.Logf("%s=%d repeats it", seedName, seed)
	return seed
}

// vitals is what a server holds on to.
type vitals struct {
	descriptors, goroutines int
	anonymous               int64 // bytes of memory that no file stands behind
}

func (s *scene) vitals() vitals {
	s.t.Helper()
	v := vitals{anonymous: s.server().anonymous()}
	v.descriptors = len(must(os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.server().cmd.Process.Pid)))(s.t))
	v.goroutines = int(s.metric("go_goroutines"))
	return v
}

// anonymous returns the server's anonymous memory in bytes.
func (p *process) anonymous() int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0 // it has ended, which others notice
	}
	_, rest, _ := bytes.Cut(status, []byte("RssAnon:"))
	kilobytes, _, _ := bytes.Cut(rest, []byte("kB"))
	n, _ := strconv.ParseInt(string(bytes.TrimSpace(kilobytes)), 10, 64)
	return n << 10
}

// metric asks the admin socket for a value.
func (s *scene) metric(name string) float64 {
	s.t.Helper()
	socket := s.path("data", "admin.sock")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Get("http://acproxy/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return must(strconv.ParseFloat(value, 64))(s.t)
		}
	}
	s.t.Fatalf("there is no metric %s", name)
	return 0
}

// settles waits until the server holds on to no more than before.
func (s *scene) settles(before vitals) {
	s.t.Helper()
	var now vitals
	// A goroutine or two come and go by themselves.
	eventually(s.t, "the server lets everything go", func() bool {
		now = s.vitals()
		return now.descriptors <= before.descriptors && now.goroutines <= before.goroutines+3
	})
	if s.t.Failed() {
		s.t.Logf("before %+v, now %+v", before, now)
	}
}

// raw connects to the listener with a scheme, plain http or TLS with what a client offers for it.
func (s *scene) raw(scheme string) net.Conn {
	s.t.Helper()
	conn := must(dialLoopback(s.context(), "tcp", s.server().address(scheme)))(s.t)
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// holdsOnly checks that nothing is held but these images, of which some may be missing.
func (s *scene) holdsOnly(images ...image) {
	s.t.Helper()
	known := make(map[string]bool)
	for _, im := range images {
		known["sha256:"+im.sum] = true
	}
	client := must(admin.Dial(s.path("data", "admin.sock")))(s.t)
	for after, first := "", true; first || after != ""; first = false {
		records, next, err := client.Images(cache.Filter{}, after, 1000)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, rec := range records {
			if !known[rec.Digest.String()] && !rec.Quarantined() {
				s.t.Errorf("held is %s with %d bytes, %v, which nobody published", rec.Name, rec.Size, rec.Digest)
			}
		}
		after = next
	}
}

// watch looks at the server's anonymous memory until what it returns is called, which returns by how much that grew at the most.
func (s *scene) watch() (stop func() int64) {
	p := s.server()
	before, over, grown := p.anonymous(), make(chan struct{}), make(chan int64, 1)
	// Ends when stop is called, which waits for it.
	go func() {
		every := time.NewTicker(10 * time.Millisecond)
		defer every.Stop()
		for most := before; ; {
			most = max(most, p.anonymous())
			select {
			case <-over:
				grown <- most - before
				return
			case <-every.C:
			}
		}
	}()
	return func() int64 {
		close(over)
		return <-grown
	}
}

// wantPeak checks by how much memory grew. A binary that looks for races takes many times as much.
func wantPeak(t testing.TB, grown, most int64) {
	t.Helper()
	if testtools.Raced {
		most *= 6
	}
	if grown > most {
		t.Errorf("the server's memory grew by %d MiB, want no more than %d", grown>>20, most>>20)
	}
	t.Logf("the server's memory grew by %d MiB", grown>>20)
}

// sumOf returns the SHA-256 of bytes, in hex.
func sumOf(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
