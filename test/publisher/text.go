package publisher

import (
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// A fault can be written as a line of text, to give it by hand: its fields as words, each with a value where it isn't just yes, with spaces in between.
//
//	truncate-after=1000 times=1
//	status=503 header="Retry-After: 7" header="ETag:"
//
// A value is quoted as in Go if it holds a space, a quotation mark or something that can't be seen. A header field without a value is one that is
// removed.

// ParseFault reads a fault from text, as [Fault.String] writes it.
func ParseFault(text string) (Fault, error) {
	var f Fault
	return f, parseFields(text, reflect.ValueOf(&f).Elem())
}

// ParseConnFault reads a fault of connections from text, as [ConnFault.String] writes it.
func ParseConnFault(text string) (ConnFault, error) {
	var f ConnFault
	return f, parseFields(text, reflect.ValueOf(&f).Elem())
}

// String returns the fault as text.
func (f Fault) String() string { return formatFields(reflect.ValueOf(f)) }

// String returns the fault as text.
func (f ConnFault) String() string { return formatFields(reflect.ValueOf(f)) }

// FaultWords returns the words that a fault can be made of, each with what its value is.
func FaultWords() []string { return fieldWords(reflect.TypeFor[Fault]()) }

// ConnFaultWords returns the words that a fault of connections can be made of.
func ConnFaultWords() []string { return fieldWords(reflect.TypeFor[ConnFault]()) }

func fieldWords(of reflect.Type) []string {
	var words []string
	for _, field := range reflect.VisibleFields(of) {
		word := wordOf(field.Name)
		switch reflect.Zero(field.Type).Interface().(type) {
		case int, int64, *int64:
			word += "=N"
		case time.Duration:
			word += "=TIME"
		case string, []byte:
			word += "=TEXT"
		case http.Header:
			word += `="NAME: VALUE"`
		}
		words = append(words, word)
	}
	return words
}

// wordOf writes a field's name as a word: TruncateAfter is truncate-after.
func wordOf(name string) string {
	var b strings.Builder
	for i, c := range name {
		// The letters of HTTP belong together.
		if i > 0 && unicode.IsUpper(c) && !unicode.IsUpper(rune(name[i-1])) {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(c))
	}
	return b.String()
}

func parseFields(text string, to reflect.Value) error {
	for {
		text = strings.TrimLeft(text, " ")
		if text == "" {
			return nil
		}
		word, value, rest, err := cutField(text)
		if err != nil {
			return err
		}
		text = rest
		field, ok := to.Type().FieldByNameFunc(func(name string) bool { return wordOf(name) == word })
		if !ok {
			return fmt.Errorf("%q is none of the words of a fault: %s", word, strings.Join(fieldWords(to.Type()), ", "))
		}
		if err := parseValue(value, to.FieldByIndex(field.Index)); err != nil {
			return fmt.Errorf("%s: %w", word, err)
		}
	}
}

// cutField takes WORD or WORD=VALUE off the beginning of a text. Without a value, the value is nil.
func cutField(text string) (word string, value *string, rest string, err error) {
	end := strings.IndexAny(text, " =")
	if end < 0 {
		return text, nil, "", nil
	}
	word, rest = text[:end], text[end:]
	if rest[0] == ' ' {
		return word, nil, rest, nil
	}
	rest = rest[1:]
	if !strings.HasPrefix(rest, `"`) {
		v, after, _ := strings.Cut(rest, " ")
		return word, &v, after, nil
	}
	quoted, err := strconv.QuotedPrefix(rest)
	if err != nil {
		return "", nil, "", fmt.Errorf("%s: the quotation that begins with %.20q has no end", word, rest)
	}
	v, err := strconv.Unquote(quoted)
	return word, &v, rest[len(quoted):], err
}

func parseValue(value *string, to reflect.Value) error {
	if to.Kind() == reflect.Bool {
		if value != nil {
			return errors.New("it takes no value")
		}
		to.SetBool(true)
		return nil
	}
	if value == nil {
		return errors.New("it needs a value, after a =")
	}
	switch at := to.Addr().Interface().(type) {
	case *string:
		*at = *value
	case *[]byte:
		*at = []byte(*value)
	case *time.Duration:
		d, err := time.ParseDuration(*value)
		if err != nil {
			return fmt.Errorf("%q is not a time like 1s or 200ms", *value)
		}
		*at = d
	case *http.Header:
		name, v, ok := strings.Cut(*value, ":")
		if !ok || name == "" {
			return fmt.Errorf("%q is not a header field like \"Name: value\"", *value)
		}
		if *at == nil {
			*at = make(http.Header)
		}
		name = http.CanonicalHeaderKey(name)
		if v = strings.TrimSpace(v); v == "" {
			(*at)[name] = nil
		} else {
			at.Add(name, v)
		}
	default:
		n, err := strconv.ParseInt(*value, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a number", *value)
		}
		switch at := at.(type) {
		case *int:
			*at = int(n)
		case *int64:
			*at = n
		case **int64:
			*at = &n
		}
	}
	return nil
}

func formatFields(of reflect.Value) string {
	var words []string
	for _, field := range reflect.VisibleFields(of.Type()) {
		value := of.FieldByIndex(field.Index)
		if value.IsZero() {
			continue
		}
		word := wordOf(field.Name)
		switch v := value.Interface().(type) {
		case bool:
			words = append(words, word)
		case string:
			words = append(words, word+"="+quoted(v))
		case []byte:
			words = append(words, word+"="+quoted(string(v)))
		case *int64:
			words = append(words, fmt.Sprintf("%s=%d", word, *v))
		case http.Header:
			for _, name := range sortedNames(v) {
				for _, one := range v[name] {
					words = append(words, word+"="+quoted(name+": "+one))
				}
				if len(v[name]) == 0 {
					words = append(words, word+"="+quoted(name+":"))
				}
			}
		default:
			words = append(words, fmt.Sprintf("%s=%v", word, v))
		}
	}
	return strings.Join(words, " ")
}

func sortedNames(h http.Header) []string {
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// quoted quotes a value if it can't stand as it is.
func quoted(s string) string {
	if q := strconv.Quote(s); len(q) != len(s)+2 || strings.ContainsAny(s, " ") || s == "" {
		return q
	}
	return s
}
