package main

import (
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

// TestReloadable changes every key of a configuration that is a plain value: those that are said to take effect without a restart are taken over, and no other.
func TestReloadable(t *testing.T) {
	before, after := config.Default(), config.Default()
	var change func(v reflect.Value)
	change = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				change(v.Field(i))
			}
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Int, reflect.Int64:
			v.SetInt(v.Int() + 1)
		case reflect.Uint32:
			v.SetUint(v.Uint() + 1)
		case reflect.Bool:
			v.SetBool(!v.Bool())
		case reflect.Map:
			v.Set(reflect.ValueOf(map[string]string{"example.com": "192.0.2.7"}))
		case reflect.Slice:
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
		}
	}
	change(reflect.ValueOf(&after).Elem())
	all := keysOf(before, after)
	next := before
	take(&next, &after)
	if got := keysOf(before, next); !slices.Equal(got, reloadable()) {
		t.Errorf("taken over are %q, said to be are %q", got, reloadable())
	}
	for _, key := range reloadable() {
		if !slices.Contains(all, key) {
			t.Errorf("there is no key %s", key)
		}
	}
	manual, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range reloadable() {
		if !strings.Contains(string(manual), "`"+key+"`") {
			t.Errorf("docs/operations.md doesn't say that %s takes effect without a restart", key)
		}
	}
	if len(all) < 60 {
		t.Errorf("only %d keys were changed", len(all))
	}
}

func keysOf(before, after config.Config) []string {
	var keys []string
	for _, c := range differences(&before, &after) {
		key, _, _ := strings.Cut(c.Key, "[")
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// TestDifferences prints what has changed, with the keys of each publisher, and nothing that is secret.
func TestDifferences(t *testing.T) {
	ttl, offline := config.Duration(90*time.Second), true
	before, after := config.Default(), config.Default()
	before.Publishers = []config.Publisher{
		{Prefix: "example.com", TTL: &ttl, Proxy: "http://user:hush-hush@proxy.example.com:3128"},
		{Prefix: "example.net", CAFile: "/etc/ca.pem", Templates: []string{"https://example.net/{name}.{ext}?token=hush-hush"}},
	}
	after.Publishers = []config.Publisher{
		{Prefix: "example.org", Offline: &offline, Signature: config.SignatureOptional, AllowAddresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Prefix: "example.com", Proxy: "http://user:hush-hush@proxy.example.com:8080", HTTP: true},
	}
	after.Cache.MaxSize, after.Offline, after.Dial.Hosts = 10*config.GiB, true, map[string]string{"example.com": "192.0.2.7"}
	after.Listen = []config.Listen{{Address: "unix:/run/nodes.sock", Mode: 0o660, TLS: config.TLSNone}}
	after.Access.Rules = []config.AccessRule{{Prefix: "example.com", Read: []string{"alice", "known"}}, {Read: []string{"anyone"}}}
	after.StopGrace = config.Duration(time.Minute)
	var got []string
	for _, c := range differences(&before, &after) {
		c.Restart = needsRestart(c.Key)
		got = append(got, changeText(c))
	}
	want := []string{
		`listen: [{address: "127.0.0.1:8080", mode: 0660, tls: "none", proxy: true}] → [{address: "unix:/run/nodes.sock", mode: 0660, tls: "none"}] (needs a restart)`,
		`access.rules: [] → [{prefix: "example.com", read: ["alice","known"]}, {read: ["anyone"]}]`,
		`offline: false → true`,
		`dial.hosts: [] → {"example.com":"192.0.2.7"}`,
		`cache.max_size: 0B → 10GiB`,
		`stop_grace: 10s → 1m (needs a restart)`,
		`publishers[example.com].http: unset → true`,
		`publishers[example.com].proxy: "http://proxy.example.com:3128" → "http://proxy.example.com:8080"`,
		`publishers[example.com].ttl: 1m30s → unset`,
		`publishers[example.net]: {templates: ["https://example.net/{name}.{ext}?token=…"], ca_file: "/etc/ca.pem"} → none`,
		`publishers[example.org]: none → {allow_addresses: ["10.0.0.0/8"], signature: "optional", offline: true}`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// Another order is no difference.
	swapped := before
	swapped.Publishers = []config.Publisher{before.Publishers[1], before.Publishers[0]}
	if found := differences(&before, &swapped); len(found) != 0 {
		t.Errorf("in another order: %+v", found)
	}
}

// TestRejudgeIn: held images are judged again when something expires, within the hour.
func TestRejudgeIn(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	in := now.Add
	for _, tt := range []struct {
		name  string
		until time.Time
		keys  []trust.Key
		want  time.Duration
	}{
		{"nothing expires", time.Time{}, []trust.Key{{}}, time.Hour},
		{"a verdict ends", in(20 * time.Minute), nil, 20 * time.Minute},
		{"a verdict ends later than in an hour", in(61 * time.Minute), nil, time.Hour},
		{"a key expires before", in(20 * time.Minute), []trust.Key{{Expires: in(30 * time.Minute)}, {Expires: in(10 * time.Minute)}}, 10 * time.Minute},
		{"a key has expired", time.Time{}, []trust.Key{{Expires: in(-time.Minute)}, {Expires: in(0)}}, time.Hour},
		{"a subkey expires", time.Time{}, []trust.Key{{Expires: in(30 * time.Minute), Subkeys: []trust.Subkey{{Expires: in(5 * time.Minute)}}}}, 5 * time.Minute},
		{"in this moment", in(time.Millisecond), nil, time.Second},
	} {
		if got := rejudgeIn(now, tt.until, tt.keys); got != tt.want {
			t.Errorf("%s: in %v, want %v", tt.name, got, tt.want)
		}
	}
}
