package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
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
	from, to := int64(0), im.bytes
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
	switch how {
	case "leaves":
		n, _ := io.CopyN(io.Discard, resp.Body, random.Int64N(im.bytes))
		s.count("bytes that somebody who left got", n)
		s.count("got: some, and left", 1)
		return true
	case "crawls":
		n, _ := io.CopyN(io.Discard, resp.Body, 1024)
		s.count("bytes that somebody who left got", n)
		select {
		case <-time.After(time.Duration(random.IntN(500)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	hash := sha256.New()
	n, err := io.Copy(hash, resp.Body)
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
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		if n != to-from {
			s.failf("%s:%s from byte %d gave %d bytes", im.name, im.version, from, n)
		}
	case how != "crawls":
		got, ok := st.sums[[sha256.Size]byte(hash.Sum(nil))]
		if !ok {
			s.failf("%s:%s gave %d bytes that nobody published, as %d with %s", im.name, version, n, resp.StatusCode, resp.Header.Get("Cache-Status"))
		} else if got.name != im.name || !latest && got.version != im.version {
			s.failf("%s:%s gave %s:%s", im.name, version, got.name, got.version)
		}
	case n != to-1024 && !latest:
		s.failf("%s:%s gave %d bytes to somebody slow", im.name, version, n+1024)
	}
	return true
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
