package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// carry makes an image that somebody brings, signed at a time.
func (s *scene) carry(spec acitest.Spec, key *trusttest.Key, when time.Time, refs ...acproxy.Ref) (Carried, []byte) {
	s.t.Helper()
	blob := acitest.Must(s.t, spec)
	c := Carried{
		Name: spec.Name, Labels: spec.Labels, Refs: refs, Digest: sha256.Sum256(blob), Size: int64(len(blob)), Source: "bundle sha256:00", Modified: when.Add(-time.Minute),
	}
	c.ImageID, _ = acitest.ID(blob)
	if key != nil {
		var err error
		if c.Signature, err = key.Sign(bytes.NewReader(blob), trusttest.SignOptions{Time: when}); err != nil {
			s.t.Fatal(err)
		}
	}
	return c, blob
}

func from(b []byte) func() (io.Reader, error) {
	return func() (io.Reader, error) { return bytes.NewReader(b), nil }
}

// unread is for bytes that must not be asked for.
func (s *scene) unread() (io.Reader, error) {
	s.t.Error("bytes were asked for")
	return nil, io.EOF
}

func newIsolated(t *testing.T, change ...func(*Config)) *scene {
	t.Helper()
	s := newScene(t, append([]func(*Config){func(c *Config) { c.Offline = true }}, change...)...)
	s.noDial = true
	return s
}

func (s *scene) take(c Carried, blob []byte) Taken {
	s.t.Helper()
	taken, err := s.f.Take(s.t.Context(), c, from(blob))
	if err != nil {
		s.t.Fatal(err)
	}
	return taken
}

func TestCarriedImageIsTakenIn(t *testing.T) {
	s := newIsolated(t)
	now := s.clock.Now()
	c, blob := s.carry(spec("1", 200<<10), goodKey(), now.Add(-time.Minute), s.app(""))
	taken := s.take(c, blob)
	if taken.Held || len(taken.Moved) != 2 || len(taken.Kept) != 0 || !taken.Record.Inspected || taken.Record.ImageID != c.ImageID {
		t.Errorf("taken: %+v", taken)
	}
	s.want(s.app("1"), blob, Hit)
	s.want(s.app(""), blob, Hit)
	sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("1")})
	if err != nil || !bytes.Equal(sig.Bytes, c.Signature) || !sig.Modified.Equal(c.Modified.Truncate(time.Second)) {
		t.Errorf("its signature: %q, of %v, %v", sig.Bytes, sig.Modified, err)
	}
	d := s.await("it", func(d Decision) bool { return d.Event == EventAccepted })
	if d.Source != c.Source || len(d.Signers) != 1 || d.Client != "" {
		t.Errorf("the audit says %+v", d)
	}
	// A second time nothing is read.
	if again, err := s.f.Take(t.Context(), c, s.unread); err != nil || !again.Held || len(again.Moved) != 0 {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	// Nor after a restart.
	s.restart()
	if held, err := s.f.Examine(c); err != nil || !held {
		t.Errorf("Examine = %v, %v", held, err)
	}
	if again, err := s.f.Take(t.Context(), c, s.unread); err != nil || !again.Held {
		t.Errorf("after a restart: %+v, %v", again, err)
	}
}

