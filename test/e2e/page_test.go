package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/publisher"
)

// screenshots names the environment variable with a directory into which pictures of the pages are written.
const screenshots = "ACPROXY_SCREENSHOTS"

// A browser shows the pages of a scene's server. Whatever a page complains of fails the test.
type browser struct {
	s    *scene
	ctx  context.Context
	mu   sync.Mutex
	said []string
}

// browse starts a browser. Each request carries the token, unless it is "".
func (s *scene) browse(token string) *browser {
	s.t.Helper()
	testtools.Need(s.t, "chromium")
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath("chromium"), chromedp.NoSandbox, chromedp.WindowSize(1280, 900), chromedp.Flag("force-color-profile", "srgb"))
	// It lives as long as the test; each thing that it does has its own time.
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	s.t.Cleanup(cancel)
	b := &browser{s: s}
	ctx, closeBrowser := chromedp.NewContext(allocator)
	s.t.Cleanup(closeBrowser)
	b.ctx = ctx
	chromedp.ListenTarget(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			b.complain("an exception: " + e.ExceptionDetails.Error())
		case *log.EventEntryAdded:
			if e.Entry.Level == log.LevelError {
				b.complain(e.Entry.Text + " " + e.Entry.URL)
			}
		}
	})
	actions := []chromedp.Action{log.Enable()}
	if token != "" {
		actions = append(actions, network.Enable(), network.SetExtraHTTPHeaders(network.Headers{"Authorization": "Bearer " + token}))
	}
	b.do(actions...)
	return b
}

func (b *browser) complain(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.said = append(b.said, text)
}

// complaints returns what pages complained of since the last time.
func (b *browser) complaints() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	said := b.said
	b.said = nil
	return said
}

// do has the browser do something, within the patience of a test.
func (b *browser) do(actions ...chromedp.Action) {
	b.s.t.Helper()
	if err := b.try(actions...); err != nil {
		b.s.t.Fatal(err)
	}
}

func (b *browser) try(actions ...chromedp.Action) error {
	// The first call starts the browser, and a context that ends would end it again.
	if chromedp.FromContext(b.ctx).Target == nil {
		return chromedp.Run(b.ctx, actions...)
	}
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	return chromedp.Run(ctx, actions...)
}

// open shows a page, and checks what has to be true of each of them.
func (b *browser) open(path string) {
	b.s.t.Helper()
	b.do(chromedp.Navigate(b.s.server().operators+path), chromedp.WaitVisible("main h1"))
	var wrong []string
	b.do(chromedp.Evaluate(`(() => {
		const wrong = [];
		if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
		if (!document.documentElement.lang || !document.title) wrong.push("no language or title");
		for (const field of document.querySelectorAll("input:not([type=hidden]), select")) if (!field.labels.length) wrong.push("a field without label: " + field.outerHTML);
		for (const table of document.querySelectorAll("table")) if (!table.caption || !table.querySelector("thead th[scope]")) wrong.push("a table without caption or heading");
		for (const image of document.querySelectorAll("img")) if (!image.hasAttribute("alt")) wrong.push("a picture without alt");
		for (const link of document.querySelectorAll("a")) if (!link.textContent.trim() || !link.href) wrong.push("a link that says nothing: " + link.outerHTML);
		const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
		if (new Set(ids).size !== ids.length) wrong.push("an id twice: " + ids);
		for (const e of document.querySelectorAll("[aria-labelledby]")) if (!document.getElementById(e.getAttribute("aria-labelledby"))) wrong.push("labelled by nothing: " + e.outerHTML);
		if (document.documentElement.scrollWidth > innerWidth) wrong.push("wider than the window: " + document.documentElement.scrollWidth);
		return wrong;
	})()`, &wrong))
	for _, w := range append(wrong, b.complaints()...) {
		b.s.t.Errorf("%s: %s", path, w)
	}
}

// text returns the text of the first element that a selector chooses.
func (b *browser) text(selector string) string {
	b.s.t.Helper()
	var text string
	b.do(chromedp.Text(selector, &text, chromedp.ByQuery))
	return text
}

// until waits until an expression is true in the page.
func (b *browser) until(what, expression string) {
	b.s.t.Helper()
	if err := b.try(chromedp.Poll(expression, nil, chromedp.WithPollingInterval(50*time.Millisecond), chromedp.WithPollingTimeout(patience))); err != nil {
		var page string
		_ = b.try(chromedp.Text("main", &page, chromedp.ByQuery))
		b.s.t.Fatalf("waiting until %s: %v; the page says\n%s", what, err, page)
	}
}

