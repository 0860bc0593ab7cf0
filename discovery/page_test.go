package discovery

import (
	"errors"
	"io"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/acproxy/acproxy"
)

// unescaped returns a URL without percent-encoding, to compare two that differ in that alone.
func unescaped(rawURL string) string {
	if s, err := url.PathUnescape(rawURL); err == nil {
		return s
	}
	return rawURL
}

func TestParse(t *testing.T) {
	const (
		tag = `<meta name="ac-discovery" content="example.com https://h/{name}.{ext}">`
		key = `<meta name="ac-discovery-pubkeys" content="example.com https://h/key.asc">`
	)
	template, keyURL := Template{"example.com", "https://h/{name}.{ext}"}, Template{"example.com", "https://h/key.asc"}
	tests := []struct {
		name, page string
		templates  []Template
		keys       []Template
	}{
		{"both", "<html><head>" + tag + key + "</head></html>", []Template{template}, []Template{keyURL}},
		{"in the order of the page", tag + `<meta content="a/b https://i/" name="ac-discovery" />`, []Template{template, {"a/b", "https://i/"}}, nil},
		{"in the body", "<body><p>" + tag, []Template{template}, nil},
		{"in capitals", strings.Replace(tag, "meta name", "META NAME", 1), []Template{template}, nil},
		{"white space of any kind", `<meta name="ac-discovery" content=" example.com` + "\n\t" + `https://h/{name}.{ext} ">`, []Template{template}, nil},
		{"entities", `<meta name="ac-discovery" content="example.com https://h/{name}.{ext}?a&amp;b">`, []Template{{"example.com", "https://h/{name}.{ext}?a&b"}}, nil},
		{"in a comment", "<!-- " + tag + " -->", nil, nil},
		{"in a script", "<script>" + tag + "</script>", nil, nil},
		{"in a style, a title and a textarea", "<style>" + tag + "</style><title>" + tag + "</title><textarea>" + tag + "</textarea>", nil, nil},
		{"in an attribute", `<p title='` + tag + `'>`, nil, nil},
		{"an end tag", `</meta name="ac-discovery" content="example.com https://h/">`, nil, nil},
		{"another tag", strings.Replace(tag, "meta", "link", 1), nil, nil},
		{"another name", strings.Replace(tag, "ac-discovery", "ac-push-discovery", 1), nil, nil},
		{"a name in capitals", strings.Replace(tag, "ac-discovery", "AC-Discovery", 1), nil, nil},
		{"no content", `<meta name="ac-discovery">`, nil, nil},
		{"one word", `<meta name="ac-discovery" content="example.com">`, nil, nil},
		{"three words", `<meta name="ac-discovery" content="example.com https://h/ x">`, nil, nil},
		{"a prefix that would cover everything", `<meta name="ac-discovery" content="/ https://h/">`, nil, nil},
		{"a malformed one does not hide the next", `<meta name="ac-discovery" content="example.com">` + tag, []Template{template}, nil},
		{"an attribute given twice: the first counts, as HTML says", `<meta name="ac-discovery" name="x" content="example.com https://h/{name}.{ext}" content="a b">`, []Template{template}, nil},
		{"an end in the middle", tag + `<meta name="ac-discovery" content="exam`, []Template{template}, nil},
		{"nothing", "", nil, nil},
		{"no HTML", "\x00\xff not HTML at all", nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse(strings.NewReader(tt.page))
			if err != nil || !reflect.DeepEqual(got, Tags{tt.templates, tt.keys}) {
				t.Errorf("Parse = %v, %v, want %v and %v", got, err, tt.templates, tt.keys)
			}
		})
	}
	t.Run("a read that fails", func(t *testing.T) {
		_, err := Parse(io.MultiReader(strings.NewReader(tag), iotest.ErrReader(io.ErrUnexpectedEOF)))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("as many bytes of tags as allowed, and one more", func(t *testing.T) {
		for extra, want := range []error{nil, acproxy.ErrPublisher} {
			page := `<meta name="ac-discovery" content="a ` + strings.Repeat("x", MaxTagBytes-1+extra) + `">`
			if _, err := Parse(strings.NewReader(page)); !errors.Is(err, want) {
				t.Errorf("%d too many: error = %v, want %v", extra, err, want)
			}
		}
	})
}

func TestTagsForAName(t *testing.T) {
	tags := Tags{Templates: []Template{{"example.com", "1"}, {"example.com/app", "2"}, {"example.com/ap", "3"}, {"example.com/app/", "4"}, {"other.com", "5"}, {"example.com/app/web", "6"}}}
	var got string
	for _, found := range tags.For("example.com/app").Templates {
		got += found.URL
	}
	if got != "124" {
		t.Errorf("templates %s, want 1, 2 and 4", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`<meta name="ac-discovery" content="example.com https://h/{name}.{ext}">`)
	f.Add(`<script><!-- <meta name=ac-discovery content='a b'></script><meta name=ac-discovery-pubkeys content='a b'/>`)
	f.Fuzz(func(t *testing.T, page string) {
		tags, err := Parse(strings.NewReader(page))
		if err != nil {
			return
		}
		// What was read, written again and read again is the same.
		var b strings.Builder
		replacer := strings.NewReplacer("&", "&amp;", `"`, "&#34;")
		for name, templates := range map[string][]Template{tagTemplate: tags.Templates, tagKeys: tags.Keys} {
			for _, template := range templates {
				if again, err := ParseTemplate(template.String()); err != nil || again != template {
					t.Errorf("ParseTemplate(%q) = %v, %v", template, again, err)
				}
				b.WriteString(`<meta name="` + name + `" content="` + replacer.Replace(template.String()) + `">`)
			}
		}
		again, err := Parse(strings.NewReader(b.String()))
		if err != nil || !reflect.DeepEqual(again, tags) {
			t.Errorf("%q read again is %v, %v, want %v", b.String(), again, err, tags)
		}
	})
}
