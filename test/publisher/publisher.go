// Package publisher is an appc publisher that can be told to misbehave.
//
// It serves any number of host names on one TLS listener with certificates of its own CA, and the same over plain http on a second one:
// discovery pages, public keys, images and their signatures. Everything it is asked is written down. It knows nothing of the proxy that is
// tested with it.
package publisher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// Options say where a publisher listens.
type Options struct {
	Listen     string // the address of the TLS listener; "" is a free port of 127.0.0.1
	ListenHTTP string // the address of the plain http listener; "" is a free port of 127.0.0.1
}

// A Publisher is safe for concurrent use.
type Publisher struct {
	ca      *authority
	started time.Time
	closed  chan struct{}

	mu       sync.Mutex
	up       *listening // nil while stopped or closed
	tlsAddr  string
	httpAddr string
	images   []*published
	latest   map[string]string // name → the version that "latest" is
	pages    map[string]Page   // host and path → page
	keys     []publicKey
	files    map[string]*content // host and path → what is served there
	troubles []*Trouble
	// connTroubles are those below HTTP.
	connTroubles []*Trouble
	log          []*Request
	changed      chan struct{} // closed and replaced when the log changes
	running      sync.WaitGroup
}

// listening is what Stop ends: two servers and their goroutines.
type listening struct {
	servers []*http.Server
	ctx     context.Context // ends when the publisher goes down, to let go what stalls
	down    context.CancelFunc
	served  sync.WaitGroup
}

// Start starts a publisher without images. Close ends it.
func Start(opts Options) (*Publisher, error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	p := &Publisher{
		ca: ca, started: time.Now(), closed: make(chan struct{}), changed: make(chan struct{}), tlsAddr: opts.Listen, httpAddr: opts.ListenHTTP,
		latest: make(map[string]string), pages: make(map[string]Page), files: make(map[string]*content),
	}
	if p.tlsAddr == "" {
		p.tlsAddr = "127.0.0.1:0"
	}
	if p.httpAddr == "" {
		p.httpAddr = "127.0.0.1:0"
	}
	return p, p.Resume()
}

// Stop takes the publisher down: connections are cut, and new ones refused, until Resume. It returns when no request is being answered.
func (p *Publisher) Stop() {
	p.mu.Lock()
	up := p.up
	p.up = nil
	p.mu.Unlock()
	if up != nil {
		up.down()
		for _, s := range up.servers {
			// What it reports is that the listener can't be closed twice.
			_ = s.Close()
		}
		up.served.Wait()
	}
	p.running.Wait()
}

// Resume brings a stopped publisher up again, on the addresses it had. It does nothing to one that is up.
func (p *Publisher) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.closed:
		return errors.New("the publisher is closed")
	default:
	}
	if p.up != nil {
		return nil
	}
	secure, err := net.Listen("tcp", p.tlsAddr)
	if err != nil {
		return err
	}
	plain, err := net.Listen("tcp", p.httpAddr)
	if err != nil {
		return errors.Join(err, secure.Close())
	}
	p.tlsAddr, p.httpAddr = secure.Addr().String(), plain.Addr().String()
	up := &listening{}
	up.ctx, up.down = context.WithCancel(context.Background())
	p.up = up
	for _, l := range []net.Listener{secure, plain} {
		s := &http.Server{
			Handler:           p.handler(up),
			ReadHeaderTimeout: time.Minute,
			// A client that doesn't trust the CA, or is cut, is no news.
			ErrorLog:     log.New(io.Discard, "", 0),
			ConnContext:  func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
			TLSConfig:    p.tlsConfig(up),
			TLSNextProto: http2ByHand(up),
		}
		l := listener{l}
		up.servers = append(up.servers, s)
		// Ended by closing the server; waited for by Stop.
		up.served.Go(func() {
			if l.Listener == secure {
				_ = s.ServeTLS(l, "", "")
			} else {
				_ = s.Serve(l)
			}
		})
	}
	return nil
}

// Close ends the publisher for good and returns when all of it is gone.
func (p *Publisher) Close() error {
	p.mu.Lock()
	select {
	case <-p.closed:
	default:
		close(p.closed)
	}
	p.mu.Unlock()
	p.Stop()
	return nil
}

// Addr returns host:port of the TLS listener.
func (p *Publisher) Addr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tlsAddr
}

// HTTPAddr returns host:port of the plain http listener.
func (p *Publisher) HTTPAddr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.httpAddr
}

// URL returns https:// and the address of the TLS listener.
func (p *Publisher) URL() string { return "https://" + p.Addr() }

// CAPEM returns the certificate of the publisher's CA.
func (p *Publisher) CAPEM() []byte { return p.ca.pem() }

// CAPool returns a new pool that holds the publisher's CA and nothing else.
func (p *Publisher) CAPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.ca.cert)
	return pool
}

