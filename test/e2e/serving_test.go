package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
)

// stalled is how much of an image the publisher sends before it stalls, where it is told to.
const stalled = 400 << 10

// arriving has an image stall on its way from the publisher, and returns what lets it go on. The request that set it going is in progress.
func (s *scene) arriving(im image) *publisher.Trouble {
	s.t.Helper()
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	first := make(chan node.Answer, 1)
	// Ends with the answer, at the latest when the scene ends; the cleanup below waits for it.
	// The test's own context ends before its cleanups begin, and the answer may come until then.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.context()), 2*patience)
	go func() { first <- s.node.Get(ctx, s.direct(im, "aci"), nil, nil) }()
	s.t.Cleanup(func() {
		trouble.Release()
		wantImage(s.t, <-first, im)
		cancel()
	})
	within(s.t, "the publisher begins to send "+im.name, trouble.Stalled())
	return trouble
}

func TestColdAndHeld(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	modified := time.Date(2017, time.March, 4, 5, 6, 7, 0, time.UTC)
	for _, size := range []int64{0, 1 << 20} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			spec := large(fmt.Sprintf("app%d", size), size)
			im := s.publishDated(spec, modified)
			cold := s.get(s.direct(im, "aci"))
			wantImage(t, cold, im)
			wantHeader(t, cold, "Cache-Status", miss)
			s.inspected(im)
			held := s.get(s.direct(im, "aci"))
			wantImage(t, held, im)
			wantHeader(t, held, "Cache-Status", hit)
			wantHeader(t, held, "Repr-Digest", digestOf(im.aci))
			wantHeader(t, held, "X-Appc-Image-Id", im.id.String())
			for which, a := range map[string]node.Answer{"cold": cold, "held": held} {
				if got := a.Header.Get("Last-Modified"); got != modified.Format(http.TimeFormat) {
					t.Errorf("%s: Last-Modified %q, want the publisher's", which, got)
				}
				wantHeader(t, a, "Accept-Ranges", "bytes")
				wantHeader(t, a, "Content-Length", fmt.Sprint(len(im.aci)))
				wantHeader(t, a, "Cache-Control", "max-age=300")
				wantHeader(t, a, "Content-Type", "application/octet-stream")
			}
			if etag := cold.Header.Get("Etag"); etag == "" || strings.HasPrefix(etag, "W/") {
				t.Errorf("ETag %q, want a strong one", etag)
			}
			wantHeader(t, held, "Etag", cold.Header.Get("Etag"))

			signature := s.get(s.direct(im, "aci.asc"))
			wantStatus(t, signature, http.StatusOK)
			wantHeader(t, signature, "Repr-Digest", digestOf(signature.Body))
			wantHeader(t, signature, "Cache-Status", hit)
			wantHeader(t, signature, "Last-Modified", modified.Format(http.TimeFormat))
		})
	}
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

