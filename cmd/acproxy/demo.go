package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func newDemo() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole job on this machine: a publisher, the server, and a node that fetches",
		Long: `demo starts a publisher with signed images, the real server on a fresh store, and plays a node with the reference discovery client. It needs no
root, no internet and no configuration. Every line is checked; it exits with 1 if one is not as it should be. Afterwards it stays up, with commands
to try, until it is interrupted.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runDemo(cmd.Context(), cmd.OutOrStdout(), once) },
	}
	cmd.Flags().BoolVar(&once, "once", false, "exit when everything was shown")
	return cmd
}

const (
	demoBig  = 110 << 20 // bytes of incompressible content
	herdSize = 20
)

// demo is the scene with a server and a node.
type demo struct {
	*show
	*scene
	node    *node.Node
	nodeCAs *x509.CertPool // whom nodes trust: acproxy's local CA
	server  *running
	sums    map[string]string // of the images as published, by name
}

func runDemo(ctx context.Context, w io.Writer, once bool) (err error) {
	defer outliveReader()()
	dir, err := os.MkdirTemp("", "acproxy-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d := &demo{show: &show{printer: newPrinter(w)}, scene: &scene{dir: dir}, sums: make(map[string]string)}
	defer func() { err = errors.Join(err, d.close()) }()

	started := time.Now()
	d.printf("acproxy demo: a publisher, the real server and a node, all on this machine, everything under %s\n\n", dir)
	if err := d.setUp(); err != nil {
		return err
	}
	d.printf("Ready in %s. The publisher answers at %s, acproxy at %s.\n", seconds(time.Since(started)), d.publisher.URL(), strings.Join(d.server.addresses(), " and "))
	for _, act := range []func(context.Context) error{d.first, d.dependencies, d.herd, d.refusals, d.doors, d.withoutPublisher} {
		if d.err != nil {
			return d.err
		}
		if err := act(ctx); err != nil {
			return err
		}
	}
	d.printf("\n%d of %d lines are as they should be, in %s.\n", d.lines-d.failed, d.lines, seconds(time.Since(started)))
	if d.err != nil {
		return d.err
	}
	if d.failed > 0 {
		return fmt.Errorf("%d of the demo's lines are not as they should be", d.failed)
	}
	if once {
		return nil
	}
	return d.stay(ctx)
}

func (d *demo) close() error {
	var errs []error
	if d.node != nil {
		d.node.Close()
	}
	if d.server != nil {
		errs = append(errs, d.server.stop())
	}
	errs = append(errs, d.scene.close())
	return errors.Join(errs...)
}

// setUp publishes the images, starts the server and makes the node.
func (d *demo) setUp() error {
	if err := d.scene.start(); err != nil {
		return err
	}
	images, err := d.images()
	if err != nil {
		return err
	}
	if err := d.publish(images); err != nil {
		return err
	}
	cfg, err := d.configure()
	if err != nil {
		return err
	}
	if _, err := trust.Add(trustDirs(cfg), sceneHost, d.key.Armored()); err != nil {
		return err
	}
	ca, err := localca.Init(cfg.CA.Dir, []string{sceneHost}, localca.Options{})
	if err != nil {
		return err
	}
	if d.server, err = start(cfg, func() (*config.Config, error) { return cfg, nil }, &logs{Logger: slog.New(slog.DiscardHandler), level: new(slog.LevelVar)}); err != nil {
		return err
	}
	d.nodeCAs = x509.NewCertPool()
	d.nodeCAs.AppendCertsFromPEM(ca.PEM())
	d.node = d.newNode()
	return nil
}

// newNode returns a node with connections of its own.
func (d *demo) newNode() *node.Node {
	return node.New(node.Options{CAs: d.nodeCAs, HTTP2: true, Resolve: d.resolve})
}

// resolve is the node's DNS: the publisher's name leads to acproxy.
func (d *demo) resolve(hostport string) (string, bool) {
	host, _, err := net.SplitHostPort(hostport)
	switch {
	case err != nil:
		return "", false
	case host == sceneHost:
		return d.server.bound[1].Addr().String(), true
	case hostport == d.server.bound[0].Addr().String():
		return hostport, true
	}
	return "", false
}

func (d *demo) configure() (*config.Config, error) {
	cfg, err := d.scene.configure(filepath.Join(d.dir, "data"))
	if err != nil {
		return nil, err
	}
	cfg.Listen = append(cfg.Listen, config.Listen{Address: "127.0.0.1:0", TLS: config.TLSLocalCA})
	cfg.Admin.Listen = []config.AdminListen{{Address: "127.0.0.1:0", TLS: config.TLSNone}}
	return cfg, nil
}

func (d *demo) images() ([]image, error) {
	stranger, err := trusttest.NewKey(trusttest.Options{Name: "A Stranger", Email: "stranger@elsewhere.example"})
	if err != nil {
		return nil, err
	}
	return []image{
		{name: "hello", signer: d.key, spec: acitest.Spec{Files: map[string]string{"hello.txt": "hello from a signed image\n"}}},
		{name: "big", signer: d.key, spec: acitest.Spec{RootfsSize: demoBig}},
		{name: "herd", signer: d.key, spec: acitest.Spec{RootfsSize: demoBig, Seed: 2}},
		{name: "base", signer: d.key, spec: acitest.Spec{RootfsSize: 1 << 20, Seed: 3}},
		{name: "web", signer: d.key, spec: acitest.Spec{
			RootfsSize: 2 << 20, Seed: 4,
			Dependencies: []acitest.Dependency{{Name: sceneHost + "/base", Labels: sceneLabels}},
		}},
		{name: "small-xz", signer: d.key, spec: acitest.Spec{Compression: acitest.XZ, RootfsSize: 256 << 10, Seed: 5}},
		{name: "tampered", signer: d.key, tamper: true, spec: acitest.Spec{RootfsSize: 3 << 20, Seed: 6}},
		{name: "stranger", signer: stranger, spec: acitest.Spec{RootfsSize: 1 << 20, Seed: 7}},
		{name: "unsigned", spec: acitest.Spec{RootfsSize: 1 << 20, Seed: 8}},
	}, nil
}

// fetch has the node fetch an image by name and prints both requests.
func (d *demo) fetch(ctx context.Context, name, cacheStatus string) error {
	endpoints := d.discover(name, "")
	if len(endpoints) == 0 {
		return ctx.Err()
	}
	signature := d.node.Get(ctx, endpoints[0].Signature, nil, nil)
	d.line(signature, expect{status: 200, cache: cacheStatus})
	image := d.node.Get(ctx, endpoints[0].Image, nil, nil)
	// Asking for the signature has set the image going, so that a small one may be held by now.
	if image.Header.Get("Cache-Status") == "acproxy; hit" {
		cacheStatus = "acproxy; hit"
	}
	d.line(image, expect{status: 200, cache: cacheStatus, sum: d.sums[name]})
	if d.sums[name] == "" {
		d.sums[name] = image.SHA256
	}
	keys, err := node.ReadKeys(d.key.Armored())
	if err != nil {
		return err
	}
	if _, err := d.node.Fetch(ctx, sceneHost+"/"+name, sceneLabels, keys); err != nil {
		d.fail("rkt's own check of %s: %v", name, err)
	}
	return ctx.Err()
}

// discover runs the reference discovery client and prints what it found.
func (d *demo) discover(name, note string) []node.Endpoint {
	started := time.Now()
	endpoints, err := d.node.Discover(sceneHost+"/"+name, sceneLabels)
	took := time.Since(started)
	d.check(err == nil && len(endpoints) == 1)
	d.row("https://"+sceneHost+"/"+name+"?ac-discovery=1", "200", "", "", took, "")
	if note != "" {
		d.printf("      %s\n", note)
	}
	if err != nil {
		d.fail("discovery of %s: %v", name, err)
	}
	return endpoints
}

func (d *demo) first(ctx context.Context) error {
	d.title("A node fetches images by name: discovery, signature, image")
	for _, name := range []string{"hello", "big", "small-xz"} {
		if err := d.fetch(ctx, name, "acproxy; fwd=uri-miss"); err != nil {
			return err
		}
	}
	d.title("The same again: everything is here now")
	before := d.publisher.Count("")
	for _, name := range []string{"hello", "big", "small-xz"} {
		if err := d.fetch(ctx, name, "acproxy; hit"); err != nil {
			return err
		}
	}
	d.claim(d.publisher.Count("") == before, "the publisher was not asked once more")
	return nil
}

func (d *demo) dependencies(ctx context.Context) error {
	d.title("An image with a dependency: the node resolves it by discovery, too")
	for _, name := range []string{"web", "base"} {
		if err := d.fetch(ctx, name, "acproxy; fwd=uri-miss"); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) herd(ctx context.Context) error {
	d.title(fmt.Sprintf("%d nodes ask at once for a cold image of %s", herdSize, bytesText(demoBig)))
	endpoints := d.discover("herd", "")
	if len(endpoints) == 0 {
		return ctx.Err()
	}
	answers := make([]node.Answer, herdSize)
	started := time.Now()
	var group errgroup.Group
	for i := range answers {
		group.Go(func() error {
			n := d.newNode()
			defer n.Close()
			n.Get(ctx, endpoints[0].Signature, nil, nil)
			answers[i] = n.Get(ctx, endpoints[0].Image, nil, nil)
			return nil
		})
	}
	_ = group.Wait() // nothing in it returns an error
	took := time.Since(started)
	var bytes int64
	whole, slowest := 0, answers[0]
	for _, a := range answers {
		bytes += a.Bytes
		if a.Err == nil && a.Status == 200 && a.SHA256 == answers[0].SHA256 && a.SHA256 != "" {
			whole++
		}
		if a.Took > slowest.Took {
			slowest = a
		}
	}
	d.line(slowest, expect{status: 200, cache: "acproxy; fwd=uri-miss"})
	d.row(fmt.Sprintf("all %d nodes together", herdSize), "200", "", bytesText(bytes), took, rate(bytes, took))
	d.claim(whole == herdSize, "%d of %d nodes have the whole image", whole, herdSize)
	fetches := d.fetches("herd")
	d.claim(fetches == 1, "the publisher was asked for it %s", times(fetches))
	return nil
}

// fetches returns how often the publisher was asked for an image's bytes.
func (d *demo) fetches(name string) int {
	n := 0
	for _, r := range d.publisher.Requests() {
		if r.Method == http.MethodGet && strings.Contains(r.Path, "/"+name+"/") && strings.HasSuffix(r.Path, ".aci") {
			n++
		}
	}
	return n
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func (d *demo) refusals(ctx context.Context) error {
	d.title("Images that must not reach a node")
	for _, c := range []struct {
		name, what string
		status     int
		says       string
	}{
		{"tampered", "a byte was changed after signing", 403, "bad-signature"},
		{"stranger", "signed by a key that nobody here trusts", 403, "unknown-key"},
		{"unsigned", "not signed at all", 403, "unsigned"},
	} {
		endpoints := d.discover(c.name, c.what)
		if len(endpoints) == 0 {
			return ctx.Err()
		}
		signature := d.node.Get(ctx, endpoints[0].Signature, nil, nil)
		if c.name != "tampered" {
			d.line(signature, expect{status: c.status, problem: c.says})
			d.claim(d.fetches(c.name) == 0, "not one byte of the image was asked for")
			continue
		}
		d.line(signature, expect{status: 200})
		image := d.node.Get(ctx, endpoints[0].Image, nil, nil)
		d.check(image.Err != nil || image.Status == 403)
		status := strconv.Itoa(image.Status)
		if image.Err != nil {
			status = "cut off"
		}
		d.answered(image, status)
		d.line(d.node.Get(ctx, endpoints[0].Image, nil, nil), expect{status: 403, problem: c.says})
	}
	return nil
}

func (d *demo) doors(ctx context.Context) error {
	d.title("Other front doors to the same images")
	plain := d.server.addresses()[0]
	d.line(d.node.Get(ctx, plain+"/.acproxy/images/"+sceneHost+"/hello.aci?version=1.0.0&os=linux&arch=amd64", nil, nil), expect{status: 200, cache: "acproxy; hit", sum: d.sums["hello"]})
	d.line(d.node.Get(ctx, plain+"/.acproxy/mesos/"+sceneHost+"/hello-1.0.0-linux-amd64.aci", nil, nil), expect{status: 200, cache: "acproxy; hit", sum: d.sums["hello"]})
	d.line(d.node.Get(ctx, plain+"/.acproxy/mesos/"+sceneHost+"/small-xz-1.0.0-linux-amd64.aci", nil, nil), expect{status: 200, cache: "acproxy; hit"})
	proxy, err := url.Parse(plain)
	if err != nil {
		return err
	}
	proxied := node.New(node.Options{CAs: d.nodeCAs, Proxy: proxy, Resolve: func(hostport string) (string, bool) {
		return hostport, hostport == d.server.bound[0].Addr().String()
	}})
	defer proxied.Close()
	keys, err := node.ReadKeys(d.key.Armored())
	if err != nil {
		return err
	}
	fetched, err := proxied.Fetch(ctx, sceneHost+"/hello", sceneLabels, keys)
	d.line(fetched.Image, expect{status: 200, cache: "acproxy; hit", sum: d.sums["hello"]})
	d.claim(err == nil, "the last one by HTTPS_PROXY=%s, signature checked by rkt's own code", plain)
	return nil
}

func (d *demo) withoutPublisher(ctx context.Context) error {
	d.publisher.Stop()
	d.title("The publisher is stopped")
	for _, name := range []string{"hello", "big", "web", "base"} {
		if err := d.fetch(ctx, name, "acproxy; hit"); err != nil {
			return err
		}
	}
	a := d.node.Get(ctx, "https://"+sceneHost+"/never-asked-before?ac-discovery=1", nil, nil)
	d.line(a, expect{status: 502, problem: "publisher-unreachable"})
	return nil
}

// stay keeps the stage up for a person to try things.
func (d *demo) stay(ctx context.Context) error {
	if err := d.publisher.Resume(); err != nil {
		return err
	}
	plain, secure := d.server.bound[0].Addr().String(), d.server.bound[1].Addr().(*net.TCPAddr)
	caFile := filepath.Join(d.server.parts.cfg.CA.Dir, localca.CertFile)
	// With go run there is no acproxy in the path.
	self, err := os.Executable()
	if err != nil {
		self = "acproxy"
	}
	d.printf(`
