package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/internal/web"
)

func newReload(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Have the running server read configuration, keys, users, tokens and certificates again",
		Long: `reload has the running server read its configuration again, as SIGHUP does, with all that it names: trusted keys, users, tokens, certificates, credentials.
If something of it is wrong, nothing changes, and it says what. What has changed is printed. These keys take effect at once:

` + inLines(reloadable(), 100) + `

Of others it says that they need a restart. Requests and downloads in progress go on by what they began with, but for trust: what is held, and what arrives,
is judged by the policies of the moment. With offline nobody is dialled any more.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			client, err := admin.Dial(cfg.Admin.Socket)
			if err != nil {
				return err
			}
			changes, err := client.Reload()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), changes)
			}
			p := newPrinter(cmd.OutOrStdout())
			for _, c := range changes {
				p.printf("%s\n", changeText(c))
			}
			p.printf("reloaded, %s of the configuration\n", count(len(changes), "change"))
			return p.err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// inLines writes words in lines of about so many bytes, each two spaces in.
func inLines(words []string, width int) string {
	var lines []string
	line := " "
	for i, word := range words {
		if len(line)+len(word) > width {
			lines, line = append(lines, line), " "
		}
		line += " " + word
		if i < len(words)-1 {
			line += ","
		}
	}
	return strings.Join(append(lines, line), "\n")
}

// changeText is a change on one line.
func changeText(c admin.Change) string {
	text := fmt.Sprintf("%s: %s → %s", c.Key, c.Before, c.After)
	if c.Restart {
		text += " (needs a restart)"
	}
	return text
}

// A preparer reads files again, without having them count before it is told so.
type preparer interface {
	Prepare() (commit func(), err error)
}

// reloader reads everything again that a running server can. It is safe for concurrent use.
type reloader struct {
	load  func() (*config.Config, error)
	n     *running
	level *slog.LevelVar // of the log

	mu  sync.Mutex
	cfg *config.Config // as it was when the server started, but for what was reloaded since
}

// reloadable returns the keys of the configuration that take effect without a restart: whatever rests on them is told of them by reload.
func reloadable() []string {
	return []string{
		"access.rules", "access.users_file", "allow",
		"cache.evict_last_copies", "cache.grace", "cache.high", "cache.low", "cache.max_size", "cache.min_free", "cache.on_full",
		"clients.burst", "clients.rate", "credentials.hosts", "credentials.rkt_dirs",
		"dial.allow", "dial.connect_timeout", "dial.hosts", "dial.max_redirects", "dial.resolver", "dial.stall_timeout", "dial.timeout", "dial.user_agent",
		"fetch.delivery", "freshness.jitter", "freshness.max_age", "freshness.max_stale", "freshness.on_change", "freshness.ttl", "log.level", "offline", "publishers",
		"trust.expired", "trust.legacy", "trust.publish", "trust.signature", "trust.threshold",
	}
}

// needsRestart reports whether a key is none of these, nor of what is in one of them.
func needsRestart(key string) bool {
	list, _, _ := strings.Cut(key, "[")
	return !slices.Contains(reloadable(), list)
}

// take takes the values of these keys over from another configuration.
func take(to, from *config.Config) {
	to.Access.Rules, to.Access.UsersFile = from.Access.Rules, from.Access.UsersFile
	to.Allow = from.Allow
	access, partials := to.Cache.AccessFlush, to.Cache.KeepPartials
	to.Cache = from.Cache
	to.Cache.AccessFlush, to.Cache.KeepPartials = access, partials
	to.Clients.Burst, to.Clients.Rate = from.Clients.Burst, from.Clients.Rate
	to.Credentials = from.Credentials
	dial := from.Dial
	// How each host is spared is remembered with it.
	dial.MaxConnections, dial.Rate, dial.Burst, dial.MaxRetryAfter, dial.Breaker = to.Dial.MaxConnections, to.Dial.Rate, to.Dial.Burst, to.Dial.MaxRetryAfter, to.Dial.Breaker
	to.Dial = dial
	to.Fetch.Delivery = from.Fetch.Delivery
	to.Freshness = from.Freshness
	to.Log.Level = from.Log.Level
	to.Offline = from.Offline
	to.Publishers = from.Publishers
	system, local := to.Trust.SystemDir, to.Trust.LocalDir
	to.Trust = from.Trust
	to.Trust.SystemDir, to.Trust.LocalDir = system, local
}

// current returns the configuration that counts.
func (r *reloader) current() *config.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg
}

// reload reads everything again: all of it takes effect, or nothing does.
func (r *reloader) reload() ([]admin.Change, error) {
	changes, err := r.readAgain()
	switch {
	case err != nil:
		r.n.parts.happened(journal.EventReloadFailed, err.Error())
	case len(changes) == 0:
		r.n.parts.happened(journal.EventReloaded, "nothing of the configuration has changed")
	default:
		var keys []string
		for _, c := range changes {
			keys = append(keys, c.Key+orNothing(c.Restart, " (needs a restart)"))
		}
		r.n.parts.happened(journal.EventReloaded, "changed: "+strings.Join(keys, ", "))
	}
	return changes, err
}

func (r *reloader) readAgain() ([]admin.Change, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cfg, err := r.load()
	if err != nil {
		return nil, err
	}
	changes := differences(r.cfg, cfg)
	for i := range changes {
		changes[i].Restart = needsRestart(changes[i].Key)
	}
	next := *r.cfg
	take(&next, cfg)
	ready, err := r.prepare(&next)
	if err != nil {
		return nil, err
	}
	ready()
	r.cfg = &next
	return changes, nil
}

// prepare does all of a reload that can fail, and returns what does the rest of it.
func (r *reloader) prepare(next *config.Config) (commit func(), err error) {
	// What was read fits together. What of it counts now, and what else counts until a restart, may not.
	if err := next.Validate(); err != nil {
		return nil, fmt.Errorf("what takes effect without a restart doesn't go with what needs one: restart the server, or change less: %w", err)
	}
	p := r.n.parts
	var level slog.Level
	if err := level.UnmarshalText([]byte(next.Log.Level)); err != nil {
		return nil, err
	}
	guard, err := guardConfig(next, p.log)
	if err != nil {
		return nil, err
	}
	shown, err := newCredentials(next, p.log)
	if err != nil {
		return nil, err
	}
	publishers, err := webConfig(next, p.via, shown)
	if err != nil {
		return nil, err
	}
	var certificates []func()
	for _, files := range r.n.certificates {
		certificate, err := files.Prepare()
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, certificate)
	}
	now := r.cfg
	return func() {
		for _, certificate := range certificates {
			certificate()
		}
		p.guard.Change(guard)
		// How publishers are reached comes before what is asked of them: whoever is asked by the new policies is asked in the new way. Connections are begun
		// anew each time, as the files of certificate authorities and credentials may be others.
		p.web.Change(publishers)
		// So are pages asked for anew, whose publishers may be reached in another way.
		p.finder.SetRules(discoveryRules(next))
		p.fetcher.Change(fetchSettings(next))
		p.store.SetQuota(quota(next))
		r.n.server.Change(server.Settings{MaxAge: time.Duration(next.Freshness.MaxAge), TTL: time.Duration(next.Freshness.TTL), AllKeys: next.Trust.Publish == config.PublishAll})
		if now.Clients.Rate != next.Clients.Rate || now.Clients.Burst != next.Clients.Burst {
			r.n.server.SetRate(next.Clients.Rate, next.Clients.Burst)
		}
		r.level.Set(level)
		p.keys.Reload()
		r.n.trustChanged()
		// What is lost and could not be had before may be had now.
		p.askForLost()
	}, nil
}

// differences returns the keys that two configurations differ in; of publishers, those of each prefix.
func differences(before, after *config.Config) []admin.Change {
	changes := []admin.Change{}
	var walk func(path string, a, b reflect.Value)
	walk = func(path string, a, b reflect.Value) {
		if a.Kind() == reflect.Struct && a.Type().PkgPath() == reflect.TypeFor[config.Config]().PkgPath() {
			for i := range a.NumField() {
				key := a.Type().Field(i).Tag.Get("yaml")
				walk(strings.TrimPrefix(path+"."+key, "."), a.Field(i), b.Field(i))
			}
			return
		}
		if path == "publishers" {
			changes = append(changes, publisherDifferences(before.Publishers, after.Publishers)...)
			return
		}
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			changes = append(changes, admin.Change{Key: path, Before: valueText(a), After: valueText(b)})
		}
	}
	walk("", reflect.ValueOf(*before), reflect.ValueOf(*after))
	return changes
}

// publisherDifferences returns what differs of the publishers, by their prefixes in order. The order in the file means nothing.
func publisherDifferences(before, after []config.Publisher) (changes []admin.Change) {
	was, is := make(map[string]config.Publisher), make(map[string]config.Publisher)
	for _, p := range before {
		was[p.Prefix] = p
	}
	for _, p := range after {
		is[p.Prefix] = p
	}
	both := maps.Clone(was)
	maps.Copy(both, is)
	for _, prefix := range slices.Sorted(maps.Keys(both)) {
		key := "publishers[" + prefix + "]"
		a, had := was[prefix]
		b, has := is[prefix]
		switch {
		case !had:
			changes = append(changes, admin.Change{Key: key, Before: "none", After: publisherText(b)})
			continue
		case !has:
			changes = append(changes, admin.Change{Key: key, Before: publisherText(a), After: "none"})
			continue
		}
		x, y := reflect.ValueOf(a), reflect.ValueOf(b)
		for i := range x.NumField() {
			if field := x.Type().Field(i).Tag.Get("yaml"); !reflect.DeepEqual(x.Field(i).Interface(), y.Field(i).Interface()) {
				changes = append(changes, admin.Change{Key: key + "." + field, Before: publisherValue(field, x.Field(i)), After: publisherValue(field, y.Field(i))})
			}
		}
	}
	return changes
}

// publisherText prints what is said of a publisher beside its prefix.
func publisherText(p config.Publisher) string {
	p.Prefix = ""
	return sectionText(reflect.ValueOf(p), publisherValue)
}

// sectionText prints the keys of a section that say something.
func sectionText(v reflect.Value, text func(key string, v reflect.Value) string) string {
	var said []string
	for i := range v.NumField() {
		if key := v.Type().Field(i).Tag.Get("yaml"); !v.Field(i).IsZero() {
			said = append(said, key+": "+text(key, v.Field(i)))
		}
	}
	return "{" + strings.Join(said, ", ") + "}"
}

// publisherValue prints what is said of a publisher under a key. URLs may have secrets in them.
func publisherValue(key string, v reflect.Value) string {
	switch {
	case v.IsZero():
		return "unset"
	case v.Kind() == reflect.Pointer:
		return valueText(v.Elem())
	case key == "templates":
		var shown []string
		for i := range v.Len() {
			shown = append(shown, web.Redacted(v.Index(i).String()))
		}
		return valueText(reflect.ValueOf(shown))
	case key == "proxy", key == "listing":
		return valueText(reflect.ValueOf(web.Redacted(v.String())))
	}
	return valueText(v)
}

// valueText prints a value of the configuration.
func valueText(v reflect.Value) string {
	if v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct && v.Type().Elem().PkgPath() == reflect.TypeFor[config.Config]().PkgPath() {
		var sections []string
		for i := range v.Len() {
			sections = append(sections, sectionText(v.Index(i), func(_ string, v reflect.Value) string { return valueText(v) }))
		}
		return "[" + strings.Join(sections, ", ") + "]"
	}
	switch v.Kind() {
	case reflect.Slice, reflect.Map, reflect.String:
		if v.Len() == 0 && v.Kind() != reflect.String {
			return "[]"
		}
		// All of them can be said in JSON.
		var text bytes.Buffer
		out := json.NewEncoder(&text)
		out.SetEscapeHTML(false)
		_ = out.Encode(v.Interface())
		return strings.TrimSuffix(text.String(), "\n")
	}
	return fmt.Sprint(v.Interface())
}
