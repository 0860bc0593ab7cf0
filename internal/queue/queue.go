// Package queue has those wait for their turn for whom there is no place.
package queue

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
)

// The codes of errors.
const (
	codeFull = "queue-full"
	codeSlow = "queue-slow"
)

// retryAfter is when it is worth asking again where the queue was full.
const retryAfter = 10 * time.Second

// Config says how a Queue works.
type Config struct {
	Places   int           // how many may be in at once, half of them, but one at least, for the same host
	Length   int           // how many may wait; 0 means none
	Patience time.Duration // for how long they wait

	// What errors say: what those do who are in, as in "images are being fetched", and what the settings of the three above are called.
	Doing                                string
	PlacesName, LengthName, PatienceName string
}

// A Queue lets only so many in at once. Those that wait take turns by client, so that one who asks for a thousand images doesn't keep the
// others waiting, and half of the places at most are for one host, so that a slow publisher doesn't keep the others' waiting either. Nor can one client
// have the queue for itself: when it is full, whoever has the most waiting makes room for those who have less. It is safe for concurrent use.
type Queue struct {
	cfg     Config
	perHost int

	mu      sync.Mutex
	busy    int
	hosts   map[string]int       // places that are taken, by host
	turns   []string             // the clients that wait, whose turn is next first
	waiting map[string][]*waiter // by client, each in the order of coming
	n       int                  // how many that are
}

type waiter struct {
	host string
	told chan struct{} // closed when it has its place, or has had to give way
	away bool          // it had to give way
}

// New returns a Queue without anybody in it.
func New(cfg Config) *Queue {
	return &Queue{cfg: cfg, perHost: max(cfg.Places/2, 1), hosts: make(map[string]int), waiting: make(map[string][]*waiter)}
}

// Enter waits for a place. It returns what gives the place back, to be called once; or an error matching [acproxy.ErrBusy] if too many wait
// already, or it has to give way to another client's, or the waiting takes too long, or the error of ctx.
func (q *Queue) Enter(ctx context.Context, client, host string) (leave func(), err error) {
	w := &waiter{host: host, told: make(chan struct{})}
	q.mu.Lock()
	if waits := q.busy >= q.cfg.Places || q.hosts[host] >= q.perHost; waits && q.n >= q.cfg.Length && !q.makeRoom(client) {
		q.mu.Unlock()
		return nil, q.full()
	}
	if len(q.waiting[client]) == 0 {
		q.turns = append(q.turns, client)
	}
	q.waiting[client] = append(q.waiting[client], w)
	q.n++
	q.admit()
	q.mu.Unlock()
	timeout := time.NewTimer(q.cfg.Patience)
	defer timeout.Stop()
	select {
	case <-w.told:
		if w.away {
			return nil, q.full()
		}
		return func() { q.leave(host) }, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timeout.C:
		err = busy(codeSlow, "its turn did not come within %v (%s): %d %s (%s)", q.cfg.Patience, q.cfg.PatienceName, q.cfg.Places, q.cfg.Doing, q.cfg.PlacesName)
	}
	q.giveUp(client, w)
	return nil, err
}

func (q *Queue) full() error {
	return busy(codeFull, "%d %s and %d wait for their turn, which is all that %s and %s allow", q.cfg.Places, q.cfg.Doing, q.cfg.Length, q.cfg.PlacesName, q.cfg.LengthName)
}

func busy(code, format string, args ...any) error {
	return &acproxy.Error{Kind: acproxy.ErrBusy, Code: code, Detail: fmt.Sprintf(format, args...), RetryAfter: retryAfter}
}

// leave gives a place back.
func (q *Queue) leave(host string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free(host)
}

// free gives a place back and lets the next ones in. The caller holds mu.
func (q *Queue) free(host string) {
	q.busy--
	if q.hosts[host]--; q.hosts[host] == 0 {
		delete(q.hosts, host)
	}
	q.admit()
}

// giveUp takes a waiter out, or gives back the place that it has got in this moment.
func (q *Queue) giveUp(client string, w *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-w.told:
		if !w.away {
			q.free(w.host)
		}
	default:
		q.remove(client, slices.Index(q.waiting[client], w))
	}
}

// admit gives the places that are free to those whose turn it is. The caller holds mu.
func (q *Queue) admit() {
	for q.busy < q.cfg.Places {
		turn, i := q.next()
		if turn < 0 {
			return
		}
		client := q.turns[turn]
		w := q.waiting[client][i]
		q.remove(client, i)
		if turn < len(q.turns) && q.turns[turn] == client {
			q.turns = append(slices.Delete(q.turns, turn, turn+1), client)
		}
		q.busy++
		q.hosts[w.host]++
		close(w.told)
	}
}

// makeRoom has the last one of the client with the most waiting give way to another client's, and reports whether it has. What comes has to have at least two
// fewer: with one less, the two would drive each other out for ever. The caller holds mu.
func (q *Queue) makeRoom(client string) bool {
	var most string
	for _, c := range q.turns {
		if len(q.waiting[c]) >= len(q.waiting[most]) {
			most = c
		}
	}
	last := len(q.waiting[most]) - 1
	if last <= len(q.waiting[client]) {
		return false
	}
	w := q.waiting[most][last]
	q.remove(most, last)
	w.away = true
	close(w.told)
	return true
}

// next returns whose turn it is and which of his may come in, -1 if none. The caller holds mu.
func (q *Queue) next() (turn, i int) {
	for turn, client := range q.turns {
		i := slices.IndexFunc(q.waiting[client], func(w *waiter) bool { return q.hosts[w.host] < q.perHost })
		if i >= 0 {
			return turn, i
		}
	}
	return -1, -1
}

// remove takes the i-th waiter of a client out, and the client if it was the last. The caller holds mu.
func (q *Queue) remove(client string, i int) {
	q.n--
	rest := slices.Delete(q.waiting[client], i, i+1)
	if len(rest) > 0 {
		q.waiting[client] = rest
		return
	}
	delete(q.waiting, client)
	q.turns = slices.DeleteFunc(q.turns, func(c string) bool { return c == client })
}
