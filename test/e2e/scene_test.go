package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

const (
	imageHost = "example.com"
	// patience is how long anything that has to happen may take.
	patience = 30 * time.Second
)

// Keys take long to make and are the same for all scenes.
var (
	trustedKey  = sync.OnceValues(func() (*trusttest.Key, error) { return trusttest.NewKey(trusttest.Options{}) })
	strangerKey = sync.OnceValues(func() (*trusttest.Key, error) { return trusttest.NewKey(trusttest.Options{Name: "A Stranger"}) })
)

// stranger returns a key that nobody trusts.
func stranger(t testing.TB) *trusttest.Key {
	t.Helper()
	return must(strangerKey())(t)
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// A scene is a publisher, the acproxy under test with a store of its own, and a node in front of it.
type scene struct {
	t         testing.TB
	dir       string
	config    string // the configuration file
	publisher *publisher.Publisher
	key       *trusttest.Key // trusted for the image host
	node      *node.Node     // HTTP/2 where it is offered, the image hosts resolve to acproxy
	nodeCAs   *x509.CertPool // whom nodes trust: the local CA

	running atomic.Pointer[process]
}

// newScene starts a scene. The overlay is YAML that changes the usual configuration: sections are merged, lists replaced; $TLS and $HTTP stand for
// the publisher's addresses, $CA for the file with its CA, $DIR for the scene's directory.
func newScene(t *testing.T, overlay string) *scene {
	t.Helper()
	s := stage(t, overlay)
	s.start()
	return s
}

// stage is newScene without starting the server.
func stage(t *testing.T, overlay string) *scene {
	t.Helper()
	// Not TempDir: a socket's path has to be short.
	dir := must(os.MkdirTemp("", "acproxy-e2e-"))(t)
	s := &scene{t: t, dir: dir, config: filepath.Join(dir, "config.yaml"), key: must(trustedKey())(t)}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s.publisher = must(publisher.Start(publisher.Options{}))(t)
	t.Cleanup(func() {
		if err := s.publisher.Close(); err != nil {
			t.Error(err)
		}
	})
	s.publisher.AddKey(imageHost, s.key.Armored())
	s.write("publisher-ca.pem", s.publisher.CAPEM())
	ca := must(localca.Init(s.path("data", "ca"), []string{imageHost}, localca.Options{}))(t)
	s.nodeCAs = x509.NewCertPool()
	s.nodeCAs.AppendCertsFromPEM(ca.PEM())
	s.trust(s.key, imageHost)
	s.configure(overlay)
	s.node = s.newNode(node.Options{HTTP2: true})
	return s
}

func (s *scene) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *scene) write(name string, content []byte) string {
	s.t.Helper()
	file := s.path(name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// trust trusts a key without telling the server.
func (s *scene) trust(key *trusttest.Key, prefix string) {
	s.t.Helper()
	if _, err := trust.Add(trust.Dirs{Local: s.path("data", "trustedkeys")}, prefix, key.Armored()); err != nil {
		s.t.Fatal(err)
	}
}

// usual is the configuration of a scene. Nobody answers on the resolver's port: what isn't in dial.hosts leads nowhere.
const usual = `
data_dir: $DIR/data
admin: {listen: [{address: "127.0.0.1:0"}]}
listen:
  - {address: "127.0.0.1:0", tls: none, proxy: true}
  - {address: "127.0.0.1:0", tls: local-ca, proxy: false}
dial:
  resolver: 127.0.0.1:1
  hosts:
    example.com: $TLS
    storage.example.com: $TLS
    "example.com:80": $HTTP
    "storage.example.com:80": $HTTP
log: {format: json, level: debug}
publishers:
  - {prefix: example.com, ca_file: $CA}
`

// configure writes the configuration anew, for the next start.
func (s *scene) configure(overlay string) {
	s.t.Helper()
	var merged map[string]any
	for _, part := range []string{usual, overlay} {
		part = strings.NewReplacer("$DIR", s.dir, "$TLS", s.publisher.Addr(), "$HTTP", s.publisher.HTTPAddr(), "$CA", s.path("publisher-ca.pem")).Replace(part)
		var section map[string]any
		if err := yaml.Unmarshal([]byte(part), &section); err != nil {
			s.t.Fatal(err)
		}
		merged = merge(merged, section)
	}
	s.write("config.yaml", must(yaml.Marshal(merged))(s.t))
}

func merge(under, over map[string]any) map[string]any {
	out := maps.Clone(under)
	if out == nil {
		out = make(map[string]any)
	}
	for key, value := range over {
		section, ok := value.(map[string]any)
		before, both := out[key].(map[string]any)
		if ok && both {
			value = merge(before, section)
		}
		out[key] = value
	}
	return out
}

// start starts the server and waits until it serves.
func (s *scene) start() {
	s.t.Helper()
	s.begin(command("serve", "--config", s.config))
}

// begin starts a command that ends up as the server, and waits until it serves.
func (s *scene) begin(cmd *exec.Cmd) {
	s.t.Helper()
	p := launchCommand(s.t, cmd)
	s.running.Store(p)
	s.t.Cleanup(p.cleanup)
	select {
	case <-p.serving:
	case <-p.exited:
		s.t.Fatalf("acproxy ended instead of serving: %v\n%s", p.cmd.ProcessState, p.output())
	case <-time.After(patience):
		s.t.Fatalf("acproxy doesn't serve:\n%s", p.output())
	}
}

func (s *scene) server() *process { return s.running.Load() }

// restart ends the server, politely or not, and starts it again.
func (s *scene) restart(signal syscall.Signal) {
	s.t.Helper()
	s.server().end(signal)
	s.start()
}

// A process is an acproxy that runs.
type process struct {
	t       testing.TB
	cmd     *exec.Cmd
	serving chan struct{} // closed when the server serves; addresses may be read then
	exited  chan struct{} // closed when the process is over
	ended   sync.Once

	addresses []string
	operators string // the URL of the page for operators

	mu  sync.Mutex
	log bytes.Buffer
}

// launch starts the binary. Nothing of this process's environment that concerns connections reaches it.
func launch(t testing.TB, args ...string) *process {
	t.Helper()
	return launchCommand(t, command(args...))
}

// launchCommand starts what ends up as an acproxy.
func launchCommand(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, serving: make(chan struct{}), exited: make(chan struct{})}
	stderr := must(p.cmd.StderrPipe())(t)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Ends with the process, which closes its end of the pipe; cleanup waits for it.
	go func() {
		defer close(p.exited)
		p.read(stderr)
		_ = p.cmd.Wait() // how it ended is in ProcessState
	}()
	return p
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary, args...)
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	// A binary that looks for races sleeps for a second before it ends, unless it is told not to.
	cmd.Env = append(cmd.Env, "SSL_CERT_FILE=/dev/null", "SSL_CERT_DIR=/dev/null", "GORACE=atexit_sleep_ms=20")
	return cmd
}

