package server

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/trust"
)

// discovery answers https://NAME?ac-discovery=1: the page on which a node finds out where to get the images of that name, and their keys.
func (s *Server) discovery(w http.ResponseWriter, r *http.Request) error {
	name, err := requestName(r)
	if err != nil {
		return err
	}
	noteRef(w, KindPage, name)
	if err := s.mayRead(w, r, name); err != nil {
		return err
	}
	found, err := s.cfg.Fetcher.Discover(discovery.For(r.Context(), client(r)), name)
	if err != nil {
		return err
	}
	keyring, settings, base := s.cfg.Keyring(), s.settings.Load(), s.publicBase(r)
	key := pageKey{requestScheme(r), r.Host, name}
	p, ok := s.pages.Get(key)
	if !ok || p.keyring != keyring || p.settings != settings || p.local != found.Local || !slices.Equal(p.templates, found.Templates) || !p.until.IsZero() && !s.now().Before(p.until) {
		if p, err = s.makePage(r, name, base, keyring, settings, found); err != nil {
			return err
		}
		if len(r.Host)+len(name) <= maxMemoURL {
			s.pages.Put(key, p)
		}
	}
	w.Header()["Cache-Status"] = cacheStatus(found.Status)
	if found.Status == fetch.Hit {
		noteSteady(w, acproxy.Digest{})
	}
	p.served.serve(w, r, time.Time{})
	return nil
}

// pageKey is what a discovery page is made for: who asks under another host name gets other URLs.
type pageKey struct{ scheme, host, name string }

// page is a discovery page, and what it was made of. It holds for as long as that stays the same.
type page struct {
	keyring   *trust.Keyring
	settings  *settings
	templates []discovery.Template // the publisher's
	local     bool
	until     time.Time // when one of its keys expires; zero if none does
	served    *small
}

func (s *Server) makePage(r *http.Request, name, base string, keyring *trust.Keyring, settings *settings, found fetch.Discovery) (*page, error) {
	publisher := found.Templates
	p := &page{keyring: keyring, settings: settings, templates: publisher, local: found.Local}
	content := discoveryPage{Name: name, Local: found.Local}
	for _, t := range rewrite(publisher, base, name) {
		content.Tags = append(content.Tags, tag{Name: "ac-discovery", Content: t.Prefix + " " + t.URL})
	}
	content.Keys, p.until = s.keyTags(r, keyring, name, settings.allKeys)
	for _, k := range content.Keys {
		content.Tags = append(content.Tags, tag{Name: "ac-discovery-pubkeys", Content: k.Content})
	}
	if found.Local {
		publisher = nil
		// Every client of acpush has these labels; what others an image has, its manifest says.
		content.Tags = append(content.Tags, tag{Name: "ac-push-discovery", Content: found.Prefix + " " + s.ownBase(r) + PushPath + "{name}?version={version}&os={os}&arch={arch}"})
	}
	for _, t := range publisher {
		content.Publisher = append(content.Publisher, t.URL)
	}
	var body bytes.Buffer
	if err := discoveryHTML.Execute(&body, content); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body.Bytes())
	p.served = newSmall("text/html; charset=utf-8", fmt.Sprintf(`"p-%x"`, sum[:16]), body.Bytes())
	p.served.header["Cache-Control"] = []string{"no-cache"}
	p.served.header["Content-Security-Policy"] = []string{"default-src 'none'; style-src 'unsafe-inline'"}
	return p, nil
}

// requestName returns the image name that a discovery request is about: the host, without a port, and the path.
func requestName(r *http.Request) (string, error) {
	path, err := url.PathUnescape(r.URL.EscapedPath())
	if err != nil {
		return "", acproxy.Invalid("the path is not percent-encoded properly: %v", err)
	}
	name := strings.TrimSuffix(requestHost(r)+path, "/")
	return name, acproxy.CheckName(name)
}

// pathName returns the image name that a path is.
func pathName(escaped string) (string, error) {
	name, err := url.PathUnescape(escaped)
	if err != nil {
		return "", acproxy.Invalid("the path is not percent-encoded properly: %v", err)
	}
	return name, acproxy.CheckName(name)
}

