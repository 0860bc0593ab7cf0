package server

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/trust"
)

// replayScene is a door to a heldScene, with a clock that is moved by hand.
type replayScene struct {
	*heldScene
	t       *testing.T
	door    *Door
	address string
	ahead   atomic.Int64 // of the clock, in nanoseconds

	mu   sync.Mutex
	said []Access
}

func newReplayScene(t *testing.T, change func(*Config)) *replayScene {
	t.Helper()
	s := &replayScene{t: t}
	s.heldScene = newHeldScene(t, func(c *Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(s.ahead.Load())) }
		c.Access = func(a Access) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.said = append(s.said, a)
		}
		if change != nil {
			change(c)
		}
	})
	s.door = s.server.Door(s.server.HTTP(Front{}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	ended := make(chan error, 1)
	go func() { ended <- s.door.Serve(l) }()
	t.Cleanup(func() {
		_ = s.door.Close()
		<-ended
		s.door.serving.Wait()
	})
	return s
}

const (
	pageTarget      = "/app?ac-discovery=1"
	signatureTarget = imagesPath + "example.com/app.aci.asc?version=1.0.0&os=linux&arch=amd64"
	imageTarget     = imagesPath + "example.com/app.aci?version=1.0.0&os=linux&arch=amd64"
)

// requests are those whose answers are given again.
func (s *replayScene) requests() map[string]string {
	return map[string]string{
		"page": get(pageTarget, "example.com", ""), "signature": get(signatureTarget, "example.com", ""),
		"not modified": get(imageTarget, "example.com", "If-None-Match: "+s.etag+"\r\n"),
		"same page":    get(pageTarget, "example.com", "User-Agent: rkt/1.30.0\r\nIf-None-Match: "+s.pageETag()+"\r\n"),
	}
}

func (s *replayScene) pageETag() string {
	s.t.Helper()
	resp, _ := s.ask(get(pageTarget, "example.com", ""))
	return resp.Header.Get("ETag")
}

// ask sends a request on a connection of its own.
func (s *replayScene) ask(request string) (*http.Response, string) {
	s.t.Helper()
	resp, body, err := askAt(s.address, request)
	if err != nil {
		s.t.Fatalf("%q: %v", request, err)
	}
	return resp, body
}

func askAt(address, request string) (*http.Response, string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return nil, "", err
	}
	return askOn(conn, bufio.NewReader(conn), request)
}

