// Package admin lets acproxy's own commands look into a running server, over a unix socket.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/web"
)

// A Store is what is looked into: an open store, or, through a [Client], that of a running server.
type Store interface {
	// Images returns held images in the order of names, at most limit, those after the place that the call before returned ("" begins). The
	// next place is "" at the end.
	Images(filter cache.Filter, after string, limit int) (images []cache.Record, next string, err error)
	// Record returns one image by its digest, or an error matching [acproxy.ErrNotFound].
	Record(digest acproxy.Digest) (cache.Record, error)
	// Manifest returns an image's manifest as it is in the image.
	Manifest(digest acproxy.Digest) ([]byte, error)
	// ByImageID returns the images whose ID begins with some hex digits.
	ByImageID(digits string) ([]cache.Record, error)
	// Refusals returns the images that were refused, the latest first.
	Refusals() ([]cache.Refused, error)
	// Usage returns the space that the store takes.
	Usage() (cache.Usage, error)
	// PlanEviction says what would be evicted to come down to a number of bytes on the disk, and what not and why; less than 0 means the low
	// watermark.
	PlanEviction(ctx context.Context, target int64) (cache.Plan, error)
	// Evict evicts that.
	Evict(ctx context.Context, target int64) (cache.Freed, error)
	// Pin keeps an image from being evicted, or lets it be again. It returns an error matching [acproxy.ErrNotFound] if it isn't held.
	Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error
	// Scrub reads all images, and repairs what it can. It returns what it has come to when ctx ends it, too.
	Scrub(ctx context.Context, o cache.ScrubOptions) (cache.Scrubbed, error)
}

var (
	_ Store = Judged{}
	_ Store = (*Client)(nil)
)

// Judged is an open store whose images have the state that keys and policies give them now.
type Judged struct {
	*cache.Disk
	Judge func(cache.Record) cache.Record
}

// Images is [cache.Disk.Images]. A filter by state goes by the state now.
func (j Judged) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	state := filter.State
	filter.State = ""
	records, next, err := j.Disk.Images(filter, after, limit)
	records = j.judge(records)
	if state != "" {
		records = slices.DeleteFunc(records, func(rec cache.Record) bool { return rec.State != state })
	}
	return records, next, err
}

// Record is [cache.Disk.Record].
func (j Judged) Record(digest acproxy.Digest) (cache.Record, error) {
	rec, err := j.Disk.Record(digest)
	if err != nil {
		return rec, err
	}
	return j.Judge(rec), nil
}

// ByImageID is [cache.Disk.ByImageID].
func (j Judged) ByImageID(digits string) ([]cache.Record, error) {
	records, err := j.Disk.ByImageID(digits)
	return j.judge(records), err
}

// Pin implements [Store].
func (j Judged) Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error {
	return j.Update(ctx, digest, func(rec *cache.Record) error {
		rec.Pinned = pinned
		return nil
	})
}

func (j Judged) judge(records []cache.Record) []cache.Record {
	for i, rec := range records {
		records[i] = j.Judge(rec)
	}
	return records
}

// maxPage bounds one listing.
const maxPage = 1000

// A Server answers on a unix socket. Who may open the socket may ask: it is there for the user that the server runs as.
type Server struct {
	http    *http.Server
	serving sync.WaitGroup
}

// Options is what a Server gives access to.
type Options struct {
	Store   Store
	Metrics http.Handler
	// ReloadKeys reads the trusted keys again, now.
	ReloadKeys func()
	// Reload reads the configuration and all that it names again, and returns what of it has changed.
	Reload func() ([]Change, error)
	// Publishers returns how things are with the hosts that were asked lately.
	Publishers func() []web.HostState
	// Ready returns why the server can't do all of its work, nil if it can.
	Ready func() error
	Log   *slog.Logger
}

// Listen answers on a unix socket at path, replacing a socket that a killed server left. Close ends it.
func Listen(path string, o Options) (*Server, error) {
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("another server answers on %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	s := &Server{http: &http.Server{Handler: handler(o), ReadHeaderTimeout: 5 * time.Second}}
	// Ends when Close closes the server, which waits for it.
	s.serving.Go(func() {
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			o.Log.Error("the admin socket doesn't answer any more", "socket", path, "err", err)
		}
	})
	return s, nil
}

