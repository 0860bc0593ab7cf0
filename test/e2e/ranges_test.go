package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/publisher"
)

// A partial is a request for a part of an image, or on a condition, made up at random.
type partial struct {
	method string
	header http.Header
}

func (p partial) String() string { return fmt.Sprint(p.method, " ", p.header) }

// randomPartial makes up a request, most of them with fields that mean something.
func randomPartial(r *rand.Rand, size int64, etag string, modified time.Time) partial {
	p := partial{method: http.MethodGet, header: make(http.Header)}
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	chance := func(n int) bool { return r.IntN(n) == 0 }
	place := func() string {
		near := []int64{0, 1, size / 2, size - 1, size, size + 1, r.Int64N(size), r.Int64N(size), r.Int64N(2 * size)}
		return fmt.Sprint(near[r.IntN(len(near))])
	}
	span := func() string {
		switch r.IntN(12) {
		case 0:
			return "-" + place()
		case 1:
			return place() + "-"
		case 2:
			return pick("", "-", "a-b", "1-2-3", "--1", "+1-2", " 1 - 5 ", "0x1-2", "5-1", "9223372036854775807-", "9223372036854775808-", "0-9223372036854775807", "0-99999999999999999999")
		default:
			from := r.Int64N(size)
			return fmt.Sprintf("%d-%d", from, from+r.Int64N(max(size/4, 1)))
		}
	}
	tags := func() string {
		other := pick(`"another"`, `W/"weak"`, `""`, `*`, `x`, `"unfinished`, `W/`, ``)
		return pick(etag, "W/"+etag, other, other+", "+etag, etag+","+other, etag+" , "+etag, strings.Trim(etag, `"`), etag+"x", "*")
	}
	date := func() string {
		at := modified.Add(time.Duration(r.IntN(5)-2) * time.Second)
		return pick(at.UTC().Format(http.TimeFormat), at.UTC().Format(http.TimeFormat), at.UTC().Format(time.RFC850), at.UTC().Format(time.ANSIC), "yesterday", "")
	}
	if chance(8) {
		p.method = http.MethodHead
	}
	if !chance(6) {
		spans := []string{span()}
		for chance(4) {
			spans = append(spans, span())
		}
		p.header.Set("Range", pick("bytes=", "bytes=", "bytes=", "bytes=", "bytes=", "bytes=", "bytes =", "Bytes=", "lines=", "bytes", "")+strings.Join(spans, pick(",", ", ", " ,")))
	}
	for field, value := range map[string]func() string{
		"If-Range":      func() string { return pick(tags(), date()) },
		"If-None-Match": tags, "If-Match": tags, "If-Modified-Since": date, "If-Unmodified-Since": date,
	} {
		if chance(6) {
			p.header.Set(field, value())
		}
	}
	return p
}

// got is what a server answered to it.
type got struct {
	status int
	header http.Header
	body   []byte
	err    error
}

func ask(c *http.Client, url string, p partial) got {
	req, err := http.NewRequest(p.method, url, nil)
	if err != nil {
		return got{err: err}
	}
	req.Header = p.header.Clone()
	resp, err := c.Do(req)
	if err != nil {
		return got{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return got{resp.StatusCode, resp.Header, body, err}
}

// differ returns what is different in two answers, as far as it matters to a client; "" if nothing is.
func differ(ours, reference got) string {
	if ours.err != nil || reference.err != nil {
		return fmt.Sprintf("error %v, want %v", ours.err, reference.err)
	}
	if ours.status != reference.status {
		return fmt.Sprintf("status %d, want %d", ours.status, reference.status)
	}
	fields := []string{"Content-Range"}
	switch ours.status {
	case http.StatusOK, http.StatusPartialContent:
		fields = append(fields, "Content-Length", "ETag", "Last-Modified", "Accept-Ranges")
	case http.StatusNotModified:
		// ServeContent leaves Last-Modified out where there is an ETag; to send it is as well.
		fields = append(fields, "ETag", "Content-Length")
	default:
		// What an error says besides is everyone's own.
		return differs(ours, reference, fields)
	}
	kind, params, _ := mime.ParseMediaType(ours.header.Get("Content-Type"))
	referenceKind, referenceParams, _ := mime.ParseMediaType(reference.header.Get("Content-Type"))
	if kind != referenceKind {
		return fmt.Sprintf("Content-Type %q, want %q", kind, referenceKind)
	}
	if kind != "multipart/byteranges" {
		if !bytes.Equal(ours.body, reference.body) {
			return fmt.Sprintf("%d bytes, want %d others", len(ours.body), len(reference.body))
		}
		return differs(ours, reference, fields)
	}
	if was, is := parts(reference.body, referenceParams["boundary"]), parts(ours.body, params["boundary"]); was != is {
		return fmt.Sprintf("the parts\n%s\nwant\n%s", is, was)
	}
	return differs(ours, reference, fields)
}

func differs(ours, reference got, fields []string) string {
	for _, field := range fields {
		if a, b := ours.header.Values(field), reference.header.Values(field); strings.Join(a, "\n") != strings.Join(b, "\n") {
			return fmt.Sprintf("%s %q, want %q", field, a, b)
		}
	}
	return ""
}

// parts describes the parts of a multipart body, which is empty in an answer to HEAD.
func parts(body []byte, boundary string) string {
	var all []string
	r := multipart.NewReader(bytes.NewReader(body), boundary)
	for {
		part, err := r.NextRawPart()
		if err != nil {
			return fmt.Sprint(len(body) > 0, strings.Join(all, "\n"))
		}
		content, err := io.ReadAll(part)
		all = append(all, fmt.Sprintf("%q %q %x %v", part.Header.Get("Content-Range"), part.Header.Get("Content-Type"), sha256.Sum256(content), err))
	}
}

// reference serves an image as net/http would.
func reference(t testing.TB, im image, etag string, modified time.Time) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A unit that nobody knows is to be ignored (RFC 9110, section 14.2), and is not by ServeContent.
		if !strings.HasPrefix(r.Header.Get("Range"), "bytes=") {
			r.Header.Del("Range")
		}
		w.Header().Set("ETag", etag)
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", modified, bytes.NewReader(im.aci))
	}))
	t.Cleanup(s.Close)
	return s
}

