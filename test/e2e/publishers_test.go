package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
)

// knocks listens where the publisher was, and hangs up on everybody. It returns how often somebody came, and what ends it.
func (s *scene) knocks() (count *atomic.Int64, end func()) {
	s.t.Helper()
	count = new(atomic.Int64)
	listener := must(net.Listen("tcp", s.publisher.Addr()))(s.t)
	done := make(chan struct{})
	// Ends when the listener is closed; end waits for it.
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			count.Add(1)
			_ = conn.Close()
		}
	}()
	return count, func() {
		if err := listener.Close(); err != nil {
			s.t.Error(err)
		}
		<-done
	}
}

// never returns the direct URL of a version that was never asked for before.
func (s *scene) never(im image, version int) string {
	return s.plain() + directPath(im.name, standard(fmt.Sprint("9.", version)), "aci")
}

// storage is the origin that images come from.
const storage = "https://storage.example.com"

// storageState returns what the command says of it.
func (s *scene) storageState() web.HostState {
	s.t.Helper()
	code, out := s.cli("publishers", "--json")
	var hosts []web.HostState
	if err := json.Unmarshal([]byte(out), &hosts); err != nil || code != 0 {
		s.t.Fatalf("acproxy publishers = %d, %v\n%s", code, err, out)
	}
	for _, h := range hosts {
		if h.Host == storage {
			return h
		}
	}
	s.t.Fatalf("acproxy publishers doesn't know %s:\n%s", storage, out)
	return web.HostState{}
}

func trace(t *testing.T, a node.Answer) acproxy.Trace {
	t.Helper()
	var p struct{ Trace acproxy.Trace }
	if err := json.Unmarshal(a.Body, &p); err != nil {
		t.Fatal(err)
	}
	return p.Trace
}

func TestPublisherIsDown(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {breaker: {failures: 3, open: 1h, max_open: 1h}}")
	im := s.publish(app("app"))
	s.hold(im)
	s.publisher.Stop()
	count, end := s.knocks()
	defer end()

	for i := range 3 {
		a := s.get(s.never(im, i))
		if wantStatus(t, a, http.StatusBadGateway) && (problemCode(a) == "publisher-down" || a.Header.Get("Retry-After") != "") {
			t.Errorf("number %d: %s", i, described(a))
		}
	}
	knocked := count.Load()
	// One of them may have found a connection that it didn't know was cut.
	if knocked < 2 {
		t.Errorf("the publisher was dialled %d times", knocked)
	}
	var took []time.Duration
	for i := range 20 {
		a := s.get(s.never(im, 10+i))
		wantProblem(t, a, http.StatusBadGateway, "publisher-down")
		took = append(took, a.Took)
		// An hour, less up to a quarter and the time that has passed.
		if after, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || after < 2600 || after > 3600 {
			t.Errorf("Retry-After %q, want most of an hour", a.Header.Get("Retry-After"))
		}
		last := trace(t, a)
		if len(last) == 0 || last[len(last)-1].Status != 0 || last[len(last)-1].What != "signature" || !strings.Contains(last[len(last)-1].Err, "after 3 failures in a row, and isn't asked") {
			t.Errorf("trace = %v", last)
		}
	}
	if n := count.Load(); n != knocked {
		t.Errorf("the publisher was dialled %d times although it is down", n-knocked)
	}
	// The machine may be busy with other things; not all the time.
	if fastest := slices.Min(took); fastest > 50*time.Millisecond {
		t.Errorf("it took %v at least to say that the publisher is down", fastest)
	}
	for range 3 {
		a := s.get(s.direct(im, "aci"))
		wantImage(t, a, im)
		wantHeader(t, a, "Cache-Status", hit)
	}
	if h := s.storageState(); !h.Open() || h.InProgress != 0 || h.Waiting != 0 || len(h.Breakers) != 1 || h.Breakers[0].State != web.BreakerOpen || h.Breakers[0].Failures != 3 {
		t.Errorf("%+v", h)
	}
	if code, out := s.cli("publishers"); code != 0 || !regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(storage)+` +\d+ +3 +\S+ +0 +0 +for example\.com: down since \S+, asked again in \S+ `).MatchString(out) {
		t.Errorf("acproxy publishers = %d\n%s", code, out)
	}
	for _, want := range []string{`breaker_open{host="https://example.com"} 0`, `breaker_open{host="` + storage + `"} 1`, `requests_in_progress{host="` + storage + `"} 0`} {
		if !strings.Contains(s.metrics(), "acproxy_publisher_"+want+"\n") {
			t.Errorf("the metrics don't say %s", want)
		}
	}
	// A restart knows nothing of it.
	s.restart(sigterm)
	wantStatus(t, s.get(s.never(im, 50)), http.StatusBadGateway)
	if n := count.Load(); n == knocked {
		t.Error("after a restart the publisher wasn't dialled")
	}
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

