package deploy

import (
	"bytes"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/trust"
)

// What the snippets for rkt nodes say in place of what the reader has.
const (
	sampleAddress     = "192.0.2.10:8080"
	sampleFingerprint = "8b86de38890ddb7291867b025210bd8888182190"
)

// ignition is as much of both versions of Ignition's format as the snippets use. deploy/build has Ignition itself validate them.
type ignition struct {
	Ignition struct{ Version string }
	Storage  struct {
		Files []struct {
			Filesystem, Path string
			Mode             int
			Overwrite        bool
			Contents         struct {
				Source       string
				Verification struct{ Hash string }
			}
		}
	}
	Systemd struct {
		Units []struct {
			Name    string
			Dropins []struct{ Name, Contents string }
		}
	}
}

// node is where a snippet is tried: an acproxy with a local CA and a key, and what its commands say of them.
type node struct {
	*server
	fingerprint   string
	caSum, keySum string // of what its commands print, as the snippets tell the reader to get them
	ca            []byte
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{server: serve(t, "kubernetes/local-ca/config.yaml", true)}
	n.fingerprint = keysArrive(t, n.server)
	program, err := build()
	if err != nil {
		t.Fatal(err)
	}
	show := func(args ...string) []byte {
		out, err := exec.Command(program, args...).Output()
		if err != nil {
			t.Fatalf("acproxy %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	n.ca = show("ca", "show", "--pem", "--data-dir", filepath.Join(n.dir, "made"))
	n.caSum = fmt.Sprintf("%x", sha512.Sum512(n.ca))
	n.keySum = fmt.Sprintf("%x", sha512.Sum512(show("trust", "show", "--armor", "--config", filepath.Join(n.dir, "etc/config.yaml"), n.fingerprint)))
	return n
}

// check holds what a node has got against what it was to get: the authority that vouches for acproxy as example.com, and a key that rkt finds and can read.
func (n *node) check(t *testing.T, ca, key []byte) {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("there is no certificate in the node's CA file")
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "example.com"}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get(n.fronts[1] + "/.acproxy/healthz")
	if err != nil {
		t.Fatalf("as example.com: %v", err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("as example.com: %s", resp.Status)
	}
	dir := t.TempDir()
	place := filepath.Join(dir, "prefix.d/example.com", n.fingerprint)
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(place, key, 0o644); err != nil {
		t.Fatal(err)
	}
	keyring, err := trust.Load(trust.Dirs{Local: dir})
	if err != nil {
		t.Fatal(err)
	}
	keys := keyring.Keys("example.com/app")
	if len(keys) != 1 || keys[0].RktReadable() != nil {
		t.Errorf("the node trusts %+v for example.com/app", keys)
	}
}

// TestIgnition does what Ignition does at a node's first boot, and looks whether the node can then fetch.
func TestIgnition(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"ignition-2.2.json", "ignition-3.0.json", "ignition-2.2-proxy.json", "ignition-3.0-proxy.json"} {
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("../../deploy/rkt", name))
			if err != nil {
				t.Fatal(err)
			}
			dec := json.NewDecoder(bytes.NewReader(text))
			dec.DisallowUnknownFields()
			var config ignition
			if err := dec.Decode(&config); err != nil {
				t.Fatal(err)
			}
			files := make(map[string][]byte)
			for _, f := range config.Storage.Files {
				path := strings.ReplaceAll(f.Path, sampleFingerprint, n.fingerprint)
				files[path] = n.source(t, f.Contents.Source)
				if f.Mode != 0o644 {
					t.Errorf("%s has mode %o", f.Path, f.Mode)
				}
				sum := map[string]string{"/etc/ssl/certs/acproxy.pem": n.caSum, "/etc/rkt/trustedkeys/prefix.d/example.com/" + n.fingerprint: n.keySum}[path]
				switch hash := f.Contents.Verification.Hash; {
				case strings.HasPrefix(f.Contents.Source, "data:"):
				case hash != "sha512-"+strings.Repeat("0", 128):
					t.Errorf("%s comes over http, with the hash %q for the reader to fill in", f.Path, hash)
				case sum != fmt.Sprintf("%x", sha512.Sum512(files[path])):
					t.Errorf("%s is not what acproxy's command prints", f.Contents.Source)
				}
			}
			n.check(t, files["/etc/ssl/certs/acproxy.pem"], files["/etc/rkt/trustedkeys/prefix.d/example.com/"+n.fingerprint])
			if !strings.Contains(name, "proxy") {
				if !strings.Contains(string(files["/etc/hosts"]), "\n192.0.2.10 example.com storage.example.com\n") {
					t.Errorf("/etc/hosts is %q", files["/etc/hosts"])
				}
				return
			}
			// A client with that environment reaches acproxy as its proxy, and by it example.com.
			if len(config.Systemd.Units) != 1 || len(config.Systemd.Units[0].Dropins) != 1 {
				t.Fatalf("it has the units %+v", config.Systemd.Units)
			}
			_, proxy, ok := strings.Cut(strings.TrimSpace(config.Systemd.Units[0].Dropins[0].Contents), "[Service]\nEnvironment=HTTPS_PROXY=")
			if !ok {
				t.Fatalf("the drop-in is %q", config.Systemd.Units[0].Dropins[0].Contents)
			}
			n.throughProxy(t, strings.ReplaceAll(proxy, "http://"+sampleAddress, n.fronts[0]))
		})
	}
}

