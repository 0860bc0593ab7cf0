package e2e

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
)

// TestReload changes who may have what while a server runs, by its command and by a signal. What is wrong changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	reload := func(want int, texts ...string) {
		t.Helper()
		code, out := s.cli("reload")
		if code != want {
			t.Errorf("acproxy reload exits with %d, want %d: %s", code, want, out)
		}
		for _, text := range texts {
			if !strings.Contains(out, text) {
				t.Errorf("acproxy reload says %q, want %q in it", out, text)
			}
		}
	}
	reload(0, "reloaded, 0 changes")
	s.configure("access: {rules: [{prefix: example.org, read: [anyone]}]}\nstop_grace: 17s")
	reload(0, "access.rules: [] → [", "stop_grace: ", "17s (needs a restart)", "reloaded, 2 changes")
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusUnauthorized, "credentials-needed")

	// A password in the URL of a proxy is not told.
	s.configure("access: {rules: [{prefix: example.org, read: [anyone]}]}\nstop_grace: 17s\npublishers: [{prefix: example.com, ca_file: $CA, proxy: 'http://user:hush-hush@127.0.0.1:1'}]")
	if code, out := s.cli("reload"); code != 0 || !strings.Contains(out, "publishers: ") || strings.Contains(out, "hush") {
		t.Errorf("acproxy reload: %d, %s", code, out)
	}

	// Something wrong: nothing changes, whether in the file itself or in one that it names.
	s.configure("access: {rules: [{prefix: \"\", read: [anyone]}], users_file: $DIR/users}")
	s.write("users", []byte("alice:plain"))
	reload(1, "users:1")
	wantStatus(t, s.get(s.direct(im, "aci")), http.StatusUnauthorized)

	s.configure("access: {rules: [{prefix: example.com, read: [anyone]}]}")
	if err := s.server().cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rules are others after SIGHUP", func() bool { return s.get(s.direct(im, "aci")).Status == http.StatusOK })
	eventually(t, "the log says so", func() bool { return strings.Contains(s.server().output(), `"msg":"reloaded"`) })
	s.configure("access: {rules: [{prefix: Example.com, read: [anyone]}]}")
	if err := s.server().cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the log says that nothing was reloaded", func() bool { return strings.Contains(s.server().output(), `"msg":"nothing was reloaded"`) })
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

