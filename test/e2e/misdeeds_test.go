package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// A misdeed is what a publisher does to one image, and what a node may get of it then.
type misdeed struct {
	name string
	do   func(v *victim)
	want []string // the outcomes that are right, see outcome
}

// A victim is an image on a host of its own, so that no misdeed has to do with another.
type victim struct {
	*scene
	host     string
	im       image
	troubles []*publisher.Trouble
}

func (v *victim) fault(pattern string, f publisher.Fault) {
	v.faultOf("", pattern, f)
}

// faultOf is fault for the requests of one method, "" for all.
func (v *victim) faultOf(method, pattern string, f publisher.Fault) {
	match := publisher.URL(pattern)
	if method != "" {
		match = publisher.Method(method, match)
	}
	v.troubles = append(v.troubles, v.publisher.Misbehave(match, f))
}

func (v *victim) tls(hosts string, f publisher.ConnFault) {
	v.troubles = append(v.troubles, v.publisher.MisbehaveTLS(hosts, f))
}

// elsewhere serves something on another host, and returns its URL.
func (v *victim) elsewhere(content []byte) string {
	at := "elsewhere.example.com/" + v.host + "/moved"
	v.publisher.Serve(at, "application/octet-stream", content)
	return "https://" + at
}

// onPage, onSignature and onImage return misdeeds at one of the steps.
func onPage(f publisher.Fault) func(*victim) {
	return func(v *victim) { v.fault(v.im.name, f) }
}

func onSignature(f publisher.Fault) func(*victim) {
	return func(v *victim) { v.fault(v.im.signature(), f) }
}

func onImage(faults ...publisher.Fault) func(*victim) {
	return func(v *victim) {
		for _, f := range faults {
			v.fault(v.im.blob(), f)
		}
	}
}

// http1 does the same over HTTP/1.1.
func http1(do func(*victim)) func(*victim) {
	return func(v *victim) {
		v.tls("*"+v.host, publisher.ConnFault{HTTP1: true})
		do(v)
	}
}

// onConnections returns a misdeed below HTTP, towards who asks for what the page points to; onPageConnections towards who asks for the page.
func onConnections(f publisher.ConnFault) func(*victim) {
	return func(v *victim) { v.tls("storage."+v.host, f) }
}

func onPageConnections(f publisher.ConnFault) func(*victim) {
	return func(v *victim) { v.tls(v.host, f) }
}

// What a node got: all of the image; its beginning, and no end; an error; or, and that never is right, something else that ends as if it were whole.
const (
	whole = "the image"
	short = "a body that ends short"
	wrong = "something else"
)

func outcome(a node.Answer, im image) string {
	switch {
	case a.Status == http.StatusOK && a.Err != nil:
		return short
	case a.Err != nil:
		return "no answer: " + a.Err.Error()
	case a.Status == http.StatusOK && a.SHA256 == im.sum:
		return whole
	case a.Status == http.StatusOK:
		return wrong
	}
	return fmt.Sprintf("%d %s", a.Status, problemCode(a))
}

// manyRedirects is the outcome that takes a dozen connections, for which the usual time may be too short on a busy machine.
const manyRedirects = "502 too-many-redirects"

// hellish has timeouts that tests can wait for, and hosts enough for all misdeeds. What is refused is not remembered, and nobody is left alone for having failed,
// so that the next answer can be right.
func hellish() string {
	var b strings.Builder
	b.WriteString("log: {access: false}\ndial:\n  timeout: 5s\n  stall_timeout: 2s\n  breaker: {failures: 1000}\n  hosts:\n    example.com: $TLS\n    storage.example.com: $TLS\n    elsewhere.example.com: $TLS\n")
	for i := range misdeeds {
		fmt.Fprintf(&b, "    h%d.example.com: $TLS\n    storage.h%d.example.com: $TLS\n", i, i)
	}
	b.WriteString("fetch: {retries: 4, retry_for: 5s, retry_wait: 10ms, signature_wait: 1s, max_image_size: 4MiB, max_flights: 1000}\n" +
		"discovery: {negative_ttl: 0s}\npublishers:\n  - {prefix: example.com, ca_file: $CA}\n")
	for i, m := range misdeeds {
		timeout := ""
		if slices.Contains(m.want, manyRedirects) || strings.HasPrefix(m.name, "over many hosts") {
			timeout = ", timeout: 25s"
		}
		fmt.Fprintf(&b, "  - {prefix: h%d.example.com, ca_file: $CA%s}\n", i, timeout)
	}
	return b.String()
}

