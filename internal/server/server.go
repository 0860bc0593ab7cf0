// Package server speaks HTTP to nodes: discovery pages, signatures, images and keys, through every front door.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/memo"
	"github.com/acproxy/acproxy/internal/oci"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/tracing"
	"github.com/acproxy/acproxy/trust"
)

// Root is the path under which everything that is acproxy's own lies, under whatever host name a node came by. An image name can't contain
// "/.", so it never hides a publisher's discovery page.
const Root = "/.acproxy/"

// Config is what a Server works with. Its fields may not change after New.
type Config struct {
	Fetcher *fetch.Fetcher
	Keyring func() *trust.Keyring // the keys as they are now

	// OCI answers the OCI distribution API. nil means that there is none.
	OCI *oci.Bridge

	Guard *access.Guard // decides who may have what; nil means that everybody may have everything

	// PublicURL is the scheme and host that the templates on discovery pages point to. nil means those that the client used.
	PublicURL *url.URL
	// These three are what counts until [Server.Change].
	//
	// MaxAge is the Cache-Control max-age of images and signatures; of those without a version it is TTL if that is less. 0 has nodes ask
	// every time.
	MaxAge time.Duration
	TTL    time.Duration
	// AllKeys lists keys on discovery pages that rkt can't read, too, after those that it can.
	AllKeys bool
	// Via is this server's own name in Via headers; a request that carries it has come round in a loop.
	Via string

	// Certificate vouches for an image host inside a CONNECT connection. nil means that no connection is terminated.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	CAPEM       []byte                                                      // the local CA's certificate, to hand out; nil if there is none
	ImageHost   func(host string) bool                                      // whether the proxy front door answers for a host; nil means for none
	Tunnel      bool                                                        // let other hosts through untouched
	Dial        func(ctx context.Context, address string) (net.Conn, error) // connects tunnels, within the dial rules

	// Challenge returns what a validator of an ACME server is told at a path, by which it sees that a name is ours (RFC 8555, section 8.3). It is asked for the
	// path of every request that nothing else answers, and of those of clients that don't show who they are. nil means that no validator is waited for.
	Challenge func(path string) (text string, ok bool)

	Ready    func() error // returns why not all of the work can be done; nil means that it always can
	Patience Patience     // with clients
	Limits   Limits       // of clients
	Traces   *tracing.Exporter
	Push     Push // what they may upload
	// Pushed is told of each upload when it has ended, in a word, and of the bytes of images that came, with "". nil means nobody is told.
	Pushed func(outcome string, bytes int64)
	Access func(Access)     // is told of each request when it was answered; nil means nobody is told
	Log    *slog.Logger     // nil means slog.Default
	Now    func() time.Time // nil means time.Now
}

// A Server answers nodes. It is safe for concurrent use.
type Server struct {
	cfg    Config
	log    *slog.Logger
	now    func() time.Time
	router *mux.Router

	// What is made of a request or for an answer, and made again for the next one otherwise.
	refs       *memo.Memo[requested, asked]
	signatures *memo.Memo[acproxy.Digest, *small]
	pages      *memo.Memo[pageKey, *page]
	helds      *memo.Memo[heldKey, http.Header]
	brisk      *memo.Memo[briskKey, *url.URL]
	settings   atomic.Pointer[settings]
	changes    atomic.Uint64 // how often others took the place of the settings

	buffers sync.Pool             // for what is encrypted
	rates   atomic.Pointer[rates] // nil if there is no limit
	uploads *uploads

	inner *inner // serves terminated CONNECT connections; nil if none are

	// ctx is the life of tunnels, which outlive the HTTP server that they were asked of; Close cancels it and waits for them.
	ctx     context.Context
	cancel  context.CancelFunc
	tunnels sync.WaitGroup
}

// New returns a Server. Close ends the connections that its proxy front door has taken over.
func New(cfg Config) *Server {
	cfg.Patience = cfg.Patience.withDefaults()
	s := &Server{cfg: cfg, log: cfg.Log, now: cfg.Now}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.refs, s.signatures, s.pages = memo.New[requested, asked](maxMemo), memo.New[acproxy.Digest, *small](maxMemo), memo.New[pageKey, *page](maxMemo)
	s.helds, s.brisk = memo.New[heldKey, http.Header](maxMemo), newBriskMemo()
	s.Change(Settings{MaxAge: cfg.MaxAge, TTL: cfg.TTL, AllKeys: cfg.AllKeys})
	s.SetRate(cfg.Limits.Rate, cfg.Limits.Burst)
	s.uploads = newUploads(cfg.Fetcher, cfg.Push, cfg.Pushed)
	s.router = s.routes()
	if cfg.Certificate != nil && cfg.ImageHost != nil {
		s.inner = newInner(s)
	}
	return s
}

