// Package admin is how operators, and acproxy's own commands, look into a running server: an API, described by openapi.yaml.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/listen"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/warm"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

// Options is what a Server gives access to. All fields but Guard, Page, Now and Log have to be set.
type Options struct {
	Store   Store
	Guard   *access.Guard // who may do what; nil means that nobody may change anything but by the socket
	Metrics http.Handler

	Flights    func() []fetch.FlightState
	Publishers func() []web.HostState // the hosts that were asked lately
	Keyring    func() *trust.Keyring
	Journal    *journal.Journal
	History    *history.History
	Warm       *warm.Jobs

	// Origin and Destination are where carried images come from and go to.
	Origin      airgap.Origin
	Destination Destination
	Stall       time.Duration // how long a client that brings an image may send nothing; 0 means DefaultStall

	// Discover asks an image's publisher where it keeps the image and its keys.
	Discover func(context.Context, acproxy.Ref) (Discovered, error)
	// Config returns the configuration that counts, without secrets, as YAML.
	Config func() ([]byte, error)
	// ReloadKeys reads the trusted keys again, now.
	ReloadKeys func()
	// Reload reads the configuration and all that it names again, and returns what of it has changed.
	Reload func() ([]Change, error)
	// Ready returns why the server can't do all of its work, nil if it can.
	Ready func() error

	Version string
	Started time.Time
	Offline func() bool // whether the server dials nobody; nil means that it does dial

	// Push answers clients that publish images, at the socket alone, below PushPath. nil means that there is nobody who does.
	Push     http.Handler
	PushPath string

	// Page makes what answers for everything that isn't the API: the page for operators. nil means that there is none.
	Page func(*Server) http.Handler

	Now func() time.Time // nil means time.Now
	Log *slog.Logger     // nil means slog.Default
}

// DefaultStall is the default of Options.Stall.
const DefaultStall = 5 * time.Minute

// A Change is a key of the configuration that has another value since.
type Change struct {
	Key     string `json:"key"`
	Before  string `json:"before"`
	After   string `json:"after"`
	Restart bool   `json:"restart"` // it takes effect with the next start only
}

// A Server answers operators. Who may open its socket may do everything; at its other addresses [access.Guard] decides. It is safe for concurrent use.
type Server struct {
	o      Options
	router http.Handler
	// ctx ends what goes on for as long as somebody listens.
	ctx    context.Context
	cancel context.CancelFunc

	socket  *http.Server
	serving sync.WaitGroup
}

// New returns a Server. Close ends it.
func New(o Options) *Server {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Stall == 0 {
		o.Stall = DefaultStall
	}
	s := &Server{o: o}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.router = s.routes()
	return s
}

// Listen answers on a unix socket at path, which nobody but the server's own user can open. It replaces a socket that a killed server left.
func (s *Server) Listen(path string) error {
	listener, err := listen.Unix(s.ctx, path, 0o600)
	if err != nil {
		return err
	}
	all := http.NewServeMux()
	// Profiles show addresses, file names and what is in memory: they are for the user that the server runs as, and for no other address.
	all.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	all.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	all.HandleFunc("GET /debug/pprof/", pprof.Index)
	if s.o.Push != nil {
		all.Handle(s.o.PushPath, s.o.Push)
	}
	all.Handle("/", s.router)
	s.socket = &http.Server{Handler: asCaller(caller{socket: true}, all), ReadHeaderTimeout: 5 * time.Second}
	// Ends when Close closes the server, which waits for it.
	s.serving.Go(func() {
		if err := s.socket.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			s.o.Log.Error("the admin socket doesn't answer any more", "socket", path, "err", err)
		}
	})
	return nil
}

// EndLive ends what goes on for as long as somebody listens, which [http.Server.Shutdown] would wait for.
func (s *Server) EndLive() { s.cancel() }

// Close ends the server and removes the socket.
func (s *Server) Close() error {
	s.cancel()
	var err error
	if s.socket != nil {
		err = s.socket.Close()
	}
	s.serving.Wait()
	return err
}