func TestCarriedImageIsRefused(t *testing.T) {
	now := time.Now().Add(-time.Minute)
	violating := spec("1", 100)
	violating.Extra = []acitest.Entry{acitest.File("elsewhere", "x")}
	for _, tt := range []struct {
		name    string
		spec    acitest.Spec
		key     *trusttest.Key
		change  func(c *Carried, blob []byte) []byte
		kind    error
		code    string
		unread  bool // its bytes aren't asked for
		refused bool // it is recorded as refused
	}{
		{name: "an unknown key", spec: spec("1", 100), key: strangerKey(), kind: acproxy.ErrRefused, code: "unknown-key", unread: true, refused: true},
		{name: "no signature", spec: spec("1", 100), kind: acproxy.ErrRefused, code: "unsigned", unread: true, refused: true},
		{name: "not a signature", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrRefused, code: "malformed-signature", unread: true, refused: true,
			change: func(c *Carried, b []byte) []byte { c.Signature = []byte("signed, honestly"); return b }},
		{name: "the signature of another image", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrRefused, code: "bad-signature", refused: true,
			change: func(c *Carried, b []byte) []byte {
				c.Signature, _ = goodKey().Sign(bytes.NewReader(nil), trusttest.SignOptions{})
				return b
			}},
		{name: "a flipped bit", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: codeNotAsSaid,
			change: func(_ *Carried, b []byte) []byte { b[len(b)/2] ^= 1; return b }},
		{name: "a flipped bit in the first block", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: codeNotAsSaid,
			change: func(_ *Carried, b []byte) []byte { b[0] ^= 1; return b }},
		{name: "bytes that are missing", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: codeNotAsSaid,
			change: func(_ *Carried, b []byte) []byte { return b[:len(b)-1] }},
		{name: "bytes too many", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: codeNotAsSaid,
			change: func(_ *Carried, b []byte) []byte { return append(b, 0) }},
		{name: "another image ID", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: codeNotAsSaid,
			change: func(c *Carried, b []byte) []byte { c.ImageID[0] ^= 1; return b }},
		{name: "another name", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrPublisher, code: "wrong-name", refused: true,
			change: func(c *Carried, b []byte) []byte { c.Name = "example.com/other"; return b }},
		{name: "other labels", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrPublisher, code: "wrong-labels", refused: true,
			change: func(c *Carried, b []byte) []byte { c.Labels = labels("2"); return b }},
		{name: "a ref that doesn't fit", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrPublisher, code: "wrong-labels", unread: true,
			change: func(c *Carried, b []byte) []byte {
				c.Refs = []acproxy.Ref{mustRef("example.com/app:2")}
				return b
			}},
		{name: "no name", spec: spec("1", 100), key: goodKey(), kind: acproxy.ErrInvalid, code: "invalid", unread: true,
			change: func(c *Carried, b []byte) []byte { c.Name = "../../etc"; return b }},
		{name: "a byte too large", spec: spec("1", 200<<10), key: goodKey(), kind: acproxy.ErrRefused, code: codeTooLarge, unread: true, refused: true,
			change: func(c *Carried, b []byte) []byte { c.Size = 256<<10 + 1; return b }},
		{name: "a broken rule", spec: violating, key: goodKey(), kind: acproxy.ErrPublisher, code: "outside-rootfs", refused: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newIsolated(t, func(c *Config) { c.MaxImageSize = 256 << 10 })
			c, blob := s.carry(tt.spec, tt.key, now)
			if tt.change != nil {
				blob = tt.change(&c, blob)
			}
			open := from(blob)
			if tt.unread {
				open = s.unread
			}
			_, err := s.f.Take(t.Context(), c, open)
			wantError(t, err, tt.kind, tt.code)
			s.wantNothingKept()
			refusals, err := s.store.Refusals()
			if err != nil || (len(refusals) > 0) != tt.refused {
				t.Errorf("recorded as refused: %v, %v; want %v", refusals, err, tt.refused)
			}
			// It says nothing about those who ask: nothing is remembered.
			if n := s.f.negative.ItemCount(); n > 0 {
				t.Errorf("%d negative answers are remembered", n)
			}
		})
	}
}

func mustRef(s string) acproxy.Ref {
	ref, err := acproxy.ParseRef(s)
	if err != nil {
		panic(err)
	}
	return ref
}

