// Package acmetest is an ACME server for tests: pebble, which is Let's Encrypt's own for this, in this process, with a DNS in which every name is this machine.
package acmetest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/core"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
)

// Where pebble is asked for renewal information, for accounts, and to change one.
const (
	RenewalInfo = "/draft-ietf-acme-ari-03/renewalInfo/"
	NewAccount  = "/sign-me-up"
	Accounts    = "/my-account/"
)

// Options says how a server behaves.
type Options struct {
	Address           string            // to listen at; "" means a free port of this machine
	HTTPPort, TLSPort int               // where validators go
	Validity          time.Duration     // of certificates; 0 means 90 days
	EAB               map[string]string // the keys of accounts elsewhere, in base64url, by their IDs; with any, no other account is made
	Silent            bool              // gives no renewal information
}

// A Server is an ACME server.
type Server struct {
	URL   string            // of the directory
	CAPEM []byte            // whom the server's own certificate comes from
	Root  *x509.Certificate // whom the certificates come from that it issues
	Roots *x509.CertPool    // the same

	http *httptest.Server

	mu       sync.Mutex
	asked    map[string]int // requests, by the beginning of their paths
	orders   map[string]int // by host
	replaced int            // orders that replace another certificate
	window   *core.RenewalInfo
}

// Ports returns n ports of this machine that are free now.
func Ports(t testing.TB, n int) []int {
	t.Helper()
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		// All are held until there are enough, so that none comes twice.
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

// Start starts a server, which ends with the test. It can't be used in parallel tests: pebble reads its environment.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	t.Setenv("PEBBLE_AUTHZREUSE", "0") // each order is validated
	logger := log.New(io.Discard, "", 0)
	store := db.NewMemoryStore()
	for id, key := range o.EAB {
		if err := store.AddExternalAccountKeyByID(id, key); err != nil {
			t.Fatal(err)
		}
	}
	issuer := ca.New(logger, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {ValidityPeriod: uint64(o.Validity / time.Second)}})
	front := wfe.New(logger, store, va.New(logger, o.HTTPPort, o.TLSPort, true, resolver(t), store), issuer, []string{"acme.test"}, true, len(o.EAB) > 0, 0, 0)
	s := &Server{Roots: x509.NewCertPool(), asked: make(map[string]int), orders: make(map[string]int)}
	s.Root = issuer.GetRootCert(0).Cert
	s.Roots.AddCert(s.Root)
	s.http = httptest.NewUnstartedServer(s.counting(front.Handler(), o.Silent))
	s.http.Config.ErrorLog = logger
	if o.Address != "" {
		l, err := net.Listen("tcp", o.Address)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.http.Listener.Close()
		s.http.Listener = l
	}
	s.http.TLS = &tls.Config{Certificates: []tls.Certificate{s.certificate(t)}}
	s.http.StartTLS()
	t.Cleanup(s.Close)
	s.URL = s.http.URL + wfe.DirectoryPath
	return s
}

// Close ends the server.
func (s *Server) Close() { s.http.Close() }

// Orders returns how many certificates were ordered for a host: orders that the server took, whatever became of them.
func (s *Server) Orders(host string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.orders[host]
}

// AllOrders returns how many certificates were ordered.
func (s *Server) AllOrders() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, count := range s.orders {
		n += count
	}
	return n
}

// Replaced returns how many orders said which certificate they replace.
func (s *Server) Replaced() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replaced
}

// Asked returns how many requests were answered whose path begins in a certain way, such as RenewalInfo.
func (s *Server) Asked(path string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for asked, count := range s.asked {
		if strings.HasPrefix(asked, path) {
			n += count
		}
	}
	return n
}

// Advise has the server advise to renew every certificate within a window from now on.
func (s *Server) Advise(start, end time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.window = &core.RenewalInfo{SuggestedWindow: core.SuggestedWindow{Start: start.UTC(), End: end.UTC()}}
}

func (s *Server) advised() *core.RenewalInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.window
}

// counting counts what is asked.
func (s *Server) counting(next http.Handler, silent bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		rec := &recorder{w, http.StatusOK}
		w = rec
		defer func() {
			// What is refused for its nonce, as some of it is by chance, is asked again.
			if rec.status < http.StatusBadRequest {
				s.note(r.URL.Path, body)
			}
		}()
		if window := s.advised(); window != nil && strings.HasPrefix(r.URL.Path, RenewalInfo) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(window)
			return
		}
		if silent && r.URL.Path == wfe.DirectoryPath {
			withoutRenewalInfo(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A recorder notes the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader notes the status.
func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func (s *Server) note(path string, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[path]++
	if path != "/order-plz" {
		return
	}
	var signed struct{ Payload string }
	var order struct {
		Identifiers []struct{ Value string }
		Replaces    string
	}
	if json.Unmarshal(body, &signed) != nil {
		return
	}
	text, err := base64.RawURLEncoding.DecodeString(signed.Payload)
	if err != nil || json.Unmarshal(text, &order) != nil {
		return
	}
	for _, identifier := range order.Identifiers {
		s.orders[identifier.Value]++
	}
	if order.Replaces != "" {
		s.replaced++
	}
}

// withoutRenewalInfo answers with the directory as servers have it that know nothing of renewal information.
func withoutRenewalInfo(w http.ResponseWriter, r *http.Request, next http.Handler) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	var directory map[string]any
	if err := json.Unmarshal(rec.Body.Bytes(), &directory); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	delete(directory, "renewalInfo")
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(directory)
}

// resolver starts a DNS server for which every name is 127.0.0.1, and returns its address.
func resolver(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, asked *dns.Msg) {
		answer := new(dns.Msg).SetReply(asked)
		for _, q := range asked.Question {
			if q.Qtype == dns.TypeA {
				answer.Answer = append(answer.Answer, &dns.A{
					Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(127, 0, 0, 1),
				})
			}
		}
		_ = w.WriteMsg(answer)
	})}
	ended := make(chan struct{})
	// Ends with the test, which waits for it.
	go func() {
		defer close(ended)
		_ = server.ActivateAndServe()
	}()
	t.Cleanup(func() {
		_ = l.Close()
		_ = server.Shutdown()
		<-ended
	})
	return l.Addr().String()
}

// certificate returns the server's own certificate, which is its own authority.
func (s *Server) certificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "acmetest " + strconv.Itoa(time.Now().Nanosecond())},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s.CAPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
