package e2e

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/testtools"
)

// unixClient returns a client whose every connection is one to a unix socket.
func unixClient(t testing.TB, path string) *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// fetched returns the body of an answer, which has to be a 200.
func fetched(t testing.TB, client *http.Client, url string) []byte {
	t.Helper()
	resp := must(client.Get(url))(t)
	defer resp.Body.Close()
	body := must(io.ReadAll(resp.Body))(t)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s\n%.500s", url, resp.Status, body)
	}
	return body
}

func TestUnixSockets(t *testing.T) {
	t.Parallel()
	s := stage(t, `
listen:
  - {address: "127.0.0.1:0"}
  - {address: "unix:nodes.sock", mode: "0666"}
admin:
  listen: [{address: "unix:$DIR/operators.sock"}]
  metrics: "unix:$DIR/metrics.sock"
log: {access_flush: 0s}
`)
	im := s.publish(app("app"))
	s.start()
	for name, mode := range map[string]fs.FileMode{"nodes.sock": 0o666, "operators.sock": 0o660, "metrics.sock": 0o660, "data/admin.sock": 0o600} {
		if st := must(os.Lstat(s.path(name)))(t); st.Mode() != fs.ModeSocket|mode {
			t.Errorf("%s has mode %v, want %v", name, st.Mode(), mode)
		}
	}
	client := unixClient(t, s.path("nodes.sock"))
	const page = "http://example.com/app?ac-discovery=1"
	if body := fetched(t, client, page); !strings.Contains(string(body), "ac-discovery") {
		t.Errorf("the page is\n%s", body)
	}
	for range 3 {
		if body := fetched(t, client, "http://acproxy"+directPath(im.name, im.labels, "aci")); string(body) != string(im.aci) {
			t.Error("the image is another one")
		}
	}
	if want := fmt.Sprintf(`"client":"unix/uid=%d,pid=%d"`, os.Getuid(), os.Getpid()); !strings.Contains(s.server().output(), want) {
		t.Errorf("the access log has no %s", want)
	}
	if body := fetched(t, unixClient(t, s.path("operators.sock")), "http://localhost/api/v1/images"); !strings.Contains(string(body), im.name) {
		t.Errorf("the API says %s", body)
	}
	if body := fetched(t, unixClient(t, s.path("metrics.sock")), "http://localhost/metrics"); !strings.Contains(string(body), "acproxy_") {
		t.Errorf("the metrics are %s", body)
	}
	addresses := strings.Join(s.server().addresses, " ")
	if !strings.Contains(addresses, "unix:"+s.path("nodes.sock")) {
		t.Errorf("the log says that it serves %s", addresses)
	}

	// A killed server leaves its sockets behind, and the next one takes their places. A stopped one removes them.
	s.restart(syscall.SIGKILL)
	fetched(t, unixClient(t, s.path("nodes.sock")), page)
	s.server().end(syscall.SIGTERM)
	for _, name := range []string{"nodes.sock", "operators.sock", "metrics.sock", "data/admin.sock"} {
		if _, err := os.Lstat(s.path(name)); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
}

func TestUnixSocketOfALivingServer(t *testing.T) {
	t.Parallel()
	first := newScene(t, `listen: [{address: "127.0.0.1:0"}, {address: "unix:$DIR/nodes.sock"}]`)
	second := stage(t, `listen: [{address: "127.0.0.1:0"}, {address: "unix:`+first.path("nodes.sock")+`"}]`)
	code, out := second.cli("serve")
	if code != 1 || !strings.Contains(out, "another server answers on "+first.path("nodes.sock")) {
		t.Errorf("exit code %d and\n%s", code, out)
	}
	fetched(t, unixClient(t, first.path("nodes.sock")), "http://acproxy/.acproxy/healthz")
}

// TestUnixSocketLimits: connections to a unix socket count.
func TestUnixSocketLimits(t *testing.T) {
	t.Parallel()
	s := newScene(t, `{listen: [{address: "127.0.0.1:0"}, {address: "unix:$DIR/nodes.sock"}], clients: {max_connections: 1, max_connections_per_client: 1}}`)
	path := s.path("nodes.sock")
	first := must(net.Dial("unix", path))(t)
	ask := func(conn net.Conn) error {
		if _, err := io.WriteString(conn, "GET /.acproxy/healthz HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 1))
		return err
	}
	if err := ask(first); err != nil {
		t.Fatal(err)
	}
	second := must(net.Dial("unix", path))(t)
	defer second.Close()
	if err := ask(second); err == nil {
		t.Error("a second connection was answered beside the first")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Read(make([]byte, 1)); err != nil {
		t.Errorf("after the first had gone: %v", err)
	}
}

// activated is a listener that is handed over as systemd does it.
type activated struct {
	name     string
	listener net.Listener
}

// activate has the next start of the scene's server get sockets, by the protocol of sd_listen_fds(3): the process that is named has them from descriptor 3 on.
func activate(t testing.TB, config string, sockets ...activated) *process {
	t.Helper()
	var names []string
	// A shell, because the process has to know its own ID beforehand.
	cmd := command("serve", "--config", config)
	cmd.Path = must(exec.LookPath("sh"))(t)
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, binary}, cmd.Args[1:]...)
	for _, s := range sockets {
		file := must(s.listener.(interface{ File() (*os.File, error) }).File())(t)
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
		names = append(names, s.name)
	}
	cmd.Env = append(cmd.Env, "LISTEN_FDS="+strconv.Itoa(len(sockets)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return launchCommand(t, cmd)
}

func (p *process) wait() {
	p.t.Helper()
	select {
	case <-p.serving:
	case <-p.exited:
		p.t.Fatalf("acproxy ended instead of serving: %v\n%s", p.cmd.ProcessState, p.output())
	case <-time.After(patience):
		p.t.Fatalf("acproxy doesn't serve:\n%s", p.output())
	}
}

func TestSocketActivation(t *testing.T) {
	t.Parallel()
	s := stage(t, `
listen: [{address: "systemd:http"}, {address: "systemd:https", tls: local-ca}, {address: "systemd:nodes"}]
admin: {listen: [{address: "systemd:operators"}], metrics: "systemd:metrics"}
`)
	im := s.publish(app("app"))
	tcp := func() net.Listener {
		l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	plain, second, secure, operators, metrics := tcp(), tcp(), tcp(), tcp(), tcp()
	nodes := must(net.Listen("unix", s.path("nodes.sock")))(t)
	t.Cleanup(func() { _ = nodes.Close() })
	sockets := []activated{{"http", plain}, {"https", secure}, {"http", second}, {"nodes", nodes}, {"operators", operators}, {"metrics", metrics}}

	// Somebody connects before there is a server, and is answered once there is.
	early := make(chan error, 1)
	go func() {
		resp, err := (&http.Client{Timeout: patience}).Get("http://" + plain.Addr().String() + "/.acproxy/healthz")
		if err == nil {
			err = resp.Body.Close()
		}
		early <- err
	}()
	for start := range 2 {
		p := activate(t, s.config, sockets...)
		s.running.Store(p)
		t.Cleanup(p.cleanup)
		p.wait()
		if start == 0 {
			if err := <-early; err != nil {
				t.Errorf("who connected before the start: %v", err)
			}
		}
		for _, at := range []net.Listener{plain, second} {
			wantImage(t, s.get("http://"+at.Addr().String()+directPath(im.name, im.labels, "aci")), im)
		}
		if p.address("https") != secure.Addr().String() {
			t.Errorf("https is at %s, want %s", p.address("https"), secure.Addr())
		}
		fetched(t, s.secureClient(), "https://example.com/app?ac-discovery=1")
		fetched(t, unixClient(t, s.path("nodes.sock")), "http://acproxy/.acproxy/healthz")
		fetched(t, s.client(), "http://"+operators.Addr().String()+"/api/v1/about")
		fetched(t, s.client(), "http://"+metrics.Addr().String()+"/metrics")
		// The sockets outlive it.
		p.end(syscall.SIGTERM)
	}
	if _, err := os.Lstat(s.path("nodes.sock")); err != nil {
		t.Errorf("the socket that isn't acproxy's is gone: %v", err)
	}
}

func TestSocketActivationMistakes(t *testing.T) {
	t.Parallel()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = l.Close() })
	for _, tt := range []struct {
		name, config string
		sockets      []activated
		says         string
	}{
		{"no sockets", `listen: [{address: "systemd:http"}]`, nil, "systemd has handed over no sockets"},
		{"another name", `listen: [{address: "systemd:https"}]`, []activated{{"http", l}}, `no socket named "https", but "http"`},
		{"one that nobody serves", `listen: [{address: "systemd:http"}]`, []activated{{"http", l}, {"operators", l}}, "write address: systemd:operators"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := stage(t, tt.config)
			p := activate(t, s.config, tt.sockets...)
			within(t, "acproxy ends", p.exited)
			if code := p.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(p.output(), tt.says) {
				t.Errorf("exit code %d and\n%s\nwant %s", code, p.output(), tt.says)
			}
		})
	}
}

// TestSystemdSocketActivate has systemd's own program hand the socket over.
func TestSystemdSocketActivate(t *testing.T) {
	t.Parallel()
	testtools.Need(t, "systemd-socket-activate")
	s := stage(t, `listen: [{address: "systemd:http"}]`)
	im := s.publish(app("app"))
	free := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	address := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := command("serve", "--config", s.config)
	program := must(exec.LookPath("systemd-socket-activate"))(t)
	env := []string{"-E", "SSL_CERT_FILE=/dev/null", "-E", "SSL_CERT_DIR=/dev/null"}
	cmd.Path, cmd.Args = program, append(append([]string{filepath.Base(program), "--listen", address, "--fdname", "http"}, env...), cmd.Args...)
	p := launchCommand(t, cmd)
	s.running.Store(p)
	t.Cleanup(p.cleanup)
	// The first connection starts it.
	eventually(t, "systemd-socket-activate listens", func() bool {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return false
		}
		_ = conn.Close()
		return true
	})
	p.wait()
	wantImage(t, s.get("http://"+address+directPath(im.name, im.labels, "aci")), im)
}