// rangeTests are requests for an image of at least 3000 bytes. In a header $SIZE is the image's size, $N one byte less, $ETAG and $DATE its validators.
var rangeTests = []struct {
	name     string
	header   []string
	status   int
	from, to int64 // of the body; to is excluded, -1 is the end
}{
	{"the first bytes", []string{"Range", "bytes=0-9"}, 206, 0, 10},
	{"the middle", []string{"Range", "bytes=1000-1999"}, 206, 1000, 2000},
	{"one byte", []string{"Range", "bytes=0-0"}, 206, 0, 1},
	{"from a place on", []string{"Range", "bytes=1234-"}, 206, 1234, -1},
	{"everything", []string{"Range", "bytes=0-"}, 206, 0, -1},
	{"as rkt sends it through a redirect: two identical lines", []string{"Range", "bytes=2000-", "Range", "bytes=2000-"}, 206, 2000, -1},
	{"beyond the end", []string{"Range", "bytes=10-999999999"}, 206, 10, -1},
	{"the last byte by its place", []string{"Range", "bytes=$N-"}, 206, -2, -1},
	{"the last bytes", []string{"Range", "bytes=-1"}, 206, -2, -1},
	{"at the end", []string{"Range", "bytes=$SIZE-"}, 416, 0, 0},
	{"past the end", []string{"Range", "bytes=999999999-"}, 416, 0, 0},
	{"a unit that nobody knows", []string{"Range", "lines=1-2"}, 200, 0, -1},
	{"If-Range with the ETag", []string{"Range", "bytes=5-9", "If-Range", "$ETAG"}, 206, 5, 10},
	{"If-Range with another ETag", []string{"Range", "bytes=5-9", "If-Range", `"another"`}, 200, 0, -1},
	{"If-Range with the ETag made weak", []string{"Range", "bytes=5-9", "If-Range", "W/$ETAG"}, 200, 0, -1},
	{"If-Range with the date", []string{"Range", "bytes=5-9", "If-Range", "$DATE"}, 206, 5, 10},
	{"If-Range with another date", []string{"Range", "bytes=5-9", "If-Range", "Mon, 02 Jan 2006 15:04:05 GMT"}, 200, 0, -1},
	{"If-None-Match with the ETag", []string{"If-None-Match", "$ETAG"}, 304, 0, 0},
	{"If-None-Match with the ETag among others", []string{"If-None-Match", `"x", W/$ETAG`}, 304, 0, 0},
	{"If-None-Match with anything", []string{"If-None-Match", "*"}, 304, 0, 0},
	{"If-None-Match with another ETag", []string{"If-None-Match", `"another"`}, 200, 0, -1},
	{"If-None-Match counts more than the date", []string{"If-None-Match", `"another"`, "If-Modified-Since", "$DATE"}, 200, 0, -1},
	{"If-Modified-Since the date", []string{"If-Modified-Since", "$DATE"}, 304, 0, 0},
	{"If-Modified-Since an earlier date", []string{"If-Modified-Since", "Mon, 02 Jan 2006 15:04:05 GMT"}, 200, 0, -1},
	{"If-Match with the ETag", []string{"If-Match", "$ETAG"}, 200, 0, -1},
	{"If-Match with another ETag", []string{"If-Match", `"another"`}, 412, 0, 0},
}

func TestRangesOfHeldImage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 64<<10))
	s.hold(im)
	for _, door := range []struct{ name, url string }{
		{"HTTP/1.1", s.direct(im, "aci")},
		{"HTTP/2", "https://" + imageHost + directPath(im.name, im.labels, "aci")},
	} {
		t.Run(door.name, func(t *testing.T) { s.ranges(t, door.url, im, nil) })
	}
}

func TestRangesOfArrivingImage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 1<<20))
	trouble := s.arriving(im)
	s.ranges(t, s.direct(im, "aci"), im, trouble)
	if n := s.publisher.Count(im.blob()); n != 1 {
		t.Errorf("the publisher was asked for the image %d times, want once", n)
	}
}

// ranges asks for parts of an image at once and lets it arrive then, if it hasn't.
func (s *scene) ranges(t *testing.T, url string, im image, trouble *publisher.Trouble) {
	head := s.do(http.MethodHead, url)
	wantStatus(t, head, http.StatusOK)
	wantHeader(t, head, "Content-Length", fmt.Sprint(len(im.aci)))
	fill := strings.NewReplacer("$SIZE", fmt.Sprint(len(im.aci)), "$N", fmt.Sprint(len(im.aci)-1), "$ETAG", head.Header.Get("Etag"), "$DATE", head.Header.Get("Last-Modified"))
	answers := make([]chan node.Answer, len(rangeTests))
	for i, tt := range rangeTests {
		header := make([]string, len(tt.header))
		for j := range tt.header {
			header[j] = fill.Replace(tt.header[j])
		}
		answers[i] = make(chan node.Answer, 1)
		// Ends with the answer, which is waited for below.
		go func() { answers[i] <- s.get(url, header...) }()
	}
	check := func(i int, a node.Answer) {
		tt := rangeTests[i]
		t.Run(tt.name, func(t *testing.T) { wantPart(t, a, im, tt.status, tt.from, tt.to) })
	}
	if trouble != nil {
		// What is there already comes although the rest hasn't arrived.
		for i, tt := range rangeTests {
			if tt.status == 206 && tt.to > 0 {
				check(i, <-answers[i])
				close(answers[i])
			}
		}
		trouble.Release()
	}
	for i := range rangeTests {
		if a, ok := <-answers[i]; ok {
			check(i, a)
		}
	}
	t.Run("HEAD with a range", func(t *testing.T) {
		// Range is defined for GET only (RFC 9110 section 14.2).
		a := s.do(http.MethodHead, url, "Range", "bytes=0-9")
		if a.Err != nil || a.Status != 200 && a.Status != 206 || a.Bytes != 0 {
			t.Errorf("%s, want 200 and no body", described(a))
		}
	})
	t.Run("several ranges", func(t *testing.T) {
		a := s.get(url, "Range", "bytes=0-9,100-199,-5")
		if !wantStatus(t, a, http.StatusPartialContent) {
			return
		}
		kind, params, err := mime.ParseMediaType(a.Header.Get("Content-Type"))
		if err != nil || kind != "multipart/byteranges" {
			t.Fatalf("Content-Type %q, want multipart/byteranges", a.Header.Get("Content-Type"))
		}
		parts := multipart.NewReader(bytes.NewReader(a.Body), params["boundary"])
		size := len(im.aci)
		for _, want := range [][2]int{{0, 10}, {100, 200}, {size - 5, size}} {
			part, err := parts.NextPart()
			if err != nil {
				t.Fatal(err)
			}
			if got := must(io.ReadAll(part))(t); !bytes.Equal(got, im.aci[want[0]:want[1]]) {
				t.Errorf("part %v is %d other bytes", want, len(got))
			}
		}
	})
}

