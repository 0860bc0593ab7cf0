package publisher_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/appc/spec/discovery"
	"go.uber.org/goleak"

	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const imageURL = "https://storage.example.com/example.com/app/1.0.0/linux/amd64/image.aci"

var blob = bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // 128 KiB

func labels(version string) map[string]string {
	return map[string]string{"version": version, "os": "linux", "arch": "amd64"}
}

// start starts a publisher with one image.
func start(t *testing.T) *publisher.Publisher {
	t.Helper()
	p, err := publisher.Start(publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	published, err := p.Add(publisher.Image{Name: "example.com/app", Labels: labels("1.0.0"), ACI: blob, Signature: []byte("signature")})
	if err != nil {
		t.Fatal(err)
	}
	if published.URL != imageURL || published.SignatureURL != imageURL+".asc" {
		t.Fatalf("Add = %+v, want it at %s", published, imageURL)
	}
	return p
}

type answer struct {
	*http.Response
	body []byte
	err  error // of reading the body
}

// get asks for a URL, with header fields as name, value, name, value. The error is that of an answer without a header.
func get(t *testing.T, c *http.Client, method, url string, fields ...string) (answer, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		r.Header.Set(fields[i], fields[i+1])
	}
	resp, err := c.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return answer{resp, body, err}, nil
}

// client returns a client of the publisher whose connections end with the test.
func client(t *testing.T, p *publisher.Publisher, h2 bool) *http.Client {
	c := p.Client(h2)
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// protocols runs a test over HTTP/1.1 and HTTP/2.
func protocols(t *testing.T, test func(t *testing.T, p *publisher.Publisher, c *http.Client)) {
	for name, h2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(name, func(t *testing.T) {
			p := start(t)
			c := client(t, p, h2)
			test(t, p, c)
			for _, r := range p.Requests() {
				if r.Proto != name {
					t.Errorf("asked over %s, want %s", r.Proto, name)
				}
			}
		})
	}
}

func TestServesAsItShould(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		whole, err := get(t, c, "GET", imageURL)
		if err != nil || whole.StatusCode != 200 || !bytes.Equal(whole.body, blob) || whole.ContentLength != int64(len(blob)) {
			t.Fatalf("GET = %v, %v; want the blob", whole.Response, err)
		}
		etag, modified := whole.Header.Get("ETag"), whole.Header.Get("Last-Modified")
		if len(etag) != 34 || modified != "Thu, 30 Jun 2016 12:00:00 GMT" || whole.Header.Get("Accept-Ranges") != "bytes" {
			t.Errorf("header = %v, want a strong ETag and Last-Modified", whole.Header)
		}
		for _, tt := range []struct {
			name   string
			url    string
			fields []string
			status int
			body   string
		}{
			{"signature", imageURL + ".asc", nil, 200, "signature"},
			{"latest", strings.Replace(imageURL, "1.0.0", "latest", 1), nil, 200, string(blob)},
			{"range", imageURL, []string{"Range", "bytes=131070-"}, 206, "ef"},
			{"range if unchanged", imageURL, []string{"Range", "bytes=0-1", "If-Range", etag}, 206, "01"},
			{"range if changed", imageURL, []string{"Range", "bytes=0-1", "If-Range", `"other"`}, 200, string(blob)},
			{"range past the end", imageURL, []string{"Range", "bytes=131072-"}, 416, ""},
			{"not modified", imageURL, []string{"If-None-Match", etag}, 304, ""},
			{"another version", strings.Replace(imageURL, "1.0.0", "2.0.0", 1), nil, 404, "There is nothing here.\n"},
			{"another host", strings.Replace(imageURL, "storage.", "", 1), nil, 404, "There is nothing here.\n"},
			{"plain http", strings.Replace(imageURL, "https", "http", 1), []string{"Range", "bytes=0-1"}, 206, "01"},
		} {
			if tt.name == "plain http" && whole.ProtoMajor == 2 {
				continue
			}
			a, err := get(t, c, "GET", tt.url, tt.fields...)
			if err != nil || a.err != nil || a.StatusCode != tt.status || tt.status != 416 && string(a.body) != tt.body {
				t.Errorf("%s: %v, %v, %d bytes; want %d with %d bytes", tt.name, a.Response, err, len(a.body), tt.status, len(tt.body))
			}
		}
		if a, err := get(t, c, "HEAD", imageURL); err != nil || a.ContentLength != int64(len(blob)) || len(a.body) != 0 {
			t.Errorf("HEAD = %v, %v", a.Response, err)
		}
		if a, err := get(t, c, "POST", imageURL); err != nil || a.StatusCode != 405 {
			t.Errorf("POST = %v, %v; want 405", a.Response, err)
		}
	})
}

