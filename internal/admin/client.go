package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/web"
)

// A Client asks a running server by its socket. It is safe for concurrent use.
type Client struct{ http *http.Client }

// Dial returns a client of the server that answers on a socket. It returns an error matching [acproxy.ErrNotFound] if none does.
func Dial(path string) (*Client, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	conn, err := dial(context.Background(), "", "")
	if err != nil {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-server", Detail: "no server answers on " + path, Err: err}
	}
	if err := conn.Close(); err != nil {
		return nil, err
	}
	return &Client{&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: time.Minute}}, nil
}

// patient returns a client that waits for as long as it takes.
func (c *Client) patient() *Client { return &Client{&http.Client{Transport: c.http.Transport}} }

// HTTP returns a client that connects to the server's socket, whatever host it is asked for, and waits for as long as it takes.
func (c *Client) HTTP() *http.Client { return c.patient().http }

// send asks for something. The caller closes the body of the answer, which is one of 2xx.
func (c *Client) send(ctx context.Context, method, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://acproxy"+api+path, nil)
	if err != nil {
		return nil, err
	}
	return c.answered(req)
}

// answered sends a request. The caller closes the body of the answer, which is one of 2xx.
func (c *Client) answered(req *http.Request) (*http.Response, error) {
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	var p problem.Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&p); err != nil {
		return nil, fmt.Errorf("the server answered %s", resp.Status)
	}
	return nil, p.Err()
}

// do asks for something and reads the answer into value, unless that is nil.
func (c *Client) do(ctx context.Context, method, path string, value any) error {
	resp, err := c.send(ctx, method, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if value == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(value)
}

// post sends a value and reads the answer into another.
func (c *Client) post(ctx context.Context, path string, value, into any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://acproxy"+api+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.answered(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(into)
}

func (c *Client) get(path string, value any) error {
	return c.do(context.Background(), http.MethodGet, path, value)
}

// raw returns an answer as it is.
func (c *Client) raw(path string) ([]byte, error) {
	resp, err := c.send(context.Background(), http.MethodGet, path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

// query returns a parameter of a URL, to be put behind a path.
func query(name string, n int64) string { return "?" + name + "=" + strconv.FormatInt(n, 10) }

// Ready returns why the server can't do all of its work, nil if it can.
func (c *Client) Ready() error { return c.get("ready", nil) }

// About returns which server it is.
func (c *Client) About() (about About, err error) {
	err = c.get("about", &about)
	return about, err
}

// Config returns the configuration that counts there, without secrets, as YAML.
func (c *Client) Config() ([]byte, error) { return c.raw("config") }

// Reload has the server read its configuration and all that it names again, and returns what of it has changed. After an error nothing has.
func (c *Client) Reload() (changes []Change, err error) {
	err = c.do(context.Background(), http.MethodPost, "reload", &changes)
	return changes, err
}

// ReloadKeys has the server read the trusted keys again. When it returns, the server decides by them.
func (c *Client) ReloadKeys() error {
	return c.do(context.Background(), http.MethodPost, "keys/reload", nil)
}

// Images is [Store.Images] of the server.
func (c *Client) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	var p ImagePage
	values := url.Values{"limit": {strconv.Itoa(limit)}}
	for name, value := range map[string]string{"prefix": filter.Prefix, "contains": filter.Contains, "state": string(filter.State), "sort": string(filter.Sort), "after": after} {
		if value != "" {
			values.Set(name, value)
		}
	}
	for name, set := range map[string]bool{"pinned": filter.Pinned, "reverse": filter.Reverse} {
		if set {
			values.Set(name, "true")
		}
	}
	err := c.get("images?"+values.Encode(), &p)
	return p.Images, p.Next, err
}

// Record is [Store.Record] of the server.
func (c *Client) Record(digest acproxy.Digest) (rec cache.Record, err error) {
	err = c.get("images/"+digest.String(), &rec)
	return rec, err
}

// Manifest is [Store.Manifest] of the server.
func (c *Client) Manifest(digest acproxy.Digest) ([]byte, error) {
	return c.raw("images/" + digest.String() + "/manifest")
}

// Signature is [Store.Signature] of the server.
func (c *Client) Signature(digest acproxy.Digest) ([]byte, error) {
	return c.raw("images/" + digest.String() + "/signature")
}

// Blob is [Store.Blob] of the server. It is read from where it stands, and a place further on or back is asked for anew.
func (c *Client) Blob(digest acproxy.Digest) (io.ReadSeekCloser, error) {
	b := &remoteBlob{c: c.patient(), path: "images/" + digest.String() + "/image"}
	return b, b.open()
}

// remoteBlob is the bytes of an image at a server.
type remoteBlob struct {
	c    *Client
	path string
	at   int64
	size int64
	body io.ReadCloser // from at on; nil if nothing is asked for
}

func (b *remoteBlob) open() error {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://acproxy"+api+b.path, nil)
	if err != nil {
		return err
	}
	if b.at > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", b.at))
	}
	resp, err := b.c.answered(req)
	if err != nil {
		return err
	}
	if b.at > 0 && resp.StatusCode != http.StatusPartialContent {
		return errors.Join(fmt.Errorf("the server answered %s for a part of an image", resp.Status), resp.Body.Close())
	}
	b.body, b.size = resp.Body, b.at+resp.ContentLength
	return nil
}

// Read implements io.Reader.
func (b *remoteBlob) Read(p []byte) (int, error) {
	if b.at >= b.size {
		return 0, io.EOF
	}
	if b.body == nil {
		if err := b.open(); err != nil {
			return 0, err
		}
	}
	n, err := b.body.Read(p)
	b.at += int64(n)
	return n, err
}

// Seek implements io.Seeker.
func (b *remoteBlob) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += b.at
	case io.SeekEnd:
		offset += b.size
	}
	if offset < 0 {
		return b.at, errors.New("there is nothing before the beginning of an image")
	}
	if offset == b.at {
		return b.at, nil
	}
	err := b.Close()
	b.at = offset
	return b.at, err
}

