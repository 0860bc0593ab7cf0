package config

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const (
	exampleFile = "../../config.example.yaml"
	docsFile    = "../../docs/configuration.md"
)

const exampleHead = `# The configuration of acproxy: every key there is, with its default. A file needs no more than the keys that differ.
#
#   acproxy serve --config config.yaml
#
# Sizes are written as 64KiB, 100MiB or 20GB (without a unit: bytes), times as 30s, 10m, 24h or 7d. Relative paths are taken from the
# directory of this file. What is wrong with it is told, with the line, before anything starts.
`

const docsHead = `# Configuration

` + "`acproxy serve --config config.yaml`" + ` reads one YAML file. Without one, or for a key that it leaves out, the defaults below hold;
[config.example.yaml](../config.example.yaml) has all of them to start from.

- **Sizes** are a number and a unit: ` + "`64KiB`, `100MiB`, `20GB`" + `. KiB, MiB, GiB and TiB are multiples of 1024, kB, MB, GB and TB of 1000; without a unit it is bytes.
- **Times** are numbers and units: ` + "`30s`, `10m`, `1h30m`, `7d`" + `. A day has 24 hours.
- **Networks** are ` + "`10.0.0.0/8`" + ` or one address.
- **Prefixes** of image names go by whole segments: ` + "`example.com/app`" + ` covers ` + "`example.com/app/web`" + `, but not ` + "`example.com/apple`" + `.
- **Paths** that are relative are taken from the directory of the file. ` + "`~` and `$VARIABLES`" + ` are not replaced.

The file is read strictly and checked as a whole before anything starts. A key that means nothing, a value of another type, combinations that
can't work, certificates that can't be read: each comes back with its line and what to write instead, all of them at once.

` + "```" + `
%s
` + "```" + `

A changed file is read by ` + "`acproxy reload`" + `, or SIGHUP: [Changing the configuration](operations.md#changing-the-configuration) has the keys that take effect
without a restart.

This page and the example are made from the comments in internal/config (` + "`go generate ./internal/config`" + `).
`

// exampleMistake is the configuration whose error stands in the docs.
const exampleMistake = "listen:\n  - address: 0.0.0.0:8080\nfetch:\n  hold_bak: 64K\n  delivery: verify\n"

// samplePublishers show the keys of a publisher, which has no default. Between them they have every key.
func samplePublishers() []Publisher {
	timeout, ttl, never, legacy, threshold, offline := seconds(60), minutes(1), seconds(0), true, 2, false
	return []Publisher{
		{
			Prefix:    "example.com/app",
			Templates: []string{"https://storage.example.com/{name}-{version}-{os}-{arch}.{ext}"},
			Listing:   "https://storage.example.com/v2/{name}/tags/list",
			Signature: SignatureRequired,
			Threshold: &threshold,
			Delivery:  DeliveryVerifyFirst,
			TTL:       &ttl,
			MaxStale:  &never,
			OnChange:  OnChangeFollow,
			OnFull:    OnFullStream,
			Offline:   &offline,
		},
		{
			Prefix:          "example.org",
			DiscoveryHost:   "images.internal:8443",
			SimpleDiscovery: true,
			HTTP:            true,
			CAFile:          "internal-ca.pem",
			Timeout:         &timeout,
			Proxy:           "http://proxy.internal:3128",
			AllowAddresses:  []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
			Expired:         ExpiredAcceptIfSignedBefore,
			Legacy:          &legacy,
		},
		{
			Prefix:    "example.com/ours",
			Publisher: PublisherLocal,
		},
	}
}

// sampleRules show the keys of a rule, which has no default.
func sampleRules() []AccessRule {
	return []AccessRule{{Prefix: "", Read: []string{"anyone"}}, {Prefix: "example.com/secret", Read: []string{"alice", "node1.example.net"}, Warm: []string{"alice"}}}
}

// sampleCredentials show the keys of credentials, which have no default.
func sampleCredentials() []HostCredentials {
	return []HostCredentials{
		{Host: "storage.example.com", Prefix: "example.com/secret", Type: CredentialsBasic, User: "acproxy", SecretFile: "storage-password"},
		{Host: "images.s3.eu-central-1.amazonaws.com", Type: CredentialsAWS, User: "AKIAEXAMPLE", SecretEnv: "IMAGES_SECRET_KEY", Region: "eu-central-1", Service: "s3"},
	}
}