func TestLatestIsTheNewestUnlessSet(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	if _, err := p.Add(publisher.Image{Name: "example.com/app", Labels: labels("2.0.0"), ACI: []byte("two")}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Add(publisher.Image{Name: "example.com/app", Labels: map[string]string{"version": "3.0.0"}, ACI: []byte("noarch")}); err != nil {
		t.Fatal(err)
	}
	latest := strings.Replace(imageURL, "1.0.0", "latest", 1)
	for _, tt := range []struct{ set, url, want string }{
		{"", latest, "two"},
		{"", latest + ".asc", "There is nothing here.\n"},
		{"", "https://storage.example.com/example.com/app/latest/image.aci", "noarch"},
		{"1.0.0", latest, string(blob)},
		{"1.0.0", latest + ".asc", "signature"},
	} {
		if tt.set != "" {
			p.SetLatest("example.com/app", tt.set)
		}
		if a, err := get(t, c, "GET", tt.url); err != nil || string(a.body) != tt.want {
			t.Errorf("latest set to %q: GET %s = %.20q, %v; want %.20q", tt.set, tt.url, a.body, err, tt.want)
		}
	}
}

func TestServesAFile(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	name := filepath.Join(t.TempDir(), "image.aci")
	if err := os.WriteFile(name, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := trusttest.NewKey(trusttest.Options{Algorithm: trusttest.Ed25519})
	if err != nil {
		t.Fatal(err)
	}
	at, err := p.AddSigned(publisher.Image{Name: "example.com/file", Labels: labels("1.0.0"), File: name}, key)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := get(t, c, "GET", at.URL, "Range", "bytes=2-"); err != nil || !bytes.Equal(a.body, blob[2:]) {
		t.Errorf("GET = %v, %v; want the file", a.Response, err)
	}
	if a, err := get(t, c, "GET", at.SignatureURL); err != nil || !bytes.Contains(a.body, []byte("BEGIN PGP SIGNATURE")) {
		t.Errorf("GET of the signature = %.60q, %v", a.body, err)
	}
	p.Misbehave(publisher.URL("*"), publisher.Fault{FlipBitAt: publisher.At(100_000)})
	if a, err := get(t, c, "GET", at.URL); err != nil || a.body[100_000] != blob[100_000]^1 {
		t.Errorf("GET = %v, %v; want a bit of the file flipped", a.Response, err)
	}
	if _, err := p.Add(publisher.Image{Name: "example.com/none", File: name + ".none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Add of a file that isn't there = %v", err)
	}
	if _, err := p.Add(publisher.Image{Name: "Not a name"}); err == nil {
		t.Error("Add of a bad name = nil")
	}
}

// What it publishes is found by the reference client.
func TestDiscovery(t *testing.T) {
	p := start(t)
	if _, err := p.Add(publisher.Image{Name: "example.com/app", Labels: map[string]string{"version": "1.0.0"}, ACI: []byte("noarch")}); err != nil {
		t.Fatal(err)
	}
	p.AddKey("example.com", []byte("a key"))
	p.AddKey("example.com/app", []byte("another"))
	p.AddKey("example.com/apple", []byte("a neighbour's"))
	c := client(t, p, false)
	page, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1")
	if err != nil || page.StatusCode != 200 {
		t.Fatalf("GET = %v, %v", page.Response, err)
	}
	for _, want := range []string{
		`<meta name="ac-discovery" content="example.com/app https://storage.example.com/{name}/{version}/{os}/{arch}/image.{ext}">`,
		`<meta name="ac-discovery" content="example.com/app https://storage.example.com/{name}/{version}/image.{ext}">`,
		`<meta name="ac-discovery-pubkeys" content="example.com https://storage.example.com/keys/1.gpg">`,
		`<meta name="ac-discovery-pubkeys" content="example.com/app https://storage.example.com/keys/2.gpg">`,
	} {
		if !bytes.Contains(page.body, []byte(want)) {
			t.Errorf("page = %s\nwant %s in it", page.body, want)
		}
	}
	if bytes.Contains(page.body, []byte("keys/3.gpg")) || bytes.Index(page.body, []byte("{os}")) > bytes.Index(page.body, []byte("{version}/image")) {
		t.Errorf("page = %s\nwant no neighbour's key, and the template with the most variables first", page.body)
	}
	for url, status := range map[string]int{
		"https://example.com/app":                          404, // without the query it is no discovery
		"https://example.com/?ac-discovery=1":              200, // only keys
		"https://example.com/app/below?ac-discovery=1":     404,
		"https://other.example/app?ac-discovery=1":         404,
		"https://storage.example.com/keys/2.gpg":           200,
		"https://storage.example.com/keys/4.gpg":           404,
		"http://example.com/app?ac-discovery=1":            200,
		"https://example.com/app/?ac-discovery=1":          200,
		"https://storage.example.com/app?ac-discovery=1&x": 404,
	} {
		if a, err := get(t, c, "GET", url); err != nil || a.StatusCode != status {
			t.Errorf("GET %s = %v, %v; want %d", url, a.Response, err, status)
		}
	}
	p.RemoveKeys("example.com/app")
	if a, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1"); err != nil || bytes.Contains(a.body, []byte("keys/2.gpg")) {
		t.Errorf("page = %s, %v; want no key that was removed", a.body, err)
	}
	p.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{{Prefix: "example.com", URL: "https://elsewhere.example/{name}.{ext}"}}})
	if a, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1"); err != nil || !bytes.Contains(a.body, []byte(`"example.com https://elsewhere.example/{name}.{ext}"`)) || bytes.Contains(a.body, []byte("storage")) {
		t.Errorf("page = %s, %v; want the one that was set", a.body, err)
	}
	p.SetPage(publisher.Page{Path: "example.com/app", HTML: "<p>hello"})
	if a, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1"); err != nil || string(a.body) != "<p>hello" {
		t.Errorf("page = %s, %v; want the one that was set", a.body, err)
	}
}

