package discovery

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/acproxy/acproxy"
)

func ref(tb testing.TB, s string) acproxy.Ref {
	tb.Helper()
	r, err := acproxy.ParseRef(s)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func TestVariables(t *testing.T) {
	tests := []struct {
		url  string
		want []string
	}{
		{"https://{name}-{version}-{os}-{arch}.{ext}", []string{"name", "version", "os", "arch", "ext"}},
		{"https://h/{name}/{version}/{name}.{ext}?{version}", []string{"name", "version", "ext"}},
		{"https://h/x", nil},
		{"https://h/{}{{a}{b", []string{"", "a"}},
	}
	for _, tt := range tests {
		if got := (Template{URL: tt.url}).Variables(); !slices.Equal(got, tt.want) {
			t.Errorf("Variables of %s = %q, want %q", tt.url, got, tt.want)
		}
	}
}

func TestExpand(t *testing.T) {
	const app = "example.com/app:1.0,os=linux,arch=amd64"
	tests := []struct {
		name, url, ref, ext string
		want                string // "" for an error
	}{
		{"the specification's", "https://storage.example.com/{os}/{arch}/{name}-{version}.{ext}", app, "aci", "https://storage.example.com/linux/amd64/example.com/app-1.0.aci"},
		{"its signature", "https://storage.example.com/{os}/{arch}/{name}-{version}.{ext}", app, "aci.asc", "https://storage.example.com/linux/amd64/example.com/app-1.0.aci.asc"},
		{"simple discovery", simpleTemplate, app, "aci", "https://example.com/app-1.0-linux-amd64.aci"},
		{"no version is the latest", "https://h/{name}-{version}.{ext}", "example.com/app", "aci", "https://h/example.com/app-latest.aci"},
		{"version latest is no version", "https://h/{name}-{version}.{ext}", "example.com/app:latest", "aci", "https://h/example.com/app-latest.aci"},
		{"any label", "https://h/{channel}/{version}.{ext}", "example.com/app:1,channel=alpha", "aci", "https://h/alpha/1.aci"},
		{"a label with dots and slashes in its name", "https://h/{a.b/c}.{ext}", "example.com/app,a.b/c=x", "aci", "https://h/x.aci"},
		{"an empty label", "https://h/a{channel}b.{ext}", "example.com/app,channel=", "aci", "https://h/ab.aci"},
		{"a label that is not asked for", "https://h/{channel}.{ext}", app, "aci", ""},
		{"os that is not asked for", "https://h/{os}.{ext}", "example.com/app", "aci", ""},
		{"an unknown extension", "https://h/{name}.{ext}", app, "zip", ""},
		{"a variable without a name", "https://h/{}.{ext}", app, "aci", ""},
		{"braces around a variable", "https://h/{{version}}.{ext}", app, "aci", ""},
		{"a brace alone", "https://h/{{version}.{ext}", app, "aci", "https://h/{1.0.aci"},
		{"a value with braces is no variable", "https://h/{version}.{ext}", "example.com/app:{os},os=linux", "aci", "https://h/%7Bos%7D.aci"},
		{"a slash in a path", "https://h/{version}.{ext}", "example.com/app:a/b", "aci", "https://h/a%2Fb.aci"},
		{"what a path or query would misread", "https://h/{version}.{ext}?v={version}", "example.com/app:1+2&3#4?5%256=7%20", "aci",
			"https://h/1%2B2%263%234%3F5%256%3D7%20.aci?v=1%2B2%263%234%3F5%256%3D7%20"},
		{"letters of any language", "https://h/{version}.{ext}", "example.com/app:ü", "aci", "https://h/%C3%BC.aci"},
		{"a dot segment", "https://h/{version}/x.{ext}", "example.com/app:..", "aci", ""},
		{"a single dot segment", "https://h/{version}/x.{ext}", "example.com/app:.", "aci", ""},
		{"dot segments behind escapes", "https://h/{version}.{ext}", "example.com/app:../../etc/passwd", "aci", ""},
		{"dot segments behind backslashes", "https://h/{version}/x.{ext}", `example.com/app:..\x`, "aci", ""},
		{"dots that are no segment", "https://h/{version}.{ext}", "example.com/app:..", "aci", "https://h/...aci"},
		{"dots in a query", "https://h/x.{ext}?{version}", "example.com/app:..", "aci", "https://h/x.aci?.."},
		{"a label in the host", "https://{region}.example.com/x.{ext}", "example.com/app,region=eu-1", "aci", "https://eu-1.example.com/x.aci"},
		{"a label that would be another host", "https://{region}.example.com/x.{ext}", "example.com/app,region=evil.com/", "aci", ""},
		{"a label that would be a password", "https://{region}.example.com/x.{ext}", "example.com/app,region=a@b", "aci", ""},
		{"a label that would be a port", "https://h{region}/x.{ext}", "example.com/app,region=:22", "aci", ""},
		{"a label before the host", "{scheme}://h/x.{ext}", "example.com/app,scheme=https", "aci", "https://h/x.aci"},
		{"a label that would be a whole URL", "{u}", "example.com/app,u=https://evil.com/x", "aci", ""},
		{"another scheme", "hdfs://h/{name}.{ext}", app, "aci", ""},
		{"no host", "https:///{name}.{ext}", app, "aci", ""},
		{"a relative one", "/{name}.{ext}", app, "aci", ""},
		{"a user name", "https://me@h/{name}.{ext}", app, "aci", ""},
		{"a fragment", "https://h/{name}.{ext}#x", app, "aci", ""},
		{"an empty fragment", "https://h/{name}.{ext}#", app, "aci", ""},
		{"dot segments of the template", "https://h/a/../{name}.{ext}", app, "aci", ""},
		{"escaped dot segments of the template", "https://h/a/%2e%2E/{name}.{ext}", app, "aci", ""},
		{"without {ext}, the image", "https://h/{name}.aci?a=b", app, "aci", "https://h/example.com/app.aci?a=b"},
		{"without {ext}, the signature", "https://h/{name}.aci?a=b", app, "aci.asc", "https://h/example.com/app.aci.asc?a=b"},
		{"without {ext} or a file", "https://h/", app, "aci.asc", ""},
		{"without {ext} or a path", "https://{name}", "example.com", "aci.asc", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := (Template{Prefix: "example.com", URL: tt.url}).Expand(ref(t, tt.ref), tt.ext)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("Expand = %q, %v, want %q", got, err, tt.want)
			}
			if err != nil && !errors.Is(err, acproxy.ErrInvalid) {
				t.Errorf("error %v does not match ErrInvalid", err)
			}
		})
	}
	if _, err := (Template{URL: "https://h/{name}.{ext}"}).Expand(acproxy.Ref{}, ExtImage); err == nil {
		t.Error("Expand of the zero ref has no error")
	}
}

