package fetch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	q     *queue
	mu    sync.Mutex
	order []string
	leave map[string]func()
}

// enter lets somebody wait, and returns when he waits or is in.
func (c *comers) enter(ctx context.Context, who, client, host string) {
	go func() {
		leave, err := c.q.enter(ctx, client, host)
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
				c := &comers{t: t, q: newQueue(places, length, time.Minute), leave: make(map[string]func())}
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
// place is ever lost, and nobody is forgotten.
func TestQueueAgainstItsPromise(t *testing.T) {
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			places, length := 1+random.IntN(6), random.IntN(20)
			q := newQueue(places, length, time.Minute)
			var mu sync.Mutex
			in, hosts, outcomes := 0, map[string]int{}, map[string]int{}
			var all sync.WaitGroup
			for range 200 {
				client, host := fmt.Sprint("c", random.IntN(4)), fmt.Sprint("h", random.IntN(3))
				comes, stays, patience := random.IntN(300), random.IntN(40), random.IntN(100)
				all.Go(func() {
					time.Sleep(time.Duration(comes) * time.Second)
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(patience)*time.Second)
					defer cancel()
					leave, err := q.enter(ctx, client, host)
					mu.Lock()
					if err != nil {
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
}