// The client that rkt and actool are built on finds what is published.
func TestTheReferenceClient(t *testing.T) {
	p := start(t)
	key := p.AddKey("example.com/app", []byte("a key"))
	c := client(t, p, false)
	theirs := discovery.Client.Transport
	discovery.Client.Transport = c.Transport
	t.Cleanup(func() { discovery.Client.Transport = theirs })
	app, err := discovery.NewAppFromString("example.com/app:1.0.0,os=linux,arch=amd64")
	if err != nil {
		t.Fatal(err)
	}
	endpoints, attempts, err := discovery.DiscoverACIEndpoints(*app, nil, discovery.InsecureNone, 0)
	if err != nil || len(endpoints) != 1 || endpoints[0].ACI != imageURL || endpoints[0].ASC != imageURL+".asc" {
		t.Errorf("endpoints = %+v, %v, %v; want %s", endpoints, attempts, err, imageURL)
	}
	keys, attempts, err := discovery.DiscoverPublicKeys(*app, nil, discovery.InsecureNone, 0)
	if err != nil || len(keys) != 1 || keys[0] != key {
		t.Errorf("keys = %v, %v, %v; want %s", keys, attempts, err, key)
	}
	// A name below has no page of its own, and climbs.
	below, err := discovery.NewAppFromString("example.com/app/web:1.0.0,os=linux,arch=amd64")
	if err != nil {
		t.Fatal(err)
	}
	if endpoints, attempts, err := discovery.DiscoverACIEndpoints(*below, nil, discovery.InsecureNone, 0); err != nil || len(attempts) != 1 {
		t.Errorf("endpoints = %+v, %v, %v; want the parent's after one attempt", endpoints, attempts, err)
	}
}