// validatorsOf returns the ETag and the time of last change that the server answers with.
func (s *scene) validatorsOf(url string) (etag string, modified time.Time) {
	s.t.Helper()
	head := s.do(http.MethodHead, url)
	wantStatus(s.t, head, http.StatusOK)
	return head.Header.Get("Etag"), must(http.ParseTime(head.Header.Get("Last-Modified")))(s.t)
}

// TestRandomPartsOfHeldImage asks for parts and on conditions, at random, and compares each answer with that of net/http's own code for the same bytes.
func TestRandomPartsOfHeldImage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "log: {access: false}")
	im := s.publish(large("app", 8<<10))
	s.hold(im)
	url := s.direct(im, "aci")
	etag, modified := s.validatorsOf(url)
	ref := reference(t, im, etag, modified)
	random, client := rand.New(rand.NewPCG(seed(t), 1)), s.client()
	for range inChaos(2_000, 100_000) {
		p := randomPartial(random, int64(len(im.aci)), etag, modified)
		if d := differ(ask(client, url, p), ask(client, ref.URL, p)); d != "" {
			t.Errorf("%v: %s", p, d)
		}
	}
}

// TestRandomPartsOfArrivingImage does the same while the image arrives: some of the requests are made before, and answered while, it comes.
func TestRandomPartsOfArrivingImage(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(seed(t), 2))
	s := newScene(t, "log: {access: false}")
	for round := range inChaos(4, 100) {
		unknown := round%2 == 1
		t.Run(fmt.Sprintf("round %d, of unknown length %v", round, unknown), func(t *testing.T) {
			im := s.publish(large(fmt.Sprintf("app%d", round), 320<<10+random.Int64N(128<<10)))
			// Not so near the end that what is held back can't be told from what isn't there.
			half := int64(len(im.aci)) / 2
			at := half + random.Int64N(half-128<<10)
			trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: &at, NoContentLength: unknown})
			defer trouble.Release()
			url := s.direct(im, "aci")
			etag, modified := s.validatorsOf(url)
			within(t, "the publisher stalls", trouble.Stalled())
			ref := reference(t, im, etag, modified)
			client := s.client()
			var asking sync.WaitGroup
			const together = 60
			asking.Add(together)
			answers := make([]chan got, together)
			requests := make([]partial, together)
			for i := range requests {
				requests[i] = randomPartial(random, int64(len(im.aci)), etag, modified)
				answers[i] = make(chan got, 1)
				// Ends with the answer, which is waited for below.
				go func() {
					asking.Done()
					answers[i] <- ask(client, url, requests[i])
				}()
			}
			asking.Wait()
			// What has arrived, and isn't held back, comes at once.
			early := 0
			wants := make([]got, together)
			for i, p := range requests {
				wants[i] = ask(client, ref.URL, p)
				want := wants[i]
				_, to, isSpan := spanOf(want)
				if comes := p.method == http.MethodHead || want.status > 206 || isSpan && to <= at-64<<10; comes && !unknown && !several(want) {
					early++
					ours := <-answers[i]
					answers[i] <- ours
					if d := differ(ours, want); d != "" {
						t.Errorf("%v: %s", p, d)
					}
				}
			}
			if early == 0 && !unknown {
				t.Error("no answer could come before the rest of the image")
			}
			t.Logf("%d of %d answers came before the rest of the image", early, together)
			trouble.Release()
			for i, p := range requests {
				ours, want := <-answers[i], wants[i]
				if unknown && ours.status == http.StatusOK && want.status == http.StatusOK {
					// Nobody knew the length when it began.
					want.header.Del("Content-Length")
					ours.header.Del("Content-Length")
				}
				if d := differ(ours, want); d != "" {
					t.Errorf("%v: %s", p, d)
				}
			}
			if n := s.publisher.Count(im.blob()); n != 1 {
				t.Errorf("the publisher was asked for the image %d times, want once", n)
			}
		})
	}
}

// several reports whether an answer has several parts.
func several(g got) bool { return strings.HasPrefix(g.header.Get("Content-Type"), "multipart/") }

// spanOf reads the part that an answer has.
func spanOf(g got) (from, to int64, ok bool) {
	var size int64
	_, err := fmt.Sscanf(textproto.TrimString(g.header.Get("Content-Range")), "bytes %d-%d/%d", &from, &to, &size)
	return from, to + 1, err == nil && g.status == http.StatusPartialContent
}