func TestOldBundleTakesNothingBack(t *testing.T) {
	s := newIsolated(t)
	now := s.clock.Now()
	old, oldBlob := s.carry(spec("1", 100), goodKey(), now.Add(-50*time.Minute), s.app(""))
	recent, recentBlob := s.carry(spec("2", 100), goodKey(), now.Add(-10*time.Minute), s.app(""))
	s.take(old, oldBlob)
	if taken := s.take(recent, recentBlob); len(taken.Kept) != 0 {
		t.Errorf("the newer one: %+v", taken)
	}
	s.want(s.app(""), recentBlob, Hit)
	if again, err := s.f.Take(t.Context(), old, s.unread); err != nil || len(again.Kept) != 1 || again.Kept[0] != s.app("") {
		t.Errorf("the old one again: %+v, %v", again, err)
	}
	s.want(s.app(""), recentBlob, Hit)
	s.want(s.app("1"), oldBlob, Hit)
	old.AllowOlder = true
	if again, err := s.f.Take(t.Context(), old, s.unread); err != nil || len(again.Moved) != 1 {
		t.Errorf("the old one on purpose: %+v, %v", again, err)
	}
	s.want(s.app(""), oldBlob, Hit)
}

func TestCarriedWithoutVersion(t *testing.T) {
	s := newIsolated(t)
	now := s.clock.Now()
	recent, recentBlob := s.carry(spec("", 100), goodKey(), now.Add(-10*time.Minute))
	s.take(recent, recentBlob)
	older := spec("", 200)
	old, _ := s.carry(older, goodKey(), now.Add(-50*time.Minute))
	_, err := s.f.Take(t.Context(), old, s.unread)
	wantError(t, err, acproxy.ErrRefused, codeOlder)
	s.want(s.app(""), recentBlob, Hit)
}

func TestCarriedVersionDoesNotChange(t *testing.T) {
	for _, follow := range []bool{false, true} {
		policy := Policy{}
		if follow {
			policy.OnChange = FollowChange
		}
		s := newIsolated(t, policies(policy))
		now := s.clock.Now()
		first, firstBlob := s.carry(spec("1", 100), goodKey(), now.Add(-50*time.Minute))
		s.take(first, firstBlob)
		other := spec("1", 100)
		other.Seed = 7
		second, secondBlob := s.carry(other, goodKey(), now.Add(-10*time.Minute))
		_, err := s.f.Take(t.Context(), second, from(secondBlob))
		if follow {
			if err != nil {
				t.Error(err)
			}
			s.want(s.app("1"), secondBlob, Hit)
			continue
		}
		wantError(t, err, acproxy.ErrRefused, "changed-upstream")
		s.want(s.app("1"), firstBlob, Hit)
	}
}

func TestCarriedImageEndsWhatWasRemembered(t *testing.T) {
	s := newScene(t)
	s.wantError(s.app("1"), acproxy.ErrNotFound, "not-discovered")
	s.idle()
	if s.f.negative.ItemCount() == 0 {
		t.Fatal("nothing is remembered to begin with")
	}
	c, blob := s.carry(spec("1", 100), goodKey(), s.clock.Now().Add(-time.Minute))
	s.take(c, blob)
	if s.f.negative.ItemCount() != 0 {
		t.Error("that it wasn't there is still remembered")
	}
	s.noDial = true
	s.want(s.app("1"), blob, Hit)
}

func TestCarriedReplacesWhatIsLostOrDistrusted(t *testing.T) {
	s := newIsolated(t)
	now := s.clock.Now()
	c, blob := s.carry(spec("1", 100<<10), goodKey(), now.Add(-time.Minute))
	s.take(c, blob)
	if err := s.store.Quarantine(t.Context(), c.Digest, cache.CodeCorrupt, "a test says so"); err != nil {
		t.Fatal(err)
	}
	if taken := s.take(c, blob); taken.Held {
		t.Error("what is lost was taken for held")
	}
	s.want(s.app("1"), blob, Hit)
	// Its key is not trusted any more, and the same bytes come with another signature.
	s.distrust(goodKey())
	s.wantError(s.app("1"), acproxy.ErrRefused, "unknown-key")
	s.trust("example.com", strangerKey())
	again, _ := s.carry(spec("1", 100<<10), strangerKey(), now.Add(-time.Minute))
	if taken := s.take(again, blob); taken.Held {
		t.Error("what isn't trusted was taken for held")
	}
	s.want(s.app("1"), blob, Hit)
}

