package web

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC)
	date := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	tests := []struct {
		name, value string
		want        time.Duration
	}{
		{"nothing", "", 0},
		{"seconds", "7", 7 * time.Second},
		{"none", "0", 0},
		{"zeros in front", "0007", 7 * time.Second},
		{"a day", "86400", 24 * time.Hour},
		{"more than a day", "86401", 24 * time.Hour},
		{"more than fits", "99999999999999999999", 24 * time.Hour},
		{"more than anybody reads", strings.Repeat("9", 100_000), 24 * time.Hour},
		{"negative", "-7", 0},
		{"a sign", "+7", 0},
		{"a fraction", "7.5", 0},
		{"a unit", "7s", 0},
		{"words", "soon", 0},
		{"another script's digits", "٧", 0},
		{"spaces around", " 7 ", 7 * time.Second},
		{"a date", date(time.Minute), time.Minute},
		{"a date of RFC 850", now.Add(time.Minute).Format("Monday, 02-Jan-06 15:04:05 GMT"), time.Minute},
		{"a date of asctime", now.Add(time.Minute).Format(time.ANSIC), time.Minute},
		{"a date that is over", date(-time.Minute), 0},
		{"this moment", date(0), 0},
		{"a date far away", "Fri, 31 Dec 9999 23:59:59 GMT", 24 * time.Hour},
		{"a date long ago", "Mon, 01 Jan 0001 00:00:00 GMT", 0},
		{"a date that is none", "Fri, 31 Feb 2026 25:00:00 GMT", 0},
	}
	for _, tt := range tests {
		if got := RetryAfter(&http.Response{Header: http.Header{"Retry-After": {tt.value}}}, now); got != tt.want {
			t.Errorf("%s: RetryAfter(%.40q) = %v, want %v", tt.name, tt.value, got, tt.want)
		}
	}
	if got := RetryAfter(&http.Response{Header: http.Header{"Retry-After": {"1", "9"}}}, now); got != time.Second {
		t.Errorf("RetryAfter of two = %v, want the first", got)
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, seed := range []string{"7", "-1", "18446744073709551616", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(seed)
	}
	now := time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, value string) {
		if got := RetryAfter(&http.Response{Header: http.Header{"Retry-After": {value}}}, now); got < 0 || got > maxRetryAfter {
			t.Errorf("RetryAfter(%q) = %v", value, got)
		}
	})
}