// Close ends the server and removes the socket.
func (s *Server) Close() error {
	err := s.http.Close()
	s.serving.Wait()
	return err
}

// A Change is a key of the configuration that has another value since.
type Change struct {
	Key     string `json:"key"`
	Before  string `json:"before"`
	After   string `json:"after"`
	Restart bool   `json:"restart"` // it takes effect with the next start only
}

const api = "/api/v1/"

type page struct {
	Images []cache.Record `json:"images"`
	Next   string         `json:"next,omitempty"`
}

func handler(o Options) http.Handler {
	store := o.Store
	router := mux.NewRouter()
	router.Path("/metrics").Methods(http.MethodGet).Handler(o.Metrics)
	// Profiles show addresses, file names and what is in memory: they are for the user that the server runs as, and never for a listener.
	router.Path("/debug/pprof/profile").Methods(http.MethodGet).HandlerFunc(pprof.Profile)
	router.Path("/debug/pprof/trace").Methods(http.MethodGet).HandlerFunc(pprof.Trace)
	router.PathPrefix("/debug/pprof/").Methods(http.MethodGet).HandlerFunc(pprof.Index)
	router.Path(api + "keys/reload").Methods(http.MethodPost).HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		o.ReloadKeys()
		w.WriteHeader(http.StatusNoContent)
	})
	handle := func(method, path string, answer func(r *http.Request) (any, error)) {
		router.Path(api + path).Methods(method).HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			value, err := answer(r)
			w.Header().Set("Content-Type", "application/json")
			if err != nil {
				w.WriteHeader(status(err))
				value = failure{Code: acproxy.Code(err), Detail: err.Error()}
			}
			// A client that has left can't be told anything.
			_ = json.NewEncoder(w).Encode(value)
		})
	}
	handle(http.MethodPost, "reload", func(*http.Request) (any, error) { return o.Reload() })
	get := func(path string, answer func(r *http.Request) (any, error)) { handle(http.MethodGet, path, answer) }
	get("images", func(r *http.Request) (any, error) {
		q := r.URL.Query()
		limit, err := strconv.Atoi(q.Get("limit"))
		if err != nil || limit < 1 || limit > maxPage {
			return nil, acproxy.Invalid("limit %q is not a number from 1 to %d", q.Get("limit"), maxPage)
		}
		images, next, err := store.Images(cache.Filter{Prefix: q.Get("prefix"), State: cache.State(q.Get("state"))}, q.Get("after"), limit)
		return page{images, next}, err
	})
	get("images/{digest}", func(r *http.Request) (any, error) {
		digest, err := acproxy.ParseDigest(mux.Vars(r)["digest"])
		if err != nil {
			return nil, err
		}
		return store.Record(digest)
	})
	get("images/{digest}/manifest", func(r *http.Request) (any, error) {
		digest, err := acproxy.ParseDigest(mux.Vars(r)["digest"])
		if err != nil {
			return nil, err
		}
		manifest, err := store.Manifest(digest)
		return json.RawMessage(manifest), err
	})
	get("image-ids/{digits}", func(r *http.Request) (any, error) { return store.ByImageID(mux.Vars(r)["digits"]) })
	get("refusals", func(*http.Request) (any, error) { return store.Refusals() })
	get("ready", func(*http.Request) (any, error) { return struct{}{}, o.Ready() })
	get("publishers", func(*http.Request) (any, error) { return o.Publishers(), nil })
	get("usage", func(*http.Request) (any, error) { return store.Usage() })
	get("gc", func(r *http.Request) (any, error) {
		target, err := targetOf(r)
		if err != nil {
			return nil, err
		}
		return store.PlanEviction(r.Context(), target)
	})
	handle(http.MethodPost, "gc", func(r *http.Request) (any, error) {
		target, err := targetOf(r)
		if err != nil {
			return nil, err
		}
		return store.Evict(r.Context(), target)
	})
	router.Path(api + "scrub").Methods(http.MethodPost).HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveScrub(w, r, store) })
	for method, pinned := range map[string]bool{http.MethodPut: true, http.MethodDelete: false} {
		handle(method, "images/{digest}/pin", func(r *http.Request) (any, error) {
			digest, err := acproxy.ParseDigest(mux.Vars(r)["digest"])
			if err != nil {
				return nil, err
			}
			if err := store.Pin(r.Context(), digest, pinned); err != nil {
				return nil, err
			}
			return store.Record(digest)
		})
	}
	return router
}

