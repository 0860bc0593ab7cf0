package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"maps"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// publishing has a prefix published here, and lets anybody push but for what is secret.
const publishing = `
publishers:
  - {prefix: example.com, ca_file: $CA}
  - {prefix: example.com/ours, publisher: local}
fetch: {hold_back: 1KiB, max_image_size: 64KiB, max_signature_size: 4KiB, limits: {max_manifest: 4KiB, max_ratio: 20, max_uncompressed: 2MiB}}
access:
  rules:
    - {prefix: "", read: [anyone]}
    - {prefix: example.com/ours, read: [anyone], push: [anyone]}
    - {prefix: example.com/ours/secret, read: [anyone], push: [ci]}
`

// An uploader is a client of acpush 0.0.1, as the protocol's own is: it renders the first push template of the discovery page, sends what it sends chunked,
// takes 200 and 400 for an answer, and looks at the reason of a 400 in the end only. It uses nothing of acproxy.
type uploader struct {
	s     *scene
	http  *http.Client
	token string

	urls map[string]string
}

func (s *scene) uploader() *uploader { return &uploader{s: s, http: s.secureClient()} }

var pushTag = regexp.MustCompile(`<meta name="ac-push-discovery" content="(\S+) (\S+)">`)

// request asks, and returns the status and the body.
func (u *uploader) request(method, url string, body io.Reader) (int, []byte) {
	u.s.t.Helper()
	if body != nil {
		body = struct{ io.Reader }{body} // chunked
	}
	req := must(http.NewRequestWithContext(u.s.context(), method, url, body))(u.s.t)
	if u.token != "" {
		req.Header.Set("Authorization", "Bearer "+u.token)
	}
	resp, err := u.http.Do(req)
	if err != nil {
		u.s.t.Errorf("%s %s: %v", method, url, err)
		return 0, nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		u.s.t.Errorf("%s %s: %v", method, url, err)
	}
	return resp.StatusCode, text
}

// begin finds out where to push, and begins. It returns the status.
func (u *uploader) begin(name string, labels map[string]string) int {
	u.s.t.Helper()
	status, page := u.request(http.MethodGet, "https://"+name+"?ac-discovery=1", nil)
	tag := pushTag.FindSubmatch(page)
	if status != http.StatusOK || tag == nil || !strings.HasPrefix(name, string(tag[1])) {
		u.s.t.Errorf("the page of %s has no push tag: %d %s", name, status, page)
		return 0
	}
	url := strings.ReplaceAll(html.UnescapeString(string(tag[2])), "{name}", name)
	for label, value := range labels {
		url = strings.ReplaceAll(url, "{"+label+"}", value)
	}
	status, text := u.request(http.MethodPost, url, nil)
	if status == http.StatusOK {
		u.urls = make(map[string]string)
		var all map[string]any
		if err := json.Unmarshal(text, &all); err != nil || all["aci_push_version"] != "0.0.1" || all["multipart"] != false {
			u.s.t.Errorf("an upload begins with %s", text)
		}
		for key, part := range map[string]string{"upload_manifest_url": "manifest", "upload_signature_url": "signature", "upload_aci_url": "image", "completed_url": "completed"} {
			u.urls[part], _ = all[key].(string)
			if !strings.HasPrefix(u.urls[part], "https://example.com/.acproxy/push/") {
				u.s.t.Errorf("%s is %q", key, u.urls[part])
			}
		}
	}
	return status
}

type pushVerdict struct {
	Success      bool
	Reason       string
	ServerReason string `json:"server_reason"`
	Code         string
}

// put sends a part, and returns the status and what the answer says.
func (u *uploader) put(part string, content []byte) (int, pushVerdict) {
	u.s.t.Helper()
	return u.verdict(u.request(http.MethodPut, u.urls[part], bytes.NewReader(content)))
}

func (u *uploader) complete(said string) (int, pushVerdict) {
	u.s.t.Helper()
	return u.verdict(u.request(http.MethodPost, u.urls["completed"], strings.NewReader(said)))
}

func (u *uploader) verdict(status int, text []byte) (int, pushVerdict) {
	var v pushVerdict
	if err := json.Unmarshal(text, &v); err != nil {
		u.s.t.Errorf("%d %s: %v", status, text, err)
	}
	return status, v
}

