package history

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

var noon = time.Date(2026, 7, 1, 12, 0, 30, 0, time.UTC)

func rangeOf(t *testing.T, name string) Range {
	t.Helper()
	for _, r := range Ranges() {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("no range %s", name)
	return Range{}
}

func TestPoints(t *testing.T) {
	h := New()
	h.Note(noon, Totals{Requests: 1, Served: 10})
	h.Note(noon.Add(10*time.Second), Totals{Requests: 3, Hits: 2, Served: 30})
	h.Note(noon.Add(time.Minute), Totals{Requests: 3, Hits: 2, Served: 30}) // nothing new
	h.Note(noon.Add(5*time.Minute), Totals{Requests: 4, Hits: 2, Misses: 1, Served: 30, Fetched: 7, Refused: 1})
	now := noon.Add(6 * time.Minute)
	points, sum := h.Points(rangeOf(t, "hour"), now)
	if want := (Totals{Requests: 4, Hits: 2, Misses: 1, Refused: 1, Served: 30, Fetched: 7}); sum != want {
		t.Errorf("the sum is %+v, want %+v", sum, want)
	}
	if len(points) != 60 || !points[59].Time.Equal(now.Truncate(time.Minute)) {
		t.Fatalf("%d points, the last at %v; want 60 up to this minute", len(points), points[len(points)-1].Time)
	}
	if got, want := points[53].Totals, (Totals{Requests: 3, Hits: 2, Served: 30}); got != want {
		t.Errorf("six minutes ago: %+v, want %+v", got, want)
	}
	if got := points[58].Fetched; got != 7 {
		t.Errorf("a minute ago %d bytes were fetched, want 7", got)
	}
	if _, sum := h.Points(rangeOf(t, "hour"), noon.Add(61*time.Minute)); sum.Requests != 1 {
		t.Errorf("an hour later: %+v, want what came in its first minutes alone", sum)
	}
	if _, sum := h.Points(rangeOf(t, "day"), noon.Add(23*time.Hour)); sum.Requests != 4 {
		t.Errorf("a day later: %+v", sum)
	}
	points, sum = h.Points(rangeOf(t, "week"), noon.Add(6*24*time.Hour))
	if sum.Requests != 4 || len(points) != 168 {
		t.Errorf("six days later: %+v in %d points", sum, len(points))
	}
}

func TestWhatIsOldIsForgotten(t *testing.T) {
	h := New()
	for i := range int64(10 * 24 * 60) {
		h.Note(noon.Add(time.Duration(i)*time.Minute), Totals{Requests: i + 1})
	}
	if len(h.minutes) > Minutes || len(h.hours) > Hours {
		t.Errorf("%d minutes and %d hours are kept", len(h.minutes), len(h.hours))
	}
	if _, sum := h.Points(rangeOf(t, "week"), noon.Add(10*24*time.Hour)); sum.Requests < 6*24*60 || sum.Requests > 7*24*60 {
		t.Errorf("a week has %d requests, want one for each minute", sum.Requests)
	}
}

func TestAClockThatIsSetBack(t *testing.T) {
	h := New()
	h.Note(noon, Totals{Requests: 1})
	h.Note(noon.Add(-time.Hour), Totals{Requests: 2})
	if len(h.minutes) != 1 || h.minutes[0].Requests != 2 {
		t.Errorf("minutes = %+v, want one with both", h.minutes)
	}
}

func TestSaveAndLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.json")
	if h, err := Load(file); err != nil || len(h.minutes) != 0 {
		t.Errorf("Load of no file = %+v, %v", h, err)
	}
	h := New()
	h.Note(noon, Totals{Requests: 5, Served: 1 << 40})
	h.Note(noon.Add(3*time.Hour), Totals{Requests: 6, Served: 1 << 41})
	if err := h.Save(file); err != nil {
		t.Fatal(err)
	}
	back, err := Load(file)
	if err != nil || !reflect.DeepEqual(back.minutes, h.minutes) || !reflect.DeepEqual(back.hours, h.hours) {
		t.Errorf("Load = %+v, %v, want %+v", back, err, h)
	}
	// A server that starts counts from 0 again.
	back.Note(noon.Add(4*time.Hour), Totals{Requests: 1})
	if _, sum := back.Points(rangeOf(t, "day"), noon.Add(5*time.Hour)); sum.Requests != 7 {
		t.Errorf("after a restart: %+v, want 7 requests", sum)
	}
	for _, broken := range []string{"{", `{"minutes":[{"time":"2026-07-01T12:00:00Z"},{"time":"2026-07-01T11:00:00Z"}]}`} {
		if err := os.WriteFile(file, []byte(broken), 0o600); err != nil {
			t.Fatal(err)
		}
		if h, err := Load(file); err == nil || h == nil || len(h.minutes) != 0 {
			t.Errorf("Load of %s = %+v, %v; want an error and an empty history", broken, h, err)
		}
	}
}
