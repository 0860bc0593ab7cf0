package admin

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// broughtName is what the image is called that tests bring.
const broughtName = "example.com/brought"

// carried returns an image that a trusted key has signed, and its bytes.
func carried(t *testing.T, size int64) (fetch.Carried, []byte) {
	t.Helper()
	b := acitest.Must(t, acitest.Spec{Name: broughtName, Labels: map[string]string{"version": "1"}, RootfsSize: size})
	signature, err := key().Sign(bytes.NewReader(b), trusttest.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return fetch.Carried{
		Name: broughtName, Labels: map[string]string{"version": "1"}, Digest: sha256.Sum256(b), Size: int64(len(b)), Signature: signature, Source: "a test",
		Refs: []acproxy.Ref{cachetest.MustRef(broughtName)},
	}, b
}

// opener opens bytes, and counts how often.
func opener(r io.Reader, times *int) func() (io.Reader, error) {
	return func() (io.Reader, error) { *times++; return r, nil }
}

func TestImagesAreBrought(t *testing.T) {
	sc := newScene(t, nil, 0)
	c, b := carried(t, 3<<20)
	c.Pin = true
	if err := sc.client.Verify(t.Context(), c, bytes.NewReader(b)); err != nil {
		t.Errorf("Verify = %v", err)
	}
	if held, err := sc.client.Examine(c); held || err != nil {
		t.Errorf("Examine = %v, %v; want false before it was brought", held, err)
	}
	opened := 0
	taken, err := sc.client.Take(t.Context(), c, opener(bytes.NewReader(b), &opened))
	if err != nil || taken.Held || opened != 1 || taken.Record.Digest != c.Digest || len(taken.Record.Signers) != 1 || len(taken.Moved) != 2 {
		t.Fatalf("Take = %+v, %v, opened %d times", taken, err, opened)
	}
	if rec, err := sc.store.Record(c.Digest); err != nil || !rec.Pinned {
		t.Errorf("held is %+v, %v; want it pinned", rec, err)
	}
	// A second time its bytes are not needed.
	if taken, err = sc.client.Take(t.Context(), c, opener(nil, &opened)); err != nil || !taken.Held || opened != 1 {
		t.Errorf("Take again = %+v, %v, opened %d times", taken, err, opened)
	}
	// Which is not known before, if it is evicted just now.
	if err := sc.store.Delete(t.Context(), c.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := sc.client.bring(t.Context(), "", c, nil); acproxy.Code(err) != codeBytesNeeded {
		t.Errorf("without its bytes: %v", err)
	}
	// And it goes out again as it came in.
	if _, err = sc.client.Take(t.Context(), c, opener(bytes.NewReader(b), &opened)); err != nil || opened != 2 {
		t.Fatalf("Take = %v, opened %d times", err, opened)
	}
	held, err := sc.client.Holdings(t.Context())
	if err != nil || !slices.ContainsFunc(held, func(h bundle.Held) bool { return h.Digest == c.Digest && len(h.Refs) == 2 }) {
		t.Errorf("Holdings = %+v, %v", held, err)
	}
}

func TestImagesAreExported(t *testing.T) {
	sc := newScene(t, nil, 0)
	c, b := carried(t, 100_000)
	if _, err := sc.client.Take(t.Context(), c, func() (io.Reader, error) { return bytes.NewReader(b), nil }); err != nil {
		t.Fatal(err)
	}
	if wanted, err := sc.client.Teach(c.Name, []discovery.Template{{Prefix: "example.com", URL: "https://example.com/{name}.{ext}"}}); err != nil || !wanted {
		t.Errorf("Teach = %v, %v", wanted, err)
	}
	cargo, err := sc.client.Export(t.Context(), airgap.Choice{Refs: c.Refs})
	if err != nil || len(cargo.Index.Images) != 1 || len(cargo.Index.Keys) != 1 {
		t.Fatalf("Export = %+v, %v", cargo, err)
	}
	made, err := bundle.New(cargo.Index, nil)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := made.Stream(t.Context(), 0, cargo.Open)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	all, err := io.ReadAll(stream)
	if err != nil || int64(len(all)) != made.Size() || !bytes.Contains(all, b) || !bytes.Contains(all, c.Signature) || !bytes.Contains(all, key().Armored()) {
		t.Errorf("the bundle has %d bytes, %v; not all that belongs into it", len(all), err)
	}
}

// failing reads some bytes, and fails.
type failing struct {
	r   io.Reader
	err error
}

func (f failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if errors.Is(err, io.EOF) {
		err = f.err
	}
	return n, err
}

func TestImagesThatAreNotTakenIn(t *testing.T) {
	sc := newScene(t, nil, 0)
	c, b := carried(t, 20<<20)
	wrong := &acproxy.Error{Kind: acproxy.ErrInvalid, Code: bundle.CodeDamaged, Detail: "the volume ends here"}
	_, err := sc.client.Take(t.Context(), c, func() (io.Reader, error) { return failing{bytes.NewReader(b[:9<<20]), wrong}, nil })
	if !errors.Is(err, wrong) {
		t.Errorf("what ends in the middle: %v, want the error of the bundle", err)
	}
	other := bytes.Clone(b)
	other[len(other)/2]++
	if _, err = sc.client.Take(t.Context(), c, func() (io.Reader, error) { return bytes.NewReader(other), nil }); acproxy.Code(err) != "bundle-damaged" || !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("another byte: %v", err)
	}
	unsigned := c
	unsigned.Signature = nil
	if _, err = sc.client.Take(t.Context(), unsigned, func() (io.Reader, error) { t.Error("it is opened"); return nil, nil }); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("unsigned: %v", err)
	}
	// The answer arrives although nobody wanted all those bytes.
	if _, err = sc.client.bring(t.Context(), "", unsigned, bytes.NewReader(b)); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("unsigned, with all bytes: %v", err)
	}
	if err = sc.client.Verify(t.Context(), unsigned, bytes.NewReader(b)); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("Verify of the unsigned one: %v", err)
	}
	if _, err := sc.store.Record(c.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("something is held: %v", err)
	}
	refused, err := sc.store.Refusals()
	if err != nil || len(refused) != 4 { // two were there, and it was brought twice
		t.Errorf("refusals are %+v, %v", refused, err)
	}
	if _, err := sc.client.Teach("NO NAME", nil); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("Teach = %v", err)
	}
}