// push uploads an image as the protocol's own client does. labels are what it was told beside what the manifest says.
func (u *uploader) push(p pushed) pushVerdict {
	u.s.t.Helper()
	if status := u.begin(p.name, p.labels); status != http.StatusOK {
		u.s.t.Errorf("beginning an upload of %s: %d", p.name, status)
		return pushVerdict{}
	}
	for _, part := range []string{"manifest", "signature", "image"} {
		if status, _ := u.put(part, p.parts[part]); status != http.StatusOK && status != http.StatusBadRequest {
			u.s.t.Errorf("sending the %s: %d, which the client takes for no answer", part, status)
		}
	}
	status, v := u.complete(`{"success":true}`)
	if status != http.StatusOK && status != http.StatusBadRequest || v.Success != (status == http.StatusOK) || !v.Success && v.ServerReason == "" {
		u.s.t.Errorf("the end of an upload: %d %+v", status, v)
	}
	return v
}

// pushed is what is pushed.
type pushed struct {
	image
	parts map[string][]byte
}

func manifestOf(name string, labels map[string]string) []byte {
	var all []string
	for n, v := range labels {
		all = append(all, fmt.Sprintf(`{"name":%q,"value":%q}`, n, v))
	}
	return fmt.Appendf(nil, `{"acKind":"ImageManifest","acVersion":"0.8.11","name":%q,"labels":[%s]}`, name, strings.Join(all, ","))
}

// ours makes an image that is published here, signed by a key.
func (s *scene) ours(spec acitest.Spec, key *trusttest.Key) pushed {
	s.t.Helper()
	if spec.Labels == nil {
		spec.Labels = standard("1.0.0")
	}
	// The publisher knows of it too, so that it shows if he is asked.
	im := s.publishImage(publisher.Image{Name: spec.Name, Labels: spec.Labels, ACI: acitest.Must(s.t, spec), Signature: []byte("none")})
	p := pushed{image: im, parts: map[string][]byte{"manifest": manifestOf(spec.Name, spec.Labels), "image": im.aci}}
	p.parts["signature"] = s.sign(key, im.aci, trusttest.SignOptions{})
	return p
}

func ours(name, version string) acitest.Spec {
	spec := app("ours/" + name)
	spec.Files = map[string]string{"hello.txt": "hello from " + name + " " + version}
	spec.Labels = standard(version)
	return spec
}

func (s *scene) wantNobodyAsked() {
	s.t.Helper()
	if asked := s.publisher.Requests(); len(asked) > 0 {
		s.t.Errorf("the publisher was asked: %v", asked)
	}
}

func TestPush(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing)
	u := s.uploader()
	first := s.ours(ours("app", "1.0.0"), s.key)
	wantProblem(t, s.get(s.direct(first.image, "aci")), http.StatusNotFound, "not-published")
	if v := u.push(first); !v.Success {
		t.Fatalf("push: %+v", v)
	}
	s.fetchAsRkt(s.node, first.image)
	if v := u.push(first); !v.Success {
		t.Errorf("the same again: %+v", v)
	}
	// The verdict is told again.
	if status, v := u.complete(`{"success":true}`); status != http.StatusOK || !v.Success {
		t.Errorf("completed twice: %d %+v", status, v)
	}
	if status, v := u.put("image", first.aci); status != http.StatusBadRequest || v.Code != "upload-over" {
		t.Errorf("a part after the end: %d %+v", status, v)
	}
	changed := s.ours(func() acitest.Spec {
		spec := ours("app", "1.0.0")
		spec.Files["other.txt"] = "this is another one"
		return spec
	}(), s.key)
	if v := u.push(changed); v.Code != "changed-upstream" || !strings.Contains(v.ServerReason, "a version doesn't change") {
		t.Errorf("the same version with another image: %+v", v)
	}
	second := s.ours(ours("app", "2.0.0"), s.key)
	if v := u.push(second); !v.Success {
		t.Errorf("the next version: %+v", v)
	}
	latest := second.image
	latest.labels = map[string]string{"os": "linux", "arch": "amd64"}
	s.fetchAsRkt(s.node, latest)
	s.fetchAsRkt(s.node, first.image)
	// One that was signed before doesn't become the latest.
	older := s.ours(ours("app", "0.9.0"), s.key)
	older.parts["signature"] = s.sign(s.key, older.aci, trusttest.SignOptions{Time: time.Now().Add(-time.Second * 5)})
	if v := u.push(older); !v.Success {
		t.Errorf("an older version: %+v", v)
	}
	s.fetchAsRkt(s.node, older.image)
	s.fetchAsRkt(s.node, latest)
	s.restart(syscall.SIGKILL)
	for _, im := range []image{first.image, second.image, older.image, latest} {
		s.fetchAsRkt(s.node, im)
	}
	if code, out := s.cli("discover", first.name+":1.0.0"); code == 0 || !strings.Contains(out, "published here") {
		t.Errorf("acproxy discover = %d\n%s", code, out)
	}
	s.wantNobodyAsked()
	s.server().end(sigterm)
	if code, out := s.cli("fsck"); code != 0 {
		t.Errorf("acproxy fsck = %d\n%s", code, out)
	}
}

