package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// imageOf returns the image for this machine out of the layout.
func imageOf(t *testing.T) v1.Image {
	t.Helper()
	index, err := layout.ImageIndexFromPath(filepath.Join(dist(t), "oci"))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 || manifest.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != testVersion {
		t.Fatalf("index.json names %+v, %v; want one, %s", manifest, err, testVersion)
	}
	inner, err := index.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(inner); err != nil {
		t.Error(err)
	}
	images, err := inner.IndexManifest()
	if err != nil || len(images.Manifests) != 1 || images.Manifests[0].Platform.Architecture != runtime.GOARCH {
		t.Fatalf("the index has %+v, %v", images, err)
	}
	img, err := inner.Image(images.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestImage wants nothing in the image but what acproxy needs, and nothing that its user could change but the volume.
func TestImage(t *testing.T) {
	img := imageOf(t)
	content := mutate.Extract(img)
	defer content.Close()
	var names []string
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			names = append(names, h.Name)
		}
		if own := h.Uid == user && h.Gid == user; own != (h.Name == "var/lib/acproxy") && own != (h.Name == "var/lib/acproxy/") {
			t.Errorf("%s belongs to %d:%d", h.Name, h.Uid, h.Gid)
		}
		if h.Mode&0o022 != 0 || h.Mode&0o6000 != 0 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		if h.Name == "etc/ssl/certs/ca-certificates.crt" {
			checkAuthorities(t, r)
		}
	}
	want := []string{"etc/acproxy/config.yaml", "etc/group", "etc/passwd", "etc/ssl/certs/ca-certificates.crt", "usr/bin/acproxy", "usr/share/doc/acproxy/NOTICES", "usr/share/doc/acproxy/acproxy.cdx.json"}
	if !slices.Equal(names, want) {
		t.Errorf("it holds %q, want %q", names, want)
	}
}

func checkAuthorities(t *testing.T, r io.Reader) {
	t.Helper()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if !cert.IsCA {
			t.Errorf("%s is no authority", cert.Subject)
		}
		count++
	}
	if count < 80 {
		t.Errorf("it knows %d authorities only", count)
	}
}

// TestImageInspects has skopeo read the layout and the archive, by the tag.
func TestImageInspects(t *testing.T) {
	need(t, "skopeo")
	for _, source := range []string{"oci:" + filepath.Join(dist(t), "oci") + ":" + testVersion, "oci-archive:" + name(t, "*-oci.tar")} {
		out, err := exec.Command("skopeo", "inspect", "--override-arch", runtime.GOARCH, source).CombinedOutput()
		var seen struct {
			Architecture string
			Created      string
			Labels       map[string]string
		}
		if err != nil || json.Unmarshal(out, &seen) != nil {
			t.Errorf("%s: %v\n%s", source, err, out)
			continue
		}
		if seen.Architecture != runtime.GOARCH || seen.Created != "2023-11-14T22:13:20Z" || seen.Labels["org.opencontainers.image.version"] != testVersion {
			t.Errorf("%s: skopeo sees %+v", source, seen)
		}
	}
}

