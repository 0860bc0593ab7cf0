package config

import (
	"fmt"
	"net/url"
	"slices"

	"github.com/goccy/go-yaml"
)

// YAML returns the configuration as a file could say it, with every key that counts, and without secrets: passwords in the URLs of proxies are replaced by xxxxx.
// Secrets of other kinds stand in files and in the environment, which it names as they are named.
func (c *Config) YAML() ([]byte, error) {
	shown := *c
	shown.Publishers = slices.Clone(c.Publishers)
	for i, p := range shown.Publishers {
		shown.Publishers[i] = c.Inherit(p)
		if u, err := url.Parse(p.Proxy); err == nil {
			shown.Publishers[i].Proxy = u.Redacted()
		}
	}
	text, err := yaml.Marshal(shown)
	if err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	return text, nil
}
