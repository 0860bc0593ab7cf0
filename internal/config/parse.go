package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxFile is the size of a configuration at most. A person writes a few kilobytes.
const maxFile = 1 << 20

// Load reads the configuration in a file and checks all of it, the certificates that it names included, before anything starts. Relative
// paths in it are taken from the file's directory and come out absolute.
//
// What is wrong with it comes back as [Mistakes], which match [acproxy.ErrInvalid]; a file that can't be read is the operating system's error.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	r := newReport(path, text)
	c := parse(r, text)
	if c != nil {
		c.resolve(dir)
		c.checkFiles(r)
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// Parse reads a configuration in YAML and checks all that can be told from the text alone: it opens no file. Name stands for the file in
// errors. What is wrong comes back as [Mistakes], which match [acproxy.ErrInvalid], each with its line and column.
//
// The YAML is read strictly: a key that means nothing, is given twice or has a value of another type is a mistake, and so are anchors,
// aliases, tags and a second document, none of which a configuration needs.
func Parse(name string, text []byte) (*Config, error) {
	r := newReport(name, text)
	c := parse(r, text)
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// Validate checks the values of a configuration that was changed after it was read, by flags for example, as Parse does. Its mistakes name
// the key and no line.
func (c *Config) Validate() error {
	r := &report{}
	c.check(r)
	return r.err()
}

func newReport(name string, text []byte) *report {
	r := &report{file: name, lines: []string{}, places: make(map[string]place), keys: make(map[string]place)}
	if len(text) <= maxFile {
		for line := range bytes.SplitSeq(text, []byte("\n")) {
			r.lines = append(r.lines, string(bytes.TrimSuffix(line, []byte("\r"))))
		}
	}
	return r
}

// parse returns what can be made of the text, nil if that is nothing, and notes what is wrong.
func parse(r *report, text []byte) *Config {
	c := Default()
	switch {
	case len(text) > maxFile:
		r.value("", "the file is larger than %d bytes, which no configuration needs to be", maxFile)
		return nil
	case !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0:
		r.note("", firstInvalid(text), "the file is not text in UTF-8: save it as that")
		return nil
	}
	if rest, ok := bytes.CutPrefix(text, []byte("\ufeff")); ok {
		text = rest
		r.lines[0] = strings.TrimPrefix(r.lines[0], "\ufeff")
	}
	file, err := parser.ParseBytes(text, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		r.syntax(err)
		return nil
	}
	d := decoder{r}
	read := false
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if read {
			r.note("", at(doc.Body), "a second document begins here: a configuration is one, without --- in between")
			break
		}
		read = true
		d.decode("", doc.Body, reflect.ValueOf(&c).Elem(), "")
	}
	c.check(r)
	return &c
}

// firstInvalid returns the place of the first byte that is not text.
func firstInvalid(text []byte) place {
	at := place{1, 1}
	for len(text) > 0 {
		c, size := utf8.DecodeRune(text)
		switch {
		case c == 0, c == utf8.RuneError && size == 1:
			return at
		case c == '\n':
			at = place{at.line + 1, 1}
		default:
			at.column++
		}
		text = text[size:]
	}
	return at
}

// syntax notes what the YAML parser has to say.
func (r *report) syntax(err error) {
	var syntax *yaml.SyntaxError
	if !errors.As(err, &syntax) || syntax.Token == nil || syntax.Token.Position == nil {
		r.value("", "this is not YAML: %v", err)
		return
	}
	at := place{syntax.Token.Position.Line, syntax.Token.Position.Column}
	message := "this is not YAML: " + syntax.Message
	var source string
	if at.line >= 1 && at.line <= len(r.lines) {
		source = r.lines[at.line-1]
	}
	switch {
	case strings.HasPrefix(strings.TrimLeft(source, " "), "\t"):
		message = "a line is indented by a tab: use spaces"
	case strings.Contains(source, "{") && !strings.Contains(source, `"`) && !strings.Contains(source, "'"):
		message += `; text that holds { or } goes in quotes: "{name}"`
	}
	r.note("", at, message)
}

// A decoder fills values from the YAML's nodes. Whatever doesn't fit is noted and left as it is, so that all mistakes come out together.
type decoder struct{ r *report }

// decode fills v, the value at path, from a node. The words that v may be are in oneof, if it isn't "".
func (d decoder) decode(path string, n ast.Node, v reflect.Value, oneof string) {
	d.r.places[path] = at(n)
	switch n := n.(type) {
	case *ast.AnchorNode, *ast.TagNode:
		d.r.value(path, "anchors (&) and tags (!) mean nothing here: write the value alone, in quotes if it begins with one of these")
		return
	case *ast.AliasNode:
		d.r.value(path, "text that begins with * goes in quotes, as in \"*.example.com\"; aliases mean nothing here")
		return
	case *ast.NullNode:
		// A section or list whose lines are all commented out is as good as none.
		if k := v.Kind(); k == reflect.Struct && !isText(v) || k == reflect.Slice || k == reflect.Map {
			return
		}
		d.r.value(path, "there is no value: write one, or remove the line for the default, %s", describe(v))
		return
	case *ast.MappingValueNode:
		d.decode(path, &ast.MappingNode{BaseNode: n.BaseNode, Start: n.Start, Values: []*ast.MappingValueNode{n}}, v, oneof)
		return
	}
	switch {
	case v.Kind() == reflect.Pointer:
		fresh := reflect.New(v.Type().Elem())
		d.decode(path, n, fresh.Elem(), oneof)
		v.Set(fresh)
	case isText(v):
		d.decodeText(path, n, v)
	case v.Kind() == reflect.Struct:
		d.decodeStruct(path, n, v)
	case v.Kind() == reflect.Slice:
		d.decodeList(path, n, v, oneof)
	case v.Kind() == reflect.Map:
		d.decodeMap(path, n, v)
	default:
		d.decodeScalar(path, n, v, oneof)
	}
}

func (d decoder) decodeStruct(path string, n ast.Node, v reflect.Value) {
	mapping, ok := n.(*ast.MappingNode)
	if !ok {
		d.r.value(path, "%s stands where keys should: write %s, each with a colon and its value", kind(n), listed(keysOf(v.Type())))
		return
	}
	given := make(map[string]bool)
	for _, pair := range mapping.Values {
		name, ok := d.name(path, pair, given)
		if !ok {
			continue
		}
		field, ok := fieldByKey(v.Type(), name)
		if !ok {
			d.r.note(join(path, name), at(pair.Key), unknownKey(v.Type(), path, name))
			continue
		}
		d.r.keys[join(path, name)] = at(pair.Key)
		d.decode(join(path, name), pair.Value, v.FieldByIndex(field.Index), field.Tag.Get("oneof"))
	}
	for _, field := range reflect.VisibleFields(v.Type()) {
		if example, name := field.Tag.Get("required"), key(field); example != "" && !given[name] {
			d.r.note(path, at(n), fmt.Sprintf("%s is missing: write, for example, %s: %s", name, name, example))
		}
	}
}

// name returns the key of a pair if it is plain text and was not given before.
func (d decoder) name(path string, pair *ast.MappingValueNode, given map[string]bool) (string, bool) {
	var name string
	switch k := pair.Key.(type) {
	case *ast.StringNode:
		name = k.Value
	case *ast.IntegerNode, *ast.BoolNode, *ast.FloatNode:
		name = k.GetToken().Value
	default:
		d.r.note(path, at(pair.Key), "this is no key: write a name and a colon")
		return "", false
	}
	if given[name] {
		first := d.r.keys[join(path, name)]
		d.r.note(join(path, name), at(pair.Key), fmt.Sprintf("the key is given twice: it stands in line %d already; remove one", max(first.line, 1)))
		return "", false
	}
	given[name] = true
	if _, ok := d.r.keys[join(path, name)]; !ok {
		d.r.keys[join(path, name)] = at(pair.Key)
	}
	return name, true
}

func (d decoder) decodeList(path string, n ast.Node, v reflect.Value, oneof string) {
	sequence, ok := n.(*ast.SequenceNode)
	if !ok {
		d.r.value(path, "%s stands where a list should: write each value on a line of its own after a dash, or all of them in [ ]", kind(n))
		return
	}
	list := reflect.MakeSlice(v.Type(), len(sequence.Values), len(sequence.Values))
	for i, value := range sequence.Values {
		element := list.Index(i)
		switch l := element.Addr().Interface().(type) {
		case *Listen:
			*l = defaultListen()
		case *AdminListen:
			*l = defaultAdminListen()
		}
		at := path + "[" + strconv.Itoa(i) + "]"
		if _, null := value.(*ast.NullNode); null {
			d.r.places[at] = place{value.GetToken().Position.Line, value.GetToken().Position.Column}
			d.r.value(at, "there is no value after the dash: write one, or remove it")
			continue
		}
		d.decode(at, value, element, oneof)
	}
	if len(sequence.Values) == 0 {
		list = reflect.Zero(v.Type()) // so that [] is the same as nothing
	}
	v.Set(list)
}

func (d decoder) decodeMap(path string, n ast.Node, v reflect.Value) {
	mapping, ok := n.(*ast.MappingNode)
	if !ok {
		d.r.value(path, "%s stands where names with values should: write name: value, each on a line of its own", kind(n))
		return
	}
	given := make(map[string]bool)
	values := make(map[string]string)
	for _, pair := range mapping.Values {
		name, ok := d.name(path, pair, given)
		if !ok {
			continue
		}
		var value string
		d.decode(join(path, name), pair.Value, reflect.ValueOf(&value).Elem(), "")
		values[name] = value
	}
	if len(values) > 0 {
		v.Set(reflect.ValueOf(values))
	}
}

// decodeText fills a value that reads itself from text, such as a Size.
func (d decoder) decodeText(path string, n ast.Node, v reflect.Value) {
	text, ok := scalar(n)
	if !ok {
		d.r.value(path, "%s stands where a value such as %s should", kind(n), describe(v))
		return
	}
	if prefix, ok := v.Addr().Interface().(*netip.Prefix); ok {
		parsed, err := parsePrefix(text)
		if err != nil {
			d.r.value(path, "%v", err)
			return
		}
		*prefix = parsed
		return
	}
	if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(text)); err != nil {
		d.r.value(path, "%v", err)
	}
}