// form is a body that an image is brought in.
func form(parts ...string) string {
	text := ""
	for i := 0; i < len(parts); i += 2 {
		text += "--x\r\nContent-Disposition: form-data; name=\"" + parts[i] + "\"\r\n\r\n" + parts[i+1] + "\r\n"
	}
	return text + "--x--\r\n"
}

const formType = "multipart/form-data; boundary=x"

func TestBodiesThatBringNothing(t *testing.T) {
	sc := newScene(t, []access.Rule{{May: map[access.Right][]string{access.Push: {"ci"}}}}, 0)
	c, _ := carried(t, 1)
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	said := string(text)
	for _, tt := range []struct{ name, contentType, body, want string }{
		{"no form", "application/json", said, "multipart/form-data"},
		{"no boundary", "multipart/form-data", said, "boundary"},
		{"nothing", formType, "--x--\r\n", "EOF"},
		{"the image first", formType, form(partImage, "x", partCarried, said), "its first part is"},
		{"no JSON", formType, form(partCarried, "{", partImage, "x"), "JSON"},
		{"another part", formType, form(partCarried, said, "name", "x"), "its second part is"},
		{"cut", formType, form(partCarried, said, partImage, "x")[:len(said)+120], ""},
		{"too much", formType, form(partCarried, strings.Repeat(" ", maxCarried)+"{}", partImage, "x"), "more than 8388608 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, text := sc.ask("ci", "POST", "/api/v1/import/images "+tt.body, "Content-Type", tt.contentType)
			if resp.StatusCode != http.StatusBadRequest || !strings.Contains(text, tt.want) {
				t.Errorf("%d: %s, want 400 that says %q", resp.StatusCode, text, tt.want)
			}
		})
	}
	// At the limit it is read.
	padded := strings.Repeat(" ", maxCarried-len(said)) + said
	if resp, text := sc.ask("ci", "POST", "/api/v1/import/images "+form(partCarried, padded), "Content-Type", formType); resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(text, codeBytesNeeded) {
		t.Errorf("%d: %s, want %s", resp.StatusCode, text, codeBytesNeeded)
	}
	if _, err := sc.store.Record(c.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("something is held: %v", err)
	}
}

// TestWhoStopsSending sends the half of an image and nothing more: it is told so, and not waited for.
func TestWhoStopsSending(t *testing.T) {
	sc := newScene(t, []access.Rule{{May: map[access.Right][]string{access.Push: {"ci"}}}}, 0)
	c, b := carried(t, 100_000)
	said, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	body := form(partCarried, string(said), partImage, string(b))
	u, err := url.Parse(sc.url)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(conn, "POST /api/v1/import/images HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s",
		u.Host, sc.tokens["ci"], formType, len(body), body[:len(body)/2])
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("it is not told anything: %v", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 400 {
		t.Errorf("it gets %s", resp.Status)
	}
	if usage, err := sc.store.Usage(); err != nil || usage.Partials != 0 {
		t.Errorf("%d bytes are left of it, %v", usage.Partials, err)
	}
}

func TestWhoMayBring(t *testing.T) {
	sc := newScene(t, []access.Rule{
		{Prefix: "example.com", May: map[access.Right][]string{access.Read: {"node"}, access.Push: {"ci"}}},
		{Prefix: "secret.example.com", May: map[access.Right][]string{access.Read: {"ci"}}},
	}, 0)
	c, b := carried(t, 10)
	said := func(change func(*fetch.Carried)) string {
		c := c
		change(&c)
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	plain := said(func(*fetch.Carried) {})
	pinned := said(func(c *fetch.Carried) { c.Pin = true })
	back := said(func(c *fetch.Carried) { c.AllowOlder = true })
	elsewhere := said(func(c *fetch.Carried) { c.Name = "secret.example.com/brought"; c.Refs = nil })
	for _, tt := range []struct {
		who, said string
		want      int
	}{{"", plain, 401}, {"node", plain, 403}, {"ci", pinned, 403}, {"ci", back, 403}, {"ci", elsewhere, 403}, {"ci", plain, 200}} {
		for path, body := range map[string][2]string{"examine": {tt.said, "application/json"}, "images": {form(partCarried, tt.said, partImage, string(b)), formType}, "images?verify=true": {form(partCarried, tt.said, partImage, string(b)), formType}} {
			if resp, text := sc.ask(tt.who, "POST", "/api/v1/import/"+path+" "+body[0], "Content-Type", body[1]); resp.StatusCode != tt.want {
				t.Errorf("%q gets %d from %s, want %d: %s", tt.who, resp.StatusCode, path, tt.want, text)
			}
		}
	}
}