// TestHostilePushes pushes what must not get in. Nothing of it is served, whatever the client does.
func TestHostilePushes(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing)
	noise := func(n int) []byte {
		// What can't be compressed, the same each time.
		return acitest.Must(t, acitest.Spec{Name: "example.com/noise", RootfsSize: int64(n), Seed: 7})[:n]
	}
	for _, tt := range []struct {
		name   string
		change func(p *pushed)
		code   string
	}{
		{"an unknown key", func(p *pushed) { p.parts["signature"] = s.sign(stranger(t), p.aci, trusttest.SignOptions{}) }, "unknown-key"},
		{"the signature of another image", func(p *pushed) { p.parts["signature"] = s.sign(s.key, []byte("other"), trusttest.SignOptions{}) }, "bad-signature"},
		{"no signature at all", func(p *pushed) { p.parts["signature"] = nil }, "malformed-signature"},
		{"a truncated image", func(p *pushed) { p.parts["image"] = p.aci[:len(p.aci)-1] }, "bad-signature"},
		{"a truncated image that is signed", func(p *pushed) {
			p.parts["image"] = p.aci[:len(p.aci)-20]
			p.parts["signature"] = s.sign(s.key, p.parts["image"], trusttest.SignOptions{})
		}, ""},
		{"a flipped bit", func(p *pushed) {
			p.parts["image"] = bytes.Clone(p.aci)
			p.parts["image"][len(p.aci)/2] ^= 1
		}, "bad-signature"},
		{"a manifest of another name", func(p *pushed) { p.parts["manifest"] = manifestOf("example.com/ours/other", p.labels) }, "wrong-name"},
		{"a manifest of another version", func(p *pushed) { p.parts["manifest"] = manifestOf(p.name, standard("9.0.0")) }, "wrong-labels"},
		{"a manifest with a label more", func(p *pushed) {
			labels := maps.Clone(p.labels)
			labels["channel"] = "beta"
			p.parts["manifest"] = manifestOf(p.name, labels)
		}, "wrong-labels"},
		{"a manifest with a label less", func(p *pushed) {
			labels := maps.Clone(p.labels)
			labels["channel"] = "beta"
			*p = s.ours(acitest.Spec{Name: p.name, Labels: labels}, s.key)
			p.parts["manifest"] = manifestOf(p.name, standard("1.0.0"))
		}, "not-as-announced"},
		{"the image of another name", func(p *pushed) {
			other := s.ours(ours("another", "1.0.0"), s.key)
			p.parts["image"], p.parts["signature"] = other.parts["image"], other.parts["signature"]
		}, "wrong-name"},
		{"no manifest but something else", func(p *pushed) { p.parts["manifest"] = []byte("{") }, ""},
		{"an endless manifest", func(p *pushed) { p.parts["manifest"] = bytes.Repeat([]byte(" "), 4<<10+1) }, "manifest-too-large"},
		{"an endless signature", func(p *pushed) { p.parts["signature"] = noise(4<<10 + 1) }, "signature-too-large"},
		{"an image that is too large", func(p *pushed) { p.parts["image"] = noise(64<<10 + 1) }, "image-too-large"},
		{"a bomb", func(p *pushed) {
			*p = s.ours(acitest.Spec{Name: p.name, Labels: p.labels, Extra: []acitest.Entry{acitest.File("rootfs/zeros", strings.Repeat("\x00", 3<<20))}}, s.key)
		}, ""},
		{"a file outside", func(p *pushed) {
			*p = s.ours(acitest.Spec{Name: p.name, Labels: p.labels, Extra: []acitest.Entry{acitest.File("rootfs/../../etc/passwd", "root")}}, s.key)
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := s.uploader()
			p := s.ours(ours("hostile", "1.0.0"), s.key)
			tt.change(&p)
			v := u.push(p)
			if v.Success || tt.code != "" && v.Code != tt.code {
				t.Errorf("%+v, want %s", v, tt.code)
			}
			wantStatus(t, s.get(s.direct(p.image, "aci")), http.StatusNotFound)
		})
	}
	s.wantNobodyAsked()
	if code, out := s.cli("images"); code != 0 || !strings.Contains(out, "0 images") {
		t.Errorf("acproxy images = %d\n%s", code, out)
	}
}

