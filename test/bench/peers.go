package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/acproxy/acproxy/trust"
)

// The contestants.
const (
	acproxyName  = "acproxy"
	nginxStatic  = "nginx static"
	nginxCache   = "nginx proxy_cache"
	nginxPushing = "nginx without tcp_nopush"
	varnishName  = "varnish"
	registryName = "docker-registry"
	goFiles      = "Go file server"
	goMemory     = "Go from memory"
	goCopier     = "Go copying proxy"
	directName   = "direct"
)

// A target is a server that was started, and how it is asked for what.
type target struct {
	name string
	*process
	plain, secure string // addresses; secure is "" if it doesn't speak TLS here
	admin         string // acproxy's socket

	page, signature, image func(*image) (path string, header map[string]string)
	pageSize               int64 // of a discovery page, -1 if it isn't known
}

// object is one of the things that a target serves.
type object int

const (
	page object = iota
	signature
	whole
)

// ask returns what asks a target for an object.
func (t *target) ask(im *image, o object) load {
	find := [...]func(*image) (string, map[string]string){t.page, t.signature, t.image}[o]
	path, header := find(im)
	l := load{URL: "http://" + t.plain + path, Header: map[string]string{}, Connections: 1}
	for name, value := range header {
		l.Header[name] = value
	}
	l.Want.Status = http.StatusOK
	switch o {
	case page:
		l.Want.Size = t.pageSize
	case signature:
		l.Want.Size = im.signature
	case whole:
		l.Want.Size = im.size
	}
	return l
}

// asFiles fills in the paths of a target that serves the ground's files as they are.
func (t *target) asFiles() *target {
	of := func(path func(*image) string) func(*image) (string, map[string]string) {
		return func(im *image) (string, map[string]string) { return path(im), nil }
	}
	t.page, t.pageSize = of(func(*image) string { return "/" + discoveryFile }), pageSize
	t.image = of(func(im *image) string { return im.path })
	t.signature = of(func(im *image) string { return im.path + ".asc" })
	return t
}

// A place is where a target is started: in an empty directory, in front of a publisher.
type place struct {
	*ground
	dir      string
	upstream string // the publisher's address
}

// A peer is a kind of target.
type peer struct {
	name string
	// warm and cold say in which benchmarks it takes part, secure whether it also speaks TLS.
	warm, cold, secure bool
	program, debian    string // what has to be installed, "" if nothing has, and the Debian package that has it
	start              func(ctx context.Context, at place, program string) (*target, error)
}

// peers returns everybody who can take part. In the benchmarks of cold images the publisher itself stands before them.
func peers() []peer {
	return []peer{
		{nginxCache, true, true, true, "nginx", "nginx", func(ctx context.Context, at place, program string) (*target, error) {
			return startNginx(ctx, at, program, nginxProxying)
		}},
		{nginxStatic, true, false, true, "nginx", "nginx", func(ctx context.Context, at place, program string) (*target, error) {
			return startNginx(ctx, at, program, nginxServing)
		}},
		{nginxPushing, true, false, true, "nginx", "nginx", func(ctx context.Context, at place, program string) (*target, error) {
			return startNginx(ctx, at, program, func(at place) kindOfNginx {
				k := nginxProxying(at)
				k.name, k.location = nginxPushing, "tcp_nopush off; "+k.location
				return k
			})
		}},
		{varnishName, true, true, false, "varnishd", "varnish", startVarnish},
		{registryName, true, true, false, "docker-registry", "docker-registry", startRegistry},
		{goFiles, true, false, false, "", "", func(ctx context.Context, at place, _ string) (*target, error) {
			return startFiles(ctx, at, goFiles, false)
		}},
		{goMemory, true, false, false, "", "", func(ctx context.Context, at place, _ string) (*target, error) {
			return startFiles(ctx, at, goMemory, true)
		}},
		{goCopier, false, true, false, "", "", startCopier},
		{acproxyName, true, true, true, "", "", startAcproxy},
	}
}

