package fetch

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// imageRequests returns what the publisher was asked for of images, in order.
func (s *scene) imageRequests() []publisher.Request {
	var out []publisher.Request
	for _, r := range s.pub.Requests() {
		if r.Method == http.MethodGet && publisherImage(r) {
			out = append(out, r)
		}
	}
	return out
}

// TestAnInterruptedImageGoesOn breaks the receiving of an image off in every way: its followers get all of it, and what they got is not fetched twice.
func TestAnInterruptedImageGoesOn(t *testing.T) {
	at := publisher.At
	for _, test := range []struct {
		name    string
		fault   publisher.Fault
		rest    bool // only the rest is asked for
		compare bool // all of it is asked for, and compared
	}{
		{name: "cut in the middle", fault: publisher.Fault{TruncateAfter: at(badSize / 2)}, rest: true},
		{name: "cut before the first byte", fault: publisher.Fault{TruncateAfter: at(0)}},
		{name: "cut before the last byte", fault: publisher.Fault{TruncateAfter: at(badBytes - 1)}, rest: true},
		{name: "reset", fault: publisher.Fault{ResetAfter: at(badSize / 2)}},
		{name: "stalled", fault: publisher.Fault{StallAfter: at(badSize / 2)}, rest: true},
		{name: "chunks that end short", fault: publisher.Fault{TruncateAfter: at(badSize / 2), NoContentLength: true}, rest: true},
		{name: "ranges are ignored", fault: publisher.Fault{TruncateAfter: at(badSize / 2), IgnoreRange: true}, compare: true},
		{name: "no validators", fault: publisher.Fault{TruncateAfter: at(badSize / 2), Header: http.Header{"Etag": nil, "Last-Modified": nil}}, compare: true},
		{name: "a weak validator", fault: publisher.Fault{TruncateAfter: at(badSize / 2), Header: http.Header{"Etag": {`W/"1"`}}}, compare: true},
		{name: "only a date", fault: publisher.Fault{TruncateAfter: at(badSize / 2), Header: http.Header{"Etag": nil}}, rest: true},
		{name: "a wrong Content-Range", fault: publisher.Fault{TruncateAfter: at(badSize / 2), WrongContentRange: true}, compare: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			s.close()
			s.stall = 200 * time.Millisecond
			s.open()
			blob := s.publish(spec("1.0", badSize))
			once := test.fault
			once.Times = 1
			trouble := s.pub.Misbehave(publisher.URL("*.aci"), once)
			// What is wrong besides the interruption stays wrong.
			always := test.fault
			always.TruncateAfter, always.ResetAfter, always.StallAfter = nil, nil, nil
			s.pub.Misbehave(publisher.URL("*.aci"), always)
			s.want(s.app("1.0"), blob, Miss)
			if trouble.Applied() != 1 {
				t.Error("it was not interrupted")
			}
			s.idle()
			s.want(s.app("1.0"), blob, Hit)
			requests := s.imageRequests()
			last := requests[len(requests)-1]
			if test.rest {
				if n := len(requests); n != 2 {
					t.Fatalf("the image was asked for %d times, want 2: %v", n, requests)
				}
				if got, want := last.Header.Get("Range"), fmt.Sprintf("bytes=%d-", requests[0].Bytes); got != want || last.Header.Get("If-Range") == "" || last.Status != http.StatusPartialContent {
					t.Errorf("the rest was asked for with Range %q, If-Range %q, want %q; and answered with %d", got, last.Header.Get("If-Range"), want, last.Status)
				}
				if sum := requests[0].Bytes + last.Bytes; sum != int64(len(blob)) {
					t.Errorf("the publisher sent %d bytes of %d", sum, len(blob))
				}
			}
			if test.compare && last.Status != http.StatusOK {
				t.Errorf("the last answer was %d, want all of the image: %v", last.Status, requests)
			}
			if _, signatures := s.requests(); signatures != 1 {
				t.Errorf("the signature was asked for %d times", signatures)
			}
		})
	}
}