func TestFaults(t *testing.T) {
	n := int64(len(blob))
	at := publisher.At
	tests := []struct {
		name   string
		fault  publisher.Fault
		fields []string
		check  func(a answer, err error) bool
		want   string
	}{
		{"status", publisher.Fault{Status: 503, Header: http.Header{"Retry-After": {"7"}}}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 503 && a.Header.Get("Retry-After") == "7"
		}, "503 and Retry-After"},
		{"header removed", publisher.Fault{Header: http.Header{"etag": nil}}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 200 && a.Header.Get("ETag") == ""
		}, "no ETag"},
		{"truncated at once", publisher.Fault{TruncateAfter: at(0)}, nil, func(a answer, err error) bool {
			return err == nil && a.ContentLength == n && a.err != nil && len(a.body) == 0
		}, "a body that ends short after 0 bytes"},
		{"truncated in the middle", publisher.Fault{TruncateAfter: at(70_001)}, nil, func(a answer, err error) bool {
			return err == nil && a.ContentLength == n && a.err != nil && bytes.Equal(a.body, blob[:70_001])
		}, "a body that ends short after 70,001 bytes"},
		{"truncated a byte before the end", publisher.Fault{TruncateAfter: at(n - 1)}, nil, func(a answer, err error) bool {
			return err == nil && a.err != nil && bytes.Equal(a.body, blob[:n-1])
		}, "a body that ends a byte short"},
		{"chunks, truncated", publisher.Fault{TruncateAfter: at(1000), NoContentLength: true}, nil, func(a answer, err error) bool {
			return err == nil && a.ContentLength == -1 && a.err != nil && len(a.body) == 1000
		}, "a body that ends without its end"},
		{"chunks", publisher.Fault{NoContentLength: true}, nil, func(a answer, err error) bool {
			return err == nil && a.ContentLength == -1 && a.err == nil && bytes.Equal(a.body, blob)
		}, "no Content-Length"},
		{"a range, truncated", publisher.Fault{TruncateAfter: at(10)}, []string{"Range", "bytes=100-"}, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 206 && a.err != nil && bytes.Equal(a.body, blob[100:110])
		}, "10 bytes of the range"},
		{"bit flipped", publisher.Fault{FlipBitAt: at(65_536)}, nil, func(a answer, err error) bool {
			want := bytes.Clone(blob)
			want[65_536] ^= 1
			return err == nil && a.err == nil && bytes.Equal(a.body, want)
		}, "one bit flipped"},
		{"first bit flipped", publisher.Fault{FlipBitAt: at(0)}, nil, func(a answer, err error) bool {
			return err == nil && a.body[0] == blob[0]^1 && bytes.Equal(a.body[1:], blob[1:])
		}, "the first byte's bit flipped"},
		{"ranges ignored", publisher.Fault{IgnoreRange: true}, []string{"Range", "bytes=100-"}, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 200 && bytes.Equal(a.body, blob)
		}, "200 and all of it"},
		{"a condition", publisher.Fault{}, []string{"Range", "bytes=100-", "If-Range", `"old"`}, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 200 && bytes.Equal(a.body, blob)
		}, "200 and all of it"},
		{"conditions ignored", publisher.Fault{IgnoreIfRange: true}, []string{"Range", "bytes=100-", "If-Range", `"old"`}, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 206 && bytes.Equal(a.body, blob[100:])
		}, "206 and the range"},
		{"wrong range", publisher.Fault{WrongContentRange: true}, []string{"Range", "bytes=100-199"}, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 206 && a.Header.Get("Content-Range") == fmt.Sprintf("bytes 101-200/%d", n+1) && bytes.Equal(a.body, blob[100:200])
		}, "a Content-Range one byte further"},
		{"redirected", publisher.Fault{RedirectTo: "https://other.example/x"}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 302 && a.Header.Get("Location") == "https://other.example/x"
		}, "302"},
		{"redirected for good", publisher.Fault{RedirectTo: "/y", Status: 308}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 308 && a.Header.Get("Location") == "/y"
		}, "308"},
		{"redirected in a circle", publisher.Fault{RedirectLoop: true}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 302 && a.Header.Get("Location") == imageURL
		}, "302 to itself"},
		{"connection closed", publisher.Fault{CloseConnection: true}, nil, func(_ answer, err error) bool { return err != nil }, "no answer"},
		{"other bytes", publisher.Fault{Body: []byte("other")}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 200 && string(a.body) == "other" && a.Header.Get("Last-Modified") == "Thu, 30 Jun 2016 13:00:00 GMT"
		}, "other bytes with other validators"},
		{"other bytes, same validators", publisher.Fault{Body: []byte("other"), Header: http.Header{"ETag": {`"same"`}}}, nil, func(a answer, err error) bool {
			return err == nil && string(a.body) == "other" && a.Header.Get("ETag") == `"same"`
		}, "other bytes with the ETag set"},
		{"a page in place of an error", publisher.Fault{Body: []byte("<h1>captive"), Status: 511}, nil, func(a answer, err error) bool {
			return err == nil && a.StatusCode == 511 && string(a.body) == "<h1>captive"
		}, "511 with that body"},
		{"flipped and truncated", publisher.Fault{FlipBitAt: at(1), TruncateAfter: at(2)}, nil, func(a answer, err error) bool {
			return err == nil && a.err != nil && string(a.body) == "00"
		}, "both"},
		{"a body without an end", publisher.Fault{EndlessBody: true}, nil, func(a answer, err error) bool {
			return err == nil && a.err == nil && len(a.body) == 1<<20 && bytes.Equal(a.body[:n], blob) && len(bytes.TrimSpace(a.body)) == int(n)
		}, "more than the reader takes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
				trouble := p.Misbehave(publisher.URL("storage.example.com/*.aci"), tt.fault)
				a, err := get(t, c, "GET", imageURL, tt.fields...)
				if !tt.check(a, err) {
					t.Errorf("GET = %v, %v, %d bytes, %v; want %s", a.Response, err, len(a.body), a.err, tt.want)
				}
				if trouble.Applied() < 1 {
					t.Error("Applied = 0, want the fault counted")
				}
				if a, err := get(t, c, "GET", imageURL+".asc"); err != nil || string(a.body) != "signature" {
					t.Errorf("GET of the signature = %v, %v; want no fault", a.Response, err)
				}
				p.Behave()
				if a, err := get(t, c, "GET", imageURL); err != nil || a.err != nil || !bytes.Equal(a.body, blob) {
					t.Errorf("GET after Behave = %v, %v; want the blob", a.Response, err)
				}
			})
		})
	}
}

