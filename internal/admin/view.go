package admin

import (
	"context"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/web"
)

// A View is what one client may see and do of a server. The API and the page for operators are made from it, so that both decide alike. Its errors say that the
// client has to show who it is, or may not, or what went wrong.
type View struct {
	s   *Server
	who caller
}

// caller is who asks.
type caller struct {
	access.Identity
	socket bool // by the socket: whoever may open it may do everything
}

// socketClient is what clients that came by the socket are called.
const socketClient = "admin.socket"

func (c caller) name() string {
	if c.socket {
		return socketClient
	}
	return c.Name
}

type callerKey struct{}

// ViewOf returns what the client of a request that reached a [Server] may see and do.
func (s *Server) ViewOf(ctx context.Context) View {
	who, _ := ctx.Value(callerKey{}).(caller) // who isn't known may do the least
	return View{s, who}
}

// askedBy returns who asks, for what is written down of what he did. Without a server that is who runs a command.
func askedBy(ctx context.Context) string {
	if who, ok := ctx.Value(callerKey{}).(caller); ok {
		return who.name()
	}
	return "command"
}

// Name returns who the client is, "" for nobody in particular.
func (v View) Name() string { return v.who.name() }

// Open reports whether there are no rules about who may do what, so that everybody may look.
func (v View) Open() bool { return v.s.o.Guard == nil || v.s.o.Guard.Open() }

// May reports whether the client has a right to the images of a name, or, with "", to the server as a whole.
func (v View) May(right access.Right, name string) bool {
	return v.who.socket || v.s.o.Guard != nil && v.s.o.Guard.May(v.who.Identity, right, name)
}

// looks reports whether the client may see what is about the server as a whole: who administers it may, and everybody if nobody has said who may what.
func (v View) looks() bool { return v.May(access.Admin, "") || v.Open() }

func (v View) reads(name string) bool { return v.May(access.Read, name) || v.Open() }

// refuse returns why a client may not do something.
func (v View) refuse(what string) error {
	switch {
	case v.Open():
		return &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "not-allowed",
			Detail: "nobody may " + what + " here, because no rule of access.rules says who may: write one, or use acproxy's commands on the server's own machine",
		}
	case v.who.Name == "":
		return problem.WithStatus(http.StatusUnauthorized, &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "credentials-needed", Detail: "who wants to " + what + " has to show who it is",
		})
	}
	return &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-allowed", Detail: v.who.Name + " may not " + what + ": no rule of access.rules says so"}
}

// administer returns why the client may not change something about the server as a whole, nil if it may.
func (v View) administer(what string) error {
	if v.May(access.Admin, "") {
		return nil
	}
	return v.refuse(what)
}

// look returns why the client may not see what is about the server as a whole, nil if it may.
func (v View) look(what string) error {
	if v.looks() {
		return nil
	}
	return v.refuse(what)
}

// Images lists images: of a page those that the client may know of, so that one may be short, or empty, and not be the last.
func (v View) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	records, next, err := v.s.o.Store.Images(filter, after, limit)
	return v.readable(records), next, err
}

// readable leaves out what the client may not know of, and what is of no use outside.
func (v View) readable(records []cache.Record) []cache.Record {
	out := make([]cache.Record, 0, len(records))
	for _, rec := range records {
		if v.reads(rec.Name) {
			rec.Hashed = ""
			out = append(out, rec)
		}
	}
	return out
}

// Image returns one image.
func (v View) Image(digest acproxy.Digest) (cache.Record, error) {
	rec, err := v.s.o.Store.Record(digest)
	if err == nil && !v.reads(rec.Name) {
		// That it is here is for those who may have it.
		err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "not-held", Detail: "no image with digest " + digest.String() + " is held"}
	}
	if err != nil {
		return cache.Record{}, err
	}
	rec.Hashed = ""
	return rec, nil
}

// ByImageID returns the images whose ID begins with some hex digits.
func (v View) ByImageID(digits string) ([]cache.Record, error) {
	records, err := v.s.o.Store.ByImageID(digits)
	return v.readable(records), err
}

// Manifest returns an image's manifest as it is in the image.
func (v View) Manifest(digest acproxy.Digest) ([]byte, error) {
	if _, err := v.Image(digest); err != nil {
		return nil, err
	}
	return v.s.o.Store.Manifest(digest)
}

// Signature returns an image's signature as it was published.
func (v View) Signature(digest acproxy.Digest) ([]byte, error) {
	if _, err := v.Image(digest); err != nil {
		return nil, err
	}
	return v.s.o.Store.Signature(digest)
}

