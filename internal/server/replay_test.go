package server

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
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
	s, began := &replayScene{t: t}, time.Now()
	s.heldScene = newHeldScene(t, func(c *Config) {
		c.Now = func() time.Time { return began.Add(time.Duration(s.ahead.Load())) }
		c.Access = func(a Access) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.said = append(s.said, a)
		}
		if change != nil {
			change(c)
		}
	})
	s.door, s.address = s.listen(Front{})
	return s
}

// listen opens another door.
func (s *replayScene) listen(front Front) (door *Door, address string) {
	s.t.Helper()
	door = s.server.Door(s.server.HTTP(front))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- door.Serve(l) }()
	s.t.Cleanup(func() {
		_ = door.Close()
		<-ended
		door.serving.Wait()
	})
	return door, l.Addr().String()
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
		before func(s *replayScene)
	}{
		{name: "nothing"},
		{"a key is removed", func(s *replayScene) error {
			if err := trust.Remove(s.dirs, "example.com", trust.Fingerprint(s.key.Fingerprint())); err != nil {
				return err
			}
			s.keys.Reload()
			return nil
		}, map[string]int{"signature": refused, "not modified": refused, "page": 0}, nil},
		{"the image is quarantined", func(s *replayScene) error {
			return s.store.Quarantine(s.t.Context(), s.digest, "by-hand", "it was said so")
		}, map[string]int{"signature": refused, "not modified": refused, "page": 0}, nil},
		{"the image is removed", func(s *replayScene) error {
			return s.store.Delete(s.t.Context(), s.digest)
		}, map[string]int{"signature": http.StatusNotFound, "not modified": http.StatusNotFound, "page": 0}, func(s *replayScene) {
			s.fetcher.Change(fetch.Settings{Policies: heldPolicies, Offline: true})
		}},
		{"its bytes are lost", func(s *replayScene) error {
			// The server may have it open, and finds out when it opens it again.
			if err := os.Remove(filepath.Join(s.dir, "blobs", s.digest.Hex()[:2], s.digest.Hex())); err != nil {
				return err
			}
			if resp, _ := s.ask(get(imageTarget, "example.com", "")); resp.StatusCode != http.StatusNotFound {
				return fmt.Errorf("the image is answered with %s", resp.Status)
			}
			return nil
		}, map[string]int{"signature": http.StatusNotFound, "not modified": http.StatusNotFound, "page": 0}, func(s *replayScene) {
			s.fetcher.Change(fetch.Settings{Policies: heldPolicies, Offline: true})
		}},
		{"the name isn't allowed", func(s *replayScene) error {
			s.fetcher.Change(fetch.Settings{Policies: heldPolicies, Allow: []string{"example.org"}})
			return nil
		}, map[string]int{"signature": refused, "not modified": refused, "page": refused}, nil},
		{"who asks has to show who it is", func(*replayScene) error {
			guard.Change(access.Config{Rules: []access.Rule{{May: map[access.Right][]string{access.Read: {access.Known}}}}})
			return nil
		}, map[string]int{"signature": http.StatusUnauthorized, "not modified": http.StatusUnauthorized, "page": http.StatusUnauthorized}, nil},
		{"another age", func(s *replayScene) error {
			s.server.Change(Settings{MaxAge: time.Second, TTL: time.Hour})
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}, nil},
		{"other rules of discovery", func(s *replayScene) error {
			s.finder.SetRules([]discovery.Rule{})
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}, nil},
		{"the publisher says something else", func(s *replayScene) error {
			return s.store.Learn(cache.Discovered{Name: "example.com/app", Templates: []cache.Template{{Prefix: "example.com", URL: "https://other.example.com/{name}.{ext}"}}, When: time.Now()})
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}, nil},
		{"a second goes by", func(s *replayScene) error {
			s.ahead.Add(int64(replayFor))
			return nil
		}, map[string]int{"signature": 0, "not modified": 0, "page": 0}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			guard.Change(access.Config{})
			s := newReplayScene(t, func(c *Config) { c.Guard = guard })
			if tt.before != nil {
				tt.before(s)
			}
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

// TestReplaysAreOfTheSameRequest: what differs in one byte is another request, even where it is looked for in the same slot.
func TestReplaysAreOfTheSameRequest(t *testing.T) {
	s := newReplayScene(t, nil)
	request := get(imageTarget, "example.com", "If-None-Match: "+s.etag+"\r\n")
	s.warm(request)
	for other, want := range map[string]int{
		get(imageTarget, "example.org", "If-None-Match: "+s.etag+"\r\n"):                              http.StatusNotModified,
		get(imageTarget, "example.com", "If-None-Match: \"other\"\r\n"):                               http.StatusOK,
		get(imageTarget, "example.com", "If-None-Match: "+s.etag+"\r\nAuthorization: Basic YTpi\r\n"): http.StatusNotModified,
		strings.Replace(request, "version=1.0.0", "version=1.0.1", 1):                                 http.StatusNotFound,
		strings.Replace(request, "HTTP/1.1\r\n", "HTTP/1.1\r\nConnection: close\r\n", 1):              http.StatusNotModified,
	} {
		kept := *s.kept(request)
		kept.slot = s.door.replays.slot([]byte(other))
		s.door.replays.put(&kept)
		resp, _, again := s.replayed(other)
		if again || resp.StatusCode != want {
			t.Errorf("%q is answered with %s, given again: %t, want %d", other, resp.Status, again, want)
		}
	}
}

// TestReplaysAreOfOneDoor: where everybody has to show who it is, nobody gets what was answered elsewhere.
func TestReplaysAreOfOneDoor(t *testing.T) {
	s := newReplayScene(t, func(c *Config) { c.Guard = access.New(access.Config{}) })
	_, strict := s.listen(Front{Auth: access.Basic})
	for name, request := range s.requests() {
		s.warm(request)
		if _, _, again := s.replayed(request); !again {
			t.Errorf("%s: it is not given again", name)
		}
		for range 4 {
			resp, _, err := askAt(strict, request)
			if err != nil || resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s is answered with %v: %v", name, resp, err)
			}
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

// TestReplaysCount: as uses of the image, and against the rate of a client.
func TestReplaysCount(t *testing.T) {
	s := newReplayScene(t, nil)
	request := get(signatureTarget, "example.com", "")
	s.warm(request)
	used := func() time.Time {
		rec, err := s.store.Record(s.digest)
		if err != nil {
			t.Fatal(err)
		}
		return rec.Used
	}
	before := used()
	time.Sleep(2 * time.Millisecond) // the store has a clock of its own
	if _, _, again := s.replayed(request); !again || !used().After(before) {
		t.Errorf("given again: %t, used at %v, and at %v before", again, used(), before)
	}

	const burst = 10
	s.server.SetRate(1, burst)
	for i := range 2 * burst {
		resp, _, again := s.replayed(request)
		want := http.StatusOK
		if i >= burst {
			want = http.StatusTooManyRequests
		}
		if resp.StatusCode != want || again != (want == http.StatusOK) {
			t.Errorf("request %d is answered with %s, given again: %t", i, resp.Status, again)
		}
	}
}

// TestReplaysWhileThingsChange: whoever asks after a change was made doesn't get what was right before it, however many ask at the same time.
func TestReplaysWhileThingsChange(t *testing.T) {
	s := newReplayScene(t, nil)
	request := get(signatureTarget, "example.com", "")
	s.warm(request)
	// Goes up when a change begins, and when it has been made: in between, either answer is right. After every other change the image may not be had.
	var phase atomic.Int64
	var right, again [2]atomic.Int64 // how many answers were checked, and how many of them had been kept, while it may be had and while it may not
	done := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			conn, err := net.Dial("tcp", s.address)
			if err != nil {
				t.Error(err)
				return
			}
			// Whoever was refused has been handed to net/http.
			defer func() { _ = conn.Close() }()
			r := bufio.NewReader(conn)
			for {
				select {
				case <-done:
					return
				default:
				}
				before := phase.Load()
				resp, _, err := askOn(conn, r, request)
				if err != nil {
					t.Error(err)
					return
				}
				if resp.StatusCode != http.StatusOK {
					_ = conn.Close()
					if conn, err = net.Dial("tcp", s.address); err != nil {
						t.Error(err)
						return
					}
					r = bufio.NewReader(conn)
				}
				if before%2 != 0 || phase.Load() != before {
					continue
				}
				want, i := http.StatusOK, 0
				if before/2%2 != 0 {
					want, i = http.StatusForbidden, 1
				}
				if resp.StatusCode != want {
					t.Errorf("answered with %s after change %d", resp.Status, before/2)
				}
				right[i].Add(1)
				if resp.Header.Get("X-Marked") != "" {
					again[i].Add(1)
				}
			}
		})
	}
	mark := func() {
		if a := s.kept(request); a != nil && !bytes.Contains(a.rest, []byte("X-Marked")) {
			marked := *a
			marked.rest = append([]byte("X-Marked: yes\r\n"), a.rest...)
			s.door.replays.put(&marked)
		}
	}
	for i := range 60 {
		phase.Add(1)
		var err error
		switch settings := (fetch.Settings{Policies: heldPolicies}); i % 4 {
		case 0:
			settings.Allow = []string{"example.org"}
			s.fetcher.Change(settings)
		case 1:
			s.fetcher.Change(settings)
		case 2:
			err = s.store.Quarantine(t.Context(), s.digest, "by-hand", "it was said so")
		case 3:
			err = s.store.Restore(t.Context(), s.digest)
		}
		if err != nil {
			t.Fatal(err)
		}
		phase.Add(1)
		// Some have seen it before the next one, and some of those were given what is kept.
		j := (i + 1) % 2
		for was, end := right[j].Load(), time.Now().Add(10*time.Second); right[j].Load() < was+20 && time.Now().Before(end); {
			mark()
			time.Sleep(100 * time.Microsecond)
		}
	}
	close(done)
	clients.Wait()
	if again[0].Load() == 0 || again[1].Load() != 0 || right[0].Load() == 0 || right[1].Load() == 0 {
		t.Errorf("checked %d answers while it may be had, of which %d had been kept, and %d and %d while it may not", right[0].Load(), again[0].Load(), right[1].Load(), again[1].Load())
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
