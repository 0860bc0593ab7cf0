package server

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/oci"
)

func TestReadOCI(t *testing.T) {
	const digest = "sha256:2d3f8f0976cbdb3feb8ae02f7714b9b0bea007a740ef0b58369903ae78bf265e"
	for path, want := range map[string]ociRequest{
		"/v2": {}, "/v2/": {},
		"/v2/example.com/app/manifests/1.0":          {"example.com/app", ociManifests, "1.0"},
		"/v2/app/manifests/" + digest:                {"app", ociManifests, digest},
		"/v2/a/manifests/b/blobs/" + digest:          {"a/manifests/b", ociBlobs, digest},
		"/v2/example.com/app/tags/list":              {"example.com/app", ociTags, ""},
		"/v2/example.com/app/referrers/" + digest:    {"example.com/app", ociReferrers, digest},
		"/v2/example.com/app/blobs/uploads/":         {"example.com/app", ociBlobs, "uploads"},
		"/v2/example.com/app/blobs/uploads/some-id":  {"example.com/app", ociBlobs, "uploads"},
		"/v2/example.com/app/manifests/":             {"example.com/app", ociManifests, ""},
		"/v2/example.com/manifests/manifests/latest": {"example.com/manifests", ociManifests, "latest"},
	} {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		if got, ok := readOCI(r); !ok || got != want {
			t.Errorf("%s is %+v, %t, want %+v", path, got, ok, want)
		}
	}
	for _, path := range []string{"/", "/v2x", "/v1/", "/v2/example.com/app", "/v2/app.aci", "/v2/app/manifests/x.aci", "/v2/app/blobs/x.aci.asc", "/v2/app/manifests", "/v2/_catalog", "/v2/app/tags"} {
		if got, ok := readOCI(httptest.NewRequest(http.MethodGet, path, nil)); ok {
			t.Errorf("%s is %+v, and should be nothing", path, got)
		}
	}
}

func TestOCIName(t *testing.T) {
	for _, tt := range []struct{ host, repository, ns, want string }{
		{"acproxy.example.net:8080", "example.com/app", "", "example.com/app"},
		{"acproxy.example.net", "app", "example.com", "example.com/app"},
		{"acproxy.example.net", "example.org/app", "example.com", "example.com/example.org/app"},
		{"example.com", "app", "", "example.com/app"},
		{"EXAMPLE.com:443", "team/app", "", "example.com/team/app"},
		{"acproxy.example.net", "app", "EXAMPLE.com:443", "example.com/app"},
		{"acproxy.example.net", "example.com/%7euser/app", "", "example.com/~user/app"},
		{"acproxy.example.net", "example.com/App", "", ""},
		{"acproxy.example.net", "app", "../etc", ""},
		{"acproxy.example.net", "example.com/a%2f..%2fb", "", ""},
		{"acproxy.example.net", "example.com//app", "", ""},
	} {
		r := httptest.NewRequest(http.MethodGet, "/v2/", nil)
		r.Host, r.URL.RawQuery = tt.host, url.Values{"ns": {tt.ns}}.Encode()
		got, err := ociName(r, tt.repository)
		if tt.want == "" {
			if !errors.Is(err, acproxy.ErrInvalid) {
				t.Errorf("%+v is %q, %v, want an error", tt, got, err)
			}
		} else if err != nil || got != tt.want {
			t.Errorf("%+v is %q, %v", tt, got, err)
		}
	}
}

// FuzzOCISpan holds what a request gets of a blob against what net/http would send of it.
func FuzzOCISpan(f *testing.F) {
	for _, rng := range []string{
		"", "bytes=0-", "bytes=0-0", "bytes=5-9", "bytes=9-", "bytes=10-", "bytes=-1", "bytes=-0", "bytes=-99", "bytes=3-99", "bytes=5-3", "bytes=1-2,4-5", "bytes= 1-2", "bytes=1 - 2",
		"bytes=a-b", "bytes=", "bytes=-", "items=1-2", "bytes=99999999999999999999-", "bytes=+1-2", "bytes=1-+2",
	} {
		f.Add(rng, "", uint8(10))
		f.Add(rng, `"sha256:00"`, uint8(10))
	}
	f.Fuzz(func(t *testing.T, rng, ifRange string, size uint8) {
		if size == 0 {
			return // there is neither a document nor a layer of no bytes
		}
		c := &oci.Content{Digest: acproxy.Digest{1}, Size: int64(size)}
		etag := `"` + c.Digest.String() + `"`
		if ifRange == "right" {
			ifRange = etag
		}
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Range", rng)
		r.Header.Set("If-Range", ifRange)
		got := ociSpan(r, c)
		if got.from < 0 || got.from > got.to || got.to > c.Size {
			t.Fatalf("%q of %d bytes: %+v", rng, size, got)
		}
		if strings.Contains(rng, ",") || !strings.HasPrefix(rng, "bytes=") || strings.ContainsAny(rng, " \t+") {
			return // several ranges, and what isn't one, are answered with all of it
		}
		content := bytes.Repeat([]byte("0123456789"), 26)[:size]
		w := httptest.NewRecorder()
		w.Header().Set("ETag", etag)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		if w.Code == http.StatusRequestedRangeNotSatisfiable && got.status == http.StatusOK {
			return // what can't be read may be ignored (RFC 9110, section 14.2)
		}
		if got.status == http.StatusRequestedRangeNotSatisfiable && strings.HasPrefix(rng, "bytes=-") && strings.Trim(rng[7:], "0") == "" {
			return // the last no bytes are no range (RFC 9110, section 14.1.2), and net/http sends a range of none
		}
		if got.status != w.Code {
			t.Fatalf("%q (If-Range %q) of %d bytes: %+v, and net/http says %d %s", rng, ifRange, size, got, w.Code, w.Header())
		}
		if got.status == http.StatusPartialContent && (got.contentRange != w.Header().Get("Content-Range") || !bytes.Equal(content[got.from:got.to], w.Body.Bytes())) {
			t.Fatalf("%q of %d bytes: %+v, and net/http sends %q %s", rng, size, got, w.Body, w.Header())
		}
	})
}

func TestPart(t *testing.T) {
	const content = "0123456789"
	for from := range len(content) {
		for to := from + 1; to <= len(content); to++ {
			for step := 1; step <= len(content); step++ {
				var b bytes.Buffer
				p := &part{w: &b, skip: int64(from), left: int64(to - from)}
				var err error
				for at := 0; at < len(content) && err == nil; at += step {
					_, err = p.Write([]byte(content[at:min(at+step, len(content))]))
				}
				if b.String() != content[from:to] || !errors.Is(err, errPartWritten) {
					t.Fatalf("%d to %d in steps of %d: %q, %v", from, to, step, b.String(), err)
				}
			}
		}
	}
	p := &part{w: failing{}, left: 1}
	if _, err := p.Write([]byte("x")); err == nil || !p.gone {
		t.Errorf("a client that has gone: %v", err)
	}
}

type failing struct{}

// Write fails.
func (failing) Write([]byte) (int, error) { return 0, fmt.Errorf("gone") }
