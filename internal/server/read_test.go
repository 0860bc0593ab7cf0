package server

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/problem"
)

func TestSimpleRefs(t *testing.T) {
	for _, tt := range []struct {
		name, path string
		known      []string
		want       []string
	}{
		{"plain", "example.com/app-1.0-linux-amd64", nil, []string{"example.com/app:1.0,arch=amd64,os=linux"}},
		{"latest", "example.com/app-latest-linux-amd64", nil, []string{"example.com/app,arch=amd64,os=linux"}},
		{
			"dashes in the name: what looks like a version decides", "example.com/my-app-1.0-linux-amd64", nil,
			[]string{"example.com/my-app:1.0,arch=amd64,os=linux", "example.com/my:app-1.0,arch=amd64,os=linux"},
		},
		{
			"dashes in the version", "example.com/app-1.0-rc1-linux-amd64", nil,
			[]string{"example.com/app:1.0-rc1,arch=amd64,os=linux", "example.com/app-1.0:rc1,arch=amd64,os=linux"},
		},
		{
			"a known name goes first", "example.com/my-app-1.0-linux-amd64", []string{"example.com/my"},
			[]string{"example.com/my:app-1.0,arch=amd64,os=linux", "example.com/my-app:1.0,arch=amd64,os=linux"},
		},
		{"a version with a v", "example.com/app-v2-linux-arm64", nil, []string{"example.com/app:v2,arch=arm64,os=linux"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			refs, err := simpleRefs(tt.path, func(name string) bool { return slices.Contains(tt.known, name) })
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, ref := range refs {
				got = append(got, ref.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("simpleRefs = %q, want %q", got, tt.want)
			}
		})
	}
	for _, bad := range []string{"", "app", "example.com/app-1.0", "example.com/app-linux-amd64", "-1.0-linux-amd64", "Example.com/app-1.0-linux-amd64"} {
		if refs, err := simpleRefs(bad, func(string) bool { return false }); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("simpleRefs(%q) = %v, %v, want ErrInvalid", bad, refs, err)
		}
	}
}

func FuzzSimpleRefs(f *testing.F) {
	f.Add("example.com/my-app-1.0-rc1-linux-amd64")
	f.Add(strings.Repeat("-1", 40))
	f.Fuzz(func(t *testing.T, path string) {
		refs, err := simpleRefs(path, func(string) bool { return false })
		if err != nil {
			return
		}
		if len(refs) == 0 || len(refs) > maxSimpleRefs {
			t.Fatalf("%d refs", len(refs))
		}
		for _, ref := range refs {
			version := ref.Version()
			if version == "" {
				version = "latest"
			}
			operatingSystem, _ := ref.Label("os")
			arch, _ := ref.Label("arch")
			// Empty os and arch count as none; otherwise the URL is what the ref says.
			if got := strings.Join([]string{ref.Name(), version, operatingSystem, arch}, "-"); got != path {
				t.Fatalf("%q was read as %v, which is %q", path, ref, got)
			}
		}
	})
}

func TestDirectRef(t *testing.T) {
	for _, tt := range []struct {
		name, query string
		want        map[string]string // nil: refused
	}{
		{"nothing", "", map[string]string{}},
		{"labels", "version=1.0&os=linux", map[string]string{"version": "1.0", "os": "linux"}},
		{"a plus stays a plus", "version=1.0+git", map[string]string{"version": "1.0+git"}},
		{"an escaped plus, too", "version=1.0%2Bgit", map[string]string{"version": "1.0+git"}},
		{"hostile values are values", "version=../../../etc/passwd", map[string]string{"version": "../../../etc/passwd"}},
		{"an equals sign in a value", "channel=a=b", map[string]string{"channel": "a=b"}},
		{"latest", "version=latest", map[string]string{}},
		{"a label twice", "os=linux&os=freebsd", nil},
		{"a broken escape", "os=%zz", nil},
		{"a template variable", "ext=aci", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref, err := directRef("example.com/app", tt.query)
			if tt.want == nil {
				if !errors.Is(err, acproxy.ErrInvalid) {
					t.Errorf("directRef = %v, %v, want ErrInvalid", ref, err)
				}
				return
			}
			if err != nil || !maps.Equal(ref.Labels(), tt.want) {
				t.Errorf("directRef = %v, %v, want %v", ref, err, tt.want)
			}
		})
	}
}

