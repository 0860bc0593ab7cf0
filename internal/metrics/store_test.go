package metrics

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/cache"
)

// store is one with a bit of everything.
type store struct{}

func (store) Usage() (cache.Usage, error) {
	return cache.Usage{Blobs: 1, Sidecars: 2, Index: 3, Partials: 4, Quarantine: 5, Names: 6, Directories: 7, Open: 8, Pinned: 9, Promised: 10, Images: 12, Quarantined: 1, Room: cache.Room{
		MaxSize: 13, MinFree: 14, Free: 15,
	}, Scrub: cache.Scrubbing{Position: 0.5, Finished: time.Unix(16, 0), Scrubbed: cache.Scrubbed{Images: 17, Bytes: 18, Problems: 19}}}, nil
}

func TestStoreIsWatched(t *testing.T) {
	m := New("1.0")
	m.Watch(store{})
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`acproxy_cache_bytes{part="blobs"} 1`, `acproxy_cache_bytes{part="sidecars"} 2`, `acproxy_cache_bytes{part="index"} 3`, `acproxy_cache_bytes{part="partials"} 4`,
		`acproxy_cache_bytes{part="quarantine"} 5`, `acproxy_cache_bytes{part="names"} 6`, `acproxy_cache_bytes{part="directories"} 7`, `acproxy_cache_bytes{part="open"} 8`,
		`acproxy_cache_pinned_bytes 9`, `acproxy_cache_bytes{part="promised"} 10`, `acproxy_cache_images{state="ok"} 11`, `acproxy_cache_images{state="quarantined"} 1`,
		`acproxy_cache_limit_bytes{limit="max_size"} 13`, `acproxy_cache_limit_bytes{limit="min_free"} 14`, `acproxy_cache_free_bytes 15`,
		`acproxy_scrub_position 0.5`, `acproxy_scrub_finished_timestamp_seconds 16`, `acproxy_scrubbed_images_total 17`, `acproxy_scrubbed_bytes_total 18`, `acproxy_scrub_findings_total 19`,
	} {
		if !strings.Contains(w.Body.String(), want+"\n") {
			t.Errorf("the metrics don't say %s", want)
		}
	}
}
