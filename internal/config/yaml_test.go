package config

import (
	"reflect"
	"strings"
	"testing"
)

// What is written is read as the same again.
func TestYAML(t *testing.T) {
	full := Default()
	full.Publishers = samplePublishers()
	full.Access.Rules = sampleRules()
	full.Credentials.Hosts = sampleCredentials()
	full.Dial.Hosts = map[string]string{"example.com": "192.0.2.7", "example.org:443": "10.0.0.5:8443"}
	for what, c := range map[string]Config{"the default": Default(), "with all lists": full} {
		text, err := c.YAML()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		r := newReport("config.yaml", text)
		back := parse(r, text)
		if err := r.err(); err != nil {
			t.Errorf("%s: %v\n%s", what, err, text)
			continue
		}
		for i, p := range c.Publishers {
			c.Publishers[i] = c.Inherit(p)
		}
		if !reflect.DeepEqual(*back, c) {
			t.Errorf("%s came back as\n%+v, not as\n%+v", what, *back, c)
		}
	}
}

func TestYAMLHasNoSecrets(t *testing.T) {
	c := Default()
	c.Publishers = []Publisher{{Prefix: "example.com", Proxy: "http://ci:hunter2@proxy.internal:3128"}}
	text, err := c.YAML()
	if err != nil || strings.Contains(string(text), "hunter2") || !strings.Contains(string(text), "http://ci:xxxxx@proxy.internal:3128") {
		t.Errorf("YAML = %s, %v", text, err)
	}
	if c.Publishers[0].Proxy != "http://ci:hunter2@proxy.internal:3128" {
		t.Errorf("YAML has changed the configuration: %s", c.Publishers[0].Proxy)
	}
}
