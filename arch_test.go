package acproxy_test

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// module is the path of this module.
const module = "github.com/acproxy/acproxy"

// layers says which packages of this module each one may import, outside of its tests. A package that isn't here may be imported by none and
// may import none: who adds one decides where it belongs. docs/architecture.md has the picture.
var layers = map[string][]string{
	".": {},

	// The nouns don't know each other.
	"discovery": {".", "internal/queue", "internal/tracing", "internal/web"},
	"trust":     {".", "internal/durable"},
	"cache":     {".", "internal/durable"},
	"fetch":     {".", "discovery", "trust", "cache", "internal/aci", "internal/memo", "internal/queue", "internal/tracing", "internal/web"},

	// What the nouns stand on.
	"internal/durable": {},
	"internal/memo":    {},
	"internal/queue":   {"."},
	"internal/reread":  {},
	"internal/listen":  {},
	"internal/web":     {".", "internal/tracing"},
	"internal/tracing": {"."},
	"internal/aci":     {"."},
	"internal/audit":   {},
	"internal/problem": {"."},
	"internal/history": {"internal/durable"},
	"internal/missing": {".", "internal/durable"},
	"internal/localca": {".", "internal/durable"},
	"internal/acme":    {"internal/durable"},
	"internal/config":  {".", "internal/listen"},

	"internal/bundle": {".", "internal/durable"},

	// What stands on them.
	"internal/acpush":      {".", "internal/problem"},
	"internal/credentials": {".", "internal/reread"},
	"internal/access":      {".", "internal/durable", "internal/memo", "internal/reread"},
	"internal/oci":         {".", "cache", "fetch", "internal/aci", "internal/durable", "internal/memo"},
	"internal/server":      {".", "discovery", "trust", "fetch", "internal/access", "internal/aci", "internal/acpush", "internal/memo", "internal/oci", "internal/problem", "internal/tracing"},
	"internal/journal":     {"fetch"},
	"internal/admin":       {".", "cache", "discovery", "fetch", "trust", "internal/access", "internal/airgap", "internal/bundle", "internal/history", "internal/journal", "internal/listen", "internal/missing", "internal/problem", "internal/warm", "internal/web"},
	"internal/airgap":      {".", "cache", "discovery", "fetch", "trust", "internal/bundle", "internal/durable"},
	"internal/warm":        {".", "cache", "fetch", "internal/durable"},
	"internal/page":        {".", "cache", "fetch", "internal/access", "internal/admin", "internal/history", "internal/journal", "internal/missing", "internal/problem", "internal/warm", "internal/web"},
	"internal/metrics":     {"internal/server", "internal/history", ".", "cache", "trust", "fetch", "internal/web"},

	// Demo and drill play publisher and node.
	"cmd/acproxy": {
		".", "discovery", "trust", "cache", "fetch", "internal/web", "internal/aci", "internal/acme", "internal/acpush", "internal/audit", "internal/localca", "internal/config", "internal/access", "internal/credentials", "internal/history", "internal/journal", "internal/listen", "internal/oci", "internal/page", "internal/reread", "internal/server", "internal/tracing", "internal/admin", "internal/airgap", "internal/bundle", "internal/durable", "internal/missing", "internal/warm",
		"internal/metrics", "internal/aci/acitest", "trust/trusttest", "test/publisher", "test/node",
	},

	// Material for tests. Publisher and node know nothing of the proxy that is tested with them. What else lies under test/ may look at everything.
	"internal/testtools":           {},
	"internal/aci/acitest":         {"."},
	"internal/acme/acmetest":       {},
	"internal/durable/durabletest": {"internal/durable"},
	"trust/trusttest":              {},
	"cache/cachetest":              {".", "cache", "internal/durable"},
	"test/publisher":               {".", "trust/trusttest", "internal/aci/acitest"},
	"test/publisher/cmd/publisher": {"test/publisher", "trust/trusttest", "internal/aci/acitest"},
	"test/node":                    {},
	"test/tracer":                  {},
}