// breaking is a reader that fails, or ends a context, after some bytes.
type breaking struct {
	r    io.Reader
	then func() error
}

func (b *breaking) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err == io.EOF {
		return n, b.then()
	}
	return n, err
}

func TestCarryingIsInterrupted(t *testing.T) {
	s := newIsolated(t)
	c, blob := s.carry(spec("1", 1<<20), goodKey(), s.clock.Now().Add(-time.Minute))
	broken := errors.New("the medium was pulled out")
	_, err := s.f.Take(t.Context(), c, func() (io.Reader, error) {
		return &breaking{bytes.NewReader(blob[:len(blob)/2]), func() error { return broken }}, nil
	})
	if !errors.Is(err, broken) {
		t.Errorf("%v, want what went wrong", err)
	}
	s.wantNothingKept()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("somebody pressed Ctrl-C")
	_, err = s.f.Take(ctx, c, func() (io.Reader, error) {
		return &breaking{bytes.NewReader(blob[:len(blob)/2]), func() error { cancel(why); return io.ErrNoProgress }}, nil
	})
	if !errors.Is(err, why) {
		t.Errorf("%v, want the reason", err)
	}
	s.wantNothingKept()
	s.take(c, blob)
	s.want(s.app("1"), blob, Hit)
}

func TestTeach(t *testing.T) {
	templates := []discovery.Template{{Prefix: "example.com", URL: "https://example.com/{name}-{version}.{ext}"}}
	others := []discovery.Template{{Prefix: "example.com", URL: "https://example.com/new/{name}-{version}.{ext}"}}
	s := newIsolated(t)
	for _, tt := range []struct {
		templates []discovery.Template
		want      bool
	}{{templates, true}, {templates, false}, {others, true}} {
		if learned, err := s.f.Teach("example.com/app", tt.templates); err != nil || learned != tt.want {
			t.Errorf("Teach = %v, %v, want %v", learned, err, tt.want)
		}
		d, err := s.f.Discover(t.Context(), "example.com/app")
		if err != nil || d.Status != Hit || len(d.Templates) != 1 || d.Templates[0] != tt.templates[0] {
			t.Errorf("Discover = %+v, %v", d, err)
		}
	}
	for what, wrong := range map[string][]discovery.Template{
		"no templates":         nil,
		"too many templates":   slices.Repeat(templates, maxTaught+1),
		"another's prefix":     {{Prefix: "example.org", URL: templates[0].URL}},
		"a part of a segment":  {{Prefix: "example.com/ap", URL: templates[0].URL}},
		"no prefix":            {{URL: templates[0].URL}},
		"another scheme":       {{Prefix: "example.com", URL: "ftp://example.com/{name}"}},
		"no host":              {{Prefix: "example.com", URL: "https:///{name}"}},
		"a user":               {{Prefix: "example.com", URL: "https://u@example.com/{name}"}},
		"a space":              {{Prefix: "example.com", URL: "https://example.com/ {name}"}},
		"a URL without an end": {{Prefix: "example.com", URL: "https://example.com/" + strings.Repeat("x", 4096)}},
	} {
		if learned, err := s.f.Teach("example.com/app", wrong); learned || !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("%s: %v, %v", what, learned, err)
		}
	}
	if learned, err := s.f.Teach("example.com/many", slices.Repeat(templates, maxTaught)); err != nil || !learned {
		t.Errorf("as many as there may be: %v, %v", learned, err)
	}
	if _, err := s.f.Teach("../x", templates); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("no name: %v", err)
	}
	// Where the publisher can be asked, its own word counts, and what was taught is only the beginning.
	s = newScene(t)
	s.publish(spec("1", 100))
	if _, err := s.f.Discover(t.Context(), "example.com/app"); err != nil {
		t.Fatal(err)
	}
	if learned, err := s.f.Teach("example.com/app", others); err != nil || learned {
		t.Errorf("Teach = %v, %v where the publisher has said something", learned, err)
	}
	if learned, err := s.f.Teach("example.com/other", others); err != nil || !learned {
		t.Errorf("Teach = %v, %v", learned, err)
	}
	if d, err := s.f.Discover(t.Context(), "example.com/other"); err != nil || d.Status != Stale {
		t.Errorf("Discover = %+v, %v, want it refreshed behind", d, err)
	}
}

