package publisher_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/publisher"
)

func TestRangesThatLie(t *testing.T) {
	n := len(blob)
	for _, tt := range []struct {
		name, asked   string
		fault         publisher.Fault
		status        int
		contentRange  string
		body          []byte
		multipartKind bool
	}{
		{"earlier", "bytes=100-199", publisher.Fault{ShiftRange: -10}, 206, fmt.Sprintf("bytes 90-199/%d", n), blob[90:200], false},
		{"later", "bytes=100-", publisher.Fault{ShiftRange: 10}, 206, fmt.Sprintf("bytes 110-%d/%d", n-1, n), blob[110:], false},
		{"before the beginning", "bytes=5-", publisher.Fault{ShiftRange: -10}, 206, fmt.Sprintf("bytes 0-%d/%d", n-1, n), blob, false},
		{"shorter", "bytes=100-", publisher.Fault{RangeLength: 10}, 206, fmt.Sprintf("bytes 100-109/%d", n), blob[100:110], false},
		{"unasked", "", publisher.Fault{UnaskedRange: true}, 206, fmt.Sprintf("bytes 0-%d/%d", n-1, n), blob, false},
		{"unasked and shorter", "", publisher.Fault{UnaskedRange: true, RangeLength: 7}, 206, fmt.Sprintf("bytes 0-6/%d", n), blob[:7], false},
		{"several parts", "bytes=100-109", publisher.Fault{MultipartRange: true}, 206, "", nil, true},
		{"no range to change", "", publisher.Fault{ShiftRange: 10, RangeLength: 1}, 200, "", blob, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
				p.Misbehave(publisher.URL("*.aci"), tt.fault)
				var fields []string
				if tt.asked != "" {
					fields = []string{"Range", tt.asked}
				}
				a, err := get(t, c, "GET", imageURL, fields...)
				if err != nil || a.err != nil || a.StatusCode != tt.status || a.Header.Get("Content-Range") != tt.contentRange {
					t.Fatalf("GET = %v, %v, %v; want %d with Content-Range %q", a.Response, err, a.err, tt.status, tt.contentRange)
				}
				if isMultipart := strings.HasPrefix(a.Header.Get("Content-Type"), "multipart/byteranges"); isMultipart != tt.multipartKind {
					t.Errorf("Content-Type %q", a.Header.Get("Content-Type"))
				}
				if !tt.multipartKind && !bytes.Equal(a.body, tt.body) {
					t.Errorf("%d bytes, want %d others", len(a.body), len(tt.body))
				}
				if p.Requests()[0].Header.Get("Range") != tt.asked {
					t.Errorf("the log has Range %q, want what was asked for", p.Requests()[0].Header.Get("Range"))
				}
			})
		})
	}
}

func TestFaultsOfHTTP1(t *testing.T) {
	n := int64(len(blob))
	for _, tt := range []struct {
		name  string
		fault publisher.Fault
		check func(a answer, err error) bool
		want  string
	}{
		{"two lengths", publisher.Fault{OtherLength: publisher.At(10)}, func(_ answer, err error) bool { return err != nil }, "no answer that can be read"},
		{"the same length twice", publisher.Fault{OtherLength: &n}, func(a answer, err error) bool { return err == nil && bytes.Equal(a.body, blob) }, "the blob"},
		{"HTTP/1.0", publisher.Fault{HTTP10: true}, func(a answer, err error) bool {
			return err == nil && a.Proto == "HTTP/1.0" && a.ContentLength == n && bytes.Equal(a.body, blob) && a.Close
		}, "the blob over HTTP/1.0"},
		{"HTTP/1.0 without a length, cut", publisher.Fault{HTTP10: true, NoContentLength: true, TruncateAfter: publisher.At(100)}, func(a answer, err error) bool {
			return err == nil && a.ContentLength == -1 && a.err == nil && len(a.body) == 100
		}, "100 bytes and a clean end"},
		{"chunks that are right", publisher.Fault{BadChunk: "0\r\n\r\n"}, func(a answer, err error) bool {
			return err == nil && a.err == nil && a.ContentLength == -1 && bytes.Equal(a.body, blob)
		}, "the blob"},
		{"a chunk of no size", publisher.Fault{BadChunk: "zz\r\n"}, func(a answer, err error) bool { return err == nil && a.err != nil && len(a.body) <= int(n) }, "an error in the body"},
		{"a last chunk that isn't there", publisher.Fault{BadChunk: "\r\n"}, func(a answer, err error) bool { return err == nil && a.err != nil }, "an error in the body"},
		{"a header a byte at a time", publisher.Fault{HeaderEvery: 100 * time.Microsecond}, func(a answer, err error) bool {
			return err == nil && a.err == nil && bytes.Equal(a.body, blob)
		}, "the blob, after all"},
		{"interim answers only", publisher.Fault{EndlessInterim: true}, func(_ answer, err error) bool { return err != nil }, "no answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t)
			c := client(t, p, false)
			c.Transport.(*http.Transport).MaxResponseHeaderBytes = 64 << 10
			p.Misbehave(publisher.URL("*.aci"), tt.fault)
			if a, err := get(t, c, "GET", imageURL); !tt.check(a, err) {
				t.Errorf("GET = %v, %v, %d bytes, %v; want %s", a.Response, err, len(a.body), a.err, tt.want)
			}
			p.Behave()
			if a, err := get(t, c, "GET", imageURL); err != nil || a.err != nil || !bytes.Equal(a.body, blob) {
				t.Errorf("GET after Behave = %v, %v; want the blob", a.Response, err)
			}
		})
	}
}