func askOn(conn net.Conn, r *bufio.Reader, request string) (*http.Response, string, error) {
	if _, err := io.WriteString(conn, request); err != nil {
		return nil, "", err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// kept returns the answer that is kept for a request.
func (s *replayScene) kept(request string) *replay {
	return s.door.replays.get(s.door.replays.slot([]byte(request)), []byte(request))
}

// warm asks until the answer is kept.
func (s *replayScene) warm(request string) {
	s.t.Helper()
	for range 4 { // the first is net/http's, the next but one is kept
		s.ask(request)
	}
	if s.kept(request) == nil {
		s.t.Fatalf("the answer to %q is not kept", request)
	}
}

// replayed asks, and reports whether the answer was one that had been kept: it is marked for that.
func (s *replayScene) replayed(request string) (resp *http.Response, body string, again bool) {
	s.t.Helper()
	if a := s.kept(request); a != nil {
		marked := *a
		marked.rest = append([]byte("X-Marked: yes\r\n"), a.rest...)
		s.door.replays.put(&marked)
		defer s.door.replays.put(a)
	}
	resp, body = s.ask(request)
	again = resp.Header.Get("X-Marked") != ""
	resp.Header.Del("X-Marked")
	return resp, body, again
}

// TestReplaysAreTheAnswer compares what is given again with what it was made from, and with what net/http sends.
func TestReplaysAreTheAnswer(t *testing.T) {
	s := newReplayScene(t, nil)
	for name, request := range s.requests() {
		t.Run(name, func(t *testing.T) {
			// A field that isn't simple makes it net/http's.
			first, content := s.ask(strings.Replace(request, "\r\n\r\n", "\r\nAccept-Charset: utf-8\r\n\r\n", 1))
			s.warm(request)
			second, again, replayed := s.replayed(request)
			third, _, _ := s.replayed(request)
			if !replayed {
				t.Fatal("the answer was made anew")
			}
			if first.Status != second.Status || content != again {
				t.Errorf("%s with %q, and again %s with %q", first.Status, content, second.Status, again)
			}
			if a, b := second.Header.Get(requestIDField), third.Header.Get(requestIDField); a == b || a == "" || len(second.Header[requestIDField]) != 1 {
				t.Errorf("the IDs of two requests are %q and %q", a, b)
			}
			if date, err := http.ParseTime(second.Header.Get("Date")); err != nil || time.Since(date) > time.Minute {
				t.Errorf("the date is %q", second.Header.Get("Date"))
			}
			for _, header := range []http.Header{first.Header, second.Header} {
				header.Del("Date")
				header.Del(requestIDField)
			}
			if a, b := fmt.Sprint(first.Header), fmt.Sprint(second.Header); a != b {
				t.Errorf("the header is\n%s\nand again\n%s", a, b)
			}
		})
	}
}

// TestReplaysAreLogged: each gets a line of its own, of who has asked.
func TestReplaysAreLogged(t *testing.T) {
	s := newReplayScene(t, nil)
	for name, request := range s.requests() {
		s.warm(request)
		s.mu.Lock()
		was := s.said[len(s.said)-1]
		s.said = nil
		s.mu.Unlock()
		resp, _, again := s.replayed(request)
		s.mu.Lock()
		if !again || len(s.said) != 1 {
			t.Fatalf("%s: given again %t, %d lines", name, again, len(s.said))
		}
		got := s.said[0]
		s.mu.Unlock()
		if got.ID != resp.Header.Get(requestIDField) || got.ID == was.ID || got.Client != "127.0.0.1" || got.Took < 0 || got.FirstByte > got.Took {
			t.Errorf("%s: the line is %+v", name, got)
		}
		got.ID, got.Took, got.FirstByte, was.ID, was.Took, was.FirstByte = "", 0, 0, "", 0, 0
		if got != was {
			t.Errorf("%s: the line is\n%+v\nwhere it was\n%+v", name, got, was)
		}
	}
}

// TestReplaysEnd changes what answers rest on, one thing at a time: the next answer is made anew, and is the right one.
func TestReplaysEnd(t *testing.T) {
	guard := access.New(access.Config{})
	refused := http.StatusForbidden
	for _, tt := range []struct {
		name   string
		change func(s *replayScene) error
		status map[string]int // by the request; 0 is what it was
	}{
		{"nothing", nil, nil},
		{"a key is removed", func(s *replayScene) error {
			if err := trust.Remove(s.dirs, "example.com", trust.Fingerprint(s.key.Fingerprint())); err != nil {
				return err
			}
			s.keys.Reload()
			return nil
		}, map[string]int{"signature": refused, "not modified": refused, "page": 0}},
		{"the image is quarantined", func(s *replayScene) error {
			return s.store.Quarantine(s.t.Context(), s.digest, "by-hand", "it was said so")
		}, map[string]int{"signature": refused, "not modified": refused, "page": 0}},
		{"the image is removed and nobody may be asked", func(s *replayScene) error {
			s.fetcher.Change(fetch.Settings{Policies: heldPolicies, Offline: true})
			return s.store.Delete(s.t.Context(), s.digest)
		}, map[string]int{"signature": http.StatusNotFound, "not modified": http.StatusNotFound, "page": 0}},
		{"the name isn't allowed", func(s *replayScene) error {
			s.fetcher.Change(fetch.Settings{Policies: heldPolicies, Allow: []string{"example.org"}})
			return nil
		}, map[string]int{"signature": refused, "not modified": refused, "page": refused}},
		{"who asks has to show who it is", func(*replayScene) error {
			guard.Change(access.Config{Rules: []access.Rule{{May: map[access.Right][]string{access.Read: {access.Known}}}}})
			return nil
		}, map[string]int{"signature": http.StatusUnauthorized, "not modified": http.StatusUnauthorized, "page": http.StatusUnauthorized}},
		{"another age", func(s *replayScene) error {
			s.server.Change(Settings{MaxAge: time.Second, TTL: time.Hour})
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}},
		{"other rules of discovery", func(s *replayScene) error {
			s.finder.SetRules([]discovery.Rule{})
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}},
		{"the publisher says something else", func(s *replayScene) error {
			return s.store.Learn(cache.Discovered{Name: "example.com/app", Templates: []cache.Template{{Prefix: "example.com", URL: "https://other.example.com/{name}.{ext}"}}, When: time.Now()})
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}},
		{"a second goes by", func(s *replayScene) error {
			s.ahead.Add(int64(replayFor))
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			guard.Change(access.Config{})
			s := newReplayScene(t, func(c *Config) { c.Guard = guard })
			requests := s.requests()
			was := make(map[string]*http.Response)
			for name := range requests {
				s.warm(requests[name])
				var again bool
				if was[name], _, again = s.replayed(requests[name]); !again {
					t.Fatalf("%s: the answer was made anew before anything changed", name)
				}
			}
			if tt.change != nil {
				if err := tt.change(s); err != nil {
					t.Fatal(err)
				}
			}
			for name := range requests {
				resp, body, again := s.replayed(requests[name])
				want, changes := tt.status[name]
				if want == 0 {
					want = was[name].StatusCode
				}
				if name == "same page" {
					want, changes = resp.StatusCode, tt.change != nil
				}
				if resp.StatusCode != want || again == changes {
					t.Errorf("%s is answered with %s, given again: %t, want %d: %s", name, resp.Status, again, want, body)
				}
				if tt.name == "another age" && name != "page" && name != "same page" && resp.Header.Get("Cache-Control") != "max-age=1" {
					t.Errorf("%s is answered with Cache-Control: %q", name, resp.Header.Get("Cache-Control"))
				}
				if tt.name == "the publisher says something else" && name == "page" && !strings.Contains(body, "other.example.com") {
					t.Error("the page is the old one")
				}
			}
		})
	}
}

// TestReplaysAreOfTheSameRequest: what differs in one byte is another request.
func TestReplaysAreOfTheSameRequest(t *testing.T) {
	s := newReplayScene(t, nil)
	request := get(imageTarget, "example.com", "If-None-Match: "+s.etag+"\r\n")
	s.warm(request)
	for _, other := range []string{
		get(imageTarget, "example.org", "If-None-Match: "+s.etag+"\r\n"), get(imageTarget, "example.com", "If-None-Match: "+s.etag+" \r\n"),
		get(imageTarget, "example.com", "If-None-Match: \"other\"\r\n"), get(imageTarget, "example.com", "If-None-Match: "+s.etag+"\r\nAuthorization: Basic YTpi\r\n"),
	} {
		if s.kept(other) != nil {
			t.Errorf("there is an answer for %q", other)
		}
		resp, body := s.ask(other)
		if strings.Contains(other, "other") && (resp.StatusCode != http.StatusOK || len(body) < 1<<10) {
			t.Errorf("%q is answered with %s and %d bytes", other, resp.Status, len(body))
		}
	}
}

// TestWhatIsNotReplayed: answers that are for one client, or one request, or for now.
func TestWhatIsNotReplayed(t *testing.T) {
	s := newReplayScene(t, nil)
	for name, request := range map[string]string{
		"an ID of its own": get(signatureTarget, "example.com", "X-Request-Id: mine\r\n"),
		"a trace":          get(signatureTarget, "example.com", "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"),
		"no version":       get(imagesPath+"example.com/app.aci.asc?os=linux&arch=amd64", "example.com", ""),
		"an image":         get(imageTarget, "example.com", ""),
		"not found":        get(imagesPath+"example.com/app.aci.asc?version=2.0.0&os=linux&arch=amd64", "example.com", ""),
		"long":             get(signatureTarget, "example.com", "User-Agent: "+strings.Repeat("x", maxReplay)[:maxReplay-500]+"\r\n"),
	} {
		for range 5 {
			s.ask(request)
		}
		if s.kept(request) != nil {
			t.Errorf("%s: the answer is kept", name)
		}
	}
}

// TestReplaysCount: against the rate of a client, and as uses of the image.
func TestReplaysCount(t *testing.T) {
	const burst = 10
	s := newReplayScene(t, func(c *Config) { c.Limits = Limits{Rate: 1, Burst: burst} })
	request := get(signatureTarget, "example.com", "")
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	limited := 0
	for range 3 * burst {
		if s.kept(request) != nil && limited == 0 {
			// Only replays are left.
			before, err := s.store.Record(s.digest)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Millisecond)
			defer func() {
				if after, err := s.store.Record(s.digest); err != nil || !after.Used.After(before.Used) {
					t.Errorf("the image was used at %v, and at %v before: %v", after.Used, before.Used, err)
				}
			}()
		}
		resp, _, err := askOn(conn, r, request)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode == http.StatusTooManyRequests {
			limited++
		}
	}
	if limited < burst {
		t.Errorf("of %d requests, %d were too many", 3*burst, limited)
	}
}

// TestReplaysWhileThingsChange: whoever asks after a change was made doesn't get what was right before it, however many ask at the same time.
func TestReplaysWhileThingsChange(t *testing.T) {
	s := newReplayScene(t, nil)
	request := get(signatureTarget, "example.com", "")
	s.warm(request)
	var allowed atomic.Int64 // goes up with each change: even is allowed; odd, while it is neither, is -1 to whoever looks
	var asked, replayed atomic.Int64
	done := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			conn, err := net.Dial("tcp", s.address)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			r := bufio.NewReader(conn)
			for {
				select {
				case <-done:
					return
				default:
				}
				before := allowed.Load()
				resp, _, err := askOn(conn, r, request)
				if err != nil {
					t.Error(err)
					return
				}
				asked.Add(1)
				if s.kept(request) != nil {
					replayed.Add(1)
				}
				if allowed.Load() != before || before%2 != 0 {
					continue // it has changed meanwhile
				}
				want := http.StatusOK
				if before%4 != 0 {
					want = http.StatusForbidden
				}
				if resp.StatusCode != want {
					t.Errorf("answered with %s after change %d", resp.Status, before/2)
				}
			}
		})
	}
	for i := range 200 {
		allowed.Add(1)
		settings := fetch.Settings{Policies: heldPolicies}
		switch i % 4 {
		case 0:
			settings.Allow = []string{"example.org"}
			s.fetcher.Change(settings)
		case 1, 3:
			s.fetcher.Change(settings)
			if err := s.store.Restore(t.Context(), s.digest); err != nil {
				t.Error(err)
			}
		case 2:
			if err := s.store.Quarantine(t.Context(), s.digest, "by-hand", "it was said so"); err != nil {
				t.Error(err)
			}
		}
		allowed.Add(1)
		time.Sleep(time.Millisecond)
	}
	close(done)
	clients.Wait()
	if asked.Load() < 200 || replayed.Load() == 0 {
		t.Errorf("of %d answers, %d were kept: there is nothing to be seen", asked.Load(), replayed.Load())
	}
}

// BenchmarkAgain gives an answer again, all but the system calls.
func BenchmarkAgain(b *testing.B) {
	held := newHeldScene(b, func(c *Config) { c.Access = func(Access) {} })
	d := held.server.Door(held.server.HTTP(Front{}))
	c := newBriskConn(d, nil, nil)
	x := newExchange()
	for name, request := range map[string]string{
		"page": get(pageTarget, "example.com", ""), "signature": get(signatureTarget, "example.com", ""), "not modified": get(imageTarget, "example.com", "If-None-Match: "+held.etag+"\r\n"),
	} {
		b.Run(name, func(b *testing.B) {
			target := strings.Fields(request)[1]
			u, err := url.ParseRequestURI(target)
			if err != nil {
				b.Fatal(err)
			}
			held.server.brisk.Put(briskKey{"example.com", target}, u)
			n := copy(x.head, request)
			nowhere := func(p []byte) (int, error) { return len(p), nil }
			b.ReportAllocs()
			for b.Loop() {
				if c.answer(x, n, nowhere) != nextRequest {
					b.Fatal("it is not simple")
				}
			}
		})
	}
}
