package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/journal"
)

func newReload(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Have the running server read configuration, keys, users, tokens and certificates again",
		Long: `reload has the running server read its configuration again, as SIGHUP does, with all that it names: trusted keys, users, tokens, certificates. If something
of it is wrong, nothing changes, and it says what. What has changed is printed. These keys take effect at once: ` + strings.Join(reloadable(), ", ") + `. Of others
it says that they need a restart.
Requests and downloads in progress notice nothing.`,
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

// reloadable returns the keys of the configuration that take effect without a restart: nothing else rests on them than what is told of them, and none is
// checked together with one that isn't among them. What decides about trust is not, as verdicts are remembered.
func reloadable() []string {
	return []string{
		"access.rules", "access.users_file", "cache.on_full", "clients.burst", "clients.rate", "fetch.delivery", "freshness.max_stale", "freshness.on_change", "log.level",
	}
}

// take takes the values of these keys over from another configuration.
func take(to, from *config.Config) {
	to.Access.Rules, to.Access.UsersFile = from.Access.Rules, from.Access.UsersFile
	to.Cache.OnFull = from.Cache.OnFull
	to.Clients.Burst, to.Clients.Rate = from.Clients.Burst, from.Clients.Rate
	to.Fetch.Delivery = from.Fetch.Delivery
	to.Freshness.MaxStale, to.Freshness.OnChange = from.Freshness.MaxStale, from.Freshness.OnChange
	to.Log.Level = from.Log.Level
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
		changes[i].Restart = !slices.Contains(reloadable(), changes[i].Key)
	}
	next := *r.cfg
	take(&next, cfg)
	var level slog.Level
	if err := level.UnmarshalText([]byte(next.Log.Level)); err != nil {
		return nil, err
	}
	// First all that can fail.
	guard, err := guardConfig(&next, r.n.parts.log)
	if err != nil {
		return nil, err
	}
	var commits []func()
	for _, files := range append([]preparer{r.n.parts.credentials}, r.n.certificates...) {
		commit, err := files.Prepare()
		if err != nil {
			return nil, err
		}
		commits = append(commits, commit)
	}
	for _, commit := range commits {
		commit()
	}
	r.n.parts.guard.Change(guard)
	r.n.parts.fetcher.SetPolicies(policies(&next))
	if now := r.cfg.Clients; now.Rate != next.Clients.Rate || now.Burst != next.Clients.Burst {
		r.n.server.SetRate(next.Clients.Rate, next.Clients.Burst)
	}
	r.level.Set(level)
	r.n.parts.keys.Reload()
	r.cfg = &next
	return changes, nil
}

// differences returns the keys that two configurations differ in.
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
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			changes = append(changes, admin.Change{Key: path, Before: valueText(a), After: valueText(b)})
		}
	}
	walk("", reflect.ValueOf(*before), reflect.ValueOf(*after))
	return changes
}

// valueText prints a value of the configuration. Of publishers it says how many there are: the URL of a proxy may have a password in it.
func valueText(v reflect.Value) string {
	if publishers, ok := v.Interface().([]config.Publisher); ok {
		return count(len(publishers), "publisher")
	}
	switch v.Kind() {
	case reflect.Slice, reflect.Map, reflect.String:
		if v.Len() == 0 && v.Kind() != reflect.String {
			return "[]"
		}
		// All of them can be said in JSON.
		text, _ := json.Marshal(v.Interface())
		return string(text)
	}
	return fmt.Sprint(v.Interface())
}
