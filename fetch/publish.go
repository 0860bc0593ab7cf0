package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"strings"
	"sync"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci"
)

// Codes of what becomes of a publication.
const (
	codeNotPublishedHere = "not-published-here"
	codeNotPublished     = "not-published"
	codeNotAsAnnounced   = "not-as-announced"
)

// A Publication is an image that somebody publishes here. Nothing that is said of it is believed: it is what to hold the bytes against.
type Publication struct {
	Ref       acproxy.Ref       // what it was announced as; the manifest may have more labels than that
	Name      string            // of the manifest that came with it
	Labels    map[string]string // all that this manifest has
	Signature []byte            // nil if there is none
	Source    string            // where it comes from, for people
	Client    string            // who publishes it
}

// PublishedHere returns the prefix under which a name's images are published here. ok reports whether they are.
func (f *Fetcher) PublishedHere(name string) (prefix string, ok bool) {
	p := f.policy(name)
	return p.Prefix, p.Local
}

// Publishable returns an error, matching [acproxy.ErrNotFound] or [acproxy.ErrRefused], if no images of a name are published here.
func (f *Fetcher) Publishable(name string) error {
	if err := f.allowed(name); err != nil {
		return err
	}
	if _, ok := f.PublishedHere(name); !ok {
		return &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: codeNotPublishedHere,
			Detail: name + " is not published here; set publisher: local for a prefix of it in the configuration (publishers) if it shall be",
		}
	}
	return nil
}

// ExaminePublication judges a publication as far as that is possible without its bytes, as [Fetcher.Examine] does.
func (f *Fetcher) ExaminePublication(p Publication) error {
	c, err := f.publication(p)
	if err != nil {
		return err
	}
	e, err := f.examine(c)
	if err != nil {
		f.refuseCarried(c, e.full, err)
	}
	return err
}

// publication returns a publication as an image that is carried here, but for its bytes.
func (f *Fetcher) publication(p Publication) (Carried, error) {
	if err := f.Publishable(p.Name); err != nil {
		return Carried{}, err
	}
	if err := p.Ref.Matches(p.Name, p.Labels); err != nil {
		return Carried{}, err
	}
	c := Carried{
		Name: p.Name, Labels: p.Labels, Signature: p.Signature, Source: p.Source, Client: p.Client, published: true,
		// Nobody else has it.
		Pin: true,
	}
	latest := maps.Clone(p.Labels)
	delete(latest, acproxy.LabelVersion)
	ref, err := acproxy.NewRef(p.Name, latest)
	if err != nil {
		return Carried{}, err
	}
	c.Refs = []acproxy.Ref{ref}
	return c, nil
}

// An Upload is the bytes of an image that somebody sends. They are on the store's books, and are gone with the process.
type Upload struct {
	partial *cache.Partial
	sum     hash.Hash
}

// Receive keeps the bytes of an image for [Fetcher.Publish]. size is how many there will be, -1 if nobody has said. The caller discards what it gets. ctx bounds
// the waits for space.
func (f *Fetcher) Receive(ctx context.Context, ref acproxy.Ref, source string, size int64, body io.Reader) (*Upload, error) {
	if size > f.cfg.MaxImageSize {
		return nil, tooLarge(source, f.cfg.MaxImageSize)
	}
	partial, err := f.cfg.Store.Begin(ctx, cache.Arrival{Ref: ref, Source: source, Size: size})
	if err != nil {
		return nil, err
	}
	u := &Upload{partial, sha256.New()}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(partial, u.sum)}, struct{ io.Reader }{io.LimitReader(body, f.cfg.MaxImageSize+1)}, make([]byte, bufferSize))
	switch {
	case err == nil && n > f.cfg.MaxImageSize:
		err = tooLarge(source, f.cfg.MaxImageSize)
	case err == nil && size >= 0 && n != size:
		err = &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "incomplete-upload", Detail: fmt.Sprintf("%d bytes of the image came, and %d were announced", n, size)}
	}
	if err != nil {
		return nil, errors.Join(err, u.Discard())
	}
	return u, nil
}

// Size returns how many bytes there are.
func (u *Upload) Size() int64 { return u.partial.Size() }

// Discard drops the bytes, unless they are those of an image that is held by now.
func (u *Upload) Discard() error { return u.partial.Discard() }

