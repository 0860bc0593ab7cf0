package missing

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var errOffline = &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "nobody is asked"}

func ref(t *testing.T, s string) acproxy.Ref {
	t.Helper()
	r, err := acproxy.ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func said(entries []Missed) []string {
	var out []string
	for _, e := range entries {
		text := fmt.Sprintf("%d %v %s", e.Count, e.Ref, e.Code)
		if e.Name {
			text += " name"
		}
		out = append(out, text)
	}
	return out
}

func none(Missed) bool { return false }

func TestTable(t *testing.T) {
	table := New()
	for i := range 3 {
		table.Note(ref(t, "example.com/app:1"), errOffline, start.Add(time.Duration(i)*time.Minute))
	}
	table.Note(ref(t, "example.com/app:2"), &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-image-found"}, start)
	// A client goes on to what is above a name.
	for i, name := range []string{"example.com/a/b", "example.com/a", "example.com"} {
		table.NoteName(name, errOffline, start.Add(time.Duration(i)*time.Second))
	}
	table.NoteName("example.com/a", errOffline, start.Add(time.Hour))
	table.NoteName("Example", errOffline, start)
	want := []string{"3 example.com/app:1 offline", "1 example.com/a offline name", "1 example.com/a/b offline name", "1 example.com/app:2 no-image-found"}
	got := table.Entries(none)
	if !slices.Equal(said(got), want) {
		t.Errorf("got %q, want %q", said(got), want)
	}
	if !got[0].First.Equal(start) || !got[0].Last.Equal(start.Add(2*time.Minute)) || got[0].Why != "nobody is asked" {
		t.Errorf("got %+v", got[0])
	}

	file := filepath.Join(t.TempDir(), "missing.json")
	if err := table.Save(); err != nil {
		t.Errorf("one that is kept nowhere: %v", err)
	}
	table.file = file
	if err := table.Save(); err != nil {
		t.Fatal(err)
	}
	again, err := Load(file)
	if err != nil || !slices.Equal(again.Entries(none), got) {
		t.Errorf("loaded %+v, %v, want %+v", again.Entries(none), err, got)
	}
	// What hasn't changed isn't written.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := again.Save(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("it is written although nothing has changed")
	}
	// What is here by now is forgotten, unless it was asked for again.
	left := again.Entries(func(e Missed) bool {
		if e.Ref.Version() == "2" {
			again.Note(e.Ref, errOffline, start.Add(time.Hour))
		}
		return e.Ref.Name() == "example.com/app"
	})
	if want := want[1:3]; !slices.Equal(said(left), want) {
		t.Errorf("left are %q, want %q", said(left), want)
	}
	if got := said(again.Entries(none)); !slices.Contains(got, "2 example.com/app:2 offline") || slices.Contains(got, "3 example.com/app:1 offline") {
		t.Errorf("remembered are %q", got)
	}
	again.Clear()
	if got := again.Entries(none); len(got) != 0 {
		t.Errorf("after Clear there is %q", said(got))
	}
}

func TestTableIsBounded(t *testing.T) {
	table := New()
	for i := range Max {
		table.Note(ref(t, fmt.Sprintf("example.com/app:%d", i)), errOffline, start.Add(time.Duration(i)*time.Second))
	}
	if n := len(table.Entries(none)); n != Max {
		t.Errorf("%d are remembered, want %d", n, Max)
	}
	table.Note(ref(t, "example.com/app:0"), errOffline, start.Add(time.Hour*24))
	table.Note(ref(t, "example.com/new"), errOffline, start.Add(time.Hour*24))
	got := said(table.Entries(none))
	if len(got) != Max-Max/10+1 || !slices.Contains(got, "2 example.com/app:0 offline") || !slices.Contains(got, "1 example.com/new offline") || slices.Contains(got, "1 example.com/app:1 offline") {
		t.Errorf("%d are remembered: %.200q", len(got), got)
	}
	file := filepath.Join(t.TempDir(), "missing.json")
	for text, want := range map[string]string{"{": "reading what was missing", "[" + strings.Repeat("{},", Max) + "{}]": "it has 10001 entries"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if loaded, err := Load(file); err == nil || !strings.Contains(err.Error(), want) || loaded == nil {
			t.Errorf("Load of %.20q = %v, want %q", text, err, want)
		}
	}
	if loaded, err := Load(file + ".no"); err != nil || len(loaded.Entries(none)) != 0 {
		t.Errorf("Load of nothing = %v", err)
	}
}