// TestReloadedKeys changes what takes effect without a restart, and back.
func TestReloadedKeys(t *testing.T) {
	t.Parallel()
	s := newScene(t, "log: {access_flush: 0s, level: info}")
	im := s.publish(app("app"))
	reload := func(overlay string, changes int) {
		t.Helper()
		s.configure(overlay)
		code, out := s.cli("reload")
		if code != 0 || !strings.Contains(out, fmt.Sprintf("reloaded, %d change", changes)) || strings.Contains(out, "restart") {
			t.Errorf("acproxy reload: %d, %s", code, out)
		}
	}
	requests := func() int { return strings.Count(s.server().output(), `"msg":"request"`) }
	reload("log: {access_flush: 0s, level: warn}", 1)
	s.hold(im)
	wantImage(t, s.get(s.direct(im, "aci")), im)
	if requests() > 0 {
		t.Error("at level warn there are lines of requests")
	}
	reload("log: {access_flush: 0s, level: info}", 1)
	wantImage(t, s.get(s.direct(im, "aci")), im)
	eventually(t, "a request has a line", func() bool { return requests() > 0 })

	reload("{log: {access_flush: 0s, level: info}, clients: {rate: 1, burst: 2}}", 2)
	status := func() int { return s.get(s.direct(im, "aci.asc")).Status }
	if first, second, third := status(), status(), status(); first != http.StatusOK || second != http.StatusOK || third != http.StatusTooManyRequests {
		t.Errorf("with a rate: %d, %d, %d", first, second, third)
	}
	reload("{log: {access_flush: 0s, level: info}}", 2)
	for range 5 {
		wantStatus(t, s.get(s.direct(im, "aci.asc")), http.StatusOK)
	}

	// An image that is asked for from now on waits for its end.
	reload("{log: {access_flush: 0s, level: info}, freshness: {on_change: follow, max_stale: 0s}, fetch: {delivery: verify-first}, cache: {on_full: stream}}", 4)
	late := s.publish(large("late", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(late.blob()), publisher.Fault{StallAfter: publisher.At(600 << 10)})
	type begun struct {
		resp *http.Response
		err  error
	}
	answered := make(chan begun, 1)
	go func() {
		resp, err := s.client().Get(s.direct(late, "aci"))
		answered <- begun{resp, err}
	}()
	within(t, "the publisher stalls", trouble.Stalled())
	select {
	case a := <-answered:
		t.Fatalf("with delivery: verify-first an answer began before the end: %v, %v", a.resp, a.err)
	case <-time.After(300 * time.Millisecond): // an answer that begins at once is there long before
	}
	trouble.Release()
	a := <-answered
	if a.err != nil {
		t.Fatal(a.err)
	}
	defer a.resp.Body.Close()
	if body := must(io.ReadAll(a.resp.Body))(t); !bytes.Equal(body, late.aci) {
		t.Errorf("%s with %d bytes", a.resp.Status, len(body))
	}
}

// TestRenewedCertificate puts another certificate into the place of the one that is served with.
func TestRenewedCertificate(t *testing.T) {
	t.Parallel()
	s := stage(t, "listen: [{address: '127.0.0.1:0', tls: files, cert_file: $DIR/cert.pem, key_file: $DIR/key.pem}]")
	renew := func() *node.Node {
		t.Helper()
		cert, key := selfSigned(t, imageHost)
		// One after the other, as it happens: in between the two don't go together.
		for name, content := range map[string][]byte{"cert.pem": cert, "key.pem": key} {
			s.write(name+".new", content)
			if err := os.Rename(s.path(name+".new"), s.path(name)); err != nil {
				t.Fatal(err)
			}
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(cert)
		n := s.newNode(node.Options{CAs: pool})
		t.Cleanup(n.Close)
		return n
	}
	before := renew()
	s.start()
	im := s.publish(app("app"))
	s.fetchAsRkt(before, im)
	after := renew()
	eventually(t, "the new certificate is served with", func() bool {
		a := after.Get(s.context(), "https://"+imageHost+"/app?ac-discovery=1", nil, nil)
		return a.Err == nil && a.Status == http.StatusOK
	})
	s.fetchAsRkt(after, im)
}

// TestHealthcheck asks for the health of a server that runs, and of one that doesn't.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	wantStatus(t, s.get(s.plain()+"/.acproxy/readyz"), http.StatusOK)
	if code, out := s.cli("healthcheck"); code != 0 || out != "ready\n" {
		t.Errorf("healthcheck: %d, %s", code, out)
	}
	// Somebody is at the configuration, and the server well.
	good := must(os.ReadFile(s.config))(t)
	s.write("config.yaml", []byte("nothing: here"))
	if code, out := s.cli("healthcheck", "--socket", s.path("data", "admin.sock")); code != 0 || out != "ready\n" {
		t.Errorf("healthcheck by the socket: %d, %s", code, out)
	}
	s.write("config.yaml", good)
	s.server().end(syscall.SIGTERM)
	if code, out := s.cli("healthcheck"); code != 1 || !strings.Contains(out, "no server answers") {
		t.Errorf("healthcheck without a server: %d, %s", code, out)
	}
}

// TestMetrics asks for an image twice and for another one that nobody may have, and reads what is counted, as Prometheus does.
func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newScene(t, "admin: {metrics: '127.0.0.1:0'}")
	im, stranger := s.publish(app("app")), s.publishAs(app("stranger"), stranger(t))
	for range 2 {
		wantImage(t, s.get(s.direct(im, "aci")), im)
	}
	wantStatus(t, s.get(s.direct(stranger, "aci")), http.StatusForbidden)
	found := regexp.MustCompile(`"msg":"serving metrics","address":"([^"]+)"`).FindStringSubmatch(s.server().output())
	if found == nil {
		t.Fatalf("the log doesn't say where the metrics are:\n%s", s.server().output())
	}
	at := "http://" + found[1]
	var metrics string
	eventually(t, "everything is counted", func() bool {
		metrics = string(s.get(at + "/metrics").Body)
		return strings.Contains(metrics, `acproxy_requests_total{cache="none",code="403",kind="image"} 1`)
	})
	for _, want := range []string{
		`acproxy_requests_total{cache="miss",code="200",kind="image"} 1`,
		`acproxy_requests_total{cache="hit",code="200",kind="image"} 1`,
		fmt.Sprintf(`acproxy_served_bytes_total{cache="hit",kind="image"} %d`, len(im.aci)),
		fmt.Sprintf(`acproxy_publisher_received_bytes_total{what="image"} %d`, len(im.aci)),
		`acproxy_publisher_requests_total{what="image"} 1`,
		`acproxy_flight_seconds_count{outcome="kept"} 1`,
		`acproxy_first_byte_seconds_count{cache="miss",kind="image"} 1`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("the metrics don't say %s", want)
		}
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		wantStatus(t, s.get(at+path), http.StatusOK)
	}
	for _, path := range []string{"/", "/debug/pprof/", "/api/v1/images?limit=1"} {
		wantStatus(t, s.get(at+path), http.StatusNotFound)
	}
}