// sampleWarmLists show the keys of a scheduled list, which has no default.
func sampleWarmLists() []WarmList {
	return []WarmList{{File: "warm.yaml", Groups: []string{"base"}, Schedule: "30 3 * * *", Jitter: minutes(10)}}
}

// Both documents are what the comments and defaults of this package say. With -update they are written.
func TestDocuments(t *testing.T) {
	words := fieldComments(t)
	for name, content := range map[string]string{exampleFile: example(t, words), docsFile: docs(t, words)} {
		if *update {
			if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != content {
			t.Errorf("%s is not what internal/config says; write it with: go generate ./internal/config", strings.TrimPrefix(name, "../../"))
		}
	}
}

// Independent of how it was made: the example is the default, has every key, and what is commented out is right as well.
func TestExample(t *testing.T) {
	text, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	r := newReport("config.example.yaml", text)
	c := parse(r, text)
	if err := r.err(); err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(*c, want) {
		t.Errorf("the example is\n%+v, the default\n%+v", *c, want)
	}
	if loaded, err := Load(exampleFile); err != nil || !reflect.DeepEqual(loaded, c) {
		t.Errorf("Load of the example = %+v, %v; want what Parse gives", loaded, err)
	}
	head, commented, found := strings.Cut(string(text), "publishers: []\n")
	if !found {
		t.Fatal("the example does not end in publishers: []")
	}
	var b strings.Builder
	for _, list := range []string{"  rules:", "  hosts:", "  lists:"} {
		before, rest, found := strings.Cut(head, list+" []\n  #     -")
		samples, rest, ended := strings.Cut("  #     -"+rest, "\n\n")
		if !found || !ended {
			t.Fatalf("the example has no %s []", list)
		}
		b.WriteString(before + list + "\n")
		for line := range strings.Lines(samples) {
			b.WriteString(strings.TrimPrefix(line, "  # "))
		}
		b.WriteString("\n\n")
		head = rest
	}
	b.WriteString(head + "publishers:\n")
	for line := range strings.Lines(commented) {
		b.WriteString(strings.TrimPrefix(strings.TrimPrefix(line, "#"), " "))
	}
	all := newReport("config.example.yaml", []byte(b.String()))
	c = parse(all, []byte(b.String()))
	if err := all.err(); err != nil {
		t.Fatalf("with the publishers no longer commented out: %v", err)
	}
	if want := samplePublishers(); !reflect.DeepEqual(c.Publishers, want) {
		t.Errorf("the publishers of the example are\n%+v, want\n%+v", c.Publishers, want)
	}
	for i := range c.Credentials.Hosts {
		c.Credentials.Hosts[i].SecretFile = filepath.Base(c.Credentials.Hosts[i].SecretFile)
		if c.Credentials.Hosts[i].SecretFile == "." {
			c.Credentials.Hosts[i].SecretFile = ""
		}
	}
	if want := sampleCredentials(); !reflect.DeepEqual(c.Credentials.Hosts, want) {
		t.Errorf("the credentials of the example are\n%+v, want\n%+v", c.Credentials.Hosts, want)
	}
	for i := range c.Warm.Lists {
		c.Warm.Lists[i].File = filepath.Base(c.Warm.Lists[i].File)
	}
	if want := sampleWarmLists(); !reflect.DeepEqual(c.Warm.Lists, want) {
		t.Errorf("the lists of the example are\n%+v, want\n%+v", c.Warm.Lists, want)
	}
	if want := sampleRules(); !reflect.DeepEqual(c.Access.Rules, want) {
		t.Errorf("the rules of the example are\n%+v, want\n%+v", c.Access.Rules, want)
	}
	manual, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	given := make(map[string]bool)
	for path := range all.keys {
		given[withoutIndexes(path)] = true
	}
	eachKey(reflect.TypeFor[Config](), "", func(path string, _ reflect.StructField) {
		if !given[path] {
			t.Errorf("%s is not in config.example.yaml", path)
		}
		if !strings.Contains(string(manual), "`"+path+"`") {
			t.Errorf("%s is not in docs/configuration.md", path)
		}
	})
}

func withoutIndexes(path string) string {
	var b strings.Builder
	for path != "" {
		before, after, ok := strings.Cut(path, "[")
		b.WriteString(before)
		if !ok {
			break
		}
		_, path, _ = strings.Cut(after, "]")
		b.WriteString("[]")
	}
	return b.String()
}

// eachKey calls do for every key below t, sections before what they hold. A list's own keys are below "name[]".
func eachKey(t reflect.Type, path string, do func(path string, field reflect.StructField)) {
	for _, field := range reflect.VisibleFields(t) {
		below, inner := join(path, key(field)), field.Type
		do(below, field)
		if inner.Kind() == reflect.Slice {
			below, inner = below+"[]", inner.Elem()
		}
		if isSection(inner) {
			eachKey(inner, below, do)
		}
	}
}

func isSection(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t.PkgPath() == reflect.TypeFor[Config]().PkgPath()
}

// fieldComments returns the comments of this package's fields by "Type.Field", each as one line.
func fieldComments(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	words := make(map[string]string)
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, field := range s.Fields.List {
				words[spec.Name.Name+"."+field.Names[0].Name] = strings.Join(strings.Fields(field.Doc.Text()), " ")
			}
		}
		return false
	})
	return words
}