// TestHeldImageIsNoOther has a held image announced with other labels, and other refs: it answers nothing that it isn't for.
func TestHeldImageIsNoOther(t *testing.T) {
	s := newIsolated(t)
	c, blob := s.carry(spec("1", 100), goodKey(), s.clock.Now().Add(-time.Minute))
	s.take(c, blob)
	said := c
	said.Labels = maps.Clone(c.Labels)
	said.Labels["version"], said.Refs = "2", nil
	if held, err := s.f.Examine(said); held || err != nil {
		t.Errorf("Examine = %v, %v; want that its bytes are needed", held, err)
	}
	for _, take := range []func() (Taken, error){
		func() (Taken, error) { return s.f.Take(t.Context(), said, from(blob)) },
		func() (Taken, error) { return s.f.TakeSent(t.Context(), said, from(blob)) },
	} {
		if taken, err := take(); acproxy.Code(err) != "wrong-labels" {
			t.Errorf("version 1 is taken in as version 2: %+v, %v", taken, err)
		}
	}
	said = c
	said.ImageID[0]++
	if _, err := s.f.Take(t.Context(), said, from(blob)); acproxy.Code(err) != codeNotAsSaid {
		t.Errorf("with another image ID: %v", err)
	}
	if _, _, err := s.store.Resolve(t.Context(), s.app("2")); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("version 2 answers something: %v", err)
	}
	s.want(s.app("1"), blob, Hit)
}

// TestWhoSendsSlowlyKeepsNobodyWaiting has bytes come that stop in the middle: who has all of them is not kept waiting.
func TestWhoSendsSlowlyKeepsNobodyWaiting(t *testing.T) {
	s := newIsolated(t)
	c, blob := s.carry(spec("1", 1<<20), goodKey(), s.clock.Now().Add(-time.Minute))
	r, w := io.Pipe()
	sent := make(chan error, 1)
	// Ends when the pipe is closed below, which is waited for.
	go func() {
		_, err := s.f.TakeSent(t.Context(), c, func() (io.Reader, error) { return r, nil })
		sent <- err
	}()
	if _, err := w.Write(blob[:1000]); err != nil {
		t.Fatal(err)
	}
	if taken, err := s.f.TakeSent(t.Context(), c, from(blob)); err != nil || taken.Held {
		t.Errorf("who sends all of it: %+v, %v", taken, err)
	}
	broken := errors.New("the line is gone")
	_ = w.CloseWithError(broken)
	if err := <-sent; !errors.Is(err, broken) {
		t.Errorf("who sends half of it: %v", err)
	}
	s.want(s.app("1"), blob, Hit)
	if usage, err := s.store.Usage(); err != nil || usage.Partials != 0 {
		t.Errorf("%d bytes are left of it, %v", usage.Partials, err)
	}
}

func TestCarriedPins(t *testing.T) {
	s := newIsolated(t)
	c, blob := s.carry(spec("1", 100), goodKey(), s.clock.Now().Add(-time.Minute))
	s.take(c, blob)
	if s.record(s.app("1")).Pinned {
		t.Error("it is pinned, and nobody asked for that")
	}
	c.Pin = true
	s.take(c, blob)
	if !s.record(s.app("1")).Pinned {
		t.Error("held, and not pinned")
	}
	d, other := s.carry(spec("2", 100), goodKey(), s.clock.Now().Add(-time.Minute))
	d.Pin = true
	s.take(d, other)
	if !s.record(s.app("2")).Pinned {
		t.Error("taken in, and not pinned")
	}
}
