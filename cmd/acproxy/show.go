package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/test/node"
)

// show prints the demo's lines, each of which is held against what it should be.
type show struct {
	*printer
	lines, failed int
	titled        int
	good          bool // the line being printed is as it should be
}

const rowFormat = "  %s %-60s %-7s %-25s %10s %10s %7s\n"

func (s *show) title(text string) {
	s.titled++
	s.printf("\n%d. %s\n\n", s.titled, text)
	s.printf(rowFormat, " ", "URL", "STATUS", "CACHE-STATUS", "BYTES", "TIME", "MB/s")
}

// check counts a line and remembers whether the next row is marked as good.
func (s *show) check(ok bool) {
	s.lines++
	if !ok {
		s.failed++
	}
	s.good = ok
}

func (s *show) row(url, status, cache, bytes string, took time.Duration, rate string) {
	s.printf(rowFormat, s.mark(), shorten(url), status, strings.TrimPrefix(cache, "acproxy; "), bytes, milliseconds(took), rate)
}

func (s *show) mark() string {
	if s.good {
		return "✓"
	}
	return "✗"
}

// claim prints and checks something about the rows above.
func (s *show) claim(ok bool, format string, args ...any) {
	s.check(ok)
	s.printf("  %s %s\n", s.mark(), fmt.Sprintf(format, args...))
}

// fail prints what is not as it should be.
func (s *show) fail(format string, args ...any) { s.claim(false, format, args...) }

// expect is what an answer should be. What is zero isn't checked.
type expect struct {
	status  int
	cache   string // the beginning of Cache-Status
	sum     string // SHA-256 of the body
	problem string // the end of the problem's type
}

// wrong says in which ways an answer is not what it should be.
func (want expect) wrong(a node.Answer) []string {
	var wrong []string
	if a.Err != nil {
		wrong = append(wrong, a.Err.Error())
	}
	if a.Status != want.status {
		wrong = append(wrong, fmt.Sprintf("status %d, should be %d", a.Status, want.status))
	}
	cache := a.Header.Get("Cache-Status")
	if !strings.HasPrefix(cache, want.cache) {
		wrong = append(wrong, fmt.Sprintf("Cache-Status %q, should be %q", cache, want.cache))
	}
	if want.sum != "" && a.SHA256 != want.sum {
		wrong = append(wrong, "other bytes than before")
	}
	if want.problem != "" && !strings.HasSuffix(problemType(a), ":"+want.problem) {
		wrong = append(wrong, fmt.Sprintf("problem %q, should be %q", problemType(a), want.problem))
	}
	return wrong
}

// line prints an answer and holds it against what it should be.
func (s *show) line(a node.Answer, want expect) {
	wrong := want.wrong(a)
	s.check(len(wrong) == 0)
	s.answered(a, strconv.Itoa(a.Status))
	for _, w := range wrong {
		s.printf("      %s\n", w)
	}
}

// answered prints an answer, and the reason if it is a refusal.
func (s *show) answered(a node.Answer, status string) {
	rateText := ""
	if a.Status == 200 {
		rateText = rate(a.Bytes, a.Took)
	}
	s.row(a.URL, status, a.Header.Get("Cache-Status"), bytesText(a.Bytes), a.Took, rateText)
	if detail := a.Detail(); detail != "" {
		s.printf("      %s\n", detail)
	}
}

func problemType(a node.Answer) string {
	var p struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(a.Body, &p) // a body that is no problem has no type
	return p.Type
}

// shorten leaves out of a URL what is the same in every line: where acproxy's own paths begin, and all labels but the first.
func shorten(url string) string {
	if _, own, ok := strings.Cut(url, server.Root); ok {
		url = "…/" + own
	}
	if head, _, ok := strings.Cut(url, "&"); ok {
		url = head + "&…"
	}
	return url
}

func milliseconds(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', 1, 64) + " ms"
}

func rate(bytes int64, took time.Duration) string {
	if took <= 0 {
		return ""
	}
	return strconv.FormatFloat(float64(bytes)/1e6/took.Seconds(), 'f', 1, 64)
}

func seconds(d time.Duration) string { return d.Round(100 * time.Millisecond).String() }
