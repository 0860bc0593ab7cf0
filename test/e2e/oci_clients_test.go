package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy/internal/testtools"
)

// An engine is a client of the OCI distribution API that people use, with everything that it writes below the scene's directory.
type engine struct {
	s *scene
	// pull pulls an image, by a tag or a digest, as a user whose password it is told, and returns what the program says.
	pull func(im ociReference, user *url.Userinfo) (output string, err error)
	// held returns the manifest of what was pulled last, as the program has it, and the layers, nil if it keeps none.
	held func(im ociReference) (manifest []byte, layers [][]byte)
}

// An ociReference says what image a program is asked for.
type ociReference struct{ name, tag, digest string }

// String returns the reference as people write it.
func (r ociReference) String() string {
	if r.digest != "" {
		return r.name + "@" + r.digest
	}
	return r.name + ":" + r.tag
}

// program returns a command that runs a program, without proxies of this machine, and with a home of its own.
func (s *scene) program(name string, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := command()
	cmd.Path, cmd.Args = must(lookPath(name))(s.t), append([]string{name}, args...)
	// That there are no certificates has to be said by a directory, to containerd.
	none := s.path("no-certificates")
	if err := os.MkdirAll(none, 0o700); err != nil {
		s.t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, "SSL_CERT_DIR="+none, "HOME="+s.dir, "XDG_RUNTIME_DIR="+s.dir, "XDG_CONFIG_HOME="+s.dir, "XDG_DATA_HOME="+s.dir, "XDG_CACHE_HOME="+s.dir, "TMPDIR="+s.dir)
	return cmd
}

// deployed returns a file of deploy/ in which some texts, each of which has to be there, are replaced by others.
func (s *scene) deployed(dir, name string, change ...string) string {
	s.t.Helper()
	text := string(must(os.ReadFile(filepath.Join("..", "..", "deploy", dir, name)))(s.t))
	for i := 0; i < len(change); i += 2 {
		if !strings.Contains(text, change[i]) {
			s.t.Errorf("deploy/%s/%s doesn't say %s", dir, name, change[i])
		}
	}
	return strings.NewReplacer(change...).Replace(text)
}

// TestContainerdConfiguration has containerd read what its own configuration has to say, and print what it makes of that.
func TestContainerdConfiguration(t *testing.T) {
	t.Parallel()
	testtools.Need(t, "containerd")
	s := &scene{t: t, dir: t.TempDir()}
	out, err := run(s.program("containerd", "--config", must(filepath.Abs("../../deploy/containerd/config.toml"))(t), "config", "dump"))
	if err != nil || !strings.Contains(out, `config_path = "/etc/containerd/certs.d"`) {
		t.Errorf("containerd makes of it, %v:\n%s", err, out)
	}
}

// run runs a program to its end.
func run(cmd *exec.Cmd) (output string, err error) {
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// asRoot skips the test if it isn't run by root, who alone can write files as others' and make mounts.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can do this")
	}
}

// credentials writes down what a user of acproxy shows, where skopeo and podman look for it, and returns the arguments that say so.
func (s *scene) credentials(user *url.Userinfo) []string {
	s.t.Helper()
	auths := make(map[string]any)
	if user != nil {
		password, _ := user.Password()
		auths[s.server().address("http")] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + password))}
	}
	return []string{"--authfile", s.write("auth.json", must(json.Marshal(map[string]any{"auths": auths}))(s.t))}
}

// skopeo copies images into a layout.
func (s *scene) skopeo() *engine {
	testtools.Need(s.t, "skopeo")
	layout := s.path("layout")
	blob := func(digest string) []byte {
		content := must(os.ReadFile(filepath.Join(layout, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))))(s.t)
		if got := "sha256:" + sumOf(content); got != digest {
			s.t.Errorf("skopeo keeps as %s what has the digest %s", digest, got)
		}
		return content
	}
	return &engine{
		s: s,
		pull: func(im ociReference, user *url.Userinfo) (string, error) {
			if err := os.RemoveAll(layout); err != nil {
				s.t.Fatal(err)
			}
			registry := s.server().address("http")
			args := append([]string{"--insecure-policy", "copy", "--src-tls-verify=false", "--preserve-digests", "--dest-oci-accept-uncompressed-layers"}, s.credentials(user)...)
			return run(s.program("skopeo", append(args, "docker://"+registry+"/"+im.String(), "oci:"+layout+":it")...))
		},
		held: func(ociReference) (manifest []byte, layers [][]byte) {
			var index imagespec.Index
			if err := json.Unmarshal(must(os.ReadFile(filepath.Join(layout, "index.json")))(s.t), &index); err != nil || len(index.Manifests) != 1 {
				s.t.Fatalf("skopeo's index has %d manifests, %v", len(index.Manifests), err)
			}
			manifest = blob(index.Manifests[0].Digest.String())
			var m imagespec.Manifest
			if err := json.Unmarshal(manifest, &m); err != nil {
				s.t.Fatal(err)
			}
			blob(m.Config.Digest.String())
			for _, d := range m.Layers {
				layers = append(layers, blob(d.Digest.String()))
			}
			return manifest, layers
		},
	}
}

