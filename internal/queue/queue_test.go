package queue

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/acproxy/acproxy"
)

// comers enter a queue and tell in which order they were let in.
type comers struct {
	t     *testing.T
	q     *Queue
	mu    sync.Mutex
	order []string
	leave map[string]func()
}

// enter lets somebody wait, and returns when he waits or is in.
func (c *comers) enter(ctx context.Context, who, client, host string) {
	go func() {
		leave, err := c.q.Enter(ctx, client, host)
		c.mu.Lock()
		defer c.mu.Unlock()
		if err != nil {
			c.order = append(c.order, who+": "+acproxy.Code(err)+ctxCode(err))
			return
		}
		c.order = append(c.order, who)
		c.leave[who] = leave
	}()
	synctest.Wait()
}

func ctxCode(err error) string {
	if errors.Is(err, context.Canceled) {
		return "left"
	}
	return ""
}

func (c *comers) out(who string) {
	c.mu.Lock()
	leave := c.leave[who]
	c.mu.Unlock()
	leave()
	synctest.Wait()
}

func (c *comers) want(order string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := strings.Join(c.order, ", "); got != order {
		c.t.Errorf("they came in as %s\nwant %s", got, order)
	}
}

func TestQueue(t *testing.T) {
	queued := func(places, length int, run func(c *comers)) func(*testing.T) {
		return func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := &comers{t: t, q: New(Config{Places: places, Length: length, Patience: time.Minute}), leave: make(map[string]func())}
				run(c)
				if q := c.q; q.n != 0 || len(q.turns) != 0 || len(q.waiting) != 0 {
					t.Errorf("there still wait %d, %v, %v", q.n, q.turns, q.waiting)
				}
			})
		}
	}
	t.Run("clients take turns", queued(1, 10, func(c *comers) {
		ctx := c.t.Context()
		c.enter(ctx, "a1", "a", "x")
		c.enter(ctx, "a2", "a", "x")
		c.enter(ctx, "a3", "a", "x")
		c.enter(ctx, "b1", "b", "x")
		for _, who := range []string{"a1", "a2", "b1"} {
			c.out(who)
		}
		c.want("a1, a2, b1, a3")
	}))
	t.Run("a host has half of the places", queued(4, 10, func(c *comers) {
		ctx := c.t.Context()
		for _, who := range []string{"x1", "x2", "x3"} {
			c.enter(ctx, who, "a", "x")
		}
		c.enter(ctx, "y1", "a", "y")
		c.want("x1, x2, y1")
		c.out("y1")
		c.want("x1, x2, y1")
		c.out("x2")
		c.want("x1, x2, y1, x3")
	}))
	t.Run("one place is for any host", queued(1, 10, func(c *comers) {
		c.enter(c.t.Context(), "x1", "a", "x")
		c.want("x1")
	}))
	t.Run("when it is full it says so", queued(1, 1, func(c *comers) {
		ctx := c.t.Context()
		c.enter(ctx, "first", "a", "x")
		c.enter(ctx, "second", "a", "x")
		c.enter(ctx, "third", "b", "x")
		c.want("first, third: queue-full")
		c.out("first")
		c.want("first, third: queue-full, second")
	}))
	t.Run("who has the most waiting gives way", queued(1, 4, func(c *comers) {
		ctx := c.t.Context()
		for _, who := range []string{"a1", "a2", "a3", "a4", "a5"} {
			c.enter(ctx, who, "a", "x")
		}
		c.enter(ctx, "b1", "b", "x")
		c.enter(ctx, "a6", "a", "x")
		c.enter(ctx, "b2", "b", "x")
		c.enter(ctx, "b3", "b", "x")
		c.want("a1, a5: queue-full, a6: queue-full, a4: queue-full, b3: queue-full")
		for _, who := range []string{"a1", "a2", "b1", "a3"} {
			c.out(who)
		}
		c.want("a1, a5: queue-full, a6: queue-full, a4: queue-full, b3: queue-full, a2, b1, a3, b2")
	}))
	t.Run("among those who have the most, it is the one whose turn is last", queued(1, 4, func(c *comers) {
		for _, who := range []string{"in", "a1", "b1", "a2", "b2", "c1"} {
			c.enter(c.t.Context(), who, who[:1], "x")
		}
		c.want("in, b2: queue-full")
		for _, who := range []string{"in", "a1", "b1", "c1"} {
			c.out(who)
		}
		c.want("in, b2: queue-full, a1, b1, c1, a2")
	}))
	t.Run("who would have only one less doesn't make it give way", queued(1, 2, func(c *comers) {
		for _, who := range []string{"in", "a1", "b1", "c1"} {
			c.enter(c.t.Context(), who, who[:1], "x")
		}
		c.want("in, c1: queue-full")
		c.out("in")
		c.out("a1")
	}))
	t.Run("who leaves in the moment of giving way has no place to give back", queued(1, 4, func(c *comers) {
		c.enter(c.t.Context(), "in", "a", "x")
		w := &waiter{host: "x", told: make(chan struct{}), away: true}
		close(w.told)
		c.q.giveUp("a", w)
		if c.q.busy != 1 {
			c.t.Errorf("%d are in, want 1", c.q.busy)
		}
	}))
	t.Run("who waits for a host counts, though there are places", queued(4, 1, func(c *comers) {
		for _, who := range []string{"x1", "x2", "x3", "x4"} {
			c.enter(c.t.Context(), who, "a", "x")
		}
		c.enter(c.t.Context(), "y1", "a", "y")
		c.want("x1, x2, x4: queue-full, y1")
		c.out("x1")
		c.want("x1, x2, x4: queue-full, y1, x3")
	}))
	t.Run("without a queue nobody waits", queued(1, 0, func(c *comers) {
		c.enter(c.t.Context(), "first", "a", "x")
		c.enter(c.t.Context(), "second", "a", "x")
		c.want("first, second: queue-full")
		c.out("first")
		c.enter(c.t.Context(), "third", "a", "x")
		c.want("first, second: queue-full, third")
	}))
	t.Run("waiting ends", queued(1, 10, func(c *comers) {
		c.enter(c.t.Context(), "first", "a", "x")
		c.enter(c.t.Context(), "second", "a", "x")
		time.Sleep(time.Minute - time.Nanosecond)
		synctest.Wait()
		c.want("first")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		c.want("first, second: queue-slow")
	}))
	t.Run("who leaves is forgotten", queued(1, 10, func(c *comers) {
		ctx, cancel := context.WithCancel(c.t.Context())
		c.enter(c.t.Context(), "first", "a", "x")
		c.enter(ctx, "second", "a", "x")
		c.enter(c.t.Context(), "third", "a", "x")
		cancel()
		synctest.Wait()
		c.out("first")
		c.want("first, second: left, third")
	}))
}

