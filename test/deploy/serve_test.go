package deploy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// user is who acproxy is in the image and in pods.
const user = 65532

// patience is more than a start takes, on a machine that does other things too.
const patience = 30 * time.Second

// workload is as much of a StatefulSet or DaemonSet as is held against the server.
type workload struct {
	Spec struct {
		Template struct {
			Spec struct {
				Grace           int `yaml:"terminationGracePeriodSeconds"`
				SecurityContext struct {
					RunAsUser int `yaml:"runAsUser"`
				} `yaml:"securityContext"`
				Containers []struct {
					Args  []string
					Ports []struct {
						Name string
						Port int `yaml:"containerPort"`
					}
					StartupProbe   probe `yaml:"startupProbe"`
					LivenessProbe  probe `yaml:"livenessProbe"`
					ReadinessProbe probe `yaml:"readinessProbe"`
					VolumeMounts   []struct {
						Name string
						Path string `yaml:"mountPath"`
					} `yaml:"volumeMounts"`
				}
			}
		}
	}
}

type probe struct {
	HTTPGet struct{ Path, Port string } `yaml:"httpGet"`
}

// TestConfigurationsServe starts the server with each of the configurations that lie under deploy/, as the user that it is for, and asks for what probes ask.
func TestConfigurationsServe(t *testing.T) {
	for _, test := range []struct {
		name, config, manifest string
		ca                     bool
	}{
		{name: "Debian", config: "debian/config.yaml"},
		{name: "image", config: "oci/config.yaml"},
		{name: "Kubernetes", config: "kubernetes/base/config.yaml", manifest: "kubernetes/base/statefulset.yaml"},
		{name: "Kubernetes with a local CA", config: "kubernetes/local-ca/config.yaml", manifest: "kubernetes/base/statefulset.yaml", ca: true},
		{name: "Kubernetes, on each node", config: "kubernetes/node-cache/config.yaml", manifest: "kubernetes/node-cache/daemonset.yaml"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg, err := config.Load(filepath.Join("../../deploy", test.config))
			if err != nil {
				t.Fatal(err)
			}
			probes := []string{"/healthz", "/readyz", "/metrics"}
			if test.manifest != "" {
				probes = append(probes, checkWorkload(t, cfg, test.manifest)...)
			}
			s := serve(t, test.config, test.ca)
			for i, base := range s.fronts {
				if test.ca && i > 0 {
					continue // its certificate is for image hosts
				}
				if got := get(t, base+"/.acproxy/readyz"); got != "ok\n" {
					t.Errorf("%s/.acproxy/readyz = %q", base, got)
				}
			}
			if len(s.fronts) != len(cfg.Listen) {
				t.Errorf("it listens at %q, and is told of %d addresses", s.fronts, len(cfg.Listen))
			}
			if cfg.Admin.Metrics == "" {
				return
			}
			for _, path := range probes {
				if got := get(t, "http://"+s.metrics+path); got == "" {
					t.Errorf("%s says nothing", path)
				}
			}
			if cfg.Trust.SystemDir != "" {
				keysArrive(t, s)
			}
		})
	}
}

// checkWorkload holds a manifest against the configuration that it mounts, and returns the paths of its probes.
func checkWorkload(t *testing.T, cfg *config.Config, manifest string) (paths []string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("../../deploy", manifest))
	if err != nil {
		t.Fatal(err)
	}
	var w workload
	if err := yaml.Unmarshal(content, &w); err != nil {
		t.Fatal(err)
	}
	spec := w.Spec.Template.Spec
	if len(spec.Containers) != 1 {
		t.Fatalf("%s has %d containers", manifest, len(spec.Containers))
	}
	c := spec.Containers[0]
	ports := make(map[string]int)
	for _, p := range c.Ports {
		ports[p.Name] = p.Port
	}
	if want := fmt.Sprintf(":%d", ports["metrics"]); cfg.Admin.Metrics != want {
		t.Errorf("metrics are at %s, and the port is %s", cfg.Admin.Metrics, want)
	}
	if want := fmt.Sprintf(":%d", ports["http"]); cfg.Listen[0].Address != want {
		t.Errorf("nodes are served at %s, and the port is %s", cfg.Listen[0].Address, want)
	}
	if spec.SecurityContext.RunAsUser != user {
		t.Errorf("it runs as %d", spec.SecurityContext.RunAsUser)
	}
	if grace := time.Duration(spec.Grace) * time.Second; grace <= time.Duration(cfg.StopGrace) {
		t.Errorf("the pod is killed after %v, and ends by itself within %v", grace, time.Duration(cfg.StopGrace))
	}
	if want := []string{"serve", "--config", "/etc/acproxy/config.yaml"}; !slices.Equal(c.Args, want) {
		t.Errorf("its arguments are %q", c.Args)
	}
	mounts := make(map[string]string)
	for _, m := range c.VolumeMounts {
		mounts[m.Name] = m.Path
	}
	if mounts["data"] != cfg.DataDir || mounts["root-keys"] != cfg.Trust.SystemDir+"/root.d" || mounts["config"] != "/etc/acproxy" {
		t.Errorf("what is mounted, %q, is not where the configuration looks for it", mounts)
	}
	for _, p := range []probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
		if p.HTTPGet.Path == "" || p.HTTPGet.Port != "metrics" {
			t.Errorf("%s has a probe %+v", manifest, p)
			continue
		}
		paths = append(paths, p.HTTPGet.Path)
	}
	return paths
}

