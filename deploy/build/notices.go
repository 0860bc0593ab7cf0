package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// legal are the files in which modules say under what terms they may be passed on.
var legal = regexp.MustCompile(`(?i)^((un)?licen[cs]e|copying|notice|patents)([.-].*)?$`)

// noticesOf returns the licences of everything that is linked in, which have to go with it. A module without one is an error: it may not be passed on.
func (r *release) noticesOf(ctx context.Context) ([]byte, error) {
	modules := make(map[string]string) // where the source of "PATH VERSION" lies
	for _, arch := range r.arches {
		list, err := r.output(ctx, target("linux", arch), "go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}\t{{.Dir}}{{end}}{{end}}", "./cmd/acproxy")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(list) {
			if name, dir, ok := strings.Cut(strings.TrimSpace(line), "\t"); ok {
				modules[name] = dir
			}
		}
	}
	goroot, err := r.output(ctx, nil, "go", "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.WriteString("acproxy is linked with the modules below. Their licences ask for these texts to go with it.\n")
	add := func(name, dir string) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		found := 0
		for _, e := range entries {
			if e.IsDir() || !legal.MatchString(e.Name()) {
				continue
			}
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				return err
			}
			found++
			fmt.Fprintf(&b, "\n%s\n%s: %s\n\n%s\n", strings.Repeat("=", 80), name, e.Name(), bytes.TrimSpace(text))
		}
		if found == 0 {
			return fmt.Errorf("%s has no licence in %s: it may not be passed on", name, dir)
		}
		return nil
	}
	if err := add("Go and its standard library", strings.TrimSpace(goroot)); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if err := add(name, modules[name]); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}