func TestMatch(t *testing.T) {
	tests := []struct {
		name, prefix, template, url string
		want                        []string // "ref ext", in order
	}{
		{"plain", "example.com", "https://h/{os}/{arch}/{name}-{version}.{ext}", "https://h/linux/amd64/example.com/app-1.0.aci", []string{"example.com/app:1.0,arch=amd64,os=linux aci"}},
		{"a signature", "example.com", "https://h/{name}.{ext}", "https://h/example.com/app.aci.asc", []string{"example.com/app aci.asc"}},
		{"the latest", "example.com", "https://h/{name}-{version}.{ext}", "https://h/example.com/app-latest.aci", []string{"example.com/app aci"}},
		{"an ambiguous split, the longest name first", "example.com", "https://h/{name}-{version}.{ext}", "https://h/example.com/my-app-1.0-rc.aci",
			[]string{"example.com/my-app-1.0:rc aci", "example.com/my-app:1.0-rc aci", "example.com/my:app-1.0-rc aci"}},
		{"a known platform goes first", "example.com/app", "https://h/{version}-{os}-{arch}-{x}.{ext}", "https://h/1-linux-amd64-x-y.aci",
			[]string{"example.com/app:1,arch=amd64,os=linux,x=x-y aci", "example.com/app:1-linux,arch=x,os=amd64,x=y aci", "example.com/app:1,arch=x,os=linux-amd64,x=y aci", "example.com/app:1,arch=amd64-x,os=linux,x=y aci"}},
		{"a name outside the prefix", "example.com/app", "https://h/{name}.{ext}", "https://h/example.com/apple.aci", nil},
		{"another host", "example.com", "https://h/{name}.{ext}", "https://i/example.com/app.aci", nil},
		{"another scheme", "example.com", "https://h/{name}.{ext}", "http://h/example.com/app.aci", nil},
		{"a host in capitals", "example.com", "https://h.x/{name}.{ext}", "HTTPS://H.X/example.com/app.aci", []string{"example.com/app aci"}},
		{"a path in capitals", "example.com", "https://h/a/{name}.{ext}", "https://h/A/example.com/app.aci", nil},
		{"the default port", "example.com", "https://h:443/{name}.{ext}", "https://h/example.com/app.aci", []string{"example.com/app aci"}},
		{"the default port of http", "example.com", "http://h/{name}.{ext}", "http://h:80/example.com/app.aci", []string{"example.com/app aci"}},
		{"another port", "example.com", "https://h/{name}.{ext}", "https://h:444/example.com/app.aci", nil},
		{"an escaped label", "example.com", "https://h/{version}/{name}.{ext}", "https://h/a%2Fb%2B1/example.com/app.aci", []string{"example.com/app:a/b+1 aci"}},
		{"a label as the reference library leaves it", "example.com", "https://h/{version}/{name}.{ext}", "https://h/1+2/example.com/app.aci", []string{"example.com/app:1+2 aci"}},
		{"a bad escape", "example.com", "https://h/{version}/{name}.{ext}", "https://h/1%zz/example.com/app.aci", nil},
		{"a label is one segment", "example.com", "https://h/{version}/{name}.{ext}", "https://h/1/2/example.com/app.aci", nil},
		{"a dot segment", "example.com", "https://h/{version}/{name}.{ext}", "https://h/../example.com/app.aci", nil},
		{"an empty version", "example.com", "https://h/{name}-{version}.{ext}", "https://h/example.com/app-.aci", nil},
		{"a query", "example.com", "https://h/{name}.{ext}?v={version}&o={os}", "https://h/example.com/app.aci?v=1&o=linux", []string{"example.com/app:1,os=linux aci"}},
		{"a slash in a query", "example.com", "https://h/{name}.{ext}?v={version}", "https://h/example.com/app.aci?v=a/b", []string{"example.com/app:a/b aci"}},
		{"a variable twice", "example.com", "https://h/{version}/{name}-{version}.{ext}", "https://h/1-2/example.com/app-1-2.aci", []string{"example.com/app:1-2 aci"}},
		{"a variable twice with two values", "example.com", "https://h/{version}/{name}-{version}.{ext}", "https://h/1/example.com/app-2.aci", nil},
		{"no {name}", "example.com/app", "https://h/app-{version}.{ext}", "https://h/app-1.aci", []string{"example.com/app:1 aci"}},
		{"no {ext}", "example.com", "https://h/{name}.aci?x", "https://h/example.com/app.aci?x", []string{"example.com/app aci"}},
		{"no {ext}, the signature", "example.com", "https://h/{name}.aci?x", "https://h/example.com/app.aci.asc?x", []string{"example.com/app aci.asc"}},
		{"a rest", "example.com", "https://h/{name}.{ext}", "https://h/example.com/app.aci?x", nil},
		{"a URL that is too long", "example.com", "https://h/{version}/{name}.{ext}", "https://h/" + strings.Repeat("a", maxMatchURL) + "/example.com/app.aci", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			template := Template{Prefix: tt.prefix, URL: tt.template}
			var got []string
			for _, r := range template.MatchAll(tt.url) {
				got = append(got, r.Ref.String()+" "+r.Ext)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("MatchAll = %q, want %q", got, tt.want)
			}
			r, ext, ok := template.Match(tt.url)
			if ok != (len(tt.want) > 0) || ok && r.String()+" "+ext != tt.want[0] {
				t.Errorf("Match = %v %q %v", r, ext, ok)
			}
		})
	}
	t.Run("a URL of dashes is given up", func(t *testing.T) {
		template := Template{Prefix: "example.com", URL: "https://h/{name}-{a}-{b}-{c}-{d}-{e}-{f}.{ext}"}
		if got := template.MatchAll("https://h/example.com/a" + strings.Repeat("-a", 3000) + ".aci"); len(got) > maxRequests {
			t.Errorf("MatchAll returned %d requests, the bound is %d", len(got), maxRequests)
		}
	})
}