// TestTheRestInPieces has the publisher send less of the rest than was asked for, which it may.
func TestTheRestInPieces(t *testing.T) {
	for _, unknown := range []bool{false, true} {
		t.Run(fmt.Sprintf("of unknown length %v", unknown), func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{NoContentLength: unknown, RangeLength: badSize / 8})
			s.want(s.app("1.0"), blob, Miss)
			requests := s.imageRequests()
			if n := len(requests); n < 4 {
				t.Errorf("the image was asked for %d times: %v", n, requests)
			}
			var sent int64
			for _, r := range requests {
				sent += r.Bytes
			}
			if sent != int64(len(blob)) {
				t.Errorf("the publisher sent %d bytes of %d", sent, len(blob))
			}
		})
	}
}

// TestSeveralPartsAreNotTheRest has the publisher answer with multipart/byteranges, and say that it is the range that was asked for.
func TestSeveralPartsAreNotTheRest(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
	lie := fmt.Sprintf("bytes %d-%d/%d", badSize/2, len(blob)-1, len(blob))
	s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{MultipartRange: true, NoContentLength: true, Header: http.Header{"Content-Range": {lie}}, Skip: 1, Times: 1})
	s.want(s.app("1.0"), blob, Miss)
	requests := s.imageRequests()
	if last := requests[len(requests)-1]; last.Status != http.StatusOK || last.Header.Get("Range") != "" {
		t.Errorf("the last answer was %v, want all of the image", last)
	}
}

// TestCutAtEveryByte cuts a small image at each of its bytes, and again at the next one.
func TestCutAtEveryByte(t *testing.T) {
	s := newScene(t)
	for at := 0; ; at++ {
		version := fmt.Sprintf("1.%d", at)
		blob := s.publish(acitest.Spec{Name: "example.com/app", Labels: labels(version)})
		if at >= len(blob) {
			break
		}
		s.pub.Behave()
		s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(int64(at)), Times: 1})
		s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{ResetAfter: publisher.At(1), Skip: 1, Times: 1})
		s.want(s.app(version), blob, Miss)
	}
}

// TestResetAtEveryByte resets the connection of a small image at each of its bytes: what was on its way may be lost then.
func TestResetAtEveryByte(t *testing.T) {
	step := int64(3)
	switch {
	case os.Getenv("ACPROXY_CHAOS") != "":
		step = 1
	case testtools.Brief():
		step = 13
	}
	s := newScene(t)
	for at := int64(0); ; at += step {
		version := fmt.Sprintf("1.%d", at)
		blob := s.publish(acitest.Spec{Name: "example.com/app", Labels: labels(version)})
		if at > int64(len(blob)) {
			break
		}
		s.pub.Behave()
		s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{ResetAfter: &at, Times: 1})
		s.want(s.app(version), blob, Miss)
	}
}

// TestCutOnTheWire ends a connection after so many bytes of whatever it carries: handshake, frames, signature or image. Where nothing of the image had come
// the answer is an error; the next one is right, and nothing is held that isn't.
func TestCutOnTheWire(t *testing.T) {
	step := int64(97)
	if os.Getenv("ACPROXY_CHAOS") != "" {
		step = 1
	}
	s := newScene(t)
	whole := 0
	for at := int64(0); at < 6000; at += step {
		version := fmt.Sprintf("1.%d", at)
		blob := s.publish(acitest.Spec{Name: "example.com/app", Labels: labels(version)})
		fault := publisher.ConnFault{CutAfter: &at, Times: 1}
		if at%2 == 1 {
			fault = publisher.ConnFault{ResetAfter: &at, Times: 1}
		}
		// The connection that there is knows nothing of faults.
		s.client.Close()
		s.pub.Behave()
		s.pub.MisbehaveTLS("storage.example.com", fault)
		got, _, err := s.get(s.app(version))
		switch {
		case err == nil && bytes.Equal(got, blob):
			whole++
		case err == nil:
			t.Errorf("cut after %d bytes: %d other bytes", at, len(got))
		case !errors.Is(err, acproxy.ErrPublisher):
			t.Errorf("cut after %d bytes: %v, want the publisher's fault", at, err)
		}
		s.idle()
		if got, _, err := s.get(s.app(version)); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("after a cut after %d bytes: %d bytes, %v", at, len(got), err)
		}
	}
	if whole == 0 {
		t.Error("no image came in spite of a cut, not even of one after its end")
	}
}

