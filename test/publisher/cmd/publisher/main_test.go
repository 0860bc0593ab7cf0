package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy/internal/aci/acitest"
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
	if err := publish(&out, "127.0.0.1:0", "127.0.0.1:0", dir, ca, until); err != nil {
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

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
