package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// A load is what clients are told to ask for, each on a connection of its own. All connections are there before the first one asks.
type load struct {
	URL         string
	Header      map[string]string
	CA          string  // file of the certificate to trust, for https
	Connections int     //
	Crawling    int     // of those who ask once: so many more ask with them, read a kilobyte a second, and leave when the others have everything
	Seconds     float64 // ask again and again for so long; 0 means once
	Want        answer
	// Before is what each of them asks for on its connection before, all at once: URL, Header and Want count. nil for nothing. The clients say when they have that, and go
	// on when they are told to.
	Before *load
}

// An answer is what clients have to get; anything else is an error.
type answer struct {
	Status int
	Size   int64  // of the body, less than 0 if any will do
	CRC    string // CRC-32C of the body, "" if it isn't checked
	SHA256 string // of the body, "" if it isn't checked
}

// loaded is what came of a load.
type loaded struct {
	Requests int     // answered whole
	Bytes    int64   // of bodies, those of answers that time ran out for too
	Seconds  float64 // from the first request on
	CPU      float64 // seconds that the clients used
	P99      float64 // seconds, of answers to those who asked again and again; 0 if it isn't known

	// Of each client that asked once, seconds from when all of them asked: until the first byte of the body had come to it, until it had its turn to read that, and
	// until it had read the last one.
	FirstByte, FirstRead, LastByte []float64

	Error string // the first thing that went wrong, "" if nothing did
}

// ask has clients in a process of their own ask for something. begin is called when they are about to, and what they asked for before has come; nil
// if nobody wants to know.
func ask(ctx context.Context, l load, begin func() error) (got loaded, err error) {
	cmd, err := roleCommand(roleClients, l)
	if err != nil {
		return loaded{}, err
	}
	dieWithUs(cmd)
	var said bytes.Buffer
	cmd.Stderr = &said
	spec := cmd.Stdin
	cmd.Stdin = nil
	in, err := cmd.StdinPipe()
	if err != nil {
		return loaded{}, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return loaded{}, err
	}
	if err := cmd.Start(); err != nil {
		return loaded{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err = func() error {
		if _, err := io.Copy(in, spec); err != nil {
			return err
		}
		said := json.NewDecoder(out)
		var ready bool
		if err := said.Decode(&ready); err != nil {
			return fmt.Errorf("waiting for the clients to be ready: %w", err)
		}
		if begin != nil {
			if err := begin(); err != nil {
				return err
			}
		}
		if err := in.Close(); err != nil {
			return err
		}
		return said.Decode(&got)
	}()
	if err != nil {
		_ = cmd.Process.Kill()
	}
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return loaded{}, fmt.Errorf("%s: %w: %s", cmd.Path, errors.Join(err, ctx.Err()), said.Bytes())
	}
	if got.Error != "" {
		return loaded{}, fmt.Errorf("asking for %s: %s", l.URL, got.Error)
	}
	return got, nil
}

// output runs a command to its end, or until the context ends, and returns what it has printed.
func output(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", cmd.Path, errors.Join(err, ctx.Err()), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

// wrkScript has wrk tell what it found as one line of JSON.
const wrkScript = `done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\nJSON {"requests":%d,"micros":%d,"bytes":%d,"errors":%d,"p99":%d}\n', summary.requests, summary.duration, summary.bytes,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(99)))
end
`

// askWithWrk is ask for small answers over plain http, by wrk, which costs less than our own clients do. It sees no more of an answer than whether
// its status is an error.
func askWithWrk(ctx context.Context, wrk, dir string, l load) (loaded, error) {
	script := filepath.Join(dir, "report.lua")
	if err := os.WriteFile(script, []byte(wrkScript), 0o644); err != nil {
		return loaded{}, err
	}
	// It takes whole seconds.
	seconds := max(1, int(l.Seconds+0.5))
	args := []string{"-t", strconv.Itoa(min(2, l.Connections)), "-c", strconv.Itoa(l.Connections), "-d", strconv.Itoa(seconds), "--timeout", "30", "-s", script}
	for _, name := range slices.Sorted(maps.Keys(l.Header)) {
		args = append(args, "-H", name+": "+l.Header[name])
	}
	cmd := exec.Command(wrk, append(args, l.URL)...)
	dieWithUs(cmd)
	out, err := output(ctx, cmd)
	if err != nil {
		return loaded{}, err
	}
	_, text, _ := strings.Cut(string(out), "\nJSON ")
	var got struct{ Requests, Micros, Bytes, Errors, P99 int }
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		return loaded{}, fmt.Errorf("wrk said %q: %w", out, err)
	}
	if least := int64(got.Requests) * l.Want.Size; got.Errors > 0 || int64(got.Bytes) < least || got.Requests == 0 {
		return loaded{}, fmt.Errorf("asking for %s: wrk counts %d errors, and %d bytes of %d answers, which are at least %d", l.URL, got.Errors, got.Bytes, got.Requests, least)
	}
	return loaded{
		Requests: got.Requests, Bytes: int64(got.Requests) * l.Want.Size, Seconds: float64(got.Micros) / 1e6, P99: float64(got.P99) / 1e6,
		CPU: (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(),
	}, nil
}

// playClients is the role of the clients.
func playClients(stdin io.Reader, stdout io.Writer) error {
	var l load
	if err := json.NewDecoder(stdin).Decode(&l); err != nil {
		return fmt.Errorf("reading what to ask for: %w", err)
	}
	told := json.NewEncoder(stdout)
	got := l.run(func() error {
		if err := told.Encode(true); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, stdin)
		return err
	})
	return told.Encode(got)
}

// run asks, with all connections at once. It calls ready before it does, when all has come that is asked for before.
func (l load) run(ready func() error) loaded {
	clients := make([]*client, l.Connections)
	for i := range clients {
		c, err := l.dial()
		if err != nil {
			return loaded{Error: err.Error()}
		}
		defer c.conn.Close()
		clients[i] = c
	}
	if l.Seconds == 0 {
		// The system shares its processors among clients, as it does among processes: in one queue of Go's, the first ones that have something to read would keep the
		// others waiting.
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(runtime.NumCPU(), len(clients))))
	}
	if l.Before != nil {
		askAtOnce(clients, *l.Before)
		for _, c := range clients {
			c.bytes, c.took = 0, nil
		}
	}
	crawlers := make([]*client, l.Crawling)
	for i := range crawlers {
		c, err := l.dial()
		if err != nil {
			return loaded{Error: err.Error()}
		}
		defer c.conn.Close()
		crawlers[i] = c
	}
	if err := ready(); err != nil {
		return loaded{Error: err.Error()}
	}
	before := cpuOfThisProcess()
	var started time.Time
	if l.Seconds > 0 {
		started = askAgain(clients, l)
	} else {
		left := crawl(crawlers, l)
		started = askAtOnce(clients, l)
		if err := left(); err != nil {
			return loaded{Error: err.Error()}
		}
	}
	out := loaded{Seconds: time.Since(started).Seconds(), CPU: cpuOfThisProcess() - before}
	var took []float64
	for _, c := range clients {
		if c.err != nil && out.Error == "" {
			out.Error = c.err.Error()
		}
		out.Requests += len(c.took)
		out.Bytes += c.bytes
		took = append(took, c.took...)
		if l.Seconds == 0 && c.err == nil {
			out.FirstByte, out.FirstRead = append(out.FirstByte, c.came.Sub(started.Round(0)).Seconds()), append(out.FirstRead, c.seen.Sub(started).Seconds())
			out.LastByte = append(out.LastByte, c.took[0])
		}
	}
	if slices.Sort(took); l.Seconds > 0 && len(took) > 0 {
		out.P99 = took[len(took)*99/100]
	}
	return out
}

