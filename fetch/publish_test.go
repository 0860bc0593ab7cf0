package fetch

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// newLocal is a scene whose images are published here. A dial fails the test.
func newLocal(t *testing.T, change ...func(*Config)) *scene {
	t.Helper()
	s := newScene(t, append([]func(*Config){func(c *Config) {
		c.Policies = []Policy{{TTL: time.Minute, MaxStale: time.Hour}, {Prefix: "example.com", Local: true}}
	}}, change...)...)
	s.noDial = true
	return s
}

// publication makes an image to be published, signed at a time.
func (s *scene) publication(spec acitest.Spec, when time.Time) (Publication, []byte) {
	s.t.Helper()
	blob := acitest.Must(s.t, spec)
	p := Publication{Ref: s.ref(spec.Name, spec.Labels), Name: spec.Name, Labels: spec.Labels, Source: "push from a test", Client: "ci"}
	if !when.IsZero() {
		var err error
		if p.Signature, err = goodKey().Sign(bytes.NewReader(blob), trusttest.SignOptions{Time: when}); err != nil {
			s.t.Fatal(err)
		}
	}
	return p, blob
}

// push publishes what is uploaded, and checks that nothing of the upload is left.
func (s *scene) push(p Publication, blob []byte) (Taken, error) {
	s.t.Helper()
	defer s.nothingLeft()()
	u, err := s.f.Receive(s.t.Context(), p.Ref, p.Source, int64(len(blob)), bytes.NewReader(blob))
	if err != nil {
		s.t.Fatal(err)
	}
	return s.f.Publish(s.t.Context(), p, u)
}

// nothingLeft returns what checks that no upload is left that wasn't there before, nor any space promised to one.
func (s *scene) nothingLeft() func() {
	s.t.Helper()
	before, err := s.store.Usage()
	if err != nil {
		s.t.Fatal(err)
	}
	return func() {
		s.t.Helper()
		if now, err := s.store.Usage(); err != nil || now.Partials != before.Partials || now.Promised != before.Promised {
			s.t.Errorf("the store has %d bytes of partials and has promised %d, where it had %d and %d; %v", now.Partials, now.Promised, before.Partials, before.Promised, err)
		}
	}
}

func (s *scene) pushed(p Publication, blob []byte) Taken {
	s.t.Helper()
	taken, err := s.push(p, blob)
	if err != nil {
		s.t.Fatal(err)
	}
	return taken
}

func TestPublish(t *testing.T) {
	s := newLocal(t)
	now := s.clock.Now()
	if _, err := s.f.Image(t.Context(), Request{Ref: s.app("1")}); acproxy.Code(err) != codeNotPublished || !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("before it is published: %v", err)
	}
	found, err := s.f.Discover(t.Context(), "example.com/app")
	if err != nil || !found.Local || found.Prefix != "example.com" || len(found.Templates) != 1 {
		t.Errorf("Discover = %+v, %v", found, err)
	}
	one, blobOne := s.publication(spec("1", 200<<10), now.Add(-time.Hour))
	if taken := s.pushed(one, blobOne); taken.Held || !taken.Record.Pinned || !taken.Record.Inspected || len(taken.Moved) != 2 {
		t.Errorf("Publish = %+v", taken)
	}
	d := s.await("it", func(d Decision) bool { return d.Event == EventPublished })
	if d.Client != "ci" || d.Outcome != "published" || d.Source != one.Source {
		t.Errorf("the audit says %+v", d)
	}
	if accepted := s.await("its acceptance", func(d Decision) bool { return d.Event == EventAccepted }); accepted.Client != "ci" {
		t.Errorf("the audit says %+v", accepted)
	}
	s.want(s.app("1"), blobOne, Hit)
	s.want(s.app(""), blobOne, Hit)
	// One image fits whatever nobody has pointed anywhere.
	s.want(s.ref("example.com/app", nil), blobOne, Hit)
	if taken := s.pushed(one, blobOne); !taken.Held {
		t.Errorf("the same again = %+v", taken)
	}

	two, blobTwo := s.publication(spec("2", 100), now.Add(-time.Minute))
	s.pushed(two, blobTwo)
	s.want(s.app(""), blobTwo, Hit)
	s.want(s.app("1"), blobOne, Hit)
	if _, err := s.f.Image(t.Context(), Request{Ref: s.ref("example.com/app", nil)}); acproxy.Code(err) != codeNotPublished || !strings.Contains(err.Error(), "2 images") {
		t.Errorf("a ref that two fit: %v", err)
	}
	// In the same second the later one is the newer one, and one that was signed before is not.
	three, blobThree := s.publication(spec("3", 100), now.Add(-time.Minute))
	s.pushed(three, blobThree)
	s.want(s.app(""), blobThree, Hit)
	old, blobOld := s.publication(spec("0", 100), now.Add(-2*time.Minute))
	if taken := s.pushed(old, blobOld); len(taken.Kept) != 1 || taken.Kept[0] != s.app("") {
		t.Errorf("an old image moves %+v", taken)
	}
	s.want(s.app(""), blobThree, Hit)

	// However long it is ago, nobody is asked.
	s.clock.advance(1000 * time.Hour)
	s.restart()
	s.want(s.app(""), blobThree, Hit)
	s.want(s.app("1"), blobOne, Hit)
	if err := s.f.Refetch(t.Context(), s.record(s.app("1"))); !errors.Is(err, acproxy.ErrOffline) || acproxy.Code(err) != "published-here" {
		t.Errorf("Refetch = %v", err)
	}
	if s.dials > 0 {
		t.Errorf("somebody was dialled %d times", s.dials)
	}
}

