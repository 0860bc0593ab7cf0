package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
)

// TestDebianPackageReads has Debian's own programs look at the package.
func TestDebianPackageReads(t *testing.T) {
	need(t, "dpkg-deb")
	pkg := name(t, "acproxy_1.2.3~rc.1_*.deb")
	out, err := exec.Command("dpkg-deb", "--field", pkg, "Package", "Version", "Architecture", "Section").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := "Package: acproxy\nVersion: 1.2.3~rc.1\nArchitecture: " + runtime.GOARCH + "\nSection: net\n"
	if string(out) != want {
		t.Errorf("its fields are\n%s\nwant\n%s", out, want)
	}
	if conffiles := control(t, pkg, "conffiles"); conffiles != "/etc/acproxy/config.yaml\n" {
		t.Errorf("its conffiles are %q", conffiles)
	}
}

func control(t *testing.T, pkg, name string) string {
	t.Helper()
	out, err := exec.Command("dpkg-deb", "--info", pkg, name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestDebianPolicy has lintian compare the package with Debian's policy.
func TestDebianPolicy(t *testing.T) {
	// It brings half of Perl along, so it is not among what .ci/run installs.
	if _, err := exec.LookPath("lintian"); err != nil {
		t.Skip("lintian is not installed")
	}
	cmd := exec.Command("lintian", "--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0", name(t, "acproxy_*.deb"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// TestDebianPackageInstalls installs, starts, upgrades, removes and purges the package with dpkg itself, in a copy of this machine that is thrown away. There
// is no systemd in it: what the unit says is run, as a user without rights.
func TestDebianPackageInstalls(t *testing.T) {
	need(t, "dpkg", "deb-systemd-helper")
	needRoom(t)
	first := name(t, "acproxy_*.deb")
	later := filepath.Join(t.TempDir(), "later.deb")
	if err := os.WriteFile(later, laterPackage(t), 0o644); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key.asc")
	if err := os.WriteFile(key, publicKey(t), 0o644); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("testdata/install.sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-euc", `
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" overlay "$1/root"
cp "$2" "$1/root/first.deb"; cp "$3" "$1/root/later.deb"; cp "$4" "$1/root/install.sh"; cp "$5" "$1/root/key.asc"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount -t tmpfs tmpfs "$1/root/tmp"
ip link set lo up
chroot "$1/root" sh -eu /install.sh
# What is left in the upper layer is what the package has left behind. A character device stands for what was removed.
find "$1/upper" -name '*acproxy*' ! -type c ! -path '*/var/log/*' ! -path '*/var/cache/man/*' -printf '%P\n' > "$1/left"
if [ -s "$1/left" ]; then echo "purging leaves:"; cat "$1/left"; exit 1; fi
`, "sh", t.TempDir(), first, later, script, key)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	started := time.Now()
	if err := cmd.Run(); err != nil {
		t.Errorf("%v\n%s", err, out.Bytes())
	}
	t.Logf("in %v:\n%s", time.Since(started).Round(time.Millisecond), out.Bytes())
}

// publicKey returns a new key, armored.
func publicKey(t *testing.T) []byte {
	t.Helper()
	key, err := openpgp.NewEntity("Somebody", "", "somebody@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w, err := armor.Encode(&b, openpgp.PublicKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := key.Serialize(w); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// laterPackage returns the package as a later version, with the same program in it.
func laterPackage(t *testing.T) []byte {
	t.Helper()
	binary, err := os.ReadFile(name(t, "acproxy-*-linux-"+runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	r := &release{source: filepath.Join(built.dir, "source"), version: "1.2.3", date: time.Unix(1700000001, 0).UTC(), work: t.TempDir(), notices: []byte("none\n")}
	pkg, _, err := r.debianPackage(product{arch: runtime.GOARCH, binary: binary})
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}

// TestBinaryIsStatic wants a program that needs nothing of the machine, and that knows its version.
func TestBinaryIsStatic(t *testing.T) {
	binary := name(t, "acproxy-*-linux-"+runtime.GOARCH)
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("it has a segment %v: it is not static", p.Type)
		}
	}
	out, err := exec.Command(binary, "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "acproxy "+testVersion+" go") {
		t.Errorf("acproxy version = %q, %v", out, err)
	}
}

// TestSums has sha256sum look whether everything is what SHA256SUMS says, and looks whether everything is in it.
func TestSums(t *testing.T) {
	need(t, "sha256sum")
	cmd := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	cmd.Dir = dist(t)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("sha256sum: %v\n%s", err, out)
	}
	for path := range tree(t, dist(t)) {
		if path != "SHA256SUMS" && !strings.HasPrefix(path, "oci/") && !strings.Contains(string(out), fmt.Sprintf("%s: OK\n", path)) {
			t.Errorf("SHA256SUMS says nothing of %s", path)
		}
	}
}