// locate returns the program of a peer, installing it if it is missing and may be. It returns false, and says why, if there is none.
func (p peer) locate(ctx context.Context, o options) (string, bool) {
	if p.program == "" {
		return "", true
	}
	program, err := installed(ctx, o, p.program, p.debian)
	if err != nil {
		o.note("%s is left out: %v", p.name, err)
	}
	return program, err == nil
}

// installed returns the path of a program, after installing the Debian package that has it if need be.
func installed(ctx context.Context, o options, program, debian string) (string, error) {
	look := func() (string, error) {
		found, err := exec.LookPath(program)
		if err != nil {
			// Servers are there, which isn't in everybody's PATH.
			found, err = exec.LookPath(filepath.Join("/usr/sbin", program))
		}
		return found, err
	}
	found, err := look()
	if err == nil || !o.install {
		return found, err
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("%s is not installed, and only root can: apt-get install %s", program, debian)
	}
	install := exec.Command("apt-get", "install", "-y", "--no-install-recommends", debian)
	install.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if _, err := output(ctx, install); err != nil {
		return "", err
	}
	return look()
}

// A kindOfNginx is how nginx is configured for what.
type kindOfNginx struct{ name, http, location string }

func nginxServing(at place) kindOfNginx {
	return kindOfNginx{nginxStatic, "", fmt.Sprintf("root %s;", at.root())}
}

// nginxProxying is for large files: larger buffers than the defaults, which make a cold one take twice as long, and a lock that doesn't give up on
// a slow publisher after five seconds.
func nginxProxying(at place) kindOfNginx {
	return kindOfNginx{nginxCache, fmt.Sprintf(`
	proxy_cache_path %[1]s/cache levels=1:2 keys_zone=images:10m max_size=100g inactive=1d use_temp_path=off;
	upstream publisher { server %[2]s; keepalive 32; }`, at.dir, at.upstream), `
			proxy_pass http://publisher;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_cache images;
			proxy_cache_valid 200 1h;
			proxy_cache_lock on;
			proxy_cache_lock_timeout 1h;
			proxy_cache_lock_age 1h;
			proxy_buffer_size 64k;
			proxy_buffers 32 64k;
			proxy_busy_buffers_size 512k;
			proxy_temp_file_write_size 512k;`}
}

const nginxConfig = `
daemon off;
user root;
worker_processes auto;
worker_rlimit_nofile 20000;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log;
events { worker_connections 4096; }
http {
	types { text/html html; }
	default_type application/octet-stream;
	sendfile on;
	tcp_nopush on;
	keepalive_requests 1000000000;
	open_file_cache max=1000 inactive=1h;
	open_file_cache_valid 1h;
	access_log %[1]s/access.log combined buffer=64k flush=1s;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	ssl_certificate %[4]s;
	ssl_certificate_key %[5]s;
	ssl_protocols TLSv1.2 TLSv1.3;
	ssl_session_cache shared:tls:10m;%[6]s
	server {
		listen %[2]s backlog=4096;
		listen %[3]s ssl backlog=4096;
		location / { %[7]s }
	}
}
`

func startNginx(ctx context.Context, at place, program string, kind func(place) kindOfNginx) (*target, error) {
	t := (&target{}).asFiles()
	cert, key, err := at.certificate()
	if err != nil {
		return nil, err
	}
	if err := t.addresses(true); err != nil {
		return nil, err
	}
	k := kind(at)
	t.name = k.name
	file := filepath.Join(at.dir, "nginx.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, nginxConfig, at.dir, t.plain, t.secure, cert, key, k.http, k.location), 0o644); err != nil {
		return nil, err
	}
	return t.launch(ctx, at, exec.Command(program, "-p", at.dir, "-c", file, "-e", filepath.Join(at.dir, "error.log")))
}