// TestImageRuns runs the image as its configuration says: its user, without a capability, its root read-only but for the volume.
func TestImageRuns(t *testing.T) {
	needRoom(t)
	config, err := imageOf(t).ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	unpack := exec.Command("tar", "-x", "--same-owner", "-p", "-C", dir)
	content := mutate.Extract(imageOf(t))
	defer content.Close()
	unpack.Stdin = content
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	uid, gid, _ := strings.Cut(config.Config.User, ":")
	args := append(slices.Clone(config.Config.Entrypoint), config.Config.Cmd...)
	health := config.Config.Healthcheck.Test
	if health[0] != "CMD" {
		t.Fatalf("its health check is %q, and there is no shell", health)
	}
	cmd := exec.Command("unshare", append([]string{"--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private", "bash", "-euo", "pipefail", "-c", `
root=$1 log=$2 uid=$3 gid=$4 env=$5 health=$6
shift 6
ip link set lo up
mount --bind "$root" "$root"
mount -t tmpfs -o mode=700,uid="$uid",gid="$gid" tmpfs "$root/var/lib/acproxy"
mount -o remount,bind,ro "$root"
# chroot(1) changes users, as there is no setpriv inside.
env -i $env "$(command -v setpriv)" --no-new-privs "$(command -v chroot)" --userspec="$uid:$gid" --groups= "$root" "$@" >"$log" 2>&1 &
server=$!
trap 'cat "$log"' EXIT
for _ in $(seq 100); do
  if curl -fsS http://127.0.0.1:9404/readyz 2>/dev/null; then break; fi
  kill -0 "$server"
  sleep 0.1
done
curl -fsS http://127.0.0.1:9404/healthz
curl -fsS http://127.0.0.1:8080/.acproxy/healthz
curl -fsS http://127.0.0.1:9404/metrics | grep -c '^acproxy_'
# A command in the container, as docker exec and the health check run it.
as() { env -i $env "$(command -v chroot)" --userspec="$uid:$gid" --groups= "$root" "$@"; }
as $health
as /usr/bin/acproxy usage
kill -TERM "$server"
wait "$server"
`, "bash", dir, filepath.Join(t.TempDir(), "log"), uid, gid, strings.Join(config.Config.Env, " "), strings.Join(health[1:], " ")}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "ready\n") {
		t.Errorf("%v\n%s", err, out.Bytes())
	}
	t.Logf("%s", out.Bytes())
}

// TestDockerfileSaysTheSame holds the Dockerfile against the image that is built without Docker.
func TestDockerfileSaysTheSame(t *testing.T) {
	text, err := os.ReadFile("../oci/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	config, err := imageOf(t).ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	_, final, found := strings.Cut(strings.ReplaceAll(string(text), "\\\n", " "), "\nFROM scratch\n")
	if !found {
		t.Fatal("its last stage is not from scratch")
	}
	said := make(map[string]string)
	for line := range strings.Lines(final) {
		if keyword, rest, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			said[keyword] = strings.Join(strings.Fields(rest), " ")
		}
	}
	list := func(v []string) string {
		out, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(out), `","`, `", "`)
	}
	c := config.Config
	want := map[string]string{
		"COPY": "--from=build /rootfs/ /", "USER": c.User, "WORKDIR": c.WorkingDir, "STOPSIGNAL": c.StopSignal, "ENTRYPOINT": list(c.Entrypoint), "CMD": list(c.Cmd), "ENV": strings.Join(c.Env, " "),
		"VOLUME": keys(c.Volumes), "EXPOSE": keys(c.ExposedPorts),
		"HEALTHCHECK": "--interval=30s --timeout=5s --start-period=10s --retries=3 CMD " + list(c.Healthcheck.Test[1:]),
	}
	for keyword, value := range want {
		if said[keyword] != value {
			t.Errorf("it says %s %s, want %s", keyword, said[keyword], value)
		}
	}
	for label, value := range c.Labels {
		if label == "org.opencontainers.image.version" || label == "org.opencontainers.image.created" {
			continue // docker build doesn't know them
		}
		if !strings.Contains(said["LABEL"], label+`="`+value+`"`) {
			t.Errorf("it has no label %s=%q", label, value)
		}
	}
}

func keys(m map[string]struct{}) string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestSBOM holds the SBOM against what Go itself says that the binary is made of.
func TestSBOM(t *testing.T) {
	text, err := os.ReadFile(name(t, "*.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var bom cyclonedx.BOM
	if err := cyclonedx.NewBOMDecoder(bytes.NewReader(text), cyclonedx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]string)
	for _, c := range *bom.Components {
		listed[c.Name] = c.Version
	}
	out, err := exec.Command("go", "version", "-m", name(t, "acproxy-*-linux-"+runtime.GOARCH)).Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]string{"std": strings.TrimPrefix(runtime.Version(), "go")}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == "dep" {
			linked[f[1]] = f[2]
		}
	}
	if !reflect.DeepEqual(listed, linked) {
		t.Errorf("it lists\n%v\nand linked in is\n%v", listed, linked)
	}
	if len(linked) < 20 {
		t.Errorf("only %d modules were found", len(linked))
	}
	if v := bom.Metadata.Component.Version; v != testVersion {
		t.Errorf("it is of version %s", v)
	}
	for _, c := range *bom.Components {
		if !strings.HasPrefix(c.PackageURL, "pkg:golang/") {
			t.Errorf("%s has the package URL %q", c.Name, c.PackageURL)
		}
	}
}
