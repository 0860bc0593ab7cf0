package server

import (
	"crypto/x509"
	"fmt"
	"net/http"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/problem"
)

// A Front is how a listener lets clients in.
type Front struct {
	// Proxy makes it a front door for clients that have acproxy as their HTTP proxy, too: CONNECT and absolute-form requests.
	Proxy bool
	// Auth is how clients may show who they are; 0 means in every way, and not at all.
	Auth access.Method
}

func (f Front) auth() access.Method {
	if f.Auth == 0 {
		return access.AllMethods
	}
	return f.Auth
}

// admit refuses clients that don't show who they are where everybody has to. Questions for the server's health are answered for all, and so are validators of an
// ACME server: those who put them can't do more.
func (s *Server) admit(w *recorder, r *http.Request) error {
	if w.auth(r)&access.Anonymous != 0 || asksForHealth(r) || !toProxy(r) && s.validates(r) {
		return nil
	}
	who, wrong := s.identify(w, r)
	if who.Name == "" {
		return s.challenge(w, r, wrong, "who asks here has to show who it is")
	}
	return nil
}

// asksForHealth reports whether a request asks how the server is, and nothing else.
func asksForHealth(r *http.Request) bool {
	path := r.URL.EscapedPath()
	return !toProxy(r) && (r.Method == http.MethodGet || r.Method == http.MethodHead) && (path == Root+"healthz" || path == Root+"readyz")
}

// mayRead returns why a client may not have the images of a name, or know of them, nil if it may. Whatever is about a name asks this first, of every request.
func (s *Server) mayRead(w http.ResponseWriter, r *http.Request, name string) error {
	if s.reads(w, r, name) {
		// Another reading of the same URL may have been refused before.
		for _, field := range challengeFields {
			delete(w.Header(), field)
		}
		return nil
	}
	who, wrong := s.identify(w, r)
	if who.Name == "" {
		return s.challenge(w, r, wrong, name+" is not for everybody")
	}
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "not-allowed", Detail: fmt.Sprintf("%s may not have the images of %s: no rule of access.rules says so", who.Name, name),
	}
}

// reads reports whether a client may have the images of a name, and know of them.
func (s *Server) reads(w http.ResponseWriter, r *http.Request, name string) bool {
	guard := s.cfg.Guard
	if guard == nil || guard.May(access.Identity{}, access.Read, name) {
		return true
	}
	who, _ := s.identify(w, r)
	if !guard.May(who, access.Read, name) {
		return false
	}
	if rec, ok := w.(*recorder); ok {
		// What one client gets, no cache on its way may give to another one (RFC 9111, section 5.2.2.7).
		rec.private = true
	}
	return true
}

// identify returns who a client is, and what is wrong with what it shows, if something is.
func (s *Server) identify(w http.ResponseWriter, r *http.Request) (access.Identity, error) {
	rec, ok := w.(*recorder)
	switch {
	case s.cfg.Guard == nil || !ok:
		return access.Identity{}, nil
	case rec.identified:
		return rec.who, rec.wrong
	}
	if c, ok := r.Context().Value(connectedTo{}).(connected); ok {
		// Within a connection that CONNECT has made, whoever asked for that asks, as long as what it has shown holds.
		rec.who, rec.wrong = s.cfg.Guard.Identify(r.Context(), c.shown, c.auth)
	}
	if rec.who.Name == "" {
		who, wrong := s.cfg.Guard.Identify(r.Context(), credentialsOf(r), rec.auth(r))
		if rec.who = who; wrong != nil {
			rec.wrong = wrong
		}
	}
	rec.identified = true
	return rec.who, rec.wrong
}

// credentialsOf returns what a client shows to us: to a proxy, Authorization is for the host that is asked for.
func credentialsOf(r *http.Request) access.Credentials {
	field := "Authorization"
	if toProxy(r) {
		field = "Proxy-Authorization"
	}
	return access.Credentials{Authorization: r.Header.Get(field), Certificates: certificates(r)}
}

// auth returns how a client may show who it is: as at the address that it came by.
func (w *recorder) auth(r *http.Request) access.Method {
	if c, ok := r.Context().Value(connectedTo{}).(connected); ok {
		return c.auth
	}
	return w.front.auth()
}

// challengeFields ask a client to show who it is.
var challengeFields = []string{"Www-Authenticate", "Proxy-Authenticate"}

// certificates returns the certificates of a client that TLS has verified, its own first.
func certificates(r *http.Request) []*x509.Certificate {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil
	}
	return r.TLS.VerifiedChains[0]
}

// toProxy reports whether a request is one to a proxy.
func toProxy(r *http.Request) bool { return r.Method == http.MethodConnect || r.URL.IsAbs() }

// challenge asks a client to show who it is (RFC 9110, section 11.6), and returns the error that goes with that.
func (s *Server) challenge(w http.ResponseWriter, r *http.Request, wrong error, why string) error {
	status, field := http.StatusUnauthorized, challengeFields[0]
	if toProxy(r) {
		status, field = http.StatusProxyAuthRequired, challengeFields[1]
	}
	auth := access.AllMethods
	if rec, ok := w.(*recorder); ok {
		auth = rec.auth(r)
	}
	delete(w.Header(), field)
	if auth&access.Basic != 0 {
		w.Header().Add(field, `Basic realm="acproxy", charset="UTF-8"`)
	}
	if auth&access.Bearer != 0 && (auth&access.Basic == 0 || !s.isOCI(r, nil)) {
		// Clients of the OCI distribution API prefer it, and take the realm for the URL of a server that gives tokens. A token that they have they show as a
		// password.
		w.Header().Add(field, `Bearer realm="acproxy"`)
	}
	if wrong != nil {
		return problem.WithStatus(status, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "credentials-invalid", Detail: why, Err: wrong})
	}
	return problem.WithStatus(status, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "credentials-needed", Detail: why})
}
