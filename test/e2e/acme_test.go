package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/acme/acmetest"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/node"
)

// ownHost is the name that certificates are issued for.
const ownHost = "images.example.net"

// An acmeScene is a scene whose acproxy has an ACME server.
type acmeScene struct {
	*scene
	server   *acmetest.Server // nil before serve
	address  string           // of it
	httpPort int
	tlsPort  int
}

// stageACME is stage with addresses that validators can find. In the overlay, $PLAIN and $SECURE stand for them, and $ACME for the keys of acme that say where
// the server is.
func stageACME(t *testing.T, overlay string) *acmeScene {
	t.Helper()
	ports := acmetest.Ports(t, 3)
	a := &acmeScene{address: fmt.Sprintf("127.0.0.1:%d", ports[0]), httpPort: ports[1], tlsPort: ports[2]}
	a.scene = stage(t, strings.NewReplacer(
		"$PLAIN", fmt.Sprintf("'127.0.0.1:%d'", a.httpPort), "$SECURE", fmt.Sprintf("'127.0.0.1:%d'", a.tlsPort),
		"$ACME", fmt.Sprintf("directory: 'https://%s/dir', ca_file: $DIR/acme-ca.pem, accept_terms: true, hosts: [%s]", a.address, ownHost),
	).Replace(overlay))
	return a
}

// serve starts the ACME server.
func (a *acmeScene) serve(t *testing.T, o acmetest.Options) {
	t.Helper()
	o.Address, o.HTTPPort, o.TLSPort = a.address, a.httpPort, a.tlsPort
	a.server = acmetest.Start(t, o)
	a.write("acme-ca.pem", a.server.CAPEM)
}

// dial shows a name at the TLS listener, and returns the certificate that it is shown.
func (a *acmeScene) dial(name string, config *tls.Config) (*x509.Certificate, error) {
	config.ServerName = name
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", a.tlsPort))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// issued waits until clients are shown a certificate that was issued after another one, which may be nil.
func (a *acmeScene) issued(before *x509.Certificate) *x509.Certificate {
	a.t.Helper()
	for deadline := time.Now().Add(2 * patience); ; time.Sleep(50 * time.Millisecond) {
		cert, err := a.dial(ownHost, &tls.Config{RootCAs: a.server.Roots})
		if err == nil && (before == nil || !cert.Equal(before)) {
			return cert
		}
		if time.Now().After(deadline) {
			a.t.Fatalf("no certificate was issued: %v", err)
		}
	}
}

// TestACME has a certificate issued, and everything that such an address is for: clients old and new, nodes that take it for a publisher, names that nobody has
// heard of, and restarts.
func TestACME(t *testing.T) {
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme}], acme: {$ACME}}")
	a.serve(t, acmetest.Options{})
	a.start()
	cert := a.issued(nil)

	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, h2 := range []bool{false, true} {
			transport := &http.Transport{
				TLSClientConfig: &tls.Config{RootCAs: a.server.Roots, MinVersion: version, MaxVersion: version}, ForceAttemptHTTP2: h2,
				DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
					return dialLoopback(ctx, network, fmt.Sprintf("127.0.0.1:%d", a.tlsPort))
				},
			}
			resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + ownHost + "/.acproxy/healthz")
			transport.CloseIdleConnections()
			if err != nil {
				t.Errorf("%s, HTTP/2 %v: %v", tls.VersionName(version), h2, err)
				continue
			}
			_ = resp.Body.Close()
			if want := map[bool]int{false: 1, true: 2}[h2]; resp.StatusCode != http.StatusOK || resp.ProtoMajor != want || resp.TLS.Version != version {
				t.Errorf("%s, HTTP/2 %v: %s %s over %s", tls.VersionName(version), h2, resp.Proto, resp.Status, tls.VersionName(resp.TLS.Version))
			}
		}
	}
	if _, err := a.dial(ownHost, &tls.Config{RootCAs: a.server.Roots, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	// Who connects to an address names no host.
	if got, err := a.dial("", &tls.Config{InsecureSkipVerify: true}); err != nil || !got.Equal(cert) {
		t.Errorf("without a name a client is shown %v, %v", got, err)
	}

	// Nodes for which publishers' names lead here get what the local CA vouches for.
	im := a.publish(app("app"))
	a.fetchAsRkt(a.newNode(node.Options{HTTP2: true}), im)
	for _, name := range []string{"quay.io", "www." + ownHost, "localhost"} {
		if got, err := a.dial(name, &tls.Config{InsecureSkipVerify: true}); err == nil {
			t.Errorf("%s is shown a certificate for %v", name, got.DNSNames)
		}
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		asked := a.server.Asked(acmetest.RenewalInfo)
		a.restart(signal)
		if got, err := a.dial(ownHost, &tls.Config{RootCAs: a.server.Roots}); err != nil || !got.Equal(cert) {
			t.Errorf("right after a restart (%v) a client is shown %v, %v", signal, got, err)
		}
		for deadline := time.Now().Add(patience); a.server.Asked(acmetest.RenewalInfo) == asked; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the ACME server isn't asked when to renew")
			}
		}
	}
	if n, accounts := a.server.AllOrders(), a.server.Asked(acmetest.NewAccount); n != 1 || accounts != 1 {
		t.Errorf("%d orders and %d accounts were made, want one of each", n, accounts)
	}
	if got, want := a.metric(`acproxy_certificate_expiry_timestamp_seconds{name="`+ownHost+`",source="acme"}`), float64(cert.NotAfter.Unix()); got != want {
		t.Errorf("the metric says that the certificate ends at %v, want %v", got, want)
	}
	// Tokens that nobody waits for are nothing special, and hide nothing.
	for _, path := range []string{"/.well-known/acme-challenge/token", "/.well-known/acme-challenge/", "/.well-known/nothing"} {
		if got := a.get(a.plain() + path); got.Status != http.StatusNotFound || !strings.Contains(string(got.Body), "no-such-page") {
			t.Errorf("%s is answered with %d: %s", path, got.Status, got.Body)
		}
	}
}

