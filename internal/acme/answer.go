package acme

import (
	"context"
	"crypto/tls"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"
)

// Protocol is what a validator of tls-alpn-01 offers, alone, in its greeting (RFC 8737, section 4).
const Protocol = acmez.ACMETLS1Protocol

// ChallengePath is where a validator of http-01 looks for answers (RFC 8555, section 8.3).
const ChallengePath = "/.well-known/acme-challenge/"

// answers are what validators are told, as long as they are waited for.
type answers struct {
	mu    sync.Mutex
	certs map[string]*tls.Certificate // by host
	texts map[string]string           // by path
}

// TLSConfig returns what answers a validator of tls-alpn-01, nil to anybody else. It fits [tls.Config.GetConfigForClient]. A connection made by it is good for
// nothing more: [Client.Server] sees to that. Without a challenge that is waited for the handshake fails.
func (c *Client) TLSConfig(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if !slices.Equal(hello.SupportedProtos, []string{Protocol}) {
		return nil, nil
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{Protocol}, SessionTicketsDisabled: true,
		// No certificate gives a failed handshake, which is an answer, too.
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c.answers.mu.Lock()
			defer c.answers.mu.Unlock()
			return c.answers.certs[strings.ToLower(hello.ServerName)], nil
		},
	}, nil
}

// Server has a server for TLS answer validators, beside what it does. They show no certificate, whatever other clients have to, so their connections end
// with the handshake, and no request on them is read.
func (c *Client) Server(hs *http.Server) {
	hs.TLSConfig.GetConfigForClient = c.TLSConfig
	// A server with a protocol of its own has HTTP/2 only if that is said.
	hs.Protocols = new(http.Protocols)
	hs.Protocols.SetHTTP1(true)
	hs.Protocols.SetHTTP2(true)
	hs.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
		Protocol: func(_ *http.Server, conn *tls.Conn, _ http.Handler) { _ = conn.Close() },
	}
}

// Answer returns what a validator of http-01 is told at a path. ok is false if none is waited for there.
func (c *Client) Answer(path string) (text string, ok bool) {
	if !strings.HasPrefix(path, ChallengePath) {
		return "", false
	}
	c.answers.mu.Lock()
	defer c.answers.mu.Unlock()
	text, ok = c.answers.texts[path]
	return text, ok
}

// A tlsSolver lets validators be answered by a certificate.
type tlsSolver struct{ *answers }

var _ acmez.Solver = tlsSolver{}

// Present has a challenge answered.
func (s tlsSolver) Present(_ context.Context, challenge acme.Challenge) error {
	cert, err := acmez.TLSALPN01ChallengeCert(challenge)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.certs == nil {
		s.certs = make(map[string]*tls.Certificate)
	}
	s.certs[challenge.Identifier.Value] = cert
	return nil
}

// CleanUp ends that.
func (s tlsSolver) CleanUp(_ context.Context, challenge acme.Challenge) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.certs, challenge.Identifier.Value)
	return nil
}

// An httpSolver lets validators be answered in clear.
type httpSolver struct{ *answers }

var _ acmez.Solver = httpSolver{}

// Present has a challenge answered.
func (s httpSolver) Present(_ context.Context, challenge acme.Challenge) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.texts == nil {
		s.texts = make(map[string]string)
	}
	s.texts[challenge.HTTP01ResourcePath()] = challenge.KeyAuthorization
	return nil
}

// CleanUp ends that.
func (s httpSolver) CleanUp(_ context.Context, challenge acme.Challenge) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.texts, challenge.HTTP01ResourcePath())
	return nil
}
