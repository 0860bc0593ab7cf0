package server

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/listen"
	"github.com/acproxy/acproxy/internal/problem"
)

func TestClientAddress(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.7:1234":            "192.0.2.7",
		"[::ffff:192.0.2.7]:1234":   "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:99": "2001:db8:1:2::",
		"[fe80::1%eth0]:99":         "fe80::",
		"@":                         "invalid IP",
		"":                          "invalid IP",
	} {
		if got := clientAddress(address).String(); got != want {
			t.Errorf("clientAddress(%s) = %s, want %s", address, got, want)
		}
	}
}

// TestRates asks just as often as a client may, and once more.
func TestRates(t *testing.T) {
	now := time.Now()
	l := newRates(Limits{Rate: 2, Burst: 3}, func() time.Time { return now })
	ask := func(address string) bool {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = address
		err := l.check(r)
		if err != nil && problem.StatusOf(err) != http.StatusTooManyRequests {
			t.Errorf("check = %v", err)
		}
		return err == nil
	}
	asked := func(address string, n int) (answered int) {
		for range n {
			if ask(address) {
				answered++
			}
		}
		return answered
	}
	if got := asked("192.0.2.1:1", 5); got != 3 {
		t.Errorf("%d of 5 at once are answered, want the burst of 3", got)
	}
	if got := asked("192.0.2.1:2", 1); got != 0 {
		t.Error("from another port it is another client")
	}
	if got := asked("192.0.2.2:1", 1); got != 1 {
		t.Error("another client is not answered")
	}
	now = now.Add(time.Second)
	if got := asked("192.0.2.1:1", 5); got != 2 {
		t.Errorf("%d of 5 are answered a second later, want the rate of 2", got)
	}
	if got := asked("@", 10); got != 10 {
		t.Errorf("%d of 10 that have no address are answered", got)
	}
	if newRates(Limits{}, nil).check(httptest.NewRequest(http.MethodGet, "/", nil)) != nil {
		t.Error("without a rate there is a limit")
	}
	// However many clients there are, they take so much memory and no more, and those that ask too often are not forgotten by others coming.
	for i := range 3 * maxClients {
		ask(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1).String())
		if i%1000 == 0 {
			now = now.Add(2 * time.Second)
			asked("192.0.2.1:1", 10)
		}
	}
	if len(l.clients) > maxClients {
		t.Errorf("%d clients are remembered, want at most %d", len(l.clients), maxClients)
	}
	if ask("192.0.2.1:1") {
		t.Error("a client that asks too often was forgotten")
	}
}

// limited listens with limits, and returns what answers each connection with a byte, and keeps it open.
func limited(t *testing.T, limits Limits) (dial func() net.Conn, answered func(net.Conn, time.Duration) error) {
	t.Helper()
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newLimitedListener(plain, limits)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = conn.Write([]byte("x"))
				_, _ = io.Copy(io.Discard, conn)
			}()
		}
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		<-ended
	})
	dial = func() net.Conn {
		conn, err := net.Dial("tcp", plain.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	answered = func(conn net.Conn, wait time.Duration) error {
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			t.Fatal(err)
		}
		_, err := conn.Read(make([]byte, 1))
		return err
	}
	return dial, answered
}

func timedOut(err error) bool {
	var network net.Error
	return errors.As(err, &network) && network.Timeout()
}

// TestMaxConnections has one connection too many wait until another one ends.
func TestMaxConnections(t *testing.T) {
	dial, answered := limited(t, Limits{MaxConnections: 2})
	first, second, third := dial(), dial(), dial()
	for _, conn := range []net.Conn{first, second} {
		if err := answered(conn, 10*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if err := answered(third, 100*time.Millisecond); !timedOut(err) {
		t.Fatalf("a third connection of two that may be gets %v", err)
	}
	_ = first.Close()
	if err := answered(third, 10*time.Second); err != nil {
		t.Errorf("after another one's end it gets %v", err)
	}
}

// TestMaxConnectionsPerClient has one too many closed, and the next one served when there is room.
func TestMaxConnectionsPerClient(t *testing.T) {
	dial, answered := limited(t, Limits{MaxConnectionsPerClient: 2})
	first, second := dial(), dial()
	for _, conn := range []net.Conn{first, second} {
		if err := answered(conn, 10*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if err := answered(dial(), 10*time.Second); err == nil || timedOut(err) {
		t.Errorf("one too many gets %v, want the end", err)
	}
	_ = second.Close()
	deadline := time.Now().Add(10 * time.Second)
	for answered(dial(), 10*time.Second) != nil {
		if time.Now().After(deadline) {
			t.Fatal("after another one's end none is served")
		}
	}
}

// TestDoorCountsConnections: small requests go by without net/http, and their connections count all the same.
func TestDoorCountsConnections(t *testing.T) {
	s := New(Config{Limits: Limits{MaxConnections: 1}})
	hs := s.HTTP(Front{})
	hs.Handler = http.HandlerFunc(briefly)
	door := s.Door(hs)
	plain, err := listen.TCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.Admit(plain, false)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- door.Serve(l) }()
	for range 3 {
		client := http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}
		resp, err := client.Get("http://" + l.Addr().String() + "/")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		client.CloseIdleConnections()
	}
	if err := door.Close(); err != nil {
		t.Error(err)
	}
	<-ended
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