const (
	hellSize = 300 << 10 // bytes of an image: several times what is held back
	early    = 1000
	late     = 200 << 10 // when something has been delivered already
)

// cutOnce breaks an image off when some of it was delivered.
var cutOnce = publisher.Fault{TruncateAfter: publisher.At(late), Times: 1}

func circle(v *victim) {
	v.fault(v.im.blob(), publisher.Fault{RedirectTo: "https://elsewhere.example.com/" + v.host})
	v.fault("elsewhere.example.com/"+v.host, publisher.Fault{RedirectTo: v.im.published.URL})
}

// chain returns a misdeed of so many redirects, over two hosts in turn.
func chain(n int) func(v *victim) {
	return func(v *victim) {
		from := v.im.blob()
		for i := range n - 1 {
			to := fmt.Sprintf("%s/%s/%d", []string{"elsewhere.example.com", "storage." + v.host}[i%2], v.host, i)
			v.fault(from, publisher.Fault{RedirectTo: "https://" + to})
			from = to
		}
		v.fault(from, publisher.Fault{RedirectTo: v.elsewhere(v.im.aci)})
	}
}

func sameLengthTwice(v *victim) {
	n := int64(len(v.im.aci))
	v.fault(v.im.blob(), publisher.Fault{OtherLength: &n})
}

func partsThatSayTheyAreOne(v *victim) {
	lie := fmt.Sprintf("bytes %d-%d/%d", late, len(v.im.aci)-1, len(v.im.aci))
	v.fault(v.im.blob(), cutOnce)
	v.fault(v.im.blob(), publisher.Fault{MultipartRange: true, NoContentLength: true, Header: http.Header{"Content-Range": {lie}}, Skip: 1, Times: 1})
}

func restElsewhere(v *victim) {
	v.fault(v.im.blob(), cutOnce)
	v.fault(v.im.blob(), publisher.Fault{RedirectTo: v.elsewhere(v.im.aci), Skip: 1})
}

func signatureElsewhere(v *victim) {
	v.fault(v.im.signature(), publisher.Fault{RedirectTo: v.elsewhere(v.sign(v.key, v.im.aci, trusttest.SignOptions{}))})
}

// headLies has an image without a signature, of which HEAD says something else than GET.
func headLies(head, get publisher.Fault) func(v *victim) {
	return func(v *victim) {
		v.fault(v.im.signature(), publisher.Fault{Status: http.StatusNotFound})
		v.faultOf(http.MethodHead, v.im.blob(), head)
		v.faultOf(http.MethodGet, v.im.blob(), get)
	}
}

func lies(header http.Header, times int) func(v *victim) {
	return onImage(cutOnce, publisher.Fault{Header: header, Skip: 1, Times: times})
}

const (
	slow     = "504 publisher-timeout"
	cut      = "502 publisher-cut"
	noTLS    = "502 publisher-tls"
	noHTTP   = "502 publisher-protocol"
	noStatus = "502 publisher-status"
)

var at = publisher.At