// Close implements io.Closer.
func (b *remoteBlob) Close() error {
	if b.body == nil {
		return nil
	}
	err := b.body.Close()
	b.body = nil
	return err
}

// Dependencies is [Store.Dependencies] of the server.
func (c *Client) Dependencies(digest acproxy.Digest) (needed []Needed, err error) {
	err = c.get("images/"+digest.String()+"/dependencies", &needed)
	return needed, err
}

// ByImageID is [Store.ByImageID] of the server.
func (c *Client) ByImageID(digits string) (records []cache.Record, err error) {
	err = c.get("image-ids/"+digits, &records)
	return records, err
}

// Refusals is [Store.Refusals] of the server.
func (c *Client) Refusals() (refusals []cache.Refused, err error) {
	err = c.get("refusals", &refusals)
	return refusals, err
}

// Missing is [Store.Missing] of the server.
func (c *Client) Missing() (entries []missing.Missed, err error) {
	err = c.get("missing", &entries)
	return entries, err
}

// ForgetMissing is [Store.ForgetMissing] of the server.
func (c *Client) ForgetMissing() error {
	return c.do(context.Background(), http.MethodDelete, "missing", nil)
}

// Usage is [Store.Usage] of the server.
func (c *Client) Usage() (usage cache.Usage, err error) {
	err = c.get("usage", &usage)
	return usage, err
}

// Publishers returns how things are with the hosts that the server asked lately, by name.
func (c *Client) Publishers() (hosts []web.HostState, err error) {
	err = c.get("publishers", &hosts)
	return hosts, err
}

// Flights returns what the server is fetching, the oldest first.
func (c *Client) Flights() (flights []fetch.FlightState, err error) {
	err = c.get("flights", &flights)
	return flights, err
}

// Events returns what has happened at the server, the latest first: at most limit events of these kinds, or of all.
func (c *Client) Events(limit int, kinds ...string) (events []journal.Event, err error) {
	path := "events" + query("limit", int64(limit))
	for i, kind := range kinds {
		if i == 0 {
			path += "&kind="
		} else {
			path += ","
		}
		path += url.QueryEscape(kind)
	}
	err = c.get(path, &events)
	return events, err
}

// Discover has the server ask an image's publisher where it keeps the image and its keys.
func (c *Client) Discover(ctx context.Context, ref acproxy.Ref) (found Discovered, err error) {
	err = c.patient().do(ctx, http.MethodGet, "discover?"+url.Values{"image": {ref.String()}}.Encode(), &found)
	return found, err
}

// PlanEviction is [Store.PlanEviction] of the server.
func (c *Client) PlanEviction(ctx context.Context, target int64) (plan cache.Plan, err error) {
	err = c.do(ctx, http.MethodGet, "gc"+query("target", max(target, -1)), &plan)
	return plan, err
}

// Evict is [Store.Evict] of the server. It may take long, and ends with ctx.
func (c *Client) Evict(ctx context.Context, target int64) (freed cache.Freed, err error) {
	err = c.patient().do(ctx, http.MethodPost, "gc"+query("target", max(target, -1)), &freed)
	return freed, err
}

// Pin is [Store.Pin] of the server.
func (c *Client) Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error {
	method := http.MethodDelete
	if pinned {
		method = http.MethodPut
	}
	return c.do(ctx, method, "images/"+digest.String()+"/pin", nil)
}

// Delete is [Store.Delete] of the server.
func (c *Client) Delete(ctx context.Context, digest acproxy.Digest) error {
	return c.do(ctx, http.MethodDelete, "images/"+digest.String(), nil)
}

// lines reads lines of bounded length.
type lines struct {
	r   *bufio.Reader
	max int
}

func newLines(r io.Reader, longest int) *lines { return &lines{bufio.NewReader(r), longest} }

// next returns a line without its end.
func (l *lines) next() ([]byte, error) {
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > l.max:
			return nil, errors.New("the server sent a line that is too long")
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return nil, err
		}
		return line[:len(line)-1], nil
	}
}
