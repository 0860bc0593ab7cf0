package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// TestAHerdIsOneFetch is promise 2 of the design.
func TestAHerdIsOneFetch(t *testing.T) {
	const herd = 100
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(0)})
	var asked, done sync.WaitGroup
	statuses := make(chan Status, 2*herd)
	asked.Add(herd)
	for i := range herd {
		done.Go(func() {
			req := Request{Ref: s.app("1.0"), Client: fmt.Sprint(i)}
			sig, err := s.f.Signature(t.Context(), req)
			if err != nil || len(sig.Bytes) == 0 {
				t.Errorf("Signature = %+v, %v", sig, err)
			}
			statuses <- sig.Status
			im, err := s.f.Image(t.Context(), req)
			asked.Done()
			if err != nil {
				t.Errorf("Image: %v", err)
				return
			}
			defer im.Close()
			if got, err := deliver(t.Context(), im); err != nil || !bytes.Equal(got, blob) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	asked.Wait()
	stall.Release()
	done.Wait()
	s.wantRequests(1, 1)
	close(statuses)
	misses := 0
	for status := range statuses {
		switch status {
		case Miss:
			misses++
		case Joined:
		default:
			t.Errorf("status %v", status)
		}
	}
	if misses != 1 {
		t.Errorf("%d of the herd are said to have missed, want the one that came first", misses)
	}
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	s.wantRequests(1, 1)
}

func TestAClientThatLeavesHurtsNobody(t *testing.T) {
	for _, test := range []struct {
		name  string
		leave string // what the publisher is doing when the client leaves
	}{{"while the signature is asked for", "*.asc"}, {"while the image arrives", "*.aci"}} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			stall := s.pub.Misbehave(publisher.URL(test.leave), publisher.Fault{StallAfter: publisher.At(100)})
			ctx, cancel := context.WithCancel(t.Context())
			left := make(chan error, 1)
			go func() {
				im, err := s.f.Image(ctx, Request{Ref: s.app("1.0")})
				if err == nil {
					_, err = deliver(ctx, im)
					_ = im.Close()
				}
				left <- err
			}()
			s.wait("the stall", stall.Stalled())
			cancel()
			if err := <-left; !errors.Is(err, context.Canceled) {
				t.Errorf("the client that left got %v", err)
			}
			stall.Release()
			s.await("the image", func(d Decision) bool { return d.Event == EventAccepted && d.Ref == s.app("1.0") })
			s.idle()
			s.want(s.app("1.0"), blob, Hit)
			s.wantRequests(1, 1)
		})
	}
}

func TestRefsWithTheSameSignatureShareADownload(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{
		{Prefix: "example.com/app", URL: "https://storage.example.com/{name}/{version}/linux/amd64/image.{ext}"},
	}})
	refs := []acproxy.Ref{s.app("1.0"), s.app(""), s.ref("example.com/app", nil), s.ref("example.com/app", map[string]string{"version": "1.0"})}
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(10)})
	var images []*Image
	for i, ref := range refs {
		im, err := s.f.Image(t.Context(), Request{Ref: ref})
		if err != nil {
			t.Fatalf("%v: %v", ref, err)
		}
		defer im.Close()
		if want := []Status{Miss, Joined}[min(i, 1)]; im.Status != want {
			t.Errorf("%v: status %v, want %v", ref, im.Status, want)
		}
		images = append(images, im)
	}
	stall.Release()
	for i, im := range images {
		if got, err := deliver(t.Context(), im); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("%v: %d bytes, %v", refs[i], len(got), err)
		}
	}
	s.idle()
	s.wantRequests(1, len(refs))
	s.pub.Stop()
	for _, ref := range refs {
		s.want(ref, blob, Hit)
	}
}

func TestAKnownSignatureNeedsNoImage(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.want(s.app(""), blob, Hit)
	s.wantRequests(1, 2)
	s.pub.Stop()
	s.want(s.app(""), blob, Hit)
}

