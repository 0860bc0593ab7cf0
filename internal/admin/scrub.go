package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// message is a line of the answer to a scrub: how far it has come, what it has found, and in the end what it has come to.
type message struct {
	Progress *cache.Scrubbed `json:"progress,omitempty"`
	Found    *cache.Finding  `json:"found,omitempty"`
	Done     *cache.Scrubbed `json:"done,omitempty"`
	Failed   *failure        `json:"failed,omitempty"`
}

// progressEvery is how often a client is told how far a scrub has come.
const progressEvery = 100 * time.Millisecond

// serveScrub scrubs for as long as the client listens.
func serveScrub(w http.ResponseWriter, r *http.Request, store Store) {
	rate, err := strconv.ParseInt(r.URL.Query().Get("rate"), 10, 64)
	if err != nil || rate < 0 {
		w.WriteHeader(http.StatusBadRequest)
		// A client that has left can't be told anything.
		_ = json.NewEncoder(w).Encode(failure{Code: "invalid", Detail: fmt.Sprintf("rate %.32q is not a number of bytes", r.URL.Query().Get("rate"))})
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc, flusher := json.NewEncoder(w), http.NewResponseController(w)
	say := func(m message) {
		// Who has left has ended the request's context too, and with it the scrub.
		if enc.Encode(m) == nil {
			_ = flusher.Flush()
		}
	}
	var last time.Time
	done, err := store.Scrub(r.Context(), cache.ScrubOptions{
		Rate:  rate,
		Found: func(f cache.Finding) { say(message{Found: &f}) },
		Progress: func(s cache.Scrubbed) {
			if now := time.Now(); now.Sub(last) >= progressEvery {
				last = now
				say(message{Progress: &s})
			}
		},
	})
	m := message{Done: &done}
	if err != nil {
		m.Failed = &failure{Code: acproxy.Code(err), Detail: err.Error()}
	}
	say(m)
}

// Scrub is [Store.Scrub] of the server. It ends there too when ctx ends it.
func (c *Client) Scrub(ctx context.Context, o cache.ScrubOptions) (sum cache.Scrubbed, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://acproxy"+api+"scrub?rate="+strconv.FormatInt(o.Rate, 10), nil)
	if err != nil {
		return sum, err
	}
	patient := http.Client{Transport: c.http.Transport}
	resp, err := patient.Do(req)
	if err != nil {
		return sum, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return sum, fmt.Errorf("the server answered %s", resp.Status)
	}
	for dec := json.NewDecoder(resp.Body); ; {
		var m message
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
			return *m.Done, &acproxy.Error{Code: m.Failed.Code, Detail: m.Failed.Detail}
		case m.Done != nil:
			return *m.Done, nil
		}
	}
}
