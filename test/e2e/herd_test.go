package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/publisher"
)

func TestHerd(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 2<<20))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	const herd, leaving = 50, 20
	// The clients that leave do so while the publisher stalls: nobody has the whole image then.
	leave, gone := context.WithCancel(s.context())
	defer gone()
	var begun, left, done sync.WaitGroup
	begun.Add(herd)
	sums := make([]string, herd)
	errs := make([]error, herd)
	client := s.client()
	for i := range herd {
		ctx := s.context()
		if i < leaving {
			ctx = leave
			left.Add(1)
		}
		done.Go(func() {
			if i < leaving {
				defer left.Done()
			}
			begin := sync.OnceFunc(begun.Done)
			defer begin()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.direct(im, "aci"), nil)
			if err != nil {
				errs[i] = err
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				errs[i] = err
				return
			}
			defer resp.Body.Close()
			hash := sha256.New()
			if _, err := io.CopyN(hash, resp.Body, 1000); err != nil {
				errs[i] = err
				return
			}
			begin()
			_, errs[i] = io.Copy(hash, resp.Body)
			sums[i] = fmt.Sprintf("%x", hash.Sum(nil))
		})
	}
	wait(t, "all clients begin", &begun)
	within(t, "the publisher stalls", trouble.Stalled())
	gone()
	wait(t, "some clients leave", &left)
	trouble.Release()
	wait(t, "all clients end", &done)
	for i := range herd {
		switch {
		case i < leaving && errs[i] == nil:
			t.Errorf("client %d left midway and has a whole body", i)
		case i >= leaving && (errs[i] != nil || sums[i] != im.sum):
			t.Errorf("client %d: %v, or other bytes than those published", i, errs[i])
		}
	}
	for _, pattern := range []string{im.blob(), im.signature(), im.name} {
		if n := s.publisher.Count(pattern); n != 1 {
			t.Errorf("the publisher was asked for %s %d times, want once", pattern, n)
		}
	}
}

// wait waits for a group, but not for ever.
func wait(t testing.TB, what string, group *sync.WaitGroup) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		group.Wait()
		close(done)
	}()
	within(t, what, done)
}

func TestHerdOfSignatures(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(100)})
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() { wantStatus(t, s.get(s.direct(im, "aci.asc")), http.StatusOK) })
	}
	// Signatures come although the image doesn't.
	wait(t, "all signatures", &group)
	trouble.Release()
	wantImage(t, s.get(s.direct(im, "aci")), im)
	if n := s.publisher.Count(im.signature()); n != 1 {
		t.Errorf("the publisher was asked for the signature %d times, want once", n)
	}
}

func TestTheOnlyClientLeaves(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before the first byte", "midway"} {
		t.Run(when, func(t *testing.T) {
			s := newScene(t, "")
			im := s.publish(large("app", 1<<20))
			ctx, leave := context.WithCancel(s.context())
			defer leave()
			var trouble *publisher.Trouble
			if when == "midway" {
				trouble = s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
				resp := s.open(ctx, s.direct(im, "aci"))
				if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
					t.Fatal(err)
				}
				leave()
				_ = resp.Body.Close()
			} else {
				trouble = s.publisher.Misbehave(publisher.URL(im.signature()), publisher.Fault{StallAfter: publisher.At(10)})
				gone := make(chan struct{})
				// Ends with the context.
				go func() {
					defer close(gone)
					s.node.Get(ctx, s.direct(im, "aci"), nil, nil)
				}()
				within(t, "the publisher is asked", trouble.Stalled())
				leave()
				within(t, "the client is gone", gone)
			}
			trouble.Release()
			// The image is kept although nobody waits for it.
			kept := func(r publisher.Request) bool { return r.At() == im.blob() && r.Done && r.Bytes == int64(len(im.aci)) }
			if err := s.publisher.Wait(s.context(), 1, kept); err != nil {
				t.Fatal(err)
			}
			a := s.get(s.direct(im, "aci"))
			wantImage(t, a, im)
			if n := s.publisher.Count(im.blob()); n != 1 {
				t.Errorf("the publisher was asked for the image %d times, want once", n)
			}
		})
	}
}

