package credentials

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

const (
	basicFile  = `{"rktKind": "auth", "rktVersion": "v1", "domains": ["coreos.com", "tectonic.com:8443"], "type": "basic", "credentials": {"user": "foo", "password": "b:ar"}}`
	oauthFile  = `{"rktKind": "auth", "rktVersion": "v1", "domains": ["Oauth.example.com:443"], "type": "oauth", "credentials": {"token": "sometoken"}}`
	awsFile    = `{"rktKind": "auth", "rktVersion": "v1", "domains": ["my-bucket.s3-eu-west-1.amazonaws.com"], "type": "aws", "credentials": {"accessKeyID": "AKIA", "secretAccessKey": "key"}}`
	dockerFile = `{"rktKind": "dockerAuth", "rktVersion": "v1", "registries": ["quay.io"], "credentials": {"user": "foo", "password": "bar"}}`
)

// rktDir makes a directory with files of credentials.
func rktDir(t testing.TB, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i, content := range files {
		write(t, filepath.Join(dir, fmt.Sprintf("%d.json", i)), content)
	}
	write(t, filepath.Join(dir, "README"), "not JSON")
	return dir
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func openDir(t testing.TB, path string) *Dir {
	t.Helper()
	d, err := OpenDir(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func given(host, prefix, secret string) Credential {
	return Credential{Host: host, Prefix: prefix, Type: Bearer, Secret: func() (Secret, error) { return Secret(secret), nil }}
}

func TestAuthorize(t *testing.T) {
	s := New([]Credential{
		given("storage.example.com", "", "everybody"), given("storage.example.com", "example.com/secret", "secret"), given("storage.example.com", "example.com/secret/most", "most"),
		given("coreos.com", "example.com", "given"),
	}, []*Dir{openDir(t, rktDir(t, basicFile, oauthFile, awsFile, dockerFile)), openDir(t, rktDir(t, strings.ReplaceAll(basicFile, "foo", "later")[:])), openDir(t, "/nowhere")})
	const later = "Basic bGF0ZXI6Yjphcg==" // later:b:ar
	for _, tt := range []struct{ what, name, url, want string }{
		{"for every name", "example.org/app", "https://storage.example.com/x", "Bearer everybody"},
		{"for a prefix", "example.com/secret/app", "https://storage.example.com/x", "Bearer secret"},
		{"by whole segments", "example.com/secretary", "https://storage.example.com/x", "Bearer everybody"},
		{"the longest one", "example.com/secret/most/app", "https://storage.example.com:443/x", "Bearer most"},
		{"in another case", "example.org/app", "https://Storage.Example.com/x", "Bearer everybody"},
		{"plain http", "example.org/app", "http://storage.example.com/x", ""},
		{"the port of https, in plain http", "example.org/app", "http://storage.example.com:443/x", ""},
		{"another port", "example.org/app", "https://storage.example.com:8443/x", ""},
		{"a host below", "example.org/app", "https://a.storage.example.com/x", ""},
		{"a host above", "example.org/app", "https://example.com/x", ""},
		{"a host that ends in it", "example.org/app", "https://evilstorage.example.com/x", ""},
		{"rkt's, the later directory", "example.org/app", "https://coreos.com/x", later},
		{"rkt's, with a port", "example.org/app", "https://tectonic.com:8443/x", later},
		{"rkt's, without it", "example.org/app", "https://tectonic.com/x", ""},
		{"given goes before rkt's", "example.com/app", "https://coreos.com/x", "Bearer given"},
		{"rkt's token", "example.org/app", "https://oauth.example.com/x", "Bearer sometoken"},
		{"another kind of rkt's", "example.org/app", "https://quay.io/x", ""},
	} {
		r := httptest.NewRequest(http.MethodGet, tt.url, nil)
		what, err := s.Authorize(tt.name, r)
		if got := r.Header.Get("Authorization"); got != tt.want || err != nil || (what != "") != (tt.want != "") {
			t.Errorf("%s: Authorize(%s, %s) = %q, %v, and shows %q, want %q", tt.what, tt.name, tt.url, what, err, got, tt.want)
		}
		for _, secret := range []string{"everybody", "most", "b:ar", "sometoken", "given"} {
			if strings.Contains(what, secret) {
				t.Errorf("%s: it tells the secret: %s", tt.what, what)
			}
		}
	}
}

// TestAWS holds a signature against one that was made with what AWS documents, by hand: the derivation of the key and the canonical request.
func TestAWS(t *testing.T) {
	s := New(nil, []*Dir{openDir(t, rktDir(t, awsFile))})
	s.now = func() time.Time { return time.Date(2026, 11, 28, 12, 0, 0, 0, time.FixedZone("", 3600)) }
	r := httptest.NewRequest(http.MethodGet, "https://my-bucket.s3-eu-west-1.amazonaws.com/a%20b/app.aci?versionId=1", nil)
	r.Header.Set("Range", "bytes=0-1")
	r.Header.Set("Via", "1.1 acproxy")
	if _, err := s.Authorize("example.com/app", r); err != nil {
		t.Fatal(err)
	}
	got := r.Header.Get("Authorization")
	const want = "AWS4-HMAC-SHA256 Credential=AKIA/20261128/eu-west-1/s3/aws4_request, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature="
	canonical := strings.Join([]string{
		"GET", "/a%20b/app.aci", "versionId=1", "host:my-bucket.s3-eu-west-1.amazonaws.com", "x-amz-content-sha256:" + emptyPayload, "x-amz-date:20261128T110000Z", "",
		"host;x-amz-content-sha256;x-amz-date", emptyPayload,
	}, "\n")
	toSign := "AWS4-HMAC-SHA256\n20261128T110000Z\n20261128/eu-west-1/s3/aws4_request\n" + hexSHA256(canonical)
	key := []byte("AWS4key")
	for _, part := range []string{"20261128", "eu-west-1", "s3", "aws4_request"} {
		key = hmacSHA256(key, part)
	}
	if got != want+fmt.Sprintf("%x", hmacSHA256(key, toSign)) {
		t.Errorf("Authorization is\n%s, want\n%s%x", got, want, hmacSHA256(key, toSign))
	}
	if r.Header.Get("X-Amz-Date") != "20261128T110000Z" || r.Header.Get("Range") != "bytes=0-1" {
		t.Errorf("the header is %v", r.Header)
	}
}

func TestRegionOf(t *testing.T) {
	for host, want := range map[string]string{
		"s3.amazonaws.com":                            "us-east-1",
		"bucket.s3.amazonaws.com":                     "us-east-1",
		"s3-external-1.amazonaws.com":                 "us-east-1",
		"s3-eu-west-1.amazonaws.com":                  "eu-west-1",
		"a.bucket.s3-eu-west-1.amazonaws.com":         "eu-west-1",
		"bucket.s3.eu-central-1.amazonaws.com":        "eu-central-1",
		"bucket.s3.dualstack.us-west-2.amazonaws.com": "us-west-2",
		"bucket.s3.cn-north-1.amazonaws.com.cn":       "cn-north-1",
		"bucket.s3.eu-central-1.amazonaws.com:443":    "eu-central-1",
		"minio.internal:9000":                         "us-east-1",
		"amazonaws.com":                               "us-east-1",
	} {
		if got := regionOf(host); got != want {
			t.Errorf("regionOf(%s) = %s, want %s", host, got, want)
		}
	}
}

func TestRktFilesThatAreWrong(t *testing.T) {
	for content, want := range map[string]string{
		`{`:  "it is not JSON",
		`[]`: "it is not JSON as rkt has it",
		`{"rktKind": "auth", "rktVersion": "v2"}`:                                                      "rktVersion is \"v2\"",
		strings.Replace(basicFile, `"basic"`, `"digest"`, 1):                                           `"digest" is not basic, oauth or aws`,
		strings.Replace(basicFile, `"b:ar"`, `""`, 1):                                                  "user and password",
		strings.Replace(oauthFile, `"sometoken"`, `""`, 1):                                             "have a token",
		strings.Replace(awsFile, `"key"`, `""`, 1):                                                     "accessKeyID and secretAccessKey",
		strings.Replace(oauthFile, `"Oauth.example.com:443"`, ``, 1):                                   "no domains",
		strings.Replace(oauthFile, `Oauth.example.com:443`, `a/b`, 1):                                  "is not a host",
		strings.Replace(basicFile, `tectonic.com:8443`, `coreos.com`, 1):                               "there twice",
		`{"rktKind": "auth", "rktVersion": "v1", "credentials": {"password": 5, "user": "topsecret"}}`: "it is not JSON as rkt has it",
	} {
		_, err := OpenDir(rktDir(t, content), nil)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "0.json: ") || !errors.Is(err, acproxy.ErrInvalid) || strings.Contains(err.Error(), "topsecret") {
			t.Errorf("%s: %v, want an ErrInvalid about %q", content, err, want)
		}
	}
	if _, err := OpenDir(rktDir(t, basicFile, basicFile), nil); err == nil || !strings.Contains(err.Error(), "in this directory already") {
		t.Errorf("one host in two files: %v", err)
	}
}

// TestSecretsThatChange reads a file again when it is another one, and keeps what it said when it can't be read.
func TestSecretsThatChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if _, err := FromFile(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	for _, bad := range []string{"", "\n", "two\nlines"} {
		write(t, path, bad)
		if _, err := FromFile(path); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	write(t, path, "one\r\n")
	secret, err := FromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := func(want Secret) {
		t.Helper()
		if got, err := secret(); got != want || err != nil {
			t.Errorf("the secret is %q, %v; want %q", string(got), err, string(want))
		}
	}
	want("one")
	write(t, path+".new", "another")
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	want("another")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	want("another")
	if got := fmt.Sprintf("%v %+v %#v %s", Secret("x1"), Credential{User: "u"}, struct{ S Secret }{"x2"}, Secret("x3")); strings.Contains(got, "x1") || strings.Contains(got, "x2") || strings.Contains(got, "x3") {
		t.Errorf("a secret prints: %s", got)
	}
	t.Setenv("ACPROXY_TEST_SECRET", "")
	if _, err := FromEnvironment("ACPROXY_TEST_SECRET"); err == nil {
		t.Error("an empty variable is a secret")
	}
	t.Setenv("ACPROXY_TEST_SECRET", "x")
	if secret, err = FromEnvironment("ACPROXY_TEST_SECRET"); err != nil {
		t.Fatal(err)
	}
	want("x")
}

func FuzzRkt(f *testing.F) {
	for _, seed := range []string{basicFile, oauthFile, awsFile, dockerFile} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		all, err := parseRkt(content)
		if err != nil && !errors.Is(err, acproxy.ErrInvalid) {
			t.Fatalf("parseRkt = %v, want an ErrInvalid", err)
		}
		for _, c := range all {
			if secret, err := c.Secret(); c.Host == "" || secret == "" || err != nil || c.Type == "" {
				t.Errorf("parseRkt gives %+v", c)
			}
		}
	})
}
