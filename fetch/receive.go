package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/trust"
)

// Defaults of a [Config].
const (
	DefaultRetries   = 20
	DefaultRetryFor  = 2 * time.Minute
	DefaultRetryWait = 200 * time.Millisecond
)

// maxRetryWait is the longest pause between two attempts, unless the publisher asks for a longer one.
const maxRetryWait = 15 * time.Second

// bufferSize is how much of a body is handed on at once.
const bufferSize = 128 << 10

// A reception is the receiving of one blob, over as many connections as it takes:
//
//	cut, stalled, reset ─▶ pause ─▶ Range, If-Range ─┬─▶ 206: goes on where it was
//	                         ▲                       ├─▶ 200: what has arrived is compared with what comes now; goes on if it is the same
//	                         │                       ├─▶ 404 and the like: the next endpoint
//	                         └───────────────────────┴── anything else
//
// Those who follow the file notice nothing but time.
type reception struct {
	d      *download
	hashes *hashes

	size     int64 // bytes there will be, -1 if nobody has said so far; the download's own size is what was known when it began
	endpoint int   // which of the download's endpoints is asked next
	whole    bool  // parts are of no use there: all of it is asked for
	left     int   // attempts that may still be made
	pause    backoff.ExponentialBackOff
	since    time.Time // when the last byte came
	trace    acproxy.Trace
}

// An interruption is why the receiving of a body ended before its time. It says nothing about the bytes: the rest of them may be had another time.
type interruption struct{ err error }

func (i *interruption) Error() string { return i.err.Error() }
func (i *interruption) Unwrap() error { return i.err }

func interrupted(err error) bool {
	var i *interruption
	return errors.As(err, &i)
}

// receive writes what comes to the partial file and returns the digest of all that is in it then. Hashing runs beside writing; what was received
// before a restart is hashed first. A nil body means that everything is there.
func (d *download) receive(body io.ReadCloser, hasher *trust.Hasher) (acproxy.Digest, error) {
	sum, to := hashing(hasher)
	r := &reception{
		d: d, size: d.size, hashes: d.hashing(to...), left: int(max(d.f.cfg.Retries, 0)), since: d.f.now(),
		pause: backoff.ExponentialBackOff{InitialInterval: d.f.cfg.RetryWait, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: maxRetryWait},
	}
	if d.carried != nil {
		r.left = 0
	}
	err := r.run(body)
	if behind := r.hashes.end(); err == nil {
		err = behind
	}
	if err != nil {
		return acproxy.Digest{}, traced(err, r.trace)
	}
	return acproxy.Digest(sum.Sum(nil)), nil
}

// hashing returns the running SHA-256 of an image, and what its bytes are to be written to for that and for what its signature is over; hasher is nil if it has none. A
// signature may be over a SHA-256, too.
func hashing(hasher *trust.Hasher) (sum hash.Hash, to []io.Writer) {
	if hasher != nil {
		if sum = hasher.SHA256(); sum != nil {
			return sum, []io.Writer{hasher}
		}
		to = append(to, hasher)
	}
	sum = sha256.New()
	return sum, append(to, sum)
}

// hashes are what an image goes through beside being written: each in a goroutine of its own, because none is as fast as the wire.
type hashes struct {
	free    chan []byte // buffers that all of them have taken
	queues  []chan *piece
	working sync.WaitGroup
	failed  []error
}

// A piece is what has come, and by how many hashes it was taken.
type piece struct {
	bytes []byte
	taken atomic.Int32
}

// hashing begins to hash what is there of the image. What comes is for take.
func (d *download) hashing(to ...io.Writer) *hashes {
	const inFlight = 16
	h := &hashes{free: make(chan []byte, inFlight), failed: make([]error, len(to))}
	for range inFlight {
		h.free <- make([]byte, bufferSize)
	}
	there := d.partial.Size()
	for i, hash := range to {
		// There is room for all buffers, so that a slow one keeps nobody waiting as long as there is another.
		queue := make(chan *piece, inFlight)
		h.queues = append(h.queues, queue)
		// Ends when end closes the queue, and end waits for it.
		h.working.Go(func() {
			h.failed[i] = d.hash(hash, there)
			for p := range queue {
				// A hash can't fail (package hash says so).
				_, _ = hash.Write(p.bytes)
				if p.taken.Add(1) == int32(len(to)) {
					h.free <- p.bytes[:bufferSize]
				}
			}
		})
	}
	return h
}