func TestInterimAnswersWithoutEnd(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		p.Misbehave(publisher.URL("*"), publisher.Fault{EndlessInterim: true})
		enough, n := errors.New("enough"), 0
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if n++; n == 1000 && code == http.StatusEarlyHints {
				return enough
			}
			return nil
		}})
		req, err := http.NewRequestWithContext(ctx, "GET", imageURL, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := c.Do(req); err == nil || !strings.HasSuffix(err.Error(), enough.Error()) {
			t.Errorf("GET = %v, %v after %d of them", resp, err, n)
		}
	})
}

func TestTornInARecord(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		for _, after := range []int64{0, 1000, int64(len(blob)) - 10} {
			p.Misbehave(publisher.URL("*.aci"), publisher.Fault{TearAfter: &after, Times: 1})
			a, err := get(t, c, "GET", imageURL)
			if err == nil && (a.err == nil || int64(len(a.body)) > after) {
				t.Errorf("torn after %d: %v, %d bytes, %v", after, a.Response, len(a.body), a.err)
			}
			if a, err := get(t, c, "GET", imageURL); err != nil || !bytes.Equal(a.body, blob) {
				t.Errorf("the next one: %v, %v", a.Response, err)
			}
		}
	})
}

func TestConnFaults(t *testing.T) {
	hostname, authority := new(x509.HostnameError), new(x509.CertificateInvalidError)
	for _, tt := range []struct {
		name  string
		fault publisher.ConnFault
		check func(err error) bool
	}{
		{"cut", publisher.ConnFault{CutHandshake: true}, func(err error) bool { return err != nil }},
		{"garbage", publisher.ConnFault{Garbage: true}, func(err error) bool { return errors.As(err, new(tls.RecordHeaderError)) }},
		{"another host's certificate", publisher.ConnFault{WrongHost: true}, func(err error) bool { return errors.As(err, hostname) }},
		{"an old certificate", publisher.ConnFault{Expired: true}, func(err error) bool { return errors.As(err, authority) && authority.Reason == x509.Expired }},
		{"cut in the handshake", publisher.ConnFault{CutAfter: publisher.At(100)}, func(err error) bool { return err != nil }},
		{"cut at once", publisher.ConnFault{CutAfter: publisher.At(0)}, func(err error) bool { return err != nil }},
		{"reset in the handshake", publisher.ConnFault{ResetAfter: publisher.At(100)}, func(err error) bool { return err != nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
				trouble := p.MisbehaveTLS("storage.*", tt.fault)
				if a, err := get(t, c, "GET", imageURL); !tt.check(err) {
					t.Errorf("GET = %v, %v", a.Response, err)
				}
				if trouble.Applied() < 1 {
					t.Error("Applied = 0, want the connection counted")
				}
				if a, err := get(t, c, "GET", "https://example.com/app?ac-discovery=1"); err != nil || a.StatusCode != 200 {
					t.Errorf("another host: %v, %v; want no fault", a.Response, err)
				}
				p.Behave()
				if a, err := get(t, c, "GET", imageURL); err != nil || !bytes.Equal(a.body, blob) {
					t.Errorf("GET after Behave = %v, %v; want the blob", a.Response, err)
				}
			})
		})
	}
}

