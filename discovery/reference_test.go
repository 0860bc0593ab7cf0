package discovery

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	reference "github.com/appc/spec/discovery"
	"github.com/appc/spec/schema/types"

	"github.com/acproxy/acproxy"
)

// inMemory answers the reference library's requests from a map of pages by name; the rest is 404.
type inMemory struct {
	mu    sync.Mutex
	pages map[string]string
}

func (m *inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	m.mu.Lock()
	body, ok := m.pages[r.URL.Host+r.URL.Path]
	m.mu.Unlock()
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}
	if !ok {
		resp.StatusCode = http.StatusNotFound
	}
	return resp, nil
}

// consult makes the reference library ask m, until the end of the test.
func consult(tb testing.TB, m *inMemory) {
	tb.Helper()
	before := reference.Client.Transport
	reference.Client.Transport = m
	tb.Cleanup(func() { reference.Client.Transport = before })
}

// theirs returns what the reference library discovers: the URLs of the images and their signatures, and of keys.
func theirs(r acproxy.Ref) (endpoints []string, keys []string) {
	labels := make(map[types.ACIdentifier]string)
	for label, value := range r.Labels() {
		labels[types.ACIdentifier(label)] = value
	}
	app := reference.App{Name: types.ACIdentifier(r.Name()), Labels: labels}
	found, _, err := reference.DiscoverACIEndpoints(app, nil, reference.InsecureNone, 0)
	if err == nil {
		for _, e := range found {
			endpoints = append(endpoints, e.ACI+" "+e.ASC)
		}
	}
	if found, _, err := reference.DiscoverPublicKeys(app, nil, reference.InsecureNone, 0); err == nil {
		keys = found
	}
	return endpoints, keys
}

// expandAll returns the URLs of the image and its signature by each template that can be used for a ref.
func expandAll(templates []Template, r acproxy.Ref) []string {
	var urls []string
	for _, t := range templates {
		image, err := t.Expand(r, ExtImage)
		if err != nil {
			continue
		}
		signature, err := t.Expand(r, ExtSignature)
		if err != nil {
			continue
		}
		urls = append(urls, image+" "+signature)
	}
	return urls
}

// difference names the reason for which we mean to differ from the reference library on a tag, "" if there is none. Labels called "name"
// and "ext", which break the library, don't come up: no ref can have them.
func difference(t Template, r acproxy.Ref) string {
	if strings.HasPrefix(r.Name(), t.Prefix) != acproxy.HasPrefix(r.Name(), t.Prefix) {
		return "prefixes match by segments, not as strings"
	}
	if strings.ContainsFunc(t.Prefix+t.URL, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "any white space separates prefix and URL, not only a space, and a URL holds none"
	}
	if t.usable() && !t.signed() {
		return "without {ext} the signature is beside the image, not the image itself"
	}
	for _, v := range t.Variables() {
		if value, _ := r.Label(v); escape(value) != value {
			return "values are escaped, and never taken for variables in their turn"
		}
	}
	values := r.Labels()
	values[variableName], values[variableExt] = r.Name(), ExtImage
	if _, ok := values[acproxy.LabelVersion]; !ok {
		values[acproxy.LabelVersion] = latest
	}
	if expanded, err := t.expand(values); err == nil && checkURL(expanded) != nil {
		return "what is not a plain http or https URL is no use"
	}
	if braces := variable.ReplaceAllString(t.URL, ""); strings.ContainsAny(braces, "{}") {
		return "braces within braces are no variable, and which one the library finds in them depends on the order of its map"
	}
	return ""
}

