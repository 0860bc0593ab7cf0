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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
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
	if code, out := s.cli("reload"); code != 0 || !strings.Contains(out, "publishers[example.com].proxy: ") || strings.Contains(out, "hush") {
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

// TestReloadThatNeedsARestart: what would take effect doesn't go with what wouldn't, so nothing does.
func TestReloadThatNeedsARestart(t *testing.T) {
	t.Parallel()
	s := stage(t, "{access: {users_file: $DIR/users}, listen: [{address: '127.0.0.1:0', auth: [anonymous, basic]}]}")
	s.write("users", nil)
	s.start()
	im := s.publish(app("app"))
	s.hold(im)
	// Without users nobody could show who he is at that address, which is there until the server is started anew.
	s.configure("{access: {rules: [{prefix: '', read: [alice]}]}, listen: [{address: '127.0.0.1:0'}]}")
	if code, out := s.cli("reload"); code != 1 || !strings.Contains(out, "restart") || !strings.Contains(out, "listen[0].auth") {
		t.Errorf("acproxy reload: %d, %s", code, out)
	}
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

// TestReloadsBesideHits has nodes ask for what is held while everything changes again and again: none of them notices.
func TestReloadsBesideHits(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 300<<10))
	s.hold(im)
	stop := make(chan struct{})
	var nodes sync.WaitGroup
	var served atomic.Int64
	for range 3 {
		// They end when stop is closed; waited for below.
		nodes.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got := s.get(s.direct(im, "aci")); got.Err != nil || got.Status != http.StatusOK || !bytes.Equal(got.Body, im.aci) {
					t.Errorf("a hit beside a reload: %d, %d bytes, %v", got.Status, len(got.Body), got.Err)
					return
				}
				served.Add(1)
			}
		})
	}
	overlays := []string{
		"{trust: {signature: optional, expired: accept-if-signed-before}, cache: {max_size: 1GiB, high: 50, low: 40}, freshness: {ttl: 1s, jitter: 50}}",
		"{offline: true, dial: {hosts: {example.com: '127.0.0.1:1'}}, publishers: []}",
		"{publishers: [{prefix: example.com, ca_file: $CA, ttl: 1m, delivery: verify-first}], allow: [example.com], clients: {rate: 100000}}",
	}
	for i := range 15 {
		before := served.Load()
		s.reloads(overlays[i%len(overlays)])
		eventually(t, "nodes go on asking", func() bool { return served.Load() > before || t.Failed() })
	}
	close(stop)
	nodes.Wait()
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

// reloads changes the configuration of a server that runs, and expects what it says, and that nothing of it needs a restart.
func (s *scene) reloads(overlay string, texts ...string) {
	s.t.Helper()
	s.configure(overlay)
	code, out := s.cli("reload")
	if code != 0 || strings.Contains(out, "restart") {
		s.t.Errorf("acproxy reload: %d, %s", code, out)
	}
	for _, text := range texts {
		if !strings.Contains(out, text) {
			s.t.Errorf("acproxy reload says %q, want %q in it", out, text)
		}
	}
}

// distrusts waits until metrics and listings name as many images that aren't served.
func (s *scene) distrusts(n int) {
	s.t.Helper()
	began := time.Now()
	eventually(s.t, fmt.Sprintf("%d images are distrusted", n), func() bool { return s.metric("acproxy_images_distrusted") == float64(n) })
	if took := time.Since(began); took > 10*time.Second {
		s.t.Errorf("it took %v to judge the held images again", took)
	}
	if _, out := s.cli("images", "--state", "quarantined"); strings.Count(out, "\nexample.com/") != n {
		s.t.Errorf("acproxy images --state quarantined, with %d of them:\n%s", n, out)
	}
}

