package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/problem"
)

// A contract is the document as whoever has nothing else reads it.
type contract struct {
	t        *testing.T
	compiler *jsonschema.Compiler
	// responses are the media types and schemas of answers, by method and path, and status.
	paths map[string]map[string]struct {
		OperationID string `json:"operationId"`
		Responses   map[string]struct {
			Content map[string]any `json:"content"`
		} `json:"responses"`
	}
	held map[string]bool // the operations whose answers were held against it
}

func readContract(t *testing.T) *contract {
	t.Helper()
	var doc any
	if err := yaml.Unmarshal(document, &doc); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := &contract{t: t, compiler: jsonschema.NewCompiler(), held: make(map[string]bool)}
	c.compiler.AssertFormat()
	if err := c.compiler.AddResource("openapi.json", plain); err != nil {
		t.Fatal(err)
	}
	var paths struct {
		Paths any `json:"paths"`
	}
	if err := json.Unmarshal(text, &paths); err != nil {
		t.Fatal(err)
	}
	text, err = json.Marshal(paths.Paths)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &c.paths); err != nil {
		t.Fatal(err)
	}
	return c
}

// hold holds an answer against the document. path is as the document has it. It returns the schema that each of several parts of an answer has to fit.
func (c *contract) hold(method, path string, status int, mediaType string, content []byte) *jsonschema.Schema {
	c.t.Helper()
	op, ok := c.paths[path][strings.ToLower(method)]
	if !ok {
		c.t.Errorf("%s %s is not in the document", method, path)
		return nil
	}
	c.held[op.OperationID] = true
	key := fmt.Sprint(status)
	if _, ok := op.Responses[key]; !ok {
		key = "default"
	}
	if status == http.StatusNoContent {
		if _, ok := op.Responses["204"]; !ok || len(content) > 0 {
			c.t.Errorf("%s %s answers 204 with %q, which is not in the document", method, path, content)
		}
		return nil
	}
	mediaType, _, _ = strings.Cut(mediaType, ";")
	if _, ok := op.Responses[key].Content[mediaType]; !ok {
		c.t.Errorf("%s %s answers %d with %s; the document has %v", method, path, status, mediaType, slices.Collect(maps.Keys(op.Responses[key].Content)))
		return nil
	}
	escape := strings.NewReplacer("~", "~0", "/", "~1")
	schema, err := c.compiler.Compile("openapi.json#/paths/" + escape.Replace(path) + "/" + strings.ToLower(method) + "/responses/" + key + "/content/" + escape.Replace(mediaType) + "/schema")
	if err != nil {
		c.t.Fatal(err)
	}
	if strings.HasSuffix(mediaType, "json") && mediaType != typeLines {
		c.fits(schema, content)
	}
	return schema
}

func (c *contract) fits(schema *jsonschema.Schema, content []byte) {
	c.t.Helper()
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(content))
	if err == nil {
		err = schema.Validate(value)
	}
	if err != nil {
		c.t.Errorf("%s\ndoes not fit: %v", content, err)
	}
}