func TestWhatDoesNotFitIsNotPutTogether(t *testing.T) {
	other := acitest.Must(t, acitest.Spec{Name: "example.com/app", Labels: labels("1.0"), RootfsSize: badSize, Compression: acitest.None, Seed: 1})
	half := publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1}
	sum := sha256.Sum256(other)
	for _, test := range []struct {
		name  string
		first http.Header
		then  publisher.Fault
		code  string
	}{
		{"other bytes of the same length come next", nil, publisher.Fault{Body: other, Skip: 1}, "changed-while-fetching"},
		{"fewer bytes come next", nil, publisher.Fault{Body: other[:badSize], Skip: 1}, "changed-while-fetching"},
		// The publisher makes the ETag that way.
		{
			"other bytes come with the old validators", http.Header{"Etag": {fmt.Sprintf(`"%x"`, sum[:16])}},
			publisher.Fault{Body: other, Header: http.Header{"Last-Modified": {"Thu, 30 Jun 2016 12:00:00 GMT"}}, Skip: 1}, "pieces-dont-fit",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			first := half
			first.Header = test.first
			s.pub.Misbehave(publisher.URL("*.aci"), first)
			s.pub.Misbehave(publisher.URL("*.aci"), test.then)
			got, _, err := s.get(s.app("1.0"))
			wantError(t, err, acproxy.ErrPublisher, test.code)
			if !bytes.HasPrefix(blob, got) && test.code != "pieces-dont-fit" {
				t.Error("bytes were delivered that don't belong to the image")
			}
			s.idle()
			s.wantNothingKept()
			if refusals, err := s.store.Refusals(); err != nil || len(refusals) > 1 || len(refusals) == 1 && refusals[0].Code != test.code {
				t.Errorf("Refusals = %+v, %v", refusals, err)
			}
			// Nobody holds it against the image.
			s.pub.Behave()
			s.want(s.app("1.0"), blob, Miss)
		})
	}
}

// mirror has two endpoints for example.com/app with the same image.
func (s *scene) mirror(blob []byte) {
	s.t.Helper()
	signature, err := goodKey().Sign(bytes.NewReader(blob), trusttest.SignOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	var templates []publisher.Tag
	for _, host := range []string{"one", "two"} {
		templates = append(templates, publisher.Tag{Prefix: "example.com/app", URL: "https://" + host + ".example.com/{name}.{ext}"})
		s.pub.Serve(host+".example.com/example.com/app.aci", "application/octet-stream", blob)
		s.pub.Serve(host+".example.com/example.com/app.aci.asc", "text/plain", signature)
	}
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: templates})
}

func TestAnotherEndpointGoesOn(t *testing.T) {
	for _, test := range []struct {
		name   string
		fault  publisher.Fault // of the second endpoint
		status int
	}{
		{"the same validators", publisher.Fault{}, http.StatusPartialContent},
		{"other validators", publisher.Fault{Header: http.Header{"Etag": {`"another"`}}, IgnoreRange: true}, http.StatusOK},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			s.mirror(blob)
			s.pub.Misbehave(publisher.URL("one.example.com/*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
			s.pub.Misbehave(publisher.URL("one.example.com/*.aci"), publisher.Fault{Status: http.StatusNotFound, Skip: 1})
			s.pub.Misbehave(publisher.URL("two.example.com/*.aci"), test.fault)
			s.want(s.app("1.0"), blob, Miss)
			requests := s.imageRequests()
			if len(requests) != 3 || requests[2].Host != "two.example.com" || requests[2].Status != test.status {
				t.Errorf("asked for %v, want the third answer from two.example.com with %d", requests, test.status)
			}
		})
	}
}