func (p *process) read(stderr io.Reader) {
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	told := false
	for lines.Scan() {
		p.mu.Lock()
		p.log.Write(lines.Bytes())
		p.log.WriteByte('\n')
		p.mu.Unlock()
		var line struct {
			Msg       string
			Address   string
			Addresses []string
		}
		if json.Unmarshal(lines.Bytes(), &line) != nil {
			continue
		}
		if line.Msg == "serving operators" && !told {
			p.operators = line.Address
		}
		if line.Msg == "serving" && !told {
			told = true
			p.addresses = line.Addresses
			close(p.serving)
		}
	}
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// end ends the process with a signal and checks how it goes.
func (p *process) end(signal syscall.Signal) {
	p.t.Helper()
	p.ended.Do(func() {
		if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			p.t.Error(err)
		}
		select {
		case <-p.exited:
		case <-time.After(patience):
			p.t.Errorf("acproxy doesn't end on %v", signal)
			_ = p.cmd.Process.Kill()
			<-p.exited
		}
		if code := p.cmd.ProcessState.ExitCode(); signal == syscall.SIGTERM && code != 0 {
			p.t.Errorf("acproxy ended with %d after SIGTERM, want 0", code)
		}
		for _, bad := range []string{"DATA RACE", "panic: ", "http: panic serving"} {
			if strings.Contains(p.output(), bad) {
				p.t.Errorf("acproxy's log says %q", bad)
			}
		}
	})
}

// cleanup ends the process if the test hasn't, and shows its log if the test failed.
func (p *process) cleanup() {
	p.end(syscall.SIGTERM)
	if p.t.Failed() {
		log := p.output()
		p.t.Logf("the end of acproxy's log:\n%s", log[max(0, len(log)-8<<10):])
	}
}

// address returns host:port of the first listener with a scheme.
func (p *process) address(scheme string) string {
	for _, a := range p.addresses {
		if address, ok := strings.CutPrefix(a, scheme+"://"); ok {
			return address
		}
	}
	return ""
}

// plain returns the URL of the plain http listener, without a slash at the end.
func (s *scene) plain() string { return "http://" + s.server().address("http") }