// take hashes what is in a buffer, and frees it then.
func (h *hashes) take(b []byte) {
	p := &piece{bytes: b}
	for _, queue := range h.queues {
		queue <- p
	}
}

// end waits until all is hashed, and returns what went wrong.
func (h *hashes) end() error {
	for _, queue := range h.queues {
		close(queue)
	}
	h.working.Wait()
	return errors.Join(h.failed...)
}

// hash hashes the first n bytes of the partial file.
func (d *download) hash(to io.Writer, n int64) error {
	if n == 0 {
		return nil
	}
	file, err := d.partial.Open()
	if err != nil {
		return err
	}
	defer file.Close()
	hashed, err := io.CopyBuffer(struct{ io.Writer }{to}, &cancelReader{ctx: d.ctx, r: io.LimitReader(file, n)}, make([]byte, bufferSize))
	if err == nil && hashed < n {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("hashing what has arrived of %s: %w", d.source, err)
	}
	return nil
}

// run receives to the end of the blob.
func (r *reception) run(body io.ReadCloser) error {
	for {
		var err error
		if body != nil {
			err = r.copy(body)
			// Closing says nothing about the bytes that reading didn't.
			_ = body.Close()
		}
		if !interrupted(err) || r.d.ctx.Err() != nil {
			return err
		}
		if body, err = r.again(err); err != nil {
			return err
		}
	}
}

// copy receives one body.
func (r *reception) copy(body io.Reader) error {
	d := r.d
	for {
		if d.ctx.Err() != nil {
			return context.Cause(d.ctx)
		}
		b := <-r.hashes.free
		n, err := body.Read(b)
		switch {
		case d.written+int64(n) > d.f.cfg.MaxImageSize:
			return tooLarge(d.source, d.f.cfg.MaxImageSize)
		case r.size >= 0 && d.written+int64(n) > r.size:
			return r.broken("it goes on after the %d bytes that were announced", r.size)
		}
		if n > 0 {
			if _, err := d.partial.Write(b[:n]); err != nil {
				return fmt.Errorf("keeping %s: %w", d.source, err)
			}
			d.update(func() { d.written += int64(n) })
			r.since = d.f.now()
			r.pause.Reset()
		}
		r.hashes.take(b[:n])
		switch {
		case err == io.EOF && r.size >= 0 && d.written < r.size:
			return &interruption{r.broken("it ends after %d of %d bytes", d.written, r.size)}
		case err == io.EOF:
			return nil
		case err != nil:
			return &interruption{fmt.Errorf("receiving %s after %d bytes: %w", d.source, d.written, err)}
		}
	}
}

// broken returns the error of a body that isn't what its header said.
func (r *reception) broken(format string, args ...any) error {
	if r.d.carried != nil {
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: codeNotAsSaid, Detail: "the image of " + r.d.name + " in " + r.d.source + ": " + fmt.Sprintf(format, args...)}
	}
	return &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-protocol", Detail: r.d.endpoints[r.endpoint] + ": " + fmt.Sprintf(format, args...)}
}

// again asks for the rest, as often as the budget allows, and returns a body that begins with the first byte that is missing. cause is why it has to.
func (r *reception) again(cause error) (io.ReadCloser, error) {
	d := r.d
	for {
		if r.left == 0 {
			return nil, cause
		}
		r.left--
		wait := r.pause.NextBackOff()
		var told *acproxy.Error
		if errors.As(cause, &told) {
			wait = max(wait, told.RetryAfter)
		}
		if d.f.now().Add(wait).Sub(r.since) > d.f.cfg.RetryFor {
			return nil, cause
		}
		d.f.log.Info("the receiving of an image was interrupted", "source", d.source, "bytes", d.written, "of", r.size, "again in", wait, "err", cause)
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
			return nil, context.Cause(d.ctx)
		}
		body, err := r.ask()
		if err == nil {
			return body, nil
		}
		if !interrupted(err) || d.ctx.Err() != nil || errors.Is(err, acproxy.ErrOffline) {
			// Offline it is since the download has begun. What has arrived is kept, as after any interruption.
			return nil, err
		}
		cause = err
	}
}