// Uploads returns how many uploads are in progress.
func (s *Server) Uploads() int { return s.uploads.inProgress() }

// Close ends the connections that CONNECT requests were turned into, and the uploads in progress, and waits for them.
func (s *Server) Close() error {
	s.uploads.close()
	s.cancel()
	s.tunnels.Wait()
	if s.inner == nil {
		return nil
	}
	return s.inner.close()
}

// Settings are what an operator may change while a Server works: the fields of the same names of a [Config].
type Settings struct {
	MaxAge, TTL time.Duration
	AllKeys     bool
}

// settings are the Settings that count until others take their place. They don't change.
type settings struct {
	// The values of Cache-Control for what has a version and what hasn't.
	maxAge, maxAgeLatest []string
	allKeys              bool
}

// Change puts other settings in the place of those that count, from the next answer on.
func (s *Server) Change(to Settings) {
	s.settings.Store(&settings{maxAge: cacheControl(to.MaxAge), maxAgeLatest: cacheControl(min(to.MaxAge, to.TTL)), allKeys: to.AllKeys})
	s.changes.Add(1)
}

// SetRate changes how many requests a client may make, as [Limits] has it, from the next request on. What clients have asked for already is forgotten.
func (s *Server) SetRate(rate, burst int) {
	s.rates.Store(newRates(Limits{Rate: rate, Burst: burst}, s.now))
}

// maxMemo bounds each of the things that are remembered to be had at once: a few kilobytes each.
const maxMemo = 4096

// handler answers a request, or returns why it can't; [Server.fail] turns that into the response.
type handler func(w http.ResponseWriter, r *http.Request) error

func (s *Server) routes() *mux.Router {
	// Names and labels come unescaped and hostile: a path is never cleaned and never decoded before it is taken apart.
	router := mux.NewRouter().SkipClean(true).UseEncodedPath()
	handle := func(route *mux.Route, h handler) { route.Handler(s.wrap(h)) }
	get := func(h handler) handler { return only(h, http.MethodGet, http.MethodHead) }
	// The router's own PathPrefix and Queries are regular expressions, ten times as slow.
	under := func(prefix string) mux.MatcherFunc {
		return func(r *http.Request, _ *mux.RouteMatch) bool { return strings.HasPrefix(r.URL.EscapedPath(), prefix) }
	}

	handle(router.MatcherFunc(under(imagesPath)), get(s.image))
	handle(router.MatcherFunc(isDiscovery), get(s.discovery))
	handle(router.MatcherFunc(under(mesosPath)), get(s.mesos))
	handle(router.MatcherFunc(s.isOCI), get(s.oci))
	handle(router.MatcherFunc(under(keysPath)), get(s.key))
	handle(router.MatcherFunc(under(PushPath)), s.push)
	handle(router.Path(Root+"ca.pem"), get(s.caCertificate))
	handle(router.Path(Root+"healthz"), get(s.health))
	handle(router.Path(Root+"readyz"), get(s.ready))
	handle(router.MatcherFunc(under(Root)), get(s.unknown))
	handle(router.MatcherFunc(func(r *http.Request, _ *mux.RouteMatch) bool { return s.validates(r) }), get(s.validator))
	handle(router.MatcherFunc(isImagePath), get(s.publisherURL))
	handle(router.Path("/"), get(s.landing))
	router.NotFoundHandler = s.wrap(get(s.unknown))
	return router
}

// isDiscovery matches requests for discovery pages: those with the parameter ac-discovery, whatever its value, on a path that isn't ours.
func isDiscovery(r *http.Request, _ *mux.RouteMatch) bool {
	if r.URL.RawQuery == "ac-discovery=1" {
		return !strings.HasPrefix(r.URL.EscapedPath(), Root)
	}
	return strings.Contains(r.URL.RawQuery, "ac-discovery") && r.URL.Query().Has("ac-discovery") && !strings.HasPrefix(r.URL.EscapedPath(), Root)
}