// Blob opens the bytes of an image. The caller closes them. One that is quarantined is refused: no unverified byte leaves here.
func (v View) Blob(digest acproxy.Digest) (io.ReadSeekCloser, cache.Record, error) {
	rec, err := v.Image(digest)
	if err == nil && rec.State == cache.Quarantined {
		err = &acproxy.Error{Kind: acproxy.ErrRefused, Code: "quarantined", Detail: "the image " + digest.String() + " may not be served: " + rec.Reason}
	}
	if err != nil {
		return nil, rec, err
	}
	blob, err := v.s.o.Store.Blob(digest)
	return blob, rec, err
}

// Dependencies returns what an image needs. What the client may not know of counts as not held.
func (v View) Dependencies(digest acproxy.Digest) ([]Needed, error) {
	if _, err := v.Image(digest); err != nil {
		return nil, err
	}
	needed, err := v.s.o.Store.Dependencies(digest)
	return v.known(needed), err
}

func (v View) known(needed []Needed) []Needed {
	out := make([]Needed, 0, len(needed))
	for _, n := range needed {
		if !v.reads(n.Name) {
			n.Held, n.Dependencies, n.Cycle, n.More = nil, nil, false, false
		}
		if n.Held != nil {
			rec := *n.Held
			rec.Hashed = ""
			n.Held = &rec
		}
		if n.Dependencies != nil {
			n.Dependencies = v.known(n.Dependencies)
		}
		out = append(out, n)
	}
	return out
}

// Pin keeps an image from being evicted, or lets it be again.
func (v View) Pin(ctx context.Context, digest acproxy.Digest, pinned bool) (cache.Record, error) {
	rec, err := v.Image(digest)
	if err == nil && !v.May(access.Pin, rec.Name) {
		err = v.refuse("pin images of " + rec.Name)
	}
	if err == nil {
		err = v.s.o.Store.Pin(ctx, digest, pinned)
	}
	if err != nil {
		return cache.Record{}, err
	}
	return v.Image(digest)
}

// Delete removes an image.
func (v View) Delete(ctx context.Context, digest acproxy.Digest) error {
	rec, err := v.Image(digest)
	if err == nil && !v.May(access.Delete, rec.Name) {
		err = v.refuse("delete images of " + rec.Name)
	}
	if err != nil {
		return err
	}
	return v.s.o.Store.Delete(ctx, digest)
}

// Flights returns the flights in progress, the oldest first.
func (v View) Flights() []fetch.FlightState {
	out := []fetch.FlightState{}
	for _, fl := range v.s.o.Flights() {
		if v.reads(fl.Ref.Name()) {
			if !v.looks() {
				fl.Client = "" // who else is there is not for everybody
			}
			out = append(out, fl)
		}
	}
	return out
}

// Publishers returns how things are with the hosts that were asked lately, by name.
func (v View) Publishers() ([]web.HostState, error) {
	if err := v.look("see the publishers"); err != nil {
		return nil, err
	}
	return append([]web.HostState{}, v.s.o.Publishers()...), nil
}

// Keys returns the trusted keys. They are for everybody, as for nodes.
func (v View) Keys() Keys { return ListKeys(v.s.o.Keyring(), v.s.o.Now()) }

// ReloadKeys has the server read the trusted keys again.
func (v View) ReloadKeys() error {
	if err := v.administer("have the keys read again"); err != nil {
		return err
	}
	v.s.o.ReloadKeys()
	return nil
}

// Refusals returns the images that were refused, the latest first.
func (v View) Refusals() ([]cache.Refused, error) {
	refusals, err := v.s.o.Store.Refusals()
	out := []cache.Refused{}
	for _, r := range refusals {
		if v.reads(r.Ref.Name()) {
			out = append(out, r)
		}
	}
	return out, err
}

// Missing returns what nodes asked for and could not get because it isn't held.
func (v View) Missing() ([]missing.Missed, error) {
	entries, err := v.s.o.Store.Missing()
	out := []missing.Missed{}
	for _, e := range entries {
		if v.reads(e.Ref.Name()) {
			out = append(out, e)
		}
	}
	return out, err
}

// ForgetMissing forgets all that.
func (v View) ForgetMissing() error {
	if err := v.administer("forget what is missing"); err != nil {
		return err
	}
	return v.s.o.Store.ForgetMissing()
}

// Usage returns the space that the store takes.
func (v View) Usage() (cache.Usage, error) {
	if err := v.look("see how much space is taken"); err != nil {
		return cache.Usage{}, err
	}
	return v.s.o.Store.Usage()
}

// PlanEviction says what an eviction would do.
func (v View) PlanEviction(ctx context.Context, target int64) (cache.Plan, error) {
	if err := v.look("see what would be evicted"); err != nil {
		return cache.Plan{}, err
	}
	plan, err := v.s.o.Store.PlanEviction(ctx, target)
	plan.Evict, plan.Kept = slices.Clone(plan.Evict), slices.Clone(plan.Kept)
	for i := range plan.Evict {
		plan.Evict[i].Record = withoutHashes(plan.Evict[i].Record)
	}
	for i := range plan.Kept {
		plan.Kept[i].Record.Hashed = ""
	}
	return plan, err
}

