package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/sse"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/problem"
)

// How often those who listen are told how far things are, and at least told something, so that no proxy in between takes the connection for dead.
const (
	liveEvery = 300 * time.Millisecond
	liveLeast = 15 * time.Second
)

// LiveFlights are the flights in progress at one moment.
type LiveFlights struct {
	Flights []fetch.FlightState `json:"flights"` // the oldest first
}

// LiveEvents is how far somebody who listens to events has come, when there was none for him for a while.
type LiveEvents struct {
	Last int64 `json:"last"` // the ID of the last event, be it for him or not
}

// listening returns a context that ends with the request's or with the server.
func (s *Server) listening(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

func (s *Server) describeLiveFlights(a huma.API) {
	sse.Register(a, huma.Operation{
		OperationID: "watch-flights", Method: http.MethodGet, Path: api + "flights/live", Tags: []string{tagPublishers}, Summary: "Watch what is being fetched",
		Description: "Server-sent events: all flights, whenever something has changed, at most every 300 ms.",
	}, map[string]any{"flights": LiveFlights{}}, func(ctx context.Context, _ *nothing, send sse.Sender) {
		ctx, done := s.listening(ctx)
		defer done()
		v := s.ViewOf(ctx)
		ticker := time.NewTicker(liveEvery)
		defer ticker.Stop()
		var said []fetch.FlightState
		var last time.Time
		for {
			flights := v.Flights()
			if now := time.Now(); now.Sub(last) >= liveLeast || !reflect.DeepEqual(flights, said) {
				if send.Data(LiveFlights{flights}) != nil {
					return
				}
				said, last = flights, now
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	})
}

func (s *Server) describeLiveEvents(a huma.API) {
	type input struct {
		After       int64 `query:"after" minimum:"-1" default:"-1" doc:"Begin after the event with this ID; -1 begins with what happens from now on."`
		LastEventID int64 `header:"Last-Event-ID" minimum:"0" doc:"What a browser says that connects again: it goes before the parameter."`
	}
	sse.Register(a, huma.Operation{
		OperationID: "watch-events", Method: http.MethodGet, Path: api + "events/live", Tags: []string{tagEvents}, Summary: "Watch what happens", Description: "Server-sent events: each event as it happens.",
	}, map[string]any{"event": journal.Event{}, "last": LiveEvents{}}, func(ctx context.Context, in *input, send sse.Sender) {
		ctx, done := s.listening(ctx)
		defer done()
		v := s.ViewOf(ctx)
		after := in.After
		if in.LastEventID > 0 {
			after = in.LastEventID
		}
		if last := s.o.Journal.Last(); after < 0 || after > last {
			// Beyond the last one it is an ID of the server's life before.
			after = last
		}
		if send.Data(LiveEvents{after}) != nil {
			return
		}
		for {
			waiting, cancel := context.WithTimeout(ctx, liveLeast)
			events, last, err := v.EventsAfter(waiting, after)
			cancel()
			if ctx.Err() != nil {
				return
			}
			after = last
			if err != nil && send.Data(LiveEvents{after}) != nil {
				return
			}
			for _, e := range events {
				if send(sse.Message{ID: int(e.ID), Data: e}) != nil {
					return
				}
			}
		}
	})
}

// ScrubMessage is a line of the answer to a scrub: how far it has come, what it has found, or in the end what it has come to.
type ScrubMessage struct {
	Progress *cache.Scrubbed  `json:"progress,omitempty"`
	Found    *cache.Finding   `json:"found,omitempty"`
	Done     *cache.Scrubbed  `json:"done,omitempty"`
	Failed   *problem.Problem `json:"failed,omitempty"` // with done: why it ended before its end
}

// progressEvery is how often a client is told how far a scrub has come.
const progressEvery = 100 * time.Millisecond

const typeLines = "application/x-ndjson"

func (s *Server) describeScrub(a huma.API) {
	op := huma.Operation{
		OperationID: "scrub", Method: http.MethodPost, Path: api + "scrub", Tags: []string{tagStore}, Summary: "Read all images now",
		Description: "And repair what can be. The answer is a JSON object in each line, and goes on as the reading does. It ends when the client leaves. Needs the right admin.",
		Responses: map[string]*huma.Response{"200": {
			Description: "OK", Content: map[string]*huma.MediaType{typeLines: {Schema: a.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[ScrubMessage](), true, "ScrubMessage")}},
		}},
	}
	type input struct {
		Rate int64 `query:"rate" minimum:"0" doc:"Bytes in a second at most; 0 is as fast as it goes."`
	}
	huma.Register(a, op, func(ctx context.Context, in *input) (*huma.StreamResponse, error) {
		v := s.ViewOf(ctx)
		if err := v.administer("have all images read"); err != nil {
			return nil, s.troubled(err)
		}
		return &huma.StreamResponse{Body: func(out huma.Context) {
			out.SetHeader("Content-Type", typeLines)
			w := out.BodyWriter()
			ctx, done := s.listening(out.Context())
			defer done()
			enc := json.NewEncoder(w)
			say := func(m ScrubMessage) {
				// Who has left has ended the request's context too, and with it the scrub.
				if enc.Encode(m) == nil {
					if rw, ok := w.(http.ResponseWriter); ok {
						_ = http.NewResponseController(rw).Flush()
					}
				}
			}
			var last time.Time
			sum, err := v.Scrub(ctx, cache.ScrubOptions{
				Rate:  in.Rate,
				Found: func(f cache.Finding) { say(ScrubMessage{Found: &f}) },
				Progress: func(s cache.Scrubbed) {
					if now := time.Now(); now.Sub(last) >= progressEvery {
						last = now
						say(ScrubMessage{Progress: &s})
					}
				},
			})
			m := ScrubMessage{Done: &sum}
			if err != nil {
				p := s.problemOf(err)
				m.Failed = &p
			}
			say(m)
		}}, nil
	})
}

// Scrub is [Store.Scrub] of the server. It ends there too when ctx ends it.
func (c *Client) Scrub(ctx context.Context, o cache.ScrubOptions) (sum cache.Scrubbed, err error) {
	resp, err := c.patient().send(ctx, http.MethodPost, "scrub"+query("rate", o.Rate))
	if err != nil {
		return sum, err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var m ScrubMessage
		switch err := dec.Decode(&m); {
		case ctx.Err() != nil:
			return sum, context.Cause(ctx)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return sum, errors.New("the server broke off")
		case err != nil:
			return sum, err
		}
		switch {
		case m.Found != nil && o.Found != nil:
			o.Found(*m.Found)
		case m.Progress != nil:
			if sum = *m.Progress; o.Progress != nil {
				o.Progress(sum)
			}
		case m.Done != nil && m.Failed != nil:
			return *m.Done, m.Failed.Err()
		case m.Done != nil:
			return *m.Done, nil
		}
	}
}

// WatchEvents calls told with each event after the one with the given ID, or from now on with less than 0, until ctx is done, told returns an error or the server
// ends. It returns that error, ctx's, or nil.
func (c *Client) WatchEvents(ctx context.Context, after int64, told func(journal.Event) error) error {
	return c.watch(ctx, "events/live"+query("after", after), func(kind string, data []byte) error {
		if kind != "event" {
			return nil
		}
		var e journal.Event
		if err := json.Unmarshal(data, &e); err != nil {
			return err
		}
		return told(e)
	})
}

// WatchFlights calls told with the flights in progress, now and whenever they change, as [Client.WatchEvents] does.
func (c *Client) WatchFlights(ctx context.Context, told func([]fetch.FlightState) error) error {
	return c.watch(ctx, "flights/live", func(kind string, data []byte) error {
		if kind != "flights" {
			return nil
		}
		var l LiveFlights
		if err := json.Unmarshal(data, &l); err != nil {
			return err
		}
		return told(l.Flights)
	})
}

// maxMessage bounds one server-sent event, in bytes: some thousand flights.
const maxMessage = 8 << 20

// watch reads server-sent events (HTML Standard, section 9.2.6), as far as our own server uses what they may be.
func (c *Client) watch(ctx context.Context, path string, told func(kind string, data []byte) error) error {
	resp, err := c.patient().send(ctx, http.MethodGet, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := newLines(resp.Body, maxMessage)
	kind, data := "message", []byte(nil)
	for {
		line, err := lines.next()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
		field, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(field) {
		case "event":
			kind = string(value)
		case "data":
			data = append(data, value...)
		case "":
			if len(line) > 0 || data == nil {
				continue // a comment, or the end of nothing
			}
			if err := told(kind, data); err != nil {
				return err
			}
			kind, data = "message", nil
		}
	}
}
