package acme

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"
)

// pollTimeout is how long the server may take to validate, and to issue.
const pollTimeout = 2 * time.Minute

// protocol returns what speaks ACME. It logs nothing: each attempt is told once, with what it ended in.
func (c *Client) protocol() *acme.Client {
	return &acme.Client{Directory: c.opts.Directory, HTTPClient: c.http, UserAgent: c.opts.UserAgent, PollTimeout: pollTimeout}
}

// obtain has a certificate issued and keeps it. Challenges are tried in their order, but the one that was met last goes first.
//
//	account ─▶ key of the certificate, written down ─▶ order ─▶ challenge ─▶ certificate, checked ─▶ written down
//
// What can't be written down is found out before the server is asked: orders are counted, and a certificate that is lost again costs another one.
func (c *Client) obtain(ctx context.Context, h *host, before *tls.Certificate) (*tls.Certificate, error) {
	client := c.protocol()
	registered, err := c.register(ctx, client)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if err := c.saveKey(h.name, key); err != nil {
		return nil, err
	}
	challenges := slices.Clone(c.opts.Challenges)
	slices.SortStableFunc(challenges, func(a, b string) int {
		switch h.last {
		case a:
			return -1
		case b:
			return 1
		}
		return 0
	})
	var failed error
	for _, challenge := range challenges {
		chain, err := c.order(ctx, client, registered, h.name, challenge, key, before)
		if err == nil {
			h.last = challenge
			return c.accept(h.name, key, chain)
		}
		another := failedValidation(err) && ctx.Err() == nil
		if failed == nil {
			failed = fmt.Errorf("%s: %w", challenge, err)
		} else {
			failed = fmt.Errorf("%w; %s: %w", failed, challenge, err)
		}
		if !another {
			break
		}
	}
	if !unknownAccount(failed) {
		return nil, failed
	}
	// A server of one's own may have been set up anew, and knows nobody any more.
	c.account.URL = ""
	if err := c.saveAccount(c.account); err != nil {
		return nil, fmt.Errorf("%w; %w", failed, err)
	}
	return nil, fmt.Errorf("the server has forgotten the account, and is asked for another one with the next attempt: %w", failed)
}

// order orders a certificate, meeting one kind of challenge, and returns its chain in PEM.
func (c *Client) order(ctx context.Context, client *acme.Client, registered acme.Account, host, challenge string, key crypto.Signer, before *tls.Certificate) ([]byte, error) {
	solvers := map[string]acmez.Solver{TLSALPN01: tlsSolver{&c.answers}, HTTP01: httpSolver{&c.answers}}
	flow := acmez.Client{Client: client, ChallengeSolvers: map[string]acmez.Solver{challenge: solvers[challenge]}}
	csr, err := acmez.NewCSR(key, []string{host})
	if err != nil {
		return nil, err
	}
	params, err := acmez.OrderParametersFromCSR(registered, csr)
	if err != nil {
		return nil, err
	}
	if before != nil {
		// Servers that don't know of this leave it unread; those that do let renewals pass their limits (RFC 9773, section 5).
		if dir, err := client.GetDirectory(ctx); err == nil && dir.RenewalInfo != "" {
			params.Replaces = before.Leaf
		}
	}
	chains, err := flow.ObtainCertificate(ctx, params)
	if params.Replaces != nil && refusedOrder(err) {
		// The certificate may be of another account, or the server may not know of it any more.
		params.Replaces = nil
		chains, err = flow.ObtainCertificate(ctx, params)
	}
	if err != nil {
		return nil, err
	}
	if len(chains) == 0 {
		return nil, errors.New("the server has issued nothing")
	}
	return chains[0].ChainPEM, nil
}

// accept checks a certificate that was issued, and keeps it. One that can't be kept is used all the same, until the server ends.
func (c *Client) accept(host string, key *ecdsa.PrivateKey, chain []byte) (*tls.Certificate, error) {
	text, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	text = append(append(text, bytes.TrimSpace(chain)...), '\n')
	cert, err := c.parse(host, text)
	if err != nil {
		return nil, fmt.Errorf("what the server has issued: %w", err)
	}
	if c.now().After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("what the server has issued ended on %s already: check this machine's clock", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := c.saveCertificate(host, text); err != nil {
		c.log.Error("a certificate that was issued can't be kept, and another one has to be ordered after a restart", "host", host, "err", err)
	}
	return cert, nil
}

// parse reads a key and the certificates above it, and checks that they are for a host. Whether their time has come is not looked at.
func (c *Client) parse(host string, text []byte) (*tls.Certificate, error) {
	cert, err := tls.X509KeyPair(text, text)
	if err != nil {
		return nil, err
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, err
		}
	}
	if err := cert.Leaf.VerifyHostname(host); err != nil {
		return nil, err
	}
	return &cert, nil
}

// failedValidation reports whether the server did not find what it was to be shown, which another kind of challenge may mend.
func failedValidation(err error) bool {
	var problem acme.Problem
	if errors.As(err, &problem) {
		_, validated := problem.Resource.(acme.Authorization)
		return validated
	}
	return false
}

// refusedOrder reports whether the server did not take an order, for another reason than that there were too many.
func refusedOrder(err error) bool {
	var problem acme.Problem
	return errors.As(err, &problem) && !failedValidation(err) && problem.Status < http.StatusInternalServerError && problem.Type != acme.ProblemTypeRateLimited && !unknownAccount(err)
}

func unknownAccount(err error) bool {
	var problem acme.Problem
	return errors.As(err, &problem) && problem.Type == acme.ProblemTypeAccountDoesNotExist
}

// register returns the account at the server, and makes one there if there is none. Its key is written down before the server knows of it: whoever asks for
// an account again with the same key is given the same one.
func (c *Client) register(ctx context.Context, client *acme.Client) (acme.Account, error) {
	if c.account == nil {
		kept, err := c.loadAccount()
		if err != nil {
			return acme.Account{}, err
		}
		c.account = kept
	}
	a := c.account
	out := acme.Account{
		Status: acme.StatusValid, Location: a.URL, Contact: c.contact(), TermsOfServiceAgreed: c.opts.Terms, PrivateKey: a.key,
	}
	switch {
	case a.URL == "":
		out.Status = ""
		if c.opts.EABKeyID != "" {
			if err := out.SetExternalAccountBinding(ctx, client, acme.EAB{KeyID: c.opts.EABKeyID, MACKey: c.opts.EABKey}); err != nil {
				return acme.Account{}, fmt.Errorf("binding the account: %w", err)
			}
		}
		made, err := client.NewAccount(ctx, out)
		if err != nil {
			return acme.Account{}, fmt.Errorf("making an account: %w", err)
		}
		out = made
	case !slices.Equal(a.Contact, out.Contact):
		// The answer leaves out where the account is, which hasn't changed.
		if _, err := client.UpdateAccount(ctx, out); err != nil {
			return acme.Account{}, fmt.Errorf("changing the account's e-mail address: %w", err)
		}
	default:
		return out, nil
	}
	out.PrivateKey = a.key
	a.URL, a.Contact = out.Location, c.contact()
	return out, c.saveAccount(a)
}

func (c *Client) contact() []string {
	if c.opts.Email == "" {
		return nil
	}
	return []string{"mailto:" + c.opts.Email}
}
