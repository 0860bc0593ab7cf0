package server

import (
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
)

// newTestUploads returns uploads into a store of its own.
func newTestUploads(t *testing.T, limits Push) *uploads {
	t.Helper()
	store, err := cache.Open(t.TempDir(), cache.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	f := fetch.New(fetch.Config{Store: store, Policies: []fetch.Policy{{Local: true}}, Log: slog.New(slog.DiscardHandler)})
	us := newUploads(f, limits, nil)
	t.Cleanup(func() {
		us.close()
		usage, err := store.Usage()
		if err != nil || usage.Partials != 0 {
			t.Errorf("%d bytes of uploads are left, %v", usage.Partials, err)
		}
		if err := errors.Join(f.Close(), store.Close()); err != nil {
			t.Error(err)
		}
	})
	return us
}

func (us *uploads) mustBegin(t *testing.T) *upload {
	t.Helper()
	ref, err := acproxy.NewRef("example.com/app", nil)
	if err != nil {
		t.Fatal(err)
	}
	u, err := us.begin(ref, "ci", "192.0.2.7")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestUploadTakesTooLong(t *testing.T) {
	us := newTestUploads(t, Push{Timeout: 50 * time.Millisecond, MaxUploads: 1})
	u := us.mustBegin(t)
	r, w := io.Pipe()
	received := make(chan error, 1)
	// Ends with the upload's time, which the test waits for.
	go func() { received <- u.take(partImage, r, -1) }()
	if _, err := w.Write([]byte("the beginning")); err != nil {
		t.Fatal(err)
	}
	<-u.ctx.Done()
	<-u.decided
	// What comes then is not taken, and the place is free.
	_, _ = w.Write([]byte("and more"))
	_ = w.Close()
	if err := <-received; !errors.Is(err, acproxy.ErrTimeout) || acproxy.Code(err) != "upload-timeout" {
		t.Errorf("a part that takes too long: %v", err)
	}
	if _, err := u.complete(t.Context()); acproxy.Code(err) != "upload-timeout" {
		t.Errorf("its verdict: %v", err)
	}
	us.mustBegin(t)
}

func TestUploadsEndWithTheServer(t *testing.T) {
	us := newTestUploads(t, Push{})
	u := us.mustBegin(t)
	if err := u.take(partImage, strings.NewReader("not an image"), -1); err != nil {
		t.Fatal(err)
	}
	us.close()
	if err := u.take(partManifest, strings.NewReader("{}"), -1); !errors.Is(err, acproxy.ErrBusy) {
		t.Errorf("a part after the end of the server: %v", err)
	}
	if _, err := us.begin(u.ref, "ci", ""); !errors.Is(err, acproxy.ErrBusy) {
		t.Errorf("an upload after the end of the server: %v", err)
	}
}

func TestUploadIDs(t *testing.T) {
	us := newTestUploads(t, Push{})
	u := us.mustBegin(t)
	if !isUploadID(u.id) || us.get(u.id) != u || us.inProgress() != 1 {
		t.Errorf("the upload %q isn't known", u.id)
	}
	for _, id := range []string{"", strings.ToLower(u.id), u.id + "A", u.id[1:], "../../../../../../../../etc/", strings.Repeat("%", 26)} {
		if isUploadID(id) {
			t.Errorf("%q may be the ID of an upload", id)
		}
	}
}

func TestPartAtItsLimit(t *testing.T) {
	for _, tt := range []struct {
		size int
		code string
	}{{10, ""}, {11, "signature-too-large"}} {
		_, err := readPart(strings.NewReader(strings.Repeat("x", tt.size)), 10, partSignature, "fetch.max_signature_size")
		if acproxy.Code(err) != tt.code {
			t.Errorf("a signature of %d bytes, where 10 may be: %v", tt.size, err)
		}
	}
}
