package admin

import (
	"bytes"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/gorilla/mux"
)

var update = flag.Bool("update", false, "write openapi.yaml")

// sources are where the types of the API are declared.
var sources = []string{".", "../..", "../../cache", "../../discovery", "../bundle", "../../fetch", "../airgap", "../history", "../journal", "../missing", "../problem", "../warm", "../web"}

// comments returns what stands in the source about types, as "Type", and about fields, as "Type.field" by their names in JSON.
func comments(t *testing.T) map[string]string {
	t.Helper()
	out := make(map[string]string)
	for _, dir := range sources {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no source in %s: %v", dir, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			for _, decl := range file.Decls {
				gen, ok := decl.(*ast.GenDecl)
				if !ok || gen.Tok != token.TYPE {
					continue
				}
				for _, spec := range gen.Specs {
					commentsOf(out, gen, spec.(*ast.TypeSpec))
				}
			}
		}
	}
	return out
}

func commentsOf(out map[string]string, gen *ast.GenDecl, spec *ast.TypeSpec) {
	fields, ok := spec.Type.(*ast.StructType)
	if !ok {
		return
	}
	name := spec.Name.Name
	if _, known := out[name]; known {
		return // another package's, of the same name
	}
	out[name] = sentence(gen.Doc.Text())
	for _, field := range fields.Fields.List {
		if field.Tag == nil {
			continue
		}
		json, _, _ := strings.Cut(reflect.StructTag(strings.Trim(field.Tag.Value, "`")).Get("json"), ",")
		text := field.Doc.Text()
		if text == "" {
			text = field.Comment.Text()
		}
		out[name+"."+json] = sentence(text)
	}
}

// sentence makes a comment a sentence on one line, without the marks of links.
func sentence(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	text = strings.NewReplacer("[", "", "]", "").Replace(text)
	if text != "" {
		text = strings.ToUpper(text[:1]) + text[1:]
		if !strings.HasSuffix(text, ".") {
			text += "."
		}
	}
	return text
}

// made makes the document of what is registered and of the comments in the source.
func made(t *testing.T, s *Server) []byte {
	t.Helper()
	doc := s.describe(mux.NewRouter()).OpenAPI()
	words := comments(t)
	embeds := map[string]string{"Event": "Decision", "Point": "Totals"}
	for name, schema := range doc.Components.Schemas.Map() {
		schema.Description = words[name]
		// Whoever reads an answer has to expect more to come.
		schema.AdditionalProperties = nil
		for key, property := range schema.Properties {
			if property.Ref != "" {
				continue // a reference describes itself
			}
			text := words[name+"."+key]
			if text == "" {
				text = words[embeds[name]+"."+key]
			}
			if text != "" {
				property.Description = text
			}
		}
	}
	text, err := doc.YAML()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The document is what is registered, and has the comments of the source. With -update it is written.
func TestDocument(t *testing.T) {
	s := New(Options{Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { _ = s.Close() })
	want := made(t, s)
	if *update {
		if err := os.WriteFile("openapi.yaml", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !bytes.Equal(document, want) {
		t.Error("openapi.yaml is not what is registered; write it with: go test ./internal/admin -run TestDocument -update")
	}
}

// Every operation says what it does, and every parameter and schema is described.
func TestDocumentIsDescribed(t *testing.T) {
	s := New(Options{Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { _ = s.Close() })
	doc := s.describe(mux.NewRouter()).OpenAPI()
	made(t, s)
	for path, item := range doc.Paths {
		for _, op := range []*huma.Operation{item.Get, item.Put, item.Post, item.Delete} {
			if op == nil {
				continue
			}
			if op.Summary == "" || op.OperationID == "" || len(op.Tags) != 1 {
				t.Errorf("%s %s is not described", op.Method, path)
			}
			for _, p := range op.Parameters {
				if p.Description == "" {
					t.Errorf("the parameter %s of %s is not described", p.Name, op.OperationID)
				}
			}
		}
	}
	words := comments(t)
	for name := range doc.Components.Schemas.Map() {
		if words[name] == "" {
			t.Errorf("the type %s has no comment in %v", name, sources)
		}
	}
}
