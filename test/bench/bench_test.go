package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestMain plays the other roles when this program is started again for one.
func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(play(role, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// miniature is every benchmark with as little of everything as will do.
var miniature = []string{
	"-rounds", "1", "-seconds", "0.1", "-size", "400000", "-small", "100000", "-herd-size", "200000", "-slow-size", "50000", "-slow-rate", "1000000",
	"-images", "50", "-connections", "3", "-clients", "2", "-herd", "5", "-waiting", "2", "-install=false", "-held", "300",
}

// inMiniature runs the program and returns its report. What it leaves behind fails the test.
func inMiniature(t *testing.T, args ...string) (r report, svg []byte) {
	t.Helper()
	files := t.TempDir()
	// Not TempDir: a socket's path has to be short.
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	jsonFile, svgFile := filepath.Join(files, "out.json"), filepath.Join(files, "out.svg")
	var stdout, stderr bytes.Buffer
	all := slices.Concat(miniature, []string{"-json", jsonFile, "-svg", svgFile}, args)
	if code := run(all, &stdout, &stderr); code != 0 {
		t.Fatalf("bench %s = %d\n%s\n%s", strings.Join(all, " "), code, &stderr, &stdout)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("it left %v behind (%v)", left, err)
	}
	text, err := os.ReadFile(jsonFile)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	if svg, err = os.ReadFile(svgFile); err != nil {
		t.Fatal(err)
	}
	return r, svg
}

// TestEveryBenchmarkRuns runs all of them, with those contestants for whom nothing has to be installed. It says nothing about speeds.
func TestEveryBenchmarkRuns(t *testing.T) {
	r, svg := inMiniature(t, "-wrk=false", "-only", strings.Join([]string{acproxyName, goFiles, goMemory, goCopier, directName, gpgName, "one core", "images", closedName, killedName, missingName}, ","))
	o := options{size: 400000, small: 100000, herd: 200000, slow: 50000, connections: numbers{3}, clients: numbers{2}, herds: numbers{5}, waiting: 2}
	for _, b := range benchmarks(o) {
		var must []string // who needs nothing installed
		switch family, _, _ := strings.Cut(b.name, "/"); family {
		case "verify":
			must = []string{acproxyName}
		case "decisions", "rejudge":
		case "export", "import":
			must = []string{acproxyName}
		case "million":
			must = []string{closedName, killedName}
		case "cold", "herd", "slow":
			must = []string{directName, goCopier, acproxyName}
		case "crawl":
			must = []string{directName, goCopier, acproxyName, acproxyAlone}
		default:
			must = []string{goFiles, goMemory, acproxyName}
		}
		if strings.HasPrefix(b.name, "image/https/") {
			must = []string{acproxyName}
		}
		for _, m := range b.metrics {
			for _, name := range must {
				got, ok := find(r.Results, b.name, name, m.name)
				if !ok || len(got.Runs) != 1 || got.Median < 0 || math.IsNaN(got.Median) || got.Unit != m.unit {
					t.Errorf("%s has %+v of %s by %s", b.name, got, name, m.name)
				}
			}
			if m == requestRate || m == throughput || m == lastByte || m == firstByte {
				if got, _ := find(r.Results, b.name, acproxyName, m.name); got.Median <= 0 {
					t.Errorf("%s: %s of acproxy is %v", b.name, m.name, got.Median)
				}
			}
		}
		if !slices.ContainsFunc(r.Results, func(res result) bool { return res.Benchmark == b.name }) {
			t.Errorf("there is no result of %s", b.name)
		}
		for _, g := range b.goals {
			if g.than != "" && !slices.Contains(must, g.than) {
				continue // that peer may not be installed
			}
			if !slices.ContainsFunc(r.Goals, func(v verdict) bool { return v.Benchmark == b.name && v.Metric == g.metric && v.Than == g.than }) {
				t.Errorf("%s has no verdict about %+v", b.name, g)
			}
		}
	}
	for _, b := range []string{"herd/5", "crawl/5", "slow/2"} {
		if got, _ := find(r.Results, b, acproxyName, fetches.name); got.Median != 1 {
			t.Errorf("%s: acproxy asked its publisher %v times", b, got.Median)
		}
	}
	if got, _ := find(r.Results, "herd/5", directName, fetches.name); got.Median != 5 {
		t.Errorf("herd/5: the publisher counts %v direct downloads", got.Median)
	}
	if !strings.Contains(strings.Join(r.Notes, "\n"), "zot") {
		t.Errorf("the notes say nothing of zot: %q", r.Notes)
	}
	wantSVG(t, svg, "herd/5: fetched, times", acproxyName)
}

// peersEnv names the environment variable that has the tests start the peers too, which takes minutes.
const peersEnv = "ACPROXY_TEST_PEERS"

func needPeers(t *testing.T) {
	t.Helper()
	if os.Getenv(peersEnv) == "" {
		t.Skipf("it starts the peers, which takes minutes: set %s=1 to have it run", peersEnv)
	}
}

// TestPeersRun runs those peers that are installed, in one benchmark of each kind.
func TestPeersRun(t *testing.T) {
	needPeers(t)
	const warm, secure, cold = "signature/3", "image/https/100000B/2", "herd/5"
	r, _ := inMiniature(t, "-wrk=false", warm, secure, cold)
	for _, p := range peers() {
		if p.program == "" {
			continue
		}
		if _, err := installed(t.Context(), options{}, p.program, p.debian); err != nil {
			if !strings.Contains(strings.Join(r.Notes, "\n"), p.name+" is left out") {
				t.Errorf("%s is not installed, and no note says so: %q", p.name, r.Notes)
			}
			continue
		}
		for name, takesPart := range map[string]bool{warm: p.warm, secure: p.warm && p.secure, cold: p.cold} {
			took := slices.ContainsFunc(r.Results, func(res result) bool { return res.Benchmark == name && res.Contestant == p.name })
			if took != takesPart {
				t.Errorf("%s takes part in %s: %v, want %v", p.name, name, took, takesPart)
			}
		}
	}
}

// TestWrkAsks runs small benchmarks with wrk, where that is installed, and has acproxy profiled meanwhile.
func TestWrkAsks(t *testing.T) {
	needPeers(t)
	profiles := filepath.Join(t.TempDir(), "profiles")
	r, _ := inMiniature(t, "-only", acproxyName, "-profile", profiles, "page", "not-modified")
	for _, b := range []string{"page/3", "not-modified/3"} {
		for _, m := range []metric{requestRate, p99, byClients} {
			if got, _ := find(r.Results, b, acproxyName, m.name); got.Median <= 0 {
				t.Errorf("%s: %s is %v", b, m.name, got.Median)
			}
		}
		if fi, err := os.Stat(filepath.Join(profiles, strings.ReplaceAll(b, "/", "-")+".pprof")); err != nil || fi.Size() == 0 {
			t.Errorf("there is no profile of %s: %v", b, err)
		}
	}
	_, err := exec.LookPath("wrk")
	if said := strings.Contains(strings.Join(r.Notes, "\n"), "our own clients ask"); said != (err != nil) {
		t.Errorf("wrk is there: %v; the notes are %q", err == nil, r.Notes)
	}
}

func wantSVG(t *testing.T, svg []byte, texts ...string) {
	t.Helper()
	var found []string
	for dec := xml.NewDecoder(bytes.NewReader(svg)); ; {
		token, err := dec.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("the chart is not XML: %v\n%s", err, svg)
		}
		if text, ok := token.(xml.CharData); ok {
			found = append(found, string(text))
		}
	}
	for _, text := range texts {
		if !slices.Contains(found, text) {
			t.Errorf("the chart doesn't say %q", text)
		}
	}
}

// given makes a benchmark of contestants whose runs give numbers that are known before.
func given(b benchmark, runs map[string][]float64, order ...string) benchmark {
	b.setUp = func(context.Context, options) (stage, error) {
		s := stage{close: func() error { return nil }}
		for _, name := range order {
			next := 0
			s.contestants = append(s.contestants, contestant{name, func(context.Context) (measures, error) {
				v := runs[name][next]
				next++
				if v < 0 {
					return nil, errors.New("it broke")
				}
				return measures{b.metrics[0].name: v}, nil
			}})
		}
		return s, nil
	}
	return b
}

func TestMeasure(t *testing.T) {
	b := given(benchmark{name: "b", metrics: []metric{requestRate}}, map[string][]float64{
		"first":  {1, 10, 30, 20},
		"second": {1000, 40, 40, 41},
		"third":  {5, 5, -1},
	}, "first", "second", "third")
	results, err := measure(t.Context(), b, options{rounds: 3}, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "third: it broke") {
		t.Errorf("the error is %v", err)
	}
	want := []result{
		{Benchmark: "b", Contestant: "first", Metric: "requests", Unit: "/s", Runs: []float64{10, 30, 20}, Median: 20, Spread: 1, Ratio: 1},
		{Benchmark: "b", Contestant: "second", Metric: "requests", Unit: "/s", Runs: []float64{40, 40, 41}, Median: 40, Spread: 0.025, Ratio: 2},
	}
	if len(results) != len(want) {
		t.Fatalf("measure = %+v, want %+v", results, want)
	}
	for i, r := range results {
		if !slices.Equal(r.Runs, want[i].Runs) || r.Median != want[i].Median || r.Spread != want[i].Spread || r.Ratio != want[i].Ratio || r.Contestant != want[i].Contestant {
			t.Errorf("measure = %+v, want %+v", r, want[i])
		}
	}
	some, err := measure(t.Context(), given(benchmark{name: "b", metrics: []metric{requestRate}}, map[string][]float64{"one": {1, 1}, "two": {2, 2}}, "one", "two"),
		options{rounds: 1, only: "nobody,tw"}, io.Discard)
	if err != nil || len(some) != 1 || some[0].Contestant != "two" {
		t.Errorf("with -only, measure = %+v, %v", some, err)
	}
}

func TestGoals(t *testing.T) {
	results := func(ours, theirs float64) []result {
		return []result{{Benchmark: "b", Contestant: "us", Metric: "m", Median: ours}, {Benchmark: "b", Contestant: "them", Metric: "m", Median: theirs}}
	}
	for _, tt := range []struct {
		name         string
		goal         goal
		more         bool
		ours, theirs float64
		says         string
		reached      bool
	}{
		{"less is better, just reached", goal{of: "us", metric: "m", than: "them", by: 1.02}, false, 102, 100, "m of us ≤ 1.02 × them", true},
		{"less is better, just missed", goal{of: "us", metric: "m", than: "them", by: 1.02}, false, 102.1, 100, "m of us ≤ 1.02 × them", false},
		{"more is better, just reached", goal{of: "us", metric: "m", than: "them", by: 0.9}, true, 90, 100, "m of us ≥ 0.90 × them", true},
		{"more is better, just missed", goal{of: "us", metric: "m", than: "them", by: 0.9}, true, 89.9, 100, "m of us ≥ 0.90 × them", false},
		{"a peer and something", goal{of: "us", metric: "m", than: "them", by: 1, plus: 10}, false, 110, 100, "m of us ≤ 1.00 × them + 10 u", true},
		{"a limit", goal{of: "us", metric: "m", plus: 64}, false, 65, 100, "m of us ≤ 64 u", false},
		{"with a reason", goal{of: "us", metric: "m", plus: 1, why: "because"}, false, 1, 1, "m of us ≤ 1 u (because)", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := benchmark{name: "b", metrics: []metric{{"m", "u", tt.more}}, goals: []goal{tt.goal}}
			got := judge(b, results(tt.ours, tt.theirs))
			if len(got) != 1 || got[0].Goal != tt.says || got[0].Reached != tt.reached {
				t.Errorf("judge = %+v, want %q, reached %v", got, tt.says, tt.reached)
			}
			if none := judge(b, results(1, 1)[1:]); len(none) != 0 {
				t.Errorf("without a result of ours, judge = %+v", none)
			}
		})
	}
}