// TestACMEByCurl looks at the certificate as an operator does.
func TestACMEByCurl(t *testing.T) {
	testtools.Need(t, "curl")
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme}], acme: {$ACME}}")
	a.serve(t, acmetest.Options{})
	a.start()
	a.issued(nil)
	roots := a.write("roots.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.server.Root.Raw}))
	out, err := exec.Command("curl", "-sSv", "--noproxy", "*", "--cacert", roots, "--resolve", fmt.Sprintf("%s:%d:127.0.0.1", ownHost, a.tlsPort),
		fmt.Sprintf("https://%s:%d/.acproxy/healthz", ownHost, a.tlsPort)).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "\nok\n") {
		t.Errorf("curl: %v\n%s", err, out)
	}
}

// TestACMEChallenges meets each challenge alone, at addresses where everybody else has to show who he is.
func TestACMEChallenges(t *testing.T) {
	ca, _ := newAuthority(t)
	for _, tt := range []struct{ name, overlay string }{
		{"tls-alpn-01 where clients need certificates", `{listen: [{address: $SECURE, tls: acme, client_ca_file: $DIR/clients.pem, auth: [certificate]}], acme: {$ACME}}`},
		{"http-01 where clients need tokens", `{listen: [{address: $PLAIN, auth: [bearer]}, {address: $SECURE, tls: acme}], acme: {$ACME, challenges: [http-01]}}`},
		{"tls-alpn-01 at an address for operators", `{listen: [{address: "127.0.0.1:0"}], admin: {listen: [{address: $SECURE, tls: acme}]}, acme: {$ACME, challenges: [tls-alpn-01]}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := stageACME(t, tt.overlay)
			a.write("clients.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}))
			a.serve(t, acmetest.Options{})
			a.start()
			for deadline := time.Now().Add(patience); a.metric(`acproxy_acme_orders_total{outcome="issued"}`) == 0; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("no certificate was issued")
				}
			}
			if failed := a.metric(`acproxy_acme_orders_total{outcome="failed"}`); failed != 0 {
				t.Errorf("%v orders have failed", failed)
			}
			if status, events := a.admin("/api/v1/events"); status != http.StatusOK || !strings.Contains(events, "certificate-issued") {
				t.Errorf("the events are %d %s", status, events)
			}
		})
	}
}

// TestACMEBesideFiles has a certificate of its own for the names that aren't ours, and for ours until one was issued.
func TestACMEBesideFiles(t *testing.T) {
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme, cert_file: $DIR/cert.pem, key_file: $DIR/key.pem}], acme: {$ACME}}")
	own, key := newAuthority(t)
	a.write("cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Raw}))
	a.write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))(t)}))
	a.serve(t, acmetest.Options{})
	a.server.Close()
	a.start()
	for _, name := range []string{ownHost, imageHost, "quay.io", ""} {
		if got, err := a.dial(name, &tls.Config{InsecureSkipVerify: true}); err != nil || !got.Equal(own) {
			t.Errorf("without an ACME server %q is shown %v, %v; want the file's", name, got, err)
		}
	}
	a.scene.server().end(syscall.SIGTERM)
	a.serve(t, acmetest.Options{})
	a.start()
	a.issued(nil)
	if got, err := a.dial("quay.io", &tls.Config{InsecureSkipVerify: true}); err != nil || !got.Equal(own) {
		t.Errorf("a name that isn't ours is shown %v, %v; want the file's", got, err)
	}
	if n := a.server.AllOrders(); n != 1 {
		t.Errorf("%d orders, want one", n)
	}
}

// TestACMERenewal has certificates that last for some seconds.
func TestACMERenewal(t *testing.T) {
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme}], acme: {$ACME}}")
	a.serve(t, acmetest.Options{Validity: 12 * time.Second})
	a.start()
	first := a.issued(nil)
	a.issued(first)
	if now := time.Now(); now.After(first.NotAfter) {
		t.Errorf("renewed at %v what had ended at %v", now, first.NotAfter)
	}
}

// TestACMEServerDown starts while nobody answers for the ACME server: images are served all the same.
func TestACMEServerDown(t *testing.T) {
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme}], acme: {$ACME}}")
	a.serve(t, acmetest.Options{})
	a.server.Close()
	a.start()
	a.fetchAsRkt(a.newNode(node.Options{HTTP2: true}), a.publish(app("app")))
	for deadline := time.Now().Add(patience); a.metric(`acproxy_acme_orders_total{outcome="failed"}`) == 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no order has failed")
		}
	}
	if got := a.metric(`acproxy_certificate_expiry_timestamp_seconds{name="` + ownHost + `",source="acme"}`); got != 0 {
		t.Errorf("the metric says that a certificate ends at %v", got)
	}
	if n := strings.Count(a.scene.server().output(), "no certificate was issued"); n != 1 {
		t.Errorf("an attempt has left %d lines", n)
	}
	if _, err := a.dial(ownHost, &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("there is a certificate")
	}
}

// TestACMEOffline dials nobody: neither for a first certificate, nor to renew one that is about to end.
func TestACMEOffline(t *testing.T) {
	a := stageACME(t, "{listen: [{address: $PLAIN}, {address: $SECURE, tls: acme}], acme: {$ACME}}")
	a.serve(t, acmetest.Options{Validity: 6 * time.Second})
	a.start()
	cert := a.issued(nil)
	a.scene.server().end(syscall.SIGTERM)
	config, err := os.ReadFile(a.config)
	if err != nil {
		t.Fatal(err)
	}
	a.write("config.yaml", append(config, "\noffline: true\n"...))
	asked := a.server.Asked("/")
	a.start()
	if got, err := a.dial(ownHost, &tls.Config{InsecureSkipVerify: true}); err != nil || !got.Equal(cert) {
		t.Errorf("offline a client is shown %v, %v", got, err)
	}
	// Until after its end, when it would long have been renewed.
	time.Sleep(time.Until(cert.NotAfter.Add(time.Second)))
	if got, err := a.dial(ownHost, &tls.Config{InsecureSkipVerify: true}); err != nil || !got.Equal(cert) {
		t.Errorf("after its end a client is shown %v, %v", got, err)
	}
	if n := a.server.Asked("/"); n != asked {
		t.Errorf("offline the ACME server was asked %d times", n-asked)
	}
	if !strings.Contains(a.scene.server().output(), "this certificate isn't renewed") {
		t.Error("nobody is told that it isn't renewed")
	}
}
