package fetch

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
)

// TestPublishersWordIsPassedOn: when it is worth asking again, by the publisher's own word, reaches who asked.
func TestPublishersWordIsPassedOn(t *testing.T) {
	for _, pattern := range []string{"example.com/app", "storage.*.asc", "storage.*.aci"} {
		for _, status := range []int{429, 503, 504} {
			s := newScene(t)
			s.publish(spec("1.0.0", 1000))
			s.pub.Misbehave(publisher.URL(pattern), publisher.Fault{Status: status, Header: http.Header{"Retry-After": {"77"}}})
			_, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0.0")})
			var e *acproxy.Error
			if !errors.As(err, &e) || !errors.Is(err, acproxy.ErrPublisher) || acproxy.Code(err) != "publisher-status" || e.RetryAfter != 77*time.Second {
				t.Errorf("%s answers %d: error = %+v, want to come back in 77s", pattern, status, err)
			}
		}
	}
}

// TestOutage: what says nothing about an image lets the one that is held stand in.
func TestOutage(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want bool
	}{
		{"the publisher is at fault", &acproxy.Error{Kind: acproxy.ErrPublisher}, true},
		{"it is too slow", &acproxy.Error{Kind: acproxy.ErrTimeout}, true},
		{"no turn to ask it came", &acproxy.Error{Kind: acproxy.ErrBusy, Code: web.CodeBusy}, true},
		{"the same, with a trace", traced(&acproxy.Error{Kind: acproxy.ErrBusy, Code: web.CodeBusy}, acproxy.Trace{{What: "image"}}), true},
		{"this side has no more descriptors", &acproxy.Error{Kind: acproxy.ErrBusy, Code: acproxy.CodeShortage}, true},
		{"this side shuts down", errClosed, false},
		{"it hasn't got it", &acproxy.Error{Kind: acproxy.ErrNotFound}, false},
		{"it is refused", &acproxy.Error{Kind: acproxy.ErrRefused}, false},
		{"the client left", context.Canceled, false},
		{"nothing", nil, false},
	} {
		if got := outage(tt.err); got != tt.want {
			t.Errorf("%s: outage = %v, want %v", tt.name, got, tt.want)
		}
	}
}
