package fetch

import (
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/publisher"
)

func TestFlights(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	if flights := s.f.Flights(); len(flights) != 0 {
		t.Errorf("Flights = %+v before anybody asked", flights)
	}
	signature := s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{StallAfter: publisher.At(0)})
	image := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(100)})
	done := make(chan error, 1)
	// Ends with the image; waited for below.
	go func() {
		im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0"), Client: "node"})
		if err == nil {
			_, err = deliver(t.Context(), im)
			_ = im.Close()
		}
		done <- err
	}()
	// now returns the only flight, once it is in a phase and has so many bytes.
	now := func(phase string, received int64) FlightState {
		t.Helper()
		var flights []FlightState
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if flights = s.f.Flights(); len(flights) == 1 && flights[0].Phase == phase && flights[0].Received == received {
				return flights[0]
			}
		}
		t.Fatalf("Flights = %+v, want one that is %s", flights, phase)
		return FlightState{}
	}
	s.wait("the signature", signature.Stalled())
	if fl := now(PhaseAsking, 0); fl.Ref != s.app("1.0") || fl.Client != "node" || fl.Refresh || fl.Source != "" || fl.Began.IsZero() {
		t.Errorf("while the signature is asked for: %+v", fl)
	}
	signature.Release()
	s.wait("the image", image.Stalled())
	if fl := now(PhaseReceiving, 100); fl.Size != int64(len(blob)) || fl.Source == "" || fl.Shared {
		t.Errorf("while the image arrives: %+v", fl)
	}
	image.Release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s.idle()
	if flights := s.f.Flights(); len(flights) != 0 {
		t.Errorf("Flights = %+v after all", flights)
	}
}
