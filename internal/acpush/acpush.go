// Package acpush speaks acpush 0.0.1, by which images are uploaded to whoever publishes them.
package acpush

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/problem"
)

// Version is the version of the protocol.
const Version = "0.0.1"

// A Start is the answer to the beginning of an upload: where its parts go.
type Start struct {
	Version      string `json:"aci_push_version"`
	Multipart    bool   `json:"multipart"` // always false: each part is one request
	ManifestURL  string `json:"upload_manifest_url"`
	SignatureURL string `json:"upload_signature_url"`
	ImageURL     string `json:"upload_aci_url"`
	CompletedURL string `json:"completed_url"`
}

// A Verdict says how an upload ended: what the client says of it in the end, and what the server answers. What isn't of the protocol, clients that don't know
// it leave alone.
type Verdict struct {
	Success      bool   `json:"success"`
	Reason       string `json:"reason,omitempty"`        // the client's
	ServerReason string `json:"server_reason,omitempty"` // the server's

	Code      string   `json:"code,omitempty"` // the server's reason in a word, as in its other errors
	Published *Details `json:"published,omitempty"`
}

// Details are what became of an image that was published.
type Details struct {
	Image   string          `json:"image"` // the ref of all its labels
	Digest  acproxy.Digest  `json:"digest"`
	ImageID acproxy.ImageID `json:"imageID"`
	Size    int64           `json:"size"`
	Signers []string        `json:"signers,omitempty"` // fingerprints of the trusted keys that signed
	Held    bool            `json:"held"`              // it was published before
	Kept    []acproxy.Ref   `json:"kept,omitempty"`    // refs that go on answering what was signed later
	Warning string          `json:"warning,omitempty"` // why rkt's own check will refuse it
}

// An Image is what a [Client] uploads.
type Image struct {
	Ref       acproxy.Ref
	Manifest  []byte
	Signature []byte // nil if there is none
	Size      int64
	Open      func() (io.ReadCloser, error)
}

// A Client uploads images. It is safe for concurrent use.
type Client struct {
	Base string       // scheme and host of the server
	Path string       // where uploads begin there, with a slash at the end
	HTTP *http.Client // which has no time limit of its own, and follows no redirects
	// Authorize shows who the client is. It is called for requests to Base only. nil means that nothing is shown.
	Authorize func(*http.Request)
}

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 1 << 20

// Push uploads an image, and returns what became of it. Errors are the server's, with their kinds as far as it says them.
func (c *Client) Push(ctx context.Context, im Image) (Details, error) {
	query := url.Values{}
	for label, value := range im.Ref.Labels() {
		query.Set(label, value)
	}
	var start Start
	at := c.Base + c.Path + im.Ref.Name() + "?" + strings.ReplaceAll(query.Encode(), "+", "%20")
	if err := c.do(ctx, http.MethodPost, at, nil, 0, &start); err != nil {
		return Details{}, err
	}
	type part struct {
		what, url string
		size      int64
		open      func() (io.ReadCloser, error)
	}
	text := func(s []byte) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(string(s))), nil }
	}
	parts := []part{{"manifest", start.ManifestURL, int64(len(im.Manifest)), text(im.Manifest)}}
	if im.Signature != nil {
		parts = append(parts, part{"signature", start.SignatureURL, int64(len(im.Signature)), text(im.Signature)})
	}
	parts = append(parts, part{"image", start.ImageURL, im.Size, im.Open})
	for _, p := range parts {
		body, err := p.open()
		if err != nil {
			return Details{}, err
		}
		var v Verdict
		if err := c.do(ctx, http.MethodPut, p.url, body, p.size, &v); err != nil {
			return Details{}, c.giveUp(ctx, start, fmt.Errorf("sending the %s: %w", p.what, err))
		}
	}
	return c.complete(ctx, start)
}

// complete asks for the verdict.
func (c *Client) complete(ctx context.Context, start Start) (Details, error) {
	said := `{"success":true}`
	var v Verdict
	if err := c.do(ctx, http.MethodPost, start.CompletedURL, io.NopCloser(strings.NewReader(said)), int64(len(said)), &v); err != nil {
		return Details{}, err
	}
	if v.Published == nil {
		return Details{}, errors.New("the server doesn't say what became of the image")
	}
	return *v.Published, nil
}

// farewell is how long a client goes on, after it was told to end, to have the server drop what it has.
const farewell = 2 * time.Second

// giveUp has the server drop an upload, and returns why.
func (c *Client) giveUp(ctx context.Context, start Start, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
	defer cancel()
	said, err := json.Marshal(Verdict{Reason: why.Error()})
	if err == nil {
		// The server drops it in any case, later.
		_ = c.do(ctx, http.MethodPost, start.CompletedURL, io.NopCloser(strings.NewReader(string(said))), int64(len(said)), &Verdict{})
	}
	return why
}

// do asks for something, and reads the answer.
func (c *Client) do(ctx context.Context, method, at string, body io.ReadCloser, size int64, answer any) error {
	if !strings.HasPrefix(at, c.Base+"/") {
		// What is shown to one server is for no other.
		if body != nil {
			_ = body.Close()
		}
		return fmt.Errorf("the server wants the upload to go to %.200q, which is not below %s", at, c.Base)
	}
	req, err := http.NewRequestWithContext(ctx, method, at, body)
	if err != nil {
		return err
	}
	req.ContentLength = size
	if size == 0 {
		req.Body = http.NoBody
	}
	if method == http.MethodPut {
		// What is refused anyway need not be sent.
		req.Header.Set("Expect", "100-continue")
	}
	if c.Authorize != nil {
		c.Authorize(req)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", c.Base, err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return json.Unmarshal(text, answer)
	case http.StatusBadRequest:
		var v Verdict
		if json.Unmarshal(text, &v) == nil && v.ServerReason != "" {
			return &acproxy.Error{Kind: acproxy.ErrRefused, Code: v.Code, Detail: v.ServerReason}
		}
	}
	var p problem.Problem
	if json.Unmarshal(text, &p) != nil || p.Status != resp.StatusCode {
		return fmt.Errorf("%s answered %s", c.Base, resp.Status)
	}
	return p.Err()
}