func TestTemplateAsText(t *testing.T) {
	want := Template{Prefix: "example.com/app", URL: "https://h/{name}.{ext}"}
	if got, err := ParseTemplate(want.String()); got != want || err != nil {
		t.Errorf("ParseTemplate(%q) = %v, %v", want.String(), got, err)
	}
	for _, bad := range []string{"", "example.com", "a b c", "/ https://h/", "// https://h/"} {
		if got, err := ParseTemplate(bad); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("ParseTemplate(%q) = %v, %v, want an error", bad, got, err)
		}
	}
	text, err := json.Marshal(want)
	if err != nil || string(text) != `{"prefix":"example.com/app","url":"https://h/{name}.{ext}"}` {
		t.Errorf("JSON = %s, %v", text, err)
	}
}

func FuzzExpandMatch(f *testing.F) {
	f.Add("example.com", "https://h/{os}/{name}-{version}.{ext}", "example.com/app:1.0,os=linux", false)
	f.Add("example.com/app", "https://{name}-{version}?a={a}&b={b/c}", "example.com/app:a/b,a=+&#,b/c=", true)
	f.Add("example.com", "HTTPS://H:443/{name}{ext}", "example.com/app-1", true)
	f.Fuzz(func(t *testing.T, prefix, url, text string, signature bool) {
		r, err := acproxy.ParseRef(text)
		template := Template{Prefix: prefix, URL: url}
		if err != nil || !acproxy.HasPrefix(r.Name(), prefix) || len(url) > 300 || len(text) > 300 {
			return
		}
		ext := ExtImage
		if signature {
			ext = ExtSignature
		}
		expanded, err := template.Expand(r, ext)
		if err != nil {
			return
		}
		if checkURL(expanded) != nil {
			t.Errorf("Expand = %q", expanded)
		}
		// Only what the template says of the ref can come back.
		labels := make(map[string]string)
		name := strings.TrimSuffix(prefix, "/")
		for _, v := range template.Variables() {
			if value, ok := r.Label(v); ok {
				labels[v] = value
			}
			if v == variableName {
				name = r.Name()
			}
		}
		want, err := acproxy.NewRef(name, labels)
		if err != nil {
			return
		}
		if again, err := template.Expand(want, ext); err != nil || again != expanded {
			return // without {name} the prefix may be no name, or not fit where the name did
		}
		m := template.MatchAll(expanded)
		for _, got := range m {
			if back, err := template.Expand(got.Ref, got.Ext); err != nil || unescaped(back) != unescaped(expanded) {
				t.Errorf("template %s: %q gives %v %s, and that gives %q, %v", template, expanded, got.Ref, got.Ext, back, err)
			}
		}
		if len(m) < maxRequests && len(template.Variables()) < 4 && !slices.Contains(m, Request{want, ext}) {
			t.Errorf("template %s: %v %s expands to %q, which does not give it back: %v", template, want, ext, expanded, m)
		}
	})
}
