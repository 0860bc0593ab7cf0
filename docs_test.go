package acproxy_test

import (
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/token"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/trust"
)

var update = flag.Bool("update", false, "write docs/commands.md anew")

// documents returns the Markdown files of the repository with their content.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs := make(map[string]string)
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == ".git" || d.Name() == "testdata" || name == "dist" || name == "bin"):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(name) != ".md":
			return nil
		}
		b, err := os.ReadFile(name)
		docs[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if docs["README.md"] == "" || len(docs) < 10 {
		t.Fatalf("found %d documents: %q", len(docs), slices.Sorted(maps.Keys(docs)))
	}
	return docs
}

var (
	fenced = regexp.MustCompile("(?ms)^```.*?^```$")
	link   = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	header = regexp.MustCompile(`(?m)^#+ +(.+)$`)
)

// TestLinksLead wants every link in the documentation that isn't to another site to lead to a file, and to a heading where it names one.
func TestLinksLead(t *testing.T) {
	docs := documents(t)
	count := 0
	for name, text := range docs {
		for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
			target, heading, named := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			count++
			file := name
			if target != "" {
				file = filepath.Join(filepath.Dir(name), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s, which isn't there", name, m[1])
				continue
			}
			if named && !slices.Contains(anchors(docs[file]), heading) {
				t.Errorf("%s links to %s, and %s has no such heading: it has %q", name, m[1], file, anchors(docs[file]))
			}
		}
	}
	if count < 20 {
		t.Errorf("only %d links were found", count)
	}
}

// anchors returns what the headings of a document are called in links.
func anchors(text string) []string {
	var out []string
	for _, m := range header.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		slug := strings.Map(func(c rune) rune {
			switch {
			case c == ' ':
				return '-'
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c > 127:
				return c
			}
			return -1
		}, strings.ToLower(m[1]))
		out = append(out, slug)
	}
	return out
}