// Evict evicts images to come down to a number of bytes.
func (v View) Evict(ctx context.Context, target int64) (cache.Freed, error) {
	if err := v.administer("evict images"); err != nil {
		return cache.Freed{}, err
	}
	freed, err := v.s.o.Store.Evict(ctx, target)
	for i := range freed.Evicted {
		freed.Evicted[i].Record = withoutHashes(freed.Evicted[i].Record)
	}
	return freed, err
}

func withoutHashes(rec *cache.Record) *cache.Record {
	if rec == nil {
		return nil
	}
	plain := *rec
	plain.Hashed = ""
	return &plain
}

// Scrub reads all images, and repairs what it can.
func (v View) Scrub(ctx context.Context, o cache.ScrubOptions) (cache.Scrubbed, error) {
	if err := v.administer("have all images read"); err != nil {
		return cache.Scrubbed{}, err
	}
	return v.s.o.Store.Scrub(ctx, o)
}

// shows reports whether the client may know of an event.
func (v View) shows(e journal.Event) bool {
	if e.Ref.IsZero() {
		return v.looks()
	}
	return v.reads(e.Ref.Name())
}

// shown leaves out of an event what isn't for the client.
func (v View) shown(e journal.Event) journal.Event {
	if !v.looks() {
		e.Client = ""
	}
	return e
}

// Events returns what has happened, the latest first: events with smaller IDs, at most limit, of these kinds, or all of them. With 0 it begins with the latest.
func (v View) Events(before int64, limit int, kinds []string) []journal.Event {
	events := v.s.o.Journal.Before(before, limit, func(e journal.Event) bool {
		return (len(kinds) == 0 || slices.Contains(kinds, e.Event)) && v.shows(e)
	})
	for i := range events {
		events[i] = v.shown(events[i])
	}
	return events
}

// EventsAfter waits until there are events with greater IDs, and returns them, the oldest first. It returns none if those that there are, up to the ID that it
// returns, aren't for the client. The error is ctx's.
func (v View) EventsAfter(ctx context.Context, id int64) (events []journal.Event, last int64, err error) {
	all, err := v.s.o.Journal.After(ctx, id)
	if err != nil {
		return nil, id, err
	}
	for _, e := range all {
		if last = e.ID; v.shows(e) {
			events = append(events, v.shown(e))
		}
	}
	return events, last, nil
}

// A Traffic is what was served and fetched in a span of time.
type Traffic struct {
	Range  string          `json:"range"` // hour, day or week
	Part   float64         `json:"part"`  // seconds that each point stands for
	Sum    history.Totals  `json:"sum"`
	Points []history.Point `json:"points"`
}

// Traffic returns what was served and fetched.
func (v View) Traffic(name string) (Traffic, error) {
	if err := v.look("see what was served"); err != nil {
		return Traffic{}, err
	}
	for _, r := range history.Ranges() {
		if r.Name == name {
			points, sum := v.s.o.History.Points(r, v.s.o.Now())
			return Traffic{r.Name, r.Part.Seconds(), sum, points}, nil
		}
	}
	return Traffic{}, acproxy.Invalid("%.32q is no range: ask for hour, day or week", name)
}

// Config returns the configuration that counts, without secrets, as YAML.
func (v View) Config() ([]byte, error) {
	if err := v.look("see the configuration"); err != nil {
		return nil, err
	}
	return v.s.o.Config()
}

// Reload has the server read its configuration and all that it names again, and returns what of it has changed. After an error nothing has.
func (v View) Reload() ([]Change, error) {
	if err := v.administer("reload"); err != nil {
		return nil, err
	}
	return v.s.o.Reload()
}

// Discover asks an image's publisher where it keeps the image and its keys. What was found is returned with an error, too.
func (v View) Discover(ctx context.Context, ref acproxy.Ref) (Discovered, error) {
	if !v.reads(ref.Name()) {
		return Discovered{}, v.refuse("ask for images of " + ref.Name())
	}
	return v.s.o.Discover(discovery.For(ctx, v.who.name()), ref)
}

// About says which server this is, and how it is.
type About struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Offline bool      `json:"offline"` // it dials nobody
	Ready   bool      `json:"ready"`   // it can do all of its work
	Why     string    `json:"why"`     // why not; "" if it can
	Client  string    `json:"client"`  // who asks, as far as it has shown that
}

// About returns which server this is, and how it is.
func (v View) About() About {
	a := About{Version: v.s.o.Version, Started: v.s.o.Started, Offline: v.s.o.Offline != nil && v.s.o.Offline(), Ready: true, Client: v.who.name()}
	if err := v.s.o.Ready(); err != nil {
		a.Ready, a.Why = false, err.Error()
	}
	return a
}
