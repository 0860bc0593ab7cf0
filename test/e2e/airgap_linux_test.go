package e2e

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/node"
)

// withoutNetwork returns a command in a network namespace of its own, in which there is no network at all. Where that can't be made the test is skipped.
func withoutNetwork(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	alone := func(cmd *exec.Cmd) *exec.Cmd {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}},
		}
		return cmd
	}
	if out, err := alone(command("version")).CombinedOutput(); err != nil {
		t.Skipf("this machine makes no network namespace: %v\n%s", err, out)
	}
	return alone(command(args...))
}

// TestAirGapOfNamespaces has a server on the connected side and one in a namespace without any network. Bundles go from one running server into the other, and
// the node gets everything from the second one by the reference discovery client.
func TestAirGapOfNamespaces(t *testing.T) {
	t.Parallel()
	connected := newScene(t, "")
	other := stage(t, `{offline: true, admin: {listen: []}, listen: [{address: "unix:$DIR/nodes.sock", tls: local-ca}]}`)
	other.begin(withoutNetwork(t, "serve", "--config", other.config))
	other.node = node.New(node.Options{CAs: other.nodeCAs, Resolve: func(hostport string) (string, bool) {
		return "unix:" + other.path("nodes.sock"), hostport == imageHost+":443"
	}})
	t.Cleanup(other.node.Close)

	base := connected.publish(large("base", 3<<20))
	spec := app("web")
	spec.Dependencies = []acitest.Dependency{{Name: base.name, Labels: base.labels}}
	web := connected.publish(spec)
	for _, im := range []image{base, web} {
		connected.fetchAsRkt(connected.node, im)
		connected.inspected(im)
	}
	if _, err := other.node.Discover(web.name, web.labels); err == nil {
		t.Error("there is a discovery page before anything was carried")
	}
	bundle := connected.path("monday.tar")
	if code, out := connected.cli("export", bundle, web.name+":1.0.0"); code != 0 {
		t.Fatalf("acproxy export = %d\n%s", code, out)
	}
	asked := len(connected.publisher.Requests())
	if out := other.imports(0, bundle); !strings.Contains(out, "2 images imported") {
		t.Errorf("acproxy import says\n%s", out)
	}
	for _, im := range []image{base, web} {
		f := other.fetchAsRkt(other.node, im)
		wantHeader(t, f.Image, "Cache-Status", hit)
	}
	if keys, err := other.node.Keys(web.name); err != nil || len(keys) == 0 {
		t.Errorf("the keys are at %q, %v", keys, err)
	}
	if n := len(connected.publisher.Requests()) - asked + len(other.publisher.Requests()); n > 0 {
		t.Errorf("publishers were asked %d times meanwhile", n)
	}
}
