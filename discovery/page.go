package discovery

import (
	"fmt"
	"io"
	"strings"

	"golang.org/x/net/html"
	"golang.org/x/net/html/atom"

	"github.com/acproxy/acproxy"
)

// MaxTagBytes is how many bytes of prefixes and URLs one page may hold in its tags: pages are kept in memory, and a stranger writes them.
const MaxTagBytes = 64 << 10

// The names of the meta tags (specification, "Discovery URL").
const (
	tagTemplate = "ac-discovery"
	tagKeys     = "ac-discovery-pubkeys"
)

// Tags are the discovery tags of a page, in the page's order.
type Tags struct {
	Templates []Template // of ac-discovery
	Keys      []Template // of ac-discovery-pubkeys; their URLs are plain, they hold no variables
}

// Parse reads the tags of a discovery page. As in the reference library only real meta tags count: what stands in a comment, in a script or in
// other raw text does not. The content of a tag is a prefix and a URL with white space between; a tag that is anything else is skipped. A
// page that ends in the middle of a tag has the tags before it.
//
// It returns the error of r, if that is not io.EOF, and an error matching [acproxy.ErrPublisher] for a page with more than [MaxTagBytes] of
// tags. The caller limits how long r is.
func Parse(r io.Reader) (Tags, error) {
	var tags Tags
	size := 0
	z := html.NewTokenizer(r)
	for {
		switch z.Next() {
		case html.ErrorToken:
			if err := z.Err(); err != io.EOF {
				return Tags{}, err
			}
			return tags, nil
		case html.StartTagToken, html.SelfClosingTagToken:
			token := z.Token()
			if token.DataAtom != atom.Meta {
				continue
			}
			name, t, ok := parseMeta(token.Attr)
			if !ok {
				continue
			}
			if size += len(t.Prefix) + len(t.URL); size > MaxTagBytes {
				return Tags{}, &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "page-too-large", Detail: fmt.Sprintf("the page has more than %d bytes of discovery tags", MaxTagBytes)}
			}
			if name == tagTemplate {
				tags.Templates = append(tags.Templates, t)
			} else {
				tags.Keys = append(tags.Keys, t)
			}
		}
	}
}

// parseMeta returns the name and the two halves of a meta tag's content.
func parseMeta(attributes []html.Attribute) (name string, t Template, ok bool) {
	var content string
	for _, a := range attributes {
		switch {
		case a.Namespace != "":
		case a.Key == "name":
			name = a.Val
		case a.Key == "content":
			content = a.Val
		}
	}
	if name != tagTemplate && name != tagKeys {
		return "", Template{}, false
	}
	t, err := ParseTemplate(content)
	return name, t, err == nil
}

// For returns the tags whose prefix covers an image name, by whole segments.
func (t Tags) For(name string) Tags {
	return Tags{Templates: covering(t.Templates, name), Keys: covering(t.Keys, name)}
}

func covering(templates []Template, name string) []Template {
	var found []Template
	for _, t := range templates {
		if acproxy.HasPrefix(name, t.Prefix) {
			found = append(found, t)
		}
	}
	return found
}

func (t Tags) none() bool { return len(t.Templates) == 0 && len(t.Keys) == 0 }

// ParseTemplate reads a template as a tag's content and [Template.String] have it: PREFIX URL, with white space between. It returns an
// error matching [acproxy.ErrInvalid] for anything else.
func ParseTemplate(s string) (Template, error) {
	fields := strings.Fields(s)
	if len(fields) != 2 {
		return Template{}, acproxy.Invalid("a template is a prefix and a URL with a space between, not %d words", len(fields))
	}
	// A prefix of slashes alone would cover every name.
	if strings.Trim(fields[0], "/") == "" {
		return Template{}, acproxy.Invalid("the template's prefix %q is not an image name", fields[0])
	}
	return Template{Prefix: fields[0], URL: fields[1]}, nil
}