// DialContext dials the publisher whatever host is asked for: the plain http listener for port 80, the TLS listener for any other.
// It is what a client's dialer is replaced with, so that https://example.com is this publisher.
func (p *Publisher) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	to := p.Addr()
	if port == "80" {
		to = p.HTTPAddr()
	}
	var d net.Dialer
	return d.DialContext(ctx, network, to)
}

// Client returns a new client that trusts the publisher's CA, reaches the publisher under every host name, follows no redirects and offers
// HTTP/2 only if h2 is true. The caller closes its idle connections.
func (p *Publisher) Client(h2 bool) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: p.DialContext, ForceAttemptHTTP2: h2, DisableCompression: true,
			TLSClientConfig: &tls.Config{RootCAs: p.CAPool(), MinVersion: tls.VersionTLS12},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// An Image is what Add publishes.
type Image struct {
	Name         string
	Labels       map[string]string
	ACI          []byte    // the blob
	File         string    // the file that holds the blob, if ACI is nil; it may not change until the publisher is closed
	Signature    []byte    // the .aci.asc; nil answers 404
	LastModified time.Time // of blob and signature; zero is 30 June 2016
	ETag         string    // quotes included; "" is made of the content
}

// Published says where an image can be found.
type Published struct {
	URL          string // of the image
	SignatureURL string
	Template     string // of the discovery page
}

type published struct {
	Image
	blob, signature *content
}

// Add publishes an image. It is found by meta-discovery from then on, at
//
//	https://storage.HOST/NAME/VERSION/OS/ARCH/image.aci
//
// where HOST is the name's first segment. An image without os and arch labels (noarch) has a template, and a place, without them. A version
// not given is "latest"; and "latest" is the image added last of those that differ in nothing but their version, unless SetLatest says
// otherwise. An image with the name and labels of an earlier one replaces it.
func (p *Publisher) Add(im Image) (Published, error) {
	ref, err := acproxy.NewRef(im.Name, im.Labels)
	if err != nil {
		return Published{}, err
	}
	if im.LastModified.IsZero() {
		im.LastModified = time.Date(2016, time.June, 30, 12, 0, 0, 0, time.UTC)
	}
	blob := &content{data: im.ACI, file: im.File, modified: im.LastModified, etag: im.ETag, kind: "application/octet-stream"}
	if im.ACI != nil {
		blob.file = ""
	}
	if err := blob.seal(); err != nil {
		return Published{}, err
	}
	im.Labels = ref.Labels()
	added := &published{Image: im, blob: blob}
	if im.Signature != nil {
		added.signature = &content{data: im.Signature, modified: im.LastModified, kind: "text/plain; charset=utf-8"}
		if err := added.signature.seal(); err != nil {
			return Published{}, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.images = append(p.images, added)
	host, template := ref.Host(), templateFor(im.Labels)
	at := "https://" + storage(host) + "/" + expand(template, im.Name, im.Labels, "aci")
	return Published{URL: at, SignatureURL: at + ".asc", Template: "https://" + storage(host) + "/" + template}, nil
}

// AddSigned is Add with a signature by a key, in place of the one im has.
func (p *Publisher) AddSigned(im Image, key *trusttest.Key) (Published, error) {
	blob := &content{data: im.ACI, file: im.File}
	if im.ACI != nil {
		blob.file = ""
	}
	body, err := blob.open()
	if err != nil {
		return Published{}, err
	}
	im.Signature, err = key.Sign(body, trusttest.SignOptions{})
	if err := errors.Join(err, body.Close()); err != nil {
		return Published{}, fmt.Errorf("signing %s: %w", im.Name, err)
	}
	return p.Add(im)
}

// SetLatest makes a version of an image the one that "latest" is.
func (p *Publisher) SetLatest(name, version string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest[name] = version
}

// Serve serves bytes at a host and path, "example.com/keys/1.gpg": anything that isn't an image of Add.
func (p *Publisher) Serve(at, contentType string, data []byte) {
	c := &content{data: data, modified: p.started.Truncate(time.Second), kind: contentType}
	// Hashing what is in memory can't fail.
	_ = c.seal()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.files[at] = c
}

// content is something to serve.
type content struct {
	data     []byte
	file     string // read instead of data, unless it is ""
	modified time.Time
	etag     string
	kind     string // the Content-Type
}

// seal makes the ETag.
func (c *content) seal() error {
	if c.etag != "" {
		return nil
	}
	body, err := c.open()
	if err != nil {
		return err
	}
	hash := sha256.New()
	_, err = io.Copy(hash, body)
	if err := errors.Join(err, body.Close()); err != nil {
		return fmt.Errorf("reading what to publish: %w", err)
	}
	c.etag = `"` + hex.EncodeToString(hash.Sum(nil)[:16]) + `"`
	return nil
}

type body interface {
	io.ReadSeeker
	io.Closer
}

func (c *content) open() (body, error) {
	if c.file == "" {
		return nopCloser{bytes.NewReader(c.data)}, nil
	}
	return os.Open(c.file)
}

type nopCloser struct{ io.ReadSeeker }

func (nopCloser) Close() error { return nil }