// keysArrive does what the kubelet does when a ConfigMap with keys comes: it writes a directory beside, and turns a symbolic link to it. It returns the key's fingerprint once the server has it.
func keysArrive(t *testing.T, s *server) (fingerprint string) {
	t.Helper()
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fingerprint = key.Fingerprint()
	mount := filepath.Join(s.dir, "run/trustedkeys/root.d")
	version := filepath.Join(mount, "..2026_01_02")
	if err := os.Mkdir(version, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(version, fingerprint), key.Armored(), 0o644); err != nil {
		t.Fatal(err)
	}
	link := func(to, name string) {
		temp := filepath.Join(mount, "..temporary")
		if err := os.Symlink(to, temp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(temp, filepath.Join(mount, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("..2026_01_02", "..data")
	link("..data/"+fingerprint, fingerprint)
	url := s.fronts[0] + "/.acproxy/keys/" + fingerprint + ".asc"
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return fingerprint
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still %s; the server has printed\n%s", url, resp.Status, s.out.String())
		}
	}
}

// server is acproxy, running with one of the configurations.
type server struct {
	dir     string
	fronts  []string // URLs of its addresses
	metrics string   // address
	out     *output
}

// output is what a program has printed so far.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write takes what the program prints.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// String returns what it has printed.
func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

var (
	anyAddress     = regexp.MustCompile(`(address|metrics): \S*:\d+`)
	servingMetrics = regexp.MustCompile(`serving metrics"?.*?address"?[=:]"?([0-9.:]+)`)
	servingAt      = regexp.MustCompile(`"?msg"?[=:]"?serving"?[ ,]"?version.*`)
	frontURL       = regexp.MustCompile(`https?://[0-9.:]+\d`)
)

// build builds acproxy, once for all tests.
var build = sync.OnceValues(func() (string, error) {
	// Beside what go test removes by itself, and reachable for another user.
	dir, err := os.MkdirTemp("", "acproxy-deploy-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "acproxy")
	if out, err := exec.Command("go", "build", "-o", name, "../../cmd/acproxy").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return name, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if name, err := build(); err == nil {
		if err := os.RemoveAll(filepath.Dir(name)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// serve starts acproxy with a configuration of deploy/, with its directories below one of the test's and on ports that are free.
func serve(t *testing.T, configFile string, ca bool) *server {
	t.Helper()
	program, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "acproxy-deploy-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s := &server{dir: dir, out: new(output)}
	content, err := os.ReadFile(filepath.Join("../../deploy", configFile))
	if err != nil {
		t.Fatal(err)
	}
	text := anyAddress.ReplaceAllString(string(content), "$1: 127.0.0.1:0")
	text = strings.NewReplacer("/var/lib/acproxy", dir+"/data", "/run/acproxy", dir+"/run", "/etc/acproxy", dir+"/etc").Replace(text)
	for _, made := range []string{"data", "etc/trustedkeys/root.d", "etc/trustedkeys/prefix.d", "run/trustedkeys/root.d"} {
		if err := os.MkdirAll(filepath.Join(dir, made), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "etc", "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if ca {
		makeCA(t, program, dir)
	}
	cmd := exec.Command(program, "serve", "--config", file)
	if os.Geteuid() == 0 {
		if err := os.Chown(filepath.Join(dir, "data"), user, user); err != nil {
			t.Fatal(err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	}
	cmd.Env = []string{"HOME=/nonexistent", "PATH=/usr/bin"}
	cmd.Stdout, cmd.Stderr = s.out, s.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	// Ends with the program, which the clean-up below stops and waits for.
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("it ended with %v:\n%s", err, s.out)
			}
		case <-time.After(patience):
			t.Errorf("it doesn't end:\n%s", s.out)
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		printed := s.out.String()
		if m := servingMetrics.FindStringSubmatch(printed); m != nil {
			s.metrics = m[1]
		}
		if line := servingAt.FindString(printed); line != "" && strings.HasSuffix(printed, "\n") {
			s.fronts = frontURL.FindAllString(line, -1)
			return s
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("it has ended: %v\n%s", err, printed)
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it doesn't serve:\n%s", printed)
		}
	}
}

// makeCA makes a local CA, and lays it out as the kubelet mounts a Secret for a pod with fsGroup: root's, readable by the pod's group.
func makeCA(t *testing.T, program, dir string) {
	t.Helper()
	if out, err := exec.Command(program, "ca", "init", "--data-dir", filepath.Join(dir, "made"), "--host", "example.com").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mount := filepath.Join(dir, "run/ca")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.pem", "ca-key.pem"} {
		content, err := os.ReadFile(filepath.Join(dir, "made/ca", name))
		if err != nil {
			t.Fatal(err)
		}
		// Without root the user's own file, which nobody else may read.
		mode := os.FileMode(0o400)
		if os.Geteuid() == 0 {
			mode = 0o440
		}
		if err := os.WriteFile(filepath.Join(mount, name), content, mode); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(filepath.Join(mount, name), 0, user); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// get asks for a URL, wants 200 and returns the body.
func get(t *testing.T, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("%s: %s, %v\n%s", url, resp.Status, err, body)
	}
	return string(body)
}