// settling is for how long clients that are going to read wait until they ask, so that each of them has got as far as waiting for what comes, and the system has
// begun to note when it does.
const settling = 50 * time.Millisecond

// askAtOnce has clients ask once, and returns when they began. All have asked before the first one has its turn to read.
func askAtOnce(clients []*client, l load) (started time.Time) {
	request := l.request()
	var reading sync.WaitGroup
	for _, c := range clients {
		if c.err == nil {
			reading.Go(func() { c.err = c.read(l.Want) })
		}
	}
	time.Sleep(settling)
	started = time.Now()
	for _, c := range clients {
		if _, err := c.conn.Write(request); err != nil {
			_ = c.conn.Close() // whoever reads from it finds out
		}
	}
	reading.Wait()
	for _, c := range clients {
		if c.err == nil {
			c.took = append(c.took, c.done.Sub(started).Seconds())
		}
	}
	return started
}

// crawl has clients ask, and read a kilobyte a second. left has them leave, and returns why one of them got less than that.
func crawl(clients []*client, l load) (left func() error) {
	request, over := l.request(), make(chan struct{})
	var reading errgroup.Group
	for _, c := range clients {
		// Each ends when the others have everything; waited for by left.
		reading.Go(func() error {
			if _, err := c.conn.Write(request); err != nil {
				return err
			}
			resp, err := http.ReadResponse(c.reader, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if resp.StatusCode != l.Want.Status {
				return fmt.Errorf("the answer to one who reads slowly is %s", resp.Status)
			}
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for {
				if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
					return fmt.Errorf("one who reads slowly: %w", err)
				}
				select {
				case <-tick.C:
				case <-over:
					return c.conn.Close()
				}
			}
		})
	}
	return func() error {
		close(over)
		return reading.Wait()
	}
}