Everything stays up until you press Ctrl-C (the publisher is back, too). Try:

  # what an operator sees, in a browser
  %[7]s

  # a discovery page, as a node gets it when the image's host name leads here
  curl --cacert %[1]s --connect-to %[2]s:443:127.0.0.1:%[3]d 'https://%[2]s/hello?ac-discovery=1'

  # the same through the proxy front door
  HTTPS_PROXY=http://%[4]s curl --cacert %[1]s 'https://%[2]s/hello?ac-discovery=1'

  # an image and its signature, directly
  curl -O 'http://%[4]s/.acproxy/images/%[2]s/hello.aci?version=1.0.0&os=linux&arch=amd64' -D -
  curl    'http://%[4]s/.acproxy/images/%[2]s/hello.aci.asc?version=1.0.0&os=linux&arch=amd64'

  # why an image is refused
  curl -H 'Accept: text/plain' 'http://%[4]s/.acproxy/images/%[2]s/stranger.aci?version=1.0.0&os=linux&arch=amd64'

  # what is held, who signed it, what was refused
  %[6]s images   --data-dir %[5]s
  %[6]s refusals --data-dir %[5]s
`, caFile, sceneHost, secure.Port, plain, d.server.parts.cfg.DataDir, self, d.server.pages[0])
	if d.err != nil {
		return d.err
	}
	<-ctx.Done()
	return nil
}