func TestChoose(t *testing.T) {
	all := []benchmark{{name: "image/http/1", groups: []string{"a"}}, {name: "image/https/1", groups: []string{"a", "b"}}, {name: "verify", groups: []string{"b"}}}
	for _, tt := range []struct {
		name, group string
		names, want []string
		fails       bool
	}{
		{name: "all", want: []string{"image/http/1", "image/https/1", "verify"}},
		{name: "a group", group: "b", want: []string{"image/https/1", "verify"}},
		{name: "the beginning of a name", names: []string{"image"}, want: []string{"image/http/1", "image/https/1"}},
		{name: "by segments", names: []string{"image/http"}, want: []string{"image/http/1"}},
		{name: "of a group", group: "b", names: []string{"image"}, want: []string{"image/https/1"}},
		{name: "no such name", names: []string{"verify", "imag"}, fails: true},
		{name: "no such group", group: "c", fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			chosen, err := choose(all, tt.group, tt.names)
			var names []string
			for _, b := range chosen {
				names = append(names, b.name)
			}
			if !slices.Equal(names, tt.want) || (err != nil) != tt.fails {
				t.Errorf("choose = %q, %v, want %q", names, err, tt.want)
			}
		})
	}
}

func TestNumbers(t *testing.T) {
	var n numbers
	if err := n.Set("1,16,128"); err != nil || n.String() != "1,16,128" {
		t.Errorf("Set = %v, %v", n, err)
	}
	for _, bad := range []string{"", "1,", "0", "-1", "many"} {
		if err := n.Set(bad); err == nil {
			t.Errorf("Set(%q) took it, as %v", bad, n)
		}
	}
}

