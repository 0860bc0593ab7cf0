// Package node plays a container runtime towards acproxy: it discovers with the reference library, fetches signature and image in rkt's order,
// and checks the signature with the OpenPGP code that rkt has.
package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/appc/spec/discovery"
	"github.com/appc/spec/schema/types"
	"golang.org/x/crypto/openpgp" //nolint:staticcheck // deprecated as unsafe, and exactly what rkt runs
)

// Options says how a node reaches acproxy.
type Options struct {
	// Resolve says which address to connect to for a host:port, "unix:" and a path for a unix socket; what it doesn't know, or if it is nil, nothing is dialled for.
	Resolve func(hostport string) (address string, ok bool)
	CAs     *x509.CertPool // whom the node trusts for TLS
	Proxy   *url.URL       // the node's HTTPS_PROXY and HTTP_PROXY; nil means none
	HTTP2   bool           // offer HTTP/2, as rkt does for images but not for discovery
}

// A Node is a client. It is safe for concurrent use.
type Node struct {
	client *http.Client
}

// New returns a Node. Close ends its connections.
func New(o Options) *Node {
	t := &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: o.CAs},
		ForceAttemptHTTP2:   o.HTTP2,
		DisableCompression:  true,
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, network, hostport string) (net.Conn, error) {
			address, ok := hostport, false
			if o.Resolve != nil {
				address, ok = o.Resolve(hostport)
			}
			if !ok {
				return nil, fmt.Errorf("the node doesn't know where %s is", hostport)
			}
			if path, ok := strings.CutPrefix(address, "unix:"); ok {
				network, address = "unix", path
			}
			var d net.Dialer
			return d.DialContext(ctx, network, address)
		},
	}
	if o.Proxy != nil {
		t.Proxy = http.ProxyURL(o.Proxy)
	}
	return &Node{client: &http.Client{Transport: t}}
}

// Close ends idle connections.
func (n *Node) Close() { n.client.CloseIdleConnections() }

// reference guards the reference library, which has one client for the whole process.
var reference sync.Mutex

// An Endpoint is where an image and its signature are.
type Endpoint struct{ Image, Signature string }

// Discover asks for the endpoints of an image as rkt does.
func (n *Node) Discover(name string, labels map[string]string) ([]Endpoint, error) {
	app, err := newApp(name, labels)
	if err != nil {
		return nil, err
	}
	reference.Lock()
	defer reference.Unlock()
	defer n.lend()()
	found, attempts, err := discovery.DiscoverACIEndpoints(*app, nil, discovery.InsecureNone, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", err, attempts)
	}
	out := make([]Endpoint, len(found))
	for i, e := range found {
		out[i] = Endpoint{Image: e.ACI, Signature: e.ASC}
	}
	return out, nil
}

// Keys asks for the URLs of the keys of a name as rkt does.
func (n *Node) Keys(name string) ([]string, error) {
	app, err := newApp(name, nil)
	if err != nil {
		return nil, err
	}
	reference.Lock()
	defer reference.Unlock()
	defer n.lend()()
	keys, attempts, err := discovery.DiscoverPublicKeys(*app, nil, discovery.InsecureNone, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", err, attempts)
	}
	return keys, nil
}

// lend gives the node's transport to the reference library and returns what takes it back.
func (n *Node) lend() func() {
	before := discovery.Client.Transport
	discovery.Client.Transport = n.client.Transport
	return func() { discovery.Client.Transport = before }
}

func newApp(name string, labels map[string]string) (*discovery.App, error) {
	converted := make(map[types.ACIdentifier]string, len(labels))
	for label, value := range labels {
		id, err := types.NewACIdentifier(label)
		if err != nil {
			return nil, err
		}
		converted[*id] = value
	}
	return discovery.NewApp(name, converted)
}

// An Answer is one response, with its body read and counted.
type Answer struct {
	Method, URL string
	Status      int // 0 if there was none
	Proto       string
	Header      http.Header
	Bytes       int64
	SHA256      string // of the body
	Body        []byte // of small ones
	FirstByte   time.Duration
	Took        time.Duration
	Err         error // reaching the server or reading the body; a body cut short is one
}

