package acme

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/acproxy/acproxy/internal/acme/acmetest"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
	"github.com/acproxy/acproxy/internal/testtools"
)

const ours = "images.example.com"

// patience is how long anything that has to happen may take.
const patience = 60 * time.Second

// A bench is a client and the listeners that validators come to.
type bench struct {
	t      *testing.T
	opts   Options
	client *Client // replaced by reopen
	events chan Event
	log    *lines
	now    atomic.Pointer[Client] // the same, for the listeners

	httpPort, tlsPort int
}

// lines is a log that can be read while it is written.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newBench(t *testing.T) *bench {
	t.Helper()
	ports := acmetest.Ports(t, 2)
	b := &bench{t: t, httpPort: ports[0], tlsPort: ports[1], events: make(chan Event, 100), log: &lines{}}
	b.opts = Options{
		Hosts: []string{ours}, Challenges: []string{TLSALPN01, HTTP01}, Terms: true, Email: "ops@example.com", Dir: filepath.Join(t.TempDir(), "data", "acme"),
		Happened: func(e Event) { b.events <- e }, Log: slog.New(slog.NewTextHandler(b.log, nil)),
		PauseUnreachable: 50 * time.Millisecond, PauseRefused: 100 * time.Millisecond,
	}
	return b
}

// with has the client use a server.
func (b *bench) with(s *acmetest.Server) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CAPEM)
	b.opts.Directory, b.opts.Transport = s.URL, &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
}

// open opens the client, and has validators answered at the listeners.
func (b *bench) open() {
	b.t.Helper()
	b.reopen()
	plain := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := b.now.Load().Answer(r.URL.Path)
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, text)
	})}
	b.serve(plain, b.httpPort)
	secure := &http.Server{
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto, " ", r.TLS.NegotiatedProtocol) }),
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		TLSConfig: &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, _ := b.now.Load().Certificate(hello.ServerName)
			return cert, nil
		}},
	}
	b.client.Server(secure)
	secure.TLSConfig.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) { return b.now.Load().TLSConfig(hello) }
	b.serve(secure, b.tlsPort)
}

// reopen has another client take the place of the one before, as after a restart.
func (b *bench) reopen() {
	b.client = Open(b.opts)
	b.now.Store(b.client)
}

func (b *bench) serve(hs *http.Server, port int) {
	b.t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		b.t.Fatal(err)
	}
	serve := hs.Serve
	if hs.TLSConfig != nil {
		serve = func(l net.Listener) error { return hs.ServeTLS(l, "", "") }
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(l) }()
	b.t.Cleanup(func() {
		_ = hs.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			b.t.Error(err)
		}
	})
}

// run runs the client until stop.
func (b *bench) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.client.Run(ctx)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(patience):
			b.t.Error("Run doesn't end")
		}
	})
	b.t.Cleanup(stop)
	return stop
}

// event returns the next event.
func (b *bench) event() Event {
	b.t.Helper()
	select {
	case e := <-b.events:
		return e
	case <-time.After(patience):
		b.t.Fatalf("nothing has happened; the log is\n%s", b.log)
		return Event{}
	}
}

// issued waits until a certificate is issued, and fails if one can't be.
func (b *bench) issued() *x509.Certificate {
	b.t.Helper()
	e := b.event()
	if e.Err != nil {
		b.t.Fatalf("no certificate for %s: %v", e.Host, e.Err)
	}
	cert, valid := b.client.Certificate(e.Host)
	if !valid || !cert.Leaf.NotAfter.Equal(e.NotAfter) {
		b.t.Fatalf("Certificate(%s) = %v, %v after one was issued", e.Host, cert, valid)
	}
	return cert.Leaf
}

// account returns the file with the account.
func (b *bench) file(name string) string { return filepath.Join(b.client.dir(), name) }

