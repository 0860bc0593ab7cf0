package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/publisher"
)

func TestConfigurationMistakes(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	for _, tt := range []struct{ name, config, says string }{
		{"an unknown key", "data_dir: /x\nlisen: []\n", "config.yaml:2:1: lisen: there is no such key; did you mean listen?"},
		{"a wrong type", "fetch:\n  hold_back: {}\n", "config.yaml:2:14: fetch.hold_back: "},
		{"an unknown word", "fetch:\n  delivery: sometimes\n", "config.yaml:2:13: fetch.delivery: "},
		{"not YAML", "listen: [\n", "config.yaml:"},
		{"certificate files without a key", "listen:\n  - address: 127.0.0.1:0\n    tls: files\n    cert_file: x.pem\n", "config.yaml:"},
		{"two mistakes", "a: 1\nb: 2\n", "config.yaml:2:1: b: there is no such key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.write("config.yaml", []byte(tt.config))
			code, out := s.cli("serve")
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if !strings.Contains(out, tt.says) {
				t.Errorf("it says\n%s\nwant %q in it", out, tt.says)
			}
			if strings.Contains(out, "serving") {
				t.Error("it served all the same")
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		code, out := runCLI(t, "serve", "--config", s.path("nothing.yaml"))
		if code != 1 || !strings.Contains(out, "nothing.yaml") {
			t.Errorf("exit code %d and %s", code, out)
		}
	})
	t.Run("tls: local-ca without a local CA", func(t *testing.T) {
		s.write("config.yaml", []byte("data_dir: "+s.path("empty")+"\nlisten: [{address: '127.0.0.1:0', tls: local-ca}]\n"))
		code, out := s.cli("serve")
		if code != 1 || !strings.Contains(out, "acproxy ca init") {
			t.Errorf("exit code %d and %s, want advice to make one", code, out)
		}
	})
}

func TestSecondServerOnTheSameData(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	code, out := s.cli("serve")
	if code != 1 || !strings.Contains(out, s.path("data")) {
		t.Errorf("exit code %d and\n%s\nwant 1 and a message that names the directory", code, out)
	}
	// The first one isn't disturbed, and its commands still reach it.
	wantImage(t, s.get(s.direct(im, "aci")), im)
	if code, out := s.cli("images"); code != 0 || !strings.Contains(out, "1 image") {
		t.Errorf("acproxy images = %d\n%s", code, out)
	}
}

func TestPortIsTaken(t *testing.T) {
	t.Parallel()
	taken := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer taken.Close()
	s := stage(t, fmt.Sprintf("listen: [{address: '127.0.0.1:0', tls: none}, {address: %q, tls: none}]", taken.Addr()))
	code, out := s.cli("serve")
	if code != 1 || !strings.Contains(out, taken.Addr().String()) || !strings.Contains(out, "in use") {
		t.Errorf("exit code %d and\n%s\nwant 1 and a message that names the address", code, out)
	}
	// What was opened before that was closed: the next start works.
	s.configure("")
	s.start()
}

func TestServesWithoutLocalCA(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	// All defaults but the port, which may be taken on this machine, and the format of the log, which this test reads.
	s.write("config.yaml", []byte("listen: [{address: '127.0.0.1:0', tls: none}]\nlog: {format: json}\n"))
	p := launch(t, "serve", "--config", s.config, "--data-dir", s.path("fresh"))
	t.Cleanup(p.cleanup)
	within(t, "it serves", p.serving)
	s.running.Store(p)
	wantStatus(t, s.get(s.plain()+"/.acproxy/healthz"), http.StatusOK)
	wantProblem(t, s.get(s.plain()+"/.acproxy/ca.pem"), http.StatusNotFound, "no-local-ca")
	conn, a := s.connect("example.com:443")
	if conn != nil {
		_ = conn.Close()
	}
	if a.Status != http.StatusForbidden {
		t.Errorf("CONNECT without a local CA: %s, want 403", described(a))
	}
}

func TestStopsWhileImagesArrive(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		kill bool
	}{{"SIGTERM", false}, {"kill -9", true}} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t, "")
			held, cut := s.publish(app("held")), s.publish(large("cut", 1<<20))
			s.hold(held)
			trouble := s.publisher.Misbehave(publisher.URL(cut.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
			ctx, cancel := context.WithCancel(s.context())
			defer cancel()
			resp := s.open(ctx, s.direct(cut, "aci"))
			defer resp.Body.Close()
			within(t, "the publisher stalls", trouble.Stalled())
			// What the publisher has sent has arrived, once all of it is here.
			if _, err := io.CopyN(io.Discard, resp.Body, stalled); err != nil {
				t.Fatal(err)
			}

			began := time.Now()
			if tt.kill {
				s.server().end(sigkill)
			} else {
				s.server().end(sigterm)
			}
			// A client that waits for the rest has ten seconds, and no more.
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v to end", took)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err == nil {
				t.Error("the body ended as if it were whole")
			}
			trouble.End()
			s.start()
			wantImage(t, s.get(s.direct(held, "aci")), held)
			// Nobody has to ask for the rest, and nothing is asked for twice.
			rest := func(r publisher.Request) bool {
				return r.At() == cut.blob() && r.Status == http.StatusPartialContent && r.Done && r.Bytes == int64(len(cut.aci))-stalled
			}
			if err := s.publisher.Wait(s.context(), 1, rest); err != nil {
				t.Errorf("waiting for the rest to be asked for: %v: %v", err, s.publisher.Requests())
			}
			wantImage(t, s.get(s.direct(cut, "aci")), cut)
			eventually(t, "no partial file is left", func() bool {
				return len(must(os.ReadDir(s.path("data", "store", "partial")))(t)) == 0
			})
		})
	}
}