var misdeeds = []misdeed{
	// Below HTTP.
	{"the handshake stalls", onConnections(publisher.ConnFault{StallHandshake: true}), []string{slow}},
	{"the handshake is cut", onConnections(publisher.ConnFault{CutHandshake: true}), []string{cut}},
	{"the handshake is garbage", onConnections(publisher.ConnFault{Garbage: true}), []string{noTLS}},
	{"another host's certificate", onConnections(publisher.ConnFault{WrongHost: true}), []string{noTLS}},
	{"an expired certificate", onConnections(publisher.ConnFault{Expired: true}), []string{noTLS}},
	{"cut in the handshake", onConnections(publisher.ConnFault{CutAfter: at(100)}), []string{cut}},
	{"reset in the handshake", onConnections(publisher.ConnFault{ResetAfter: at(100)}), []string{cut}},
	{"no HTTP/2", onConnections(publisher.ConnFault{HTTP1: true}), []string{whole}},
	{"each connection is cut after 100,000 bytes", onConnections(publisher.ConnFault{CutAfter: at(100_000)}), []string{whole}},
	// What was on its way when a connection is reset may be lost, and then the attempts may not be enough.
	{"each connection is reset after 100,000 bytes", onConnections(publisher.ConnFault{ResetAfter: at(100_000)}), []string{whole, short, cut}},
	{"HTTP/2 with a header without end", onConnections(publisher.ConnFault{EndlessHeaders: true}), []string{noHTTP}},
	{"HTTP/2 with half a header", onConnections(publisher.ConnFault{StallInHeader: true}), []string{slow}},
	{"the page: the handshake stalls", onPageConnections(publisher.ConnFault{StallHandshake: true}), []string{slow}},
	{"the page: the handshake is cut", onPageConnections(publisher.ConnFault{CutHandshake: true}), []string{cut}},
	{"the page: garbage", onPageConnections(publisher.ConnFault{Garbage: true}), []string{noTLS}},
	{"the page: an expired certificate", onPageConnections(publisher.ConnFault{Expired: true}), []string{noTLS}},
	{"the page: half a header", onPageConnections(publisher.ConnFault{StallInHeader: true}), []string{slow}},

	// The header.
	{"a header a byte at a time", http1(onImage(publisher.Fault{HeaderEvery: 50 * time.Millisecond})), []string{slow}},
	{"a header without end", http1(onImage(publisher.Fault{EndlessHeaders: true})), []string{noHTTP}},
	{"interim answers without end", http1(onImage(publisher.Fault{EndlessInterim: true})), []string{noHTTP}},
	{"interim answers without end, in HTTP/2", onImage(publisher.Fault{EndlessInterim: true}), []string{noHTTP}},
	{"HTTP/1.0", http1(onImage(publisher.Fault{HTTP10: true})), []string{whole}},
	{"HTTP/1.0 without a length", http1(onImage(publisher.Fault{HTTP10: true, NoContentLength: true})), []string{whole}},
	{"HTTP/1.0 without a length, cut", http1(onImage(publisher.Fault{HTTP10: true, NoContentLength: true, TruncateAfter: at(late)})), []string{short}},
	{"two lengths", http1(onImage(publisher.Fault{OtherLength: at(10)})), []string{noHTTP}},
	{"the same length twice", http1(sameLengthTwice), []string{whole}},
	{"a length that is too long", http1(onImage(publisher.Fault{ContentLength: at(hellSize * 2)})), []string{short}},
	{"a length that is too long, in HTTP/2", onImage(publisher.Fault{ContentLength: at(hellSize * 2)}), []string{short}},
	{"a length that is too short", http1(onImage(publisher.Fault{ContentLength: at(late)})), []string{short}},
	{"a length that is much too short", http1(onImage(publisher.Fault{ContentLength: at(early)})), []string{short}},
	{"a length of nothing", http1(onImage(publisher.Fault{ContentLength: at(0)})), []string{"403 bad-signature", "502 truncated"}},
	{"a negative length", http1(onImage(publisher.Fault{ContentLength: at(-5)})), []string{noHTTP}},
	{"a length beyond all measure", http1(onImage(publisher.Fault{ContentLength: at(1<<63 - 1)})), []string{"403 image-too-large"}},
	{"206 though nobody asked for a part", onImage(publisher.Fault{UnaskedRange: true}), []string{noStatus}},
	{"206 and a part though nobody asked", onImage(publisher.Fault{UnaskedRange: true, RangeLength: early}), []string{noStatus}},
	{"encoded", onImage(publisher.Fault{Header: http.Header{"Content-Encoding": {"gzip"}}}), []string{"502 content-encoding"}},
	{"202 without end", onImage(publisher.Fault{Status: 202}), []string{noStatus}},
	{"204", onImage(publisher.Fault{Status: 204}), []string{noStatus}},
	{"304 though nobody asked", onImage(publisher.Fault{Status: 304}), []string{noStatus}},
	{"a status that is none", http1(onImage(publisher.Fault{Status: 999})), []string{noStatus}},

	// The body.
	{"a chunk of no size", http1(onImage(publisher.Fault{BadChunk: "zz\r\n"})), []string{short}},
	{"a chunk that is too large for any number", http1(onImage(publisher.Fault{BadChunk: "fffffffffffffffff\r\n"})), []string{short}},
	{"a chunk of a negative size", http1(onImage(publisher.Fault{BadChunk: "-1\r\n"})), []string{short}},
	{"a chunk that ends short", http1(onImage(publisher.Fault{BadChunk: "10\r\nabc"})), []string{short}},
	{"a chunk that goes on", http1(onImage(publisher.Fault{BadChunk: "1\r\nabc\r\n0\r\n\r\n"})), []string{short}},
	{"no last chunk", http1(onImage(publisher.Fault{BadChunk: "\r\n"})), []string{short}},
	{"a trailer without end", http1(onImage(publisher.Fault{BadChunk: "0\r\n" + strings.Repeat("X-More: and more\r\n", 100_000)})), []string{short}},
	{"chunks and a length", http1(onImage(publisher.Fault{BadChunk: "0\r\n\r\n", ContentLength: at(early)})), []string{whole}},
	{"more than there is", onImage(publisher.Fault{EndlessBody: true, NoContentLength: true}), []string{short}},
	{"a byte a second", onImage(publisher.Fault{BytesPerSecond: 1}), []string{short}},
	{"the rest a byte a second", onImage(cutOnce, publisher.Fault{BytesPerSecond: 1, Skip: 1}), []string{short}},
	{"it stalls", onImage(publisher.Fault{StallAfter: at(late)}), []string{whole}}, // the rest is less than that
	{"it stalls at once", onImage(publisher.Fault{StallAfter: at(0)}), []string{short}},
	{"it is torn", onImage(publisher.Fault{TearAfter: at(late)}), []string{whole}},
	{"it is torn over HTTP/1.1", http1(onImage(publisher.Fault{TearAfter: at(late)})), []string{whole}},
	{"it is reset", http1(onImage(publisher.Fault{ResetAfter: at(late)})), []string{whole}},
	{"it is cut at once, again and again", onImage(publisher.Fault{TruncateAfter: at(0)}), []string{short}},
	{"a bit is another", onImage(publisher.Fault{FlipBitAt: at(early)}), []string{short}},
	{"a bit of the end is another", onImage(publisher.Fault{FlipBitAt: at(hellSize)}), []string{short}},

	// The rest, asked for after it broke off.
	{"the rest begins earlier, and says so", onImage(cutOnce, publisher.Fault{ShiftRange: -10}), []string{whole}},
	{"the rest begins later, and says so", onImage(cutOnce, publisher.Fault{ShiftRange: 10}), []string{whole}},
	{"the rest is one byte further than it says", onImage(cutOnce, publisher.Fault{WrongContentRange: true}), []string{whole}},
	{"the rest comes in pieces", onImage(cutOnce, publisher.Fault{RangeLength: 60_000}), []string{whole}},
	{"the rest comes in pieces that are too small", onImage(cutOnce, publisher.Fault{RangeLength: early}), []string{short}},
	{"the rest comes in pieces, of an unknown length", onImage(cutOnce, publisher.Fault{NoContentLength: true, RangeLength: 60_000}), []string{whole}},
	{"the rest comes as several parts", onImage(cutOnce, publisher.Fault{MultipartRange: true}), []string{whole}},
	{"the rest comes as several parts that say that they are one", partsThatSayTheyAreOne, []string{whole}},
	{"the rest can't be had", onImage(cutOnce, publisher.Fault{Status: 416, Times: 1, Skip: 1}), []string{whole}},
	{"the rest is all of it", onImage(cutOnce, publisher.Fault{IgnoreRange: true}), []string{whole}},
	{"the rest is of something else", onImage(cutOnce, publisher.Fault{Body: bytes.Repeat([]byte("x"), hellSize), Skip: 1}), []string{short}},
	{"the rest is of something else that is shorter", onImage(cutOnce, publisher.Fault{Body: []byte("x"), Skip: 1}), []string{short}},
	{"the rest has another bit", onImage(cutOnce, publisher.Fault{FlipBitAt: at(early), Skip: 1}), []string{short}},
	{"the rest has no range", lies(http.Header{"Content-Range": nil}, 1), []string{whole}},
	{"the rest has a range that is none", lies(http.Header{"Content-Range": {"bytes */5"}}, 1), []string{whole}},
	{"the rest is encoded", lies(http.Header{"Content-Encoding": {"gzip"}}, 0), []string{short}},
	{"the rest is gone", onImage(cutOnce, publisher.Fault{Status: 404, Skip: 1}), []string{short}},
	{"the rest is the same still", onImage(cutOnce, publisher.Fault{Status: 304, Skip: 1}), []string{short}},
	{"the rest comes after a failure", onImage(cutOnce, publisher.Fault{Status: 500, Skip: 1, Times: 2}), []string{whole}},
	{"the rest is elsewhere", restElsewhere, []string{whole}},
	{"the rest is in a circle", onImage(cutOnce, publisher.Fault{RedirectLoop: true, Skip: 1}), []string{short}},
	{"the rest is two lengths long", http1(onImage(cutOnce, publisher.Fault{OtherLength: at(10), Skip: 1})), []string{short}},

	// Redirects.
	{"in a circle", onImage(publisher.Fault{RedirectLoop: true}), []string{manyRedirects}},
	{"in a circle of hosts", circle, []string{manyRedirects}},
	{"over many hosts", chain(8), []string{whole}},
	{"over too many hosts", chain(11), []string{manyRedirects}},
	{"slowly in a circle", onImage(publisher.Fault{RedirectLoop: true, Delay: time.Second}), []string{slow}},
	{"to plain http", onImage(publisher.Fault{RedirectTo: "http://elsewhere.example.com/x"}), []string{"403 insecure-url"}},
	{"inward", onImage(publisher.Fault{RedirectTo: "https://127.0.0.1/x"}), []string{"403 address-not-allowed"}},
	{"with a password", onImage(publisher.Fault{RedirectTo: "https://u:p@elsewhere.example.com/x"}), []string{"403 credentials-in-url"}},
	{"to what is no URL", onImage(publisher.Fault{RedirectTo: "https://[::1"}), []string{"502 bad-redirect"}},
	{"to another scheme", onImage(publisher.Fault{RedirectTo: "file:///etc/passwd"}), []string{"403 unsupported-scheme"}},
	{"to nowhere", onImage(publisher.Fault{Status: 302}), []string{noStatus}},

	// The signature.
	{"the signature: elsewhere", signatureElsewhere, []string{whole}},
	{"the signature: 202 without end", onSignature(publisher.Fault{Status: 202}), []string{"504 signature-not-ready"}},
	{"no signature, and HEAD has an image that GET hasn't", headLies(publisher.Fault{}, publisher.Fault{Status: 404}), []string{"403 unsigned"}},
	{"no signature, and HEAD has no image that GET has", headLies(publisher.Fault{Status: 404}, publisher.Fault{}), []string{"404 no-signature-found"}},
	{"no signature, and HEAD without end", http1(headLies(publisher.Fault{EndlessHeaders: true}, publisher.Fault{})), []string{"404 no-signature-found"}},
	{"the signature: more than there is", onSignature(publisher.Fault{EndlessBody: true, NoContentLength: true}), []string{"502 signature-too-large"}},
	{"the signature: cut", onSignature(publisher.Fault{TruncateAfter: at(100)}), []string{cut, noHTTP}},
	{"the signature: torn", http1(onSignature(publisher.Fault{TearAfter: at(100)})), []string{cut}},
	{"the signature: a byte a second", onSignature(publisher.Fault{BytesPerSecond: 1}), []string{slow}},
	{"the signature: it stalls", onSignature(publisher.Fault{StallAfter: at(100)}), []string{slow}},
	{"the signature: a header without end", http1(onSignature(publisher.Fault{EndlessHeaders: true})), []string{noHTTP}},
	{"the signature: a header a byte at a time", http1(onSignature(publisher.Fault{HeaderEvery: 50 * time.Millisecond})), []string{slow}},
	{"the signature: a bad chunk", http1(onSignature(publisher.Fault{BadChunk: "zz\r\n"})), []string{noHTTP}},
	{"the signature: two lengths", http1(onSignature(publisher.Fault{OtherLength: at(10)})), []string{noHTTP}},
	{"the signature: a part", onSignature(publisher.Fault{UnaskedRange: true}), []string{noStatus}},
	{"the signature: a bit is another", onSignature(publisher.Fault{FlipBitAt: at(200)}), []string{"403 malformed-signature", "403 bad-signature", "403 unknown-key", "403 unsupported-signature", short}},
	{"the signature: nothing", onSignature(publisher.Fault{Body: []byte{}, Status: 200}), []string{"403 malformed-signature"}},
	{"the image changes after its signature", onImage(publisher.Fault{Body: bytes.Repeat([]byte("x"), hellSize)}), []string{"502 not-an-image", short}},

	// The page.
	{"the page: 202 without end", onPage(publisher.Fault{Status: 202}), []string{"404 not-discovered"}},
	{"the page: 500", onPage(publisher.Fault{Status: 500}), []string{noStatus}},
	{"the page: a part", onPage(publisher.Fault{UnaskedRange: true}), []string{noStatus}},
	{"the page: more than there is", onPage(publisher.Fault{EndlessBody: true, NoContentLength: true}), []string{"502 page-too-large"}},
	{"the page: cut", onPage(publisher.Fault{TruncateAfter: at(100)}), []string{cut, noHTTP}},
	{"the page: it stalls", onPage(publisher.Fault{StallAfter: at(100)}), []string{slow}},
	{"the page: a byte a second", onPage(publisher.Fault{BytesPerSecond: 1}), []string{slow}},
	{"the page: a header without end", http1(onPage(publisher.Fault{EndlessHeaders: true})), []string{noHTTP}},
	{"the page: interim answers without end", http1(onPage(publisher.Fault{EndlessInterim: true})), []string{noHTTP}},
	{"the page: in a circle", onPage(publisher.Fault{RedirectLoop: true}), []string{manyRedirects}},
	{"the page: two lengths", http1(onPage(publisher.Fault{OtherLength: at(10)})), []string{noHTTP}},
	{"the page: a bad chunk", http1(onPage(publisher.Fault{BadChunk: "zz\r\n"})), []string{noHTTP}},
	{"the page: nothing", onPage(publisher.Fault{Body: []byte{}, Status: 200}), []string{"404 not-discovered"}},
}