// eventually waits for something that has no event.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestIssuing has a certificate issued by each challenge alone, and fetches with it as old and new clients do.
func TestIssuing(t *testing.T) {
	for _, challenge := range []string{TLSALPN01, HTTP01} {
		t.Run(challenge, func(t *testing.T) {
			b := newBench(t)
			b.opts.Challenges = []string{challenge}
			s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
			b.with(s)
			b.open()
			if cert, _ := b.client.Certificate(ours); cert != nil {
				t.Fatal("there is a certificate before any was issued")
			}
			b.run()
			leaf := b.issued()
			if got := leaf.DNSNames; !slices.Equal(got, []string{ours}) {
				t.Errorf("it is for %v", got)
			}
			if got := s.Orders(ours); got != 1 || s.AllOrders() != 1 {
				t.Errorf("%d of %d orders are for %s, want one", got, s.AllOrders(), ours)
			}
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				for _, h2 := range []bool{false, true} {
					b.fetches(s.Roots, version, h2)
				}
			}
			if _, ok := b.client.Certificate("IMAGES.example.com."); !ok {
				t.Error("a name in capitals and with a dot has no certificate")
			}
			b.client.answers.mu.Lock()
			defer b.client.answers.mu.Unlock()
			if left := len(b.client.answers.certs) + len(b.client.answers.texts); left > 0 {
				t.Errorf("%d answers for validators are left", left)
			}
		})
	}
}

func (b *bench) fetches(roots *x509.CertPool, version uint16, h2 bool) {
	b.t.Helper()
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: version, MaxVersion: version},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", b.tlsPort))
		},
		ForceAttemptHTTP2: h2,
	}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get("https://" + ours)
	if err != nil {
		b.t.Errorf("%s, HTTP/2 %v: %v", tls.VersionName(version), h2, err)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	want := "HTTP/1.1 "
	if h2 {
		want = "HTTP/2.0 h2"
	}
	if err != nil || strings.TrimSuffix(string(body), "http/1.1") != want || resp.TLS.Version != version {
		b.t.Errorf("%s, HTTP/2 %v: got %q over %s, %v; want %q", tls.VersionName(version), h2, body, tls.VersionName(resp.TLS.Version), err, want)
	}
}

// TestNameOfNobody shows names that aren't on the list, as nodes do that take this server for a publisher: no order is made for any.
func TestNameOfNobody(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	b.run()
	b.issued()
	for _, name := range []string{"example.com", "quay.io", "www." + ours, "example.com/../" + ours, "*.example.com", "localhost"} {
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", b.tlsPort), &tls.Config{ServerName: name, InsecureSkipVerify: true}) //nolint:gosec // what it says is looked at
		if err == nil {
			t.Errorf("%s was shown a certificate for %v", name, conn.ConnectionState().PeerCertificates[0].DNSNames)
			_ = conn.Close()
		}
		if cert, _ := b.client.Certificate(name); cert != nil {
			t.Errorf("Certificate(%s) = %v", name, cert.Leaf.DNSNames)
		}
	}
	if n := s.AllOrders(); n != 1 {
		t.Errorf("%d orders were made, want the one for %s", n, ours)
	}
}

