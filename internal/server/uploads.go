package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
)

// Defaults of a [Push].
const (
	DefaultMaxUploads    = 16
	DefaultUploadTimeout = time.Hour
	DefaultMaxManifest   = 1 << 20
	DefaultMaxSignature  = 1 << 20
)

// Push bounds what clients upload. A field that is 0 means the default.
type Push struct {
	MaxUploads   int           // in progress at once
	Timeout      time.Duration // from the start of one until all of it is here
	MaxManifest  int64         // bytes
	MaxSignature int64         // bytes
}

func (p Push) withDefaults() Push {
	if p.MaxUploads == 0 {
		p.MaxUploads = DefaultMaxUploads
	}
	if p.Timeout == 0 {
		p.Timeout = DefaultUploadTimeout
	}
	if p.MaxManifest == 0 {
		p.MaxManifest = DefaultMaxManifest
	}
	if p.MaxSignature == 0 {
		p.MaxSignature = DefaultMaxSignature
	}
	return p
}

// uploads are the uploads in progress, and those that ended lately. They are gone with the process.
type uploads struct {
	fetcher *fetch.Fetcher
	limits  Push
	pushed  func(outcome string, bytes int64)
	ctx     context.Context
	cancel  context.CancelCauseFunc

	mu     sync.Mutex
	closed bool
	all    map[string]*upload
	open   int
	busy   sync.WaitGroup // requests about uploads
}

func newUploads(fetcher *fetch.Fetcher, limits Push, pushed func(string, int64)) *uploads {
	us := &uploads{fetcher: fetcher, limits: limits.withDefaults(), pushed: pushed, all: make(map[string]*upload)}
	if us.pushed == nil {
		us.pushed = func(string, int64) {}
	}
	us.ctx, us.cancel = context.WithCancelCause(context.Background())
	return us
}

// An upload is an image on its way here.
//
//	begin ─▶ parts, in any order, each as often as it takes ─▶ complete ─▶ Publish ─▶ verdict, which is told again to who asks again
type upload struct {
	uploads *uploads
	id      string
	ref     acproxy.Ref
	who     string // began it
	source  string
	ctx     context.Context // ends with the time that it has, or with the server
	cancel  context.CancelFunc

	mu        sync.Mutex
	manifest  *aci.Manifest
	signature []byte
	image     *fetch.Upload
	sending   map[string]bool
	failed    map[string]error // why a part could not be taken
	ended     bool             // nothing is taken any more
	decided   chan struct{}    // closed when taken and err are set
	taken     fetch.Taken
	err       error
}

var errTooLate = &acproxy.Error{Kind: acproxy.ErrTimeout, Code: "upload-timeout", Detail: "the upload took longer than push.timeout"}