// Publish takes an image in that was published here: by the same check and the same commit as one that is fetched. It answers the ref of all its labels
// from then on and, if it was signed later than what this answers now, the same without the version. A version that was published before with another
// image is refused, unless the policy says otherwise; the same image again is none. The bytes are used up.
func (f *Fetcher) Publish(ctx context.Context, p Publication, u *Upload) (Taken, error) {
	c, err := f.publication(p)
	if err == nil {
		c.Digest, c.Size, c.arrived = acproxy.Digest(u.sum.Sum(nil)), u.Size(), u.partial
		var t Taken
		if t, err = f.publish(ctx, c, nil); err == nil {
			// The bytes may have been here before.
			return t, u.Discard()
		}
	}
	return Taken{}, errors.Join(err, u.Discard())
}

// PublishFile is [Fetcher.Publish] for an image whose size and digest are known, and which open opens.
func (f *Fetcher) PublishFile(ctx context.Context, p Publication, digest acproxy.Digest, size int64, open func() (io.Reader, error)) (Taken, error) {
	c, err := f.publication(p)
	if err != nil {
		return Taken{}, err
	}
	c.Digest, c.Size = digest, size
	return f.publish(ctx, c, open)
}

func (f *Fetcher) publish(ctx context.Context, c Carried, open func() (io.Reader, error)) (Taken, error) {
	if c.Signature == nil {
		// It has no other time.
		c.Modified = f.now()
	}
	// One at a time for each name: whether a version is new is asked long before it is there.
	done, err := f.publishing.enter(ctx, c.Name)
	if err != nil {
		return Taken{}, err
	}
	defer done()
	t, err := f.Take(ctx, c, open)
	if err != nil {
		return t, err
	}
	said := decision(EventPublished, t.Record)
	said.Client, said.Source, said.Outcome = c.Client, c.Source, "published"
	if t.Held {
		said.Outcome = "held"
	}
	f.decided(said)
	return t, nil
}

// exactly refuses the manifest of an image that has another name or other labels than its publisher announced.
func (c Carried) exactly(m aci.Manifest) error {
	if !c.published || m.Name == c.Name && maps.Equal(m.Labels, c.Labels) {
		return nil
	}
	return &acproxy.Error{
		Kind: acproxy.ErrInvalid, Code: codeNotAsAnnounced,
		Detail: fmt.Sprintf("the image's own manifest is that of %s %v, and it was announced as %s %v", m.Name, m.Labels, c.Name, c.Labels),
	}
}

// localTemplates returns where images are that are published here: what labels to ask for is all that is of interest.
func localTemplates(prefix string) []discovery.Template {
	host, _, _ := strings.Cut(prefix, "/")
	return []discovery.Template{{Prefix: prefix, URL: "https://" + host + "/{name}-{version}-{os}-{arch}.{ext}"}}
}

// absent returns why a ref that nobody is asked for has no answer.
func absent(ref acproxy.Ref, policy Policy) error {
	if policy.Local {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: codeNotPublished, Detail: ref.String() + " was not published here, where the images under " + policy.Prefix + " are published"}
	}
	return &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: ref.String() + " is not held here, and this proxy is offline"}
}

// ambiguous returns why a ref has no answer that several images fit.
func ambiguous(ref acproxy.Ref, n int) error {
	return &acproxy.Error{
		Kind: acproxy.ErrNotFound, Code: codeNotPublished,
		Detail: fmt.Sprintf("%d images that were published here fit %v, and none of them is the answer: ask with version, os and arch", n, ref),
	}
}

// turns has those who do something under the same name wait for one another. The zero turns are ready to be used.
type turns struct {
	mu    sync.Mutex
	taken map[string]chan struct{} // closed when the turn is over
}

// enter waits for its turn, which ends when done is called.
func (t *turns) enter(ctx context.Context, name string) (done func(), err error) {
	for {
		t.mu.Lock()
		wait, taken := t.taken[name]
		if !taken {
			mine := make(chan struct{})
			if t.taken == nil {
				t.taken = make(map[string]chan struct{})
			}
			t.taken[name] = mine
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				delete(t.taken, name)
				close(mine)
			}, nil
		}
		t.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
