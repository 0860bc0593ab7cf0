// Package credentials knows what publishers want to see before they give something away, and shows it to nobody else.
package credentials

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/acproxy/acproxy"
)

// Types of a [Credential]. The values are those of the configuration.
const (
	Basic  = "basic"  // user and password (RFC 7617)
	Bearer = "bearer" // a token (RFC 6750); rkt calls it oauth
	AWS    = "aws"    // a signature of each request (AWS Signature Version 4)
)

// What requests to AWS are signed for when nobody says.
const (
	DefaultService = "s3"
	DefaultRegion  = "us-east-1"
)

// A Secret is a password, a token or a secret key. It doesn't print.
type Secret string

// String returns an ellipsis.
func (Secret) String() string { return "…" }

// GoString returns an ellipsis.
func (Secret) GoString() string { return `"…"` }

// A Credential is what one host wants to see.
type Credential struct {
	// Host is the host, with its port unless that is 443, that it is for. It goes there over https, and nowhere else.
	Host string
	// Prefix is the prefix of the image names, by segments, that it is for; "" is every name.
	Prefix string
	Type   string
	// User is the user of Basic, and the access key ID of AWS.
	User   string
	Secret func() (Secret, error)
	// Region and Service are where and what of AWS the host is. Region "" means what the host's name says, as that of S3 does, else DefaultRegion; Service ""
	// means DefaultService.
	Region, Service string
}

// A Set is credentials for any number of hosts. It is safe for concurrent use.
type Set struct {
	all []Credential // the longest prefix first
	rkt []*Dir       // those that say something about a host later go first
	now func() time.Time
}

// New returns a Set of credentials and of those in rkt's directories, of which later ones go before earlier ones. What is given by itself goes before these.
func New(all []Credential, rkt []*Dir) *Set {
	s := &Set{all: slices.Clone(all), rkt: slices.Clone(rkt), now: time.Now}
	slices.Reverse(s.rkt)
	slices.SortStableFunc(s.all, func(a, b Credential) int { return cmp.Compare(len(b.Prefix), len(a.Prefix)) })
	return s
}

// Authorize gives a request, on behalf of an image name, what its host wants to see, if anything is known of that, and returns what that was, for people.
func (s *Set) Authorize(name string, r *http.Request) (what string, err error) {
	if r.URL.Scheme != "https" {
		return "", nil
	}
	c, ok := s.find(name, strings.TrimSuffix(strings.ToLower(r.URL.Host), ":443"))
	if !ok {
		return "", nil
	}
	secret, err := c.Secret()
	if err != nil {
		return "", &acproxy.Error{Kind: acproxy.ErrRefused, Code: "no-credentials", Detail: "the credentials for " + c.Host + " can't be had, so it isn't asked", Err: err}
	}
	switch c.Type {
	case Basic:
		r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(c.User+":"+string(secret))))
	case Bearer:
		r.Header.Set("Authorization", "Bearer "+string(secret))
	case AWS:
		err = c.sign(r, secret, s.now())
	default:
		err = fmt.Errorf("there are no credentials of type %q", c.Type)
	}
	return "with " + c.Type + " credentials", err
}

// find returns the credential for a host on behalf of an image name.
func (s *Set) find(name, host string) (Credential, bool) {
	for _, c := range s.all {
		if c.Host == host && acproxy.HasPrefix(name, c.Prefix) {
			return c, true
		}
	}
	for _, dir := range s.rkt {
		if c, ok := dir.files.Get()[host]; ok {
			return c, true
		}
	}
	return Credential{}, false
}

// regionOf returns the region that a host of AWS names: bucket.s3.REGION.amazonaws.com, s3-REGION.amazonaws.com, s3.dualstack.REGION.amazonaws.com (Amazon S3 User
// Guide, "Methods for accessing a bucket").
func regionOf(host string) string {
	host, _, _ = strings.Cut(host, ":")
	labels := strings.Split(strings.TrimSuffix(strings.TrimSuffix(host, ".cn"), ".amazonaws.com"), ".")
	if !strings.Contains(host, ".amazonaws.com") {
		return DefaultRegion
	}
	last := labels[len(labels)-1]
	if region, ok := strings.CutPrefix(last, "s3-"); ok && region != "external-1" {
		return region
	}
	if last == "s3" || last == "s3-external-1" || len(labels) < 2 {
		return DefaultRegion
	}
	return last
}

// emptyPayload is the SHA-256 of what a request has for content.
const emptyPayload = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// sign signs a request for AWS. No more of it is signed than has to be: what is on the way may add to the rest.
func (c Credential) sign(r *http.Request, secret Secret, now time.Time) error {
	signed := r.Clone(context.WithoutCancel(r.Context()))
	signed.Header = http.Header{"X-Amz-Content-Sha256": {emptyPayload}}
	service := cmp.Or(c.Service, DefaultService)
	region := cmp.Or(c.Region, regionOf(c.Host))
	err := v4.NewSigner().SignHTTP(r.Context(), aws.Credentials{AccessKeyID: c.User, SecretAccessKey: string(secret)}, signed, emptyPayload, service, region, now.UTC(),
		func(o *v4.SignerOptions) {
			// S3 takes a path as it is; the others want it escaped once more.
			o.DisableURIPathEscaping = service == DefaultService
		})
	if err != nil {
		return err
	}
	for field, values := range signed.Header {
		r.Header[field] = values
	}
	return nil
}