func TestTruncatedAtEachByte(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	p.Serve("example.com/small", "text/plain", []byte("twelve bytes"))
	for n := range int64(12) {
		trouble := p.Misbehave(publisher.URL("example.com/small"), publisher.Fault{TruncateAfter: publisher.At(n)})
		if a, err := get(t, c, "GET", "https://example.com/small"); err != nil || a.err == nil || int64(len(a.body)) != n {
			t.Errorf("truncated after %d: %v, %q, %v", n, err, a.body, a.err)
		}
		trouble.End()
	}
}

func TestResetIsAReset(t *testing.T) {
	p := start(t)
	p.Misbehave(publisher.URL("*"), publisher.Fault{ResetAfter: publisher.At(50)})
	for _, plain := range []bool{true, false} {
		conn, read := ask(t, p, plain)
		body, err := io.ReadAll(read)
		if !errors.Is(err, syscall.ECONNRESET) || len(body) > 50 {
			t.Errorf("plain %v: %d bytes, %v; want a reset after at most 50", plain, len(body), err)
		}
		conn.Close()
	}
	c := client(t, p, true)
	if a, err := get(t, c, "GET", imageURL); err == nil && a.err == nil {
		t.Errorf("over HTTP/2: %v, want the connection lost", a.Response)
	}
}

