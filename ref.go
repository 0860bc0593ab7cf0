package acproxy

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// Limits of what a ref may hold. Nothing in the specification bounds names and labels; a proxy that stores them has to.
const (
	MaxNameLength  = 512  // bytes of an image name
	MaxLabelLength = 256  // bytes of a label's name, and of a label's value
	MaxLabels      = 32   // labels of one ref
	MaxRefLength   = 8192 // bytes of a ref as text
)

// The label names that mean something to acproxy.
const (
	LabelVersion = "version"
	LabelOS      = "os"
	LabelArch    = "arch"
)

// latest is what the version variable of a template says when nobody asked for a version.
const latest = "latest"

// A Ref asks for an image: a name and the labels that the image has to carry. The zero Ref is not valid.
//
// Refs are canonical and comparable: two refs that ask for the same are equal with ==. The version "latest" is the same as no version,
// because that is how the specification writes "no version" into a URL, and from the URL alone nobody can tell them apart; a ref without a
// version asks for whatever its publisher calls latest.
type Ref struct {
	name   string
	labels string // the labels but for version, sorted by name, as in String
	// version stands apart because nearly every ref has one and it is written in its own way.
	version string
}

// NewRef returns the ref for an image name and labels. An empty version, os or arch is the same as none. It returns an error matching
// [ErrInvalid] if the name or a label's name is not an AC identifier, if a label is called "name" or "ext" (those are template
// variables), or if something is too long or not text.
func NewRef(name string, labels map[string]string) (Ref, error) {
	if err := CheckName(name); err != nil {
		return Ref{}, err
	}
	if len(labels) > MaxLabels {
		return Ref{}, Invalid("ref %s has %d labels, the limit is %d", name, len(labels), MaxLabels)
	}
	r := Ref{name: name}
	var b strings.Builder
	for _, label := range slices.Sorted(maps.Keys(labels)) {
		value := labels[label]
		if err := checkLabel(label, value); err != nil {
			return Ref{}, err
		}
		switch {
		case label == LabelVersion:
			if value != latest {
				r.version = value
			}
		case value == "" && (label == LabelOS || label == LabelArch):
		default:
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			b.WriteString(label + "=" + escape(value))
		}
	}
	r.labels = b.String()
	if n := len(r.String()); n > MaxRefLength {
		return Ref{}, Invalid("ref %.64s… is %d bytes long, the limit is %d", name, n, MaxRefLength)
	}
	return r, nil
}

// ParseRef reads a ref as people write it and as [Ref.String] prints it: name[:version][,label=value]…, values percent-encoded where they
// hold a comma, a percent sign or a control character. It returns an error matching [ErrInvalid] for anything else.
func ParseRef(s string) (Ref, error) {
	head, rest, more := strings.Cut(s, ",")
	name, version, versioned := strings.Cut(head, ":")
	labels := make(map[string]string)
	if versioned {
		v, err := unescape(version)
		if err != nil || v == "" {
			return Ref{}, Invalid("ref %q: the version after the colon is empty or not percent-encoded properly", clip(s))
		}
		labels[LabelVersion] = v
	}
	for more {
		var pair string
		pair, rest, more = strings.Cut(rest, ",")
		label, value, ok := strings.Cut(pair, "=")
		if !ok {
			return Ref{}, Invalid("ref %q: %q is not label=value", clip(s), clip(pair))
		}
		if _, twice := labels[label]; twice {
			return Ref{}, Invalid("ref %q: label %q is given twice", clip(s), clip(label))
		}
		v, err := unescape(value)
		if err != nil {
			return Ref{}, Invalid("ref %q: the value of label %q is not percent-encoded properly", clip(s), clip(label))
		}
		labels[label] = v
	}
	return NewRef(name, labels)
}

// Name returns the image name.
func (r Ref) Name() string { return r.name }

// Host returns the name's first segment, the host that discovery starts at. It carries no port.
func (r Ref) Host() string {
	host, _, _ := strings.Cut(r.name, "/")
	return host
}

// Version returns the version asked for, "" for whatever the publisher calls latest.
func (r Ref) Version() string { return r.version }

// Label returns a label's value, and whether the ref has it.
func (r Ref) Label(name string) (string, bool) {
	if name == LabelVersion {
		return r.version, r.version != ""
	}
	v, ok := r.Labels()[name]
	return v, ok
}

// Labels returns the labels as a new map, the version among them if the ref has one.
func (r Ref) Labels() map[string]string {
	labels := make(map[string]string)
	if r.version != "" {
		labels[LabelVersion] = r.version
	}
	if r.labels == "" {
		return labels
	}
	for pair := range strings.SplitSeq(r.labels, ",") {
		label, value, _ := strings.Cut(pair, "=")
		labels[label], _ = unescape(value)
	}
	return labels
}

