package page

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/warm"
	"github.com/acproxy/acproxy/internal/web"
)

// How much is shown at once.
const (
	imagesOnPage = 50
	eventsOnPage = 100
	latestEvents = 12
	// Of a long list what failed is looked for among so many results, and so many are shown.
	maxResults    = 10_000
	resultsOnPage = 500
)

// overviewData is what the first page shows. What the client may not see is nil.
type overviewData struct {
	Ranges  []tab
	Traffic *admin.Traffic
	Served  chart
	Usage   *cache.Usage
	Flights []fetch.FlightState
	Down    []web.HostState
	Keys    []admin.Key // that have expired, or will soon
	Files   []admin.KeyProblem
	Latest  []journal.Event
}

// tab is one of several views of the same.
type tab struct {
	Name, Link string
	Current    bool
}

func (p *Page) overview(w http.ResponseWriter, r *http.Request, v admin.View) error {
	name := cmp.Or(r.URL.Query().Get("range"), "hour")
	d := overviewData{Flights: v.Flights(), Latest: v.Events(0, latestEvents, nil)}
	for _, known := range history.Ranges() {
		d.Ranges = append(d.Ranges, tab{known.Name, linkWith("/", nil, "range", known.Name), known.Name == name})
	}
	var err error
	if d.Traffic, err = allowed(v.Traffic(name)); err != nil {
		return err
	}
	if d.Traffic != nil {
		d.Served = trafficChart(*d.Traffic)
	}
	if d.Usage, err = allowed(v.Usage()); err != nil {
		return err
	}
	hosts, err := allowed(v.Publishers())
	if err != nil {
		return err
	}
	if hosts != nil {
		for _, h := range *hosts {
			if h.Open() {
				d.Down = append(d.Down, h)
			}
		}
	}
	keys := v.Keys()
	d.Files = keys.Problems
	for _, k := range keys.Keys {
		if k.Warning != "" {
			d.Keys = append(d.Keys, k)
		}
	}
	return p.show(w, "overview", http.StatusOK, content{Title: "Overview", At: "/", About: v.About(), Live: true, Data: d})
}

// column is a column of images by which they can be sorted.
type column struct {
	Name, Link string
	Sorted     string // ascending or descending, "" if the list isn't sorted by it
}

// imagesData is a page of images.
type imagesData struct {
	Filter  cache.Filter
	State   string
	Columns map[string]column
	Images  []cache.Record
	First   string // the link to the first page, "" if this is it
	Next    string // the link to the next page, "" if this is the last
}

func (p *Page) images(w http.ResponseWriter, r *http.Request, v admin.View) error {
	q := r.URL.Query()
	filter := cache.Filter{
		Prefix: strings.TrimSpace(q.Get("prefix")), Contains: strings.TrimSpace(q.Get("contains")), State: cache.State(q.Get("state")), Pinned: q.Get("pinned") != "",
		Sort: cache.Sort(q.Get("sort")), Reverse: q.Get("reverse") != "",
	}
	d := imagesData{Filter: filter, State: q.Get("state"), Columns: columns(q, filter)}
	var next string
	after := q.Get("after")
	// A page may hold less than it could, for what the client may not know of.
	for {
		images, more, err := v.Images(filter, after, imagesOnPage-len(d.Images))
		if err != nil {
			return err
		}
		d.Images = append(d.Images, images...)
		if next = more; next == "" || len(d.Images) >= imagesOnPage {
			break
		}
		after = next
	}
	if q.Get("after") != "" {
		d.First = linkWith("/images", q, "after", "")
	}
	if next != "" {
		d.Next = linkWith("/images", q, "after", next)
	}
	return p.show(w, "images", http.StatusOK, content{Title: "Images", At: "/images", About: v.About(), Data: d})
}

// columns returns the columns that images can be sorted by: a click sorts by one, another one the other way round. Numbers and times begin with the largest.
func columns(q url.Values, filter cache.Filter) map[string]column {
	out := make(map[string]column)
	for _, c := range []struct {
		name string
		sort cache.Sort
	}{{"Image", cache.ByName}, {"Size", cache.BySize}, {"Fetched", cache.ByFetched}, {"Last used", cache.ByUsed}} {
		reverse, sorted := c.sort != cache.ByName, ""
		if filter.Sort == c.sort {
			reverse, sorted = !filter.Reverse, "ascending"
			if filter.Reverse {
				sorted = "descending"
			}
		}
		set := ""
		if reverse {
			set = "true"
		}
		out[c.name] = column{c.name, linkWith("/images", q, "sort", string(c.sort), "reverse", set, "after", ""), sorted}
	}
	return out
}