// TestRestart starts again with what was kept: no order is made, and no account.
func TestRestart(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	stop := b.run()
	leaf := b.issued()
	stop()
	for name, want := range map[string]fs.FileMode{".": fs.ModeDir | 0o700, "..": fs.ModeDir | 0o700, accountFile: 0o600, ours + ".pem": 0o600} {
		st, err := os.Stat(b.file(name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != want {
			t.Errorf("the mode of %s is %v, want %v", name, st.Mode(), want)
		}
	}
	if left, _ := filepath.Glob(b.file("*")); len(left) != 2 {
		t.Errorf("%v are left, want account and certificate", left)
	}
	for range 3 {
		asked := s.Asked(acmetest.RenewalInfo)
		b.reopen()
		if cert, valid := b.client.Certificate(ours); !valid || !cert.Leaf.Equal(leaf) {
			t.Fatalf("Certificate after a restart = %v, %v, want the one that was issued", cert, valid)
		}
		stop := b.run()
		eventually(t, "the server is asked when to renew", func() bool { return s.Asked(acmetest.RenewalInfo) > asked })
		stop()
	}
	if n := s.AllOrders(); n != 1 {
		t.Errorf("%d orders after three restarts, want the first one alone", n)
	}
	if n := s.Asked(acmetest.NewAccount); n != 1 {
		t.Errorf("%d requests for an account, want one", n)
	}
	if len(b.events) > 0 {
		t.Errorf("after a restart: %+v", <-b.events)
	}
}

// TestRenewal lets certificates of a few seconds run out of time. Clients see the next one before the one before has ended.
func TestRenewal(t *testing.T) {
	for name, silent := range map[string]bool{"by the server's advice": false, "by ourselves": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort, Validity: 9 * time.Second, Silent: silent})
			b.with(s)
			b.open()
			b.run()
			first := b.issued()
			second := b.issued()
			now := time.Now()
			if second.Equal(first) || now.After(first.NotAfter) {
				t.Errorf("renewed at %v a certificate that ended at %v", now, first.NotAfter)
			}
			if soonest := first.NotBefore.Add(2 * time.Second); now.Before(soonest) {
				t.Errorf("renewed at %v, before %v", now, soonest)
			}
			b.fetches(s.Roots, tls.VersionTLS13, true)
			if n := s.Orders(ours); n != 2 {
				t.Errorf("%d orders, want 2", n)
			}
			if n := s.Replaced(); (n == 1) == silent {
				t.Errorf("%d orders say what they replace", n)
			}
			if n := s.Asked(acmetest.NewAccount); n != 1 {
				t.Errorf("%d requests for an account, want one", n)
			}
		})
	}
}

// TestRenewalAtOnce has the server want a certificate of 90 days renewed at once, as it does before it revokes it.
func TestRenewalAtOnce(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	stop := b.run()
	first := b.issued()
	stop()
	s.Advise(time.Now().Add(-time.Hour), time.Now().Add(-time.Minute))
	b.reopen()
	b.run()
	if second := b.issued(); second.Equal(first) {
		t.Error("the certificate is the one before")
	}
	if n := s.Replaced(); n != 1 {
		t.Errorf("%d orders say what they replace, want one", n)
	}
	// The next advice is not before an hour has gone by, and neither is the next order, whatever it were.
	if due := b.client.States()[0].Due; due.Before(time.Now().Add(50 * time.Minute)) {
		t.Errorf("the next order is due at %v", due)
	}
}