// publicBase returns the scheme and host that templates point to: as configured, or those that the client used.
func (s *Server) publicBase(r *http.Request) string {
	if u := s.cfg.PublicURL; u != nil {
		return u.Scheme + "://" + u.Host
	}
	return requestScheme(r) + "://" + r.Host
}

// rewrite turns a publisher's templates into ours: one per distinct set of variables, in the publisher's order, with its prefix, and with exactly
// the variables it uses, so that nodes aren't asked for labels that mean nothing to it. rkt reads only the first tag it can use, and which of the
// publisher's endpoints works is for us to find out.
func rewrite(publisher []discovery.Template, base, name string) []discovery.Template {
	var out []discovery.Template
	seen := make(map[string]bool)
	for _, t := range publisher {
		path := imagesPath + name
		var labels []string
		for _, v := range t.Variables() {
			switch v {
			case "ext":
			case "name":
				path = imagesPath + "{name}"
			default:
				labels = append(labels, v+"={"+v+"}")
			}
		}
		ours := base + path + ".{ext}"
		if len(labels) > 0 {
			ours += "?" + strings.Join(labels, "&")
		}
		slices.Sort(labels)
		if set := path + "?" + strings.Join(labels, "&"); !seen[set] {
			seen[set] = true
			out = append(out, discovery.Template{Prefix: t.Prefix, URL: ours})
		}
	}
	return out
}

// keyTag is one trusted key on a discovery page.
type keyTag struct {
	Content     string
	URL         string
	Fingerprint string
	UserIDs     []string
	Algorithm   string
}

// keyTags returns the tags of the keys that are trusted for a name, those that rkt can read before, or without, the others: one it can't stops it from
// reading those after it. Key
// URLs stay with the host the client came by, because rkt reads keys over https only, whatever public_url says of the images. until is when the first
// of them expires.
func (s *Server) keyTags(r *http.Request, keyring *trust.Keyring, name string, all bool) (found []keyTag, until time.Time) {
	base := s.ownBase(r)
	var tags, unreadable []keyTag
	for _, key := range keyring.Keys(name) {
		if key.Revoked || !key.Expires.IsZero() && !s.now().Before(key.Expires) {
			continue
		}
		if !key.Expires.IsZero() && (until.IsZero() || key.Expires.Before(until)) {
			until = key.Expires
		}
		prefix := key.Prefix
		if prefix == "" {
			prefix = name
		}
		u := base + keysPath + string(key.Fingerprint) + ".asc"
		t := keyTag{Content: prefix + " " + u, URL: u, Fingerprint: string(key.Fingerprint), UserIDs: key.UserIDs, Algorithm: key.Algorithm}
		switch {
		case key.RktReadable() == nil:
			tags = append(tags, t)
		case all:
			unreadable = append(unreadable, t)
		}
	}
	return append(tags, unreadable...), until
}

type tag struct{ Name, Content string }

type discoveryPage struct {
	Name      string
	Tags      []tag
	Local     bool // it is published here
	Publisher []string
	Keys      []keyTag
}

