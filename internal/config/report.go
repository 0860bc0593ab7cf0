package config

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/acproxy/acproxy"
)

// maxShown bounds the mistakes that an error tells of. More than that have one cause.
const maxShown = 20

// password matches the user name and password of a URL: an error may end in a log that others read.
var password = regexp.MustCompile(`://([^\s:/@]*):[^\s/]*@`)

// A Mistake is one thing that is wrong in a configuration.
type Mistake struct {
	File    string // the name given to Load or Parse, "" for a Config that was not read from a file
	Line    int    // from 1; 0 for a Config that was not read from a file
	Column  int    // in characters, from 1
	Key     string // the path of the key, as in listen[0].address; "" if it is about the file as a whole
	Message string // what is wrong and what to write instead
	Source  string // the line as it stands in the file
}

// Error returns file:line:column, the key and the message, and below that the line with a mark under the place.
func (m *Mistake) Error() string {
	var b strings.Builder
	if m.Line > 0 {
		fmt.Fprintf(&b, "%s:%d:%d: ", m.File, m.Line, m.Column)
	}
	if m.Key != "" {
		b.WriteString(m.Key + ": ")
	}
	b.WriteString(m.Message)
	if m.Source != "" {
		number := fmt.Sprintf("%5d", m.Line)
		source, mark := excerpt(m.Source, m.Column)
		fmt.Fprintf(&b, "\n%s | %s\n%s | %s^", number, source, strings.Repeat(" ", len(number)), mark)
	}
	return b.String()
}

// Is reports whether target is [acproxy.ErrInvalid].
func (m *Mistake) Is(target error) bool { return target == acproxy.ErrInvalid }

// Mistakes is all that is wrong in a configuration, in the order of the file. It is never empty.
type Mistakes []*Mistake

// Error returns the mistakes, one below the other, the first 20 of them.
func (m Mistakes) Error() string {
	var b strings.Builder
	for i, mistake := range m {
		if i == maxShown {
			fmt.Fprintf(&b, "\nand %d more", len(m)-maxShown)
			break
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(mistake.Error())
	}
	return b.String()
}

// Unwrap returns the mistakes.
func (m Mistakes) Unwrap() []error {
	errs := make([]error, len(m))
	for i := range m {
		errs[i] = m[i]
	}
	return errs
}

// A place is where something stands in the file, from 1; the zero place is not known.
type place struct{ line, column int }

// A report gathers mistakes and knows where the keys stand.
type report struct {
	file   string
	lines  []string         // nil for a Config that was not read from a file
	places map[string]place // of values, by path
	keys   map[string]place // of keys, by path
	found  Mistakes
}

// value notes a mistake in the value at a path.
func (r *report) value(path, format string, args ...any) {
	r.note(path, r.nearest(r.places, path), fmt.Sprintf(format, args...))
}

// key notes a mistake about the key itself.
func (r *report) key(path, format string, args ...any) {
	r.note(path, r.nearest(r.keys, path), fmt.Sprintf(format, args...))
}

func (r *report) note(path string, at place, message string) {
	m := &Mistake{Key: path, Message: message}
	if r.lines != nil {
		at.line = min(max(at.line, 1), max(len(r.lines), 1))
		at.column = max(at.column, 1)
		m.File, m.Line, m.Column = r.file, at.line, at.column
		if at.line <= len(r.lines) {
			m.Source = password.ReplaceAllString(r.lines[at.line-1], "://$1:…@")
		}
		m.Column = min(m.Column, utf8.RuneCountInString(m.Source)+1)
	}
	r.found = append(r.found, m)
}

// nearest returns the place of a path, or of the closest one above it that the file has.
func (r *report) nearest(places map[string]place, path string) place {
	for {
		if at, ok := places[path]; ok {
			return at
		}
		if at, ok := r.keys[path]; ok {
			return at
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			return place{}
		}
		path = path[:i]
	}
}

// broken reports whether a mistake was found at a path, above or below it.
func (r *report) broken(path string) bool {
	return slices.ContainsFunc(r.found, func(m *Mistake) bool { return within(m.Key, path) || within(path, m.Key) })
}

// within reports whether a path is another or lies below it.
func within(path, other string) bool {
	rest, ok := strings.CutPrefix(path, other)
	return ok && (other == "" || rest == "" || rest[0] == '.' || rest[0] == '[')
}

// err returns what was found, nil if nothing was.
func (r *report) err() error {
	if len(r.found) == 0 {
		return nil
	}
	slices.SortStableFunc(r.found, func(a, b *Mistake) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return r.found
}

// excerpt returns a line of a file fit for a terminal and the blanks that come before a mark under the column.
func excerpt(line string, column int) (source, mark string) {
	const most = 120
	var s, blanks strings.Builder
	n := 0
	for _, c := range line {
		n++
		if n > most && n > column {
			s.WriteRune('…')
			break
		}
		if c != '\t' && (c < ' ' || c == 0x7f || c == utf8.RuneError) {
			c = '·'
		}
		s.WriteRune(c)
		if n < column {
			if c != '\t' {
				c = ' '
			}
			blanks.WriteRune(c)
		}
	}
	return s.String(), blanks.String()
}