// TestServerDown starts without the server. The attempts go on, each is told once, and when the server comes they succeed.
func TestServerDown(t *testing.T) {
	b := newBench(t)
	address := fmt.Sprintf("127.0.0.1:%d", acmetest.Ports(t, 1)[0])
	b.opts.Directory = "https://" + address + "/dir"
	b.open()
	stop := b.run()
	for range 3 {
		if e := b.event(); e.Err == nil || !strings.Contains(e.Err.Error(), "connection refused") {
			t.Fatalf("without a server: %+v", e)
		}
	}
	if s := b.client.States()[0]; s.Err == nil || !s.NotAfter.IsZero() {
		t.Errorf("the state is %+v", s)
	}
	stop()
	failures := 3 + len(b.events)
	if n := strings.Count(b.log.String(), "level=ERROR"); n != failures {
		t.Errorf("%d attempts have left %d lines:\n%s", failures, n, b.log)
	}
	s := acmetest.Start(t, acmetest.Options{Address: address, HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	for len(b.events) > 0 {
		<-b.events
	}
	b.with(s)
	b.client.http.Transport.(*manners).next = b.opts.Transport // whom the server's certificate comes from is known only now
	b.run()
	for {
		if e := b.event(); e.Err == nil {
			break
		}
	}
	if s := b.client.States()[0]; s.Err != nil || s.NotAfter.IsZero() {
		t.Errorf("the state is %+v after a certificate was issued", s)
	}
}

// TestServerForgets sets the server up anew, without what it knew.
func TestServerForgets(t *testing.T) {
	b := newBench(t)
	o := acmetest.Options{Address: fmt.Sprintf("127.0.0.1:%d", acmetest.Ports(t, 1)[0]), HTTPPort: b.httpPort, TLSPort: b.tlsPort}
	first := acmetest.Start(t, o)
	b.with(first)
	b.open()
	stop := b.run()
	b.issued()
	stop()
	first.Close()
	b.with(acmetest.Start(t, o))
	b.opts.Hosts = append(b.opts.Hosts, "more.example.com")
	b.reopen()
	b.run()
	if e := b.event(); e.Err == nil || !strings.Contains(e.Err.Error(), "forgotten the account") {
		t.Errorf("the first attempt: %+v", e)
	}
	if leaf := b.issued(); !slices.Equal(leaf.DNSNames, []string{"more.example.com"}) {
		t.Errorf("a certificate for %v was issued", leaf.DNSNames)
	}
}

// TestAccountIsLost renews a certificate that another account has: the server doesn't let this one replace it, and issues one all the same.
func TestAccountIsLost(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	stop := b.run()
	first := b.issued()
	stop()
	accounts, err := filepath.Glob(filepath.Join(b.opts.Dir, "*", "account.json"))
	if err != nil || len(accounts) != 1 {
		t.Fatalf("the accounts are %q, %v", accounts, err)
	}
	if err := os.Remove(accounts[0]); err != nil {
		t.Fatal(err)
	}
	s.Advise(time.Now().Add(-time.Hour), time.Now().Add(-time.Minute))
	b.reopen()
	b.run()
	if second := b.issued(); second.Equal(first) {
		t.Error("the certificate is the one before")
	}
}

// TestServerForgetsWhatItIssued renews a certificate at a server that was set up anew.
func TestServerForgetsWhatItIssued(t *testing.T) {
	b := newBench(t)
	o := acmetest.Options{Address: fmt.Sprintf("127.0.0.1:%d", acmetest.Ports(t, 1)[0]), HTTPPort: b.httpPort, TLSPort: b.tlsPort, Validity: 9 * time.Second}
	before := acmetest.Start(t, o)
	b.with(before)
	b.open()
	stop := b.run()
	b.issued()
	stop()
	before.Close()
	o.Validity = 0
	b.with(acmetest.Start(t, o))
	b.reopen()
	b.run()
	if e := b.event(); e.Err == nil || !strings.Contains(e.Err.Error(), "forgotten the account") {
		t.Errorf("the first attempt: %+v", e)
	}
	b.issued()
}

// TestChallengeAfterChallenge closes one of the two ports: the other challenge is met, and tried first from then on.
func TestChallengeAfterChallenge(t *testing.T) {
	b := newBench(t)
	b.opts.Hosts = []string{ours, "more.example.com"}
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: acmetest.Ports(t, 1)[0]})
	b.with(s)
	b.open()
	b.run()
	b.issued()
	b.issued()
	if n := s.AllOrders(); n != 4 {
		t.Errorf("%d orders for two hosts, want one for each challenge", n)
	}
	if h := b.client.hosts[ours]; h.last != HTTP01 {
		t.Errorf("the challenge that was met last is %q", h.last)
	}
}

// TestNobodyToValidate closes both ports: it is not tried again before the pause for refusals is over.
func TestNobodyToValidate(t *testing.T) {
	b := newBench(t)
	b.opts.PauseRefused = 5 * time.Minute
	ports := acmetest.Ports(t, 2)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: ports[0], TLSPort: ports[1]})
	b.with(s)
	b.open()
	b.run()
	e := b.event()
	if e.Err == nil || !strings.Contains(e.Err.Error(), TLSALPN01+": ") || !strings.Contains(e.Err.Error(), HTTP01+": ") {
		t.Errorf("it does not say what was tried: %v", e.Err)
	}
	if left := time.Until(e.Again); left < 3*time.Minute || left > 6*time.Minute {
		t.Errorf("it is tried again after %v", left)
	}
	if n := s.AllOrders(); n != 2 {
		t.Errorf("%d orders, want one for each challenge", n)
	}
	if n := strings.Count(b.log.String(), "level=ERROR"); n != 1 {
		t.Errorf("one attempt has left %d lines:\n%s", n, b.log)
	}
}