// picture writes a picture of the page as it is, if somebody wants it.
func (b *browser) picture(name string) {
	b.s.t.Helper()
	dir := os.Getenv(screenshots)
	if dir == "" {
		return
	}
	var png []byte
	b.do(chromedp.FullScreenshot(&png, 100))
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		b.s.t.Error(err)
	}
}

// pageRules let everybody look, and two clients do more.
const pageRules = `
access:
  rules:
    - {prefix: "", read: [anyone], admin: [admin]}
    - {prefix: example.com/hidden, read: [admin], admin: [admin]}
`

func (s *scene) token(name string) string {
	s.t.Helper()
	code, out := s.cli("token", "add", name)
	for line := range strings.Lines(out) {
		if token := strings.TrimSpace(line); strings.HasPrefix(token, "acproxy_") && code == 0 {
			return token
		}
	}
	s.t.Fatalf("acproxy token add = %d\n%s", code, out)
	return ""
}

func TestPages(t *testing.T) {
	t.Parallel()
	s := stage(t, pageRules)
	token := s.token("admin")
	s.start()
	spec := app("web")
	spec.Dependencies = []acitest.Dependency{{Name: "example.com/base"}, {Name: "example.com/absent"}}
	base, web := s.publish(app("base")), s.publish(spec)
	hidden := s.publish(app("hidden"))
	s.hold(base)
	s.hold(web)
	wantStatus(t, s.get(s.direct(hidden, "aci"), "Authorization", "Bearer "+token), http.StatusOK)
	foreign := s.publishAs(app("foreign"), stranger(t))
	wantStatus(t, s.get(s.direct(foreign, "aci.asc")), http.StatusForbidden)
	s.inspected(web)
	s.inspected(base)

	b := s.browse(token)
	for _, path := range []string{"/", "/?range=day", "/?range=week", "/images", "/images?sort=size&reverse=true", "/trust", "/publishers", "/publishers?image=example.com/web", "/refusals", "/events", "/config", "/warming"} {
		b.open(path)
	}
	t.Run("search, by keyboard", func(t *testing.T) {
		b.open("/images")
		b.do(chromedp.Focus(`input[name=contains]`, chromedp.ByQuery), chromedp.KeyEvent("EB:1.0.0"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible(`input[name=contains][value="EB:1.0.0"]`, chromedp.ByQuery))
		if text := b.text("tbody"); !strings.Contains(text, "example.com/web") || strings.Contains(text, "example.com/base") {
			t.Errorf("it found\n%s", text)
		}
	})
	t.Run("an image", func(t *testing.T) {
		b.open("/images?contains=web")
		b.do(chromedp.Click("tbody th a", chromedp.ByQuery), chromedp.WaitVisible(".facts"))
		page := b.text("main")
		for _, want := range []string{"Will rkt accept it?\nyes", s.key.Fingerprint(), "https://storage.example.com/", "example.com/base", "not held", `"name": "example.com/web"`} {
			if !strings.Contains(page, want) {
				t.Errorf("the page says nothing of %q:\n%s", want, page)
			}
		}
		b.picture("image")
		b.do(chromedp.Click(`form[action$="/pin"] button`, chromedp.ByQuery), chromedp.WaitVisible(`form[action$="/unpin"]`, chromedp.ByQuery))
		if code, out := s.cli("images", "--pinned"); code != 0 || !strings.Contains(out, "example.com/web") {
			t.Errorf("acproxy images --pinned = %d\n%s", code, out)
		}
		b.open("/events")
		if text := b.text("tbody tr"); !strings.Contains(text, "pinned") || !strings.Contains(text, "by admin") {
			t.Errorf("the latest event is %q, want who has pinned it", text)
		}
	})
	t.Run("lists, and what is missing", func(t *testing.T) {
		wantStatus(t, s.get(s.plain()+directPath("example.com/nobody-has-it", map[string]string{"version": "1"}, "aci")), http.StatusNotFound)
		if code, out := s.cli("warm", "--name", "rollout", "example.com/web:1.0.0", "example.com/not-there:1.0.0"); code != 2 {
			t.Fatalf("acproxy warm = %d\n%s", code, out)
		}
		b.open("/warming")
		for selector, wants := range map[string][]string{"#jobs tbody": {"rollout", "not all there", "of 4"}, "#missing tbody": {"example.com/nobody-has-it", "1 time"}} {
			for _, want := range wants {
				if text := b.text(selector); !strings.Contains(text, want) {
					t.Errorf("%s says nothing of %q:\n%s", selector, want, text)
				}
			}
		}
		b.picture("warming")
		b.do(chromedp.Click("#jobs tbody th a", chromedp.ByQuery), chromedp.WaitVisible("#job tbody", chromedp.ByQuery))
		if text := b.text("#job tbody tr"); !strings.Contains(text, "failed") {
			t.Errorf("what failed isn't first: %q", text)
		}
		if text := b.text("#job tbody"); !strings.Contains(text, "example.com/base") || !strings.Contains(text, "needed by example.com/web") || !strings.Contains(text, "held") {
			t.Errorf("the results are\n%s", text)
		}
		b.picture("job")
	})
	t.Run("a list is ended", func(t *testing.T) {
		s.publisher.Misbehave(publisher.URL("example.com/slow*"), publisher.Fault{Delay: time.Hour})
		if code, out := s.cli("warm", "--detach", "--name", "slow one", "example.com/slow:1.0.0"); code != 0 {
			t.Fatalf("acproxy warm --detach = %d\n%s", code, out)
		}
		b.open("/warming")
		b.do(chromedp.Click("#jobs tbody th a", chromedp.ByQuery), chromedp.WaitVisible("form .danger", chromedp.ByQuery))
		if text := b.text("h1"); text != "slow one" {
			t.Errorf("the page is about %q", text)
		}
		b.do(chromedp.Click("form .danger", chromedp.ByQuery), chromedp.WaitNotPresent("form .danger", chromedp.ByQuery))
		if text := b.text("#job"); !strings.Contains(text, "cancelled") {
			t.Errorf("the page says\n%s", text)
		}
	})
	t.Run("deleting needs a second thought", func(t *testing.T) {
		b.open("/images?contains=base")
		b.do(chromedp.Click("tbody th a", chromedp.ByQuery), chromedp.WaitVisible(".danger"), chromedp.Click(".danger", chromedp.ByQuery))
		// The browser itself keeps a form from being sent that has a required box without a tick.
		if text := b.text("h1"); !strings.Contains(text, "example.com/base") {
			t.Errorf("after the click the page is %q", text)
		}
		b.do(chromedp.Click("input[name=sure]", chromedp.ByQuery), chromedp.Click(".danger", chromedp.ByQuery), chromedp.WaitVisible("form[role=search]"))
		if text := b.text("main"); strings.Contains(text, "example.com/base") {
			t.Errorf("it is still there:\n%s", text)
		}
	})
	t.Run("the keyboard finds its way", func(t *testing.T) {
		b.open("/trust")
		var focused []string
		for range 4 {
			var text string
			b.do(chromedp.KeyEvent(kb.Tab), chromedp.Evaluate(`document.activeElement.textContent.trim()`, &text))
			focused = append(focused, text)
		}
		if got := strings.Join(focused, "|"); got != "To the content|acproxy|Overview|Images" {
			t.Errorf("the Tab key goes to %s", got)
		}
		b.open("/trust")
		var at string
		b.do(chromedp.KeyEvent(kb.Tab), chromedp.KeyEvent(kb.Enter), chromedp.Evaluate(`document.activeElement.id`, &at))
		if at != "main" {
			t.Errorf("the first link leads to %q, not to the content", at)
		}
	})
	t.Run("in the dark", func(t *testing.T) {
		b.do(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}}))
		b.open("/refusals")
		var colour string
		b.do(chromedp.Evaluate(`getComputedStyle(document.body).backgroundColor`, &colour))
		if colour != "rgb(18, 22, 28)" {
			t.Errorf("the background is %s", colour)
		}
		b.picture("dark")
		b.do(emulation.SetEmulatedMedia())
	})
	t.Run("on a small screen", func(t *testing.T) {
		b.do(emulation.SetDeviceMetricsOverride(390, 800, 1, true))
		for _, path := range []string{"/", "/images", "/trust", "/publishers", "/events"} {
			b.open(path)
		}
		b.picture("small")
		b.do(emulation.ClearDeviceMetricsOverride())
	})
	t.Run("without scripts", func(t *testing.T) {
		b.do(emulation.SetScriptExecutionDisabled(true), chromedp.Navigate(s.server().operators+"/"), chromedp.WaitVisible("#latest table", chromedp.ByQuery), emulation.SetScriptExecutionDisabled(false))
	})
	t.Run("what isn't there", func(t *testing.T) {
		b.do(chromedp.Navigate(s.server().operators+"/nothing"), chromedp.WaitVisible("main h1"))
		if text := b.text("main"); !strings.Contains(text, "there is nothing at") {
			t.Errorf("the page says %s", text)
		}
		b.complaints() // the browser's own, of the 404
	})
}