// reserved says which packages may import something of others, outside of tests and of what is made for tests.
var reserved = map[string][]string{
	// Unsafe by the word of its authors. It is what rkt runs, so trust asks it what rkt will say, and decides nothing by it.
	"golang.org/x/crypto/openpgp":      {"trust"},
	"github.com/ProtonMail/go-crypto":  {"trust"},
	"go.etcd.io/bbolt":                 {"cache"},
	"github.com/gorilla/mux":           {"internal/server", "internal/admin"},
	"github.com/danielgtaylor/huma":    {"internal/admin"},
	"github.com/patrickmn/go-cache":    {"discovery", "fetch"},
	"github.com/goccy/go-yaml":         {"internal/config", "internal/warm"},
	"github.com/robfig/cron":           {"internal/config", "internal/warm"},
	"github.com/mholt/acmez":           {"internal/acme"},
	"github.com/spf13/cobra":           {"cmd/acproxy"},
	"golang.org/x/net/html":            {"discovery"},
	"github.com/ulikunitz/xz":          {"internal/aci"},
	"github.com/fsnotify/fsnotify":     {"trust"},
	"github.com/klauspost/reedsolomon": {"internal/bundle"},
	"golang.org/x/mod":                 {"internal/bundle"},
	"github.com/coreos/go-systemd":     {"internal/listen"},
	"go.opentelemetry.io/otel":         {"internal/tracing"},
	"github.com/opencontainers":        {"internal/oci"},
	// The reference client compares discovery with ours in tests, and plays the node.
	"github.com/appc/spec/discovery": {},
}

// pkg is what go list says of a package of this module.
type pkg struct {
	Dir, ImportPath, Name              string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
}

// path returns the package's place in the module, "." for the root.
func (p pkg) path() string { return relative(p.ImportPath) }

// forTests reports whether a package exists for tests alone.
func (p pkg) forTests() bool {
	return strings.HasSuffix(path.Base(p.path()), "test") || p.path() == "internal/testtools" || strings.HasPrefix(p.path(), "test/")
}

func relative(importPath string) string {
	if importPath == module {
		return "."
	}
	return strings.TrimPrefix(importPath, module+"/")
}

func packages(t *testing.T) []pkg {
	t.Helper()
	// -e, because one package that doesn't compile is for its own tests to complain about.
	out, err := exec.Command("go", "list", "-e", "-json=Dir,ImportPath,Name,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			t.Fatal(err)
		}
		if len(p.GoFiles) > 0 {
			all = append(all, p)
		}
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages only", len(all))
	}
	return all
}

func TestLayers(t *testing.T) {
	all := packages(t)
	known := make(map[string]bool)
	for _, p := range all {
		known[p.path()] = true
		allowed, listed := layers[p.path()]
		if !listed && strings.HasPrefix(p.path(), "test/") {
			continue
		}
		if !listed {
			t.Errorf("package %s has no place in the layers of arch_test.go: say which packages of ours it may import", p.path())
			continue
		}
		for _, imported := range p.Imports {
			own := imported == module || strings.HasPrefix(imported, module+"/")
			if own && !slices.Contains(allowed, relative(imported)) {
				t.Errorf("%s imports %s, which its layer doesn't allow", p.path(), relative(imported))
			}
			for foreign, importers := range reserved {
				if within(imported, foreign) && !p.forTests() && !slices.Contains(importers, p.path()) {
					t.Errorf("%s imports %s, which is for %q alone", p.path(), imported, importers)
				}
			}
		}
	}
	for name := range layers {
		if !known[name] {
			t.Errorf("arch_test.go has a layer for %s, which is no package", name)
		}
	}
}

// within reports whether an import path is a package or lies under it.
func within(importPath, pkg string) bool {
	return importPath == pkg || strings.HasPrefix(importPath, pkg+"/")
}

// TestTestPackagesStayInTests holds what is made for tests out of the server: only the demo, which is one, imports it.
func TestTestPackagesStayInTests(t *testing.T) {
	all := packages(t)
	for _, p := range all {
		if p.forTests() || p.path() == "cmd/acproxy" {
			continue
		}
		for _, imported := range p.Imports {
			i := slices.IndexFunc(all, func(q pkg) bool { return q.ImportPath == imported })
			if i >= 0 && all[i].forTests() {
				t.Errorf("%s imports %s, which is for tests", p.path(), relative(imported))
			}
		}
	}
	// In cmd/acproxy it is the files of demo and drill only.
	playing := []string{"demo.go", "show.go", "scene.go", "drill.go", "drill_server.go", "drill_scenarios.go"}
	for _, p := range all {
		if p.path() != "cmd/acproxy" {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			file := filepath.Base(f.fset.Position(f.Package).Filename)
			for _, spec := range f.Imports {
				imported := strings.Trim(spec.Path.Value, `"`)
				i := slices.IndexFunc(all, func(q pkg) bool { return q.ImportPath == imported })
				if i >= 0 && all[i].forTests() && !slices.Contains(playing, file) {
					t.Errorf("cmd/acproxy/%s imports %s, which is for tests: only demo and drill may", file, relative(imported))
				}
			}
		}
	}
}

