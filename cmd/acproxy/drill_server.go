package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// act is a scenario that is being played: the server that it happens to, a node, and what was seen.
type act struct {
	*drill
	scenario scenario
	dir      string // of this scenario alone
	dataDir  string
	cfg      *config.Config
	node     *node.Node
	server   *child // nil while none runs
	before   map[string]string
	report   rehearsal
}

// child is a server that runs in a process of its own.
type child struct {
	cmd   *exec.Cmd
	url   string
	ended chan struct{} // closed when it is over and its log is read

	mu   sync.Mutex
	log  []string
	seen int // lines of log that were shown
}

// How long the server may take to serve, and to stop, on a machine that does other things too.
const (
	startPatience = 30 * time.Second
	stopPatience  = 15 * time.Second
)

// servingLine is where the log says that the server serves.
var servingLine = regexp.MustCompile(`msg=serving .*addresses=\S*(http://[0-9.:]+[0-9])`)

// configure gives the server its configuration.
func (a *act) configure(change func(*config.Config)) error {
	cfg, err := a.scene.configure(a.dataDir)
	if err != nil {
		return err
	}
	// A socket's path has to be short, and only one server runs at a time. These are read and written by both sides when the data directory is a file system that only the server sees.
	cfg.Admin.Socket, cfg.Audit.File, cfg.Trust.LocalDir = filepath.Join(a.drill.scene.dir, "sock"), filepath.Join(a.dir, "audit.log"), filepath.Join(a.dir, "trustedkeys")
	// The real disk may have little left, and that is not what is rehearsed.
	cfg.Cache.MinFree = 0
	cfg.Log.AccessFlush = 0
	if change != nil {
		change(cfg)
	}
	a.cfg = cfg
	text, err := cfg.YAML()
	if err != nil {
		return err
	}
	return os.WriteFile(a.configFile(), text, 0o600)
}

func (a *act) configFile() string { return filepath.Join(a.dir, "config.yaml") }

// trust trusts a key for the publisher's images.
func (a *act) trust(key *trusttest.Key) error {
	_, err := trust.Add(trustDirs(a.cfg), sceneHost, key.Armored())
	return err
}

// self returns a command of this very binary.
func self(ctx context.Context, args ...string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Args[0] = "acproxy"
	// Whatever this machine's proxy is, the publisher is here.
	cmd.Env = append(os.Environ(), "HTTPS_PROXY=", "https_proxy=", "HTTP_PROXY=", "http_proxy=")
	return cmd, nil
}