func TestRewrite(t *testing.T) {
	publisher := []discovery.Template{
		{Prefix: "example.com", URL: "https://a.example.com/{name}-{version}-{os}-{arch}.{ext}"},
		{Prefix: "example.com", URL: "https://b.example.com/{os}/{arch}/{version}/{name}.{ext}"},
		{Prefix: "example.com/app", URL: "https://c.example.com/{version}/{channel}.{ext}"},
		{Prefix: "example.com", URL: "http://d.example.com/{name}.{ext}"},
	}
	got := rewrite(publisher, "https://example.com", "example.com/app")
	want := []discovery.Template{
		{Prefix: "example.com", URL: "https://example.com/.acproxy/images/{name}.{ext}?version={version}&os={os}&arch={arch}"},
		{Prefix: "example.com/app", URL: "https://example.com/.acproxy/images/example.com/app.{ext}?version={version}&channel={channel}"},
		{Prefix: "example.com", URL: "https://example.com/.acproxy/images/{name}.{ext}"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("rewrite = %q, want %q", got, want)
	}
}

func TestArrivingSpan(t *testing.T) {
	modified := time.Date(2016, 6, 30, 12, 0, 0, 0, time.UTC)
	const stamp = "Thu, 30 Jun 2016 12:00:00 GMT"
	known := &fetch.Image{Size: 1000, Modified: modified, ETag: `"s-1"`}
	unknown := &fetch.Image{Size: -1, Modified: modified, ETag: `"s-1"`}
	whole := span{status: 200, to: 1000}
	part := func(from, to int64) span {
		return span{206, from, to, fmt.Sprintf("bytes %d-%d/1000", from, to-1)}
	}
	for _, tt := range []struct {
		name   string
		image  *fetch.Image
		header map[string]string
		want   span
		waits  bool
	}{
		{"no header", known, nil, whole, false},
		{"unknown length", unknown, nil, span{status: 200, to: -1}, false},
		{"no bytes: there is nothing to hold back until the verdict", &fetch.Image{Modified: modified, ETag: `"s-1"`}, nil, span{}, true},
		{"from a byte on", known, map[string]string{"Range": "bytes=100-"}, part(100, 1000), false},
		{"between bytes", known, map[string]string{"Range": "bytes=100-199"}, part(100, 200), false},
		{"the last byte", known, map[string]string{"Range": "bytes=999-"}, part(999, 1000), false},
		{"past the end", known, map[string]string{"Range": "bytes=1000-"}, span{status: 416, contentRange: "bytes */1000"}, false},
		{"to past the end", known, map[string]string{"Range": "bytes=900-5000"}, part(900, 1000), false},
		{"the last 10 bytes", known, map[string]string{"Range": "bytes=-10"}, part(990, 1000), false},
		{"with spaces", known, map[string]string{"Range": "bytes= 5 - 9 "}, part(5, 10), false},
		{"two ranges wait for the end", known, map[string]string{"Range": "bytes=0-1,5-6"}, span{}, true},
		{"a range of an unknown length waits", unknown, map[string]string{"Range": "bytes=5-"}, span{}, true},
		{"the last bytes of an unknown length wait", unknown, map[string]string{"Range": "bytes=-5"}, span{}, true},
		{"past the end of an unknown length waits", unknown, map[string]string{"Range": "bytes=9223372036854775807-"}, span{}, true},
		{"a range of an unknown length, of other bytes", unknown, map[string]string{"Range": "bytes=5-", "If-Range": `"s-2"`}, span{status: 200, to: -1}, false},
		{"backwards", known, map[string]string{"Range": "bytes=9-5"}, span{status: 416}, false},
		{"a range with the right ETag", known, map[string]string{"Range": "bytes=5-", "If-Range": `"s-1"`}, part(5, 1000), false},
		{"a range with another ETag", known, map[string]string{"Range": "bytes=5-", "If-Range": `"s-2"`}, whole, false},
		{"a range with a weak ETag", known, map[string]string{"Range": "bytes=5-", "If-Range": `W/"s-1"`}, whole, false},
		{"a range with the right date", known, map[string]string{"Range": "bytes=5-", "If-Range": stamp}, part(5, 1000), false},
		{"a range with a later date", known, map[string]string{"Range": "bytes=5-", "If-Range": "Fri, 01 Jul 2016 12:00:00 GMT"}, whole, false},
		{"the client has it", known, map[string]string{"If-None-Match": `"x", W/"s-1"`}, span{status: 304}, false},
		{"the client has another", known, map[string]string{"If-None-Match": `"x"`, "If-Modified-Since": stamp}, whole, false},
		{"not modified since", known, map[string]string{"If-Modified-Since": stamp}, span{status: 304}, false},
		{"the client has an unknown length", unknown, map[string]string{"If-None-Match": `"s-1"`, "Range": "bytes=5-"}, span{status: 304}, false},
		{"what the client lists can't be read to where the right one is", known, map[string]string{"If-None-Match": `x, "s-1"`}, whole, false},
		{"the client wants another", known, map[string]string{"If-Match": `"x"`}, span{status: 412}, false},
		{"the client wants this one", known, map[string]string{"If-Match": `"x", "s-1"`}, whole, false},
		{"modified since", known, map[string]string{"If-Unmodified-Since": "Thu, 30 Jun 2016 11:00:00 GMT"}, span{status: 412}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			for k, v := range tt.header {
				r.Header.Set(k, v)
			}
			got, ok := arrivingSpan(r, tt.image)
			if ok == tt.waits || ok && got != tt.want {
				t.Errorf("arrivingSpan = %+v, %v, want %+v, waits: %v", got, ok, tt.want, tt.waits)
			}
		})
	}
	old := httptest.NewRequest(http.MethodGet, "/", nil)
	old.ProtoMinor = 0
	if _, ok := arrivingSpan(old, unknown); ok {
		t.Error("an HTTP/1.0 client would take a cut body of unknown length for a whole one")
	}
}

