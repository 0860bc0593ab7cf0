package admin

import (
	"context"
	"errors"
	"fmt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
)

// Discovered is what discovery says of a ref.
type Discovered struct {
	Ref       acproxy.Ref   `json:"ref"`
	Endpoints []Endpoint    `json:"endpoints"`
	Keys      []string      `json:"keys"`            // URLs of keys
	Trace     acproxy.Trace `json:"trace"`           // what was tried, in order
	Error     string        `json:"error,omitempty"` // why there is nothing to be had
}

// An Endpoint is a publisher's template, and what it makes of a ref.
type Endpoint struct {
	Template  discovery.Template `json:"template"`
	Image     string             `json:"image,omitempty"`     // URL
	Signature string             `json:"signature,omitempty"` // URL
	Error     string             `json:"error,omitempty"`     // why the template can't be used for this ref
}

// Discover walks for templates and for keys. What was found is returned with an error, too.
func Discover(ctx context.Context, finder *discovery.Finder, ref acproxy.Ref) (Discovered, error) {
	out := Discovered{Ref: ref, Endpoints: []Endpoint{}, Keys: []string{}}
	found, err := finder.Templates(ctx, ref.Name())
	out.Trace = append(out.Trace, traceOf(found.Trace, err)...)
	usable := 0
	for _, t := range found.Templates {
		e := Endpoint{Template: t}
		image, imageErr := t.Expand(ref, discovery.ExtImage)
		signature, signatureErr := t.Expand(ref, discovery.ExtSignature)
		if err := errors.Join(imageErr, signatureErr); err != nil {
			e.Error = firstOf(imageErr, signatureErr).Error()
		} else {
			e.Image, e.Signature = image, signature
			usable++
		}
		out.Endpoints = append(out.Endpoints, e)
	}
	if err == nil && usable == 0 {
		err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: fmt.Sprintf("none of the publisher's templates can be filled in with the labels of %v", ref)}
	}
	keys, keysErr := finder.Keys(ctx, ref.Name())
	out.Trace = append(out.Trace, traceOf(keys.Trace, keysErr)...)
	out.Keys = append(out.Keys, keys.Keys...)
	// A publisher without keys is no failure of discovery: they may have come another way.
	if err == nil && !errors.Is(keysErr, acproxy.ErrNotFound) {
		err = keysErr
	}
	if err != nil {
		out.Error = err.Error()
	}
	return out, withoutTrace(err)
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func traceOf(trace acproxy.Trace, err error) acproxy.Trace {
	var e *acproxy.Error
	if len(trace) == 0 && errors.As(err, &e) {
		return e.Trace
	}
	return trace
}

// withoutTrace drops the trace from an error that is printed below it anyway.
func withoutTrace(err error) error {
	var e *acproxy.Error
	if !errors.As(err, &e) {
		return err
	}
	plain := *e
	plain.Trace = nil
	return &plain
}