// TestAlertsLeadToTheRunbook wants every alert to have the address of a section of docs/operations.md.
func TestAlertsLeadToTheRunbook(t *testing.T) {
	alerts, err := os.ReadFile("deploy/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	sections := anchors(documents(t)["docs/operations.md"])
	_, rules, _ := strings.Cut(string(alerts), "rules:")
	all := strings.Split(rules, "- alert: ")[1:]
	if len(all) < 7 {
		t.Fatalf("only %d alerts were found", len(all))
	}
	for _, alert := range all {
		name, _, _ := strings.Cut(alert, "\n")
		m := regexp.MustCompile(`runbook_url: 'https://` + module + `/blob/main/docs/operations\.md#([^']+)'`).FindStringSubmatch(alert)
		if m == nil {
			t.Errorf("the alert %s has no runbook_url that leads to docs/operations.md", name)
		} else if !slices.Contains(sections, m[1]) {
			t.Errorf("the alert %s leads to %s, and docs/operations.md has no such heading", name, m[1])
		}
	}
}

// TestEventsAndMetricsAreWithinReach wants docs/operations.md to lead to where every metric and every event is, and every event to be there. That every
// metric is in docs/metrics.md is a test of package metrics.
func TestEventsAndMetricsAreWithinReach(t *testing.T) {
	docs := documents(t)
	for _, target := range []string{"](metrics.md)", "](admin.md#events)", "](http.md#errors)"} {
		if !strings.Contains(docs["docs/operations.md"], target) {
			t.Errorf("docs/operations.md has no link%s", target)
		}
	}
	_, table, _ := strings.Cut(docs["docs/admin.md"], "\n## Events\n")
	table, _, _ = strings.Cut(table, "\n## ")
	count := 0
	for _, p := range packages(t) {
		if p.path() != "fetch" && p.path() != "internal/journal" {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			ast.Inspect(f.File, func(n ast.Node) bool {
				spec, ok := n.(*ast.ValueSpec)
				if !ok || len(spec.Values) != 1 || !strings.HasPrefix(spec.Names[0].Name, "Event") {
					return true
				}
				lit, ok := spec.Values[0].(*ast.BasicLit)
				if !ok {
					return true
				}
				count++
				if word, _ := strconv.Unquote(lit.Value); !strings.Contains(table, "`"+word+"`") {
					t.Errorf("docs/admin.md says nothing of the event %s (%v)", word, f.at(lit))
				}
				return true
			})
		}
	}
	if count < 17 {
		t.Errorf("only %d events were found in the source", count)
	}
}

// TestEveryDocumentIsLinked wants a way from README to every document.
func TestEveryDocumentIsLinked(t *testing.T) {
	docs := documents(t)
	reached := map[string]bool{"README.md": true}
	for todo := []string{"README.md"}; len(todo) > 0; todo = todo[1:] {
		for _, m := range link.FindAllStringSubmatch(docs[todo[0]], -1) {
			target, _, _ := strings.Cut(m[1], "#")
			file := filepath.Join(filepath.Dir(todo[0]), target)
			if _, ok := docs[file]; !ok {
				file = filepath.Join(file, "README.md")
			}
			if _, ok := docs[file]; ok && !reached[file] {
				reached[file] = true
				todo = append(todo, file)
			}
		}
	}
	for name := range docs {
		if !reached[name] && strings.HasPrefix(name, "docs/") {
			t.Errorf("no link leads from README.md to %s", name)
		}
	}
}

// code is where a problem's code is made.
type code struct{ at string }

// kebab is what the code of a problem looks like.
var kebab = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// codes finds the codes of errors in the source: the field Code of errors, constants called code… and Code…, the rules of package aci, the words
// that a function called code returns, and the code among the arguments of functions that make errors.
func codes(t *testing.T) map[string]code {
	t.Helper()
	found := make(map[string]code)
	add := func(f parsedFile, e ast.Expr) {
		lit, ok := e.(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return
		}
		word, err := strconv.Unquote(lit.Value)
		if err == nil && kebab.MatchString(word) {
			found[word] = code{fmt.Sprint(f.at(lit))}
		}
	}
	makers := map[string]bool{"notFound": true, "refuse": true, "fail": true}
	for _, p := range packages(t) {
		if p.forTests() {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			ast.Inspect(f.File, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.KeyValueExpr:
					if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Code" {
						add(f, n.Value)
					}
				case *ast.ValueSpec:
					for i, name := range n.Names {
						if i < len(n.Values) && (strings.HasPrefix(strings.ToLower(name.Name), "code") || p.path() == "internal/aci" && strings.HasPrefix(name.Name, "Rule")) {
							add(f, n.Values[i])
						}
					}
				case *ast.FuncDecl:
					if n.Name.Name == "code" {
						ast.Inspect(n, func(n ast.Node) bool {
							if r, ok := n.(*ast.ReturnStmt); ok && len(r.Results) == 1 {
								add(f, r.Results[0])
							}
							return true
						})
					}
				case *ast.CallExpr:
					var name string
					switch fun := n.Fun.(type) {
					case *ast.Ident:
						name = fun.Name
					case *ast.SelectorExpr:
						name = fun.Sel.Name
					}
					// trust's own refuse takes an outcome, which comes from trust.Outcomes.
					if makers[name] && p.path() != "trust" {
						for _, arg := range n.Args {
							if lit, ok := arg.(*ast.BasicLit); ok && lit.Kind == token.STRING {
								add(f, lit)
								break
							}
						}
					}
				}
				return true
			})
		}
	}
	for _, o := range trust.Outcomes() {
		if o != trust.Accepted {
			found[o.String()] = code{"trust.Outcomes"}
		}
	}
	return found
}

// codeRow is a line of a table of codes in docs/http.md.
var codeRow = regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\| ([0-9, ]+|–) \\| .+ \\|$")

