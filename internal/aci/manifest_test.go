package aci_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/appc/spec/schema"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
)

// with returns a manifest with more fields.
func with(fields string) string {
	return `{"acKind":"ImageManifest","acVersion":"0.8.11","name":"example.com/app"` + fields + `}`
}

func TestReadManifest(t *testing.T) {
	id := acproxy.ImageID{7}.String()
	for _, tt := range []struct {
		name, json string
		ok         bool
	}{
		{"nothing but what must be", with(""), true},
		{"labels", with(`,"labels":[{"name":"version","value":"1"},{"name":"channel","value":"any thing, really"}]`), true},
		{"fields nobody knows", with(`,"x-more":{"a":1,"A":2}`), true},
		{"an app with free-form values", with(`,"app":{"exec":["/bin/a"],"user":"0","group":"0","isolators":[{"name":"resource/cpu","value":{"limit":"1","request":"1"}}]}`), true},
		{"a dependency", with(`,"dependencies":[{"imageName":"example.com/b","imageID":"` + id + `","labels":[{"name":"os","value":"linux"}],"size":12}]`), true},
		{"a name as long as allowed", strings.Replace(with(""), "example.com/app", strings.Repeat("a", acproxy.MaxNameLength), 1), true},

		{"nothing", "", false},
		{"null", "null", false},
		{"a list", "[]", false},
		{"not JSON", "{", false},
		{"something after it", with("") + "{}", false},
		{"another kind", strings.Replace(with(""), "ImageManifest", "PodManifest", 1), false},
		{"no kind", `{"acVersion":"0.8.11","name":"example.com/app"}`, false},
		{"no version of appc", `{"acKind":"ImageManifest","name":"example.com/app"}`, false},
		{"a version that is none", strings.Replace(with(""), "0.8.11", "new", 1), false},
		{"no name", `{"acKind":"ImageManifest","acVersion":"0.8.11"}`, false},
		{"a null name", strings.Replace(with(""), `"example.com/app"`, "null", 1), false},
		{"an upper-case name", strings.Replace(with(""), "app", "App", 1), false},
		{"a name too long", strings.Replace(with(""), "example.com/app", strings.Repeat("a", acproxy.MaxNameLength+1), 1), false},
		{"the name twice", with(`,"name":"example.com/evil"`), false},
		{"the name twice, in other letters", with(`,"NAME":"example.com/evil"`), false},
		{"labels twice", with(`,"labels":[],"labels":[{"name":"version","value":"2"}]`), false},
		{"labels twice, with a long s that Go folds", with(`,"labels":[],"label\u017f":[]`), false},
		{"a label's value twice", with(`,"labels":[{"name":"version","value":"1","value":"2"}]`), false},
		{"a label twice", with(`,"labels":[{"name":"version","value":"1"},{"name":"version","value":"1"}]`), false},
		{"a label called name", with(`,"labels":[{"name":"name","value":"1"}]`), false},
		{"a label without a name", with(`,"labels":[{"value":"1"}]`), false},
		{"a null label", with(`,"labels":[null]`), false},
		{"a null annotation", with(`,"annotations":[null]`), false},
		{"an operating system that is none", with(`,"labels":[{"name":"os","value":"beos"}]`), false},
		{"a dependency without a name", with(`,"dependencies":[{}]`), false},
		{"a null dependency", with(`,"dependencies":[null]`), false},
		{"a dependency's imageID twice", with(`,"dependencies":[{"imageName":"example.com/b","imageID":"` + id + `","imageID":"` + id + `"}]`), false},
		{"a dependency with part of an image ID", with(`,"dependencies":[{"imageName":"example.com/b","imageID":"` + id[:39] + `"}]`), false},
		{"a dependency of a size beyond any", with(`,"dependencies":[{"imageName":"example.com/b","size":9223372036854775808}]`), false},
		{"a dependency of negative size", with(`,"dependencies":[{"imageName":"example.com/b","size":-1}]`), false},
		{"a dependency with a label twice", with(`,"dependencies":[{"imageName":"example.com/b","labels":[{"name":"a","value":"1"},{"name":"a","value":"2"}]}]`), false},
		{"nested beyond reason", with(`,"x":` + strings.Repeat("[", 200_000) + strings.Repeat("]", 200_000)), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := aci.ReadManifest([]byte(tt.json))
			if tt.ok {
				if err != nil || string(m.Raw) != tt.json {
					t.Errorf("ReadManifest = %+v, %v; want it read", m, err)
				}
				return
			}
			if rule(err) != aci.RuleBadManifest || !errors.Is(err, acproxy.ErrPublisher) || m.Name != "" {
				t.Errorf("ReadManifest = %+v, %v; want rule %s", m, err, aci.RuleBadManifest)
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 400) {
				t.Errorf("Error = %q, want one short line", err)
			}
		})
	}
}

func TestReadManifestAtItsLimit(t *testing.T) {
	padded := func(size int) []byte {
		m := with("")
		return []byte(m + strings.Repeat(" ", size-len(m)))
	}
	if _, err := aci.ReadManifest(padded(1 << 20)); err != nil {
		t.Errorf("ReadManifest of 1 MiB = %v", err)
	}
	if _, err := aci.ReadManifest(padded(1<<20 + 1)); rule(err) != aci.RuleManifestTooLarge {
		t.Errorf("ReadManifest of 1 MiB and a byte = %v, want rule %s", err, aci.RuleManifestTooLarge)
	}
}

func FuzzReadManifest(f *testing.F) {
	f.Add([]byte(with("")))
	f.Add(acitest.Spec{Labels: map[string]string{"version": "1", "os": "linux", "arch": "amd64"}, Dependencies: []acitest.Dependency{{Name: "example.com/b", ImageID: acproxy.ImageID{1}, Size: 3}}}.ManifestJSON())
	f.Add([]byte(with(`,"labels":[{"name":"a","value":"\u0000"}],"annotations":[{"name":"created","value":"2016-01-01T00:00:00Z"}]`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := aci.ReadManifest(data)
		if err != nil {
			if !errors.Is(err, acproxy.ErrPublisher) {
				t.Errorf("ReadManifest = %v, want a violation", err)
			}
			return
		}
		// What is accepted, appc accepts, and written anew by appc it reads the same.
		var im schema.ImageManifest
		if err := im.UnmarshalJSON(data); err != nil {
			t.Fatalf("appc says %v", err)
		}
		again, err := json.Marshal(im)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > 1<<20 {
			return // written by appc it may be longer
		}
		m2, err := aci.ReadManifest(again)
		if err != nil {
			t.Fatalf("read again: %v", err)
		}
		m.Raw, m2.Raw = nil, nil
		if a, b := fmt.Sprint(m), fmt.Sprint(m2); a != b {
			t.Errorf("read %s, and written and read again %s", a, b)
		}
	})
}