// TestARefThatDoesNotFitSharesNothing: two refs lead to the same image, and it is what only one of them asks for.
func TestARefThatDoesNotFitSharesNothing(t *testing.T) {
	for _, first := range []string{"the one that fits first", "the other one first"} {
		t.Run(first, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{
				{Prefix: "example.com/app", URL: "https://storage.example.com/{name}/1.0/linux/amd64/image.{ext}"},
			}})
			stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(0)})
			refs := []acproxy.Ref{s.app("1.0"), s.app("2.0")}
			if first == "the other one first" {
				slices.Reverse(refs)
			}
			images := make(map[acproxy.Ref]*Image)
			for _, ref := range refs {
				im, err := s.f.Image(t.Context(), Request{Ref: ref})
				if err != nil {
					t.Fatal(err)
				}
				defer im.Close()
				images[ref] = im
			}
			stall.Release()
			if got, err := deliver(t.Context(), images[s.app("1.0")]); err != nil || !bytes.Equal(got, blob) {
				t.Errorf("the ref that fits: %d bytes, %v", len(got), err)
			}
			got, err := deliver(t.Context(), images[s.app("2.0")])
			wantError(t, err, acproxy.ErrPublisher, "wrong-labels")
			if len(got) > len(blob)-DefaultHoldBack {
				t.Errorf("the ref that doesn't fit got %d bytes", len(got))
			}
			s.idle()
			s.want(s.app("1.0"), blob, Hit)
			s.wantError(s.app("2.0"), acproxy.ErrPublisher, "wrong-labels")
			s.wantRequests(1, 2)
		})
	}
}

// TestARefThatDoesNotFitWaitsForTheVerdict: without cut-through nobody looks at the manifest before.
func TestARefThatDoesNotFitWaitsForTheVerdict(t *testing.T) {
	s := newScene(t, policies(Policy{Delivery: VerifyFirst}))
	blob := s.publish(spec("1.0", badSize))
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{
		{Prefix: "example.com/app", URL: "https://storage.example.com/{name}/1.0/linux/amd64/image.{ext}"},
	}})
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(0)})
	fits, err := s.f.answer(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.f.answer(t.Context(), Request{Ref: s.app("2.0")})
	if err != nil {
		t.Fatal(err)
	}
	stall.Release()
	im, err := s.f.follow(t.Context(), other, s.app("2.0"))
	wantError(t, err, acproxy.ErrPublisher, "wrong-labels")
	if im != nil {
		t.Error("it was given an image")
	}
	if im, err = s.f.follow(t.Context(), fits, s.app("1.0")); err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if got, err := deliver(t.Context(), im); err != nil || !bytes.Equal(got, blob) {
		t.Errorf("the ref that fits: %d bytes, %v", len(got), err)
	}
}

// TestNobodyJoinsADownloadThatFitsNoRef: it is about to end because of its refs, which says nothing about another.
func TestNobodyJoinsADownloadThatFitsNoRef(t *testing.T) {
	s := newScene(t)
	fl := &flight{ref: s.app("2.0"), landed: make(chan struct{})}
	d, mine, err := s.f.claim(fl, Policy{}, "https://storage.example.com/image.aci", "", []byte("signature"), false)
	if err != nil || !mine {
		t.Fatalf("claim = %v, %v", mine, err)
	}
	defer d.end(errHeld)
	if !d.add(s.app("3.0")) {
		t.Error("a ref can't join before the manifest is there")
	}
	err = d.checkManifest(aci.Manifest{Name: "example.com/app", Labels: labels("1.0")})
	wantError(t, err, acproxy.ErrPublisher, "wrong-labels")
	if d.add(s.app("1.0")) {
		t.Error("a ref joins a download that fits none of those before")
	}
}

// TestNoImageIsAskedForThatCameMeanwhile: between the look at the store and the claim another flight may have brought it.
func TestNoImageIsAskedForThatCameMeanwhile(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	fl := &flight{ref: s.app(""), landed: make(chan struct{})}
	d, mine, err := s.f.claim(fl, Policy{}, s.record(s.app("1.0")).Source, "", sig.Bytes, false)
	if err != nil || !mine {
		t.Fatalf("claim = %v, %v", mine, err)
	}
	s.f.begin(fl, d, new(acproxy.Trace))
	if err := d.wait(t.Context()); !errors.Is(err, errHeld) || d.held != s.record(s.app("1.0")).Digest {
		t.Errorf("it ended with %v, %v", err, d.held)
	}
	s.wantRequests(1, 1)
	s.idle()
}