// TestPace wants bytes to take as long as the rate says, one after the other and for two at once.
func TestPace(t *testing.T) {
	for _, tt := range []struct {
		name   string
		shared bool
		want   time.Duration
	}{{"each its own", false, 10 * time.Second}, {"together", true, 20 * time.Second}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				started := time.Now()
				shared := newPace(1000)
				done := make(chan time.Duration, 2)
				for range 2 {
					p := shared
					if !tt.shared {
						p = newPace(1000)
					}
					// Reports to done, which this test reads.
					go func() {
						n, err := (&pacedWriter{httptest.NewRecorder(), p}).Write(make([]byte, 10_000))
						if n != 10_000 || err != nil {
							t.Errorf("Write = %d, %v", n, err)
						}
						done <- time.Since(started)
					}()
				}
				last := max(<-done, <-done)
				// The last piece goes when its time has come; the first has none to wait for but its own.
				if last < tt.want-catchUp || last > tt.want {
					t.Errorf("it took %v, want %v", last, tt.want)
				}
			})
		})
	}
}

// TestChart wants what is better to the right, what is further than the chart is wide at its edge, and no name to break the drawing.
func TestChart(t *testing.T) {
	more, less := panel{more: true, base: 100}, panel{base: 100}
	centre := more.place(100)
	if more.place(200) <= centre || more.place(50) >= centre || less.place(50) <= centre || less.place(200) >= centre {
		t.Error("what is better is not to the right")
	}
	if more.place(1e9) != barsLeft+barsWidth || more.place(1e-9) != barsLeft || math.Abs(more.place(200)-less.place(50)) > 1e-9 {
		t.Errorf("the edges are at %v and %v", more.place(1e-9), more.place(1e9))
	}
	r := report{
		Command: `bench "<&>"`,
		Results: []result{
			{Benchmark: "b", Contestant: "us & <co>", Metric: "m", Unit: "s", Median: 2},
			{Benchmark: "b", Contestant: "them", Metric: "m", Unit: "s", Median: 1},
			{Benchmark: "b", Contestant: "nothing", Metric: "m", Unit: "s"},
		},
		Goals: []verdict{
			{Benchmark: "b", Goal: "m of us ≤ 1.00 × them", Metric: "m", Unit: "s", Wanted: 1, Got: 2, Of: "us & <co>", Than: "them"},
			{Benchmark: "b", Goal: "m of us ≤ 3 s", Metric: "m", Unit: "s", Wanted: 3, Got: 2, Of: "us & <co>", Reached: true},
		},
	}
	if panels := r.panels(); len(panels) != 1 || len(panels[0].goals) != 2 || panels[0].base != 1 {
		t.Errorf("panels = %+v", panels)
	}
	wantSVG(t, chart(r), `bench "<&>"`, "b: m, s", "us & <co>", "2.00 × (2 s)", "0.00 × (0 s)", "them")
	wantSVG(t, chart(report{}))
}