// imageData is all that is known of an image.
type imageData struct {
	Image     cache.Record
	Needed    []admin.Needed
	Manifest  string
	Signature string
	MayPin    bool
	MayDelete bool
}

func (p *Page) image(w http.ResponseWriter, v admin.View, id string) error {
	digest, err := acproxy.ParseDigest(id)
	if err != nil {
		return err
	}
	var d imageData
	if d.Image, err = v.Image(digest); err != nil {
		return err
	}
	d.MayPin, d.MayDelete = v.May(access.Pin, d.Image.Name), v.May(access.Delete, d.Image.Name)
	if d.Needed, err = v.Dependencies(digest); err != nil {
		return err
	}
	manifest, err := v.Manifest(digest)
	if err != nil {
		return err
	}
	var indented bytes.Buffer
	if json.Indent(&indented, manifest, "", "  ") != nil {
		// What isn't JSON after all is shown as it is.
		indented.Reset()
		indented.Write(manifest)
	}
	d.Manifest = indented.String()
	return p.show(w, "image", http.StatusOK, content{Title: refText(d.Image), At: "/images", About: v.About(), Data: d})
}

// keyGroup are the keys of a prefix.
type keyGroup struct {
	Prefix string // "" is every name
	Depth  int    // how many of the prefixes cover it
	Keys   []admin.Key
	Masks  []admin.Mask
}

func (p *Page) trust(w http.ResponseWriter, _ *http.Request, v admin.View) error {
	keys := v.Keys()
	groups := make(map[string]*keyGroup)
	of := func(prefix string) *keyGroup {
		if groups[prefix] == nil {
			groups[prefix] = &keyGroup{Prefix: prefix}
		}
		return groups[prefix]
	}
	for _, k := range keys.Keys {
		of(k.Prefix).Keys = append(of(k.Prefix).Keys, k)
	}
	for _, m := range keys.Masks {
		of(m.Prefix).Masks = append(of(m.Prefix).Masks, m)
	}
	var sorted []*keyGroup
	for _, g := range groups {
		for other := range groups {
			if other != g.Prefix && other != "" && acproxy.HasPrefix(g.Prefix, other) {
				g.Depth++
			}
		}
		sorted = append(sorted, g)
	}
	// By segments, so that a prefix stands right before those below it.
	slices.SortFunc(sorted, func(a, b *keyGroup) int {
		return slices.Compare(strings.Split(a.Prefix, "/"), strings.Split(b.Prefix, "/"))
	})
	return p.show(w, "trust", http.StatusOK, content{Title: "Trust", At: "/trust", About: v.About(), Data: struct {
		Groups   []*keyGroup
		Problems []admin.KeyProblem
	}{sorted, keys.Problems}})
}

// publishersData are the hosts, and what a publisher says of an image if that was asked.
type publishersData struct {
	Hosts *[]web.HostState
	Asked string
	Found *admin.Discovered
	Wrong string // why it could not be asked
}

func (p *Page) publishers(w http.ResponseWriter, r *http.Request, v admin.View) error {
	var d publishersData
	var err error
	if d.Hosts, err = allowed(v.Publishers()); err != nil {
		return err
	}
	d.Asked = strings.TrimSpace(r.URL.Query().Get("image"))
	if d.Asked != "" {
		ref, err := acproxy.ParseRef(d.Asked)
		if err == nil {
			var found admin.Discovered
			found, err = v.Discover(r.Context(), ref)
			if !found.Ref.IsZero() {
				d.Found, err = &found, nil
			}
		}
		if err != nil {
			d.Wrong = err.Error()
		}
	}
	return p.show(w, "publishers", http.StatusOK, content{Title: "Publishers", At: "/publishers", About: v.About(), Live: d.Asked == "", Data: d})
}

func (p *Page) refusals(w http.ResponseWriter, r *http.Request, v admin.View) error {
	refusals, err := v.Refusals()
	if err != nil {
		return err
	}
	images, next, err := v.Images(cache.Filter{State: cache.Quarantined}, r.URL.Query().Get("after"), imagesOnPage)
	if err != nil {
		return err
	}
	if next != "" {
		next = linkWith("/refusals", nil, "after", next)
	}
	more := max(0, len(refusals)-eventsOnPage)
	return p.show(w, "refusals", http.StatusOK, content{Title: "Refusals", At: "/refusals", About: v.About(), Live: next == "" && r.URL.RawQuery == "", Data: struct {
		Refusals    []cache.Refused
		More        int
		Quarantined []cache.Record
		Next        string
	}{refusals[:len(refusals)-more], more, images, next}})
}