func (d decoder) decodeScalar(path string, n ast.Node, v reflect.Value, oneof string) {
	text, ok := scalar(n)
	if !ok {
		d.r.value(path, "%s stands where %s should", kind(n), wanted(v, oneof))
		return
	}
	switch v.Kind() {
	case reflect.String:
		if oneof != "" {
			words := strings.Fields(oneof)
			if !slices.Contains(words, text) {
				d.r.value(path, "%s", notAWord(text, words))
				return
			}
			v.SetString(text)
			return
		}
		switch n.(type) {
		case *ast.StringNode, *ast.LiteralNode:
			v.SetString(text)
		default:
			if strings.HasPrefix(path, "listen[") && strings.HasSuffix(path, ".address") {
				d.r.value(path, "%s", checkListenAddress(text)) // it is a port, and quotes alone won't make an address of it
				return
			}
			d.r.value(path, "%s stands where text should: write it in quotes: %q", kind(n), text)
		}
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			d.r.value(path, "%q is neither true nor false%s", clip(text), meant(text))
			return
		}
		v.SetBool(b.Value)
	case reflect.Int:
		// Whole numbers are read here as people write them: YAML would take 010 for eight.
		number, err := strconv.ParseInt(strings.ReplaceAll(text, "_", ""), 10, 32)
		if _, isText := n.(*ast.StringNode); isText && err == nil {
			d.r.value(path, "text stands where a number should: write it without quotes: %d", number)
			return
		}
		switch {
		case errors.Is(err, strconv.ErrRange):
			d.r.value(path, "%s is out of range: write a number up to %d", clip(text), 1<<31-1)
		case err != nil:
			d.r.value(path, "%q is not a whole number: write one, such as %d", clip(text), v.Int())
		default:
			v.SetInt(number)
		}
	}
}