// TestPublisherFromHell has a publisher do to images what publishers do when they are broken, or evil. A node gets all of an image, or an error that says
// what is wrong, or a body that ends short; in a time, and in memory, that is bounded. What is held is served all the while, nothing that is wrong is held,
// and the next answer that is as it should be is taken.
func TestPublisherFromHell(t *testing.T) {
	t.Parallel()
	s := stage(t, hellish())
	s.trust(s.key, "")
	s.start()
	held := s.publish(app("held"))
	s.hold(held)
	peak := s.watch()
	images := make([]image, len(misdeeds))
	var cases sync.WaitGroup
	// So many at once: most of them wait for timeouts.
	turns := make(chan struct{}, 16)
	for i, m := range misdeeds {
		turns <- struct{}{}
		// Ends with the misdeed, each step of which is bounded; waited for below.
		cases.Go(func() {
			defer func() { <-turns }()
			host := fmt.Sprintf("h%d.%s", i, imageHost)
			images[i] = s.publish(acitest.Spec{Name: host + "/app", RootfsSize: hellSize, Seed: uint64(i), Compression: acitest.None})
			s.suffer(&victim{scene: s, host: host, im: images[i]}, m, held)
		})
	}
	cases.Wait()
	s.holdsOnly(slices.Concat(images, []image{held})...)
	wantPeak(t, peak(), 256<<20)
}