// warmingData are lists of images, and what nodes could not get.
type warmingData struct {
	Jobs    []warm.Job
	Missing []missing.Missed
	More    int // that are missing, beside those
}

func (p *Page) warming(w http.ResponseWriter, _ *http.Request, v admin.View) error {
	lacking, err := v.Missing()
	if err != nil {
		return err
	}
	d := warmingData{Jobs: v.WarmJobs(), Missing: lacking[:min(len(lacking), eventsOnPage)], More: max(0, len(lacking)-eventsOnPage)}
	return p.show(w, "warming", http.StatusOK, content{Title: "Warming", At: "/warming", About: v.About(), Live: true, Data: d})
}

// jobData is a list of images, and what became of them.
type jobData struct {
	Job       warm.Job
	Results   []warm.Result // those that failed first
	More      int           // results beside those
	MayCancel bool
}

func (p *Page) job(w http.ResponseWriter, r *http.Request, v admin.View, id string) error {
	progress, err := v.WarmProgress(r.Context(), id, 0, maxResults, 0)
	if err != nil {
		return err
	}
	d := jobData{Job: progress.Job, Results: progress.Results, MayCancel: !progress.Job.Finished() && v.MayCancelWarm(id) == nil}
	slices.SortStableFunc(d.Results, func(a, b warm.Result) int {
		return cmp.Compare(failedFirst(a), failedFirst(b))
	})
	known := d.Job.Held + d.Job.Fetched + d.Job.Would + d.Job.Failed
	d.Results = d.Results[:min(len(d.Results), resultsOnPage)]
	d.More = max(0, known-len(d.Results))
	return p.show(w, "job", http.StatusOK, content{Title: cmp.Or(d.Job.Name, "List "+d.Job.ID), At: "/warming", About: v.About(), Live: !d.Job.Finished(), Data: d})
}

func failedFirst(r warm.Result) int {
	if r.Outcome == warm.Failed {
		return 0
	}
	return 1
}

// kinds are those that events can be chosen by, in groups that somebody looks for.
func kinds() []string {
	return []string{
		fetch.EventAccepted, fetch.EventRefused, fetch.EventQuarantined, fetch.EventRestored, fetch.EventInspected, fetch.EventPassed, fetch.EventEvicted, fetch.EventDamaged,
		journal.EventPinned, journal.EventUnpinned, journal.EventDeleted, journal.EventWarmed, journal.EventPublisherDown, journal.EventPublisherUp, journal.EventKeysChanged, journal.EventReloaded,
		journal.EventReloadFailed, journal.EventStarted,
	}
}

func (p *Page) events(w http.ResponseWriter, r *http.Request, v admin.View) error {
	q := r.URL.Query()
	before, err := strconv.ParseInt(cmp.Or(q.Get("before"), "0"), 10, 64)
	if err != nil || before < 0 {
		return acproxy.Invalid("%.40q is not the ID of an event", q.Get("before"))
	}
	chosen := slices.DeleteFunc(slices.Clone(q["kind"]), func(kind string) bool { return kind == "" })
	events := v.Events(before, eventsOnPage, chosen)
	next := ""
	if len(events) == eventsOnPage {
		next = linkWith("/events", q, "before", fmt.Sprint(events[len(events)-1].ID))
	}
	first := ""
	if before > 0 {
		first = linkWith("/events", q, "before", "")
	}
	return p.show(w, "events", http.StatusOK, content{Title: "Events", At: "/events", About: v.About(), Live: before == 0, Data: struct {
		Events      []journal.Event
		Kinds       []string
		Chosen      []string
		First, Next string
	}{events, kinds(), chosen, first, next}})
}

func (p *Page) config(w http.ResponseWriter, _ *http.Request, v admin.View) error {
	text, err := v.Config()
	if err != nil {
		return err
	}
	return p.show(w, "config", http.StatusOK, content{Title: "Configuration", At: "/config", About: v.About(), Data: string(text)})
}

func refText(rec cache.Record) string {
	ref, err := acproxy.NewRef(rec.Name, rec.Labels)
	if err != nil {
		return rec.Name
	}
	return ref.String()
}

func ago(now, t time.Time) string {
	switch age := now.Sub(t); {
	case t.IsZero():
		return "never"
	case age < time.Minute:
		return "just now"
	case age < time.Hour:
		return fmt.Sprintf("%d min ago", int(age.Minutes()))
	case age < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(age.Hours()))
	default:
		return fmt.Sprintf("%d days ago", int(age.Hours()/24))
	}
}