// blobDigest returns the digest of an image's blob.
func blobDigest(im image) string { return acproxy.Digest(sha256.Sum256(im.aci)).String() }

// A page shows what its client may see.
func TestPagesForEverybody(t *testing.T) {
	t.Parallel()
	s := stage(t, pageRules)
	token := s.token("admin")
	s.start()
	open, hidden := s.publish(app("open")), s.publish(app("hidden"))
	s.hold(open)
	wantStatus(t, s.get(s.direct(hidden, "aci"), "Authorization", "Bearer "+token), http.StatusOK)
	at := s.server().operators
	for _, tt := range []struct {
		path   string
		status int
	}{{"/", 200}, {"/images", 200}, {"/refusals", 200}, {"/events", 200}, {"/trust", 200}, {"/publishers", 200}, {"/config", 401}, {"/images/" + blobDigest(hidden), 404}, {"/images/" + blobDigest(open), 200}} {
		a := s.get(at + tt.path)
		wantStatus(t, a, tt.status)
		if body := string(a.Body); strings.Contains(body, "example.com/hidden") || tt.path != "/config" && !strings.Contains(body, "<h1>") {
			t.Errorf("%s shows everybody\n%s", tt.path, body)
		}
		if a := s.get(at+tt.path, "Authorization", "Bearer "+token); a.Status != 200 {
			t.Errorf("%s = %d for who may see it", tt.path, a.Status)
		}
	}
	if body := string(s.get(at + "/").Body); strings.Contains(body, "Bytes saved") || strings.Contains(body, `id="usage"`) {
		t.Errorf("everybody sees what is about the server as a whole:\n%s", body)
	}
	// A button that isn't there can be pressed all the same.
	for path, want := range map[string]int{"/images/" + blobDigest(open) + "/pin": 401, "/images/" + blobDigest(open) + "/delete": 400, "/images/" + blobDigest(hidden) + "/pin": 404, "/images/x/pin": 400, "/": 404} {
		wantStatus(t, s.do(http.MethodPost, at+path), want)
	}
	wantStatus(t, s.do(http.MethodPost, at+"/images/"+blobDigest(open)+"/pin", "Authorization", "Bearer "+token, "Sec-Fetch-Site", "cross-site"), http.StatusForbidden)
	wantStatus(t, s.do(http.MethodPost, at+"/images/"+blobDigest(open)+"/pin", "Authorization", "Bearer "+token, "Origin", "https://evil.example.net"), http.StatusForbidden)
	if code, out := s.cli("images", "--pinned", "--json"); code != 0 || strings.TrimSpace(out) != "" {
		t.Errorf("acproxy images --pinned = %d, %s", code, out)
	}
}