// wantPart checks that an answer is a part of an image.
func wantPart(t *testing.T, a node.Answer, im image, status int, from, to int64) {
	t.Helper()
	size := int64(len(im.aci))
	if to < 0 {
		to = size
	}
	if from < 0 {
		from += size + 1
	}
	if !wantStatus(t, a, status) {
		return
	}
	switch status {
	case http.StatusPartialContent:
		wantHeader(t, a, "Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
		wantHeader(t, a, "Content-Length", fmt.Sprint(to-from))
	case http.StatusRequestedRangeNotSatisfiable:
		wantHeader(t, a, "Content-Range", fmt.Sprintf("bytes */%d", size))
		return
	case http.StatusPreconditionFailed:
		return
	case http.StatusNotModified:
		wantHeader(t, a, "Content-Length", "")
		if a.Header.Get("Etag") == "" {
			t.Error("304 without an ETag")
		}
	}
	sum := sha256.Sum256(im.aci[from:to])
	if fmt.Sprintf("%x", sum) != a.SHA256 {
		t.Errorf("%d other bytes than the %d from %d to %d", a.Bytes, to-from, from, to)
	}
}

func TestResumeAsRktDoes(t *testing.T) {
	t.Parallel()
	for _, held := range []bool{true, false} {
		t.Run(fmt.Sprintf("held %v", held), func(t *testing.T) {
			s := newScene(t, "")
			im := s.publish(large("app", 1<<20))
			var trouble *publisher.Trouble
			if held {
				s.hold(im)
			} else {
				trouble = s.arriving(im)
			}
			url := s.direct(im, "aci")
			// The first try is interrupted somewhere.
			const got = 123_456
			part := s.get(url, "Range", fmt.Sprintf("bytes=0-%d", got-1))
			wantStatus(t, part, http.StatusPartialContent)
			interrupted := time.Now()

			head := s.do(http.MethodHead, url)
			wantStatus(t, head, http.StatusOK)
			wantHeader(t, head, "Accept-Ranges", "bytes")
			if modified, err := http.ParseTime(head.Header.Get("Last-Modified")); err != nil || !modified.Before(interrupted) {
				t.Errorf("Last-Modified %q, want one before the partial file's", head.Header.Get("Last-Modified"))
			}
			rest := make(chan node.Answer, 1)
			// Ends with the answer, which is waited for below.
			go func() {
				rest <- s.get(url, "Range", fmt.Sprintf("bytes=%d-", got), "Range", fmt.Sprintf("bytes=%d-", got))
			}()
			if trouble != nil {
				trouble.Release()
			}
			a := <-rest
			if wantStatus(t, a, http.StatusPartialContent) && !bytes.Equal(append(part.Body, a.Body...), im.aci[:got+len(a.Body)]) {
				t.Error("what rkt appends doesn't continue what it has")
			}
			wantPart(t, a, im, http.StatusPartialContent, got, -1)
			// It resumes the signature in the same way.
			asc := s.get(s.direct(im, "aci.asc"))
			resumed := s.get(s.direct(im, "aci.asc"), "Range", "bytes=10-", "Range", "bytes=10-")
			if wantStatus(t, resumed, http.StatusPartialContent); !bytes.Equal(resumed.Body, asc.Body[min(10, len(asc.Body)):]) {
				t.Errorf("the rest of the signature is %q", resumed.Body)
			}
		})
	}
}

func TestImageOfUnknownLength(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, fault := range []publisher.Fault{{NoContentLength: true}, {CloseDelimited: true}} {
		im := s.publish(large(fmt.Sprintf("chunked%v", fault.NoContentLength), 500<<10))
		s.publisher.Misbehave(publisher.URL(im.blob()), fault)
		cold := s.get(s.direct(im, "aci"))
		wantImage(t, cold, im)
		held := s.get(s.direct(im, "aci"))
		wantImage(t, held, im)
		wantHeader(t, held, "Content-Length", fmt.Sprint(len(im.aci)))
		wantHeader(t, held, "Etag", cold.Header.Get("Etag"))
	}
}

func TestBytesLeaveBeforeTheyAreAllHere(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	for _, url := range []string{s.direct(im, "aci"), "https://" + imageHost + directPath(im.name, im.labels, "aci")} {
		resp := s.open(s.context(), url)
		if _, err := io.CopyN(io.Discard, resp.Body, stalled-64<<10); err != nil {
			t.Errorf("%s: what has arrived doesn't leave: %v", url, err)
		}
		_ = resp.Body.Close()
	}
	trouble.Release()
	wantImage(t, s.get(s.direct(im, "aci")), im)
}

func TestVerifyFirst(t *testing.T) {
	t.Parallel()
	s := newScene(t, "fetch: {delivery: verify-first}")
	im := s.publish(large("app", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{FlipBitAt: publisher.At(500 << 10)})
	a := s.get(s.direct(im, "aci"))
	wantProblem(t, a, http.StatusForbidden, "bad-signature")
	trouble.End()
	good := s.publish(large("good", 1<<20))
	got := s.get(s.direct(good, "aci"))
	wantImage(t, got, good)
	wantHeader(t, got, "X-Appc-Image-Id", good.id.String())
}

// open asks for a URL over HTTP/1.1, or HTTP/2 if it is https, and returns the answer with the body unread.
func (s *scene) open(ctx context.Context, url string) *http.Response {
	s.t.Helper()
	client := s.client()
	if strings.HasPrefix(url, "https://") {
		client = s.secureClient()
	}
	req := must(http.NewRequestWithContext(ctx, http.MethodGet, url, nil))(s.t)
	return must(client.Do(req))(s.t)
}

// TestTheSameAgain asks for what nodes ask for most over and over, on connections of their own: the server has a quicker way for what it has answered
// with little before, and it is the same answer.
func TestTheSameAgain(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	image := s.get(s.direct(im, "aci"))
	wantImage(t, image, im)
	for name, ask := range map[string]struct {
		url    string
		header http.Header
		status int
	}{
		"page":         {s.plain() + "/" + strings.TrimPrefix(im.name, "example.com/") + "?ac-discovery=1", nil, http.StatusOK},
		"signature":    {s.direct(im, "aci.asc"), nil, http.StatusOK},
		"not modified": {s.direct(im, "aci"), http.Header{"If-None-Match": {image.Header.Get("Etag")}}, http.StatusNotModified},
		"modified":     {s.direct(im, "aci"), http.Header{"If-None-Match": {`"another"`}}, http.StatusOK},
	} {
		var first http.Header
		var content []byte
		for range 4 {
			transport := &http.Transport{}
			for range 2 {
				req := must(http.NewRequestWithContext(s.context(), http.MethodGet, ask.url, nil))(t)
				maps.Copy(req.Header, ask.header)
				if name == "page" {
					req.Host = "example.com"
				}
				resp := must(transport.RoundTrip(req))(t)
				body := must(io.ReadAll(resp.Body))(t)
				_ = resp.Body.Close()
				if resp.StatusCode != ask.status {
					t.Fatalf("%s: %s: %.200s", name, resp.Status, body)
				}
				for _, varies := range []string{"Date", "X-Request-Id"} {
					if resp.Header.Get(varies) == "" {
						t.Errorf("%s: there is no %s", name, varies)
					}
					resp.Header.Del(varies)
				}
				// It is there once the image was inspected to its end.
				resp.Header.Del("X-Appc-Image-Id")
				switch {
				case first == nil && !strings.Contains(resp.Header.Get("Cache-Status"), "hit"):
				case first == nil:
					first, content = resp.Header, body
				case !maps.EqualFunc(first, resp.Header, slices.Equal) || !bytes.Equal(body, content):
					t.Errorf("%s: first\n%v\nthen\n%v", name, first, resp.Header)
				}
			}
			transport.CloseIdleConnections()
		}
		if first == nil {
			t.Errorf("%s: it was never a hit", name)
		}
	}
}