// TestExternalAccount has an account bound to one elsewhere.
func TestExternalAccount(t *testing.T) {
	key := base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte("k"), 32))
	other := base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte("o"), 32))
	for _, tt := range []struct {
		name, id, key, want string
	}{
		{"the right key", "kid-1", key, ""},
		{"another key", "kid-1", other, "HTTP 4"},
		{"no account elsewhere", "", "", "externalAccountRequired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.opts.EABKeyID, b.opts.EABKey = tt.id, tt.key
			b.with(acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort, EAB: map[string]string{"kid-1": key}}))
			b.open()
			b.run()
			e := b.event()
			if tt.want == "" && e.Err != nil || tt.want != "" && (e.Err == nil || !strings.Contains(e.Err.Error(), tt.want)) {
				t.Errorf("it ended with %v, want %q", e.Err, tt.want)
			}
		})
	}
}

// TestAddressChanges tells the server of another e-mail address.
func TestAddressChanges(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	stop := b.run()
	b.issued()
	stop()
	b.opts.Email, b.opts.Hosts = "others@example.com", append(b.opts.Hosts, "more.example.com")
	b.reopen()
	b.run()
	b.issued()
	kept, err := b.client.loadAccount()
	if err != nil || !slices.Equal(kept.Contact, []string{"mailto:others@example.com"}) {
		t.Errorf("the account is %+v, %v", kept, err)
	}
	if n := s.Asked(acmetest.Accounts); n != 1 {
		t.Errorf("%d requests to change the account, want one", n)
	}
}

// TestDamagedFiles starts with certificates that can't be used: others are issued.
func TestDamagedFiles(t *testing.T) {
	b := newBench(t)
	b.opts.Hosts = []string{ours, "more.example.com"}
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	stop := b.run()
	b.issued()
	b.issued()
	stop()
	good, err := os.ReadFile(b.file(ours + ".pem"))
	if err != nil {
		t.Fatal(err)
	}
	others, err := os.ReadFile(b.file("more.example.com.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := keyPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	_, chain, _ := bytes.Cut(good, []byte("-----END PRIVATE KEY-----\n"))
	orders := s.Orders(ours)
	for name, text := range map[string][]byte{
		"empty": nil, "cut": good[:len(good)/3], "another host's": others, "another key's": append(stranger, chain...), "too long": append(slices.Clone(good), make([]byte, maxFile)...),
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(b.file(ours+".pem"), text, 0o600); err != nil {
				t.Fatal(err)
			}
			b.t = t
			b.reopen()
			if cert, _ := b.client.Certificate(ours); cert != nil {
				t.Error("it is used")
			}
			stop := b.run()
			b.issued()
			stop()
			orders++
			if n := s.Orders(ours); n != orders {
				t.Errorf("%d orders, want %d", n, orders)
			}
		})
	}
}