// compare checks what a page gives for a ref, tag by tag, against the reference library.
func compare(t *testing.T, m *inMemory, page string, r acproxy.Ref) {
	t.Helper()
	tags, err := Parse(strings.NewReader(page))
	if err != nil {
		return
	}
	same := true
	var wantEndpoints []string
	for _, template := range tags.Templates {
		if difference(template, r) != "" {
			same = false
			continue
		}
		wantEndpoints = append(wantEndpoints, expandAll(Tags{Templates: []Template{template}}.For(r.Name()).Templates, r)...)
	}
	m.mu.Lock()
	m.pages = map[string]string{r.Name(): page}
	m.mu.Unlock()
	endpoints, keys := theirs(r)
	// Every URL that we share a view on, they have too, in the same order; and where there is no difference they have no other.
	rest := endpoints
	for _, want := range wantEndpoints {
		at := slices.Index(rest, want)
		if at < 0 {
			t.Fatalf("%v on %q: we find %q, they find %q", r, page, wantEndpoints, endpoints)
		}
		rest = rest[at+1:]
	}
	if same && !strings.ContainsAny(page, "\t\n\f\r") && len(wantEndpoints) != len(endpoints) && wellFormed(endpoints) {
		t.Fatalf("%v on %q: we find %q, they find %q", r, page, wantEndpoints, endpoints)
	}
	rest = keys
	for _, key := range tags.For(r.Name()).Keys {
		if difference(Template{key.Prefix, "https://h/{ext}"}, r) != "" || strings.ContainsFunc(key.URL, func(c rune) bool { return c <= ' ' || c > '~' }) {
			continue
		}
		at := slices.Index(rest, key.URL)
		if at < 0 {
			t.Fatalf("%v on %q: we find the key %q, they find %q", r, page, key.URL, keys)
		}
		rest = rest[at+1:]
	}
}

// wellFormed reports whether the reference library found URLs without white space: contents of more than two words, which are no tags to us.
func wellFormed(endpoints []string) bool {
	return !slices.ContainsFunc(endpoints, func(both string) bool { return len(strings.Fields(both)) != 2 })
}

func FuzzAgainstReference(f *testing.F) {
	m := &inMemory{}
	consult(f, m)
	f.Add(tag("example.com", "https://h/{os}/{name}-{version}.{ext}")+keyTag("example.com", "https://h/key"), "example.com/app:1.0,os=linux")
	f.Add(tag("example.com/a", "https://h/{name}.{ext}")+tag("example.com/app", "https://i/{channel}.{ext}"), "example.com/app,channel=a")
	f.Add("<!--"+tag("example.com", "https://h/{name}.{ext}")+"--><script>"+tag("example.com", "https://h/{name}.{ext}")+"</script>", "example.com/app")
	f.Fuzz(func(t *testing.T, page, text string) {
		r, err := acproxy.ParseRef(text)
		if err != nil || len(page) > 4096 {
			return
		}
		compare(t, m, page, r)
	})
}

// TestDifferences shows each difference from the reference library that we mean to have.
func TestDifferences(t *testing.T) {
	m := &inMemory{}
	consult(t, m)
	tests := []struct {
		name, page, ref string
		ours, theirs    []string
	}{
		{"prefixes match by segments", tag("example.com/app", "https://evil/{name}.{ext}"), "example.com/apple", nil, []string{"https://evil/example.com/apple.aci https://evil/example.com/apple.aci.asc"}},
		{"values are escaped", tag("example.com", "https://h/{version}.{ext}"), "example.com/app:1+2", []string{"https://h/1%2B2.aci https://h/1%2B2.aci.asc"}, []string{"https://h/1+2.aci https://h/1+2.aci.asc"}},
		{"values are no variables", tag("example.com", "https://h/{version}.{ext}"), "example.com/app:{x}", []string{"https://h/%7Bx%7D.aci https://h/%7Bx%7D.aci.asc"}, nil},
		{"dot segments are refused", tag("example.com", "https://h/{version}/x.{ext}"), "example.com/app:..", nil, []string{"https://h/../x.aci https://h/../x.aci.asc"}},
		{"other schemes are refused", tag("example.com", "hdfs://h/x.{ext}"), "example.com/app", nil, []string{"hdfs://h/x.aci hdfs://h/x.aci.asc"}},
		{"without {ext} the signature is beside the image", tag("example.com", "https://h/x.aci"), "example.com/app", []string{"https://h/x.aci https://h/x.aci.asc"}, []string{"https://h/x.aci https://h/x.aci"}},
		{"three words are no tag", tag("example.com", "https://h/x.{ext} y"), "example.com/app", nil, []string{"https://h/x.aci y https://h/x.aci.asc y"}},
		{"a new line separates as a space does", tag("example.com\n", "https://h/x.{ext}"), "example.com/app", []string{"https://h/x.aci https://h/x.aci.asc"}, nil},
		{"the same: a variable left over", tag("example.com", "https://h/{x}.{ext}"), "example.com/app", nil, nil},
		{"the same: the latest", tag("example.com", "https://h/{version}.{ext}"), "example.com/app", []string{"https://h/latest.aci https://h/latest.aci.asc"}, []string{"https://h/latest.aci https://h/latest.aci.asc"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := ref(t, tt.ref)
			tags, err := Parse(strings.NewReader(tt.page))
			if err != nil {
				t.Fatal(err)
			}
			m.pages = map[string]string{r.Name(): tt.page}
			found, _ := theirs(r)
			if got := expandAll(tags.For(r.Name()).Templates, r); !slices.Equal(got, tt.ours) || !slices.Equal(found, tt.theirs) {
				t.Errorf("ours %q, want %q; theirs %q, want %q", got, tt.ours, found, tt.theirs)
			}
		})
	}
}