// TestABadMirrorCostsNothing has a mirror with other bytes, which is asked because the endpoint that broke off is busy for a moment.
func TestABadMirrorCostsNothing(t *testing.T) {
	one, two := publisher.URL("one.example.com/*.aci"), publisher.URL("two.example.com/*.aci")
	const busy = http.StatusServiceUnavailable
	for _, test := range []struct {
		name  string
		other func(blob []byte) []byte
		then  publisher.Fault // of the first endpoint, after it was busy
		asked string          // which endpoints, with which answers
		code  string          // "" is the image
		kept  bool            // what has arrived, where there is no image
	}{
		{name: "another byte", asked: "one 200, one 503, two 200, one 206"},
		{name: "one byte more", other: func(blob []byte) []byte { return append(blob, 0) }, asked: "one 200, one 503, two 200, one 206"},
		{name: "and the first endpoint knows no ranges", then: publisher.Fault{IgnoreRange: true}, asked: "one 200, one 503, two 200, one 200"},
		{name: "and the first endpoint stays busy", then: publisher.Fault{Status: busy}, asked: "one 200, one 503, two 200, one 503", code: "publisher-status", kept: true},
		{name: "and the first endpoint has changed", then: publisher.Fault{Body: make([]byte, badBytes)}, asked: "one 200, one 503, two 200, one 200", code: "changed-while-fetching"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, func(c *Config) { c.Retries = 3 })
			blob := s.publish(spec("1.0", badSize))
			s.mirror(blob)
			other := bytes.Clone(blob)
			other[badSize/4] ^= 1
			if test.other != nil {
				other = test.other(bytes.Clone(blob))
			}
			s.pub.Misbehave(one, publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
			s.pub.Misbehave(one, publisher.Fault{Status: busy, Skip: 1, Times: 1})
			test.then.Skip = 2
			s.pub.Misbehave(one, test.then)
			s.pub.Misbehave(two, publisher.Fault{Body: other})
			got, how, err := s.get(s.app("1.0"))
			if test.code == "" && (err != nil || how != Miss || !bytes.Equal(got, blob)) {
				t.Errorf("%d bytes, %v, %v", len(got), how, err)
			}
			if test.code != "" {
				wantError(t, err, acproxy.ErrPublisher, test.code)
			}
			var asked []string
			for _, r := range s.imageRequests() {
				asked = append(asked, fmt.Sprintf("%s %d", strings.TrimSuffix(r.Host, ".example.com"), r.Status))
			}
			if got := strings.Join(asked, ", "); got != test.asked {
				t.Errorf("asked were %s, want %s", got, test.asked)
			}
			s.idle()
			if arrivals, err := s.store.Arrivals(t.Context()); err != nil || (len(arrivals) == 1) != test.kept {
				t.Errorf("Arrivals = %v, %v, want what has arrived to be kept: %v", arrivals, err, test.kept)
			}
		})
	}
}

func TestRetriesHaveABudget(t *testing.T) {
	s := newScene(t, func(c *Config) { c.Retries = 3 })
	blob := s.publish(spec("1.0", badSize))
	down := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
	busy := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{Status: http.StatusServiceUnavailable, Skip: 1})
	_, _, err := s.get(s.app("1.0"))
	wantError(t, err, acproxy.ErrPublisher, "publisher-status")
	if down.Applied() != 1 || busy.Applied() != 3 {
		t.Errorf("the image was asked for %d times again, want 3", busy.Applied())
	}
	var e *acproxy.Error
	if !errors.As(err, &e) || len(e.Trace) != 3 {
		t.Errorf("the error has the trace %+v, want the three attempts", e)
	}
	s.idle()
	s.wantNothingHeld()
	s.clock.advance(time.Hour)
	// What has arrived isn't lost: the next one who asks goes on from there.
	s.pub.Behave()
	s.want(s.app("1.0"), blob, Miss)
	requests := s.imageRequests()
	if last := requests[len(requests)-1]; last.Status != http.StatusPartialContent || last.Bytes >= int64(len(blob)) {
		t.Errorf("the last answer was %d with %d bytes", last.Status, last.Bytes)
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	for _, test := range []struct {
		name  string
		after string
		again bool
	}{{"it asks for a second", "1", true}, {"it asks for more than there is patience", "3600", false}} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, func(c *Config) { c.RetryFor = 10 * time.Second })
			blob := s.publish(spec("1.0", badSize))
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Times: 1})
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{
				Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {test.after}}, Skip: 1, Times: 1,
			})
			got, _, err := s.get(s.app("1.0"))
			if !test.again {
				wantError(t, err, acproxy.ErrPublisher, "publisher-status")
				return
			}
			if err != nil || !bytes.Equal(got, blob) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			requests := s.imageRequests()
			if waited := requests[2].Time.Sub(requests[1].Time); waited < time.Second {
				t.Errorf("it was asked again after %v", waited)
			}
		})
	}
}

