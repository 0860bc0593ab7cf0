package discovery

import (
	"container/list"
	"sync"
	"time"

	gocache "github.com/patrickmn/go-cache"
)

// pages remembers pages, so many at most. When it is full those that have expired go first, then the oldest.
//
// The cache underneath knows no bound, and finding the oldest in it means looking at all. The two lists beside it hold the keys in the
// order in which they were put in, which among pages of one time to live is the order in which they expire.
type pages struct {
	max int
	now func() time.Time

	mu    sync.Mutex
	cache *gocache.Cache // key → *remembered
	order [2]*list.List  // of *remembered: negative, positive
	next  uint64
}

// remembered is a page with its time.
type remembered struct {
	key     string
	page    *page
	expires time.Time
	number  uint64        // counts up: which of two is older
	place   *list.Element // in list of pages.order
	list    *list.List
}

func newPages(max int, now func() time.Time) *pages {
	// No janitor: it would be a goroutine that nobody can stop. What has expired leaves when it is asked for, or when room is needed.
	return &pages{max: max, now: now, cache: gocache.New(gocache.NoExpiration, 0), order: [2]*list.List{list.New(), list.New()}}
}

func (p *pages) get(key string) *page {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.find(key)
	if r == nil {
		return nil
	}
	if !p.now().Before(r.expires) {
		p.drop(r)
		return nil
	}
	return r.page
}

// find returns what is held for a key, expired or not. The expiry is by our clock; the cache's own is the wall clock's.
func (p *pages) find(key string) *remembered {
	v, ok := p.cache.Get(key)
	if !ok {
		return nil
	}
	r, _ := v.(*remembered)
	return r
}

func (p *pages) keep(key string, pg *page, ttl time.Duration, positive bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old := p.find(key); old != nil {
		p.drop(old)
	}
	if p.cache.ItemCount() >= p.max {
		p.makeRoom()
	}
	order := p.order[0]
	if positive {
		order = p.order[1]
	}
	p.next++
	r := &remembered{key: key, page: pg, expires: p.now().Add(ttl), number: p.next, list: order}
	r.place = order.PushBack(r)
	p.cache.Set(key, r, gocache.NoExpiration)
}

// makeRoom drops what has expired, or the oldest if nothing has.
func (p *pages) makeRoom() {
	var oldest *remembered
	dropped := false
	for _, order := range p.order {
		for {
			front := order.Front()
			if front == nil {
				break
			}
			r, _ := front.Value.(*remembered)
			if p.now().Before(r.expires) {
				if oldest == nil || r.number < oldest.number {
					oldest = r
				}
				break
			}
			p.drop(r)
			dropped = true
		}
	}
	if !dropped && oldest != nil {
		p.drop(oldest)
	}
}

func (p *pages) drop(r *remembered) {
	r.list.Remove(r.place)
	p.cache.Delete(r.key)
}

func (p *pages) forget(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.find(key); r != nil {
		p.drop(r)
	}
}

// clear forgets all pages.
func (p *pages) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cache.Flush()
	p.order = [2]*list.List{list.New(), list.New()}
}

// len returns how many pages are held, expired ones that nobody asked for among them.
func (p *pages) len() int { return p.cache.ItemCount() }