// TestWalksLikeTheReference generates sites and names, and compares whole walks. Two more differences: a page whose templates need a label
// that was not asked for ends our walk, which does not know the labels, and not theirs; so every template here can be expanded. And they
// climb on an outage; so there is none.
func TestWalksLikeTheReference(t *testing.T) {
	m := &inMemory{}
	consult(t, m)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	name := func() string {
		n := "example.com"
		for range rnd.IntN(4) {
			n += "/" + pick("a", "b", "c-d")
		}
		return n
	}
	s := newSite(t, nil)
	wc := s.web()
	for range 150 {
		pages := make(map[string]string)
		for range rnd.IntN(5) {
			var page strings.Builder
			for range rnd.IntN(4) {
				template := "https://" + pick("h", "{os}.h") + "/" + pick("{name}", "{os}/{name}", "x") + "-{version}." + pick("{ext}", "{ext}?{arch}")
				tags := []string{tag(name(), template), keyTag(name(), "https://h/"+pick("1", "2", "3")), "<!--" + tag(name(), template) + "-->", "<p>text", tag("other.com", template)}
				page.WriteString(pick(tags...))
			}
			pages[name()] = page.String()
		}
		r := ref(t, name()+pick("", ":1.0")+",os=linux,arch=amd64")
		m.pages = pages
		wantEndpoints, wantKeys := theirs(r)
		s.mu.Lock()
		s.pages = make(map[string]string)
		for n, page := range pages {
			if !strings.Contains(n, "/") {
				n += "/"
			}
			s.pages[n] = page
		}
		s.mu.Unlock()
		f := finder(t, Config{}, wc)
		found, err := f.Templates(t.Context(), r.Name())
		if got := expandAll(found.Templates, r); !slices.Equal(got, wantEndpoints) || (err == nil) != (len(wantEndpoints) > 0) {
			t.Errorf("%v on %q: endpoints %q, %v, want %q", r, pages, got, err, wantEndpoints)
		}
		found, err = f.Keys(t.Context(), r.Name())
		if !slices.Equal(found.Keys, wantKeys) || (err == nil) != (len(wantKeys) > 0) {
			t.Errorf("%v on %q: keys %q, %v, want %q", r, pages, found.Keys, err, wantKeys)
		}
		f.cfg.Web.Close()
	}
}

func ExampleTemplate_Expand() {
	tags, err := Parse(strings.NewReader(`<meta name="ac-discovery" content="example.com https://storage.example.com/{os}/{arch}/{name}-{version}.{ext}">`))
	if err != nil {
		fmt.Println(err)
		return
	}
	ref, err := acproxy.ParseRef("example.com/reduce-worker:1.0.0,os=linux,arch=amd64")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, template := range tags.For(ref.Name()).Templates {
		fmt.Println(template.Expand(ref, ExtSignature))
		fmt.Println(template.Expand(ref, ExtImage))
		fmt.Println(template.Match("https://storage.example.com/linux/amd64/example.com/reduce-worker-latest.aci"))
	}
	// Output:
	// https://storage.example.com/linux/amd64/example.com/reduce-worker-1.0.0.aci.asc <nil>
	// https://storage.example.com/linux/amd64/example.com/reduce-worker-1.0.0.aci <nil>
	// example.com/reduce-worker,arch=amd64,os=linux aci true
}