// podman pulls images by the names that they have everywhere, for which its configuration names acproxy as a mirror.
func (s *scene) podman() *engine {
	testtools.Need(s.t, "podman")
	podman := func(args ...string) *exec.Cmd {
		// What the server's address is changes when it is started again.
		s.write("registries.conf", []byte(s.deployed("containers", "acproxy.conf", "acproxy.example.net", s.server().address("http"))+"insecure = true\n"))
		cmd := s.program("podman", append([]string{
			"--root", s.path("podman"), "--runroot", s.path("podman-run"), "--tmpdir", s.path("podman-tmp"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
		}, args...)...)
		cmd.Env = append(cmd.Env, "CONTAINERS_REGISTRIES_CONF="+s.path("registries.conf"))
		return cmd
	}
	pulled := false
	return &engine{
		s: s,
		pull: func(im ociReference, user *url.Userinfo) (string, error) {
			if pulled {
				if out, err := run(podman("rmi", "--all", "--force")); err != nil {
					s.t.Fatalf("podman rmi: %v\n%s", err, out)
				}
			}
			out, err := run(podman(append([]string{"pull", im.String()}, s.credentials(user)...)...))
			pulled = err == nil
			return out, err
		},
		held: func(im ociReference) (manifest []byte, layers [][]byte) {
			out := must(podman("inspect", im.String()).Output())(s.t)
			var seen []struct {
				ID, Digest, Os, Architecture string
				Config                       struct{ Labels map[string]string }
				RootFS                       struct{ Layers []string }
			}
			if err := json.Unmarshal(out, &seen); err != nil || len(seen) != 1 {
				s.t.Fatalf("podman inspect says %s, %v", out, err)
			}
			found := must(filepath.Glob(s.path("podman", "vfs-images", seen[0].ID, "=*")))(s.t)
			for _, file := range found {
				// A file whose name is more than a plain word is in base64, as is that of the manifest by its digest.
				name := must(base64.StdEncoding.DecodeString(strings.TrimPrefix(filepath.Base(file), "=")))(s.t)
				if string(name) == "manifest-"+seen[0].Digest {
					manifest = must(os.ReadFile(file))(s.t)
				}
			}
			return manifest, nil
		},
	}
}

// containerd pulls images by the names that they have everywhere, for which its configuration names acproxy as a mirror, or by acproxy's own name before
// them. It runs as a process of its own until the test ends.
func (s *scene) containerd(mirror bool) *engine {
	testtools.Need(s.t, "containerd", "ctr")
	hosts := s.path("hosts.d")
	s.write("containerd.toml", fmt.Appendf(nil, `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = %q
[ttrpc]
  address = %q
`, s.path("containerd"), s.path("containerd-state"), s.path("containerd.sock"), s.path("containerd-ttrpc.sock")))
	daemon := s.program("containerd", "--config", s.path("containerd.toml"))
	var log bytes.Buffer
	daemon.Stdout, daemon.Stderr = &log, &log
	if err := daemon.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := errors.Join(daemon.Process.Signal(syscall.SIGTERM), daemon.Wait()); err != nil || s.t.Failed() {
			s.t.Logf("containerd ended with %v; its log:\n%s", err, log.String())
		}
	})
	ctr := func(args ...string) *exec.Cmd {
		return s.program("ctr", append([]string{"--address", s.path("containerd.sock")}, args...)...)
	}
	eventually(s.t, "containerd answers", func() bool { return ctr("version").Run() == nil })
	full := func(im ociReference) string {
		if mirror {
			return im.String()
		}
		return s.server().address("http") + "/" + im.String()
	}
	get := func(digest string) []byte {
		content := must(ctr("content", "get", digest).Output())(s.t)
		if got := "sha256:" + sumOf(content); got != digest {
			s.t.Errorf("containerd keeps as %s what has the digest %s", digest, got)
		}
		return content
	}
	return &engine{
		s: s,
		pull: func(im ociReference, user *url.Userinfo) (string, error) {
			for _, name := range strings.Fields(string(must(ctr("images", "ls", "-q").Output())(s.t))) {
				if out, err := run(ctr("images", "rm", "--sync", name)); err != nil {
					s.t.Fatalf("ctr images rm: %v\n%s", err, out)
				}
			}
			// What the server's address is changes when it is started again. Nobody else may be asked: server is who is asked last.
			registry := s.server().address("http")
			dir := filepath.Join(hosts, imageHost)
			if !mirror {
				dir = filepath.Join(hosts, registry)
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				s.t.Fatal(err)
			}
			change := []string{"https://acproxy.example.net", s.plain(), "/etc/containerd/certs.d/example.com/acproxy-ca.pem", s.path("data", "ca", "ca.pem")}
			args := []string{"images", "pull", "--hosts-dir", hosts, "--snapshotter", "native"}
			if user != nil {
				password, _ := user.Password()
				shown := user.Username() + ":" + password
				if mirror {
					// The lines that are there for who needs them.
					change = append(change, "# [host.", "[host.", "#   authorization", "authorization", "bm9kZTpUT0tFTg==", base64.StdEncoding.EncodeToString([]byte(shown)))
				} else {
					args = append(args, "--user", shown)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(s.deployed("containerd", "hosts.toml", change...)), 0o600); err != nil {
				s.t.Fatal(err)
			}
			return run(ctr(append(args, full(im))...))
		},
		held: func(im ociReference) (manifest []byte, layers [][]byte) {
			var digest string
			for line := range strings.Lines(string(must(ctr("images", "ls").Output())(s.t))) {
				if fields := strings.Fields(line); len(fields) > 2 && fields[0] == full(im) {
					digest = fields[2]
				}
			}
			if digest == "" {
				s.t.Fatalf("containerd has no %s", full(im))
			}
			manifest = get(digest)
			var m imagespec.Manifest
			if err := json.Unmarshal(manifest, &m); err != nil {
				s.t.Fatal(err)
			}
			get(m.Config.Digest.String())
			for _, d := range m.Layers {
				layers = append(layers, get(d.Digest.String()))
			}
			return manifest, layers
		},
	}
}

