package publisher

import (
	"fmt"
	"html"
	"maps"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
)

// A Tag is the content of one meta tag.
type Tag struct {
	Prefix string // the image names it is for
	URL    string // a template, or where a key is
}

// A Page is a discovery page. One that is set replaces what the publisher would make of its images and keys.
type Page struct {
	Path      string // host and path, "example.com/app"
	Templates []Tag  // ac-discovery, in this order
	Keys      []Tag  // ac-discovery-pubkeys, in this order
	HTML      string // the page itself, in place of one made from the tags; "" is that
}

type publicKey struct {
	prefix, at string
}

// SetPage sets a discovery page. It is served for ?ac-discovery=1, over TLS and plain http.
func (p *Publisher) SetPage(page Page) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pages[page.Path] = page
}

// AddKey publishes a key, armored, for the names under a prefix: the discovery pages of their images tell it, and so does a page at the
// prefix itself. It returns the key's URL.
func (p *Publisher) AddKey(prefix string, armored []byte) string {
	p.mu.Lock()
	host, _, _ := strings.Cut(prefix, "/")
	at := fmt.Sprintf("%s/keys/%d.gpg", storage(host), len(p.keys)+1)
	p.keys = append(p.keys, publicKey{prefix, at})
	p.mu.Unlock()
	p.Serve(at, "application/pgp-keys", armored)
	return "https://" + at
}

// RemoveKeys takes back the keys of a prefix: no page tells them any more.
func (p *Publisher) RemoveKeys(prefix string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keys = slices.DeleteFunc(p.keys, func(k publicKey) bool { return k.prefix == prefix })
}

// page returns the discovery page at a host and path, and whether there is one. p.mu is held.
func (p *Publisher) page(at string) (Page, bool) {
	if page, ok := p.pages[at]; ok {
		return page, true
	}
	page := Page{Path: at}
	host, _, _ := strings.Cut(at, "/")
	for _, im := range p.images {
		tag := Tag{im.Name, "https://" + storage(host) + "/" + templateFor(im.Labels)}
		if im.Name == at && !slices.Contains(page.Templates, tag) {
			page.Templates = append(page.Templates, tag)
		}
	}
	// The template that says the most comes first: a client without a variable for it skips it.
	slices.SortStableFunc(page.Templates, func(a, b Tag) int { return strings.Count(b.URL, "{") - strings.Count(a.URL, "{") })
	for _, k := range p.keys {
		if len(page.Templates) > 0 && acproxy.HasPrefix(at, k.prefix) || k.prefix == at {
			page.Keys = append(page.Keys, Tag{k.prefix, "https://" + k.at})
		}
	}
	return page, len(page.Templates)+len(page.Keys) > 0
}

func (p Page) render() []byte {
	if p.HTML != "" {
		return []byte(p.HTML)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>%s</title>\n", html.EscapeString(p.Path))
	for _, t := range p.Templates {
		fmt.Fprintf(&b, "<meta name=\"ac-discovery\" content=\"%s %s\">\n", html.EscapeString(t.Prefix), html.EscapeString(t.URL))
	}
	for _, t := range p.Keys {
		fmt.Fprintf(&b, "<meta name=\"ac-discovery-pubkeys\" content=\"%s %s\">\n", html.EscapeString(t.Prefix), html.EscapeString(t.URL))
	}
	fmt.Fprintf(&b, "</head>\n<body>\n<p>The images of <code>%s</code>. Fetch them with <code>rkt fetch</code>.</p>\n</body>\n</html>\n", html.EscapeString(p.Path))
	return []byte(b.String())
}

func storage(host string) string { return "storage." + host }

// templateFor returns the template that fits an image's labels: without its host, which is the same for all.
func templateFor(labels map[string]string) string {
	if labels[acproxy.LabelOS] == "" || labels[acproxy.LabelArch] == "" {
		return "{name}/{version}/image.{ext}"
	}
	return "{name}/{version}/{os}/{arch}/image.{ext}"
}

func expand(template, name string, labels map[string]string, ext string) string {
	version := labels[acproxy.LabelVersion]
	if version == "" {
		version = "latest"
	}
	return strings.NewReplacer("{name}", name, "{version}", version, "{os}", labels[acproxy.LabelOS], "{arch}", labels[acproxy.LabelArch], "{ext}", ext).Replace(template)
}

// find returns what is served at a host and path, nil if nothing is. p.mu is held.
func (p *Publisher) find(at string) *content {
	if c := p.files[at]; c != nil {
		return c
	}
	for i := len(p.images) - 1; i >= 0; i-- {
		im := p.images[i]
		host, _, _ := strings.Cut(im.Name, "/")
		rest, ok := strings.CutPrefix(at, storage(host)+"/")
		if !ok {
			continue
		}
		for ext, c := range map[string]*content{"aci": im.blob, "aci.asc": im.signature} {
			if rest == expand(templateFor(im.Labels), im.Name, im.Labels, ext) || p.isLatest(im) && rest == expand(templateFor(im.Labels), im.Name, withoutVersion(im.Labels), ext) {
				return c
			}
		}
	}
	return nil
}

// isLatest reports whether an image is what "latest" means, given that the ones after it don't match. p.mu is held.
func (p *Publisher) isLatest(im *published) bool {
	version, set := p.latest[im.Name]
	return !set || version == im.Labels[acproxy.LabelVersion]
}

func withoutVersion(labels map[string]string) map[string]string {
	labels = maps.Clone(labels)
	delete(labels, acproxy.LabelVersion)
	return labels
}