// ask asks an endpoint for what is missing. An error that is an interruption says that asking again may help.
func (r *reception) ask() (io.ReadCloser, error) {
	d, have := r.d, r.d.partial.Size()
	url := d.endpoints[r.endpoint]
	header := make(http.Header)
	ranged := !r.whole && askForRest(header, d.partial.Arrival(), have)
	resp, attempts, err := d.f.cfg.Web.Get(d.ctx, d.name, "image", url, header)
	r.trace = append(r.trace, attempts...)
	if err != nil {
		r.next()
		return nil, &interruption{err}
	}
	body, err := r.answer(resp, have, ranged)
	if err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	return body, nil
}

// answer returns the body of an answer, from the first missing byte on.
func (r *reception) answer(resp *http.Response, have int64, ranged bool) (io.ReadCloser, error) {
	d, url := r.d, r.d.endpoints[r.endpoint]
	switch status := resp.StatusCode; {
	case status == http.StatusPartialContent && ranged:
		total, err := checkPart(url, resp, have, r.size, d.partial.Arrival().Validators)
		if err != nil {
			r.whole = true
			return nil, &interruption{err}
		}
		if total > d.f.cfg.MaxImageSize {
			return nil, tooLarge(url, d.f.cfg.MaxImageSize)
		}
		// A part may end before what was asked for does (RFC 9110, section 15.3.7): its end is not that of the image.
		r.size, d.pieced = total, true
		return resp.Body, nil
	case status == http.StatusOK:
		if err := d.f.checkImageHeader(url, resp); err != nil {
			return nil, r.drop(err)
		}
		if r.size >= 0 && resp.ContentLength >= 0 && resp.ContentLength != r.size {
			return nil, r.drop(changed(url, "it now has %d bytes, where it had %d", resp.ContentLength, r.size))
		}
		if err := r.compare(resp.Body, have); err != nil {
			return nil, err
		}
		arrival := d.partial.Arrival()
		arrival.Source, arrival.Validators = url, validators(resp)
		if err := d.partial.Note(arrival); err != nil {
			return nil, err
		}
		// It is as if all of it had come with this answer.
		d.pieced = false
		return resp.Body, nil
	case status == http.StatusRequestedRangeNotSatisfiable && ranged, status == http.StatusPartialContent:
		r.whole = true
		return nil, &interruption{badStatus("image", url, resp)}
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, status >= 500:
		r.next()
		return nil, &interruption{badStatus("image", url, resp)}
	}
	return nil, r.drop(badStatus("image", url, resp))
}

// next turns to the next endpoint.
func (r *reception) next() {
	r.endpoint = (r.endpoint + 1) % len(r.d.endpoints)
	r.whole = false
}

// drop gives an endpoint up, and returns why as an interruption if there is another one.
func (r *reception) drop(why error) error {
	if len(r.d.endpoints) == 1 {
		return why
	}
	rest := append([]string(nil), r.d.endpoints[:r.endpoint]...)
	r.d.endpoints = append(rest, r.d.endpoints[r.endpoint+1:]...)
	r.endpoint %= len(r.d.endpoints)
	r.whole = false
	return &interruption{why}
}

// compare reads the first n bytes of a body, which have to be those that have arrived before. An endpoint with other ones is given up: where the first ones
// came from the rest may still be had.
func (r *reception) compare(body io.Reader, n int64) error {
	d := r.d
	file, err := d.partial.Open()
	if err != nil {
		return err
	}
	defer file.Close()
	is, was := make([]byte, bufferSize), make([]byte, bufferSize)
	for left := n; left > 0; {
		if d.ctx.Err() != nil {
			return context.Cause(d.ctx)
		}
		m, err := body.Read(is[:min(left, bufferSize)])
		if _, err := io.ReadFull(file, was[:m]); err != nil {
			return fmt.Errorf("reading what has arrived of %s: %w", d.source, err)
		}
		if !bytes.Equal(is[:m], was[:m]) {
			return r.drop(changed(d.endpoints[r.endpoint], "what comes now is not what came before it was interrupted"))
		}
		left -= int64(m)
		r.since = d.f.now()
		if err != nil && left > 0 {
			if err == io.EOF {
				err = r.broken("it ends after %d bytes, where there were %d", n-left, n)
			}
			return &interruption{fmt.Errorf("receiving %s again: %w", d.source, err)}
		}
	}
	return nil
}