type parsedFile struct {
	*ast.File
	fset *token.FileSet
}

func (f parsedFile) at(node ast.Node) token.Position {
	at := f.fset.Position(node.Pos())
	if rel, err := filepath.Rel(".", at.Filename); err == nil {
		at.Filename = rel
	}
	if wd, err := filepath.Abs("."); err == nil {
		at.Filename = strings.TrimPrefix(at.Filename, wd+"/")
	}
	return at
}

func parsed(t *testing.T, p pkg, names []string) []parsedFile {
	t.Helper()
	fset := token.NewFileSet()
	var files []parsedFile
	for _, name := range names {
		f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, parsedFile{f, fset})
	}
	return files
}

func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "Command " + path.Base(p.path()) + " "
		}
		var found []string
		for _, f := range parsed(t, p, p.GoFiles) {
			if text := f.Doc.Text(); text != "" {
				found = append(found, text)
			}
		}
		switch {
		case len(found) != 1:
			t.Errorf("%s has %d package comments, should have one", p.path(), len(found))
		case !strings.HasPrefix(found[0], want):
			t.Errorf("the package comment of %s begins with %.40q, should with %q", p.path(), found[0], want)
		case !strings.HasSuffix(strings.TrimSpace(strings.SplitN(found[0], "\n\n", 2)[0]), "."):
			t.Errorf("the package comment of %s doesn't begin with a sentence", p.path())
		}
	}
}

