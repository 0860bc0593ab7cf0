package fetch

import (
	"time"

	"github.com/acproxy/acproxy"
)

// Grounds are what an answer from what is held rests on, apart from the time. They are compared with ==, and hold on to nothing.
type Grounds struct {
	on     basis
	stored uint64    // how often what the store says has changed
	rules  time.Time // since when the rules of discovery count
	barred uint64    // how often an image was barred
}

// Grounds returns what an answer will rest on that is asked for now. While it stays the same, [Hit] stays the answer to the same [Request] for a ref with a
// version, or to the same name, but for what goes by the clock: keys that expire and pages that have to be learned anew.
func (f *Fetcher) Grounds() Grounds {
	return Grounds{f.basis(), f.cfg.Store.Changes(), f.cfg.Discovery.Since(), f.bars.Load()}
}

// Used notes that a held image was used, by somebody who was given an answer that had been made before.
func (f *Fetcher) Used(digest acproxy.Digest) { f.cfg.Store.Touch(digest) }