// TestQueueAgainstItsPromise lets many come and go at random: never are more in than there are places, nor more than half of them of one host, no
// place is ever lost, and nobody is forgotten. No more wait than may, and whoever is sent away is of a client that has as many waiting as any other, but for
// one; if it waited already, it is the last of its client's, and who came instead has no more waiting than that.
func TestQueueAgainstItsPromise(t *testing.T) {
	refused, gaveWay := 0, 0
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			places, length := 1+random.IntN(6), random.IntN(20)
			q := New(Config{Places: places, Length: length, Patience: time.Minute})
			var mu sync.Mutex
			in, hosts, outcomes := 0, map[string]int{}, map[string]int{}
			came, newcomer := 0, ""       // how many, and of which client the last one
			waiting := map[string][]int{} // by client, as they came
			// sentAway looks at the queue in the moment in which somebody is told that it is full.
			sentAway := func(number int, client string) {
				q.mu.Lock()
				defer q.mu.Unlock()
				if q.n > length {
					t.Errorf("seed %d: %d wait where %d may", seed, q.n, length)
				}
				has := len(q.waiting[client])
				for c, others := range q.waiting {
					if len(others) > has+1 {
						t.Errorf("seed %d: one of %s was sent away, which has %d waiting, and %s has %d", seed, client, has, c, len(others))
					}
				}
				if number == came {
					refused++
					return
				}
				gaveWay++
				if has > 0 && slices.Max(waiting[client]) > number {
					t.Errorf("seed %d: of %s, %d had to give way while %v wait", seed, client, number, waiting[client])
				}
				if client == newcomer || len(q.waiting[newcomer]) > has {
					t.Errorf("seed %d: one of %s, which has %d left, gave way to %s, which now has %d", seed, client, has, newcomer, len(q.waiting[newcomer]))
				}
			}
			var all sync.WaitGroup
			for i := range 200 {
				// Some come more often than others.
				client, host := fmt.Sprint("c", random.IntN(1+random.IntN(4))), fmt.Sprint("h", random.IntN(3))
				comes, stays, patience := random.IntN(300), random.IntN(40), random.IntN(100)
				all.Go(func() {
					// No two things happen in the same moment.
					time.Sleep(time.Duration(comes)*time.Second + time.Duration(i)*time.Millisecond)
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(patience)*time.Second)
					defer cancel()
					mu.Lock()
					came++
					number := came
					newcomer = client
					waiting[client] = append(waiting[client], number)
					mu.Unlock()
					leave, err := q.Enter(ctx, client, host)
					mu.Lock()
					waiting[client] = slices.DeleteFunc(waiting[client], func(n int) bool { return n == number })
					if err != nil {
						if acproxy.Code(err) == codeFull {
							sentAway(number, client)
						}
						outcomes[acproxy.Code(err)]++
						mu.Unlock()
						return
					}
					outcomes["in"]++
					in++
					hosts[host]++
					if in > places || hosts[host] > max(places/2, 1) {
						t.Errorf("seed %d: %d are in, %d of them of %s, with %d places", seed, in, hosts[host], host, places)
					}
					mu.Unlock()
					time.Sleep(time.Duration(stays) * time.Second)
					mu.Lock()
					in--
					hosts[host]--
					mu.Unlock()
					leave()
				})
			}
			all.Wait()
			if q.busy != 0 || q.n != 0 || len(q.hosts) != 0 || len(q.turns) != 0 || len(q.waiting) != 0 {
				t.Errorf("seed %d: in the end %d are in, %d wait, %v, %v", seed, q.busy, q.n, q.hosts, q.turns)
			}
			sum := 0
			for _, n := range outcomes {
				sum += n
			}
			if sum != 200 || outcomes["in"] == 0 {
				t.Errorf("seed %d: %v", seed, outcomes)
			}
		})
	}
	if refused == 0 || gaveWay == 0 {
		t.Errorf("%d found the queue full and %d had to give way: this asked for nothing", refused, gaveWay)
	}
}