// TestCommitAndJoinRace lets two refs of the same image meet at every moment of each other's flight.
func TestCommitAndJoinRace(t *testing.T) {
	s := newScene(t)
	for i := range 120 {
		name := fmt.Sprintf("example.com/race-%d", i)
		blob := s.publish(acitest.Spec{Name: name, Labels: labels("1.0"), Compression: acitest.None})
		refs := []acproxy.Ref{s.ref(name, labels("1.0")), s.ref(name, labels("")), s.ref(name, labels(""))}
		var all sync.WaitGroup
		for j, ref := range refs {
			all.Go(func() {
				if j == 2 {
					// Somewhere between the beginning and the end of the first one's flight.
					s.asked(i%2, func(r publisher.Request) bool {
						return strings.Contains(r.Path, name+"/") && path.Ext(r.Path) == ".aci"
					})
				}
				if got, status, err := s.get(ref); err != nil || !bytes.Equal(got, blob) {
					t.Errorf("%v: %d bytes, %v, %v", ref, len(got), status, err)
				}
			})
		}
		all.Wait()
		if n := s.pub.Count("*" + name + "/*.aci"); n != 1 {
			t.Fatalf("%s was fetched %d times", name, n)
		}
	}
	s.idle()
	s.pub.Stop()
	for i := range 120 {
		for _, version := range []string{"1.0", ""} {
			ref := s.ref(fmt.Sprintf("example.com/race-%d", i), labels(version))
			if _, _, err := s.store.Resolve(t.Context(), ref); err != nil {
				t.Errorf("%v was served once and is not held: %v", ref, err)
			}
		}
	}
}

func TestSignatureLater(t *testing.T) {
	for _, test := range []struct {
		name  string
		times int // 0 is for ever
		wait  time.Duration
		good  bool
	}{
		{"once", 1, 0, true},
		{"three times", 3, 0, true},
		{"for ever", 0, 150 * time.Millisecond, false},
		{"for ever, and nobody asks again", 0, -1, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, func(c *Config) { c.SignatureWait = test.wait })
			blob := s.publish(spec("1.0", badSize))
			s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusAccepted, Times: test.times})
			sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
			if err != nil || !sig.Later || sig.Bytes != nil {
				t.Errorf("Signature = %+v, %v, want to be asked later", sig, err)
			}
			if !test.good {
				s.wantError(s.app("1.0"), acproxy.ErrTimeout, "signature-not-ready")
				s.idle()
				s.wantNothingKept()
				return
			}
			s.idle()
			s.want(s.app("1.0"), blob, Hit)
			s.wantRequests(1, test.times+1)
			if sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")}); err != nil || sig.Later || len(sig.Bytes) == 0 {
				t.Errorf("Signature = %+v, %v, want it now", sig, err)
			}
		})
	}
}

// TestSignatureOnlyAfterTheImage is what 202 is for: the publisher signs when the image is fetched.
func TestSignatureOnlyAfterTheImage(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	later := s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusAccepted})
	signed := make(chan struct{})
	go func() {
		defer close(signed)
		s.asked(1, func(r publisher.Request) bool { return strings.HasSuffix(r.Path, ".aci") && r.Done })
		later.End()
	}()
	s.want(s.app("1.0"), blob, Miss)
	s.wait("the publisher", signed)
	if rec := s.record(s.app("1.0")); !rec.Signed || len(rec.Signers) != 1 {
		t.Errorf("record = %+v, want it signed", rec)
	}
}

func TestSignatureThatComesLaterAndIsNoGood(t *testing.T) {
	s := newScene(t)
	s.publishAs("example.com/app", labels("1.0"), acitest.Must(t, spec("1.0", badSize)), strangerKey())
	s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusAccepted, Times: 1})
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
	s.idle()
	s.wantNothingKept()
}