// String returns the ref as [ParseRef] reads it; it is canonical.
func (r Ref) String() string {
	b, _ := r.AppendText(make([]byte, 0, len(r.name)+len(r.version)+len(r.labels)+2))
	return string(b)
}

// AppendText appends the ref as String returns it. There is no error.
func (r Ref) AppendText(b []byte) ([]byte, error) {
	b = append(b, r.name...)
	if r.version != "" {
		b = append(append(b, ':'), escape(r.version)...)
	}
	if r.labels != "" {
		b = append(append(b, ','), r.labels...)
	}
	return b, nil
}

// IsZero reports whether r is the zero Ref.
func (r Ref) IsZero() bool { return r == Ref{} }

// MarshalText returns the ref as String does.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads the ref as ParseRef does; empty text is the zero Ref.
func (r *Ref) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*r = Ref{}
		return nil
	}
	parsed, err := ParseRef(string(text))
	if err != nil {
		return err
	}
	*r = parsed
	return nil
}

// Matches reports, as nil, that an image of this name with these labels is what the ref asks for: the names are equal and every label of
// the ref is there with the same value; the image may have more. Otherwise it returns an error matching [ErrPublisher] that says what
// differs. The rule is the specification's (discovery, "the labels … MUST match").
func (r Ref) Matches(name string, labels map[string]string) error {
	if name != r.name {
		return &Error{Kind: ErrPublisher, Code: "wrong-name", Detail: fmt.Sprintf("the manifest names %q, asked for was %q: a mirror can't rename an image", clip(name), r.name)}
	}
	want := r.Labels()
	for _, label := range slices.Sorted(maps.Keys(want)) {
		got, ok := labels[label]
		switch {
		case !ok:
			return &Error{Kind: ErrPublisher, Code: "wrong-labels", Detail: fmt.Sprintf("the manifest of %s has no label %q, asked for was %q", r.name, label, want[label])}
		case got != want[label]:
			return &Error{Kind: ErrPublisher, Code: "wrong-labels", Detail: fmt.Sprintf("the manifest of %s says %s=%q, asked for was %q", r.name, label, clip(got), want[label])}
		}
	}
	return nil
}

// CheckName returns an error matching [ErrInvalid] if s is not an image name: an AC identifier of at most [MaxNameLength] bytes.
func CheckName(s string) error {
	if len(s) > MaxNameLength {
		return Invalid("image name %q is %d bytes long, the limit is %d", clip(s), len(s), MaxNameLength)
	}
	if !isACIdentifier(s) {
		return Invalid("image name %q is not an AC identifier: lower-case letters and digits, separated by single - . _ ~ or /, starting with a host as in example.com/app", clip(s))
	}
	return nil
}

// HasPrefix reports whether an image name lies under a prefix, by whole segments: example.com/app covers example.com/app and
// example.com/app/web, but not example.com/apple. The empty prefix covers every name.
func HasPrefix(name, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return prefix == "" || name == prefix || len(name) > len(prefix) && name[len(prefix)] == '/' && name[:len(prefix)] == prefix
}

func checkLabel(label, value string) error {
	if len(label) > MaxLabelLength || len(value) > MaxLabelLength {
		return Invalid("label %q: name or value is longer than %d bytes", clip(label), MaxLabelLength)
	}
	if !isACIdentifier(label) {
		return Invalid("label name %q is not an AC identifier", clip(label))
	}
	if label == "name" || label == "ext" {
		return Invalid("a label can't be called %q: that is a template variable", label)
	}
	if !utf8.ValidString(value) || strings.ContainsFunc(value, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return Invalid("the value of label %q is not printable text: %q", label, clip(value))
	}
	return nil
}

// isACIdentifier reports whether s is an AC identifier as the reference library takes it: the specification's expression forbids two separators in
// a row, its examples have them (example.com/~user/app_v1). Beyond the library, segments that are empty or begin with a dot are refused: they
// could be taken for steps in a path, and acproxy's own paths begin with "/.". Every request is asked for this; the library's expressions take 2 µs.
func isACIdentifier(s string) bool {
	if s == "" || !isAlphanumeric(s[0]) || !isAlphanumeric(s[len(s)-1]) {
		return false
	}
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case isAlphanumeric(c), c == '-', c == '_', c == '~':
		case c == '.', c == '/':
			if s[i-1] == '/' {
				return false
			}
		default:
			return false
		}
	}
	return true
}

func isAlphanumeric(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// escape writes a value so that it holds none of the characters that separate values in a ref.
func escape(value string) string {
	if !strings.ContainsAny(value, ",% ") {
		return value
	}
	return strings.NewReplacer("%", "%25", ",", "%2C", " ", "%20").Replace(value)
}

func unescape(value string) (string, error) { return url.PathUnescape(value) }

// clip cuts a stranger's text to a length fit for an error message.
func clip(s string) string {
	const most = 96
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
