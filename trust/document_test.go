package trust

import (
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables of docs/trust.md anew")

const documentFile = "../docs/trust.md"

// document compares a piece of docs/trust.md, between the lines <!-- NAME: … --> and <!-- end of NAME -->, with what it should be; with
// -update it writes it.
func document(t *testing.T, name, want string) {
	t.Helper()
	text := string(mustRead(t, documentFile))
	from, end := strings.Index(text, "<!-- "+name+":"), strings.Index(text, "<!-- end of "+name+" -->")
	if from < 0 || end < from {
		t.Fatalf("%s has no part called %s", documentFile, name)
	}
	from += strings.IndexByte(text[from:], '\n') + 1
	want = "\n" + want + "\n"
	if text[from:end] == want {
		return
	}
	if !*update {
		t.Errorf("%s is out of date, run: go test ./trust -update\nIts part %s is\n%s\nand should be\n%s", documentFile, name, text[from:end], want)
		return
	}
	if err := os.WriteFile(documentFile, []byte(text[:from]+want+text[end:]), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestEveryAttackHasItsTest looks for the tests that docs/trust.md lists.
func TestEveryAttackHasItsTest(t *testing.T) {
	_, table, ok := strings.Cut(string(mustRead(t, documentFile)), "| attack | where | test | cases |\n")
	if !ok {
		t.Fatalf("%s lists no attacks", documentFile)
	}
	rows := 0
	for row := range strings.Lines(table) {
		cells := strings.Split(strings.TrimSpace(row), "|")
		if len(cells) != 6 {
			break
		}
		where, test := strings.Trim(cells[2], " `"), strings.Trim(cells[3], " `")
		if strings.HasPrefix(where, "--") {
			continue
		}
		rows++
		body := testBody(t, filepath.Join("..", where), test)
		if body == "" {
			t.Errorf("%s has no %s", where, test)
			continue
		}
		for name := range strings.SplitSeq(cells[4], ";") {
			if name = strings.TrimSpace(name); name != "" && !strings.Contains(body, strconv.Quote(name)) {
				t.Errorf("%s in %s has no case %q", test, where, name)
			}
		}
	}
	if rows < 30 {
		t.Errorf("%d attacks are listed, want 30 at least", rows)
	}
}

// testBody returns the source of a test and, as tables may stand there, of the file's other functions that are no tests.
func testBody(t *testing.T, dir, name string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		source := mustRead(t, file)
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, file, source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		var body, helpers strings.Builder
		for _, decl := range parsed.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			text := source[fset.Position(f.Pos()).Offset:fset.Position(f.End()).Offset]
			switch {
			case f.Name.Name == name:
				body.Write(text)
			case !strings.HasPrefix(f.Name.Name, "Test") && !strings.HasPrefix(f.Name.Name, "Fuzz"):
				helpers.Write(text)
			}
		}
		if body.Len() > 0 {
			return body.String() + helpers.String()
		}
	}
	return ""
}