// Handler returns the handler for a listener.
func (s *Server) Handler(front Front) http.Handler {
	return s.patient(s.observe(front, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case toProxy(r):
			if !front.Proxy {
				s.fail(w, r, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-a-proxy", Detail: "this listener is no HTTP proxy; set proxy: true for it in the configuration"})
				return
			}
			s.wrap(s.proxy).ServeHTTP(w, r)
		default:
			s.route(w, r)
		}
	})))
}

// route hands a request to the handler of its route. The router's own ServeHTTP would copy the request twice to add what nobody here asks for.
func (s *Server) route(w http.ResponseWriter, r *http.Request) {
	var match mux.RouteMatch
	// There always is one: what fits no route is for the router's NotFoundHandler.
	s.router.Match(r, &match)
	match.Handler.ServeHTTP(w, r)
}

// wrap turns a handler into an http.Handler: the one place where an error becomes a response.
func (s *Server) wrap(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			s.fail(w, r, err)
		}
	})
}

// only refuses all methods but the given ones, and requests with content.
func only(h handler, methods ...string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		for _, m := range methods {
			switch {
			case r.Method == m && r.ContentLength != 0:
				return errContent
			case r.Method == m:
				return h(w, r)
			}
		}
		w.Header().Set("Allow", strings.Join(methods, ", "))
		return problem.WithStatus(http.StatusMethodNotAllowed, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "method-not-allowed", Detail: r.Method + " is not possible here"})
	}
}

func (s *Server) unknown(_ http.ResponseWriter, r *http.Request) error {
	return &acproxy.Error{
		Kind: acproxy.ErrNotFound, Code: "no-such-page",
		Detail: "there is nothing at " + r.URL.EscapedPath() + "; discovery needs ?ac-discovery=1, an image is asked for as " + imagesPath + "NAME.aci?version=VERSION",
	}
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, err := w.Write([]byte("ok\n"))
	return gone(err)
}

// ready answers whether nodes should be sent here: what is held is served, and what isn't can be kept. Publishers that are down don't count: nodes are no
// better off elsewhere.
func (s *Server) ready(w http.ResponseWriter, r *http.Request) error {
	if s.cfg.Ready != nil {
		if err := s.cfg.Ready(); err != nil {
			return problem.WithStatus(http.StatusServiceUnavailable, &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: "not-ready", Detail: err.Error()})
		}
	}
	return s.health(w, r)
}

// validates reports whether a request is that of a validator of an ACME server, which is waited for. To all others there is nothing special about the path.
func (s *Server) validates(r *http.Request) bool {
	if s.cfg.Challenge == nil || r.URL.RawQuery != "" {
		return false
	}
	_, ok := s.cfg.Challenge(r.URL.EscapedPath())
	return ok
}

func (s *Server) validator(w http.ResponseWriter, r *http.Request) error {
	text, ok := s.cfg.Challenge(r.URL.EscapedPath())
	if !ok {
		return s.unknown(w, r) // not waited for any more
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, err := io.WriteString(w, text)
	return gone(err)
}

func (s *Server) caCertificate(w http.ResponseWriter, _ *http.Request) error {
	if s.cfg.CAPEM == nil {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-local-ca", Detail: "this proxy has no local CA; acproxy ca init makes one"}
	}
	w.Header().Set("Content-Type", "application/x-pem-file")
	_, err := w.Write(s.cfg.CAPEM)
	return gone(err)
}

// gone turns the error of writing to a client into the end of the request: the client has left, there is nobody to tell.
func gone(err error) error {
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// requestScheme returns the scheme that the client used.
func requestScheme(r *http.Request) string {
	switch {
	case r.TLS != nil:
		return "https"
	case r.URL.Scheme != "":
		return r.URL.Scheme
	}
	return "http"
}

// requestHost returns the host name that the client used, lower-case and without the port.
func requestHost(r *http.Request) string { return hostname(r.Host) }

func hostname(hostport string) string {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	return strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
}

// client returns what tells one client from another: its address without the port.
func client(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// left reports whether the client has gone away.
func left(r *http.Request) bool { return errors.Is(r.Context().Err(), context.Canceled) }
