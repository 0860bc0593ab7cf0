package server

import (
	"bytes"
	"hash/maphash"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
)

// This file gives the same simple request the same answer again, for a moment: a cluster's nodes ask for the same few things, with the same bytes. What is left of
// a request then is to look its head up, to see that nothing has changed that its answer rests on, and to log it (docs/decisions/brisk.md).

const (
	// replayFor is for how long an answer is given again: for so long it may be wrong about what goes by the clock, such as the expiry of a key.
	replayFor = time.Second
	// replaySlots bounds how many answers are kept, and maxReplay how long each of them may be together with its request, in bytes.
	replaySlots = 4096
	maxReplay   = 4 << 10
)

// grounds are what an answer to a nameless client rests on. They are compared with ==.
type grounds struct {
	fetch    fetch.Grounds
	settings uint64 // how often they have changed
	access   uint64 // the same of who may have what
}

func (s *Server) grounds() grounds {
	g := grounds{fetch: s.cfg.Fetcher.Grounds(), settings: s.changes.Load()}
	if s.cfg.Guard != nil {
		g.access = s.cfg.Guard.Changes()
	}
	return g
}

// noteSteady records that an answer was made from what is held and fresh, and else from nothing but the head of the request: as long as the grounds stay the same
// it is the answer to the same head, whichever client sends it. image is the one that was used, zero for none.
func noteSteady(w http.ResponseWriter, image acproxy.Digest) {
	if rec, ok := w.(*recorder); ok {
		rec.steady, rec.image = true, image
	}
}

// A replay is an answer that is given again.
type replay struct {
	slot    uint64 // what slot says of the request
	request string // its head, as it came
	grounds grounds
	until   time.Time
	image   acproxy.Digest // that is used; zero for none

	status []byte // the first line
	rest   []byte // all that follows Date and X-Request-Id, which are never the same
	access Access // but for what is never the same
}

// replays are what a door has answered lately, each in the one slot that its request has. They are safe for concurrent use, and nobody waits.
type replays struct {
	seed  maphash.Seed
	slots [replaySlots]struct {
		asked  atomic.Uint64 // what slot said of the request that came last, and wasn't kept
		answer atomic.Pointer[replay]
	}
}

func newReplays() *replays { return &replays{seed: maphash.MakeSeed()} }

func (p *replays) slot(head []byte) uint64 { return maphash.Bytes(p.seed, head) }

func (p *replays) get(slot uint64, head []byte) *replay {
	a := p.slots[slot%replaySlots].answer.Load()
	if a == nil || a.slot != slot || a.request != string(head) {
		return nil
	}
	return a
}

// wants reports whether an answer is worth being kept: no other request of its slot has come since this one did. What is asked for once must not take the
// place of what is asked for all the time.
func (p *replays) wants(slot uint64) bool { return p.slots[slot%replaySlots].asked.Swap(slot) == slot }

func (p *replays) put(a *replay) { p.slots[a.slot%replaySlots].answer.Store(a) }

// again makes the answer that was given before to a request with the same head, and reports whether there is one and it still is the answer.
func (c *briskConn) again(x *exchange, slot uint64, head []byte) bool {
	d, s := c.door, c.door.server
	a := d.replays.get(slot, head)
	if a == nil {
		return false
	}
	started := s.now()
	if !started.Before(a.until) || s.grounds() != a.grounds {
		return false
	}
	if s.rates.Load().check(c.request) != nil {
		// It is refused where all others are.
		return false
	}
	if !a.image.IsZero() {
		s.cfg.Fetcher.Used(a.image)
	}
	id := newRequestID()
	x.out = append(x.out[:0], a.status...)
	x.out = append(x.w.appendOwn(x.out, id), a.rest...)
	if s.cfg.Access != nil {
		said := a.access
		said.ID, said.Client = id, c.client
		said.Took = s.now().Sub(started)
		said.FirstByte = said.Took
		s.cfg.Access(said)
	}
	return true
}

// keep keeps the answer that x has just made for a request, if it may be given again and is worth it.
func (c *briskConn) keep(x *exchange, slot uint64, head []byte) {
	w := &x.w
	if !w.steady || w.last() || len(head)+len(x.out) > maxReplay || !c.door.replays.wants(slot) {
		return
	}
	c.door.replays.put(&replay{
		slot: slot, request: string(head), grounds: w.grounds, until: w.began.Add(replayFor), image: w.image,
		status: bytes.Clone(x.out[:w.own.from]), rest: bytes.Clone(x.out[w.own.to:]), access: w.access,
	})
}
