package discovery

import (
	"cmp"
	"net/url"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
)

// Bounds of [Template.MatchAll]: a URL of nothing but dashes splits in more ways than anybody wants to know.
const (
	maxRequests   = 64
	maxMatchSteps = 50_000
	maxMatchURL   = 8 << 10
)

// A Request is what a URL asks for.
type Request struct {
	Ref acproxy.Ref
	Ext string // ExtImage or ExtSignature
}

// Match is the reverse of Expand: it returns the ref, and the ext, that the template makes this URL of. A version "latest" is none. Where
// the URL splits in several ways it returns the first of MatchAll.
func (t Template) Match(rawURL string) (ref acproxy.Ref, ext string, ok bool) {
	all := t.MatchAll(rawURL)
	if len(all) == 0 {
		return acproxy.Ref{}, "", false
	}
	return all[0].Ref, all[0].Ext, true
}

// MatchAll returns everything that the template makes this URL of, the longest name first and among equals those with an operating
// system and an architecture that the specification knows. Only names under the template's prefix count; a template without {name} stands
// for its prefix alone. Labels may be percent-encoded or, as the reference library leaves them, plain. At most 64 are returned, and the
// search itself is bounded, so that of a URL made to be ambiguous some may be missing.
func (t Template) MatchAll(rawURL string) []Request {
	if len(rawURL) > maxMatchURL {
		return nil
	}
	m := &matcher{template: t, values: make(map[string]string)}
	pattern := dropDefaultPort(t.URL)
	rawURL = dropDefaultPort(rawURL)
	if t.signed() {
		m.split(pattern)
		m.match(0, rawURL, 0)
	} else {
		path, query, queried := strings.Cut(rawURL, "?")
		m.split(pattern)
		if image, ok := strings.CutSuffix(path, ".asc"); ok {
			if queried {
				image += "?" + query
			}
			m.ext = ExtSignature
			m.match(0, image, 0)
		}
		m.ext = ExtImage
		m.match(0, rawURL, 0)
	}
	slices.SortStableFunc(m.found, func(a, b Request) int {
		return cmp.Or(len(b.Ref.Name())-len(a.Ref.Name()), knownPlatform(b.Ref)-knownPlatform(a.Ref))
	})
	return m.found[:min(len(m.found), maxRequests)]
}

// A matcher looks for the values of a template's variables that give a URL.
type matcher struct {
	template Template
	literals []string // the text before each variable, and after the last
	names    []string // the variables
	values   map[string]string
	ext      string // what the URL asks for, if there is no {ext} to tell
	steps    int
	found    []Request
}

func (m *matcher) split(pattern string) {
	last := 0
	for _, at := range variable.FindAllStringIndex(pattern, -1) {
		m.literals = append(m.literals, pattern[last:at[0]])
		m.names = append(m.names, pattern[at[0]+1:at[1]-1])
		last = at[1]
	}
	m.literals = append(m.literals, pattern[last:])
}

// match continues at the i-th literal and the given position of the URL.
func (m *matcher) match(i int, rawURL string, at int) {
	if m.steps++; m.steps > maxMatchSteps || len(m.found) >= 4*maxRequests {
		return
	}
	literal := m.literals[i]
	if len(rawURL)-at < len(literal) || !equalLiteral(rawURL, at, literal) {
		return
	}
	at += len(literal)
	if i == len(m.names) {
		if at == len(rawURL) {
			m.add()
		}
		return
	}
	name := m.names[i]
	if value, bound := m.values[name]; bound {
		if strings.HasPrefix(rawURL[at:], value) {
			m.match(i+1, rawURL, at+len(value))
		}
		return
	}
	if name == variableExt {
		for _, ext := range []string{ExtSignature, ExtImage} {
			if strings.HasPrefix(rawURL[at:], ext) {
				m.try(i, rawURL, at, at+len(ext))
			}
		}
		return
	}
	stop := "/?#"
	switch {
	case name == variableName:
		stop = "?#%"
	case strings.Contains(rawURL[:at], "?"):
		stop = "&#"
	}
	end := len(rawURL)
	if n := strings.IndexAny(rawURL[at:], stop); n >= 0 {
		end = at + n
	}
	if next := m.literals[i+1]; i+1 == len(m.names) {
		// The last variable ends where the rest begins: there is only one place to look.
		if e := len(rawURL) - len(next); e >= at && e <= end {
			m.try(i, rawURL, at, e)
		}
		return
	}
	for e := end; e >= at; e-- {
		m.try(i, rawURL, at, e)
	}
}

// try goes on with the i-th variable being what stands between two positions of the URL.
func (m *matcher) try(i int, rawURL string, from, to int) {
	m.values[m.names[i]] = rawURL[from:to]
	m.match(i+1, rawURL, to)
	delete(m.values, m.names[i])
}

// add keeps the values found, if they are a ref.
func (m *matcher) add() {
	labels := make(map[string]string, len(m.values))
	request := Request{Ext: m.ext}
	name := strings.TrimSuffix(m.template.Prefix, "/")
	for variable, raw := range m.values {
		switch variable {
		case variableName:
			name = raw
		case variableExt:
			request.Ext = raw
		default:
			value, err := url.PathUnescape(raw)
			if err != nil {
				return
			}
			// An empty one of these is the same as none, and then the template could not have been expanded.
			if value == "" && (variable == acproxy.LabelVersion || variable == acproxy.LabelOS || variable == acproxy.LabelArch) {
				return
			}
			labels[variable] = value
		}
	}
	if !acproxy.HasPrefix(name, m.template.Prefix) {
		return
	}
	ref, err := acproxy.NewRef(name, labels)
	if err != nil {
		return
	}
	request.Ref = ref
	// What Expand refuses, a dot segment for one, nobody is told to ask for.
	if _, err := m.template.Expand(ref, request.Ext); err != nil {
		return
	}
	if !slices.Contains(m.found, request) {
		m.found = append(m.found, request)
	}
}

// equalLiteral reports whether a literal stands in a URL at a position. Scheme and host have no upper and lower case.
func equalLiteral(rawURL string, at int, literal string) bool {
	text := rawURL[at : at+len(literal)]
	if text == literal {
		return true
	}
	for i := range len(literal) {
		if text[i] != literal[i] && (!inAuthority(rawURL[:at+i]) || !strings.EqualFold(text[i:i+1], literal[i:i+1])) {
			return false
		}
	}
	return true
}

// dropDefaultPort removes the port from a URL, or a template, that says what its scheme says already.
func dropDefaultPort(rawURL string) string {
	scheme, rest, ok := strings.Cut(rawURL, "://")
	if !ok {
		return rawURL
	}
	authority, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	switch strings.ToLower(scheme) {
	case "https":
		authority = strings.TrimSuffix(authority, ":443")
	case "http":
		authority = strings.TrimSuffix(authority, ":80")
	}
	return scheme + "://" + authority + path
}