// ask sends a request by hand, and returns the connection and the answer's body: what follows the header.
func ask(t *testing.T, p *publisher.Publisher, plain bool) (net.Conn, *bufio.Reader) {
	t.Helper()
	addr := p.Addr()
	if plain {
		addr = p.HTTPAddr()
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if !plain {
		conn = tls.Client(conn, &tls.Config{RootCAs: p.CAPool(), ServerName: "storage.example.com"})
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: storage.example.com\r\n\r\n", strings.TrimPrefix(imageURL, "https://storage.example.com")); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("reading the header: %v", err)
		}
		if line == "\r\n" {
			return conn, r
		}
	}
}

func TestAContentLengthTooShort(t *testing.T) {
	p := start(t)
	p.Misbehave(publisher.URL("*"), publisher.Fault{ContentLength: publisher.At(10)})
	_, read := ask(t, p, true)
	if body, err := io.ReadAll(read); err != nil || !bytes.Equal(body, blob) {
		t.Errorf("%d bytes, %v; want all of them although 10 were claimed", len(body), err)
	}
	c := client(t, p, false)
	if a, err := get(t, c, "GET", imageURL); err != nil || a.ContentLength != 10 || !bytes.Equal(a.body, blob[:10]) {
		t.Errorf("GET = %v, %v; want the 10 bytes that were claimed", a.Response, err)
	}
}

func TestAContentLengthTooLong(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		claimed := int64(len(blob)) + 1
		p.Misbehave(publisher.URL("*"), publisher.Fault{ContentLength: &claimed})
		if a, err := get(t, c, "GET", imageURL); err != nil || a.ContentLength != claimed || a.err == nil || !bytes.Equal(a.body, blob) {
			t.Errorf("GET = %v, %v, %v; want a body that ends short", a.Response, err, a.err)
		}
	})
}

// A client can't tell this truncation from an end: that is why it is here.
func TestABodyThatEndsWhereTheConnectionDoes(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	p.Misbehave(publisher.URL("*"), publisher.Fault{CloseDelimited: true, TruncateAfter: publisher.At(100)})
	if a, err := get(t, c, "GET", strings.Replace(imageURL, "https", "http", 1)); err != nil || a.ContentLength != -1 || a.err != nil || len(a.body) != 100 {
		t.Errorf("GET = %v, %v, %d bytes, %v; want 100 bytes and a clean end", a.Response, err, len(a.body), a.err)
	}
}

func TestEndlessHeaders(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		p.Misbehave(publisher.URL("*"), publisher.Fault{EndlessHeaders: true})
		c.Transport.(*http.Transport).MaxResponseHeaderBytes = 1 << 20
		if a, err := get(t, c, "GET", imageURL); err == nil {
			t.Errorf("GET = %v, want an error", a.Status)
		}
	})
}

func TestDelayAndSpeed(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	p.Misbehave(publisher.URL("*"), publisher.Fault{Delay: 150 * time.Millisecond, BytesPerSecond: 512 << 10})
	begun := time.Now()
	a, err := get(t, c, "GET", imageURL)
	if took := time.Since(begun); err != nil || a.err != nil || !bytes.Equal(a.body, blob) || took < 390*time.Millisecond {
		t.Errorf("GET took %v (%v), want 150 ms and then 128 KiB at 512 KiB/s", took, err)
	}
}