// addresses gives a target free addresses to listen on.
func (t *target) addresses(secure bool) (err error) {
	if t.plain, err = freeAddress(); err == nil && secure {
		t.secure, err = freeAddress()
	}
	return err
}

func (t *target) launch(ctx context.Context, at place, cmd *exec.Cmd) (_ *target, err error) {
	listens := []string{t.plain}
	if t.secure != "" {
		listens = append(listens, t.secure)
	}
	t.process, err = launch(ctx, at.dir, cmd, listens...)
	return t, err
}

// startVarnish starts varnish with memory to keep everything in. Its log goes to shared memory, from where nobody reads it; that memory is to be
// on a file system of memory, says its manual.
func startVarnish(ctx context.Context, at place, program string) (*target, error) {
	t := (&target{name: varnishName}).asFiles()
	if err := t.addresses(false); err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(at.upstream)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(at.dir, "bench.vcl")
	vcl := fmt.Sprintf("vcl 4.1;\nbackend publisher { .host = %q; .port = %q; }\n", host, port)
	if err := os.WriteFile(file, []byte(vcl), 0o644); err != nil {
		return nil, err
	}
	work := filepath.Join(at.dir, "varnish")
	if memory, err := os.MkdirTemp("/dev/shm", "acproxy-bench-"); err == nil {
		work = memory
	}
	t, err = t.launch(ctx, at, exec.Command(program, "-F", "-j", "none", "-n", work, "-a", t.plain, "-f", file, "-s", "malloc,4g"))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	t.after = func() error { return os.RemoveAll(work) }
	return t, nil
}

const registryConfig = `
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: %s}
  cache: {blobdescriptor: inmemory}
http: {addr: %s}
proxy: {remoteurl: "http://%s"}
`

// startRegistry starts distribution's registry as a pull-through cache. A manifest stands for the discovery page.
func startRegistry(ctx context.Context, at place, program string) (*target, error) {
	of := func(kind string, digest func(*image) string) func(*image) (string, map[string]string) {
		return func(im *image) (string, map[string]string) {
			return ociPrefix + ociRepository + "/" + kind + "/sha256:" + digest(im), map[string]string{"Accept": ociManifestType}
		}
	}
	t := &target{
		name: registryName, pageSize: pageSize,
		page:      of("manifests", func(im *image) string { return im.manifest }),
		signature: of("blobs", func(im *image) string { return im.sigBlob }),
		image:     of("blobs", func(im *image) string { return im.layer }),
	}
	if err := t.addresses(false); err != nil {
		return nil, err
	}
	file := filepath.Join(at.dir, "registry.yml")
	if err := os.WriteFile(file, fmt.Appendf(nil, registryConfig, filepath.Join(at.dir, "registry"), t.plain, at.upstream), 0o644); err != nil {
		return nil, err
	}
	return t.launch(ctx, at, exec.Command(program, "serve", file))
}

// startFiles starts a plain server of files, or of what it has read of them once: the least that a Go server costs.
func startFiles(ctx context.Context, at place, name string, memory bool) (*target, error) {
	t := (&target{name: name}).asFiles()
	if err := t.addresses(false); err != nil {
		return nil, err
	}
	cmd, err := roleCommand(roleFiles, filesSpec{t.plain, at.root(), memory})
	if err != nil {
		return nil, err
	}
	return t.launch(ctx, at, cmd)
}

func startCopier(ctx context.Context, at place, _ string) (*target, error) {
	t := (&target{name: goCopier}).asFiles()
	if err := t.addresses(false); err != nil {
		return nil, err
	}
	kept := filepath.Join(at.dir, "kept")
	if err := os.Mkdir(kept, 0o755); err != nil {
		return nil, err
	}
	cmd, err := roleCommand(roleCopier, copierSpec{t.plain, "http://" + at.upstream, kept})
	if err != nil {
		return nil, err
	}
	return t.launch(ctx, at, cmd)
}