// TestProblemCodesAreDocumented holds the tables of docs/http.md against the source, in both directions.
func TestProblemCodesAreDocumented(t *testing.T) {
	b, err := os.ReadFile("docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := make(map[string]bool)
	for _, m := range codeRow.FindAllStringSubmatch(string(b), -1) {
		if documented[m[1]] {
			t.Errorf("docs/http.md has two lines for %s", m[1])
		}
		documented[m[1]] = true
		for status := range strings.SplitSeq(m[2], ", ") {
			if n, err := strconv.Atoi(status); status != "–" && (err != nil || http.StatusText(n) == "") {
				t.Errorf("docs/http.md: the status %q of %s is none", status, m[1])
			}
		}
	}
	inSource := codes(t)
	if len(inSource) < 50 {
		t.Fatalf("only %d codes were found in the source", len(inSource))
	}
	for _, word := range slices.Sorted(maps.Keys(inSource)) {
		if !documented[word] {
			t.Errorf("docs/http.md has no line for the problem %s (%s)", word, inSource[word].at)
		}
	}
	for word := range documented {
		if _, ok := inSource[word]; !ok {
			t.Errorf("docs/http.md has a line for %s, which no error says any more", word)
		}
	}
}

// TestHeadersAndPathsAreDocumented wants docs/http.md to name every header field that the server sets, and every path of its own.
func TestHeadersAndPathsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ToLower(string(b))
	count := 0
	for _, p := range packages(t) {
		if p.path() != "internal/server" {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			ast.Inspect(f.File, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					sel, ok := n.Fun.(*ast.SelectorExpr)
					if !ok || sel.Sel.Name != "Set" && sel.Sel.Name != "Add" || len(n.Args) != 2 {
						return true
					}
					if lit, ok := n.Args[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
						count++
						if name, _ := strconv.Unquote(lit.Value); !strings.Contains(text, strings.ToLower("`"+name)) {
							t.Errorf("docs/http.md doesn't name the header field %s (%v)", name, f.at(lit))
						}
					}
				case *ast.BinaryExpr:
					// Paths are written as Root + "images/".
					if x, ok := n.X.(*ast.Ident); ok && x.Name == "Root" {
						if lit, ok := n.Y.(*ast.BasicLit); ok {
							count++
							if path, _ := strconv.Unquote(lit.Value); !strings.Contains(text, "/.acproxy/"+path) {
								t.Errorf("docs/http.md doesn't name the path /.acproxy/%s (%v)", path, f.at(lit))
							}
						}
					}
				}
				return true
			})
		}
	}
	if count < 15 {
		t.Errorf("only %d header fields and paths were found in the source", count)
	}
}

var (
	requirement = regexp.MustCompile(`(?m)^\s+(\S+) v\S+( // indirect)?$`)
	tableModule = regexp.MustCompile(`(?m)^\| ([a-z][\w./-]+\.[\w./-]+) \|`)
)