func TestConnFaultsCountConnections(t *testing.T) {
	p := start(t)
	trouble := p.MisbehaveTLS("*", publisher.ConnFault{CutHandshake: true, Skip: 1, Times: 1})
	for i, ok := range []bool{true, false, true} {
		c := client(t, p, false)
		if _, err := get(t, c, "GET", imageURL); (err == nil) != ok {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	if n := trouble.Applied(); n != 1 {
		t.Errorf("Applied = %d, want 1", n)
	}
}

func TestNoHTTP2(t *testing.T) {
	p := start(t)
	p.MisbehaveTLS("*", publisher.ConnFault{HTTP1: true})
	if a, err := get(t, client(t, p, true), "GET", imageURL); err != nil || a.ProtoMajor != 1 || !bytes.Equal(a.body, blob) {
		t.Errorf("GET = %v, %v; want the blob over HTTP/1.1", a.Response, err)
	}
}

// TestCutOnTheWire ends connections after so many bytes of whatever they carry, in the middle of the answer.
func TestCutOnTheWire(t *testing.T) {
	for _, reset := range []bool{false, true} {
		protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
			f := publisher.ConnFault{CutAfter: publisher.At(60_000)}
			if reset {
				f = publisher.ConnFault{ResetAfter: publisher.At(60_000)}
			}
			p.MisbehaveTLS("*", f)
			a, err := get(t, c, "GET", imageURL)
			if err == nil && (a.err == nil || len(a.body) > 60_000) {
				t.Errorf("GET = %v, %d bytes, %v; want less than was sent", a.Response, len(a.body), a.err)
			}
		})
	}
}

func TestStalledHandshake(t *testing.T) {
	for _, end := range []string{"released", "stopped", "the client gives up"} {
		t.Run(end, func(t *testing.T) {
			p := start(t)
			c := client(t, p, false)
			trouble := p.MisbehaveTLS("*", publisher.ConnFault{StallHandshake: true})
			ctx, giveUp := context.WithCancel(t.Context())
			defer giveUp()
			req, err := http.NewRequestWithContext(ctx, "GET", imageURL, nil)
			if err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, 1)
			// Ends with the request, which is waited for below.
			go func() {
				resp, err := c.Do(req)
				if err == nil {
					_ = resp.Body.Close()
				}
				failed <- err
			}()
			<-trouble.Stalled()
			switch end {
			case "released":
				trouble.End()
			case "stopped":
				p.Stop()
			default:
				giveUp()
			}
			if err := <-failed; err == nil {
				t.Error("the request was answered")
			}
		})
	}
}