func TestAnswersFitTheDocument(t *testing.T) {
	sc := newScene(t, nil, 0)
	c := readContract(t)
	all := images()
	app := all[0].Record.Digest.String()
	brought, bytesOf := carried(t, 10)
	text, err := json.Marshal(brought)
	if err != nil {
		t.Fatal(err)
	}
	said := string(text)
	for _, call := range []struct {
		method, path, query string
		status              int
	}{
		{"GET", "/api/v1/images", "", 200},
		{"GET", "/api/v1/images", "?sort=size&reverse=true&limit=2&contains=example&state=ok", 200},
		{"GET", "/api/v1/images", "?limit=0", 422},
		{"GET", "/api/v1/images", "?limit=1001", 422},
		{"GET", "/api/v1/images", "?sort=colour", 422},
		{"GET", "/api/v1/images", "?after=zz", 400},
		{"GET", "/api/v1/images/{digest}", "", 200},
		{"GET", "/api/v1/images/sha256:" + strings.Repeat("0", 64), "", 404},
		{"GET", "/api/v1/images/nonsense", "", 400},
		{"GET", "/api/v1/images/{digest}/manifest", "", 200},
		{"GET", "/api/v1/images/{digest}/signature", "", 200},
		{"GET", "/api/v1/images/{digest}/dependencies", "", 200},
		{"GET", "/api/v1/image-ids/{digits}", "", 200},
		{"GET", "/api/v1/quarantine", "", 200},
		{"GET", "/api/v1/refusals", "", 200},
		{"GET", "/api/v1/missing", "", 200},
		{"GET", "/api/v1/usage", "", 200},
		{"GET", "/api/v1/gc", "", 200},
		{"GET", "/api/v1/gc", "?target=0", 200},
		{"GET", "/api/v1/gc", "?target=-2", 422},
		{"GET", "/api/v1/publishers", "", 200},
		{"GET", "/api/v1/flights", "", 200},
		{"GET", "/api/v1/discover", "?image=example.com/app:1", 200},
		{"GET", "/api/v1/discover", "?image=EXAMPLE", 400},
		{"GET", "/api/v1/discover", "", 422},
		{"GET", "/api/v1/keys", "", 200},
		{"POST", "/api/v1/keys/reload", "", 204},
		{"GET", "/api/v1/events", "", 200},
		{"GET", "/api/v1/events", "?limit=1&before=3&kind=accepted,reloaded", 200},
		{"GET", "/api/v1/about", "", 200},
		{"GET", "/api/v1/traffic", "?range=day", 200},
		{"GET", "/api/v1/config", "", 200},
		{"POST", "/api/v1/reload", "", 200},
		{"GET", "/api/v1/ready", "", 204},
		{"GET", "/api/v1/images/{digest}/image", "", 200},
		{"GET", "/api/v1/warm", "", 200},
		{"GET", "/api/v1/warm/{job}", "", 200},
		{"GET", "/api/v1/warm/{job}", "?after=1&limit=1&wait=1", 200},
		{"GET", "/api/v1/warm/{job}", "?wait=61", 422},
		{"DELETE", "/api/v1/warm/{job}", "", 200},
		{"POST", "/api/v1/warm", ` {"images":[{"image":"example.com/app:1.0","pin":true,"where":"a:1"}],"platforms":["linux/amd64"],"dryRun":true}`, 202},
		{"POST", "/api/v1/warm", ` {"images":[]}`, 400},
		{"POST", "/api/v1/warm", ` {"images":[{"image":"EXAMPLE"}]}`, 400},
		{"POST", "/api/v1/warm", ` {"images":[{"image":"example.com/app","colour":1}]}`, 422},
		{"PUT", "/api/v1/images/{digest}/pin", "", 200},
		{"DELETE", "/api/v1/images/{digest}/pin", "", 200},
		{"DELETE", "/api/v1/images/{digest}", "", 204},
		{"POST", "/api/v1/gc", "?target=0", 200},
		{"DELETE", "/api/v1/missing", "", 204},
		{"GET", "/api/v1/holdings", "", 200},
		{"POST", "/api/v1/export", ` {"all":true}`, 200},
		{"POST", "/api/v1/export", ` {"refs":["EXAMPLE"]}`, 422},
		{"POST", "/api/v1/import/examine", " " + said, 200},
		{"POST", "/api/v1/import/names", ` {"name":"example.com/brought","templates":[{"prefix":"example.com","url":"https://example.com/{name}.{ext}"}]}`, 200},
		{"POST", "/api/v1/import/images", " " + form(partCarried, said, partImage, string(bytesOf)), 200},
		{"POST", "/api/v1/import/images", "?verify=1x " + form(partCarried, said), 422},
	} {
		path := strings.NewReplacer("{digest}", app, "{digits}", strings.TrimPrefix(all[1].Record.ImageID.String(), "sha512-")[:12], "{job}", sc.job.ID).Replace(call.path)
		documented := call.path
		if strings.HasPrefix(documented, "/api/v1/images/") && !strings.Contains(documented, "{") {
			documented = "/api/v1/images/{digest}"
		}
		query, body, _ := strings.Cut(call.query, " ")
		req := httptest.NewRequestWithContext(t.Context(), call.method, "http://acproxy"+path+query, strings.NewReader(body))
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		if strings.HasPrefix(body, "--x") {
			req.Header.Set("Content-Type", formType)
		}
		w := httptest.NewRecorder()
		asCaller(caller{socket: true}, sc.s.router).ServeHTTP(w, req)
		if w.Code != call.status {
			t.Errorf("%s %s%s = %d, want %d: %s", call.method, call.path, call.query, w.Code, call.status, w.Body)
		}
		c.hold(call.method, documented, w.Code, w.Header().Get("Content-Type"), w.Body.Bytes())
	}
	sc.holdScrub(c)
	sc.holdLive(c, "/api/v1/flights/live")
	sc.holdLive(c, "/api/v1/events/live")
	for path, operations := range c.paths {
		for method, op := range operations {
			if !c.held[op.OperationID] {
				t.Errorf("no answer of %s %s was held against the document", method, path)
			}
		}
	}
}