// isUploadID reports whether a text may be the ID of an upload, which is one of [rand.Text].
func isUploadID(id string) bool {
	return len(id) == 26 && strings.Trim(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// begin begins an upload.
func (us *uploads) begin(ref acproxy.Ref, who, from string) (*upload, error) {
	us.mu.Lock()
	defer us.mu.Unlock()
	switch {
	case us.closed:
		return nil, errEnding
	case us.open >= us.limits.MaxUploads:
		return nil, &acproxy.Error{
			Kind: acproxy.ErrBusy, Code: "too-many-uploads", RetryAfter: 10 * time.Second,
			Detail: fmt.Sprintf("%d uploads are in progress, as many as push.max_uploads allows; push again later", us.open),
		}
	}
	u := &upload{
		uploads: us, id: rand.Text(), ref: ref, who: who, source: "push from " + pusher(who, from),
		sending: make(map[string]bool), failed: make(map[string]error), decided: make(chan struct{}),
	}
	u.ctx, u.cancel = context.WithTimeoutCause(us.ctx, us.limits.Timeout, errTooLate)
	us.all[u.id] = u
	us.open++
	// It ends with the time that the upload has, or with the server, whose close waits for what it does.
	context.AfterFunc(u.ctx, u.expire)
	return u, nil
}

var errEnding = &acproxy.Error{Kind: acproxy.ErrBusy, Code: "shutting-down", Detail: "this proxy is shutting down"}

// pusher says who pushes, for people.
func pusher(who, from string) string {
	if who == socketClient || from == "" || from == "@" {
		return who
	}
	if who == "" {
		return from
	}
	return who + " at " + from
}

// get returns an upload, nil if there is none.
func (us *uploads) get(id string) *upload {
	us.mu.Lock()
	defer us.mu.Unlock()
	return us.all[id]
}

// inProgress returns how many uploads are.
func (us *uploads) inProgress() int {
	us.mu.Lock()
	defer us.mu.Unlock()
	return us.open
}

// enter counts a request about an upload, unless the server ends.
func (us *uploads) enter() error {
	us.mu.Lock()
	defer us.mu.Unlock()
	if us.closed {
		return errEnding
	}
	us.busy.Add(1)
	return nil
}

// close ends all uploads and waits for what is done with them.
func (us *uploads) close() {
	us.mu.Lock()
	us.closed = true
	var all []*upload
	for _, u := range us.all {
		all = append(all, u)
	}
	us.mu.Unlock()
	us.cancel(errEnding)
	us.busy.Wait()
	for _, u := range all {
		u.end()
	}
}

// keepVerdict is for how long a verdict is told again, and maxEnded how many of them are kept.
const (
	keepVerdict = 10 * time.Minute
	maxEnded    = 1000
)

// expire ends an upload whose time is over, unless its verdict is being made.
func (u *upload) expire() {
	if u.uploads.enter() != nil {
		return
	}
	defer u.uploads.busy.Done()
	u.end()
}

// end has an upload take nothing any more, and drops what it has. It reports whether it took something until now.
func (u *upload) end() bool {
	u.mu.Lock()
	was := !u.ended
	u.ended = true
	image := u.image
	u.image = nil
	u.mu.Unlock()
	if !was {
		return false
	}
	u.over(image)
	u.mu.Lock()
	u.err = errors.New("the upload was given up")
	if cause := context.Cause(u.ctx); cause != nil {
		u.err = cause
	}
	u.mu.Unlock()
	close(u.decided)
	return true
}

// over gives the place of an upload free, and what is left of it.
func (u *upload) over(image *fetch.Upload) {
	if image != nil {
		// What can't be removed is removed at the next start.
		_ = image.Discard()
	}
	us := u.uploads
	us.mu.Lock()
	us.open--
	if len(us.all)-us.open > maxEnded {
		for id, other := range us.all {
			select {
			case <-other.decided:
				delete(us.all, id)
			default:
			}
		}
	}
	us.mu.Unlock()
	time.AfterFunc(keepVerdict, func() {
		us.mu.Lock()
		defer us.mu.Unlock()
		delete(us.all, u.id)
	})
	u.cancel()
}

// giveUp drops an upload because its client says so, and returns what went wrong here.
func (u *upload) giveUp() string {
	u.mu.Lock()
	why := u.why()
	u.mu.Unlock()
	if u.end() {
		u.uploads.pushed("given-up", 0)
	}
	if why != nil {
		return why.Error()
	}
	return "the upload was dropped, as the client wants it"
}

// why returns why one of the parts could not be taken. It needs the lock.
func (u *upload) why() error {
	for _, part := range []string{partManifest, partSignature, partImage} {
		if err := u.failed[part]; err != nil {
			return err
		}
	}
	return nil
}

// take receives a part, in the place of one that came before.
func (u *upload) take(part string, body io.Reader, size int64) error {
	if err := u.uploads.enter(); err != nil {
		return err
	}
	defer u.uploads.busy.Done()
	u.mu.Lock()
	switch {
	case u.ended:
		u.mu.Unlock()
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "upload-over", Detail: "this upload has ended, and takes nothing any more: push again"}
	case u.sending[part]:
		u.mu.Unlock()
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "part-in-progress", Detail: "the " + part + " of this upload is being sent already"}
	}
	u.sending[part] = true
	u.mu.Unlock()
	store, err := u.receive(part, &reader{u.ctx, body}, size)
	if cause := context.Cause(u.ctx); err != nil && cause != nil {
		err = cause
	}
	u.mu.Lock()
	u.sending[part] = false
	u.failed[part] = err
	ended := u.ended
	var before *fetch.Upload
	if err == nil {
		before = store(ended)
	}
	u.mu.Unlock()
	if before != nil {
		// What can't be removed is removed at the next start.
		_ = before.Discard()
	}
	if err == nil && ended {
		return errors.New("the upload was given up")
	}
	return err
}

