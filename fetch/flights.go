package fetch

import (
	"cmp"
	"slices"
	"time"

	"github.com/acproxy/acproxy"
)

// The phases of a flight, in their order.
const (
	PhaseWaiting   = "waiting"   // for its turn
	PhaseAsking    = "asking"    // the publisher: for templates, for the signature, for the head of the image
	PhaseReceiving = "receiving" // the image's bytes
	PhaseVerifying = "verifying" // all bytes have come
)

// A FlightState is how far a flight has come.
type FlightState struct {
	Ref      acproxy.Ref `json:"ref"`
	Phase    string      `json:"phase"` // one of the Phase constants
	Began    time.Time   `json:"began"`
	Client   string      `json:"client,omitempty"` // who asked first; "" if nobody did
	Refresh  bool        `json:"refresh"`          // it asks whether what is held is still the answer
	Source   string      `json:"source,omitempty"` // the image's URL, once it is asked for
	Received int64       `json:"received"`         // bytes so far
	Size     int64       `json:"size"`             // bytes in all; 0 while that isn't known
	Shared   bool        `json:"shared"`           // its bytes come with another ref's flight
}

// Flights returns the flights in progress, the oldest first.
func (f *Fetcher) Flights() []FlightState {
	f.mu.Lock()
	flights := make([]*flight, 0, len(f.flights))
	for _, fl := range f.flights {
		flights = append(flights, fl)
	}
	f.mu.Unlock()
	states := make([]FlightState, 0, len(flights))
	for _, fl := range flights {
		if !fl.over() {
			states = append(states, fl.state())
		}
	}
	slices.SortFunc(states, func(a, b FlightState) int {
		return cmp.Or(a.Began.Compare(b.Began), cmp.Compare(a.Ref.String(), b.Ref.String()))
	})
	return states
}

func (fl *flight) state() FlightState {
	s := FlightState{Ref: fl.ref, Phase: PhaseWaiting, Began: fl.began, Client: fl.client, Refresh: !fl.have.IsZero()}
	if fl.asking.Load() {
		s.Phase = PhaseAsking
	}
	select {
	case <-fl.landed:
	default:
		return s
	}
	if d := fl.download; d != nil {
		s.Source, s.Size, s.Shared = d.source, max(d.size, 0), fl.shared
		d.mu.Lock()
		defer d.mu.Unlock()
		s.Phase, s.Received = PhaseReceiving, d.written
		if d.complete {
			s.Phase = PhaseVerifying
		}
	}
	return s
}
