package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

// node asks for images until ctx is done, in all the ways in which nodes do.
func (s *soak) node(ctx context.Context, random *rand.Rand) {
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 1}}
	defer client.CloseIdleConnections()
	for ctx.Err() == nil {
		// Some are asked for much more often than others.
		im := s.stage.images[min(int(random.ExpFloat64()*float64(len(s.stage.images))/4), len(s.stage.images)-1)]
		latest := random.IntN(4) == 0
		how := []string{"whole", "whole", "whole", "leaves", "crawls", "part"}[random.IntN(6)]
		if s.ask(ctx, client, im, latest, how, random) {
			continue
		}
		// Whoever was refused doesn't ask again at once.
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// ask asks for one image and holds what it gets against what was published. It reports whether it got it.
func (s *soak) ask(ctx context.Context, client *http.Client, im image, latest bool, how string, random *rand.Rand) bool {
	st := s.stage
	st.mu.Lock()
	address := st.address
	distrusted := st.distrusted
	st.mu.Unlock()
	untrusted := im.n%2 == 1 && !distrusted.IsZero()
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	version := im.version
	if latest {
		version = ""
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/.acproxy/images/%s.aci?version=%s&os=linux&arch=amd64", address, im.name, version), nil)
	if err != nil {
		s.failf("%v", err)
		return false
	}
	from := int64(0)
	if how == "part" && !latest {
		from = random.Int64N(im.bytes)
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	resp, err := client.Do(req)
	if err != nil {
		s.count("got: no answer", 1)
		return false
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		s.count("got: "+fmt.Sprint(resp.StatusCode)+" "+problem(resp.Body), 1)
		return false
	}
	if resp.StatusCode != http.StatusPartialContent {
		from = 0
	}
	got := st.compare(im, latest, from)
	defer func() {
		if len(got.fits) == 0 {
			s.failf("%s:%s from byte %d gave bytes that nobody published, before byte %d, as %d with %s", im.name, version, from, got.at, resp.StatusCode, resp.Header.Get("Cache-Status"))
		}
	}()
	switch how {
	case "leaves":
		n, _ := io.CopyN(got, resp.Body, random.Int64N(im.bytes))
		s.count("bytes that somebody who left got", n)
		s.count("got: some, and left", 1)
		return true
	case "crawls":
		n, _ := io.CopyN(got, resp.Body, 1024)
		s.count("bytes of somebody slow", n)
		select {
		case <-time.After(time.Duration(random.IntN(500)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	n, err := io.Copy(got, resp.Body)
	if err != nil {
		s.count("got: a body that was cut", 1)
		s.count("bytes of bodies that were cut", n)
		return false
	}
	s.count("got: all of it", 1)
	s.count("bytes of whole bodies", n)
	if untrusted && s.stillDistrusted(distrusted) {
		s.failf("%s was served whole %v after its key was taken away", im.name, began.Sub(distrusted))
	}
	if len(got.fits) > 0 && !got.whole() {
		s.failf("%s:%s from byte %d gave %d bytes that are no image, as %d with %s", im.name, version, from, got.at-from, resp.StatusCode, resp.Header.Get("Cache-Status"))
	}
	return true
}

// A comparer holds what comes against the images that it may be of, each byte of it.
type comparer struct {
	fits []fit // those that it is of so far
	at   int64 // where the next byte is in them
}

type fit struct {
	image
	flipped bool // in one bit, as the publisher flips them: that is noticed in the end, and the body must not end well then
}

// compare returns what compares a body that begins with some byte of an image, or of any version of it.
func (st *stage) compare(im image, anyVersion bool, from int64) *comparer {
	c := &comparer{at: from}
	for _, other := range st.images {
		if other.name == im.name && (anyVersion || other.version == im.version) {
			c.fits = append(c.fits, fit{image: other})
		}
	}
	return c
}

var errUnlike = errors.New("the bytes are of no image that it may be of")

func (c *comparer) Write(b []byte) (int, error) {
	fits := c.fits[:0]
	for _, f := range c.fits {
		if c.at+int64(len(b)) > f.bytes {
			continue
		}
		was := f.content[c.at:][:len(b)]
		flips := 0
		if !bytes.Equal(b, was) {
			for i := range b {
				flips += bits.OnesCount8(b[i] ^ was[i])
			}
		}
		if flips == 0 || flips == 1 && !f.flipped {
			f.flipped = f.flipped || flips == 1
			fits = append(fits, f)
		}
	}
	if c.fits = fits; len(fits) == 0 {
		return 0, errUnlike
	}
	c.at += int64(len(b))
	return len(b), nil
}

// whole reports whether all has come, to the end, as it was published.
func (c *comparer) whole() bool {
	return slices.ContainsFunc(c.fits, func(f fit) bool { return !f.flipped && c.at == f.bytes })
}

// stillDistrusted reports whether the odd names' key has been untrusted without a break since a time.
func (s *soak) stillDistrusted(since time.Time) bool {
	s.stage.mu.Lock()
	defer s.stage.mu.Unlock()
	return s.stage.distrusted.Equal(since)
}

// fetchUntilWell asks for an image, now that all is well, until it comes.
func (s *soak) fetchUntilWell(ctx context.Context, im image) {
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	for end := time.Now().Add(30 * time.Second); ; {
		if s.ask(ctx, client, im, false, "whole", nil) {
			return
		}
		if time.Now().After(end) || ctx.Err() != nil {
			s.failf("%s:%s doesn't come, although all is well", im.name, im.version)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
