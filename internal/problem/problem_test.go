package problem

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/acproxy/acproxy"
)

func TestThereAndBack(t *testing.T) {
	for _, kind := range []error{acproxy.ErrInvalid, acproxy.ErrNotFound, acproxy.ErrRefused, acproxy.ErrPublisher, acproxy.ErrTimeout, acproxy.ErrNoSpace, acproxy.ErrBusy} {
		was := fmt.Errorf("while trying: %w", &acproxy.Error{Kind: kind, Code: "some-code", Detail: "some detail", Trace: acproxy.Trace{{What: "image", URL: "https://example.com/"}}})
		p := Of(was)
		err := p.Err()
		if !errors.Is(err, kind) || acproxy.Code(err) != "some-code" || err.Error() != was.Error() {
			t.Errorf("%v came back as %v (%v, %s)", was, err, acproxy.KindOf(err), acproxy.Code(err))
		}
		var e *acproxy.Error
		if !errors.As(err, &e) || len(e.Trace) != 1 {
			t.Errorf("%v came back without its trace", was)
		}
	}
	if err := Of(errors.New("plain")).Err(); acproxy.KindOf(err) != nil || acproxy.Code(err) != "" || err.Error() != "plain" {
		t.Errorf("an error without kind came back as %#v", err)
	}
	if got := Of(WithStatus(http.StatusTeapot, acproxy.Invalid("no coffee"))); got.Status != http.StatusTeapot || got.Type != Type+"invalid" {
		t.Errorf("Of = %+v", got)
	}
}

func TestText(t *testing.T) {
	p := Of(&acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-image", Detail: "nobody has it", Trace: acproxy.Trace{{What: "image", URL: "https://example.com/a", Status: 404}}})
	for _, want := range []string{"404 Not Found: not found", "nobody has it", "1. image https://example.com/a → 404"} {
		if text := p.Text(); !strings.Contains(text, want) {
			t.Errorf("Text = %q, want %q in it", text, want)
		}
	}
	if body := string(p.JSON()); !strings.Contains(body, `"type": "urn:acproxy:problem:no-image"`) || !strings.HasSuffix(body, "}\n") {
		t.Errorf("JSON = %s", body)
	}
}