// acproxyConfig is what differs from the defaults: where everything is, and that this publisher speaks plain http. Nobody answers on port 1, where
// https is tried first.
const acproxyConfig = `
data_dir: %s
admin: {socket: %s}
listen:
  - {address: "%s"}
  - {address: "%s", tls: files, cert_file: %s, key_file: %s}
dial:
  hosts: {"bench.example.com:80": "%s", "bench.example.com": "127.0.0.1:1"}
publishers:
  - {prefix: bench.example.com, http: true}
`

// startAcproxy starts acproxy as it is run: from the binary, with its access log, metrics and audit. It trusts the key that signed the images.
func startAcproxy(ctx context.Context, at place, _ string) (*target, error) {
	program, err := at.build()
	if err != nil {
		return nil, err
	}
	key, err := at.signingKey()
	if err != nil {
		return nil, err
	}
	cert, certKey, err := at.certificate()
	if err != nil {
		return nil, err
	}
	data := filepath.Join(at.dir, "data")
	if _, err := trust.Add(trust.Dirs{Local: filepath.Join(data, "trustedkeys")}, "bench.example.com", key.Armored()); err != nil {
		return nil, err
	}
	direct := func(ext string) func(*image) (string, map[string]string) {
		return func(im *image) (string, map[string]string) {
			return fmt.Sprintf("/.acproxy/images/%s.%s?version=%s&os=%s&arch=%s", im.name, ext, benchLabels["version"], benchLabels["os"], benchLabels["arch"]), nil
		}
	}
	t := &target{name: acproxyName, admin: filepath.Join(at.dir, "admin.sock"), signature: direct("aci.asc"), image: direct("aci"), pageSize: -1}
	t.page = func(im *image) (string, map[string]string) {
		host, path, _ := strings.Cut(im.name, "/")
		return "/" + path + "?ac-discovery=1", map[string]string{"Host": host}
	}
	if err := t.addresses(true); err != nil {
		return nil, err
	}
	file := filepath.Join(at.dir, "config.yaml")
	config := fmt.Appendf(nil, acproxyConfig, data, t.admin, t.plain, t.secure, cert, certKey, at.upstream)
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return nil, err
	}
	return t.launch(ctx, at, exec.Command(program, "serve", "--config", file))
}

// A publisherProcess is the publisher of a benchmark.
type publisherProcess struct{ *target }

// startPublisher starts the publisher of an image. Bytes a second may be 0, for as many as there is room for, and be for all connections in total.
func (g *ground) startPublisher(ctx context.Context, dir string, rate int64, total bool, images ...*image) (publisherProcess, error) {
	t := (&target{name: directName}).asFiles()
	if err := t.addresses(false); err != nil {
		return publisherProcess{}, err
	}
	spec := publisherSpec{Address: t.plain, Root: g.root(), Rate: rate, Total: total, Blobs: make(map[string]string)}
	for _, im := range images {
		for digest, path := range im.blobs {
			spec.Blobs[digest] = path
		}
	}
	cmd, err := roleCommand(rolePublisher, spec)
	if err != nil {
		return publisherProcess{}, err
	}
	t, err = t.launch(ctx, place{g, dir, ""}, cmd)
	return publisherProcess{t}, err
}

// fetched returns how often an image was asked for so far.
func (p publisherProcess) fetched(im *image) (int, error) {
	resp, err := http.Get("http://" + p.plain + fetchedPath)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var counts map[string]int
	err = json.NewDecoder(resp.Body).Decode(&counts)
	return counts[im.path], err
}

// saveProfile writes a CPU profile of the next seconds to a file. It is told by the admin socket.
func (t *target) saveProfile(ctx context.Context, file string, seconds int) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", t.admin)
	}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://acproxy/debug/pprof/profile?seconds=%d", seconds), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, resp.Body)
	return errors.Join(err, out.Close())
}