// Detail returns what an error answer says is wrong.
func (a Answer) Detail() string {
	var problem struct {
		Detail string `json:"detail"`
	}
	if json.Unmarshal(a.Body, &problem) != nil {
		return ""
	}
	return problem.Detail
}

// keepBody is the size up to which bodies are kept.
const keepBody = 1 << 20

// Get fetches a URL. The header may be nil. If file isn't nil the body is written to it.
func (n *Node) Get(ctx context.Context, rawURL string, header http.Header, file io.Writer) Answer {
	return n.Do(ctx, http.MethodGet, rawURL, header, file)
}

// Do makes a request and reads its answer to the end.
func (n *Node) Do(ctx context.Context, method, rawURL string, header http.Header, file io.Writer) Answer {
	a := Answer{Method: method, URL: rawURL}
	started := time.Now()
	defer func() { a.Took = time.Since(started) }()
	req, err := http.NewRequestWithContext(ctx, method, rawURL, nil)
	if err != nil {
		a.Err = err
		return a
	}
	if header != nil {
		req.Header = header.Clone()
	}
	resp, err := n.client.Do(req)
	if err != nil {
		a.Err = err
		return a
	}
	defer resp.Body.Close()
	a.Status, a.Header, a.Proto, a.FirstByte = resp.StatusCode, resp.Header, resp.Proto, time.Since(started)
	sum := sha256.New()
	var kept bytes.Buffer
	to := []io.Writer{sum, &limitedBuffer{&kept}}
	if file != nil {
		to = append(to, file)
	}
	a.Bytes, a.Err = io.Copy(io.MultiWriter(to...), resp.Body)
	a.SHA256, a.Body = hex.EncodeToString(sum.Sum(nil)), kept.Bytes()
	a.Took = time.Since(started)
	return a
}

// limitedBuffer keeps the beginning of what is written to it.
type limitedBuffer struct{ *bytes.Buffer }

// Write keeps what fits.
func (b *limitedBuffer) Write(p []byte) (int, error) {
	if room := keepBody - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// A Fetched is what came of fetching an image by name.
type Fetched struct {
	Endpoint  Endpoint
	Signature Answer
	Image     Answer
	Signer    string // the primary key ID that rkt's check found, as 16 hex digits
}

// Fetch does what rkt fetch NAME does, once the key is trusted on the node: discovery, signature, image, and the check of one against the other. Like
// rkt it uses the first endpoint only, and doesn't ask for the image when there is no signature. A nil keyring skips the check. The error is rkt's own
// verdict, or that of the first step that failed.
func (n *Node) Fetch(ctx context.Context, name string, labels map[string]string, keys openpgp.EntityList) (Fetched, error) {
	var f Fetched
	endpoints, err := n.Discover(name, labels)
	if err != nil {
		return f, err
	}
	if len(endpoints) == 0 {
		return f, errors.New("discovery gave no endpoint")
	}
	f.Endpoint = endpoints[0]
	if f.Signature = n.Get(ctx, f.Endpoint.Signature, nil, nil); f.Signature.failed() != nil {
		return f, fmt.Errorf("signature: %w", f.Signature.failed())
	}
	file, err := os.CreateTemp("", "node-*.aci")
	if err != nil {
		return f, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if f.Image = n.Get(ctx, f.Endpoint.Image, nil, file); f.Image.failed() != nil {
		return f, fmt.Errorf("image: %w", f.Image.failed())
	}
	if keys == nil {
		return f, nil
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return f, err
	}
	signer, err := openpgp.CheckArmoredDetachedSignature(keys, file, bytes.NewReader(f.Signature.Body))
	if err != nil {
		return f, fmt.Errorf("rkt's check of the signature: %w", err)
	}
	f.Signer = fmt.Sprintf("%016X", signer.PrimaryKey.KeyId)
	return f, nil
}

// failed returns why an answer is not a whole 200.
func (a Answer) failed() error {
	switch {
	case a.Err != nil:
		return a.Err
	case a.Status != http.StatusOK:
		return fmt.Errorf("%s answered %d: %s", a.URL, a.Status, a.Detail())
	}
	return nil
}

// ReadKeys returns the keyring of a node that was given an armored key, as rkt reads it.
func ReadKeys(armored []byte) (openpgp.EntityList, error) {
	return openpgp.ReadArmoredKeyRing(bytes.NewReader(armored))
}