func TestPublisherIsBack(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {breaker: {failures: 2, open: 100ms, max_open: 100ms}}")
	held, other := s.publish(app("app")), s.publish(app("other"))
	s.hold(held)
	// So that nothing but the image has to be asked for afterwards.
	wantStatus(t, s.get("https://"+other.name+"?ac-discovery=1"), http.StatusOK)
	s.publisher.Stop()
	eventually(t, "the publisher is down", func() bool {
		a := s.get(s.direct(other, "aci"))
		return wantStatus(t, a, http.StatusBadGateway) && problemCode(a) == "publisher-down"
	})
	if err := s.publisher.Resume(); err != nil {
		t.Fatal(err)
	}
	var a node.Answer
	eventually(t, "the probe finds that it is back", func() bool {
		a = s.get(s.direct(other, "aci"))
		return a.Status == http.StatusOK
	})
	wantImage(t, a, other)
	if h := s.storageState(); h.Open() || len(h.Breakers) != 0 {
		t.Errorf("%+v", h)
	}
}

func TestPublisherIsAlwaysAsked(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {breaker: {failures: 0}, max_connections: 0, rate: 0}")
	im := s.publish(app("app"))
	s.hold(im)
	s.publisher.Stop()
	for i := range 10 {
		if a := s.get(s.never(im, i)); wantStatus(t, a, http.StatusBadGateway) && problemCode(a) == "publisher-down" {
			t.Errorf("number %d: %s", i, described(a))
		}
	}
}

func TestPublisherWantsToBeLeftAlone(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		status         int
		overlay, after string // what is said while it is left alone; "" if it isn't
	}{
		{429, "", "300"}, {503, "", "300"}, {429, "dial: {max_retry_after: 2h}", "3600"}, {429, "dial: {max_retry_after: 0s}", ""},
	} {
		t.Run(fmt.Sprint(tt.status, " ", tt.overlay), func(t *testing.T) {
			t.Parallel()
			s := newScene(t, tt.overlay)
			im := s.publish(app("app"))
			s.hold(im)
			s.publisher.Misbehave(publisher.URL("storage.*"), publisher.Fault{Status: tt.status, Header: http.Header{"Retry-After": {"3600"}}})
			a := s.get(s.never(im, 1))
			wantProblem(t, a, http.StatusBadGateway, "publisher-status")
			wantHeader(t, a, "Retry-After", "3600")
			before := s.publisher.Count("*")
			a = s.get(s.never(im, 2))
			if tt.after == "" {
				wantProblem(t, a, http.StatusBadGateway, "publisher-status")
				return
			}
			wantProblem(t, a, http.StatusBadGateway, "publisher-resting")
			if got, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || strconv.Itoa(got) > tt.after || got < 200 {
				t.Errorf("Retry-After %q, want %s", a.Header.Get("Retry-After"), tt.after)
			}
			if n := s.publisher.Count("*"); n != before {
				t.Errorf("the publisher was asked %d times although it wants to be left alone", n-before)
			}
			wantImage(t, s.get(s.direct(im, "aci")), im)
			if h := s.storageState(); h.RestingUntil.IsZero() || h.RestingWhy != fmt.Sprint(tt.status, " ", http.StatusText(tt.status)) {
				t.Errorf("%+v", h)
			}
		})
	}
}

// TestPublisherIsBusy: there is no place for another image, and still one for its signature and its page.
func TestPublisherIsBusy(t *testing.T) {
	t.Parallel()
	s := newScene(t, "dial: {max_connections: 2, timeout: 2s}")
	held, slow, other := s.publish(app("held")), s.publish(large("slow", 1<<20)), s.publish(app("other"))
	s.hold(held)
	trouble := s.arriving(slow)
	a := s.get(s.direct(other, "aci"))
	wantProblem(t, a, http.StatusServiceUnavailable, "publisher-busy")
	wantHeader(t, a, "Retry-After", "5")
	steps := trace(t, a)
	if len(steps) != 3 || steps[0].Status != 200 || steps[1].What != "signature" || steps[1].Status != 200 || steps[2].What != "image" || steps[2].Status != 0 ||
		!strings.Contains(steps[2].Err, "dial.max_connections") {
		t.Errorf("trace = %v", steps)
	}
	wantImage(t, s.get(s.direct(held, "aci")), held)
	if h := s.storageState(); h.InProgress != 1 || h.Images != 1 || h.Waiting != 0 || h.Open() {
		t.Errorf("%+v", h)
	}
	trouble.End()
	wantImage(t, s.get(s.direct(slow, "aci")), slow)
	wantImage(t, s.get(s.direct(other, "aci")), other)
}
