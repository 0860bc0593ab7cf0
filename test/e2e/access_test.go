package e2e

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/node"
)

// accessScene has open and secret images, alice with a password and ci with a token.
func accessScene(t *testing.T, listen string) (s *scene, token string) {
	t.Helper()
	s, token = accessStage(t, listen)
	s.start()
	return s, token
}

// accessStage is accessScene without starting the server. The file clients.pem has the certificate of an authority for clients, if there is one.
func accessStage(t *testing.T, listen string, authorities ...*x509.Certificate) (s *scene, token string) {
	t.Helper()
	s = stage(t, listen+`
access:
  users_file: $DIR/users
  rules:
    - {prefix: "", read: [anyone]}
    - {prefix: example.com/secret, read: [alice, ci, node1]}
    - {prefix: example.com/secret/most, read: [alice]}
`)
	hash := must(bcrypt.GenerateFromPassword([]byte("open sesame"), bcrypt.MinCost))(t)
	s.write("users", fmt.Appendf(nil, "alice:%s\nbob:%s\n", hash, hash))
	for _, ca := range authorities {
		s.write("clients.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}))
	}
	code, out := s.cli("token", "add", "ci", "--expires", "1h")
	if code != 0 {
		t.Fatalf("token add: %d, %s", code, out)
	}
	return s, strings.TrimSpace(out)
}

func withPassword(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// TestRulesOfAccess asks for everything that there is about an image, by every way, as everybody.
func TestRulesOfAccess(t *testing.T) {
	t.Parallel()
	s, token := accessScene(t, "")
	open, secret, most := s.publish(app("app")), s.publish(app("secret/app")), s.publish(app("secret/most/app"))
	alice, bob, ci := withPassword("alice", "open sesame"), withPassword("bob", "open sesame"), "Bearer "+token
	// Held or not, the rules are the same.
	for _, round := range []string{"not held", "held"} {
		for _, tt := range []struct {
			who, shown string
			may        map[string]bool
			status     int
			code       string
		}{
			{"nobody", "", map[string]bool{open.name: true}, http.StatusUnauthorized, "credentials-needed"},
			{"somebody unknown", withPassword("eve", "x"), map[string]bool{open.name: true}, http.StatusUnauthorized, "credentials-invalid"},
			{"a wrong password", withPassword("alice", "x"), map[string]bool{open.name: true}, http.StatusUnauthorized, "credentials-invalid"},
			{"bob", bob, map[string]bool{open.name: true}, http.StatusForbidden, "not-allowed"},
			{"ci", ci, map[string]bool{open.name: true, secret.name: true}, http.StatusForbidden, "not-allowed"},
			{"ci, with the token as password", withPassword("ci", token), map[string]bool{open.name: true, secret.name: true}, http.StatusForbidden, "not-allowed"},
			{"alice", alice, map[string]bool{open.name: true, secret.name: true, most.name: true}, 0, ""},
		} {
			for _, im := range []image{open, secret, most} {
				urls := []string{
					s.direct(im, "aci"), s.direct(im, "aci.asc"),
					"https://" + im.name + "?ac-discovery=1",
					s.plain() + "/.acproxy/mesos/" + im.name + "-1.0.0-linux-amd64.aci",
				}
				for _, url := range urls {
					var header []string
					if tt.shown != "" {
						header = []string{"Authorization", tt.shown}
					}
					a := s.get(url, header...)
					if !tt.may[im.name] {
						wantProblem(t, a, tt.status, tt.code)
						if got := a.Header.Values("Www-Authenticate"); tt.status == http.StatusUnauthorized && len(got) != 2 {
							t.Errorf("%s: %s asks for %q, want two ways to show who one is", tt.who, url, got)
						}
						continue
					}
					if !wantStatus(t, a, http.StatusOK) {
						t.Errorf("%s, %s", tt.who, round)
						continue
					}
					if private := strings.HasPrefix(a.Header.Get("Cache-Control"), "private"); private != (im.name != open.name) && !strings.Contains(url, "discovery") {
						t.Errorf("%s: %s has Cache-Control %q", tt.who, url, a.Header.Get("Cache-Control"))
					}
				}
			}
		}
	}
	eventually(t, "the image ID is known", func() bool {
		return s.do(http.MethodHead, s.direct(most, "aci"), "Authorization", alice).Header.Get("X-Appc-Image-Id") != ""
	})
	// What a URL of the publisher stands for, and what is held under which name, is as secret.
	wantProblem(t, s.get(secret.published.URL), http.StatusNotFound, "no-template-gives-this-url")
	wantImage(t, s.get(secret.published.URL, "Authorization", alice), secret)
	for _, name := range []string{most.name + "-tool", most.name + "-none"} {
		// The name that is likeliest if nothing is known.
		if a := s.get(s.plain() + "/.acproxy/mesos/" + name + "-1.0.0-linux-amd64.aci"); !strings.Contains(a.Detail(), name+" is not for everybody") {
			t.Errorf("which reading of a Mesos URL is held shows: %s", described(a))
		}
	}
	if got := s.get("https://"+secret.name+"?ac-discovery=1", "Authorization", alice).Header.Get("Cache-Control"); got != "private, no-cache" {
		t.Errorf("the discovery page of a secret image has Cache-Control %q", got)
	}
	byID := s.plain() + "/.acproxy/images/" + most.id.String() + ".aci"
	wantProblem(t, s.get(byID), http.StatusNotFound, "image-id-unknown")
	wantProblem(t, s.get(byID, "Authorization", ci), http.StatusNotFound, "image-id-unknown")
	wantImage(t, s.get(byID, "Authorization", alice), most)
	// The same questions again and again on one connection, which are answered without net/http.
	for range 3 {
		wantStatus(t, s.get(s.direct(open, "aci.asc")), http.StatusOK)
		wantProblem(t, s.get(s.direct(secret, "aci.asc")), http.StatusUnauthorized, "credentials-needed")
	}
	if log := s.server().output(); !strings.Contains(log, `"user":"alice"`) || strings.Contains(log, token) || strings.Contains(log, "open sesame") || strings.Contains(log, alice[len("Basic "):]) {
		t.Errorf("the log doesn't say who asked, or says too much:\n%s", log)
	}
	// The token ends, and with it what it was good for.
	id := strings.Split(token, "_")[1]
	if code, out := s.cli("token", "revoke", id); code != 0 {
		t.Fatal(out)
	}
	eventually(t, "the token counts no more", func() bool {
		return s.get(s.direct(secret, "aci"), "Authorization", ci).Status == http.StatusUnauthorized
	})
}

// TestNobodyWithoutCredentials: at an address without anonymous clients nobody else is answered.
func TestNobodyWithoutCredentials(t *testing.T) {
	t.Parallel()
	s, token := accessScene(t, "listen: [{address: '127.0.0.1:0', auth: [basic, bearer]}, {address: '127.0.0.1:0', tls: local-ca}]")
	im := s.publish(app("app"))
	for _, path := range []string{"/", "/.acproxy/ca.pem", "/nothing", directPath(im.name, im.labels, "aci")} {
		wantProblem(t, s.get(s.plain()+path), http.StatusUnauthorized, "credentials-needed")
	}
	wantStatus(t, s.get(s.plain()+"/.acproxy/healthz"), http.StatusOK)
	wantImage(t, s.get(s.direct(im, "aci"), "Authorization", "Bearer "+token), im)
	// Nor as a proxy, however the request is put.
	for _, request := range []string{
		"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
		"CONNECT /.acproxy/healthz HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
		"GET http://elsewhere.example.net/.acproxy/healthz HTTP/1.1\r\nHost: elsewhere.example.net\r\n\r\n",
		"GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\nAuthorization: Bearer " + token + "\r\n\r\n",
	} {
		conn := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(t)
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		wantProblem(t, readAnswer(http.MethodGet, request, bufio.NewReader(conn)), http.StatusProxyAuthRequired, "credentials-needed")
		_ = conn.Close()
	}
	// The other address is as open as ever.
	wantImage(t, s.get("https://"+imageHost+directPath(im.name, im.labels, "aci")), im)
}

// TestAccessThroughTheProxy: who asked for a connection asks within it, and is told apart from whom the publisher is to know.
func TestAccessThroughTheProxy(t *testing.T) {
	t.Parallel()
	s, token := accessScene(t, "")
	im := s.publish(app("secret/app"))
	target := "https://" + imageHost + directPath(im.name, im.labels, "aci")
	for _, tt := range []struct {
		name   string
		user   *url.Userinfo
		inner  []string
		status int
	}{
		{"nobody", nil, nil, http.StatusUnauthorized},
		{"to the proxy", url.UserPassword("ci", token), nil, http.StatusOK},
		{"to the host", nil, []string{"Authorization", "Bearer " + token}, http.StatusOK},
		{"to the proxy, and something to the host that it doesn't know", url.UserPassword("ci", token), []string{"Authorization", "Bearer for-the-publisher"}, http.StatusOK},
		{"a wrong one", url.UserPassword("ci", "x"), nil, http.StatusUnauthorized},
	} {
		proxy := must(url.Parse(s.plain()))(t)
		proxy.User = tt.user
		n := node.New(node.Options{CAs: s.nodeCAs, Proxy: proxy, Resolve: s.resolve})
		header := http.Header{}
		for i := 0; i+1 < len(tt.inner); i += 2 {
			header.Set(tt.inner[i], tt.inner[i+1])
		}
		if a := n.Get(s.context(), target, header, nil); a.Status != tt.status {
			t.Errorf("%s: %s, want %d", tt.name, described(a), tt.status)
		}
		n.Close()
	}
	// What was shown for a connection counts as long as it holds, and no longer.
	code, out := s.cli("token", "add", "ci")
	if code != 0 {
		t.Fatal(out)
	}
	brief := strings.TrimSpace(out)
	proxy := must(url.Parse(s.plain()))(t)
	proxy.User = url.UserPassword("ci", brief)
	n := node.New(node.Options{CAs: s.nodeCAs, Proxy: proxy, Resolve: s.resolve})
	defer n.Close()
	eventually(t, "the new token counts", func() bool { return n.Get(s.context(), target, nil, nil).Status == http.StatusOK })
	if code, out := s.cli("token", "revoke", strings.Split(brief, "_")[1]); code != 0 {
		t.Fatal(out)
	}
	eventually(t, "the connection is nobody's any more", func() bool { return n.Get(s.context(), target, nil, nil).Status == http.StatusUnauthorized })
	// A whole URL, in plain http: 407, and the proxy's own field.
	conn := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(t)
	defer conn.Close()
	ask := "GET http://" + imageHost + directPath(im.name, im.labels, "aci") + " HTTP/1.1\r\nHost: " + imageHost + "\r\n"
	if _, err := io.WriteString(conn, ask+"\r\n"); err != nil {
		t.Fatal(err)
	}
	from := bufio.NewReader(conn)
	a := readAnswer(http.MethodGet, im.name, from)
	wantProblem(t, a, http.StatusProxyAuthRequired, "credentials-needed")
	if a.Header.Get("Proxy-Authenticate") == "" || a.Header.Get("Www-Authenticate") != "" {
		t.Errorf("the answer asks by %v", a.Header)
	}
	if _, err := io.WriteString(conn, ask+"Proxy-Authorization: Bearer "+token+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if a := readAnswer(http.MethodGet, im.name, from); a.Status != http.StatusOK || !bytes.Equal(a.Body, im.aci) {
		t.Errorf("with credentials for the proxy: %s", described(a))
	}
}

// TestClientCertificates: TLS says who asks.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	ca, caKey := newAuthority(t)
	other, otherKey := newAuthority(t)
	s, _ := accessStage(t, "listen: [{address: '127.0.0.1:0'}, {address: '127.0.0.1:0', tls: local-ca, client_ca_file: $DIR/clients.pem}]", ca)
	s.start()
	im := s.publish(acitest.Spec{Name: imageHost + "/secret/app"})
	for _, tt := range []struct {
		name string
		cert *tls.Certificate
		want int
	}{
		{"none", nil, http.StatusUnauthorized},
		{"of a node that may", clientCertificate(t, "node1", ca, caKey), http.StatusOK},
		{"of a node that may not", clientCertificate(t, "node2", ca, caKey), http.StatusForbidden},
		{"by somebody else", clientCertificate(t, "node1", other, otherKey), 0},
	} {
		client := s.secureClient()
		transport := client.Transport.(*http.Transport).Clone()
		if tt.cert != nil {
			transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return tt.cert, nil }
		}
		client.Transport = transport
		resp, err := client.Get("https://" + imageHost + directPath(im.name, im.labels, "aci"))
		status := 0
		if err == nil {
			status = resp.StatusCode
			_ = resp.Body.Close()
		}
		transport.CloseIdleConnections()
		if status != tt.want {
			t.Errorf("a certificate %s: %d, %v; want %d", tt.name, status, err, tt.want)
		}
	}
}

func newAuthority(t *testing.T) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clients"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(t)
	return must(x509.ParseCertificate(der))(t), key
}

func clientCertificate(t *testing.T, name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) *tls.Certificate {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	return &tls.Certificate{Certificate: [][]byte{must(x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey))(t)}, PrivateKey: key}
}