// askAgain has clients ask again and again until the time is over, and returns when they began.
func askAgain(clients []*client, l load) (started time.Time) {
	request := l.request()
	started = time.Now()
	var asking sync.WaitGroup
	for _, c := range clients {
		asking.Go(func() { c.askUntil(l.Want, request, started.Add(time.Duration(l.Seconds*float64(time.Second)))) })
	}
	asking.Wait()
	return started
}

func cpuOfThisProcess() float64 {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		return 0
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano()).Seconds()
}

// A client asks on one connection.
type client struct {
	conn   net.Conn
	reader *bufio.Reader
	buffer []byte

	bytes int64
	took  []float64 // seconds to the last byte, of each whole answer
	err   error

	// Of the last answer: when the first byte of its body had come, by the wall clock, when it was read, and when the last one was.
	came, seen, done time.Time
}

// readSize is how much a client reads at once.
const readSize = 256 << 10

func (l load) dial() (*client, error) {
	u, err := url.Parse(l.URL)
	if err != nil {
		return nil, err
	}
	c := &client{buffer: make([]byte, readSize)}
	if c.conn, err = net.Dial("tcp", u.Host); err != nil {
		return nil, err
	}
	if l.Seconds == 0 && u.Scheme != "https" {
		if c.conn, err = stamped(c.conn); err != nil {
			return nil, err
		}
	}
	if u.Scheme == "https" {
		pool := x509.NewCertPool()
		pem, err := os.ReadFile(l.CA)
		if err == nil && !pool.AppendCertsFromPEM(pem) {
			err = fmt.Errorf("%s holds no certificate", l.CA)
		}
		if err != nil {
			return nil, errors.Join(err, c.conn.Close())
		}
		secure := tls.Client(c.conn, &tls.Config{RootCAs: pool, ServerName: u.Hostname(), MinVersion: tls.VersionTLS12})
		if err := secure.Handshake(); err != nil {
			return nil, errors.Join(err, c.conn.Close())
		}
		c.conn = secure
	}
	c.reader = bufio.NewReader(c.conn)
	return c, nil
}

// request returns the request of a load, as it is sent.
func (l load) request() []byte {
	var b bytes.Buffer
	u, err := url.Parse(l.URL)
	if err != nil {
		u = new(url.URL) // nobody could be dialled there
	}
	host := u.Host
	if h := l.Header["Host"]; h != "" {
		host = h
	}
	fmt.Fprintf(&b, "GET %s HTTP/1.1\r\nHost: %s\r\n", u.RequestURI(), host)
	for _, name := range slices.Sorted(maps.Keys(l.Header)) {
		if name != "Host" {
			fmt.Fprintf(&b, "%s: %s\r\n", name, l.Header[name])
		}
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// askUntil asks again and again until the time is over.
func (c *client) askUntil(want answer, request []byte, end time.Time) {
	c.err = c.conn.SetDeadline(end)
	for c.err == nil {
		asked := time.Now()
		if _, c.err = c.conn.Write(request); c.err != nil {
			break
		}
		if c.err = c.read(want); c.err == nil {
			c.took = append(c.took, c.done.Sub(asked).Seconds())
		}
	}
	if errors.Is(c.err, os.ErrDeadlineExceeded) {
		c.err = nil
	}
}

// read reads the answer to what was asked.
func (c *client) read(want answer) error {
	resp, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want.Status {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1000)) // whatever can be read of the reason
		return fmt.Errorf("the answer is %s, not %d: %s", resp.Status, want.Status, b)
	}
	var size int64
	sums := want.sums()
	for {
		buffer := c.buffer
		if size == 0 {
			buffer = buffer[:1] // so that what is read with it came with it
		}
		n, err := resp.Body.Read(buffer)
		if n > 0 && size == 0 {
			c.seen = time.Now()
			if c.came = arrived(c.conn); c.came.IsZero() {
				c.came = c.seen.Round(0)
			}
		}
		size += int64(n)
		c.bytes += int64(n)
		for _, s := range sums {
			s.hash.Write(c.buffer[:n])
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("after %d bytes of %d: %w", size, want.Size, err)
		}
	}
	c.done = time.Now()
	if size != want.Size && want.Size >= 0 {
		return fmt.Errorf("%d bytes came, not %d", size, want.Size)
	}
	for _, s := range sums {
		if got := hex.EncodeToString(s.hash.Sum(nil)); got != s.want {
			return fmt.Errorf("%d bytes came, and their checksum is %s, not %s", size, got, s.want)
		}
	}
	return nil
}

type sum struct {
	hash hash.Hash
	want string
}

// sums returns what has to be computed of a body.
func (a answer) sums() []sum {
	var sums []sum
	if a.CRC != "" {
		sums = append(sums, sum{crc32.New(crc32.MakeTable(crc32.Castagnoli)), a.CRC})
	}
	if a.SHA256 != "" {
		sums = append(sums, sum{sha256.New(), a.SHA256})
	}
	return sums
}