// TestExportedNamesAreDocumented wants a comment at every exported name: of its own, at the end of its line, or of its group.
func TestExportedNamesAreDocumented(t *testing.T) {
	count := 0
	for _, p := range packages(t) {
		if p.Name == "main" {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			missing := func(node ast.Node, name, why string) { t.Errorf("%v: %s %s", f.at(node), name, why) }
			for _, decl := range f.Decls {
				switch d := decl.(type) {
				case *ast.FuncDecl:
					if !d.Name.IsExported() || !ofExportedType(d) {
						continue
					}
					count++
					if first, _, _ := strings.Cut(d.Doc.Text(), " "); first != d.Name.Name && first != d.Name.Name+"," {
						missing(d, d.Name.Name, "has no doc comment that begins with its name")
					}
				case *ast.GenDecl:
					for _, spec := range d.Specs {
						for _, name := range namesOf(spec) {
							if !name.IsExported() {
								continue
							}
							count++
							if commentOf(spec) == "" && d.Doc.Text() == "" {
								missing(name, name.Name, "has no doc comment")
							}
							if s, ok := spec.(*ast.TypeSpec); ok && !strings.Contains(firstSentence(cmpOr(s.Doc.Text(), d.Doc.Text())), name.Name) {
								missing(name, name.Name, "is not in the first sentence of its doc comment")
							}
						}
					}
				}
			}
		}
	}
	if count < 200 {
		t.Errorf("only %d exported names were looked at", count)
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func firstSentence(s string) string {
	head, _, _ := strings.Cut(s, ".")
	return head
}

// ofExportedType reports whether a function is none of a type that nobody else sees.
func ofExportedType(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	typ := d.Recv.List[0].Type
	for {
		switch e := typ.(type) {
		case *ast.StarExpr:
			typ = e.X
		case *ast.IndexExpr:
			typ = e.X
		case *ast.IndexListExpr:
			typ = e.X
		case *ast.Ident:
			return e.IsExported()
		default:
			return false
		}
	}
}

func namesOf(spec ast.Spec) []*ast.Ident {
	switch s := spec.(type) {
	case *ast.TypeSpec:
		return []*ast.Ident{s.Name}
	case *ast.ValueSpec:
		return s.Names
	}
	return nil
}

func commentOf(spec ast.Spec) string {
	switch s := spec.(type) {
	case *ast.TypeSpec:
		return s.Doc.Text() + s.Comment.Text()
	case *ast.ValueSpec:
		return s.Doc.Text() + s.Comment.Text()
	}
	return ""
}

// mutable are the package variables that may change, each with the reason.
var mutable = map[string]string{
	"test/node.reference": "a lock around the reference library, which has one client for the whole process",
}

// TestNoGlobalState wants no init functions, and no package variable that is ever changed: not assigned to, not written into, not handed out by
// address, no lock and no counter. A variable that others could change, an exported one, has to be an error.
func TestNoGlobalState(t *testing.T) {
	for _, p := range packages(t) {
		files := parsed(t, p, p.GoFiles)
		var syntax []*ast.File
		for _, f := range files {
			syntax = append(syntax, f.File)
			for _, decl := range f.Decls {
				if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
					t.Errorf("%v: no init functions: what a package needs is handed to it", f.at(d))
				}
			}
		}
		info := &types.Info{Defs: make(map[*ast.Ident]types.Object), Uses: make(map[*ast.Ident]types.Object)}
		// Other packages are not loaded, so that types are not known; which name means what in this one is.
		conf := types.Config{Importer: nothing{}, FakeImportC: true, Error: func(error) {}}
		_, _ = conf.Check(p.ImportPath, files[0].fset, syntax, info)
		isGlobal := func(e ast.Expr) (*ast.Ident, bool) {
			id := root(e)
			if id == nil || info.Uses[id] == nil {
				return nil, false
			}
			v, ok := info.Uses[id].(*types.Var)
			return id, ok && v.Parent() != nil && v.Parent().Parent() == types.Universe
		}
		for _, f := range files {
			complain := func(node ast.Node, name, how string) {
				if mutable[p.path()+"."+name] == "" {
					t.Errorf("%v: package variable %s %s", f.at(node), name, how)
				}
			}
			changed := func(e ast.Expr) {
				if id, ok := isGlobal(e); ok {
					complain(e, id.Name, "is changed: what changes is a field of something")
				}
			}
			for _, decl := range f.Decls {
				if d, ok := decl.(*ast.GenDecl); ok && d.Tok == token.VAR {
					for _, spec := range d.Specs {
						s := spec.(*ast.ValueSpec)
						for _, name := range s.Names {
							if name.IsExported() && !strings.HasPrefix(name.Name, "Err") && !p.forTests() {
								complain(name, name.Name, "can be changed by others")
							}
							if strings.HasPrefix(types.ExprString(typeOr(s.Type)), "sync.") || strings.HasPrefix(types.ExprString(typeOr(s.Type)), "atomic.") {
								complain(name, name.Name, "is shared state")
							}
						}
					}
				}
			}
			ast.Inspect(f.File, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.AssignStmt:
					if n.Tok != token.DEFINE {
						for _, lhs := range n.Lhs {
							changed(lhs)
						}
					}
				case *ast.IncDecStmt:
					changed(n.X)
				case *ast.UnaryExpr:
					if n.Op == token.AND {
						if _, literal := n.X.(*ast.CompositeLit); !literal {
							changed(n.X)
						}
					}
				case *ast.CallExpr:
					if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "delete" || id.Name == "clear") && len(n.Args) > 0 {
						changed(n.Args[0])
					}
				}
				return true
			})
		}
	}
}

// nothing imports nothing.
type nothing struct{}

func (nothing) Import(string) (*types.Package, error) { return nil, errors.New("not loaded") }

func typeOr(e ast.Expr) ast.Expr {
	if e == nil {
		return ast.NewIdent("none")
	}
	return e
}

// root returns the variable that an expression reaches into.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.SliceExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}

// TestGoroutinesSayWhoEndsThem wants a comment above each start of a goroutine, above the first of several in a row, or above the loop or the
// condition around it. Those that the same function waits for, by the same WaitGroup or errgroup, need none.
func TestGoroutinesSayWhoEndsThem(t *testing.T) {
	count := 0
	for _, p := range packages(t) {
		if p.forTests() {
			continue
		}
		for _, f := range parsed(t, p, p.GoFiles) {
			commented := make(map[int]bool) // lines right below a comment
			for _, group := range f.Comments {
				commented[f.fset.Position(group.End()).Line+1] = true
			}
			for _, decl := range f.Decls {
				fn, ok := decl.(*ast.FuncDecl)
				if !ok || fn.Body == nil {
					continue
				}
				waited := waitedFor(fn.Body)
				var around []ast.Node
				ast.Inspect(fn.Body, func(n ast.Node) bool {
					if n == nil {
						around = around[:len(around)-1]
						return true
					}
					around = append(around, n)
					group, starts := startsGoroutine(n)
					if !starts {
						return true
					}
					count++
					if group == "" || !waited[group] {
						if !explained(f, around, commented) && !strings.Contains(fn.Doc.Text(), "waits for it") {
							t.Errorf("%v: a goroutine starts here, and no comment above it says who ends it and who waits for it", f.at(n))
						}
					}
					return true
				})
			}
		}
	}
	if count < 10 {
		t.Errorf("only %d goroutines were found", count)
	}
}