// resolve is the nodes' DNS: image hosts lead to acproxy, addresses of this machine to themselves.
func (s *scene) resolve(hostport string) (string, bool) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return "", false
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return hostport, ip.IsLoopback()
	}
	if host != imageHost && !strings.HasSuffix(host, "."+imageHost) {
		return "", false
	}
	address := s.server().address(map[string]string{"443": "https", "80": "http"}[port])
	return address, address != ""
}

// newNode returns a node with connections of its own. What o leaves out is as for the scene's node.
func (s *scene) newNode(o node.Options) *node.Node {
	if o.CAs == nil {
		o.CAs = s.nodeCAs
	}
	if o.Resolve == nil {
		o.Resolve = s.resolve
	}
	n := node.New(o)
	s.t.Cleanup(n.Close)
	return n
}

// proxied returns a node that has acproxy as its proxy and knows no other way.
func (s *scene) proxied(o node.Options) *node.Node {
	s.t.Helper()
	o.Proxy = must(url.Parse(s.plain()))(s.t)
	if o.Resolve == nil {
		o.Resolve = func(hostport string) (string, bool) { return hostport, hostport == s.server().address("http") }
	}
	return s.newNode(o)
}

// client returns an HTTP/1.1 client that dials this machine only and follows no redirects.
func (s *scene) client() *http.Client {
	transport := &http.Transport{DialContext: dialLoopback, DisableCompression: true, MaxIdleConnsPerHost: 64}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// secureClient returns an HTTP/2 client for which the image hosts resolve to acproxy.
func (s *scene) secureClient() *http.Client {
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: s.nodeCAs}, ForceAttemptHTTP2: true, DisableCompression: true,
		DialContext: func(ctx context.Context, network, hostport string) (net.Conn, error) {
			address, _ := s.resolve(hostport)
			return dialLoopback(ctx, network, address)
		},
	}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// context returns one that ends before the test has waited for ever.
func (s *scene) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

// get asks for a URL with the scene's node.
func (s *scene) get(url string, header ...string) node.Answer {
	return s.do(http.MethodGet, url, header...)
}

// do asks with the scene's node. The header is names and values, in turn.
func (s *scene) do(method, url string, header ...string) node.Answer {
	h := make(http.Header)
	for i := 0; i+1 < len(header); i += 2 {
		h.Add(header[i], header[i+1])
	}
	return s.node.Do(s.context(), method, url, h, nil)
}

// An image is one that a scene's publisher publishes.
type image struct {
	name      string
	labels    map[string]string
	aci       []byte
	sum       string // SHA-256, in hex
	id        acproxy.ImageID
	published publisher.Published
}

// standard returns the labels that images have where nothing else is said.
func standard(version string) map[string]string {
	return map[string]string{"version": version, "os": "linux", "arch": "amd64"}
}

// publish publishes an image signed by the trusted key.
func (s *scene) publish(spec acitest.Spec) image {
	s.t.Helper()
	return s.publishAs(spec, s.key)
}

// publishAs publishes an image signed by a key, or, if that is nil, not signed at all.
func (s *scene) publishAs(spec acitest.Spec, key *trusttest.Key) image {
	s.t.Helper()
	if spec.Labels == nil {
		spec.Labels = standard("1.0.0")
	}
	im := publisher.Image{Name: spec.Name, Labels: spec.Labels, ACI: acitest.Must(s.t, spec)}
	if key != nil {
		im.Signature = s.sign(key, im.ACI, trusttest.SignOptions{})
	}
	return s.publishImage(im)
}

func (s *scene) sign(key *trusttest.Key, aci []byte, opts trusttest.SignOptions) []byte {
	s.t.Helper()
	return must(key.Sign(bytes.NewReader(aci), opts))(s.t)
}

// publishImage publishes bytes as they are.
func (s *scene) publishImage(im publisher.Image) image {
	s.t.Helper()
	sum := sha256.Sum256(im.ACI)
	out := image{name: im.Name, labels: im.Labels, aci: im.ACI, sum: hex.EncodeToString(sum[:]), published: must(s.publisher.Add(im))(s.t)}
	// What can't be read as an image has no ID.
	out.id, _ = acitest.ID(im.ACI)
	return out
}

// publishDated publishes a signed image with a time of last change.
func (s *scene) publishDated(spec acitest.Spec, modified time.Time) image {
	s.t.Helper()
	spec.Labels = standard("1.0.0")
	aci := acitest.Must(s.t, spec)
	return s.publishImage(publisher.Image{
		Name: spec.Name, Labels: spec.Labels, ACI: aci, Signature: s.sign(s.key, aci, trusttest.SignOptions{}), LastModified: modified,
	})
}

// app is a small image's Spec.
func app(name string) acitest.Spec {
	return acitest.Spec{Name: imageHost + "/" + name, Files: map[string]string{"hello.txt": "hello from " + name + "\n"}}
}