// TestPushAtTheEdge pushes what is exactly as large as it may be.
func TestPushAtTheEdge(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing)
	p := s.ours(acitest.Spec{Name: imageHost + "/ours/edge", RootfsSize: 50 << 10, Seed: 1}, s.key)
	s.server().end(sigterm)
	for _, size := range []int{len(p.aci) - 1, len(p.aci)} {
		s.configure(strings.Replace(publishing, "max_image_size: 64KiB", fmt.Sprintf("max_image_size: %d", size), 1))
		s.start()
		p.parts["manifest"] = append(manifestOf(p.name, p.labels), bytes.Repeat([]byte(" "), 4<<10)...)[:4<<10]
		if v := s.uploader().push(p); v.Success != (size == len(p.aci)) {
			t.Errorf("an image of %d bytes, where %d may be: %+v", len(p.aci), size, v)
		}
		s.server().end(sigterm)
	}
}

// TestPushSteps does the steps of the protocol in other orders than the client does.
func TestPushSteps(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing+"push: {max_uploads: 3}\n")
	p := s.ours(ours("steps", "1.0.0"), s.key)
	u := s.uploader()
	u.begin(p.name, p.labels)
	if status, v := u.complete(`{"success":true}`); status != http.StatusBadRequest || v.Code != "incomplete-upload" || !strings.Contains(v.ServerReason, "manifest, image missing") {
		t.Errorf("completed before anything was there: %d %+v", status, v)
	}
	if status, _ := u.complete(`nonsense`); status != http.StatusBadRequest {
		t.Errorf("completed with nonsense: %d", status)
	}
	u.put("image", []byte("this is not it"))
	u.put("image", p.aci)
	u.put("manifest", []byte("nor is this"))
	if status, v := u.complete(`{"success":true}`); status != http.StatusBadRequest || v.ServerReason == "" {
		t.Errorf("with a manifest that can't be read: %d %+v", status, v)
	}
	u.put("manifest", p.parts["manifest"])
	u.put("signature", p.parts["signature"])
	if status, v := u.complete(`{"success":true}`); status != http.StatusOK || !v.Success {
		t.Errorf("with all of it: %d %+v", status, v)
	}
	s.fetchAsRkt(s.node, p.image)

	u.begin(p.name, p.labels)
	if status, v := u.complete(`{"success":false,"reason":"the disk is on fire"}`); status != http.StatusOK || v.Success || v.Reason != "the disk is on fire" {
		t.Errorf("given up: %d %+v", status, v)
	}
	if status, v := u.put("image", p.aci); status != http.StatusBadRequest || v.Code != "upload-over" {
		t.Errorf("a part of what was given up: %d %+v", status, v)
	}

	known := u.urls["image"]
	for _, url := range []string{
		strings.Replace(known, "/-/", "/-/../", 1), strings.Replace(known, "/-/", "/-/%2e%2e/", 1), known + "/../manifest", strings.TrimSuffix(known, "image") + "rootfs",
		strings.Replace(known, "/-/", "/-/a", 1),
	} {
		if status, _ := u.request(http.MethodPut, url, strings.NewReader("x")); status != http.StatusNotFound {
			t.Errorf("PUT %s = %d, want 404", url, status)
		}
	}
	if status, _ := u.request(http.MethodGet, known, nil); status != http.StatusMethodNotAllowed {
		t.Errorf("GET of a part = %d", status)
	}
	u.urls["image"] = regexp.MustCompile(`-/[A-Z2-7]+/`).ReplaceAllString(known, "-/"+strings.Repeat("A", 26)+"/")
	if status, v := u.put("image", p.aci); status != http.StatusBadRequest || v.Code != "no-such-upload" {
		t.Errorf("an upload that nobody began: %d %+v", status, v)
	}

	for i := range 4 {
		want := http.StatusOK
		if i == 3 {
			want = http.StatusServiceUnavailable
		}
		if status := u.begin(p.name, p.labels); status != want {
			t.Errorf("upload %d begins with %d, want %d", i+1, status, want)
		}
	}
	s.wantNobodyAsked()
}