// TestReloadedTrust makes the policies stricter and wider while images are held, and lets a key expire.
func TestReloadedTrust(t *testing.T) {
	t.Parallel()
	s := newScene(t, "trust: {signature: optional}")
	short := must(trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA, Expires: time.Now().Add(7 * time.Second).Truncate(time.Second)}))(t)
	s.trust(short, imageHost)
	signed, bare, brief := s.publish(app("signed")), s.publishAs(app("bare"), nil), s.publishAs(app("brief"), short)
	eventually(t, "the key is known", func() bool { return s.get(s.direct(brief, "aci")).Status == http.StatusOK })
	s.hold(signed)
	s.hold(bare)
	s.reloads("", "trust.signature: \"optional\" → \"required\"")
	wantProblem(t, s.get(s.direct(bare, "aci")), http.StatusForbidden, "unsigned")
	wantImage(t, s.get(s.direct(signed, "aci")), signed)
	s.distrusts(1)
	// Nobody tells the server when a key expires.
	s.distrusts(2)
	wantProblem(t, s.get(s.direct(brief, "aci")), http.StatusForbidden, "key-expired")
	s.reloads("publishers: [{prefix: example.com, ca_file: $CA, expired: accept-if-signed-before, signature: optional}]",
		`publishers[example.com].signature: unset → "optional"`, `publishers[example.com].expired: unset → "accept-if-signed-before"`)
	for _, im := range []image{signed, bare, brief} {
		wantImage(t, s.get(s.direct(im, "aci")), im)
	}
	s.distrusts(0)
	if n := s.publisher.Count("*.aci"); n > 5 { // with two HEAD requests, to tell what isn't there from what isn't signed
		t.Errorf("images were asked for %d times", n)
	}
	// Who makes a mistake changes nothing.
	s.configure("trust: {threshold: 2, signature: optional}")
	if code, out := s.cli("reload"); code == 0 || !strings.Contains(out, "trust.threshold") {
		t.Errorf("acproxy reload: %d, %s", code, out)
	}
	wantImage(t, s.get(s.direct(bare, "aci")), bare)
}

// TestReloadedQuota makes the store smaller than what it holds, and larger.
func TestReloadedQuota(t *testing.T) {
	t.Parallel()
	s := newScene(t, "cache: {min_free: 0}")
	var images []image
	for i := range 12 {
		im := s.publish(large(fmt.Sprint("app", i), 2<<20))
		s.hold(im)
		images = append(images, im)
	}
	s.reloads("cache: {min_free: 0, max_size: 20MiB, high: 80, low: 50, grace: 0s}", "cache.max_size: 0B → 20MiB", "cache.grace: 5m → 0s")
	held := func() int { return int(s.metric(`acproxy_cache_images{state="ok"}`)) }
	eventually(t, "the store has come down to the low watermark", func() bool { return held() <= 4 })
	if held() == 0 {
		t.Error("everything was evicted")
	}
	wantImage(t, s.get(s.direct(images[11], "aci")), images[11])
	tooLarge := s.publish(large("large", 24<<20))
	wantProblem(t, s.get(s.direct(tooLarge, "aci")), http.StatusInsufficientStorage, "quota")
	s.reloads("cache: {min_free: 0, max_size: 200MiB}", "cache.max_size: 20MiB → 200MiB")
	s.hold(tooLarge)
}

// TestReloadedOffline goes offline and comes back: nobody is dialled meanwhile, by a request that begins or by one that is going on.
func TestReloadedOffline(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im, other, cut := s.publish(app("app")), s.publish(app("other")), s.publish(large("cut", 2<<20))
	s.hold(im)
	trouble := s.publisher.Misbehave(publisher.URL(cut.blob()), publisher.Fault{StallAfter: publisher.At(1 << 20), TruncateAfter: publisher.At(3 << 19)})
	done := make(chan node.Answer, 1)
	go func() { done <- s.get(s.direct(cut, "aci")) }()
	within(t, "the publisher stalls", trouble.Stalled())
	s.reloads("offline: true", "offline: false → true")
	s.publisher.ClearRequests()
	// Its publisher breaks off, and is not asked for the rest.
	trouble.Release()
	if got := <-done; got.Err == nil && bytes.Equal(got.Body, cut.aci) {
		t.Error("an image came to its end although its publisher broke off and nobody may be asked")
	}
	s.publisher.Stop()
	knocks, end := s.knocks()
	wantImage(t, s.get(s.direct(im, "aci")), im)
	wantProblem(t, s.get(s.direct(other, "aci")), http.StatusNotFound, "offline")
	if _, out := s.cli("discover", imageHost+"/other"); !strings.Contains(out, "offline") {
		t.Errorf("acproxy discover: %s", out)
	}
	if _, out := s.admin("/api/v1/about"); !strings.Contains(out, `"offline":true`) {
		t.Errorf("about: %s", out)
	}
	end()
	if n := knocks.Load(); n > 0 || len(s.publisher.Requests()) > 0 {
		t.Errorf("%d connections and %d requests were made while it was offline", n, len(s.publisher.Requests()))
	}
	if err := s.publisher.Resume(); err != nil {
		t.Fatal(err)
	}
	s.publisher.Behave()
	s.reloads("publishers: [{prefix: example.com, ca_file: $CA, offline: true}]", "offline: true → false", "publishers[example.com].offline: unset → true")
	wantProblem(t, s.get(s.direct(other, "aci")), http.StatusNotFound, "offline")
	s.reloads("", "publishers[example.com].offline: true → unset")
	s.hold(other)
	s.hold(cut)
}

