package e2e

import (
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/publisher"
)

// wants has a host of the publisher refuse whoever doesn't show something.
func (s *scene) wants(host, shown string) {
	s.publisher.Misbehave(func(r *http.Request) bool {
		return r.URL.Host == host && r.Header.Get("Authorization") != shown
	}, publisher.Fault{Status: http.StatusUnauthorized})
}

// TestCredentialsOfPublishers fetches what publishers give only to who shows something, which nobody else gets to see.
func TestCredentialsOfPublishers(t *testing.T) {
	t.Parallel()
	s := stage(t, `
dial: {hosts: {elsewhere.example.com: $TLS}}
credentials:
  rkt_dirs: [$DIR/auth.d]
  hosts:
    - {host: storage.example.com, prefix: example.com/secret, type: bearer, secret_file: $DIR/storage-token}
`)
	s.write("storage-token", []byte("t0psecret\n"))
	if err := os.Mkdir(s.path("auth.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("auth.d/host.json", []byte(`{"rktKind": "auth", "rktVersion": "v1", "domains": ["example.com"], "type": "basic", "credentials": {"user": "node", "password": "hush-hush"}}`))
	s.start()
	const bearer = "Bearer t0psecret"
	basic := withPassword("node", "hush-hush")
	s.wants("example.com", basic)
	s.wants("storage.example.com", bearer)

	secret, other := s.publish(app("secret/app")), s.publish(app("other"))
	wantImage(t, s.get(s.direct(secret, "aci")), secret)
	// The same host, on behalf of another name.
	a := s.get(s.direct(other, "aci"))
	wantStatus(t, a, http.StatusBadGateway)

	// A redirect to somewhere else goes without.
	moved := s.publish(app("secret/moved"))
	s.publisher.Misbehave(publisher.URL(moved.blob()), publisher.Fault{RedirectTo: "https://elsewhere.example.com/moved.aci"})
	s.publisher.Serve("elsewhere.example.com/moved.aci", "application/octet-stream", moved.aci)
	wantImage(t, s.get(s.direct(moved, "aci")), moved)
	asked := 0
	for _, r := range s.publisher.Requests() {
		want := map[string]string{"example.com": basic, "storage.example.com": bearer}[r.Host]
		if r.Host == "storage.example.com" && strings.HasPrefix(r.Path, "/"+other.name) {
			want = ""
		}
		if got := r.Header.Get("Authorization"); got != want {
			t.Errorf("%s%s was shown %q, want %q", r.Host, r.Path, got, want)
		}
		if r.Host == "elsewhere.example.com" {
			asked++
		}
	}
	if asked == 0 {
		t.Error("nobody was asked elsewhere")
	}
	// A name whose page the server hasn't seen yet.
	unseen := s.publish(app("secret/unseen"))
	code, out := s.cli("discover", unseen.name+":1.0.0,os=linux,arch=amd64")
	if code != 0 || !strings.Contains(out, "with basic credentials") {
		t.Errorf("discover: %d, %s, which doesn't say that credentials were shown", code, out)
	}
	s.server().end(syscall.SIGTERM)
	for _, told := range []string{s.server().output(), out, string(a.Body)} {
		for _, secret := range []string{"t0psecret", "hush-hush", basic[len("Basic "):]} {
			if strings.Contains(told, secret) {
				t.Errorf("%s is told: %s", secret, told)
			}
		}
	}
}