func (sc *scene) holdScrub(c *contract) {
	sc.t.Helper()
	w := httptest.NewRecorder()
	asCaller(caller{socket: true}, sc.s.router).ServeHTTP(w, httptest.NewRequestWithContext(sc.t.Context(), "POST", "http://acproxy/api/v1/scrub", nil))
	schema := c.hold("POST", "/api/v1/scrub", w.Code, w.Header().Get("Content-Type"), w.Body.Bytes())
	lines := bytes.Split(bytes.TrimSpace(w.Body.Bytes()), []byte("\n"))
	for _, line := range lines {
		c.fits(schema, line)
	}
	if last := lines[len(lines)-1]; !bytes.HasPrefix(last, []byte(`{"done":`)) {
		sc.t.Errorf("a scrub ended with %s", last)
	}
}

// holdLive holds the first server-sent event of an operation against the document.
func (sc *scene) holdLive(c *contract, path string) {
	sc.t.Helper()
	ctx, cancel := context.WithCancel(sc.t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", sc.url+path, nil)
	if err != nil {
		sc.t.Fatal(err)
	}
	resp, err := sc.web.Do(req)
	if err != nil {
		sc.t.Fatal(err)
	}
	defer resp.Body.Close()
	schema := c.hold("GET", path, resp.StatusCode, resp.Header.Get("Content-Type"), nil)
	message := make(map[string]any)
	for s := bufio.NewScanner(resp.Body); s.Scan() && s.Text() != ""; {
		field, value, _ := strings.Cut(s.Text(), ": ")
		if message[field] = value; field == "data" {
			message[field] = json.RawMessage(value)
		}
	}
	text, err := json.Marshal([]any{message})
	if err != nil {
		sc.t.Fatal(err)
	}
	c.fits(schema, text)
}

// Who may do what: the whole of it, by who asks.
func TestRights(t *testing.T) {
	rules := []access.Rule{
		{Prefix: "", May: map[access.Right][]string{access.Read: {access.Anyone}, access.Pin: {"ci"}, access.Warm: {"ci"}, access.Admin: {"admin"}}},
		{Prefix: "secret.example.com", May: map[access.Right][]string{access.Read: {"ci"}, access.Admin: {"admin"}}},
	}
	app, secret := images()[0].Record.Digest.String(), images()[2].Record.Digest.String()
	type statuses struct{ nobody, node, ci, admin int }
	for _, tt := range []struct {
		method, path string
		open         int // without rules
		want         statuses
	}{
		{"GET", "/api/v1/images", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/images/" + app, 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/images/" + secret, 200, statuses{404, 404, 200, 200}},
		{"GET", "/api/v1/images/" + secret + "/manifest", 200, statuses{404, 404, 200, 200}},
		{"GET", "/api/v1/images/" + secret + "/signature", 200, statuses{404, 404, 200, 200}},
		{"GET", "/api/v1/images/" + secret + "/dependencies", 200, statuses{404, 404, 200, 200}},
		{"PUT", "/api/v1/images/" + app + "/pin", 403, statuses{401, 403, 200, 200}},
		{"DELETE", "/api/v1/images/" + app + "/pin", 403, statuses{401, 403, 200, 200}},
		{"PUT", "/api/v1/images/" + secret + "/pin", 403, statuses{404, 404, 403, 200}},
		{"GET", "/api/v1/images/" + secret + "/image", 200, statuses{404, 404, 200, 200}},
		{"GET", "/api/v1/warm", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/warm/{job}", 200, statuses{404, 404, 200, 200}},
		{"DELETE", "/api/v1/warm/{job}", 403, statuses{404, 404, 403, 200}},
		{"POST", `/api/v1/warm {"images":[{"image":"example.com/app:1"}]}`, 403, statuses{401, 403, 202, 202}},
		{"POST", `/api/v1/warm {"images":[{"image":"secret.example.com/db:1"},{"image":"example.com/app:1"}]}`, 403, statuses{401, 403, 403, 202}},
		{"GET", "/api/v1/quarantine", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/refusals", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/flights", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/events", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/keys", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/about", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/ready", 204, statuses{204, 204, 204, 204}},
		{"GET", "/api/v1/discover?image=example.com/app", 200, statuses{200, 200, 200, 200}},
		{"GET", "/api/v1/discover?image=secret.example.com/db", 200, statuses{401, 403, 200, 200}},
		{"GET", "/api/v1/missing", 200, statuses{200, 200, 200, 200}},
		{"DELETE", "/api/v1/missing", 403, statuses{401, 403, 403, 204}},
		{"GET", "/api/v1/usage", 200, statuses{401, 403, 403, 200}},
		{"GET", "/api/v1/gc", 200, statuses{401, 403, 403, 200}},
		{"GET", "/api/v1/publishers", 200, statuses{401, 403, 403, 200}},
		{"GET", "/api/v1/traffic", 200, statuses{401, 403, 403, 200}},
		{"GET", "/api/v1/config", 200, statuses{401, 403, 403, 200}},
		{"GET", "/metrics", 200, statuses{401, 403, 403, 200}},
		{"POST", "/api/v1/keys/reload", 403, statuses{401, 403, 403, 204}},
		{"POST", "/api/v1/reload", 403, statuses{401, 403, 403, 200}},
		{"POST", "/api/v1/scrub", 403, statuses{401, 403, 403, 200}},
		{"DELETE", "/api/v1/images/" + secret, 403, statuses{404, 404, 403, 204}},
		{"DELETE", "/api/v1/images/" + app, 403, statuses{401, 403, 403, 204}},
		{"POST", "/api/v1/gc", 403, statuses{401, 403, 403, 200}},
		{"GET", "/debug/pprof/", 404, statuses{404, 404, 404, 404}},
		{"GET", "/healthz", 200, statuses{200, 200, 200, 200}},
		{"GET", "/readyz", 200, statuses{200, 200, 200, 200}},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			if resp, text := newScene(t, nil, 0).ask("admin", tt.method, tt.path); resp.StatusCode != tt.open {
				t.Errorf("without rules %d, want %d: %s", resp.StatusCode, tt.open, text)
			}
			sc := newScene(t, rules, 0)
			for _, c := range []struct {
				who  string
				want int
			}{{"", tt.want.nobody}, {"node", tt.want.node}, {"ci", tt.want.ci}, {"admin", tt.want.admin}} {
				resp, text := sc.ask(c.who, tt.method, tt.path)
				if resp.StatusCode != c.want {
					t.Errorf("%q gets %d, want %d: %s", c.who, resp.StatusCode, c.want, text)
				}
				if asked := resp.Header.Get("Www-Authenticate") != ""; asked != (resp.StatusCode == http.StatusUnauthorized) {
					t.Errorf("%q gets %d with Www-Authenticate %q", c.who, resp.StatusCode, resp.Header.Values("Www-Authenticate"))
				}
			}
		})
	}
}