// TestDependenciesAreExplained holds docs/decisions/dependencies.md against go.mod.
func TestDependenciesAreExplained(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("docs/decisions/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	var explained []string
	for _, m := range tableModule.FindAllStringSubmatch(string(page), -1) {
		explained = append(explained, m[1])
	}
	var required, direct []string
	for _, m := range requirement.FindAllStringSubmatch(string(mod), -1) {
		required = append(required, m[1])
		if m[2] == "" {
			direct = append(direct, m[1])
		}
	}
	if len(direct) < 10 {
		t.Fatalf("go.mod has only %d direct requirements: %q", len(direct), direct)
	}
	for _, module := range direct {
		if !slices.Contains(explained, module) {
			t.Errorf("docs/decisions/dependencies.md says nothing about %s: why it, who maintains it, what does it replace?", module)
		}
	}
	for _, module := range explained {
		if !slices.Contains(required, module) {
			t.Errorf("docs/decisions/dependencies.md explains %s, which go.mod doesn't require", module)
		}
	}
}

// build builds a program of this module, once for all tests.
var build = struct {
	once sync.Once
	dir  string
	err  error
}{}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if build.dir != "" {
		if err := os.RemoveAll(build.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// programs returns the directory of acproxy and publisher, built from the source as it is.
func programs(t *testing.T) string {
	t.Helper()
	build.once.Do(func() {
		build.dir, build.err = os.MkdirTemp("", "acproxy-programs-")
		if build.err == nil {
			out, err := exec.Command("go", "build", "-o", build.dir+"/", "./cmd/acproxy", "./test/publisher/cmd/publisher").CombinedOutput()
			if err != nil {
				build.err = fmt.Errorf("%w\n%s", err, out)
			}
		}
	})
	if build.err != nil {
		t.Fatalf("building the programs: %v", build.err)
	}
	return build.dir
}

// command is one of acproxy's, as its help describes it.
type command struct {
	path  string // "trust add"
	help  string
	flags []string // "--prefix"
}

var (
	helpFlag    = regexp.MustCompile(`(?m)^ +(?:-\w, )?(--[a-z-]+)`)
	helpCommand = regexp.MustCompile(`(?m)^  ([a-z-]+) +\S`)
)

// commands asks the program for all its commands, itself first.
func commands(t *testing.T, dir string) []command {
	t.Helper()
	var all []command
	var walk func(path ...string)
	walk = func(path ...string) {
		cmd := exec.Command(filepath.Join(dir, "acproxy"), append(slices.Clone(path), "--help")...)
		cmd.Env = append(os.Environ(), "HOME=/home/you", "XDG_DATA_HOME=")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("acproxy %s --help: %v", strings.Join(path, " "), err)
		}
		c := command{path: strings.Join(path, " "), help: string(out)}
		for _, m := range helpFlag.FindAllStringSubmatch(c.help, -1) {
			c.flags = append(c.flags, m[1])
		}
		all = append(all, c)
		_, list, ok := strings.Cut(c.help, "Available Commands:\n")
		if !ok {
			return
		}
		list, _, _ = strings.Cut(list, "\n\n")
		for _, m := range helpCommand.FindAllStringSubmatch(list, -1) {
			// What cobra adds describes itself.
			if m[1] != "help" && m[1] != "completion" {
				walk(append(slices.Clone(path), m[1])...)
			}
		}
	}
	walk()
	return all
}

// TestCommandReference holds docs/commands.md, which is what the commands say of themselves, against them. With -update it writes it.
func TestCommandReference(t *testing.T) {
	all := commands(t, programs(t))
	var b strings.Builder
	b.WriteString("# Commands\n\nWhat `acproxy COMMAND --help` prints. This page is made from that (`make generate`).\n\n" +
		"The exit code is 0 if what was asked for was done, 1 if it could not be or the answer is no, 2 if it could not be understood, 3 if it was done in part.\n")
	for _, c := range all {
		fmt.Fprintf(&b, "\n## %s\n\n```\n%s```\n", strings.TrimSpace("acproxy "+c.path), c.help)
	}
	const file = "docs/commands.md"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("%s is not what the commands say of themselves: run make generate", file)
	}
}

// TestShownCommandsExist holds every acproxy command in a document's code block against the commands and flags that there are.
func TestShownCommandsExist(t *testing.T) {
	all := commands(t, programs(t))
	count := 0
	for name, text := range documents(t) {
		if name == filepath.Join("docs", "commands.md") {
			continue
		}
		for _, block := range fenced.FindAllString(text, -1) {
			for line := range strings.Lines(strings.ReplaceAll(block, "\\\n", " ")) {
				for _, part := range commandLines(line) {
					count++
					if err := check(all, part); err != nil {
						t.Errorf("%s: %s: %v", name, strings.TrimSpace(line), err)
					}
				}
			}
		}
	}
	if count < 10 {
		t.Errorf("only %d commands were found in the documents", count)
	}
}

var invocation = regexp.MustCompile(`(?:^|[$(|;&] *|sudo )(?:acproxy|go run \./cmd/acproxy)((?: +[^|;&<>#()]+)?)`)

// commandLines returns the arguments of the acproxy commands in a line.
func commandLines(line string) [][]string {
	var out [][]string
	for _, m := range invocation.FindAllStringSubmatch(strings.TrimSpace(line), -1) {
		out = append(out, strings.Fields(m[1]))
	}
	return out
}

// check reports whether a command line names a command and flags that are there.
func check(all []command, args []string) error {
	find := func(path string) *command {
		for i := range all {
			if all[i].path == path {
				return &all[i]
			}
		}
		return nil
	}
	c := find("")
	for _, arg := range args {
		name, _, _ := strings.Cut(arg, "=")
		switch {
		case strings.HasPrefix(name, "--"):
			if !slices.Contains(c.flags, name) {
				return fmt.Errorf("acproxy %s has no flag %s", c.path, name)
			}
		case find(strings.TrimSpace(c.path+" "+arg)) != nil:
			c = find(strings.TrimSpace(c.path + " " + arg))
		case c.path == "" && strings.Trim(arg, "abcdefghijklmnopqrstuvwxyz-") == "":
			return fmt.Errorf("there is no command %s", arg)
		}
	}
	if c.path == "" && len(args) > 0 && !strings.HasPrefix(args[0], "--") {
		return errors.New("it names no command")
	}
	return nil
}

// TestAuditFieldsAreDocumented holds docs/trust.md against the decisions that are written.
func TestAuditFieldsAreDocumented(t *testing.T) {
	text := documents(t)["docs/trust.md"]
	for field := range reflect.TypeFor[fetch.Decision]().Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !strings.Contains(text, "| `"+name+"` |") {
			t.Errorf("docs/trust.md doesn't say what %s means in the audit", name)
		}
	}
}
