package fetch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// An Estimate is what is known of an image before it is fetched.
type Estimate struct {
	Held   *cache.Record // the image, if it is held and may be served; nil else
	Size   int64         // bytes; -1 if the publisher doesn't say
	Source string        // the URL that it would be fetched from
}

// Estimate says what fetching an image would come to, without asking for a byte of it: whether it is held, else where it is, how large it is, and whether a key
// that is trusted for its name signed it. Errors are those that [Fetcher.Image] would give, as far as the publisher shows them so early.
func (f *Fetcher) Estimate(ctx context.Context, ref acproxy.Ref) (Estimate, error) {
	if err := f.allowed(ref.Name()); err != nil {
		return Estimate{}, err
	}
	policy := f.policy(ref.Name())
	_, rec, err := f.cfg.Store.Resolve(ctx, ref)
	switch {
	case err == nil && f.acceptable(rec) == nil:
		return Estimate{Held: &rec, Size: rec.Size, Source: rec.Source}, nil
	case err != nil && !errors.Is(err, acproxy.ErrNotFound):
		return Estimate{}, err
	case policy.Offline:
		return Estimate{}, absent(ref, policy)
	}
	var trace acproxy.Trace
	e, err := f.estimate(ctx, ref, policy, &trace)
	if err != nil {
		return Estimate{}, traced(err, trace)
	}
	return e, nil
}

// estimate asks the publisher's endpoints in order.
func (f *Fetcher) estimate(ctx context.Context, ref acproxy.Ref, policy Policy, trace *acproxy.Trace) (Estimate, error) {
	templates, kept, err := f.templates(ctx, ref.Name(), trace)
	defer kept()
	if err != nil {
		return Estimate{}, err
	}
	first := error(&acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: "the publisher of " + ref.Name() + " has no template that fits " + ref.String()})
	for i, template := range templates {
		e, err := f.estimateAt(ctx, ref, policy, template.Expand, trace)
		if err == nil || conclusive(err) || ctx.Err() != nil {
			return e, err
		}
		if i == 0 {
			first = err
		}
	}
	return Estimate{}, first
}

func (f *Fetcher) estimateAt(ctx context.Context, ref acproxy.Ref, policy Policy, expand func(acproxy.Ref, string) (string, error), trace *acproxy.Trace) (Estimate, error) {
	imageURL, err := expand(ref, "aci")
	signatureURL, asErr := expand(ref, "aci.asc")
	if err := errors.Join(err, asErr); err != nil {
		return Estimate{}, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: err.Error()}
	}
	status, size, attempts, err := f.cfg.Web.Head(ctx, ref.Name(), "image", imageURL)
	*trace = append(*trace, attempts...)
	switch {
	case err != nil:
		return Estimate{}, err
	case status == http.StatusNotFound || status == http.StatusGone:
		return Estimate{}, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-image-found", Detail: "the publisher has no image at " + imageURL}
	case status == http.StatusMethodNotAllowed || status == http.StatusNotImplemented:
		// It is nothing that a node would ask for, so that some publishers can't answer it.
		size = -1
	case status != http.StatusOK:
		return Estimate{}, &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-status", Detail: fmt.Sprintf("the publisher answered %d %s for the image at %s", status, http.StatusText(status), imageURL)}
	case size > f.cfg.MaxImageSize:
		return Estimate{}, tooLarge(imageURL, f.cfg.MaxImageSize)
	}
	signature, later, err := f.getSignature(ctx, ref.Name(), signatureURL, policy, trace)
	if err == nil && !later {
		_, err = f.judge(f.cfg.Keyring(), ref.Name(), signature, nil)
	}
	if err != nil {
		return Estimate{}, err
	}
	return Estimate{Size: size, Source: imageURL}, nil
}

// Bounds of a listing of versions.
const (
	maxListing      = 16 << 20 // bytes of a page
	maxListingPages = 100
)

// codeNoListing says that versions can't be listed.
const codeNoListing = "no-listing"