// TestAnswersAreChecked wants clients to notice whatever isn't as it has to be.
func TestAnswersAreChecked(t *testing.T) {
	root := t.TempDir()
	body := []byte("some bytes")
	if err := os.WriteFile(filepath.Join(root, "file"), body, 0o644); err != nil {
		t.Fatal(err)
	}
	p := newPublisher(publisherSpec{Root: root})
	s := httptest.NewServer(p)
	defer s.Close()
	good := load{URL: s.URL + "/file", Connections: 3, Want: answer{Status: 200, Size: int64(len(body)), SHA256: hexSHA256(body)}}
	atOnce := func() error { return nil }
	for range 2 {
		got := good.run(atOnce)
		if got.Error != "" || got.Requests != 3 || got.Bytes != 3*int64(len(body)) || len(got.FirstByte) != 3 || len(got.FirstRead) != 3 || len(got.LastByte) != 3 {
			t.Errorf("run = %+v", got)
		}
		for i := range got.LastByte {
			// The wall clock, by which bytes come, may be set meanwhile, but not by that much.
			if first, read, last := got.FirstByte[i], got.FirstRead[i], got.LastByte[i]; first < -1 || first > read+1 || read < 0 || last < read {
				t.Errorf("the first byte came after %g s and was read after %g s, and the last one after %g s", first, read, last)
			}
		}
		p.mu.Lock()
		if want := 3; p.fetched["/file"] != want && good.Before == nil || good.Before != nil && p.fetched["/file"] != 3*want {
			t.Errorf("the publisher counts %v", p.fetched)
		}
		p.mu.Unlock()
		before := good
		good.Before = &before
	}
	good.Before = nil
	if got := good.run(func() error { return errors.New("not now") }); got.Error != "not now" {
		t.Errorf("whoever isn't ready gets %+v", got)
	}
	for name, change := range map[string]func(*load){
		"another status":  func(l *load) { l.Want.Status = 304 },
		"another size":    func(l *load) { l.Want.Size++ },
		"another SHA-256": func(l *load) { l.Want.SHA256 = hexSHA256(nil) },
		"another CRC":     func(l *load) { l.Want.CRC = "00000000" },
		"not there":       func(l *load) { l.URL += "s" },
		"again and again": func(l *load) { l.Seconds, l.Want.Size = 1, 1 },
	} {
		bad := good
		change(&bad)
		if got := bad.run(atOnce); got.Error == "" {
			t.Errorf("%s: run = %+v", name, got)
		}
	}
}

// TestArrivals: what lies in the socket has come before it is read.
func TestArrivals(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	plain, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := stamped(plain)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	b := make([]byte, 10)
	const pause = 50 * time.Millisecond
	// The system begins with its notes some moments after it was told to.
	for end := time.Now().Add(10 * time.Second); ; {
		sent := time.Now()
		if _, err := peer.Write([]byte("byte")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause)
		n, err := conn.Read(b)
		if err != nil || string(b[:n]) != "byte" {
			t.Fatalf("Read = %q, %v", b[:n], err)
		}
		read, at := time.Now(), arrived(conn)
		if at.IsZero() && time.Now().Before(end) {
			if runtime.GOOS != "linux" {
				break
			}
			continue
		}
		if read.Sub(at) < pause || at.Before(sent.Add(-time.Second)) {
			t.Errorf("sent at %v, it came at %v, and was read at %v, a pause of %v later", sent, at, read, pause)
		}
		break
	}
	if err := peer.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(b); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}