// source gets what Ignition would get from a URL, from the server of the test.
func (n *node) source(t *testing.T, source string) []byte {
	t.Helper()
	if text, ok := strings.CutPrefix(source, "data:,"); ok {
		plain, err := url.PathUnescape(text)
		if err != nil {
			t.Fatal(err)
		}
		return []byte(plain)
	}
	return []byte(get(t, strings.NewReplacer("http://"+sampleAddress, n.fronts[0], sampleFingerprint, n.fingerprint).Replace(source)))
}

func (n *node) throughProxy(t *testing.T, proxy string) {
	t.Helper()
	at, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.ca)
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(at), TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://example.com/.acproxy/healthz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok\n" {
		t.Errorf("through the proxy: %s, %q, %v", resp.Status, body, err)
	}
}

// TestCloudConfig runs the script that cloud-init would, with its paths below a directory of the test's; and with sums that are wrong.
func TestCloudConfig(t *testing.T) {
	testtools.Need(t, "curl", "sha512sum")
	text, err := os.ReadFile("../../deploy/rkt/cloud-config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(text, []byte("#cloud-config\n")) {
		t.Error("cloud-init wants #cloud-config in the first line")
	}
	var config struct {
		WriteFiles []struct{ Path, Owner, Permissions, Content string } `yaml:"write_files"`
		RunCmd     [][]string
	}
	if err := yaml.UnmarshalWithOptions(text, &config, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if len(config.WriteFiles) != 1 || len(config.RunCmd) != 1 || config.RunCmd[0][0] != config.WriteFiles[0].Path || config.WriteFiles[0].Permissions != "0755" {
		t.Fatalf("it writes %d files and runs %q", len(config.WriteFiles), config.RunCmd)
	}
	n := newNode(t)
	run := func(caSum, keySum string) (string, []byte, error) {
		t.Helper()
		root := t.TempDir()
		for _, dir := range []string{"etc", "usr/local/share", "bin"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "etc/hosts"), []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		// The machine's own certificates are not to be touched.
		if err := os.WriteFile(filepath.Join(root, "bin/update-ca-certificates"), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		script := strings.NewReplacer("http://"+sampleAddress, n.fronts[0], "="+sampleFingerprint, "="+n.fingerprint, "ca_sum="+strings.Repeat("0", 128), "ca_sum="+caSum, "key_sum="+strings.Repeat("0", 128), "key_sum="+keySum,
			" /usr/local", " "+root+"/usr/local", " \"/etc/", " \""+root+"/etc/", " /etc/hosts", " "+root+"/etc/hosts").Replace(config.WriteFiles[0].Content)
		var out []byte
		// Twice, as it may be run again.
		for range 2 {
			cmd := exec.Command("sh", "-c", script)
			cmd.Env = []string{"PATH=" + filepath.Join(root, "bin") + ":" + os.Getenv("PATH")}
			if out, err = cmd.CombinedOutput(); err != nil {
				return root, out, err
			}
		}
		return root, out, nil
	}
	root, out, err := run(n.caSum, n.keySum)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	read := func(name string) []byte {
		t.Helper()
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	n.check(t, read("usr/local/share/ca-certificates/acproxy.crt"), read("etc/rkt/trustedkeys/prefix.d/example.com/"+n.fingerprint))
	if hosts := string(read("etc/hosts")); hosts != "127.0.0.1 localhost\n192.0.2.10 example.com storage.example.com\n" {
		t.Errorf("/etc/hosts is %q", hosts)
	}
	wrong := strings.Repeat("1", 128)
	for what, sums := range map[string][2]string{"the CA": {wrong, n.keySum}, "the key": {n.caSum, wrong}} {
		root, out, err := run(sums[0], sums[1])
		if err == nil || !strings.Contains(string(out), "is not what it should be") {
			t.Errorf("%s is another one: %v\n%s", what, err, out)
		}
		if left, _ := filepath.Glob(filepath.Join(root, "etc/rkt/trustedkeys/prefix.d/example.com/*")); len(left) > 0 {
			t.Errorf("%s is another one, and the node has %q", what, left)
		}
	}
}
