package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/fetch"
)

func all(Event) bool { return true }

func event(i int) fetch.Decision {
	return fetch.Decision{Time: time.Unix(int64(i), 0).UTC(), Event: fetch.EventAccepted, Detail: fmt.Sprint(i)}
}

func details(events []Event) string {
	var out []string
	for _, e := range events {
		out = append(out, fmt.Sprintf("%d:%s", e.ID, e.Detail))
	}
	return strings.Join(out, " ")
}

func TestBeforeAndAfter(t *testing.T) {
	j := New([]fetch.Decision{event(1), event(2)})
	j.Add(event(3))
	j.Add(event(4))
	if got := details(j.Before(0, 3, all)); got != "4:4 3:3 2:2" {
		t.Errorf("Before = %s", got)
	}
	if got := details(j.Before(2, 3, all)); got != "1:1" {
		t.Errorf("Before(2) = %s", got)
	}
	if got := details(j.Before(0, 9, func(e Event) bool { return e.ID%2 == 1 })); got != "3:3 1:1" {
		t.Errorf("Before, of the odd ones = %s", got)
	}
	if events, err := j.After(t.Context(), 2); err != nil || details(events) != "3:3 4:4" {
		t.Errorf("After(2) = %s, %v", details(events), err)
	}
	if j.Last() != 4 {
		t.Errorf("Last = %d", j.Last())
	}
}

func TestAfterWaits(t *testing.T) {
	j := New(nil)
	got := make(chan string)
	// Ends with the event; read below.
	go func() {
		events, err := j.After(context.Background(), 0)
		got <- fmt.Sprint(details(events), err)
	}()
	j.Add(event(7))
	if text := <-got; text != "1:7<nil>" {
		t.Errorf("After = %s", text)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if _, err := j.After(ctx, 1); !errors.Is(err, enough) {
		t.Errorf("After = %v, want the context's cause", err)
	}
}

func TestTheOldestAreForgotten(t *testing.T) {
	j := New(nil)
	for i := range 3 * Capacity {
		j.Add(event(i))
	}
	events := j.Before(0, 4*Capacity, all)
	if len(events) > Capacity || len(events) < Capacity*8/10 || events[0].ID != 3*Capacity {
		t.Errorf("%d events up to %d", len(events), events[0].ID)
	}
	if later, err := j.After(t.Context(), 1); err != nil || len(later) != len(events) {
		t.Errorf("After what is forgotten = %d events, %v, want all %d", len(later), err, len(events))
	}
}

func TestTail(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.log")
	if d, err := Tail(file); err != nil || d != nil {
		t.Errorf("Tail of no file = %v, %v", d, err)
	}
	var b strings.Builder
	filler := strings.Repeat("x", 1000)
	for i := range 6000 {
		fmt.Fprintf(&b, `{"time":"2026-07-01T12:00:00Z","event":"accepted","ref":"example.com/app:%d","detail":"%s"}`+"\n", i, filler)
	}
	b.WriteString("not JSON\n{}\n" + `{"time":"2026-07-01T12:00:00Z","event":"refused","ref":"example.com/last"}` + "\n" + `{"time":"2026-07-01T12:0`)
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Tail(file)
	if err != nil || len(d) < 3000 || len(d) > Capacity {
		t.Fatalf("Tail = %d decisions, %v", len(d), err)
	}
	if last := d[len(d)-1]; last.Event != fetch.EventRefused || last.Ref.String() != "example.com/last" {
		t.Errorf("the last one is %+v", last)
	}
	if before := d[len(d)-2]; before.Ref.Version() != "5999" {
		t.Errorf("the one before is %v", before.Ref)
	}
}