func changed(url, format string, args ...any) error {
	return &acproxy.Error{
		Kind: acproxy.ErrPublisher, Code: "changed-while-fetching",
		Detail: fmt.Sprintf("%s has other bytes than those that have arrived: %s; unless another endpoint has the rest, asking again begins anew", url, fmt.Sprintf(format, args...)),
	}
}

// validators returns what an answer says to tell other bytes by, by the names of its header fields.
func validators(resp *http.Response) map[string]string {
	said := make(map[string]string)
	for _, field := range []string{"ETag", "Last-Modified", "Date"} {
		if v := resp.Header.Get(field); v != "" {
			said[field] = v
		}
	}
	return said
}

// askForRest adds to a header what asks for the rest of an arrival: Range and, as its condition, a validator that is strong (RFC 9110, sections 8.8.1
// and 13.1.5). It reports false, and adds nothing, if there is none.
func askForRest(header http.Header, arrival cache.Arrival, have int64) bool {
	condition := strongValidator(arrival.Validators)
	if condition == "" || have == 0 {
		return false
	}
	header.Set("Range", fmt.Sprintf("bytes=%d-", have))
	header.Set("If-Range", condition)
	return true
}

// strongValidator returns the validator to make a range depend on: a strong ETag, else a Last-Modified that lies before the second in which
// it was told (RFC 9110, section 8.8.2.2), else "".
func strongValidator(said map[string]string) string {
	if etag := said["ETag"]; etag != "" {
		if strings.HasPrefix(etag, `"`) {
			return etag
		}
		return ""
	}
	modified, err := http.ParseTime(said["Last-Modified"])
	told, dated := http.ParseTime(said["Date"])
	if err != nil || dated != nil || told.Sub(modified) < time.Second {
		return ""
	}
	return said["Last-Modified"]
}

// checkPart holds an answer with a part of an image against what was asked for: the bytes from a place on, of so many as there were (-1 if nobody
// has said), with the validators that they had. It returns how many there are in all.
func checkPart(url string, resp *http.Response, from, size int64, said map[string]string) (total int64, err error) {
	bad := func(format string, args ...any) (int64, error) {
		return 0, &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-protocol", Detail: url + " answered 206: " + fmt.Sprintf(format, args...)}
	}
	header := resp.Header.Get("Content-Range")
	first, last, total, ok := parseContentRange(header)
	coding, etag, modified := resp.Header.Get("Content-Encoding"), resp.Header.Get("ETag"), resp.Header.Get("Last-Modified")
	switch {
	case !ok:
		return bad("its Content-Range is %.80q", header)
	case first != from:
		return bad("it begins at byte %d, not at %d", first, from)
	case size >= 0 && total != size:
		return bad("there are %d bytes in all, where there were %d", total, size)
	case resp.ContentLength >= 0 && resp.ContentLength != last-first+1:
		return bad("Content-Range %.80q doesn't fit a Content-Length of %d", header, resp.ContentLength)
	case etag != said["ETag"]:
		// A part has the ETag that the whole has (RFC 9110, section 15.3.7).
		return bad("its ETag is %.80q, where it was %.80q", etag, said["ETag"])
	case modified != "" && modified != said["Last-Modified"]:
		// It may be left out. One that is another says that If-Range wasn't looked at.
		return bad("it is of %.80q, where it was of %.80q", modified, said["Last-Modified"])
	case coding != "" && coding != "identity":
		return bad("it came with Content-Encoding %q", coding)
	case strings.HasPrefix(strings.ToLower(resp.Header.Get("Content-Type")), "multipart/byteranges"):
		// RFC 9110, section 14.6: what comes are parts, each with a header of its own, whatever Content-Range says.
		return bad("it came in several parts, where one was asked for")
	}
	return total, nil
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL" (RFC 9110, section 14.4).
func parseContentRange(s string) (first, last, total int64, ok bool) {
	rest, isBytes := strings.CutPrefix(s, "bytes ")
	span, of, hasTotal := strings.Cut(rest, "/")
	from, to, isSpan := strings.Cut(span, "-")
	if !isBytes || !hasTotal || !isSpan {
		return 0, 0, 0, false
	}
	var err error
	for _, n := range []struct {
		to   *int64
		text string
	}{{&first, from}, {&last, to}, {&total, of}} {
		if n.text == "" || strings.Trim(n.text, "0123456789") != "" {
			return 0, 0, 0, false
		}
		if *n.to, err = strconv.ParseInt(n.text, 10, 64); err != nil {
			return 0, 0, 0, false
		}
	}
	return first, last, total, first <= last && last < total
}

// takeUp goes on with what an earlier attempt, maybe of an earlier process, has received. It returns the publisher's answer if that has to be used
// for all of the image, and nothing if nothing is left to be done.
func (f *Fetcher) takeUp(d *download, partial *cache.Partial, trace *acproxy.Trace) (*http.Response, error) {
	arrival, have := partial.Arrival(), partial.Size()
	header := make(http.Header)
	switch {
	case arrival.Size == have:
		f.log.Info("an image had arrived already", "ref", arrival.Ref, "bytes", have)
		// Its end may have been lost with the power, which is no fault of the publisher's.
		d.pieced = true
		return nil, d.begin(partial, nil, arrival.Size, arrival.Validators)
	case !askForRest(header, arrival, have):
		return f.get(d, nil, trace, partial.Discard())
	}
	resp, err := f.get(d, header, trace, nil)
	if err != nil {
		return nil, errors.Join(err, partial.Suspend())
	}
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		total, err := checkPart(d.source, resp, have, arrival.Size, arrival.Validators)
		if err == nil && total > f.cfg.MaxImageSize {
			err = tooLarge(d.source, f.cfg.MaxImageSize)
		}
		if err == nil {
			f.log.Info("taking up an image where it was left", "ref", arrival.Ref, "bytes", have, "of", total)
			d.pieced = true
			return nil, d.begin(partial, resp.Body, total, arrival.Validators)
		}
		*trace = append(*trace, acproxy.Attempt{What: "image", URL: d.source, Note: "asked for again, whole", Err: err.Error()})
		fallthrough
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		_ = resp.Body.Close()
		return f.get(d, nil, trace, partial.Discard())
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusGone:
		// What has arrived is of something that isn't there any more.
		err = partial.Discard()
	default:
		err = partial.Suspend()
	}
	if err != nil {
		return nil, errors.Join(err, resp.Body.Close())
	}
	return resp, nil
}