// isText reports whether v reads itself from text.
func isText(v reflect.Value) bool {
	_, ok := v.Addr().Interface().(encoding.TextUnmarshaler)
	return ok
}

// scalar returns the text of a node that is one value.
func scalar(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// kind says what a node is, to people.
func kind(n ast.Node) string {
	switch n := n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a key with a value"
	case *ast.SequenceNode:
		return "a list"
	case *ast.BoolNode:
		return n.GetToken().Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.StringNode:
		return fmt.Sprintf("%q", clip(n.Value))
	}
	return "this"
}

// describe returns a value as it is written.
func describe(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		return "that of everybody"
	}
	switch x := v.Interface().(type) {
	case netip.Prefix:
		return "10.0.0.0/8"
	case string:
		return strconv.Quote(x)
	default:
		return fmt.Sprint(x)
	}
}

func wanted(v reflect.Value, oneof string) string {
	switch {
	case oneof != "":
		return either(strings.Fields(oneof))
	case v.Kind() == reflect.Bool:
		return "true or false"
	case v.Kind() == reflect.Int:
		return "a number"
	}
	return "text"
}

// meant adds what a person who wrote yes or off will have meant.
func meant(text string) string {
	switch strings.ToLower(text) {
	case "yes", "on", "1", "y", "true", "t":
		return ": write true"
	case "no", "off", "0", "n", "false", "f":
		return ": write false"
	}
	return ""
}

