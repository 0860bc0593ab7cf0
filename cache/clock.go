package cache

import (
	"math"
	"time"
)

// maxSkew is how far after now a time may lie that was noted before: clocks are set back a little now and then, and now may have been asked a while ago.
const maxSkew = time.Minute

// Age returns how long ago something was. What is noted as of a time that is yet to come was noted while the clock was ahead, and nobody knows when that was:
// it counts as long ago, lest it be taken for new until that time has come.
func Age(now, then time.Time) time.Duration {
	if ahead(now, then) {
		return math.MaxInt64
	}
	return max(0, now.Sub(then))
}

// ahead reports whether a time is yet to come.
func ahead(now, then time.Time) bool { return then.After(now.Add(maxSkew)) }