// example returns config.example.yaml.
func example(t *testing.T, words map[string]string) string {
	t.Helper()
	var b strings.Builder
	b.WriteString(exampleHead)
	writeSection(t, &b, words, reflect.ValueOf(Default()), "", true)
	var sample strings.Builder
	seen := make(map[string]bool)
	for _, p := range samplePublishers() {
		writePublisher(t, &sample, words, reflect.ValueOf(p), seen)
	}
	for line := range strings.Lines(sample.String()) {
		b.WriteString(strings.TrimRight("# "+line, " \n") + "\n")
	}
	return b.String()
}

func writeSection(t *testing.T, b *strings.Builder, words map[string]string, v reflect.Value, indent string, apart bool) {
	t.Helper()
	for _, field := range reflect.VisibleFields(v.Type()) {
		if apart {
			b.WriteByte('\n')
		}
		value := v.FieldByIndex(field.Index)
		comment(t, b, words, v.Type(), field, indent)
		switch {
		case isSection(field.Type):
			fmt.Fprintf(b, "%s%s:\n", indent, key(field))
			writeSection(t, b, words, value, indent+"  ", false)
		case field.Type.Kind() == reflect.Slice && isSection(field.Type.Elem()) && value.Len() > 0:
			fmt.Fprintf(b, "%s%s:\n", indent, key(field))
			for i := range value.Len() {
				var one strings.Builder
				writeSection(t, &one, words, value.Index(i), indent+"    ", false)
				// The dash goes before the first thing, which may be a comment.
				b.WriteString(indent + "  - " + strings.TrimPrefix(one.String(), indent+"    "))
			}
		default:
			samples, sampled := map[reflect.Type]any{
				reflect.TypeFor[[]AccessRule](): sampleRules(), reflect.TypeFor[[]HostCredentials](): sampleCredentials(), reflect.TypeFor[[]WarmList](): sampleWarmLists(),
			}[field.Type]
			if field.Type == reflect.TypeFor[[]Publisher]() || sampled {
				fmt.Fprintf(b, "%s# To use the examples below, remove the [] and the # at the beginning of each line.\n", indent)
			}
			fmt.Fprintf(b, "%s%s: %s\n", indent, key(field), written(value))
			if sampled {
				writeSamples(t, b, words, reflect.ValueOf(samples), indent)
			}
		}
	}
}

// writeSamples writes a list whose lines are all commented out, with the comments of its keys in the first one.
func writeSamples(t *testing.T, b *strings.Builder, words map[string]string, list reflect.Value, indent string) {
	t.Helper()
	for i := range list.Len() {
		var one strings.Builder
		for _, field := range reflect.VisibleFields(list.Type().Elem()) {
			if i == 0 {
				comment(t, &one, words, list.Type().Elem(), field, "      ")
			}
			fmt.Fprintf(&one, "      %s: %s\n", key(field), written(list.Index(i).FieldByIndex(field.Index)))
		}
		for line := range strings.Lines("    - " + strings.TrimPrefix(one.String(), "      ")) {
			b.WriteString(indent + "# " + line)
		}
	}
}

// writePublisher writes the keys that a publisher has, with the comments that were not written before.
func writePublisher(t *testing.T, b *strings.Builder, words map[string]string, v reflect.Value, seen map[string]bool) {
	t.Helper()
	var one strings.Builder
	for _, field := range reflect.VisibleFields(v.Type()) {
		value := v.FieldByIndex(field.Index)
		if value.IsZero() {
			continue
		}
		if !seen[key(field)] {
			comment(t, &one, words, v.Type(), field, "    ")
		}
		seen[key(field)] = true
		if value.Kind() == reflect.Pointer {
			value = value.Elem()
		}
		fmt.Fprintf(&one, "    %s: %s\n", key(field), written(value))
	}
	b.WriteString("  - " + strings.TrimPrefix(one.String(), "    "))
}

