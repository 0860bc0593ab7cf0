// Package page is what operators see of a running server in a browser.
package page

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/problem"
)

//go:embed templates/*.html
var templates embed.FS

//go:embed assets/*
var assets embed.FS

// A Page answers browsers. It is safe for concurrent use.
type Page struct {
	server *admin.Server
	log    *slog.Logger
	now    func() time.Time
	pages  map[string]*template.Template
	assets map[string]asset // by path
}

type asset struct {
	mediaType string
	content   []byte
}

// policy is the Content-Security-Policy: what the page needs is its own, and nothing of what it shows may become a program.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// New returns what shows a server. log may be nil, which means slog.Default.
func New(server *admin.Server, log *slog.Logger) *Page {
	if log == nil {
		log = slog.Default()
	}
	p := &Page{server: server, log: log, now: time.Now, pages: make(map[string]*template.Template), assets: make(map[string]asset)}
	names := make(map[string]string) // of assets, by the names that templates use
	p.readAssets(names)
	functions := p.functions()
	functions["asset"] = func(name string) string { return names[name] }
	layout := template.Must(template.New("layout.html").Funcs(functions).ParseFS(templates, "templates/layout.html", "templates/parts.html"))
	files, _ := fs.Glob(templates, "templates/*.html") // the pattern is well-formed
	for _, file := range files {
		switch name := path.Base(file); name {
		case "layout.html", "parts.html":
		default:
			p.pages[strings.TrimSuffix(name, ".html")] = template.Must(template.Must(layout.Clone()).ParseFS(templates, file))
		}
	}
	return p
}

// readAssets gives every asset a path that changes with its content, so that browsers may keep it.
func (p *Page) readAssets(names map[string]string) {
	mediaTypes := map[string]string{".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
	files, _ := fs.Glob(assets, "assets/*") // the pattern is well-formed
	for _, file := range files {
		content, err := assets.ReadFile(file)
		if err != nil {
			panic(err) // cannot happen: it is part of the program
		}
		name, extension := path.Base(file), path.Ext(file)
		sum := sha256.Sum256(content)
		at := "/assets/" + strings.TrimSuffix(name, extension) + "." + hex.EncodeToString(sum[:6]) + extension
		names[name] = at
		p.assets[at] = asset{mediaTypes[extension], content}
	}
}

// ServeHTTP answers a request for a page, or for what belongs to it, or does what a form asks for.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a, ok := p.assets[r.URL.Path]; ok {
		w.Header().Set("Content-Type", a.mediaType)
		w.Header().Set("Cache-Control", "private, max-age=31536000, immutable")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.content))
		return
	}
	w.Header().Set("Content-Security-Policy", policy)
	v := p.server.ViewOf(r.Context())
	var err error
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		err = p.get(w, r, v)
	case http.MethodPost:
		err = p.post(w, r, v)
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		err = problem.WithStatus(http.StatusMethodNotAllowed, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "method-not-allowed", Detail: r.Method + " is not possible here"})
	}
	if err != nil {
		p.fail(w, v, err)
	}
}

// get shows a page.
func (p *Page) get(w http.ResponseWriter, r *http.Request, v admin.View) error {
	show := map[string]func(http.ResponseWriter, *http.Request, admin.View) error{
		"/": p.overview, "/images": p.images, "/warming": p.warming, "/trust": p.trust, "/publishers": p.publishers, "/refusals": p.refusals, "/events": p.events, "/config": p.config,
	}[r.URL.Path]
	if show != nil {
		return show(w, r, v)
	}
	if digest, ok := strings.CutPrefix(r.URL.Path, "/images/"); ok {
		return p.image(w, v, digest)
	}
	if id, ok := strings.CutPrefix(r.URL.Path, "/warming/"); ok {
		return p.job(w, r, v, id)
	}
	return notThere(r)
}

func notThere(r *http.Request) error {
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-path", Detail: fmt.Sprintf("there is nothing at %.200q", r.URL.Path)}
}

// maxForm bounds what a form may send, in bytes.
const maxForm = 64 << 10

// post does what a button asks for, and shows the page again.
func (p *Page) post(w http.ResponseWriter, r *http.Request, v admin.View) error {
	// What a page of another site sends never gets here: see [admin.Server.Front].
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if id, ok := strings.CutPrefix(r.URL.Path, "/warming/"); ok && strings.HasSuffix(id, "/cancel") {
		job, err := v.CancelWarm(strings.TrimSuffix(id, "/cancel"))
		if err == nil {
			http.Redirect(w, r, "/warming/"+job.ID, http.StatusSeeOther)
		}
		return err
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/images/")
	id, action, _ := strings.Cut(rest, "/")
	if !ok {
		return notThere(r)
	}
	digest, err := acproxy.ParseDigest(id)
	if err != nil {
		return err
	}
	after := "/images/" + digest.String()
	switch action {
	case "pin", "unpin":
		_, err = v.Pin(r.Context(), digest, action == "pin")
	case "delete":
		after = "/images"
		if r.PostFormValue("sure") != "yes" {
			return acproxy.Invalid("nothing was deleted: tick the box beside the button first")
		}
		err = v.Delete(r.Context(), digest)
	default:
		return notThere(r)
	}
	if err == nil {
		http.Redirect(w, r, after, http.StatusSeeOther)
	}
	return err
}

// content is what every page has.
type content struct {
	Title   string
	At      string // the path of the page in the navigation
	About   admin.About
	Problem *problem.Problem // why there is nothing else, nil if there is
	Live    bool             // parts of it are fetched again every now and then
	Now     time.Time
	Data    any
}

// show writes a page, as a whole or not at all.
func (p *Page) show(w http.ResponseWriter, name string, status int, c content) error {
	var b bytes.Buffer
	c.Now = p.now()
	if err := p.pages[name].ExecuteTemplate(&b, "layout.html", c); err != nil {
		return fmt.Errorf("making the page %s: %w", name, err)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	// A client that has left can't be told anything.
	_, _ = w.Write(b.Bytes())
	return nil
}

// fail shows an error.
func (p *Page) fail(w http.ResponseWriter, v admin.View, err error) {
	problem := problem.Of(err)
	switch problem.Status {
	case http.StatusUnauthorized:
		// The browser asks for a user and a password.
		w.Header()["Www-Authenticate"] = []string{`Basic realm="acproxy", charset="UTF-8"`}
	case http.StatusInternalServerError:
		p.log.Error("a page for operators failed", "err", err)
	}
	if err := p.show(w, "error", problem.Status, content{Title: problem.Title, About: v.About(), Problem: &problem}); err != nil {
		p.log.Error("the page for errors failed", "err", err)
		http.Error(w, "something is wrong inside acproxy; its log says what", http.StatusInternalServerError)
	}
}

// allowed returns nothing instead of what the client may not see, so that a page can leave it out.
func allowed[T any](value T, err error) (*T, error) {
	if errors.Is(err, acproxy.ErrRefused) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &value, nil
}

// linkWith returns the URL of a page with some parameters replaced; an empty value takes one away.
func linkWith(at string, query url.Values, pairs ...string) string {
	values := make(url.Values)
	for name, value := range query {
		values[name] = value
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] == "" {
			values.Del(pairs[i])
			continue
		}
		values.Set(pairs[i], pairs[i+1])
	}
	if len(values) == 0 {
		return at
	}
	return at + "?" + values.Encode()
}