// Front returns what answers at an address. methods are how clients may show there who they are.
func (s *Server) Front(methods access.Method) http.Handler {
	// What a page of another site has a browser send is refused, whatever the browser adds to it.
	return http.NewCrossOriginProtection().Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("X-Frame-Options", "DENY")
		header.Set("Cache-Control", "no-store")
		if r.URL.Path == "/healthz" || r.URL.Path == "/readyz" {
			// Those who put such questions can't do more.
			s.router.ServeHTTP(w, r)
			return
		}
		if err := misdirected(r); err != nil {
			s.fail(w, r, err)
			return
		}
		who, err := s.identify(r, methods)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		asCaller(caller{Identity: who}, s.router).ServeHTTP(w, r)
	}))
}

// misdirected returns an error if a request came to this machine's own address under a foreign name: that is how a page of somebody else reaches what only
// this machine should (DNS rebinding).
func misdirected(r *http.Request) error {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return nil
	}
	if at, err := netip.ParseAddrPort(local.String()); err != nil || !at.Addr().IsLoopback() {
		return nil
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if _, err := netip.ParseAddr(host); err == nil || host == "localhost" || strings.HasSuffix(host, ".localhost") || host == "" {
		return nil
	}
	return problem.WithStatus(http.StatusMisdirectedRequest, &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "foreign-name", Detail: fmt.Sprintf("this address of the machine itself was asked under the name %.100q: use localhost, or its IP address", host),
	})
}

// identify returns who asks. Who shows something that isn't valid, or nothing where everybody has to, gets an error.
func (s *Server) identify(r *http.Request, methods access.Method) (access.Identity, error) {
	if methods == 0 {
		methods = access.AllMethods
	}
	shown := access.Credentials{Authorization: r.Header.Get("Authorization")}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		shown.Certificates = r.TLS.VerifiedChains[0]
	}
	if s.o.Guard == nil {
		return access.Identity{}, nil
	}
	who, err := s.o.Guard.Identify(r.Context(), shown, methods)
	switch {
	case err != nil:
		return who, problem.WithStatus(http.StatusUnauthorized, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "credentials-invalid", Detail: "who asks here is not known", Err: err})
	case who.Name == "" && methods&access.Anonymous == 0:
		return who, problem.WithStatus(http.StatusUnauthorized, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "credentials-needed", Detail: "who asks here has to show who it is"})
	}
	return who, nil
}

// asCaller has a request be somebody's.
func asCaller(who caller, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, who)))
	})
}

// challenge asks a client to show who it is (RFC 9110, section 11.6.1), if that is what an error is about.
func challenge(header http.Header, err error) {
	if problem.StatusOf(err) == http.StatusUnauthorized {
		header["Www-Authenticate"] = []string{`Basic realm="acproxy", charset="UTF-8"`, `Bearer realm="acproxy"`}
	}
}

// fail answers with an error where the API doesn't.
func (s *Server) fail(w http.ResponseWriter, _ *http.Request, err error) {
	challenge(w.Header(), err)
	p := s.problemOf(err)
	w.Header().Set("Content-Type", problem.ContentType)
	w.WriteHeader(p.Status)
	// A client that has left can't be told anything.
	_, _ = w.Write(p.JSON())
}

// problemOf returns what is said of an error. What is wrong inside is said here, unlike to nodes: operators ask. It is in the log, too.
func (s *Server) problemOf(err error) problem.Problem {
	p := problem.Of(err)
	if p.Status == http.StatusInternalServerError {
		s.o.Log.Error("a request of an operator failed", "err", err)
	}
	return p
}

func (s *Server) routes() http.Handler {
	router := mux.NewRouter()
	router.Path("/healthz").Methods(http.MethodGet, http.MethodHead).HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	router.Path("/readyz").Methods(http.MethodGet, http.MethodHead).HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := s.o.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	router.Path("/metrics").Methods(http.MethodGet).HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := s.ViewOf(r.Context()).look("see the metrics"); err != nil {
			s.fail(w, r, err)
			return
		}
		s.o.Metrics.ServeHTTP(w, r)
	})
	s.describe(router)
	if s.o.Page != nil {
		router.PathPrefix("/").Handler(s.o.Page(s))
	}
	router.NotFoundHandler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-path", Detail: fmt.Sprintf("there is nothing at %.200q: the API is under %s, and described at %sopenapi.yaml", r.URL.Path, api, api)})
	})
	router.MethodNotAllowedHandler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, problem.WithStatus(http.StatusMethodNotAllowed, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "method-not-allowed", Detail: r.Method + " is not possible here"}))
	})
	return router
}