// at returns where a node begins.
func at(n ast.Node) place {
	switch m := n.(type) {
	case *ast.MappingNode:
		// Its own token is the first colon; people look for the first key.
		if !m.IsFlowStyle && len(m.Values) > 0 {
			return at(m.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return at(m.Key)
	}
	return tokenPlace(n.GetToken())
}

func tokenPlace(t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{}
	}
	return place{t.Position.Line, t.Position.Column}
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// key returns the name of a field in YAML.
func key(field reflect.StructField) string { return field.Tag.Get("yaml") }

func fieldByKey(t reflect.Type, name string) (reflect.StructField, bool) {
	for _, field := range reflect.VisibleFields(t) {
		if key(field) == name {
			return field, true
		}
	}
	return reflect.StructField{}, false
}

func keysOf(t reflect.Type) []string {
	var names []string
	for _, field := range reflect.VisibleFields(t) {
		names = append(names, key(field))
	}
	return names
}

// unknownKey says what to write in place of a key that means nothing: a key like it, the same key elsewhere, or any that there are.
func unknownKey(t reflect.Type, path, name string) string {
	if like, ok := closest(name, keysOf(t)); ok {
		return fmt.Sprintf("there is no such key; did you mean %s?", like)
	}
	elsewhere := slices.DeleteFunc(pathsTo(reflect.TypeFor[Config](), "", name), func(p string) bool { return p == join(path, name) })
	switch len(elsewhere) {
	case 0:
	case 1:
		return fmt.Sprintf("there is no such key here; did you mean %s?", elsewhere[0])
	default:
		return fmt.Sprintf("there is no such key here; did you mean %s?", either(elsewhere))
	}
	return "there is no such key; there are " + listed(keysOf(t))
}

// pathsTo returns where in a configuration a key is found.
func pathsTo(t reflect.Type, path, name string) []string {
	var found []string
	for _, field := range reflect.VisibleFields(t) {
		below, inner := join(path, key(field)), field.Type
		if key(field) == name {
			found = append(found, below)
		}
		if inner.Kind() == reflect.Slice {
			below, inner = below+"[]", inner.Elem()
		}
		if inner.Kind() == reflect.Struct && inner.PkgPath() == t.PkgPath() {
			found = append(found, pathsTo(inner, below, name)...)
		}
	}
	return found
}

// notAWord says which words may stand in place of one that may not.
func notAWord(text string, words []string) string {
	if like, ok := closest(text, words); ok {
		return fmt.Sprintf("%q is not known here; did you mean %s? It may be %s", clip(text), like, either(words))
	}
	return fmt.Sprintf("%q is not known here: write %s", clip(text), either(words))
}

// closest returns the word that a person who typed text most likely meant.
func closest(text string, words []string) (string, bool) {
	best, distance := "", len(text)
	for _, word := range words {
		if d := editDistance(fold(text), fold(word)); d < distance {
			best, distance = word, d
		}
	}
	return best, best != "" && distance <= max(1, min(len(text), len(best))/4)
}

// fold leaves out how the parts of a key are held together: holdBack and hold-back are hold_back.
func fold(s string) string {
	return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(clip(s)))
}

// editDistance returns how many letters have to be put in, left out, replaced or swapped with the next to make b of a.
func editDistance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			replaced := last[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(replaced, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}

func listed(words []string) string { return strings.Join(words, ", ") }

// either returns words as a choice: "a, b or c".
func either(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// sortedKeys returns the keys of a map in order.
func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