func TestPublishChangedVersion(t *testing.T) {
	for _, tt := range []struct {
		name   string
		policy OnChange
		taken  bool
	}{{"refused by default", RefuseChange, false}, {"taken where policy follows", FollowChange, true}} {
		t.Run(tt.name, func(t *testing.T) {
			s := newLocal(t, func(c *Config) { c.Policies[1].OnChange = tt.policy })
			before, blob := s.publication(spec("1", 100), s.clock.Now().Add(-time.Hour))
			s.pushed(before, blob)
			after, changed := s.publication(spec("1", 200), s.clock.Now().Add(-time.Minute))
			_, err := s.push(after, changed)
			if tt.taken {
				if err != nil {
					t.Fatal(err)
				}
				s.want(s.app("1"), changed, Hit)
				return
			}
			if !errors.Is(err, acproxy.ErrRefused) || acproxy.Code(err) != "changed-upstream" {
				t.Errorf("Publish = %v", err)
			}
			s.want(s.app("1"), blob, Hit)
		})
	}
}

// TestPublishAtOnce publishes other images of one version at the same time.
func TestPublishAtOnce(t *testing.T) {
	s := newLocal(t)
	const pushers = 8
	errs, blobs := make([]error, pushers), make([][]byte, pushers)
	var all sync.WaitGroup
	for i := range pushers {
		var p Publication
		p, blobs[i] = s.publication(spec("1", int64(1000+i)), s.clock.Now().Add(-time.Minute))
		all.Go(func() {
			u, err := s.f.Receive(t.Context(), p.Ref, p.Source, -1, bytes.NewReader(blobs[i]))
			if err == nil {
				_, err = s.f.Publish(t.Context(), p, u)
			}
			errs[i] = err
		})
	}
	all.Wait()
	won := -1
	for i, err := range errs {
		switch {
		case err == nil && won < 0:
			won = i
		case err == nil:
			t.Errorf("%d and %d have won", won, i)
		case acproxy.Code(err) != "changed-upstream":
			t.Errorf("%d: %v", i, err)
		}
	}
	if won < 0 {
		t.Fatal("nobody has won")
	}
	s.want(s.app("1"), blobs[won], Hit)
}

func TestPublishUnsigned(t *testing.T) {
	s := newLocal(t, func(c *Config) { c.Policies[1].Trust.Signature = trust.Optional })
	for _, version := range []string{"1", "2"} {
		p, blob := s.publication(spec(version, 100), time.Time{})
		s.clock.advance(time.Minute)
		s.pushed(p, blob)
		s.want(s.app(""), blob, Hit)
	}
}

func TestReceive(t *testing.T) {
	s := newLocal(t, func(c *Config) { c.MaxImageSize = 1000 })
	broken := errors.New("it broke off")
	for _, tt := range []struct {
		name string
		size int64
		body io.Reader
		code string
		err  error
	}{
		{name: "as large as it may be", size: 1000, body: bytes.NewReader(make([]byte, 1000))},
		{name: "as large as it may be, chunked", size: -1, body: bytes.NewReader(make([]byte, 1000))},
		{name: "a byte more", size: 1001, body: iotest.ErrReader(errors.New("it was read")), code: codeTooLarge},
		{name: "a byte more, chunked", size: -1, body: bytes.NewReader(make([]byte, 1001)), code: codeTooLarge},
		{name: "a byte less than was said", size: 1000, body: bytes.NewReader(make([]byte, 999)), code: "incomplete-upload"},
		{name: "broken off", size: -1, body: iotest.ErrReader(broken), err: broken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer s.nothingLeft()()
			u, err := s.f.Receive(t.Context(), s.app("1"), "push", tt.size, tt.body)
			if acproxy.Code(err) != tt.code || tt.err != nil && !errors.Is(err, tt.err) || (err == nil) != (tt.code == "" && tt.err == nil) {
				t.Errorf("Receive = %v", err)
			}
			if u != nil {
				if u.Size() != 1000 || !bytes.Equal(u.sum.Sum(nil), sum(make([]byte, 1000))) {
					t.Errorf("%d bytes have come", u.Size())
				}
				if err := u.Discard(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}