// argument returns the place of a package as it is given to the go command.
func argument(place string) string {
	if place == "." {
		return place
	}
	return "./" + place
}

// startsGoroutine reports whether a node is a go statement, or the call of a method Go with a function, and by what it is waited for.
func startsGoroutine(n ast.Node) (group string, ok bool) {
	switch n := n.(type) {
	case *ast.GoStmt:
		return "", true
	case *ast.ExprStmt:
		call, ok := n.X.(*ast.CallExpr)
		if !ok || len(call.Args) != 1 {
			return "", false
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != "Go" {
			return "", false
		}
		return types.ExprString(sel.X), true
	}
	return "", false
}

// waitedFor returns everything whose method Wait a function calls.
func waitedFor(body *ast.BlockStmt) map[string]bool {
	out := make(map[string]bool)
	ast.Inspect(body, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Wait" {
				out[types.ExprString(sel.X)] = true
			}
		}
		return true
	})
	return out
}

// explained reports whether a comment stands above the last node, above the first of a row of such nodes, or above the loop, the condition or the
// case around them.
func explained(f parsedFile, around []ast.Node, commented map[int]bool) bool {
	line := func(n ast.Node) int { return f.fset.Position(n.Pos()).Line }
	if commented[line(around[len(around)-1])] {
		return true
	}
	for i := len(around) - 2; i >= 0; i-- {
		switch n := around[i].(type) {
		case *ast.BlockStmt:
			if commentedRow(f, n.List, around[i+1], commented) {
				return true
			}
		case *ast.CaseClause:
			return commentedRow(f, n.Body, around[i+1], commented)
		case *ast.CommClause:
			return commentedRow(f, n.Body, around[i+1], commented)
		case *ast.ForStmt, *ast.RangeStmt, *ast.IfStmt:
			return commented[line(n)]
		case *ast.FuncLit:
			return false
		}
	}
	return false
}

// commentedRow reports whether the starts of goroutines that stand in a row right before a statement have a comment above the first.
func commentedRow(f parsedFile, list []ast.Stmt, last ast.Node, commented map[int]bool) bool {
	i := slices.IndexFunc(list, func(s ast.Stmt) bool { return s == last })
	for ; i >= 0; i-- {
		if _, starts := startsGoroutine(list[i]); !starts {
			return false
		}
		if commented[f.fset.Position(list[i].Pos()).Line] {
			return true
		}
	}
	return false
}

// TestEveryFuzzTargetIsRun wants make fuzz to know each fuzz target, and seeds to belong to one.
func TestEveryFuzzTargetIsRun(t *testing.T) {
	out, err := exec.Command("make", "-s", "fuzz-list").Output()
	if err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("make is not installed")
		}
		t.Fatalf("make fuzz-list: %v", err)
	}
	listed := strings.Fields(string(out))
	targets := make(map[string]bool)
	for _, p := range packages(t) {
		for _, f := range parsed(t, p, slices.Concat(p.TestGoFiles, p.XTestGoFiles)) {
			for _, decl := range f.Decls {
				if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && strings.HasPrefix(d.Name.Name, "Fuzz") {
					targets[argument(p.path())+":"+d.Name.Name] = true
				}
			}
		}
	}
	for target := range targets {
		if !slices.Contains(listed, target) {
			t.Errorf("make fuzz doesn't run %s", target)
		}
	}
	if len(listed) != len(targets) {
		t.Errorf("make fuzz-list names %d targets, there are %d", len(listed), len(targets))
	}
	err = filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() || !strings.HasSuffix(filepath.Dir(name), filepath.Join("testdata", "fuzz")) {
			return err
		}
		in := argument(filepath.ToSlash(filepath.Dir(filepath.Dir(filepath.Dir(name)))))
		if !targets[in+":"+d.Name()] {
			t.Errorf("%s has seeds for a fuzz target that isn't there", name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