// suffer lets a misdeed happen.
func (s *scene) suffer(v *victim, m misdeed, held image) {
	t := s.t
	m.do(v)
	answers := make(chan node.Answer, 1)
	// Ends with the answer, which is waited for below.
	go func() { answers <- s.get(s.direct(v.im, "aci")) }()
	if a := s.get(s.direct(held, "aci")); outcome(a, held) != whole || a.Header.Get("Cache-Status") != hit {
		t.Errorf("%s: meanwhile an image that is held is answered with %s", m.name, described(a))
	}
	a := <-answers
	if got := outcome(a, v.im); !slices.Contains(m.want, got) {
		t.Errorf("%s: the answer is %s, want %s: %s\n%s", m.name, got, strings.Join(m.want, " or "), described(a), s.asked(v))
	}
	for _, trouble := range v.troubles {
		trouble.End()
	}
	if a := s.get(s.direct(v.im, "aci")); outcome(a, v.im) != whole {
		t.Errorf("%s: the next answer is %s: %s\n%s", m.name, outcome(a, v.im), described(a), s.asked(v))
	}
}

// asked returns what the publisher was asked on behalf of a victim, a line for each request.
func (s *scene) asked(v *victim) string {
	var lines []string
	for _, r := range s.publisher.Requests() {
		if strings.HasSuffix(r.Host, v.host) || strings.Contains(r.Path, v.host) {
			lines = append(lines, r.String())
		}
	}
	return strings.Join(lines, "\n")
}