// What is listed is what the client may know of.
func TestListingsLeaveOutWhatIsNotForTheClient(t *testing.T) {
	sc := newScene(t, []access.Rule{
		{Prefix: "", May: map[access.Right][]string{access.Read: {access.Anyone}, access.Admin: {"admin"}}},
		{Prefix: "secret.example.com", May: map[access.Right][]string{access.Read: {"admin"}}},
	}, 0)
	secret := images()[2].Record
	for _, path := range []string{
		"images", "images?sort=size", "images?contains=" + secret.Digest.String(), "images/" + images()[0].Record.Digest.String() + "/dependencies",
		"image-ids/" + strings.TrimPrefix(secret.ImageID.String(), "sha512-")[:20], "refusals", "flights", "events", "missing", "warm", "quarantine",
	} {
		_, open := sc.ask("", "GET", "/api/v1/"+path)
		_, all := sc.ask("admin", "GET", "/api/v1/"+path)
		if strings.Contains(open, secret.Digest.String()) || strings.Contains(open, "secret.example.com/evil") || strings.Contains(open, "secret.example.com/big") || strings.Contains(open, "secret.example.com/db:7") {
			t.Errorf("%s tells everybody: %s", path, open)
		}
		if path != "quarantine" && path != "warm" && !strings.Contains(all, "secret.example.com") {
			t.Errorf("%s doesn't tell who may know: %s", path, all)
		}
		if strings.Contains(open, "192.0.2.1") {
			t.Errorf("%s tells everybody who else asks: %s", path, open)
		}
		if strings.Contains(all, "hashed") {
			t.Errorf("%s has hash states, which are of no use: %s", path, all)
		}
	}
	if _, text := sc.ask("", "GET", "/api/v1/missing"); strings.Contains(text, "secret") || strings.Contains(text, "example.com/base") || !strings.Contains(text, "example.com/none/more") {
		t.Errorf("missing is %s", text)
	}
	if _, text := sc.ask("", "GET", "/api/v1/events"); strings.Contains(text, "reloaded") {
		t.Errorf("events about the server are for everybody: %s", text)
	}
}