// TestEveryWriteFails has each call fail that writes something down, in each way. What fails before the order costs none, and what was written can be read.
func TestEveryWriteFails(t *testing.T) {
	b := newBench(t)
	s := acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort})
	b.with(s)
	b.open()
	obtain := func(disk durable.FS, dir string) (*Client, error) {
		o := b.opts
		o.FS, o.Dir = disk, filepath.Join(dir, "acme")
		b.opts = o
		b.reopen()
		_, err := b.client.obtain(t.Context(), b.client.hosts[ours], nil)
		return b.client, err
	}
	disk := func() (*durabletest.FS, string) {
		dir := t.TempDir()
		disk, err := durabletest.New(dir)
		if err != nil {
			t.Fatal(err)
		}
		return disk, dir
	}
	whole, dir := disk()
	if _, err := obtain(whole, dir); err != nil {
		t.Fatal(err)
	}
	calls := whole.Calls()
	if len(calls) < 10 {
		t.Fatalf("only %d calls: %v", len(calls), calls)
	}
	// The last one before the order makes the name of the key durable.
	last := 2 + slices.IndexFunc(calls, func(call string) bool { return strings.HasPrefix(call, "rename") && strings.Contains(call, ".key") })
	for at := 1; at <= len(calls); at++ {
		for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.FailThoughDone, durabletest.PowerCut} {
			if at > last && mode != durabletest.Fail && testtools.Brief() {
				continue // each of these is an order
			}
			fsys, dir := disk()
			fsys.Break(at, mode, errors.New("no such luck"))
			before := s.AllOrders()
			client, err := obtain(fsys, dir)
			made := s.AllOrders() - before
			noticed := at < last || at == last && mode != durabletest.PowerCut
			if strings.HasPrefix(calls[at-1], "remove") && mode == durabletest.FailThoughDone {
				noticed = false // nothing was there to be removed, which is told first
			}
			if made > 0 && noticed {
				t.Errorf("call %d (%s) %s: an order was made all the same", at, calls[at-1], mode)
			}
			if err != nil && made > 0 {
				t.Errorf("call %d (%s) %v: an order was made, and came to nothing: %v", at, calls[at-1], mode, err)
			}
			if err == nil && made == 0 {
				t.Errorf("call %d (%s) %v: a certificate came from nowhere", at, calls[at-1], mode)
			}
			// The power goes: what is left either can be read or isn't there.
			after := filepath.Join(t.TempDir(), "after")
			if err := fsys.Crash(after, durabletest.Nothing()); err != nil {
				t.Fatal(err)
			}
			client.opts.Dir, client.opts.FS = filepath.Join(after, "acme"), durable.OS{}
			if _, err := client.load(ours); err != nil {
				t.Errorf("call %d (%s) %v: %v", at, calls[at-1], mode, err)
			}
			if _, err := client.loadAccount(); err != nil {
				t.Errorf("call %d (%s) %v: %v", at, calls[at-1], mode, err)
			}
		}
	}
}

// TestPowerCut cuts the power after each call of an order that succeeds: an account whose certificate is there is there, too.
func TestPowerCut(t *testing.T) {
	b := newBench(t)
	b.with(acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort}))
	b.open()
	dir := t.TempDir()
	disk, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	b.opts.FS, b.opts.Dir = disk, filepath.Join(dir, "acme")
	b.reopen()
	cert, err := b.client.obtain(t.Context(), b.client.hosts[ours], nil)
	if err != nil {
		t.Fatal(err)
	}
	after := filepath.Join(t.TempDir(), "after")
	if err := disk.Crash(after, durabletest.Nothing()); err != nil {
		t.Fatal(err)
	}
	b.opts.FS, b.opts.Dir = nil, filepath.Join(after, "acme")
	c := Open(b.opts)
	if kept, valid := c.Certificate(ours); !valid || !kept.Leaf.Equal(cert.Leaf) {
		t.Errorf("after a power cut there is %v, want what was issued", kept)
	}
	if a, err := c.loadAccount(); err != nil || a.URL == "" {
		t.Errorf("after a power cut the account is %+v, %v", a, err)
	}
}