// large is the Spec of an image that is larger than what is held back of an arriving one.
func large(name string, size int64) acitest.Spec {
	return acitest.Spec{Name: imageHost + "/" + name, RootfsSize: size, Seed: uint64(size) + uint64(len(name))}
}

// direct returns an image's direct URL, with the extension "aci" or "aci.asc".
func (s *scene) direct(im image, ext string) string {
	return s.plain() + directPath(im.name, im.labels, ext)
}

func directPath(name string, labels map[string]string, ext string) string {
	var query []string
	for _, label := range slices.Sorted(maps.Keys(labels)) {
		query = append(query, label+"="+strings.ReplaceAll(url.QueryEscape(labels[label]), "+", "%20"))
	}
	return "/.acproxy/images/" + name + "." + ext + "?" + strings.Join(query, "&")
}

// blob is the pattern of an image's blob at the publisher.
func (im image) blob() string { return strings.TrimPrefix(im.published.URL, "https://") }

// signature is the pattern of its signature.
func (im image) signature() string { return im.blob() + ".asc" }

// hold has the server fetch an image, and checks what it gives.
func (s *scene) hold(im image) {
	s.t.Helper()
	wantImage(s.t, s.get(s.direct(im, "aci")), im)
	s.inspected(im)
}

// inspected waits until the server knows an image's ID, which it may find out after the last byte has left.
func (s *scene) inspected(im image) {
	s.t.Helper()
	eventually(s.t, "the image ID of "+im.name+" is known", func() bool {
		return s.do(http.MethodHead, s.direct(im, "aci")).Header.Get("X-Appc-Image-Id") == im.id.String()
	})
}

// cli runs a command of the binary with the scene's configuration and returns its exit code and output.
func (s *scene) cli(args ...string) (code int, output string) {
	s.t.Helper()
	return runCLI(s.t, append(args, "--config", s.config)...)
}

func runCLI(t testing.TB, args ...string) (code int, output string) {
	t.Helper()
	out, err := command(args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return code, string(out)
}

// eventually waits for something that nothing tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("it doesn't come about: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// within waits for a channel.
func within(t testing.TB, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("it takes too long: %s", what)
	}
}

// wantStatus checks the status of a whole answer.
func wantStatus(t testing.TB, a node.Answer, status int) bool {
	t.Helper()
	if a.Err != nil || a.Status != status {
		t.Errorf("%s %s = %s, want %d", a.Method, a.URL, described(a), status)
		return false
	}
	return true
}

func described(a node.Answer) string {
	s := fmt.Sprintf("%d, %d bytes", a.Status, a.Bytes)
	if a.Err != nil {
		s += fmt.Sprintf(", %v", a.Err)
	}
	if len(a.Body) > 0 && a.Status >= 400 {
		s += fmt.Sprintf("\n%.2000s", a.Body)
	}
	return s
}

// wantImage checks that an answer is exactly an image.
func wantImage(t testing.TB, a node.Answer, im image) {
	t.Helper()
	if wantStatus(t, a, http.StatusOK) && a.SHA256 != im.sum {
		t.Errorf("%s %s: %d other bytes than the %d published", a.Method, a.URL, a.Bytes, len(im.aci))
	}
	if coding, ok := a.Header["Content-Encoding"]; ok {
		t.Errorf("%s %s: Content-Encoding %q, want none: clients would decode it", a.Method, a.URL, coding)
	}
}

// wantProblem checks that an answer is an error of a kind, by the end of its type.
func wantProblem(t testing.TB, a node.Answer, status int, code string) {
	t.Helper()
	if !wantStatus(t, a, status) {
		return
	}
	if got := problemCode(a); got != code {
		t.Errorf("%s %s: problem %q, want %q\n%s", a.Method, a.URL, got, code, a.Body)
	}
	if got := a.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("%s %s: Content-Type %q, want application/problem+json", a.Method, a.URL, got)
	}
}

func problemCode(a node.Answer) string {
	var p struct{ Type string }
	if json.Unmarshal(a.Body, &p) != nil {
		return ""
	}
	_, code, _ := strings.Cut(p.Type, "urn:acproxy:problem:")
	return code
}

// wantHeader checks a field of an answer.
func wantHeader(t testing.TB, a node.Answer, name, value string) {
	t.Helper()
	if got := a.Header.Get(name); got != value {
		t.Errorf("%s %s: %s %q, want %q", a.Method, a.URL, name, got, value)
	}
}

const (
	miss   = "acproxy; fwd=uri-miss"
	joined = "acproxy; fwd=uri-miss; collapsed"
	hit    = "acproxy; hit"
)
