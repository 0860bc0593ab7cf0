package fetch

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
)

// Defaults of a [Config].
const (
	DefaultMaxFlights = 64
	DefaultMaxQueue   = 1000
	DefaultQueueWait  = time.Minute
)

// The codes of errors about the queue.
const (
	codeQueueFull = "queue-full"
	codeQueueSlow = "queue-slow"
)

// queueRetryAfter is when it is worth asking again where the queue was full.
const queueRetryAfter = 10 * time.Second

// A queue lets only so many flights go on at once. Those that wait take turns by client, so that one who asks for a thousand images doesn't keep the
// others waiting, and half of the places at most are for images of one host, so that a slow publisher doesn't keep the others' waiting either. Nor
// can one client have the queue for itself: when it is full, whoever has the most waiting makes room for those who have less. It is safe for concurrent use.
type queue struct {
	places, perHost int
	length          int           // how many may wait
	patience        time.Duration // for how long

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

func newQueue(places, length int, patience time.Duration) *queue {
	return &queue{
		places: places, perHost: max(places/2, 1), length: length, patience: patience,
		hosts: make(map[string]int), waiting: make(map[string][]*waiter),
	}
}

// enter waits for a place. It returns what gives the place back, to be called once; or an error matching [acproxy.ErrBusy] if too many wait
// already, or it has to give way to another client's, or the waiting takes too long, or the error of ctx.
func (q *queue) enter(ctx context.Context, client, host string) (leave func(), err error) {
	w := &waiter{host: host, told: make(chan struct{})}
	q.mu.Lock()
	if waits := q.busy >= q.places || q.hosts[host] >= q.perHost; waits && q.n >= q.length && !q.makeRoom(client) {
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
	timeout := time.NewTimer(q.patience)
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
		err = busy(codeQueueSlow, "its turn did not come within %v (fetch.queue_wait): %d images are being fetched (fetch.max_flights)", q.patience, q.places)
	}
	q.giveUp(client, w)
	return nil, err
}

func (q *queue) full() error {
	return busy(codeQueueFull, "%d images are being fetched and %d wait for their turn, which is all that fetch.max_flights and fetch.max_queue allow", q.places, q.length)
}

func busy(code, format string, args ...any) error {
	return &acproxy.Error{Kind: acproxy.ErrBusy, Code: code, Detail: fmt.Sprintf(format, args...), RetryAfter: queueRetryAfter}
}

// leave gives a place back.
func (q *queue) leave(host string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free(host)
}

// free gives a place back and lets the next ones in. The caller holds mu.
func (q *queue) free(host string) {
	q.busy--
	if q.hosts[host]--; q.hosts[host] == 0 {
		delete(q.hosts, host)
	}
	q.admit()
}

// giveUp takes a waiter out, or gives back the place that it has got in this moment.
func (q *queue) giveUp(client string, w *waiter) {
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
func (q *queue) admit() {
	for q.busy < q.places {
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
func (q *queue) makeRoom(client string) bool {
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
func (q *queue) next() (turn, i int) {
	for turn, client := range q.turns {
		i := slices.IndexFunc(q.waiting[client], func(w *waiter) bool { return q.hosts[w.host] < q.perHost })
		if i >= 0 {
			return turn, i
		}
	}
	return -1, -1
}

// remove takes the i-th waiter of a client out, and the client if it was the last. The caller holds mu.
func (q *queue) remove(client string, i int) {
	q.n--
	rest := slices.Delete(q.waiting[client], i, i+1)
	if len(rest) > 0 {
		q.waiting[client] = rest
		return
	}
	delete(q.waiting, client)
	q.turns = slices.DeleteFunc(q.turns, func(c string) bool { return c == client })
}