func TestSlowReaderHurtsNobody(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	// More than the buffers of a connection hold.
	im := s.publish(large("app", 24<<20))
	slow := s.open(s.context(), s.direct(im, "aci"))
	defer slow.Body.Close()
	hash := sha256.New()
	if _, err := io.CopyN(hash, slow.Body, 1000); err != nil {
		t.Fatal(err)
	}
	// The slow one reads no further for now; everything goes on without it.
	wantImage(t, s.get(s.direct(im, "aci")), im)
	s.inspected(im)
	wantHeader(t, s.do(http.MethodHead, s.direct(im, "aci")), "Cache-Status", hit)
	if _, err := io.Copy(hash, slow.Body); err != nil {
		t.Errorf("the slow reader: %v", err)
	}
	if got := fmt.Sprintf("%x", hash.Sum(nil)); got != im.sum {
		t.Error("the slow reader got other bytes")
	}
	if n := s.publisher.Count(im.blob()); n != 1 {
		t.Errorf("the publisher was asked for the image %d times, want once", n)
	}
}

// TestFiveHundredOnOneColdImage asks for an image that is not here yet from five hundred clients at once. Half of them leave midway, some read a kilobyte a
// second. The publisher is asked once, and the fast ones have everything before a slow one has half.
func TestFiveHundredOnOneColdImage(t *testing.T) {
	t.Parallel()
	s := newScene(t, "log: {access: false}")
	im := s.publish(large("app", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(stalled)})
	const herd, leaving, slow = 500, 250, 50
	before := s.vitals()
	leave, gone := context.WithCancel(s.context())
	defer gone()
	hurry := make(chan struct{})
	var slowRead atomic.Int64 // of the slow one that has read most
	var begun, left, fast, done sync.WaitGroup
	begun.Add(herd)
	fast.Add(herd - leaving - slow)
	left.Add(leaving)
	client := s.client()
	client.Transport.(*http.Transport).DisableKeepAlives = true
	get := func(i int) (sum string, err error) {
		ctx := s.context()
		if i < leaving {
			ctx = leave
		}
		begin := sync.OnceFunc(begun.Done)
		defer begin()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.direct(im, "aci"), nil)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		hash := sha256.New()
		n, err := io.CopyN(hash, resp.Body, 1000)
		if err != nil {
			return "", err
		}
		begin()
		if i >= herd-slow {
			every := time.NewTicker(time.Second)
			defer every.Stop()
			for hurried := false; !hurried && err == nil; {
				select {
				case <-every.C:
					var m int64
					m, err = io.CopyN(hash, resp.Body, 1000)
					n += m
					slowRead.Store(max(slowRead.Load(), n))
				case <-hurry:
					hurried = true
				}
			}
		}
		if err == nil {
			_, err = io.Copy(hash, resp.Body)
		}
		return fmt.Sprintf("%x", hash.Sum(nil)), err
	}
	for i := range herd {
		// Ends with the answer; waited for below.
		done.Go(func() {
			sum, err := get(i)
			switch {
			case i < leaving:
				if err == nil {
					t.Errorf("client %d left midway and has a whole body", i)
				}
				left.Done()
				return
			case i < herd-slow:
				defer fast.Done()
			}
			if err != nil || sum != im.sum {
				t.Errorf("client %d: %v, or other bytes than those published", i, err)
			}
		})
	}
	wait(t, "all clients begin", &begun)
	within(t, "the publisher stalls", trouble.Stalled())
	gone()
	wait(t, "half of the clients leave", &left)
	trouble.Release()
	wait(t, "the fast ones end", &fast)
	if n := slowRead.Load(); n > int64(len(im.aci))/2 {
		t.Errorf("a slow one has %d of %d bytes already", n, len(im.aci))
	}
	close(hurry)
	wait(t, "all clients end", &done)
	for _, pattern := range []string{im.blob(), im.signature(), im.name} {
		if n := s.publisher.Count(pattern); n != 1 {
			t.Errorf("the publisher was asked for %s %d times, want once", pattern, n)
		}
	}
	// Two connections to the publisher may be kept.
	before.descriptors, before.goroutines = before.descriptors+2, before.goroutines+6
	s.settles(before)
}
