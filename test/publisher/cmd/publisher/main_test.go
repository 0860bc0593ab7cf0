package main

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPublishesADirectory(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	write(t, filepath.Join(dir, "a.aci"), acitest.Must(t, acitest.Spec{Name: "example.org/a", Labels: map[string]string{"version": "3.1"}}))
	write(t, filepath.Join(dir, "b.aci"), acitest.Must(t, acitest.Spec{Name: "example.org/b", Compression: acitest.XZ}))
	write(t, filepath.Join(dir, "b.aci.asc"), []byte("signature"))
	var out bytes.Buffer
	until := make(chan os.Signal, 1)
	until <- syscall.SIGTERM
	if err := publish(&out, "127.0.0.1:0", "127.0.0.1:0", dir, ca, nil, until); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"example.org/a", "3.1", "unsigned", "example.org/b", "storage.example.org", "https://example.org/a?ac-discovery=1", "/example.org/a/3.1/image.aci.asc"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output = %s\nwant %q in it", out.String(), want)
		}
	}
	if pem, err := os.ReadFile(ca); err != nil || !bytes.HasPrefix(pem, []byte("-----BEGIN CERTIFICATE-----")) {
		t.Errorf("%s = %q, %v; want the CA's certificate", ca, pem, err)
	}
}

func TestRunSaysWhatIsWrong(t *testing.T) {
	empty := t.TempDir()
	broken := t.TempDir()
	write(t, filepath.Join(broken, "x.aci"), []byte("not an image"))
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"help", []string{"-help"}, 0, "Usage: publisher"},
		{"an unknown flag", []string{"-nope"}, 2, "nope"},
		{"an argument", []string{"x"}, 2, "only flags"},
		{"a directory without images", []string{"-listen", "127.0.0.1:0", "-http", "127.0.0.1:0", "-dir", empty}, 1, "no *.aci"},
		{"a file that is no image", []string{"-listen", "127.0.0.1:0", "-http", "127.0.0.1:0", "-dir", broken}, 1, "x.aci"},
		{"a fault that is none", []string{"-fault", "* nonsense"}, 2, "truncate-after=N"},
		{"a fault of connections that is none", []string{"-tls-fault", "* truncate-after=1"}, 2, "none of the words"},
		{"an address that is none", []string{"-listen", "127.0.0.1:none"}, 1, "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if code := run(tt.args, &out, &errs); code != tt.code || !strings.Contains(errs.String(), tt.want) {
				t.Errorf("run = %d, %q; want %d and %q", code, errs.String(), tt.code, tt.want)
			}
		})
	}
}

func TestFaultsByHand(t *testing.T) {
	p, err := publisher.Start(publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.Serve("example.com/x", "text/plain", []byte("hello"))
	c := p.Client(false)
	defer c.CloseIdleConnections()
	for _, tt := range []struct {
		fault, method string
		status        int
	}{
		{"example.com/x status=503", "GET", 503},
		{" example.com/x   status=503 ", "HEAD", 503},
		{"GET example.com/* status=503", "GET", 503},
		{"GET example.com/* status=503", "HEAD", 200},
		{"HEAD * status=503", "GET", 200},
		{"example.com/y status=503", "GET", 200},
	} {
		put, err := parseFault(tt.fault)
		if err != nil {
			t.Fatal(err)
		}
		put(p)
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "https://example.com/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != tt.status {
			t.Errorf("with %q %s = %d, want %d", tt.fault, tt.method, resp.StatusCode, tt.status)
		}
		p.Behave()
	}
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