func TestStall(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		trouble := p.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(1000), Times: 1})
		resp, err := c.Get(imageURL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		head := make([]byte, 1000)
		if _, err := io.ReadFull(resp.Body, head); err != nil {
			t.Fatal(err)
		}
		<-trouble.Stalled()
		if r := p.Requests()[0]; r.Bytes != 1000 || r.Done || r.Status != 200 {
			t.Errorf("request = %+v, want it on its way after 1000 bytes", r)
		}
		trouble.Release()
		if rest, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(rest, blob[1000:]) {
			t.Errorf("%d bytes, %v; want the rest", len(rest), err)
		}
	})
}

func TestAStallEndsWithThePublisher(t *testing.T) {
	for name, end := range map[string]func(*publisher.Publisher) error{
		"Stop":  func(p *publisher.Publisher) error { p.Stop(); return nil },
		"Close": (*publisher.Publisher).Close,
	} {
		for _, claim := range []*int64{nil, publisher.At(7)} {
			t.Run(fmt.Sprintf("%s, connection taken over: %v", name, claim != nil), func(t *testing.T) {
				p := start(t)
				c := client(t, p, false)
				trouble := p.Misbehave(publisher.URL("*"), publisher.Fault{StallAfter: publisher.At(5), ContentLength: claim})
				result := make(chan error, 1)
				go func() {
					resp, err := c.Get(imageURL)
					if err == nil {
						_, err = io.ReadAll(resp.Body)
						resp.Body.Close()
					}
					result <- err
				}()
				<-trouble.Stalled()
				if err := end(p); err != nil {
					t.Fatal(err)
				}
				if err := <-result; err == nil {
					t.Error("the answer ended properly, want it cut")
				}
			})
		}
	}
}

func TestAStallEndsWithTheClient(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		trouble := p.Misbehave(publisher.URL("*"), publisher.Fault{StallAfter: publisher.At(0)})
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, "GET", imageURL, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		<-trouble.Stalled()
		cancel()
		resp.Body.Close()
		wait(t, p, 1, func(r publisher.Request) bool { return r.Done })
	})
}

func wait(t *testing.T, p *publisher.Publisher, n int, match func(publisher.Request) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Wait(ctx, n, match); err != nil {
		t.Fatal(err)
	}
}

func TestSkipAndTimes(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	trouble := p.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: 202, Skip: 1, Times: 2})
	var got []int
	for range 5 {
		a, err := get(t, c, "GET", imageURL+".asc")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, a.StatusCode)
	}
	if want := []int{200, 202, 202, 200, 200}; !slices.Equal(got, want) || trouble.Applied() != 2 {
		t.Errorf("statuses = %v, applied %d times; want %v", got, trouble.Applied(), want)
	}
}

func TestFaultsCombine(t *testing.T) {
	p := start(t)
	c := client(t, p, false)
	p.Misbehave(publisher.URL("*"), publisher.Fault{Header: http.Header{"X-A": {"1"}}, FlipBitAt: publisher.At(0)})
	last := p.Misbehave(publisher.URL("*.aci"), publisher.Fault{Header: http.Header{"X-B": {"2"}}, FlipBitAt: publisher.At(1)})
	a, err := get(t, c, "GET", imageURL)
	if err != nil || a.Header.Get("X-A") != "1" || a.Header.Get("X-B") != "2" || string(a.body[:3]) != "002" {
		t.Errorf("GET = %v, %.3q, %v; want both headers and the later flip", a.Response, a.body, err)
	}
	last.End()
	if a, err := get(t, c, "GET", imageURL); err != nil || a.Header.Get("X-B") != "" || string(a.body[:3]) != "112" {
		t.Errorf("GET = %v, %.3q, %v; want the first alone", a.Response, a.body, err)
	}
}