// ResumeDownloads asks for the images that were arriving when the last process ended, so that nobody has to wait for them who has seen them begin. What has
// arrived of an image that is held by now is removed. It returns as soon as they are being asked for.
func (f *Fetcher) ResumeDownloads(ctx context.Context) error {
	arrivals, err := f.cfg.Store.Arrivals(ctx)
	if err != nil {
		return err
	}
	for _, arrival := range arrivals {
		ref := arrival.Ref
		if ref.IsZero() {
			continue
		}
		// What is held for a ref is refreshed, and still answered with.
		held, rec, err := f.cfg.Store.Resolve(ctx, ref)
		switch {
		case err != nil && !errors.Is(err, acproxy.ErrNotFound):
			return err
		case err == nil && rec.Signed && arrival.Key == signedKey(ref.Name(), rec.SignatureDigest):
			if err := f.drop(ctx, arrival); err != nil {
				return err
			}
			continue
		case f.allowed(ref.Name()) != nil, f.policy(ref.Name()).Offline:
			continue
		}
		if err != nil {
			// What is lost answers nobody.
			held = cache.Resolution{}
		}
		f.join(ctx, Request{Ref: ref}, held.Digest)
	}
	return nil
}

// drop removes what has arrived of an image.
func (f *Fetcher) drop(ctx context.Context, arrival cache.Arrival) error {
	partial, err := f.cfg.Store.Resume(ctx, arrival.Key)
	if errors.Is(err, acproxy.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return partial.Discard()
}

// get asks for the image of a download, unless something went wrong before.
func (f *Fetcher) get(d *download, header http.Header, trace *acproxy.Trace, before error) (*http.Response, error) {
	if before != nil {
		return nil, before
	}
	// The body outlives this call: the download's own context ends it.
	resp, attempts, err := f.cfg.Web.Get(d.ctx, d.name, "image", d.source, header)
	*trace = append(*trace, attempts...)
	return resp, err
}