// TestARestartGoesOn closes everything while an image arrives, and opens it again.
func TestARestartGoesOn(t *testing.T) {
	partial := func(s *scene) string {
		s.t.Helper()
		files, err := filepath.Glob(filepath.Join(s.dir, "partial", "*.aci"))
		if err != nil || len(files) != 1 {
			s.t.Fatalf("partial files: %v, %v", files, err)
		}
		return files[0]
	}
	const half = badSize / 2
	for _, test := range []struct {
		name   string
		spoil  func(s *scene)
		fault  publisher.Fault // after the restart
		code   string          // of the first answer after it; "" is the image
		status int             // of the publisher's last answer
		from   int64           // the first byte of the last answer
	}{
		{name: "as it was left", status: http.StatusPartialContent, from: half},
		{name: "the publisher ignores ranges", fault: publisher.Fault{IgnoreRange: true}, status: http.StatusOK},
		{name: "the publisher's ranges are wrong", fault: publisher.Fault{WrongContentRange: true}, status: http.StatusOK},
		{name: "the publisher has other validators", fault: publisher.Fault{Header: http.Header{"Etag": {`"new"`}}, IgnoreRange: true}, status: http.StatusOK},
		{name: "the file has lost bytes", status: http.StatusPartialContent, from: half - 1000, spoil: func(s *scene) {
			if err := os.Truncate(partial(s), half-1000); err != nil {
				s.t.Fatal(err)
			}
		}},
		{name: "the file has other bytes", code: "pieces-dont-fit", status: http.StatusPartialContent, from: half, spoil: func(s *scene) {
			f, err := os.OpenFile(partial(s), os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte{255, 254}, half-1000)
			}
			if err = errors.Join(err, f.Close()); err != nil {
				s.t.Fatal(err)
			}
		}},
		{name: "the file has all bytes", status: http.StatusOK, from: 0, spoil: func(s *scene) {
			if err := os.WriteFile(partial(s), acitest.Must(s.t, spec("1.0", badSize)), 0o600); err != nil {
				s.t.Fatal(err)
			}
		}},
		{name: "the file has all bytes, the last ones others", code: "pieces-dont-fit", status: http.StatusOK, from: 0, spoil: func(s *scene) {
			blob := acitest.Must(s.t, spec("1.0", badSize))
			clear(blob[badSize-4096:])
			if err := os.WriteFile(partial(s), blob, 0o600); err != nil {
				s.t.Fatal(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(half), Times: 1})
			im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			s.wait("the stall", stall.Stalled())
			s.received(im.download, half)
			s.close()
			if _, err := deliver(t.Context(), im); !errors.Is(err, acproxy.ErrBusy) {
				t.Errorf("who followed got %v, want that this side shuts down", err)
			}
			stall.End()
			if test.spoil != nil {
				test.spoil(s)
			}
			s.pub.Misbehave(publisher.URL("*.aci"), test.fault)
			s.open()
			arrivals, err := s.store.Arrivals(t.Context())
			if err != nil || len(arrivals) != 1 || arrivals[0].Ref != s.app("1.0") || arrivals[0].Size != int64(len(blob)) {
				t.Errorf("Arrivals = %+v, %v", arrivals, err)
			}
			got, how, err := s.get(s.app("1.0"))
			if test.code == "" && (err != nil || how != Miss || !bytes.Equal(got, blob)) {
				t.Errorf("%d bytes, %v, %v", len(got), how, err)
			}
			if test.code != "" {
				wantError(t, err, acproxy.ErrPublisher, test.code)
			}
			requests := s.imageRequests()
			last := requests[len(requests)-1]
			if want := int64(len(blob)) - test.from; last.Status != test.status || last.Bytes != want && len(requests) > 1 {
				t.Errorf("the publisher's last answer was %d with %d bytes, want %d with %d: %v", last.Status, last.Bytes, test.status, want, requests)
			}
			s.idle()
			if test.code != "" {
				s.wantNothingKept()
				s.want(s.app("1.0"), blob, Miss)
			}
			s.want(s.app("1.0"), blob, Hit)
		})
	}
}