// twoEndpoints publishes an image at two endpoints, each of which can be made to misbehave.
func twoEndpoints(s *scene, first, second *trusttest.Key) (blobs [2][]byte) {
	s.t.Helper()
	var tags []publisher.Tag
	for i, key := range []*trusttest.Key{first, second} {
		host := []string{"one", "two"}[i] + ".example.com"
		sp := spec("1.0", badSize)
		sp.Seed = uint64(i)
		blobs[i] = acitest.Must(s.t, sp)
		signature, err := key.Sign(bytes.NewReader(blobs[i]), trusttest.SignOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		s.pub.Serve(host+"/app-1.0.aci", "application/octet-stream", blobs[i])
		s.pub.Serve(host+"/app-1.0.aci.asc", "text/plain", signature)
		tags = append(tags, publisher.Tag{Prefix: "example.com/app", URL: "https://" + host + "/app-{version}.{ext}"})
	}
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: tags})
	return blobs
}

func TestEndpointsInOrder(t *testing.T) {
	for _, test := range []struct {
		name   string
		first  *trusttest.Key
		at     string
		fault  publisher.Fault
		serves int // the endpoint whose image is given, -1 for none
		kind   error
		code   string
	}{
		{"both good", goodKey(), "none", publisher.Fault{}, 0, nil, ""},
		{"first without the signature", goodKey(), "one.*.asc", publisher.Fault{Status: http.StatusNotFound}, 1, nil, ""},
		{"first without the image", goodKey(), "one.*.aci", publisher.Fault{Status: http.StatusNotFound}, 1, nil, ""},
		{"first broken at the signature", goodKey(), "one.*.asc", publisher.Fault{Status: http.StatusServiceUnavailable}, 1, nil, ""},
		{"first broken at the image", goodKey(), "one.*.aci", publisher.Fault{Status: http.StatusServiceUnavailable}, 1, nil, ""},
		{"first hangs up", goodKey(), "one.*", publisher.Fault{CloseConnection: true}, 1, nil, ""},
		{"first leads to plain http", goodKey(), "one.*", publisher.Fault{RedirectTo: "http://plain.example.com/"}, 1, nil, ""},
		{"first signed by a stranger", strangerKey(), "none", publisher.Fault{}, -1, acproxy.ErrRefused, "unknown-key"},
		{"neither has it", goodKey(), "*.asc", publisher.Fault{Status: http.StatusNotFound}, -1, acproxy.ErrRefused, "unsigned"},
		{"neither has anything", goodKey(), "*-1.0*", publisher.Fault{Status: http.StatusNotFound}, -1, acproxy.ErrNotFound, "no-signature-found"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blobs := twoEndpoints(s, test.first, goodKey())
			s.pub.Misbehave(publisher.URL(test.at), test.fault)
			ref := s.ref("example.com/app", map[string]string{"version": "1.0"})
			if test.serves >= 0 {
				s.want(ref, blobs[test.serves], Miss)
				return
			}
			err := s.wantError(ref, test.kind, test.code)
			if test.first == strangerKey() && s.pub.Count("two.*") > 0 {
				t.Error("the second endpoint was asked, which can only hide what the first one showed")
			}
			var e *acproxy.Error
			if !errors.As(err, &e) || len(e.Trace) < 2 || e.Trace[0].What != "discovery" {
				t.Errorf("trace = %+v, want all that was tried", e)
			}
		})
	}
}

// TestEndpointThatOutagesSaysMoreThanOneWithout: 404 at one and 503 at the other is no "not found".
func TestEndpointThatFailsSaysMoreThanOneWithout(t *testing.T) {
	for _, broken := range []string{"one.*", "two.*"} {
		t.Run(broken, func(t *testing.T) {
			s := newScene(t)
			twoEndpoints(s, goodKey(), goodKey())
			s.pub.Misbehave(publisher.URL("*-1.0*"), publisher.Fault{Status: http.StatusNotFound})
			s.pub.Misbehave(publisher.URL(broken), publisher.Fault{Status: http.StatusServiceUnavailable})
			s.wantError(s.ref("example.com/app", map[string]string{"version": "1.0"}), acproxy.ErrPublisher, "publisher-status")
		})
	}
}

