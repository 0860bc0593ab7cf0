package page

import (
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/history"
)

func TestScale(t *testing.T) {
	for most, want := range map[int64][2]int64{0: {1, 1}, 1: {1, 1}, 5: {5, 1}, 6: {6, 2}, 1 << 30: {1 << 30, 1 << 28}, 1<<30 + 1: {1<<30 + 1<<28, 1 << 28}} {
		if top, step := scale(most); top != want[0] || step != want[1] {
			t.Errorf("scale(%d) = %d, %d, want %v", most, top, step, want)
		}
	}
	for most := int64(1); most < 1<<50; most = most*3 + 1 {
		if top, step := scale(most); top < most || top-step >= most || top%step != 0 || top/step > 5 {
			t.Errorf("scale(%d) = %d, %d", most, top, step)
		}
	}
}

func TestTrafficChart(t *testing.T) {
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	traffic := admin.Traffic{Range: "hour", Sum: history.Totals{Served: 4 << 20, Fetched: 1 << 20}}
	for i := range 60 {
		traffic.Points = append(traffic.Points, history.Point{Time: now.Add(time.Duration(i) * time.Minute)})
	}
	if c := trafficChart(traffic); !c.Empty || len(c.Bars) != 0 || len(c.Marks) != 1 {
		t.Errorf("without traffic: %d bars, %d marks", len(c.Bars), len(c.Marks))
	}
	traffic.Points[10].Served, traffic.Points[10].Fetched, traffic.Points[59].Served = 4<<20, 1<<20, 1
	c := trafficChart(traffic)
	if len(c.Bars) != 3 || c.Empty {
		t.Fatalf("%d bars, want 3", len(c.Bars))
	}
	served, fetched, little := c.Bars[0], c.Bars[1], c.Bars[2]
	if served.Height != c.Bottom-chartTop || fetched.Height*4 != served.Height || served.Says != "12:10 UTC: 4 MiB served" {
		t.Errorf("bars = %+v, %+v", served, fetched)
	}
	if little.Height < 1 {
		t.Errorf("a byte can't be seen: %+v", little)
	}
	for _, b := range c.Bars {
		if b.X < c.Left || b.X+b.Width > c.Width || b.Y < 0 || b.Y+b.Height > c.Bottom+.01 {
			t.Errorf("a bar lies outside: %+v", b)
		}
	}
	if c.Summary != "In the last hour 4 MiB were served and 1 MiB fetched from publishers." {
		t.Errorf("it says %q", c.Summary)
	}
}

func TestBreakable(t *testing.T) {
	got := string(breakable("example.com/a:1,note=<b>"))
	if want := "example.com/<wbr>a:<wbr>1,<wbr>note=&lt;b&gt;"; got != want {
		t.Errorf("breakable = %s, want %s", got, want)
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1000 << 10: "1.0 MiB", 452 << 10: "452 KiB", 5 << 40: "5 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %s, want %s", n, got, want)
		}
	}
	if got := percent(1, 0) + percent(1, 3); !strings.Contains(got, "–") || !strings.Contains(got, "33.3 %") {
		t.Errorf("percent = %s", got)
	}
}