// TestReloadedPublishers changes how publishers are reached, and what they want to see.
func TestReloadedPublishers(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("first"))
	s.hold(im)
	version := 1
	// fresh returns what an image that isn't held is answered with.
	fresh := func() (image, node.Answer) {
		t.Helper()
		version++
		im := s.publish(acitest.Spec{Name: imageHost + "/app", Labels: standard(fmt.Sprint("1.0.", version)), Files: map[string]string{"n": fmt.Sprint(version)}})
		return im, s.get(s.direct(im, "aci"))
	}
	fetched := func() {
		t.Helper()
		im, got := fresh()
		wantImage(t, got, im)
	}
	failed := func(status int, code string) {
		t.Helper()
		_, got := fresh()
		wantProblem(t, got, status, code)
	}
	fetched()
	// Connections that are open are of no use any more.
	s.reloads("publishers: [{prefix: example.com}]", "publishers[example.com].ca_file: ", "→ unset")
	failed(http.StatusBadGateway, "publisher-tls")
	s.reloads("publishers: []", "publishers[example.com]: {} → none")
	failed(http.StatusBadGateway, "publisher-tls")
	s.reloads("", "publishers[example.com]: none → {ca_file: ")
	fetched()
	s.reloads("dial: {hosts: {example.com: '127.0.0.1:1', storage.example.com: '127.0.0.1:1'}}", "dial.hosts: ")
	failed(http.StatusBadGateway, "publisher-unreachable")
	s.reloads("")
	fetched()
	s.reloads("allow: [example.org]\npublishers: []", "allow: [] → [\"example.org\"]")
	failed(http.StatusForbidden, "name-not-allowed")
	wantProblem(t, s.get(s.direct(im, "aci")), http.StatusForbidden, "name-not-allowed")
	s.reloads("")
	wantImage(t, s.get(s.direct(im, "aci")), im)

	const bearer = "Bearer t0psecret"
	s.wants("storage.example.com", bearer)
	failed(http.StatusBadGateway, "publisher-status")
	credentials := "credentials: {hosts: [{host: storage.example.com, type: bearer, secret_file: $DIR/token}]}"
	s.configure(credentials)
	if code, out := s.cli("reload"); code == 0 || !strings.Contains(out, "credentials.hosts[0]") {
		t.Errorf("acproxy reload without the secret: %d, %s", code, out)
	}
	s.write("token", []byte("t0psecret\n"))
	s.reloads(credentials, "credentials.hosts: [] → ")
	fetched()
	s.reloads("", "credentials.hosts: ")
	failed(http.StatusBadGateway, "publisher-status")

	// How long it is good is told with each answer.
	if got := s.get(s.direct(im, "aci")).Header.Get("Cache-Control"); got != "max-age=300" {
		t.Errorf("Cache-Control: %s", got)
	}
	s.reloads("freshness: {max_age: 10s, ttl: 7s}", "freshness.ttl: 5m → 7s", "freshness.max_age: 5m → 10s")
	if got := s.get(s.direct(im, "aci")).Header.Get("Cache-Control"); got != "max-age=10" {
		t.Errorf("Cache-Control: %s", got)
	}
	// What the commands say counts is what counts.
	if code, out := s.cli("config"); code != 0 || !strings.Contains(out, "ttl: 7s") {
		t.Errorf("acproxy config: %s", out)
	}
}