func TestStopAndResume(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		if _, err := get(t, c, "GET", imageURL+".asc"); err != nil {
			t.Fatal(err)
		}
		addr, plain := p.Addr(), p.HTTPAddr()
		for range 2 {
			p.Stop()
			for _, a := range []string{addr, plain} {
				if conn, err := net.Dial("tcp", a); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("dialling a stopped publisher = %v, %v; want it refused", conn, err)
				}
			}
			if _, err := get(t, c, "GET", imageURL); err == nil {
				t.Error("a stopped publisher answered")
			}
			if err := p.Resume(); err != nil {
				t.Fatal(err)
			}
			if p.Addr() != addr || p.HTTPAddr() != plain {
				t.Errorf("it came back at %s and %s, want %s and %s", p.Addr(), p.HTTPAddr(), addr, plain)
			}
			if a, err := get(t, c, "GET", imageURL+".asc"); err != nil || string(a.body) != "signature" {
				t.Errorf("GET after Resume = %v, %v", a.Response, err)
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if err := p.Resume(); err == nil {
			t.Error("Resume after Close = nil, want an error")
		}
	})
}

func TestRequests(t *testing.T) {
	p := start(t)
	c := client(t, p, true)
	if _, err := get(t, c, "GET", imageURL, "Range", "bytes=0-9", "User-Agent", "rkt/1.30.0"); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1"); err != nil {
		t.Fatal(err)
	}
	wait(t, p, 2, func(r publisher.Request) bool { return r.Done })
	r := p.Requests()[0]
	if r.Method != "GET" || "https://"+r.At() != imageURL || r.Status != 206 || r.Bytes != 10 || r.Proto != "HTTP/2.0" || !r.TLS || r.Header.Get("User-Agent") != "rkt/1.30.0" {
		t.Errorf("request = %+v", r)
	}
	for pattern, want := range map[string]int{
		"*": 2, "*.aci": 1, "*.aci.asc": 0, "example.com/app": 1, "storage.example.com/*": 1, "*example.com*app*": 2, "*image*image*": 0, "": 0,
		"example.com/ap": 0, "xample.com/app": 0,
	} {
		if got := p.Count(pattern); got != want {
			t.Errorf("Count(%q) = %d, want %d", pattern, got, want)
		}
	}
	p.ClearRequests()
	if got := p.Requests(); len(got) != 0 {
		t.Errorf("Requests after ClearRequests = %v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(ctx, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait = %v, want context.Canceled", err)
	}
}

func TestTLSNames(t *testing.T) {
	p := start(t)
	for _, name := range []string{"example.com", "a.b.example.org", "localhost"} {
		conn, err := tls.Dial("tcp", p.Addr(), &tls.Config{RootCAs: p.CAPool(), ServerName: name})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		conn.Close()
	}
	if resp, err := get(t, client(t, p, false), "GET", p.URL()+"/"); err != nil || resp.StatusCode != 404 {
		t.Errorf("by its address: %v, %v; want 404", resp.Response, err)
	}
	if conn, err := tls.Dial("tcp", p.Addr(), &tls.Config{ServerName: "example.com"}); err == nil {
		conn.Close()
		t.Error("a client that doesn't trust the CA connected")
	}
	if !bytes.HasPrefix(p.CAPEM(), []byte("-----BEGIN CERTIFICATE-----")) {
		t.Errorf("CAPEM = %q", p.CAPEM())
	}
}

func TestManyAtOnce(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		p.Misbehave(publisher.URL("*"), publisher.Fault{TruncateAfter: publisher.At(10), Times: 20})
		short := make(chan bool)
		for range 40 {
			go func() {
				a, err := get(t, c, "GET", imageURL)
				short <- err != nil || a.err != nil
			}()
		}
		n := 0
		for range 40 {
			if <-short {
				n++
			}
		}
		if n != 20 || p.Count("*.aci") != 40 {
			t.Errorf("%d of %d answers ended short, want 20 of 40", n, p.Count("*.aci"))
		}
	})
}