// TestManners has a server say when it wants to be asked again.
func TestManners(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		status int
		header string
		want   time.Duration
	}{
		{http.StatusTooManyRequests, "600", 10 * time.Minute},
		{http.StatusServiceUnavailable, now.Add(time.Hour).Format(http.TimeFormat), time.Hour},
		{http.StatusTooManyRequests, "99999999999999999999", 0},
		{http.StatusTooManyRequests, "9999999", maxRetryAfter},
		{http.StatusTooManyRequests, "-5", 0},
		{http.StatusTooManyRequests, "soon", 0},
		{http.StatusTooManyRequests, "", 0},
		{http.StatusOK, "600", 0},
	} {
		m := &manners{now: func() time.Time { return now }, next: roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: tt.status, Header: http.Header{"Retry-After": {tt.header}}, Body: io.NopCloser(bytes.NewReader(make([]byte, maxAnswer+1)))}, nil
		})}
		resp, err := m.RoundTrip(&http.Request{})
		if err != nil {
			t.Fatal(err)
		}
		if got := m.left(); got < tt.want || got > tt.want+tt.want/10 {
			t.Errorf("%d with Retry-After %q: left alone for %v, want %v", tt.status, tt.header, got, tt.want)
		}
		if n, err := io.Copy(io.Discard, resp.Body); err == nil || n > maxAnswer {
			t.Errorf("%d bytes of an answer that is too long were read, %v", n, err)
		}
		_ = resp.Body.Close()
		c := &Client{busy: m}
		h := &host{unreachable: growing(time.Second), refused: growing(time.Second)}
		if got := c.pause(h, errors.New("too many requests")); got < tt.want {
			t.Errorf("%d with Retry-After %q: the next attempt is after %v", tt.status, tt.header, got)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestValidatorsConnection makes a connection as a validator does, and tries to have more of it than the handshake.
func TestValidatorsConnection(t *testing.T) {
	b := newBench(t)
	b.with(acmetest.Start(t, acmetest.Options{HTTPPort: b.httpPort, TLSPort: b.tlsPort}))
	b.open()
	b.run()
	b.issued()
	dial := func(protocols ...string) (*tls.Conn, error) {
		return tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", b.tlsPort), &tls.Config{
			ServerName: ours, NextProtos: protocols, InsecureSkipVerify: true, //nolint:gosec // what it says is looked at
		})
	}
	if conn, err := dial(Protocol); err == nil {
		_ = conn.Close()
		t.Error("a validator that nobody waits for is answered")
	}
	cert, _ := b.client.Certificate(ours)
	b.client.answers.mu.Lock()
	b.client.answers.certs = map[string]*tls.Certificate{ours: cert}
	b.client.answers.mu.Unlock()
	conn, err := dial(Protocol)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().NegotiatedProtocol; got != Protocol {
		t.Errorf("the protocol is %q", got)
	}
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+ours+"\r\n\r\n")
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a request on a validator's connection is answered with %q, %v", got, err)
	}
	// Who offers something else besides is a client like any other.
	other, err := dial("http/1.1", Protocol)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if got := other.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("who offers both gets %q", got)
	}
}

// unreachable is an ACME server that can't be reached, and counts who tries.
type unreachable struct{ asked atomic.Int64 }

// RoundTrip implements http.RoundTripper.
func (u *unreachable) RoundTrip(*http.Request) (*http.Response, error) {
	u.asked.Add(1)
	return nil, errors.New("connection refused")
}

// TestOfflineForAWhile asks nobody as long as that is set, and soon after.
func TestOfflineForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var offline atomic.Bool
		offline.Store(true)
		server := new(unreachable)
		var log bytes.Buffer
		c := Open(Options{
			Directory: "https://acme.example.net/directory", Hosts: []string{"images.example.net"}, Terms: true, Dir: t.TempDir(), Transport: server,
			Offline: offline.Load, Log: slog.New(slog.NewTextHandler(&log, nil)),
		})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		// Ends with ctx; waited for below.
		running.Go(func() { c.Run(ctx) })
		time.Sleep(5 * time.Hour)
		if n := server.asked.Load(); n > 0 {
			t.Errorf("offline the server was asked %d times", n)
		}
		offline.Store(false)
		time.Sleep(61 * time.Second)
		if server.asked.Load() == 0 {
			t.Error("a minute later nobody was asked")
		}
		cancel()
		running.Wait()
		if n := strings.Count(log.String(), "this certificate isn't renewed"); n != 1 {
			t.Errorf("the log says %d times that nobody is asked:\n%s", n, &log)
		}
	})
}