// TestAnotherRefsURLMayHaveTheImage: two refs share a download by their signature, and the URL that it was begun with has no image.
func TestAnotherRefsURLMayHaveTheImage(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	missing := s.pub.Misbehave(publisher.URL("*/latest/*.aci"), publisher.Fault{Delay: 100 * time.Millisecond, Status: http.StatusNotFound})
	first := make(chan error, 1)
	go func() {
		_, _, err := s.get(s.app(""))
		first <- err
	}()
	s.asked(1, func(r publisher.Request) bool { return strings.HasSuffix(r.Path, "latest/linux/amd64/image.aci") })
	s.want(s.app("1.0"), blob, Miss)
	wantError(t, <-first, acproxy.ErrNotFound, "no-image-found")
	if missing.Applied() != 1 {
		t.Errorf("the URL without an image was asked %d times", missing.Applied())
	}
}

func TestDiskFullKeepsNothing(t *testing.T) {
	dir := t.TempDir()
	fsys, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := newScene(t)
	s.close()
	s.dir, s.disk = dir, cache.Options{FS: fsys}
	s.open()
	warm := s.publish(acitest.Spec{Name: "example.com/app", Labels: labels("0.1")})
	s.want(s.app("0.1"), warm, Miss)
	if err := s.store.Delete(t.Context(), s.record(s.app("0.1")).Digest); err != nil {
		t.Fatal(err)
	}
	s.idle()
	blob := s.publish(spec("1.0", badSize))
	// The file, a note of what it is, and the bytes.
	wants := []string{"create", "create", "write", "rename", "writeat", "writeat", "writeat"}
	for at := 1; at <= len(wants); at++ {
		fsys.Break(at, durabletest.Fail, syscall.ENOSPC)
		s.wantError(s.app("1.0"), acproxy.ErrNoSpace, "disk-full")
		s.idle()
		s.wantNothingKept()
		calls := fsys.Calls()
		if what := wants[at-1]; len(calls) < at || !strings.HasPrefix(calls[at-1], what+" partial/") {
			t.Errorf("call %d was not to %s: %q", at, what, calls)
		}
	}
	fsys.Break(0, durabletest.Fail, nil)
	s.want(s.app("1.0"), blob, Miss)
}

// TestAFailingCommitIsNoImage fails every call of the commit.
func TestAFailingCommitIsNoImage(t *testing.T) {
	dir := t.TempDir()
	fsys, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := newScene(t)
	s.close()
	s.dir, s.disk = dir, cache.Options{FS: fsys}
	s.open()
	blob := s.publish(acitest.Spec{Name: "example.com/app", Labels: labels("1.0")})
	fsys.Break(0, durabletest.Fail, nil)
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	calls := fsys.Calls()
	first := slices.IndexFunc(calls, func(c string) bool {
		return strings.HasPrefix(c, "sync ") && strings.Contains(c, "partial/") && path.Ext(c) == ".aci"
	})
	if err := s.store.Delete(t.Context(), s.record(s.app("1.0")).Digest); err != nil {
		t.Fatal(err)
	}
	fsys.Break(0, durabletest.Fail, nil)
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	n := len(fsys.Calls())
	if first < 0 || n < 5 {
		t.Fatalf("calls: %q", calls)
	}
	failed := 0
	for at := 1; at <= n; at++ {
		if err := s.store.Delete(t.Context(), s.record(s.app("1.0")).Digest); err != nil {
			t.Fatal(err)
		}
		fsys.Break(at, durabletest.Fail, syscall.EIO)
		if got, _, err := s.get(s.app("1.0")); err != nil {
			failed++
			s.idle()
			s.wantNothingKept()
		} else if !bytes.Equal(got, blob) {
			t.Errorf("failing at call %d: %d bytes", at, len(got))
		}
		fsys.Break(0, durabletest.Fail, nil)
		if got, _, err := s.get(s.app("1.0")); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("after failing at call %d: %d bytes, %v", at, len(got), err)
		}
		s.idle()
	}
	if failed < 5 {
		t.Errorf("%d of %d failing calls made the image fail", failed, n)
	}
}