// What is being fetched moves, and other parts are renewed, without a click.
func TestPageIsLive(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	b := s.browse("")
	big := s.publish(large("big", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(big.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	b.open("/")
	if text := b.text("#flights"); !strings.Contains(text, "Nothing is being fetched") {
		t.Errorf("before: %s", text)
	}
	ctx, cancel := context.WithCancel(s.context())
	defer cancel()
	resp := s.open(ctx, s.direct(big, "aci"))
	defer resp.Body.Close()
	within(t, "the publisher stalls", trouble.Stalled())
	b.until("the flight is there", `document.querySelector("#flights progress")?.value === `+fmt.Sprint(stalled))
	b.picture("overview")
	trouble.Release()
	b.until("the flight is over", `document.querySelector("#flights").textContent.includes("Nothing is being fetched")`)
	b.until("the image is told of", `document.querySelector("#latest").textContent.includes("example.com/big")`)
	for _, w := range b.complaints() {
		t.Error(w)
	}
}

// A name from outside is a name, whatever stands in it.
func TestPagesShowStrangersTextAsText(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	b := s.browse("")
	evil := app("evil")
	evil.Annotations = map[string]string{"example.com/note": `</pre><script>document.title="taken"</script><img src=x onerror=alert(1)>`}
	evil.Labels = map[string]string{"note": `<script>document.title="taken"</script>`}
	im := s.publish(evil)
	s.hold(im)
	for _, path := range []string{"/", "/images", "/images/" + blobDigest(im), "/events", "/images?contains=%22%3E%3Cscript%3Ealert(1)%3C/script%3E", "/publishers?image=%3Cscript%3E"} {
		b.open(path)
		var title string
		b.do(chromedp.Title(&title))
		if title == "taken" {
			t.Errorf("%s runs what a publisher wrote", path)
		}
	}
	var page struct{ Images []json.RawMessage }
	if a := s.get(s.server().operators + "/api/v1/images"); json.Unmarshal(a.Body, &page) != nil || len(page.Images) != 1 {
		t.Errorf("the API says %s", a.Body)
	}
}