// TestDownloadsAreTakenUpAtTheStart: nobody has to ask for what was arriving when the last process ended.
func TestDownloadsAreTakenUpAtTheStart(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(badSize / 2), Times: 1})
	im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	s.wait("the stall", stall.Stalled())
	s.received(im.download, badSize/2)
	s.restart()
	stall.End()
	if err := s.f.ResumeDownloads(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.await("the image", func(d Decision) bool { return d.Event == EventAccepted && d.Ref == s.app("1.0") })
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	if requests := s.imageRequests(); len(requests) != 2 || requests[1].Status != http.StatusPartialContent {
		t.Errorf("asked for %v", requests)
	}

	s.restart()
	s.noDial = true
	if err := s.f.ResumeDownloads(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.idle()
}

// TestWhatHasArrivedOfAHeldImageIsRemoved has a disk that didn't let a partial file be removed when its image was fetched after all: the next start does,
// and asks nobody.
func TestWhatHasArrivedOfAHeldImageIsRemoved(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(badSize / 2), Times: 1})
	im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	s.wait("the stall", stall.Stalled())
	s.received(im.download, badSize/2)
	s.close()
	stall.End()
	partial := filepath.Join(s.dir, "partial")
	if err := os.CopyFS(partial+".left", os.DirFS(partial)); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.close()
	if err := os.CopyFS(partial, os.DirFS(partial+".left")); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.noDial = true
	if arrivals, err := s.store.Arrivals(t.Context()); err != nil || len(arrivals) != 1 {
		t.Fatalf("Arrivals = %v, %v, want one", arrivals, err)
	}
	if err := s.f.ResumeDownloads(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	if left, err := os.ReadDir(partial); err != nil || len(left) != 0 {
		t.Errorf("left over are %v, %v", left, err)
	}
}

func TestContentRange(t *testing.T) {
	for _, test := range []struct {
		header             string
		first, last, total int64
		ok                 bool
	}{
		{"bytes 0-0/1", 0, 0, 1, true},
		{"bytes 10-19/20", 10, 19, 20, true},
		{"bytes 10-18/20", 10, 18, 20, true},
		{header: "bytes 10-20/20"},
		{header: "bytes 10-9/20"},
		{header: "bytes */20"},
		{header: "bytes 10-19/*"},
		{header: "bytes=10-19/20"},
		{header: "bytes 10-19"},
		{header: "bytes -1-19/20"},
		{header: "bytes +1-19/20"},
		{header: "bytes 1-19/99999999999999999999"},
		{header: "octets 1-2/3"},
		{header: ""},
	} {
		first, last, total, ok := parseContentRange(test.header)
		if ok != test.ok || ok && (first != test.first || last != test.last || total != test.total) {
			t.Errorf("parseContentRange(%q) = %d, %d, %d, %v", test.header, first, last, total, ok)
		}
	}
}