// TestHTTP2ByHand has answers that net/http doesn't give: their clients get none.
func TestHTTP2ByHand(t *testing.T) {
	p := start(t)
	t.Run("a header without end", func(t *testing.T) {
		defer p.MisbehaveTLS("*", publisher.ConnFault{EndlessHeaders: true}).End()
		c := client(t, p, true)
		c.Transport.(*http.Transport).MaxResponseHeaderBytes = 64 << 10
		if a, err := get(t, c, "GET", imageURL); err == nil {
			t.Errorf("GET = %v, want no answer", a.Response)
		}
	})
	t.Run("half a header", func(t *testing.T) {
		defer p.MisbehaveTLS("*", publisher.ConnFault{StallInHeader: true}).End()
		conn, err := tls.Dial("tcp", p.Addr(), &tls.Config{RootCAs: p.CAPool(), ServerName: "storage.example.com", NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// SETTINGS of no fields, and HEADERS of stream 1 without END_HEADERS.
		head := make([]byte, 9+9)
		if _, err := io.ReadFull(conn, head); err != nil || head[3] != 4 || head[9+3] != 1 || head[9+4] != 0 {
			t.Errorf("frames %x, %v", head, err)
		}
	})
	if a, err := get(t, client(t, p, true), "GET", imageURL); err != nil || !bytes.Equal(a.body, blob) {
		t.Errorf("GET afterwards = %v, %v; want the blob", a.Response, err)
	}
}

func TestAMethodsOwnFault(t *testing.T) {
	protocols(t, func(t *testing.T, p *publisher.Publisher, c *http.Client) {
		p.Misbehave(publisher.Method("GET", publisher.URL("*.aci")), publisher.Fault{Body: []byte("changed")})
		head, err := get(t, c, "HEAD", imageURL)
		if err != nil || head.ContentLength != int64(len(blob)) {
			t.Errorf("HEAD = %v, %v; want the blob's", head.Response, err)
		}
		if a, err := get(t, c, "GET", imageURL); err != nil || string(a.body) != "changed" || a.Header.Get("ETag") == head.Header.Get("ETag") {
			t.Errorf("GET = %v, %v; want something else", a.Response, err)
		}
	})
}

func TestPlainConnectionsHaveNoFaultOfTLS(t *testing.T) {
	p := start(t)
	p.MisbehaveTLS("*", publisher.ConnFault{CutHandshake: true})
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, p.HTTPAddr())
	}}}
	defer c.CloseIdleConnections()
	if a, err := get(t, c, "GET", strings.Replace(imageURL, "https", "http", 1)); err != nil || !bytes.Equal(a.body, blob) {
		t.Errorf("GET = %v, %v", a.Response, err)
	}
}

func TestFaultsAsText(t *testing.T) {
	for text, want := range map[string]publisher.Fault{
		"":                                           {},
		"truncate-after=0 times=1 skip=2":            {TruncateAfter: publisher.At(0), Times: 1, Skip: 2},
		"  status=503   delay=1.5s http10 ":          {Status: 503, Delay: 1500 * time.Millisecond, HTTP10: true},
		`header="Retry-After: 7" header="etag:"`:     {Header: http.Header{"Retry-After": {"7"}, "Etag": nil}},
		`body="two words" bad-chunk="zz\r\n"`:        {Body: []byte("two words"), BadChunk: "zz\r\n"},
		"body=one shift-range=-5 redirect-to=/x?y=z": {Body: []byte("one"), ShiftRange: -5, RedirectTo: "/x?y=z"},
	} {
		got, err := publisher.ParseFault(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("ParseFault(%q) = %+v, %v; want %+v", text, got, err, want)
		}
	}
	if f, err := publisher.ParseConnFault("expired cut-after=7 http1"); err != nil || !reflect.DeepEqual(f, publisher.ConnFault{Expired: true, CutAfter: publisher.At(7), HTTP1: true}) {
		t.Errorf("ParseConnFault = %+v, %v", f, err)
	}
	for _, text := range []string{"nonsense", "Status=200", "status", "status=many", "times=1x", "delay=fast", "http10=yes", `body="no end`, "header=nothing", "header=:x", "expired", "=", "body"} {
		if f, err := publisher.ParseFault(text); err == nil {
			t.Errorf("ParseFault(%q) = %+v, want an error", text, f)
		}
	}
	// Every field has a word.
	if words := publisher.FaultWords(); len(words) != reflect.TypeFor[publisher.Fault]().NumField() {
		t.Errorf("FaultWords = %q", words)
	}
	if words := publisher.ConnFaultWords(); len(words) != reflect.TypeFor[publisher.ConnFault]().NumField() {
		t.Errorf("ConnFaultWords = %q", words)
	}
}

func FuzzFaultsAsText(f *testing.F) {
	for _, text := range []string{"truncate-after=0 times=1", `status=503 header="A: b" header="c:" header="A: d"`, `body="" bad-chunk="zz\r\n"`, "delay=1h1m endless-body"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		fault, err := publisher.ParseFault(text)
		if err != nil {
			return
		}
		again, err := publisher.ParseFault(fault.String())
		if err != nil || !reflect.DeepEqual(again, fault) {
			t.Errorf("ParseFault(%q) = %+v, and its text %q gives %+v, %v", text, fault, fault, again, err)
		}
	})
}