// FuzzArrivingSpan: what is still arriving is answered as what is here.
func FuzzArrivingSpan(f *testing.F) {
	for _, seed := range [][2]string{
		{"bytes=0-", ""}, {"bytes=5-10", `"s-1"`}, {"bytes=-5", `W/"s-1"`}, {"bytes=9223372036854775807-", "Thu, 30 Jun 2016 12:00:00 GMT"}, {"bytes=0-9223372036854775807,1-2", `x, "s-1"`},
	} {
		f.Add(seed[0], seed[1], "", "")
		f.Add(seed[0], "", seed[1], "")
		f.Add(seed[0], "", "", seed[1])
	}
	im := &fetch.Image{Size: 100, Modified: time.Date(2016, 6, 30, 12, 0, 0, 0, time.UTC), ETag: `"s-1"`}
	content := make([]byte, im.Size)
	f.Fuzz(func(t *testing.T, ranges, ifRange, ifNoneMatch, ifMatch string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		for field, value := range map[string]string{"Range": ranges, "If-Range": ifRange, "If-None-Match": ifNoneMatch, "If-Match": ifMatch} {
			if value != "" {
				r.Header.Set(field, value)
			}
		}
		want := httptest.NewRecorder()
		want.Header().Set("ETag", im.ETag)
		want.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(want, r.Clone(t.Context()), "", im.Modified, bytes.NewReader(content))
		got, ok := arrivingSpan(r, im)
		several := strings.HasPrefix(want.Header().Get("Content-Type"), "multipart/")
		if ok == several {
			t.Fatalf("arrivingSpan answers at once: %v, want %v", ok, !several)
		}
		if !ok {
			return
		}
		length, sent := got.to-got.from, int64(want.Body.Len())
		if got.status != want.Code || got.status <= 206 && length != sent || got.contentRange != want.Header().Get("Content-Range") {
			t.Errorf("arrivingSpan = %+v, want %d with %d bytes, %q", got, want.Code, sent, want.Header().Get("Content-Range"))
		}
	})
}

func TestPreferred(t *testing.T) {
	const problem = "application/problem+json"
	for _, tt := range []struct{ name, accept, want string }{
		{"nothing, as rkt", "", problem},
		{"anything, as curl", "*/*", problem},
		{"a browser", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"},
		{"text", "text/plain", "text/plain"},
		{"json", "application/json", problem},
		{"rather text than the rest", "text/plain, */*;q=0.1", "text/plain"},
		{"anything but JSON", "application/problem+json;q=0, text/*", "text/html"},
		{"something we haven't got", "image/png", problem},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := preferred(tt.accept); got != tt.want {
				t.Errorf("preferred(%q) = %q, want %q", tt.accept, got, tt.want)
			}
		})
	}
}

func TestStatusOf(t *testing.T) {
	for kind, want := range map[error]int{
		acproxy.ErrInvalid: 400, acproxy.ErrRefused: 403, acproxy.ErrNotFound: 404, acproxy.ErrOffline: 404, acproxy.ErrPublisher: 502,
		acproxy.ErrBusy: 503, acproxy.ErrTimeout: 504, acproxy.ErrNoSpace: 507, errors.New("a fault of ours"): 500,
	} {
		if got := problem.StatusOf(&acproxy.Error{Kind: kind}); got != want {
			t.Errorf("statusOf(%v) = %d, want %d", kind, got, want)
		}
	}
	if got := problem.StatusOf(problem.WithStatus(405, acproxy.Invalid("x"))); got != 405 {
		t.Errorf("a status of its own is %d, want 405", got)
	}
}

func TestDirectPathRoundTrip(t *testing.T) {
	for _, in := range []string{"example.com/app", "example.com/app:1.0+git,os=linux", "example.com/app:a%2Cb,channel=x=y&z#w?v"} {
		ref, err := acproxy.ParseRef(in)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodGet, directPath(ref, extSignature), nil)
		path, ext, err := splitExt(strings.TrimPrefix(r.URL.EscapedPath(), imagesPath))
		if err != nil || ext != extSignature {
			t.Fatalf("splitExt = %q, %q, %v", path, ext, err)
		}
		if got, err := directRef(path, r.URL.RawQuery); err != nil || got != ref {
			t.Errorf("%v came back as %v, %v", ref, got, err)
		}
	}
}
