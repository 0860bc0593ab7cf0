package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"testing"
	"time"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/metrics"
	"github.com/acproxy/acproxy/internal/server"
)

// slogged is the line that package slog writes for a request.
func slogged(t *testing.T, a server.Access, now time.Time, handler slog.Handler) {
	t.Helper()
	r := slog.NewRecord(now, slog.LevelInfo, "request", 0)
	r.Add("id", a.ID)
	if a.Trace != "" {
		r.Add("trace_id", a.Trace)
	}
	r.Add("client", a.Client, "method", a.Method, "host", a.Host, "path", a.Path, "proto", a.Proto, "status", a.Status, "bytes", a.Bytes, "took", a.Took, "cache", a.Cache)
	if a.Ref != "" {
		r.Add("ref", a.Ref)
	}
	if a.Err != nil {
		r.Add("err", a.Err)
	}
	if err := handler.Handle(context.Background(), r); err != nil {
		t.Fatal(err)
	}
}

// TestLinesOfRequests are those that package slog would write.
func TestLinesOfRequests(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 123456789, time.UTC)
	plain := server.Access{
		ID: "ABC", Client: "192.0.2.1", Method: "GET", Host: "example.com", Path: "/app?ac-discovery=1", Proto: "HTTP/1.1", Status: 200, Bytes: 1234,
		Took: 1234567 * time.Nanosecond, Cache: "acproxy; hit", Ref: "example.com/app:1.0.0,arch=amd64",
	}
	hostile := plain
	hostile.Host, hostile.Path, hostile.Ref, hostile.Cache = "a b\n\"c\"", "/\\x<&>ü\x00\xff", "", ""
	hostile.Trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	hostile.Err = errors.New("it said \"no\"\r\nstatus=200")
	for _, a := range []server.Access{plain, hostile, {}} {
		var want bytes.Buffer
		slogged(t, a, now, slog.NewTextHandler(&want, nil))
		if got := string(textLine(nil, a, now)); got != want.String() {
			t.Errorf("text:\n%swant:\n%s", got, want.String())
		}
		want.Reset()
		slogged(t, a, now, slog.NewJSONHandler(&want, nil))
		var got, wanted map[string]any
		line := jsonLine(nil, a, now)
		if err := errors.Join(json.Unmarshal(line, &got), json.Unmarshal(want.Bytes(), &wanted)); err != nil || !reflect.DeepEqual(got, wanted) || bytes.Count(line, []byte("\n")) != 1 {
			t.Errorf("JSON: %v\n%swant:\n%s", err, line, want.String())
		}
	}
}

func TestNoLinesOfRequestsBelowTheLevel(t *testing.T) {
	for level, want := range map[string]bool{"debug": true, "info": true, "warn": false, "error": false} {
		var out bytes.Buffer
		log, err := newLogs(config.Log{Level: level, Access: true}, &out)
		if err != nil {
			t.Fatal(err)
		}
		log.access(server.Access{ID: "ABC"})
		if got := out.Len() > 0; got != want {
			t.Errorf("at level %s there are lines of requests: %v", level, got)
		}
		if log.level.Set(slog.LevelInfo); !want {
			if log.access(server.Access{ID: "ABC"}); out.Len() == 0 {
				t.Errorf("after a change from %s there are none", level)
			}
		}
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestLinesOfRequestsTakeNoMemory: there may be a hundred thousand a second, and what is thrown away has to be collected.
func TestLinesOfRequestsTakeNoMemory(t *testing.T) {
	a := server.Access{
		ID: "ABCDEFGHIJKLMNOPQRSTUVWXYZ", Client: "192.0.2.1", Method: "GET", Host: "example.com", Path: "/app?ac-discovery=1", Proto: "HTTP/1.1", Status: 200, Bytes: 1234,
		Took: 1234567 * time.Nanosecond, Cache: "acproxy; hit", Kind: server.KindPage, Verdict: "hit",
	}
	for _, format := range []string{config.LogText, config.LogJSON} {
		log, err := newLogs(config.Log{Level: "info", Access: true, AccessFlush: config.Duration(time.Minute), Format: format}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		counted := metrics.New("test")
		// A line that the buffer has no room for at its end takes some; that is one of a few hundred.
		if n := testing.AllocsPerRun(10_000, func() {
			counted.Answered(a)
			log.access(a)
		}); n != 0 {
			t.Errorf("a line in %s takes %v pieces of memory", format, n)
		}
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	}
}
