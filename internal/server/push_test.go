package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/acpush"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// FuzzPush has a client do the steps of a push in any order with any content: every answer is one that the protocol knows, nothing but the one image that a
// trusted key has signed is ever held, and nothing of an upload is left when it has ended.
func FuzzPush(f *testing.F) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		f.Fatal(err)
	}
	spec := acitest.Spec{Name: "example.com/app", Labels: map[string]string{"version": "1"}, Files: map[string]string{"a": "b"}}
	image := acitest.Must(f, spec)
	signature, err := key.Sign(bytes.NewReader(image), trusttest.SignOptions{})
	if err != nil {
		f.Fatal(err)
	}
	const done = `{"success":true}`
	for _, steps := range []string{"msic", "isc", "simc", "msi", "mscic", "msicc", "c", "iiic", "mmssiic", "sic"} {
		f.Add(steps, spec.ManifestJSON(), signature, image, []byte(done))
	}
	f.Add("msic", []byte("{"), signature, image, []byte(done))
	f.Add("msic", spec.ManifestJSON(), signature[:len(signature)/2], image, []byte(done))
	f.Add("msic", spec.ManifestJSON(), signature, image[:len(image)/2], []byte(done))
	f.Add("msic", spec.ManifestJSON(), signature, image, []byte(`{"success":false,"reason":"x"}`))
	f.Add("msic", spec.ManifestJSON(), signature, image, []byte(`true`))

	s, store := newPushServer(f, key)
	// Whatever comes is written to the disk: what is more than this only takes longer.
	const most = 1 << 16
	f.Fuzz(func(t *testing.T, steps string, manifest, sig, aci, completed []byte) {
		if len(steps) > 12 || len(manifest) > most || len(sig) > most || len(aci) > most || len(completed) > most {
			return
		}
		start := acpush.Start{}
		if status, body := tell(s, http.MethodPost, "http://acproxy"+PushPath+"example.com/app?version=1", nil); status != http.StatusOK || json.Unmarshal(body, &start) != nil {
			t.Fatalf("a push begins with %d: %s", status, body)
		}
		published := false
		for _, step := range steps {
			method, at, content := http.MethodPut, start.ManifestURL, manifest
			switch step {
			case 's':
				at, content = start.SignatureURL, sig
			case 'i':
				at, content = start.ImageURL, aci
			case 'c':
				method, at, content = http.MethodPost, start.CompletedURL, completed
			}
			status, body := tell(s, method, at, content)
			var v acpush.Verdict
			if err := json.Unmarshal(body, &v); err != nil || status != http.StatusOK && (status != http.StatusBadRequest || v.Success || v.ServerReason == "") {
				t.Errorf("%q answers %d: %s", step, status, body)
			}
			published = published || v.Published != nil
		}
		// It gives up, if it hasn't ended.
		tell(s, http.MethodPost, start.CompletedURL, []byte(`{"success":false}`))

		held, _, err := store.Images(cache.Filter{}, "", 10)
		if err != nil || published != (len(held) == 1) {
			t.Errorf("published: %v, held: %d, %v", published, len(held), err)
		}
		for _, rec := range held {
			if rec.Digest != sha256.Sum256(image) || rec.Name != spec.Name || len(rec.Signers) != 1 {
				t.Errorf("held is %v of %s, signed by %v", rec.Digest, rec.Name, rec.Signers)
			}
			if err := store.Delete(t.Context(), rec.Digest); err != nil {
				t.Error(err)
			}
		}
		if usage, err := store.Usage(); err != nil || usage.Partials != 0 {
			t.Errorf("%d bytes of uploads are left, %v", usage.Partials, err)
		}
	})
}

// newPushServer returns a server that trusts a key for all names and publishes them.
func newPushServer(f *testing.F, key *trusttest.Key) (*Server, *cache.Disk) {
	f.Helper()
	dirs := trust.Dirs{Local: f.TempDir()}
	if _, err := trust.Add(dirs, "example.com", key.Armored()); err != nil {
		f.Fatal(err)
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		f.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	store, err := cache.Open(f.TempDir(), cache.Options{Log: quiet})
	if err != nil {
		f.Fatal(err)
	}
	fetcher := fetch.New(fetch.Config{Store: store, Keyring: func() *trust.Keyring { return keyring }, Policies: []fetch.Policy{{Local: true}}, Log: quiet})
	s := New(Config{Fetcher: fetcher, Log: quiet})
	f.Cleanup(func() {
		s.Close()
		if err := errors.Join(fetcher.Close(), store.Close()); err != nil {
			f.Error(err)
		}
	})
	return s, store
}

// tell sends something to the socket of operators.
func tell(s *Server, method, at string, content []byte) (status int, body []byte) {
	u, err := url.Parse(at)
	if err != nil {
		return 0, []byte(err.Error())
	}
	r := httptest.NewRequest(method, u.RequestURI(), bytes.NewReader(content))
	w := httptest.NewRecorder()
	s.PushHandler().ServeHTTP(w, r)
	return w.Code, w.Body.Bytes()
}