func TestWhoIsNotKnown(t *testing.T) {
	sc := newScene(t, nil, access.Bearer)
	for _, tt := range []struct {
		what   string
		who    string
		header []string
		want   int
		code   string
	}{
		{"nobody, where everybody has to show who he is", "", nil, 401, "credentials-needed"},
		{"a token that there isn't", "", []string{"Authorization", "Bearer acproxy_nonsense"}, 401, "credentials-invalid"},
		{"a way that isn't taken here", "", []string{"Authorization", "Basic YTpi"}, 401, "credentials-invalid"},
		{"a client", "ci", nil, 200, ""},
		{"under a name of somebody else's", "ci", []string{"Host", "rebound.example.net"}, 421, "foreign-name"},
		{"under a name of this machine", "ci", []string{"Host", "localhost:8081"}, 200, ""},
		{"by a page of somebody else's, looking", "ci", []string{"Sec-Fetch-Site", "cross-site"}, 200, ""},
	} {
		resp, text := sc.ask(tt.who, "GET", "/api/v1/about", tt.header...)
		if resp.StatusCode != tt.want || tt.code != "" && !strings.Contains(text, problem.Type+tt.code) {
			t.Errorf("%s: %d, want %d (%s): %s", tt.what, resp.StatusCode, tt.want, tt.code, text)
		}
	}
	if resp, _ := sc.ask("ci", "POST", "/api/v1/reload", "Sec-Fetch-Site", "cross-site"); resp.StatusCode != 403 {
		t.Errorf("a page of somebody else's may have a browser change something: %d", resp.StatusCode)
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if resp, _ := sc.ask("", "GET", path); resp.StatusCode != 200 {
			t.Errorf("%s = %d, want 200 for everybody", path, resp.StatusCode)
		}
	}
	sc.mu.Lock()
	sc.ready = errors.New("the disk is full")
	sc.mu.Unlock()
	if resp, text := sc.ask("", "GET", "/readyz"); resp.StatusCode != 503 || text != "the disk is full" {
		t.Errorf("/readyz = %d %s", resp.StatusCode, text)
	}
	if err := sc.client.Ready(); !errors.Is(err, acproxy.ErrBusy) || err.Error() != "the disk is full" {
		t.Errorf("Ready = %v", err)
	}
}

