package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"os"
	"path/filepath"
	"strconv"
)

// completions are where shells look for the completions of a program.
func completions() map[string]string {
	return map[string]string{
		"bash": "usr/share/bash-completion/completions/acproxy",
		"zsh":  "usr/share/zsh/vendor-completions/_acproxy",
		"fish": "usr/share/fish/vendor_completions.d/acproxy.fish",
	}
}

// pagesOf has acproxy make its manual pages and completions, and returns them where they are installed.
func (r *release) pagesOf(ctx context.Context) ([]file, error) {
	acproxy, err := r.hostBinary(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(r.work, "man")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	// Defaults that depend on who asks are not to get into the pages.
	env := []string{"SOURCE_DATE_EPOCH=" + strconv.FormatInt(r.date.Unix(), 10), "HOME=/nonexistent", "XDG_DATA_HOME="}
	if _, err := r.output(ctx, env, acproxy, "man", dir); err != nil {
		return nil, err
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		return nil, err
	}
	var out []file
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		out = append(out, file{path: "usr/share/man/man1/" + filepath.Base(name) + ".gz", mode: 0o644, content: compressed(content)})
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := r.output(ctx, env, acproxy, "completion", shell)
		if err != nil {
			return nil, err
		}
		out = append(out, file{path: completions()[shell], mode: 0o644, content: []byte(script)})
	}
	return out, nil
}

// compressed returns what gzip -9n makes of content.
func compressed(content []byte) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		panic(err) // the level is one
	}
	// Writing into memory doesn't fail.
	_, _ = w.Write(content)
	_ = w.Close()
	return b.Bytes()
}