// targetOf reads the bytes that a request wants the store to come down to.
func targetOf(r *http.Request) (int64, error) {
	text := r.URL.Query().Get("target")
	if text == "" {
		return -1, nil
	}
	target, err := strconv.ParseInt(text, 10, 64)
	if err != nil || target < 0 {
		return 0, acproxy.Invalid("target %.32q is not a number of bytes", text)
	}
	return target, nil
}

type failure struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

func status(err error) int {
	switch acproxy.KindOf(err) {
	case acproxy.ErrNotFound:
		return http.StatusNotFound
	case acproxy.ErrInvalid:
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// A Client asks a running server.
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

func (c *Client) get(path string, value any) error {
	return c.do(context.Background(), http.MethodGet, path, value)
}

// do asks for something and reads the answer into value.
func (c *Client) do(ctx context.Context, method, path string, value any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://acproxy"+api+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := json.NewDecoder(resp.Body).Decode(&f); err != nil {
			return fmt.Errorf("the server answered %s", resp.Status)
		}
		kind := map[int]error{http.StatusNotFound: acproxy.ErrNotFound, http.StatusBadRequest: acproxy.ErrInvalid}[resp.StatusCode]
		return &acproxy.Error{Kind: kind, Code: f.Code, Detail: f.Detail}
	}
	return json.NewDecoder(resp.Body).Decode(value)
}

// Ready returns why the server can't do all of its work, nil if it can.
func (c *Client) Ready() error {
	var nothing struct{}
	return c.get("ready", &nothing)
}

// Reload has the server read its configuration and all that it names again, and returns what of it has changed. After an error nothing has.
func (c *Client) Reload() (changes []Change, err error) {
	err = c.do(context.Background(), http.MethodPost, "reload", &changes)
	return changes, err
}

// ReloadKeys has the server read the trusted keys again. When it returns, the server decides by them.
func (c *Client) ReloadKeys() error {
	resp, err := c.http.Post("http://acproxy"+api+"keys/reload", "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("the server answered %s", resp.Status)
	}
	return nil
}

// Images is [Store.Images] of the server.
func (c *Client) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	var p page
	query := url.Values{"prefix": {filter.Prefix}, "state": {string(filter.State)}, "after": {after}, "limit": {strconv.Itoa(limit)}}
	err := c.get("images?"+query.Encode(), &p)
	return p.Images, p.Next, err
}

// Record is [Store.Record] of the server.
func (c *Client) Record(digest acproxy.Digest) (rec cache.Record, err error) {
	err = c.get("images/"+digest.String(), &rec)
	return rec, err
}

// Manifest is [Store.Manifest] of the server.
func (c *Client) Manifest(digest acproxy.Digest) ([]byte, error) {
	var raw json.RawMessage
	err := c.get("images/"+digest.String()+"/manifest", &raw)
	return raw, err
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

// PlanEviction is [Store.PlanEviction] of the server.
func (c *Client) PlanEviction(ctx context.Context, target int64) (plan cache.Plan, err error) {
	err = c.do(ctx, http.MethodGet, "gc"+targetQuery(target), &plan)
	return plan, err
}

// Evict is [Store.Evict] of the server. It may take long, and ends with ctx.
func (c *Client) Evict(ctx context.Context, target int64) (freed cache.Freed, err error) {
	patient := Client{&http.Client{Transport: c.http.Transport}}
	err = patient.do(ctx, http.MethodPost, "gc"+targetQuery(target), &freed)
	return freed, err
}

func targetQuery(target int64) string {
	if target < 0 {
		return ""
	}
	return "?target=" + strconv.FormatInt(target, 10)
}

// Pin is [Store.Pin] of the server.
func (c *Client) Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error {
	method := http.MethodDelete
	if pinned {
		method = http.MethodPut
	}
	var rec cache.Record
	return c.do(ctx, method, "images/"+digest.String()+"/pin", &rec)
}