func TestFollowerOfAFileThatLostBytes(t *testing.T) {
	s := newScene(t)
	partial, err := s.store.Begin(t.Context(), cache.Arrival{})
	if err != nil {
		t.Fatal(err)
	}
	defer partial.Discard()
	if _, err := partial.Write([]byte("1234")); err != nil {
		t.Fatal(err)
	}
	file, err := partial.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	d := &download{ctx: t.Context(), written: 6, complete: true, changed: make(chan struct{})}
	var got bytes.Buffer
	if _, err := got.ReadFrom(&follower{d: d, file: file}); err == nil || got.String() != "1234" {
		t.Errorf("read %q, %v: want what is there and then an error, not the end", &got, err)
	}
}

func TestCloseDuringAFlight(t *testing.T) {
	for _, at := range []string{"example.com/app", "*.asc", "*.aci"} {
		t.Run(at, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			stall := s.pub.Misbehave(publisher.URL(at), publisher.Fault{StallAfter: publisher.At(100)})
			got := make(chan error, 1)
			go func() {
				_, _, err := s.get(s.app("1.0"))
				got <- err
			}()
			s.wait("the stall", stall.Stalled())
			arrived := at == "*.aci"
			if arrived {
				s.eventually("bytes arrive", func() bool { fs := s.f.Flights(); return len(fs) == 1 && fs[0].Received == 100 })
			}
			if err := s.f.Close(); err != nil {
				t.Error(err)
			}
			if err := <-got; !errors.Is(err, acproxy.ErrBusy) {
				t.Errorf("the reader got %v, want that this side shuts down", err)
			}
			_, _, err := s.get(s.app("1.0"))
			wantError(t, err, acproxy.ErrBusy, "shutting-down")
			if arrived {
				// What has come is there for the next start to go on with.
				s.wantNothingHeld()
				if left, err := filepath.Glob(filepath.Join(s.dir, "partial", "*.aci")); err != nil || len(left) != 1 {
					t.Errorf("left over are %v, %v, want one partial file", left, err)
				}
			} else {
				s.wantNothingKept()
			}
			if refusals, err := s.store.Refusals(); err != nil || len(refusals) > 0 {
				t.Errorf("Refusals = %+v, %v: shutting down is none", refusals, err)
			}
			stall.End()
			s.restart()
			s.want(s.app("1.0"), blob, Miss)
		})
	}
}

// TestCloseDoesNotWaitForInspections: what is kept already is inspected again by the next start.
func TestCloseDoesNotWaitForInspections(t *testing.T) {
	d := &download{ctx: ended(), written: 10, changed: make(chan struct{})}
	if n, err := (&follower{d: d}).Read(make([]byte, 10)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("reading what is there already after the end = %d, %v, want the end's reason", n, err)
	}
}

func TestDialRulesAndNamesThatAreNotAllowed(t *testing.T) {
	s := newScene(t, func(c *Config) { c.Allow = []string{"example.com/app"} })
	s.noDial = true
	s.wantError(s.ref("example.com/apple", nil), acproxy.ErrRefused, "name-not-allowed")
	if _, err := s.f.Discover(t.Context(), "example.com/apple"); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("Discover: %v", err)
	}
}

func TestThresholdOfSigners(t *testing.T) {
	s := newScene(t, policies(Policy{Trust: trust.Policy{Threshold: 2}}))
	s.publish(spec("1.0", badSize))
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "too-few-signers")
	s.wantRequests(0, 1)
}

// TestRefusedWhileSomebodyAsks: whoever has looked for what is remembered just before an image was refused, and begins a flight just after it was, doesn't fetch it again.
func TestRefusedWhileSomebodyAsks(t *testing.T) {
	s := newScene(t)
	s.publishAs("example.com/app", labels("1.0"), acitest.Must(t, spec("0.9", badSize)), goodKey())
	ref := s.app("1.0")
	s.wantError(ref, acproxy.ErrPublisher, "wrong-labels")
	s.idle()
	fl, joined := s.f.join(t.Context(), Request{Ref: ref}, acproxy.Digest{})
	if joined {
		t.Error("the flight that failed is not over")
	}
	wantError(t, fl.wait(t.Context()), acproxy.ErrPublisher, "wrong-labels")
	s.idle()
	s.wantRequests(1, 2)
	// Once that is forgotten it may have been put right.
	s.clock.advance(DefaultNegativeTTL)
	s.wantError(ref, acproxy.ErrPublisher, "wrong-labels")
	s.wantRequests(2, 3)
}