var discoveryHTML = template.Must(template.New("discovery").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{.Name}} · image discovery</title>
{{range .Tags}}<meta name="{{.Name}}" content="{{.Content}}">
{{end}}<meta name="viewport" content="width=device-width">
` + pageStyle + `
</head>
<body>
<h1>{{.Name}}</h1>
<p>This page tells container runtimes where to fetch the appc images of this name
(<a href="https://github.com/appc/spec/blob/master/spec/discovery.md">appc meta-discovery</a>). It is served by acproxy, which fetches an image
once from its publisher, checks that a trusted key signed it, and keeps it. The tags themselves are in the page's source.</p>
<h2>Nodes fetch from</h2>
<table><tr><th>Tag<th>Prefix and template</tr>
{{range .Tags}}<tr><td>{{.Name}}<td><code>{{.Content}}</code></tr>
{{end}}</table>
{{if .Local}}<h2>They are published here</h2>
<p>Images are pushed with <code>acproxy push</code>, or with any client of acpush; nobody else is asked for them.</p>
{{else}}<h2>The publisher keeps them at</h2>
{{end}}<ol>
{{range .Publisher}}<li><code>{{.}}</code>
{{end}}</ol>
<h2>Keys trusted for this name</h2>
{{if .Keys}}<ul>
{{range .Keys}}<li><a href="{{.URL}}"><code>{{.Fingerprint}}</code></a> {{.Algorithm}}{{range .UserIDs}}, {{.}}{{end}}
{{end}}</ul>
{{else}}<p>None that rkt could read: images of this name that have to be signed are refused, or their keys must be installed on the nodes otherwise.</p>
{{end}}</body>
</html>
`))

// publisherURL answers for a publisher's own image URLs, by what its templates say they mean.
func (s *Server) publisherURL(w http.ResponseWriter, r *http.Request) error {
	asked := *r.URL
	asked.Scheme, asked.Host = requestScheme(r), requestHost(r)
	refs, ext := s.cfg.Fetcher.RefsOf(r.Context(), &asked)
	// That a URL is known would say what the names are that it is known from.
	refs = slices.DeleteFunc(slices.Clone(refs), func(ref acproxy.Ref) bool { return !s.reads(w, r, ref.Name()) })
	if len(refs) == 0 {
		return &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: "no-template-gives-this-url",
			Detail: "no publisher's template known here gives " + asked.Redacted() + ": ask for discovery of the image's name first, or for " + imagesPath + "NAME.aci?version=VERSION",
		}
	}
	return s.firstOf(w, r, refs, ext)
}

// firstOf answers with the first of several refs that a URL may mean for which there is an image. When there is none it tells what was wrong with
// the likeliest.
func (s *Server) firstOf(w http.ResponseWriter, r *http.Request, refs []acproxy.Ref, ext string) error {
	var first error
	for _, ref := range refs {
		err := s.serveRef(w, r, ref, ext)
		if err == nil || left(r) {
			return err
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// isImagePath matches paths that end like an image or a signature.
func isImagePath(r *http.Request, _ *mux.RouteMatch) bool {
	return strings.HasSuffix(r.URL.Path, "."+extImage) || strings.HasSuffix(r.URL.Path, "."+extSignature)
}

const pageStyle = `<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; vertical-align: top }
</style>`

// landing tells a person who finds this server what it is.
func (s *Server) landing(w http.ResponseWriter, r *http.Request) error {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	return gone(landingHTML.Execute(w, struct {
		Base string
		CA   bool
	}{s.publicBase(r), s.cfg.CAPEM != nil}))
}

var landingHTML = template.Must(template.New("landing").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>acproxy</title>
<meta name="viewport" content="width=device-width">
` + pageStyle + `
</head>
<body>
<h1>acproxy</h1>
<p>An image discovery and caching registry proxy for appc images. It answers nodes; there is nothing to click here.</p>
<table>
<tr><th>Ask for<th>at</tr>
<tr><td>an image by name and labels<td><code>{{.Base}}/.acproxy/images/example.com/app.aci?version=1.0&amp;os=linux&amp;arch=amd64</code></tr>
<tr><td>its signature<td><code>{{.Base}}/.acproxy/images/example.com/app.aci.asc?version=1.0&amp;os=linux&amp;arch=amd64</code></tr>
<tr><td>an image by its ID<td><code>{{.Base}}/.acproxy/images/sha512-0123456789ab.aci</code></tr>
<tr><td>an image as Mesos does<td><code>{{.Base}}/.acproxy/mesos/example.com/app-1.0-linux-amd64.aci</code></tr>
<tr><td>discovery<td><code>https://example.com/app?ac-discovery=1</code>, where example.com resolves to this server or it is the client's proxy</tr>
{{if .CA}}<tr><td>the local CA's certificate<td><a href="{{.Base}}/.acproxy/ca.pem"><code>{{.Base}}/.acproxy/ca.pem</code></a></tr>
{{end}}</table>
</body>
</html>
`))