// reader ends reading when ctx is done.
type reader struct {
	ctx context.Context
	r   io.Reader
}

// Read is the reader's.
func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// receive reads a part. store, which needs the lock, keeps it, or if the upload has ended not, and returns what is to be discarded.
func (u *upload) receive(part string, body io.Reader, size int64) (store func(ended bool) *fetch.Upload, err error) {
	limits := u.uploads.limits
	switch part {
	case partManifest:
		m, err := readManifest(body, limits.MaxManifest)
		if err == nil {
			err = u.ref.Matches(m.Name, m.Labels)
		}
		return func(bool) *fetch.Upload { u.manifest = &m; return nil }, err
	case partSignature:
		text, err := readPart(body, limits.MaxSignature, partSignature, "fetch.max_signature_size")
		return func(bool) *fetch.Upload { u.signature = text; return nil }, err
	}
	// What is sure to be refused need not be received.
	if p, ok := u.publication(); ok && p.Signature != nil {
		if err := u.uploads.fetcher.ExaminePublication(p); err != nil {
			return nil, err
		}
	}
	image, err := u.uploads.fetcher.Receive(u.ctx, u.ref, u.source, size, body)
	if err != nil {
		return nil, err
	}
	u.uploads.pushed("", image.Size())
	return func(ended bool) *fetch.Upload {
		if ended {
			return image
		}
		before := u.image
		u.image = image
		return before
	}, nil
}

// publication returns what is known of the image, ok once its manifest is here.
func (u *upload) publication() (p fetch.Publication, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.said()
}

// said needs the lock.
func (u *upload) said() (p fetch.Publication, ok bool) {
	if u.manifest == nil {
		return p, false
	}
	return fetch.Publication{Ref: u.ref, Name: u.manifest.Name, Labels: u.manifest.Labels, Signature: u.signature, Source: u.source, Client: u.who}, true
}

// complete has the image judged, once, and returns the verdict. It goes on when the client leaves.
func (u *upload) complete(ctx context.Context) (fetch.Taken, error) {
	if err := u.uploads.enter(); err != nil {
		return fetch.Taken{}, err
	}
	defer u.uploads.busy.Done()
	p, image, mine, err := u.seal()
	switch {
	case err != nil:
		return fetch.Taken{}, err
	case mine:
		u.judge(p, image)
	}
	select {
	case <-u.decided:
	case <-ctx.Done():
		return fetch.Taken{}, context.Cause(ctx)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.taken, u.err
}

// seal has an upload take nothing any more, if all of it is here. mine is for the first one who asks.
func (u *upload) seal() (p fetch.Publication, image *fetch.Upload, mine bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended {
		return p, nil, false, nil
	}
	if err := u.why(); err != nil {
		return p, nil, false, err
	}
	var missing []string
	for _, part := range []string{partManifest, partSignature, partImage} {
		here := map[string]bool{partManifest: u.manifest != nil, partSignature: true, partImage: u.image != nil}[part]
		if !here || u.sending[part] {
			missing = append(missing, part)
		}
	}
	if len(missing) > 0 {
		return p, nil, false, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "incomplete-upload", Detail: "not all of the upload is here yet: " + strings.Join(missing, ", ") + " missing"}
	}
	p, _ = u.said()
	image, u.image, u.ended = u.image, nil, true
	return p, image, true, nil
}

// judge publishes the image, or finds out why not.
func (u *upload) judge(p fetch.Publication, image *fetch.Upload) {
	// Not the upload's own time, which was for its coming here.
	taken, err := u.uploads.fetcher.Publish(u.uploads.ctx, p, image)
	u.over(nil)
	outcome := "published"
	switch {
	case err != nil:
		if outcome = acproxy.Code(err); outcome == "" {
			outcome = "failed"
		}
	case taken.Held:
		outcome = "held"
	}
	u.uploads.pushed(outcome, 0)
	u.mu.Lock()
	u.taken, u.err = taken, err
	u.mu.Unlock()
	close(u.decided)
}