// The client is the store, as the server has it.
func TestClient(t *testing.T) {
	sc := newScene(t, nil, 0)
	c, direct, app := sc.client, sc.s.o.Store, images()[0]
	digest := app.Record.Digest
	for _, filter := range []cache.Filter{{}, {Sort: cache.BySize, Reverse: true}, {State: cache.Quarantined}, {Prefix: "example.com", Contains: "app"}, {Pinned: true}} {
		var got []string
		for after, more := "", true; more; more = after != "" {
			page, next, err := c.Images(filter, after, 1)
			if err != nil {
				t.Fatal(err)
			}
			for _, rec := range page {
				got = append(got, rec.Name)
			}
			after = next
		}
		want, _, err := direct.Images(filter, "", 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) || len(got) > 0 && got[0] != want[0].Name {
			t.Errorf("Images(%+v) = %v, want %d images", filter, got, len(want))
		}
	}
	if manifest, err := c.Manifest(digest); err != nil || !bytes.Equal(manifest, app.Manifest) {
		t.Errorf("Manifest = %q, %v, want it byte for byte", manifest, err)
	}
	if signature, err := c.Signature(digest); err != nil || !bytes.Equal(signature, app.Signature) {
		t.Errorf("Signature = %q, %v", signature, err)
	}
	needed, err := c.Dependencies(digest)
	if err != nil || len(needed) != 3 || needed[0].Held == nil || needed[1].Held != nil || len(needed[0].Dependencies) != 1 || !needed[0].Dependencies[0].Cycle {
		t.Errorf("Dependencies = %+v, %v; want base, which needs app again, and one that isn't held", needed, err)
	}
	if err := c.Pin(t.Context(), digest, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Pin(t.Context(), digest, true); err != nil {
		t.Fatal(err)
	}
	if rec, err := c.Record(digest); err != nil || !rec.Pinned {
		t.Errorf("Record = %+v, %v", rec, err)
	}
	if err := c.Pin(t.Context(), digest, false); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(t.Context(), digest); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Record(digest); !errors.Is(err, acproxy.ErrNotFound) || acproxy.Code(err) != "not-held" {
		t.Errorf("Record of what was deleted = %v", err)
	}
	if err := c.Delete(t.Context(), digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Delete again = %v", err)
	}
	var did []string
	for _, d := range sc.did {
		did = append(did, d.Event+" "+d.Ref.String()+" by "+d.Client)
	}
	const ref = " example.com/app:1,arch=amd64,os=linux by admin.socket"
	if want := []string{"pinned" + ref, "unpinned" + ref, "deleted" + ref}; !slices.Equal(did, want) {
		t.Errorf("it is written down that %q, want %q", did, want)
	}
	if changes, err := c.Reload(); err != nil || len(changes) != 1 || changes[0].Key != "offline" {
		t.Errorf("Reload = %v, %v", changes, err)
	}
	if text, err := c.Config(); err != nil || string(text) != "offline: false\n" {
		t.Errorf("Config = %s, %v", text, err)
	}
	if events, err := c.Events(10, fetch.EventAccepted); err != nil || len(events) != 2 || events[0].ID != 2 {
		t.Errorf("Events = %+v, %v", events, err)
	}
	if found, err := c.Discover(t.Context(), app.Refs[0].Ref); err != nil || found.Ref != app.Refs[0].Ref || len(found.Endpoints) != 1 {
		t.Errorf("Discover = %+v, %v", found, err)
	}
	if sum, err := c.Scrub(t.Context(), cache.ScrubOptions{}); err != nil || sum.Images == 0 {
		t.Errorf("Scrub = %+v, %v", sum, err)
	}
	if freed, err := c.Evict(t.Context(), 0); err != nil || freed.Count == 0 {
		t.Errorf("Evict = %+v, %v", freed, err)
	}
}

func TestWatching(t *testing.T) {
	sc := newScene(t, nil, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	enough := errors.New("enough")
	var ids []int64
	err := sc.client.WatchEvents(ctx, 1, func(e journal.Event) error {
		if ids = append(ids, e.ID); len(ids) == 2 {
			sc.s.o.Journal.Add(fetch.Decision{Time: time.Now(), Event: journal.EventStarted})
		}
		if len(ids) == 3 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !slices.Equal(ids, []int64{2, 3, 4}) {
		t.Errorf("WatchEvents told of %v, %v", ids, err)
	}
	var sizes []int
	err = sc.client.WatchFlights(ctx, func(flights []fetch.FlightState) error {
		sizes = append(sizes, len(flights))
		sc.mu.Lock()
		sc.flights = nil
		sc.mu.Unlock()
		if len(flights) == 0 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !slices.Equal(sizes, []int{2, 0}) {
		t.Errorf("WatchFlights told of %v flights, %v", sizes, err)
	}
	// The end of the server ends it.
	done := make(chan error, 1)
	// Ends with the server; read below.
	go func() { done <- sc.client.WatchEvents(ctx, -1, func(journal.Event) error { return nil }) }()
	time.AfterFunc(50*time.Millisecond, sc.s.EndLive)
	if err := <-done; err != nil {
		t.Errorf("WatchEvents = %v when the server ends", err)
	}
}

func TestFieldsOfProblems(t *testing.T) {
	sc := newScene(t, nil, 0)
	for path, code := range map[string]string{"/api/v1/nothing": "no-such-path", "/api/v1/images?limit=x": "invalid", "/api/v1/images/sha256:" + strings.Repeat("0", 64): "not-held"} {
		resp, text := sc.ask("", "GET", path)
		var p problem.Problem
		if err := json.Unmarshal([]byte(text), &p); err != nil || p.Type != problem.Type+code || p.Status != resp.StatusCode || resp.Header.Get("Content-Type") != problem.ContentType {
			t.Errorf("%s: %v, %s %s; want a problem %s", path, err, resp.Header.Get("Content-Type"), text, code)
		}
	}
	if resp, _ := sc.ask("", "PATCH", "/api/v1/images"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("PATCH = %d", resp.StatusCode)
	}
}