// TestWhichPartsAreTheRest holds answers with a part against what the first answer said.
func TestWhichPartsAreTheRest(t *testing.T) {
	const was, is = "Thu, 30 Jun 2016 12:00:00 GMT", "Thu, 30 Jun 2016 12:00:01 GMT"
	said := func(etag, modified string) map[string]string {
		return map[string]string{"ETag": etag, "Last-Modified": modified}
	}
	for _, test := range []struct {
		name        string
		first, part map[string]string
		rest        bool
	}{
		{"the same", said(`"a"`, was), said(`"a"`, was), true},
		{"another ETag", said(`"a"`, was), said(`"b"`, was), false},
		{"the ETag is missing", said(`"a"`, was), said("", was), false},
		{"there was no ETag", said("", was), said(`"a"`, was), false},
		{"neither has an ETag", said("", was), said("", was), true},
		{"of another time", said("", was), said("", is), false},
		{"of another time with the same ETag", said(`"a"`, was), said(`"a"`, is), false},
		{"the time is left out", said(`"a"`, was), said(`"a"`, ""), true},
		{"the time is left out, and is all that was said", said("", was), said("", ""), true},
	} {
		resp := &http.Response{ContentLength: 10, Header: http.Header{"Content-Range": {"bytes 10-19/20"}}}
		for field, value := range test.part {
			if value != "" {
				resp.Header.Set(field, value)
			}
		}
		if total, err := checkPart("https://example.com/app.aci", resp, 10, 20, test.first); (err == nil) != test.rest || err == nil && total != 20 {
			t.Errorf("%s: checkPart = %d, %v, want it to be the rest: %v", test.name, total, err, test.rest)
		}
	}
}

// TestAnUnsignedImageIsOfOneVersion has an image replaced by another one of the same length while it arrives, by a publisher that has no ETags and doesn't look
// at If-Range. There is no signature that would find it out.
func TestAnUnsignedImageIsOfOneVersion(t *testing.T) {
	noETag := http.Header{"Etag": nil}
	for _, test := range []struct {
		name    string
		retries int64
	}{{"while it arrives", 0}, {"between two that ask", -1}} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, policies(unsignedToo), func(c *Config) { c.Retries = test.retries })
			sp := spec("1.0", badSize)
			s.publishAs(sp.Name, sp.Labels, acitest.Must(t, sp), nil)
			sp.Seed = 1
			other := acitest.Must(t, sp)
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(badSize / 2), Header: noETag, Times: 1})
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{Body: other, Header: noETag, IgnoreIfRange: true, Skip: 1})
			if got, _, err := s.get(s.app("1.0")); err == nil {
				t.Errorf("%d bytes, of the other version: %v", len(got), bytes.Equal(got, other))
			}
			s.idle()
			s.wantNothingHeld()
			s.clock.advance(time.Hour)
			s.want(s.app("1.0"), other, Miss)
			if requests := s.imageRequests(); len(requests) < 2 || requests[1].Status != http.StatusPartialContent {
				t.Errorf("asked for %v, want the second answer to be a part", requests)
			}
		})
	}
}

func TestStrongValidator(t *testing.T) {
	const modified, told = "Thu, 30 Jun 2016 12:00:00 GMT", "Thu, 30 Jun 2016 12:00:01 GMT"
	for _, test := range []struct {
		name string
		said map[string]string
		want string
	}{
		{"a strong ETag", map[string]string{"ETag": `"a"`, "Last-Modified": modified}, `"a"`},
		{"a weak ETag, whatever the date", map[string]string{"ETag": `W/"a"`, "Last-Modified": modified, "Date": told}, ""},
		{"no quotes", map[string]string{"ETag": `a`}, ""},
		{"a date before the second in which it was told", map[string]string{"Last-Modified": modified, "Date": told}, modified},
		{"a date in the second in which it was told", map[string]string{"Last-Modified": modified, "Date": modified}, ""},
		{"a date without another", map[string]string{"Last-Modified": modified}, ""},
		{"no date", map[string]string{"Last-Modified": "yesterday", "Date": told}, ""},
		{"nothing", nil, ""},
	} {
		if got := strongValidator(test.said); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, strings.TrimSpace(test.want))
		}
	}
}