// serve starts the server, and returns when it serves. prepare may change the command.
func (a *act) serve(ctx context.Context, prepare func(*exec.Cmd)) error {
	cmd, err := self(context.WithoutCancel(ctx), "serve", "--config", a.configFile())
	if err != nil {
		return err
	}
	cmd.SysProcAttr = endsWithUs()
	if prepare != nil {
		prepare(cmd)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	c := &child{cmd: cmd, ended: make(chan struct{})}
	serving := make(chan string, 1)
	// Ends with the server, which stop ends and waits for.
	go c.read(stderr, serving)
	a.server = c
	timeout := time.NewTimer(startPatience)
	defer timeout.Stop()
	select {
	case c.url = <-serving:
		a.before, err = a.metrics(ctx)
		return err
	case <-c.ended:
		return fmt.Errorf("the server ended before it served:\n%s", strings.Join(c.unseen(), "\n"))
	case <-timeout.C:
		return fmt.Errorf("the server didn't serve within %v", startPatience)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read takes the log, and what the process leaves when it is over.
func (c *child) read(stderr io.Reader, serving chan<- string) {
	defer close(c.ended)
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		c.mu.Lock()
		c.log = append(c.log, lines.Text())
		c.mu.Unlock()
		if m := servingLine.FindStringSubmatch(lines.Text()); m != nil {
			serving <- m[1]
		}
	}
	_ = c.cmd.Wait() // how it ended is in ProcessState
}

// unseen returns the lines of the log that weren't returned before.
func (c *child) unseen() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := slices.Clone(c.log[c.seen:])
	c.seen = len(c.log)
	return out
}

// stop ends the server as an operator does, and wants it to end in good order.
func (a *act) stop() error {
	c := a.server
	if c == nil {
		return nil
	}
	a.server = nil
	// One that has ended by itself can't be signalled, which shows in how it ended.
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	timeout := time.NewTimer(stopPatience)
	defer timeout.Stop()
	select {
	case <-c.ended:
	case <-timeout.C:
		_ = c.cmd.Process.Kill() // as above
		<-c.ended
	}
	if err := os.WriteFile(filepath.Join(a.dir, "server.log"), []byte(strings.Join(c.log, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	if code := c.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("the server ended with %v:\n%s", c.cmd.ProcessState, strings.Join(c.log[max(0, len(c.log)-20):], "\n"))
	}
	return nil
}

// restart stops the server, changes its configuration, and starts it again.
func (a *act) restart(ctx context.Context, change func(*config.Config)) error {
	if err := a.stop(); err != nil {
		return err
	}
	if err := a.configure(change); err != nil {
		return err
	}
	return a.serve(ctx, nil)
}

// add prints and keeps what was done or seen.
func (a *act) add(e event) {
	if e.OK != nil {
		a.report.Promises++
		if !*e.OK {
			a.report.Broken++
			a.report.OK = false
		}
	}
	a.report.Steps = append(a.report.Steps, e)
	a.out.event(e)
}

// did says what was done. From then on counts what the metrics change.
func (a *act) did(format string, args ...any) { a.add(event{Did: fmt.Sprintf(format, args...)}) }

// promise says what has to be, and whether it is.
func (a *act) promise(ok bool, format string, args ...any) {
	a.add(event{Promise: fmt.Sprintf(format, args...), OK: &ok})
}

// get has the node ask for an image, and holds the answer against what it should be.
func (a *act) get(ctx context.Context, name, what string, want expect) node.Answer {
	return a.ask(ctx, name, what, imageLabels(), want)
}

// imageLabels returns the labels that all images have.
func imageLabels() url.Values {
	values := url.Values{}
	for label, value := range sceneLabels {
		values.Set(label, value)
	}
	return values
}

// imageURL is where a node asks for an image directly.
func (a *act) imageURL(name string, labels url.Values) string {
	return a.server.url + server.Root + "images/" + sceneHost + "/" + name + ".aci?" + labels.Encode()
}

func (a *act) ask(ctx context.Context, name, what string, labels url.Values, want expect) node.Answer {
	got := a.node.Get(ctx, a.imageURL(name, labels), nil, nil)
	wrong := want.wrong(got)
	ok := len(wrong) == 0
	problem := problemType(got)
	a.add(event{OK: &ok, Wrong: wrong, Answer: &drillAnswer{
		Image: what, URL: got.URL, Status: got.Status, Problem: problem[strings.LastIndex(problem, ":")+1:], Detail: got.Detail(),
		CacheStatus: got.Header.Get("Cache-Status"), RetryAfter: got.Header.Get("Retry-After"), Seconds: got.Took.Seconds(),
	}})
	return got
}

// command runs one of acproxy's commands as an operator does, and wants its exit code, and that it prints something.
func (a *act) command(ctx context.Context, exit int, prints string, args ...string) error {
	got, err := a.execute(ctx, args)
	if err != nil {
		return err
	}
	var wrong []string
	if got.Exit != exit {
		wrong = append(wrong, fmt.Sprintf("exit code %d, should be %d", got.Exit, exit))
	}
	if !regexp.MustCompile(prints).MatchString(got.Output) {
		wrong = append(wrong, fmt.Sprintf("it doesn't print %q", prints))
	}
	ok := len(wrong) == 0
	a.add(event{OK: &ok, Wrong: wrong, Command: &got})
	return nil
}

// eventually is command for what the server notices only when it looks the next time, within a few seconds.
func (a *act) eventually(ctx context.Context, prints string, args ...string) error {
	for range 50 {
		got, err := a.execute(ctx, args)
		if err != nil {
			return err
		}
		if regexp.MustCompile(prints).MatchString(got.Output) {
			break
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return a.command(ctx, exitOK, prints, args...)
}

// execute runs one of acproxy's commands.
func (a *act) execute(ctx context.Context, args []string) (drillCommand, error) {
	cmd, err := self(ctx, append(slices.Clone(args), "--config", a.configFile())...)
	if err != nil {
		return drillCommand{}, err
	}
	cmd.Dir = a.dir
	out, err := cmd.CombinedOutput()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		return drillCommand{}, err
	}
	return drillCommand{
		Command: "acproxy " + strings.Join(args, " "), Exit: cmd.ProcessState.ExitCode(), Output: strings.TrimRight(string(out), "\n"),
	}, nil
}

// The lines of the log that say nothing of what is rehearsed.
var idleLine = regexp.MustCompile(` msg=(request|serving|stopping|"serving operators"|"image kept") |level=DEBUG`)

// shown are the lines of a log at most that are worth showing.
const shownLines = 4

// logged shows what the server has said since the last time, and wants it to say something.
func (a *act) logged(says string) {
	var lines []string
	said := false
	for _, line := range a.server.unseen() {
		matches := says != "" && strings.Contains(line, says)
		said = said || matches
		if matches || !idleLine.MatchString(line) {
			lines = append(lines, line)
		}
	}
	if len(lines) > shownLines {
		lines = append(lines[:shownLines-1:shownLines-1], lines[len(lines)-1])
	}
	e := event{Log: lines}
	if says != "" {
		e.OK = &said
		if !said {
			e.Wrong = []string{fmt.Sprintf("the log doesn't say %q", says)}
		}
	}
	if len(lines) > 0 || !said {
		a.add(e)
	}
}

// metrics asks the server for its metrics, by name and labels.
func (a *act) metrics(ctx context.Context) (map[string]string, error) {
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", a.cfg.Admin.Socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://acproxy/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := make(map[string]string)
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if i := strings.LastIndexByte(lines.Text(), ' '); i > 0 && !strings.HasPrefix(lines.Text(), "#") {
			out[lines.Text()[:i]] = lines.Text()[i+1:]
		}
	}
	return out, lines.Err()
}

// moved shows which of some metrics have changed since the situation began, and returns all of them that have.
func (a *act) moved(ctx context.Context, families ...string) ([]metricChange, error) {
	now, err := a.metrics(ctx)
	if err != nil {
		return nil, err
	}
	var changes []metricChange
	for metric, after := range now {
		name, _, _ := strings.Cut(metric, "{")
		if before := a.before[metric]; before != after && slices.Contains(families, name) {
			changes = append(changes, metricChange{Metric: metric, Before: before, After: after})
		}
	}
	slices.SortFunc(changes, func(x, y metricChange) int { return strings.Compare(x.Metric, y.Metric) })
	if len(changes) > 0 {
		a.add(event{Metrics: changes})
	}
	return changes, nil
}

// alert says that one of the alerts would fire if its metric has moved away from 0, which it has to.
func (a *act) alert(changes []metricChange, al alarm) {
	for _, c := range changes {
		if strings.HasPrefix(c.Metric, al.metric) && strings.Contains(c.Metric, al.label) && c.After != "0" {
			ok := true
			a.add(event{OK: &ok, Alert: &drillAlert{Name: al.name, Severity: al.severity, After: al.after, Metric: c.Metric}})
			return
		}
	}
	a.promise(false, "the alert %s would fire: %s moves", al.name, al.metric)
}

// alarm is an alert of deploy/prometheus/alerts.yaml, and what makes it fire.
type alarm struct {
	name, severity, after string
	metric, label         string // the metric's name, and a label that it has
}