func comment(t *testing.T, b *strings.Builder, words map[string]string, in reflect.Type, field reflect.StructField, indent string) {
	t.Helper()
	text := words[in.Name()+"."+field.Name]
	if text == "" {
		t.Fatalf("%s.%s has no comment", in.Name(), field.Name)
	}
	line := indent + "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > 118 {
			b.WriteString(line + "\n")
			line = indent + "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

// written returns a value in YAML.
func written(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case string:
		if x == "" || strings.ContainsAny(x, "{}[],#*&!|>'\"%@`") {
			return fmt.Sprintf("%q", x)
		}
		return x
	case []string:
		quoted := make([]string, len(x))
		for i := range x {
			quoted[i] = written(reflect.ValueOf(x[i]))
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	case map[string]string:
		return "{}"
	case []netip.Prefix:
		texts := make([]string, len(x))
		for i := range x {
			texts[i] = x[i].String()
		}
		return "[" + strings.Join(texts, ", ") + "]"
	case []Publisher, []AccessRule, []HostCredentials:
		return "[]"
	}
	return fmt.Sprint(v.Interface())
}

// docs returns docs/configuration.md.
func docs(t *testing.T, words map[string]string) string {
	t.Helper()
	_, err := Parse("config.yaml", []byte(exampleMistake))
	if err == nil {
		t.Fatal("the mistake in the docs is none")
	}
	var b strings.Builder
	fmt.Fprintf(&b, docsHead, err)
	top := reflect.TypeFor[Config]()
	b.WriteString("\n## General\n\n| key | default | meaning |\n|---|---|---|\n")
	for _, field := range reflect.VisibleFields(top) {
		if !hasTable(field.Type) {
			row(&b, key(field), reflect.ValueOf(Default()).FieldByIndex(field.Index), field, words["Config."+field.Name])
		}
	}
	for _, field := range reflect.VisibleFields(top) {
		if !hasTable(field.Type) {
			continue
		}
		fmt.Fprintf(&b, "\n## `%s`\n\n%s\n\n| key | default | meaning |\n|---|---|---|\n", key(field), words["Config."+field.Name])
		value := reflect.ValueOf(Default()).FieldByIndex(field.Index)
		path := key(field)
		if field.Type.Kind() == reflect.Slice {
			path += "[]"
			value = reflect.Zero(field.Type.Elem())
			if field.Type.Elem() == reflect.TypeFor[Listen]() {
				value = reflect.ValueOf(defaultListen())
			}
		}
		table(&b, words, path, value)
	}
	return b.String()
}

func hasTable(t reflect.Type) bool {
	return isSection(t) || t.Kind() == reflect.Slice && isSection(t.Elem())
}

func table(b *strings.Builder, words map[string]string, path string, v reflect.Value) {
	for _, field := range reflect.VisibleFields(v.Type()) {
		below := join(path, key(field))
		row(b, below, v.FieldByIndex(field.Index), field, words[v.Type().Name()+"."+field.Name])
		switch {
		case isSection(field.Type):
			table(b, words, below, v.FieldByIndex(field.Index))
		case hasTable(field.Type):
			value := reflect.Zero(field.Type.Elem())
			if field.Type.Elem() == reflect.TypeFor[AdminListen]() {
				value = reflect.ValueOf(defaultAdminListen())
			}
			table(b, words, below+"[]", value)
		}
	}
}

func row(b *strings.Builder, path string, v reflect.Value, field reflect.StructField, meaning string) {
	given := ""
	switch {
	case isSection(v.Type()), v.Kind() == reflect.Pointer && v.IsNil():
	case field.Tag.Get("required") != "" && v.IsZero():
		given = "required"
	case v.Type() == reflect.TypeFor[string]() && field.Tag.Get("oneof") != "" && v.IsZero():
	default:
		given = "`" + written(v) + "`"
	}
	escape := strings.NewReplacer("|", `\|`, "<", "&lt;", "*", `\*`)
	fmt.Fprintf(b, "| `%s` | %s | %s |\n", path, given, escape.Replace(meaning))
}