func TestSecondSignalDoesNotWait(t *testing.T) {
	t.Parallel()
	s := newScene(t, "stop_grace: 1h")
	cut := s.publish(large("cut", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(cut.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	resp := s.open(s.context(), s.direct(cut, "aci"))
	defer resp.Body.Close()
	within(t, "the publisher stalls", trouble.Stalled())
	server := s.server()
	if err := server.cmd.Process.Signal(sigterm); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says that it stops", func() bool { return strings.Contains(server.output(), `"msg":"stopping"`) })
	server.end(sigint)
	trouble.End()
	s.start()
	wantImage(t, s.get(s.direct(cut, "aci")), cut)
}

func TestStopsWithIdleConnections(t *testing.T) {
	t.Parallel()
	s := newScene(t, "proxy: {tunnel: true}")
	im := s.publish(app("app"))
	s.fetchAsRkt(s.node, im)
	// A connection that was terminated and one that says nothing yet.
	conn, a := s.connect("example.com:443")
	if conn == nil {
		t.Fatal(described(a))
	}
	defer conn.Close()
	quiet := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(t)
	defer quiet.Close()
	began := time.Now()
	s.server().end(sigterm)
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %v to end", took)
	}
}

func TestImagesOfARunningServer(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	for _, running := range []bool{true, false} {
		if !running {
			s.server().end(sigterm)
		}
		code, out := s.cli("images")
		for _, text := range []string{im.name + ":1.0.0", im.id.Short(), "Test Publisher", "1 image"} {
			if code != 0 || !strings.Contains(out, text) {
				t.Errorf("with a running server %v: acproxy images = %d, without %q:\n%s", running, code, text, out)
			}
		}
		code, out = s.cli("images", "show", im.id.String()[:len("sha512-")+12])
		for _, text := range []string{im.name, im.id.String(), "sha256:" + im.sum, im.published.URL, s.key.Fingerprint()} {
			if code != 0 || !strings.Contains(out, text) {
				t.Errorf("with a running server %v: acproxy images show = %d, without %q:\n%s", running, code, text, out)
			}
		}
	}
}