// Versions returns the versions of an image that its publisher lists, in its order, each once. Policy says where ([Policy.Listing]); without that, or offline, it
// is an error. The listing is one of those: the tags of an OCI repository, page by page (OCI distribution specification 1.1, "Content Discovery"), a JSON array
// of strings, or text with a version on each line.
func (f *Fetcher) Versions(ctx context.Context, name string) ([]string, error) {
	if err := acproxy.CheckName(name); err != nil {
		return nil, err
	}
	if err := f.allowed(name); err != nil {
		return nil, err
	}
	policy := f.policy(name)
	switch {
	case policy.Local:
		return nil, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: codeNoListing, Detail: "the images of " + name + " are published here, and so all held: nothing is to be fetched"}
	case policy.Offline:
		return nil, &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "the publisher of " + name + " can't be asked for its versions: this proxy is offline"}
	case policy.Listing == "":
		return nil, &acproxy.Error{
			Kind: acproxy.ErrInvalid, Code: codeNoListing,
			Detail: "nobody has said where the versions of " + name + " are listed: set listing for its prefix in publishers of the configuration, or name the versions",
		}
	}
	next := strings.ReplaceAll(policy.Listing, "{name}", name)
	var versions []string
	var trace acproxy.Trace
	for page := 0; next != ""; page++ {
		if page == maxListingPages {
			return nil, traced(&acproxy.Error{Kind: acproxy.ErrPublisher, Code: "listing-too-long", Detail: fmt.Sprintf("the listing of %s has more than %d pages", name, maxListingPages)}, trace)
		}
		found, following, err := f.listing(ctx, name, next, &trace)
		if err != nil {
			return nil, traced(err, trace)
		}
		versions, next = append(versions, found...), following
	}
	seen := make(map[string]bool)
	return slices.DeleteFunc(versions, func(v string) bool {
		again := seen[v]
		seen[v] = true
		return again
	}), nil
}

// listing reads a page of a listing, and returns the URL of the next one.
func (f *Fetcher) listing(ctx context.Context, name, at string, trace *acproxy.Trace) (versions []string, next string, err error) {
	resp, attempts, err := f.cfg.Web.Get(ctx, name, "listing", at, http.Header{"Accept": {"application/json, text/plain;q=0.9"}})
	*trace = append(*trace, attempts...)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, "", badStatus("listing", at, resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxListing+1))
	if err != nil {
		return nil, "", err
	}
	if len(body) > maxListing {
		return nil, "", &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "listing-too-long", Detail: fmt.Sprintf("the listing at %s is larger than %d bytes", at, maxListing)}
	}
	if versions, err = versionsIn(body, resp.Header.Get("Content-Type")); err != nil {
		return nil, "", &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "listing-unreadable", Detail: fmt.Sprintf("the listing at %s can't be read: %v", at, err)}
	}
	return versions, following(resp.Header.Values("Link"), at), nil
}

func versionsIn(body []byte, contentType string) ([]string, error) {
	trimmed := bytes.TrimSpace(body)
	media, _, _ := mime.ParseMediaType(contentType) // what isn't one is told by what is in the body
	switch {
	case len(trimmed) > 0 && trimmed[0] == '{':
		var repository struct {
			Tags []string `json:"tags"`
		}
		err := json.Unmarshal(trimmed, &repository)
		return repository.Tags, err
	case len(trimmed) > 0 && trimmed[0] == '[':
		var versions []string
		err := json.Unmarshal(trimmed, &versions)
		return versions, err
	case strings.Contains(media, "html"):
		return nil, errors.New("it is a page for people")
	}
	var versions []string
	for line := range strings.Lines(string(trimmed)) {
		if v := strings.TrimSpace(line); v != "" && v[0] != '#' {
			versions = append(versions, v)
		}
	}
	return versions, nil
}

// following returns the next page by the header Link (RFC 8288), as far as it is at the same origin, "" if there is none.
func following(links []string, at string) string {
	base, err := url.Parse(at)
	if err != nil {
		return ""
	}
	for _, link := range links {
		target, params, ok := strings.Cut(link, ">")
		target, begins := strings.CutPrefix(strings.TrimSpace(target), "<")
		if !ok || !begins || !strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
			continue
		}
		if next, err := base.Parse(target); err == nil && next.Scheme == base.Scheme && next.Host == base.Host {
			return next.String()
		}
	}
	return ""
}