func TestWhoMayPush(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing)
	secret := s.ours(ours("secret/app", "1.0.0"), s.key)
	u := s.uploader()
	if status := u.begin(secret.name, secret.labels); status != http.StatusUnauthorized {
		t.Errorf("without credentials: %d", status)
	}
	tokenOf := func(name string) string {
		code, out := s.cli("token", "add", name)
		token := regexp.MustCompile(`acproxy_\S+`).FindString(out)
		if code != 0 || token == "" {
			t.Fatalf("acproxy token add = %d\n%s", code, out)
		}
		return token
	}
	other, ci := tokenOf("other"), tokenOf("ci")
	eventually(t, "the tokens count", func() bool { u.token = other; return u.begin(secret.name, secret.labels) == http.StatusForbidden })
	u.token = ci
	if status := u.begin(secret.name, secret.labels); status != http.StatusOK {
		t.Errorf("with the right: %d", status)
	}
	// Somebody else's upload, even with its ID.
	for _, token := range []string{"", other} {
		u.token = token
		if status, _ := u.request(http.MethodPut, u.urls["manifest"], bytes.NewReader(secret.parts["manifest"])); status != http.StatusUnauthorized && status != http.StatusForbidden {
			t.Errorf("a part by somebody else: %d", status)
		}
	}
	u.token = ci
	if v := u.push(secret); !v.Success {
		t.Errorf("push: %+v", v)
	}
	file := s.write("secret.aci", secret.aci)
	s.write("secret.aci.asc", secret.parts["signature"])
	if code, out := runCLI(t, "push", "--server", s.plain(), "--secret-file", s.write("ci-token", []byte(ci+"\n")), file); code != 0 || !strings.Contains(out, "published already") {
		t.Errorf("acproxy push --server = %d\n%s", code, out)
	}
	// A name that isn't published here.
	status, _ := u.request(http.MethodPost, "https://example.com/.acproxy/push/example.com/theirs?version=1", nil)
	if status != http.StatusForbidden {
		t.Errorf("a name without a rule: %d", status)
	}
	// Without any rules nobody may.
	s.server().end(sigterm)
	s.configure(strings.Split(publishing, "access:")[0])
	s.start()
	if status := s.uploader().begin(secret.name, secret.labels); status != http.StatusForbidden {
		t.Errorf("without rules: %d", status)
	}
	s.wantNobodyAsked()
}

// TestPushesAtOnce pushes two images of the same version at once, over and over: one wins, and the other one's client is told.
func TestPushesAtOnce(t *testing.T) {
	t.Parallel()
	s := newScene(t, publishing)
	for i := range 5 {
		var both [2]pushed
		var verdicts [2]pushVerdict
		var wg sync.WaitGroup
		for j := range both {
			spec := ours("race", fmt.Sprintf("1.0.%d", i))
			spec.Files["mine.txt"] = fmt.Sprint(j)
			both[j] = s.ours(spec, s.key)
			u := s.uploader()
			wg.Go(func() { verdicts[j] = u.push(both[j]) })
		}
		wg.Wait()
		if verdicts[0].Success == verdicts[1].Success {
			t.Fatalf("the verdicts are %+v", verdicts)
		}
		winner := 0
		if verdicts[1].Success {
			winner = 1
		}
		if loser := verdicts[1-winner]; loser.Code != "changed-upstream" {
			t.Errorf("the other one is told %+v", loser)
		}
		s.fetchAsRkt(s.node, both[winner].image)
	}
}
