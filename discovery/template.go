package discovery

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
)

// What {ext} says for an image and for its signature (specification, "Discovery Templates").
const (
	ExtImage     = "aci"
	ExtSignature = "aci.asc"
)

// The template variables that are not labels.
const (
	variableName = "name"
	variableExt  = "ext"
)

// latest is what {version} says when no version was asked for.
const latest = "latest"

// A Template says where the images under a prefix are, by a URL with variables in braces.
type Template struct {
	Prefix string `json:"prefix"` // the image-name prefix it is for, by segments
	URL    string `json:"url"`    // with variables: https://storage.example.com/{name}-{version}.{ext}
}

// String returns the template as the content of a tag has it, and as [ParseTemplate] reads it.
func (t Template) String() string { return t.Prefix + " " + t.URL }

// maxTemplateURL is how long the URL of a template that somebody has carried here can be, in bytes.
const maxTemplateURL = 4096

// Check returns why a template can't be one that discovery has found for a name, nil if it can. The error matches [acproxy.ErrInvalid].
func (t Template) Check(name string) error {
	if err := acproxy.CheckName(t.Prefix); err != nil || !acproxy.HasPrefix(name, t.Prefix) {
		return acproxy.Invalid("the template for the prefix %.80q doesn't cover %s", t.Prefix, name)
	}
	// Braces are not for URLs, but here they stand for what is put in.
	u, err := url.Parse(strings.NewReplacer("{", "", "}", "").Replace(t.URL))
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || len(t.URL) > maxTemplateURL || strings.ContainsFunc(t.URL, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return acproxy.Invalid("the template %.80q of %s is no http or https URL of up to %d bytes", t.URL, name, maxTemplateURL)
	}
	return nil
}

// variable is one variable with its braces.
var variable = regexp.MustCompile(`\{[^{}]*\}`)

// leftover is what the reference library takes for a variable that nothing was put in for.
var leftover = regexp.MustCompile(`\{.*?\}`)

// Variables returns the names of the template's variables, each once, in the order in which they first stand there.
func (t Template) Variables() []string {
	var names []string
	for _, v := range variable.FindAllString(t.URL, -1) {
		if name := v[1 : len(v)-1]; !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// signed reports whether the template tells an image from its signature.
func (t Template) signed() bool { return strings.Contains(t.URL, "{"+variableExt+"}") }

// Expand returns the URL of an image, for ext [ExtImage], or of its signature, for [ExtSignature]. Without a version {version} is "latest".
//
// The specification speaks of simple substitution, but values come from strangers: those of labels are percent-encoded, all but letters,
// digits and -._~ of them, so that a value never becomes another path, query or host. A name is put in as it is; it holds nothing that
// needs encoding, and its slashes are meant. For a template without {ext}, which the specification forbids, the signature is where rkt
// looks for that of a plain URL, at the same path with .asc after it.
//
// It returns an error matching [acproxy.ErrPublisher] if the template can't be used for any image, and one matching [acproxy.ErrInvalid]
// if it can't be used for this one: a variable that is no label of ref is left over, or the outcome is not a plain http or https URL
// with a host and without dot segments, user name or fragment.
func (t Template) Expand(ref acproxy.Ref, ext string) (string, error) {
	if ref.IsZero() || ext != ExtImage && ext != ExtSignature {
		return "", acproxy.Invalid("a template is expanded for a ref, and for %q or %q, not %q", ExtImage, ExtSignature, ext)
	}
	values := ref.Labels()
	if _, ok := values[acproxy.LabelVersion]; !ok {
		values[acproxy.LabelVersion] = latest
	}
	values[variableName], values[variableExt] = ref.Name(), ext
	expanded, err := t.expand(values)
	if err != nil {
		return "", err
	}
	if ext == ExtSignature && !t.signed() {
		if expanded, err = appendToPath(expanded, ".asc"); err != nil {
			return "", err
		}
	}
	if err := checkURL(expanded); err != nil {
		return "", acproxy.Invalid("template %s expanded for %v: %v", t.URL, ref, err)
	}
	return expanded, nil
}

func (t Template) expand(values map[string]string) (string, error) {
	var b strings.Builder
	rest := t.URL
	for rest != "" {
		at := variable.FindStringIndex(rest)
		if at == nil {
			break
		}
		b.WriteString(rest[:at[0]])
		name := rest[at[0]+1 : at[1]-1]
		rest = rest[at[1]:]
		value, ok := values[name]
		if !ok {
			return "", acproxy.Invalid("template %s: the image asked for has no label %q to put in", t.URL, name)
		}
		if name != variableName {
			if inAuthority(b.String()) && strings.ContainsFunc(value, func(c rune) bool { return c > 0x7f || !unreserved(byte(c)) }) {
				return "", acproxy.Invalid("template %s: %s=%q can't be a part of a host name", t.URL, name, value)
			}
			value = escape(value)
		}
		b.WriteString(value)
	}
	b.WriteString(rest)
	expanded := b.String()
	if left := leftover.FindString(expanded); left != "" {
		return "", acproxy.Invalid("template %s: %s is no variable", t.URL, left)
	}
	return expanded, nil
}

// inAuthority reports whether what follows the beginning of a URL is still its host.
func inAuthority(beginning string) bool {
	_, after, ok := strings.Cut(beginning, "://")
	return !ok || !strings.ContainsAny(after, "/?#")
}

// unreserved reports whether a character may stand in any part of a URL as itself (RFC 3986, section 2.3).
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

// escape percent-encodes all but the unreserved characters. It fits path and query alike: %20 and %2B mean the same in both, where a space
// and a plus do not.
func escape(value string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(value) {
		if c := value[i]; unreserved(c) {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return b.String()
}

// appendToPath puts a suffix after the path of a URL and before its query.
func appendToPath(rawURL, suffix string) (string, error) {
	path, query, ok := strings.Cut(rawURL, "?")
	if inAuthority(path) || strings.HasSuffix(path, "/") {
		return "", acproxy.Invalid("%s has no file name to put %s after", rawURL, suffix)
	}
	if ok {
		return path + suffix + "?" + query, nil
	}
	return path + suffix, nil
}

// checkURL returns an error unless the text is a URL that can be asked for as it stands.
func checkURL(rawURL string) error {
	u, err := url.Parse(rawURL)
	switch {
	case err != nil:
		// The URL is in the error's text once more, and the caller names it.
		if parse, ok := errors.AsType[*url.Error](err); ok {
			return parse.Err
		}
		return err
	case u.Scheme != "https" && u.Scheme != "http":
		return fmt.Errorf("the scheme is %q, not https or http", u.Scheme)
	case u.Hostname() == "":
		return fmt.Errorf("there is no host")
	case u.User != nil || strings.Contains(u.Host, "@"):
		return fmt.Errorf("there is a user name in it")
	case strings.Contains(rawURL, "#"):
		return fmt.Errorf("there is a fragment in it")
	}
	for segment := range strings.FieldsFuncSeq(u.Path, func(c rune) bool { return c == '/' || c == '\\' }) {
		if segment == "." || segment == ".." {
			return fmt.Errorf("there is a dot segment in its path")
		}
	}
	return nil
}