// pullsEverywhere has an engine pull an image cold, held, and when its publisher is gone.
func (e *engine) pullsEverywhere(t *testing.T, check func(t *testing.T)) {
	t.Helper()
	s := e.s
	base := s.publish(filed("base"))
	top := s.publish(needing(large("web", 300<<10), base))
	im := ociReference{name: top.name, tag: "1.0.0"}
	var first []byte
	// How often the server has delivered the uppermost layer.
	delivered := func() int {
		var m imagespec.Manifest
		if json.Unmarshal(first, &m) != nil || len(m.Layers) == 0 {
			return 0
		}
		return strings.Count(s.server().output(), `"ref":"`+top.name+"@"+m.Layers[len(m.Layers)-1].Digest.String())
	}
	pull := func(t *testing.T, im ociReference) {
		t.Helper()
		before := delivered()
		if out, err := e.pull(im, nil); err != nil {
			t.Fatalf("pulling %v: %v\n%s", im, err, out)
		}
		manifest, layers := e.held(im)
		if first == nil {
			first = s.get(s.oci(top.name, "manifests", "1.0.0")).Body
		}
		if !bytes.Equal(manifest, first) {
			t.Errorf("the manifest of %v is %s, want %s", im, manifest, first)
		}
		eventually(t, "the layer is delivered, and not taken from somewhere else", func() bool { return delivered() > before })
		for i, layer := range layers {
			if got, want := filesOf(t, layer, ""), filesOf(t, []image{base, top}[i].aci, "rootfs"); !slices.Equal(got, want) {
				t.Errorf("layer %d has\n%s\nwant\n%s", i, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		if check != nil {
			check(t)
		}
	}
	t.Run("cold", func(t *testing.T) { pull(t, im) })
	s.wantAskedOnce(base, top)
	if t.Failed() {
		return
	}
	s.publisher.Stop()
	digest := s.do("HEAD", s.oci(top.name, "manifests", "1.0.0")).Header.Get("Docker-Content-Digest")
	byDigest := ociReference{name: top.name, digest: digest}
	t.Run("by digest, without publisher", func(t *testing.T) { pull(t, byDigest) })
	s.wantConverted(1)
	s.restart(syscall.SIGTERM)
	t.Run("by tag, after a restart", func(t *testing.T) { pull(t, im) })
	s.wantConverted(0)
	s.wantAskedOnce(base, top)
}

func TestOCISkopeo(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	s.skopeo().pullsEverywhere(t, nil)
}

// sees checks what a container sees of an image from the two layers that pullsEverywhere pulls: one above the other. roots are patterns of what they are unpacked to.
func (s *scene) sees(t *testing.T, roots string) {
	t.Helper()
	for name, want := range map[string]string{"hello.txt": "hello from base\n", "bin/run": "#!/bin/sh\n", "bin/again": "#!/bin/sh\n"} {
		found := must(filepath.Glob(filepath.Join(roots, name)))(t)
		if len(found) != 2 {
			t.Errorf("%s is unpacked %d times, want twice: the upper layer begins with the lower one", name, len(found))
		}
		for _, file := range found {
			if got := must(os.ReadFile(file))(t); string(got) != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
	}
	content := must(filepath.Glob(filepath.Join(roots, "content")))(t)
	if len(content) != 1 {
		t.Fatalf("the file of the upper layer is unpacked %d times, want once", len(content))
	}
	if fi := must(os.Stat(content[0]))(t); fi.Size() != 300<<10 {
		t.Errorf("the file of the upper layer has %d bytes, want %d", fi.Size(), 300<<10)
	}
	run := must(os.Stat(filepath.Join(filepath.Dir(content[0]), "bin/run")))(t)
	if st, ok := run.Sys().(*syscall.Stat_t); !ok || st.Uid != 17 || st.Gid != 5 || run.Mode()&os.ModeSetuid == 0 {
		t.Errorf("the program is %v of %+v, want one of 17:5 that runs as 17", run.Mode(), run.Sys())
	}
}

func TestOCIPodman(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := newScene(t, "")
	s.podman().pullsEverywhere(t, func(t *testing.T) { s.sees(t, s.path("podman", "vfs", "dir", "*")) })
}

// TestOCIContainerd pulls as Kubernetes' nodes do.
func TestOCIContainerd(t *testing.T) {
	t.Parallel()
	asRoot(t)
	for _, tt := range []struct {
		name   string
		mirror bool
		path   string
	}{{"by a mirror", true, "/v2/web/manifests/1.0.0?ns=example.com"}, {"in full", false, "/v2/example.com/web/manifests/1.0.0"}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, "")
			s.containerd(tt.mirror).pullsEverywhere(t, func(t *testing.T) {
				s.sees(t, s.path("containerd", "io.containerd.snapshotter.v1.native", "snapshots", "*"))
			})
			// It leaves the registry's name out of the path where that isn't ours, and says it as ns.
			eventually(t, "containerd asks for "+tt.path, func() bool { return strings.Contains(s.server().output(), `"path":"`+tt.path+`"`) })
		})
	}
}

// TestOCIClientsShowWhoTheyAre pulls what not everybody may have.
func TestOCIClientsShowWhoTheyAre(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(s *scene) *engine{
		"skopeo": (*scene).skopeo, "podman": (*scene).podman, "containerd": func(s *scene) *engine { return s.containerd(true) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name != "skopeo" {
				asRoot(t)
			}
			s, token := accessScene(t, "")
			e := start(s)
			open, secret := s.publish(app("app")), s.publish(app("secret/app"))
			for _, tt := range []struct {
				who  string
				user *url.Userinfo
				im   image
				may  bool
			}{
				{"nobody", nil, secret, false},
				{"a wrong password", url.UserPassword("alice", "x"), secret, false},
				{"a token of somebody else", url.UserPassword("alice", token), secret, false},
				{"nobody", nil, open, true},
				{"alice", url.UserPassword("alice", "open sesame"), secret, true},
				{"ci, with a token", url.UserPassword("ci", token), secret, true},
				{"alice", url.UserPassword("alice", "open sesame"), open, true},
			} {
				out, err := e.pull(ociReference{name: tt.im.name, tag: "1.0.0"}, tt.user)
				if tt.may != (err == nil) {
					t.Errorf("%s pulls %s: %v, want it to work: %v\n%s", tt.who, tt.im.name, err, tt.may, out)
				}
				if n := s.publisher.Count(secret.blob()); !tt.may && n != 0 {
					t.Errorf("the publisher was asked %d times for what %s may not have", n, tt.who)
				}
			}
		})
	}
}
