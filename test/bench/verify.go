package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

var benchmarks = []benchmark{
	{
		name: "verify", what: "a signature over one file, SHA-512, RSA 2048; the same file for all", unit: "MB/s", more: true,
		goalOf: "acproxy", goal: 1.4, setUp: setUpVerify,
	},
	{
		name: "cold", what: "the last byte of a cold image, seconds, from a publisher of limited speed", unit: "s",
		goalOf: "acproxy, verified", goal: 1.02, setUp: setUpCold,
	},
	{
		name: "decisions", what: "small images: hash, judge by the keyring, rkt's prediction included", unit: "decisions/s", more: true,
		setUp: setUpDecisions,
	},
	{
		name: "rejudge", what: "all held images judged again after a change of the keys", unit: "images/s", more: true,
		setUp: setUpRejudge,
	},
}

const benchName = "bench.example.com/app"

var benchLabels = map[string]string{"version": "1.0", "os": "linux", "arch": "amd64"}

// writeImage writes the large image and its signature.
func writeImage(o options, key *trusttest.Key) (file string, signature []byte, err error) {
	file = filepath.Join(o.dir, "image.aci")
	out, err := os.Create(file)
	if err != nil {
		return "", nil, err
	}
	_, err = acitest.Write(out, acitest.Spec{Name: benchName, Labels: benchLabels, RootfsSize: o.size})
	if err = errors.Join(err, out.Close()); err != nil {
		return "", nil, err
	}
	in, err := os.Open(file)
	if err != nil {
		return "", nil, err
	}
	defer in.Close()
	signature, err = key.Sign(in, trusttest.SignOptions{})
	return file, signature, err
}

// trustIn makes a key directory that trusts a key for the benchmark's name.
func trustIn(o options, key *trusttest.Key) (trust.Dirs, error) {
	dirs := trust.Dirs{Local: filepath.Join(o.dir, "keys")}
	_, err := trust.Add(dirs, benchName, key.Armored())
	return dirs, err
}

func setUpVerify(o options) (stage, error) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		return stage{}, err
	}
	file, signature, err := writeImage(o, key)
	if err != nil {
		return stage{}, err
	}
	dirs, err := trustIn(o, key)
	if err != nil {
		return stage{}, err
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		return stage{}, err
	}
	s := stage{close: func() error { return os.Remove(file) }}
	perSecond := func(do func() error) func() (float64, error) {
		return func() (float64, error) {
			took, err := timed(do)
			return float64(o.size) / 1e6 / took, err
		}
	}
	if gpg, err := exec.LookPath("gpg"); err == nil {
		home := filepath.Join(o.dir, "gnupg")
		if err := prepareGPG(gpg, home, key.Armored()); err != nil {
			return stage{}, err
		}
		signatureFile := file + ".asc"
		if err := os.WriteFile(signatureFile, signature, 0o600); err != nil {
			return stage{}, err
		}
		s.contestants = append(s.contestants, contestant{"gpg --verify", perSecond(func() error {
			return quiet(exec.Command(gpg, "--homedir", home, "--trust-model", "always", "--verify", signatureFile, file))
		})})
	}
	if sum, err := exec.LookPath("sha512sum"); err == nil {
		s.contestants = append(s.contestants, contestant{"sha512sum", perSecond(func() error { return quiet(exec.Command(sum, file)) })})
	}
	s.contestants = append(s.contestants, contestant{"acproxy", perSecond(func() error {
		return verify(keyring, file, signature)
	})})
	return s, nil
}

func prepareGPG(gpg, home string, key []byte) error {
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	load := exec.Command(gpg, "--homedir", home, "--batch", "--import")
	load.Stdin = bytes.NewReader(key)
	return quiet(load)
}

func quiet(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w: %s", cmd.Args, err, out)
	}
	return nil
}

// verify decides about a file as a download does.
func verify(keyring *trust.Keyring, file string, signature []byte) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	hasher, err := trust.NewHasher(signature)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{hasher}, struct{ io.Reader }{in}, make([]byte, 128<<10)); err != nil {
		return err
	}
	hashed, err := hasher.Hashed()
	if err != nil {
		return err
	}
	_, err = keyring.Judge(trust.Question{Name: benchName, Signature: signature, Hashed: hashed, Now: time.Now()})
	return err
}

func setUpDecisions(o options) (stage, error) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		return stage{}, err
	}
	dirs, err := trustIn(o, key)
	if err != nil {
		return stage{}, err
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		return stage{}, err
	}
	image, err := acitest.Build(acitest.Spec{Name: benchName, Labels: benchLabels})
	if err != nil {
		return stage{}, err
	}
	signature, err := key.Sign(bytes.NewReader(image), trusttest.SignOptions{})
	if err != nil {
		return stage{}, err
	}
	const decisions = 5000
	decide := func() (float64, error) {
		took, err := timed(func() error {
			for range decisions {
				hasher, err := trust.NewHasher(signature)
				if err != nil {
					return err
				}
				if _, err := hasher.Write(image); err != nil {
					return err
				}
				hashed, err := hasher.Hashed()
				if err != nil {
					return err
				}
				if _, err := keyring.Judge(trust.Question{Name: benchName, Signature: signature, Hashed: hashed, Now: time.Now()}); err != nil {
					return err
				}
			}
			return nil
		})
		return decisions / took, err
	}
	return stage{contestants: []contestant{{"one core", decide}}, close: func() error { return nil }}, nil
}

// ground is a publisher that has the large image.
type ground struct {
	publisher *publisher.Publisher
	published publisher.Published
	dirs      trust.Dirs
}

func newGround(o options) (*ground, error) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		return nil, err
	}
	file, signature, err := writeImage(o, key)
	if err != nil {
		return nil, err
	}
	p, err := publisher.Start(publisher.Options{})
	if err != nil {
		return nil, err
	}
	g := &ground{publisher: p}
	if g.published, err = p.Add(publisher.Image{Name: benchName, Labels: benchLabels, File: file, Signature: signature}); err != nil {
		return nil, err
	}
	if o.rate > 0 {
		p.Misbehave(publisher.URL("storage.bench.example.com/*.aci"), publisher.Fault{BytesPerSecond: o.rate})
	}
	g.dirs, err = trustIn(o, key)
	return g, err
}

// serve starts a fresh acproxy of the publisher, without a process of its own, and returns its address.
func (g *ground) serve(o options) (url string, stop func() error, err error) {
	dir, err := os.MkdirTemp(o.dir, "store-")
	if err != nil {
		return "", nil, err
	}
	keyring, err := trust.Load(g.dirs)
	if err != nil {
		return "", nil, err
	}
	store, err := cache.Open(dir, cache.Options{})
	if err != nil {
		return "", nil, err
	}
	client := web.New(web.Config{
		Hosts: map[string]string{"bench.example.com": g.publisher.Addr(), "storage.bench.example.com": g.publisher.Addr()},
		Rules: []web.Rule{{Prefix: "bench.example.com", RootCAs: g.publisher.CAPool()}},
	})
	finder := discovery.New(discovery.Config{Web: client})
	fetcher := fetch.New(fetch.Config{Store: store, Discovery: finder, Web: client, Keyring: func() *trust.Keyring { return keyring }, Policies: []fetch.Policy{{TTL: time.Minute}}})
	s := server.New(server.Config{Fetcher: fetcher, Keyring: func() *trust.Keyring { return keyring }})
	hs := httptest.NewServer(s.Handler(false))
	return hs.URL, func() error {
		hs.Close()
		client.Close()
		return errors.Join(s.Close(), fetcher.Close(), finder.Close(), store.Close(), os.RemoveAll(dir))
	}, nil
}

// download reads a URL to its end and returns the seconds it took.
func download(client *http.Client, url string) (float64, error) {
	return timed(func() error {
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answered %s", url, resp.Status)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	})
}

func setUpCold(o options) (stage, error) {
	g, err := newGround(o)
	if err != nil {
		return stage{}, err
	}
	direct := g.publisher.Client(false)
	plain := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	return stage{
		contestants: []contestant{
			{"direct", func() (float64, error) { return download(direct, g.published.URL) }},
			{"through a proxy that keeps and verifies nothing", func() (float64, error) {
				return copied(direct, plain, g.published.URL)
			}},
			{"through a proxy that keeps and hashes nothing", func() (float64, error) { return kept(o, direct, plain, g.published.URL) }},
			{"acproxy, verified", func() (float64, error) {
				url, stop, err := g.serve(o)
				if err != nil {
					return 0, err
				}
				took, err := download(plain, url+"/.acproxy/images/"+benchName+".aci?version=1.0&os=linux&arch=amd64")
				return took, errors.Join(err, stop())
			}},
		},
		close: g.publisher.Close,
	}, nil
}

// copied downloads through a proxy that copies from the publisher to the client.
func copied(publisher, client *http.Client, url string) (float64, error) {
	return throughCopy(publisher, client, url, func(w io.Writer) (io.Writer, func() error, error) {
		return w, func() error { return nil }, nil
	})
}

// kept downloads through a proxy that also writes to a file and syncs it, and checks nothing.
func kept(o options, publisher, client *http.Client, url string) (float64, error) {
	return throughCopy(publisher, client, url, func(w io.Writer) (io.Writer, func() error, error) {
		file, err := os.CreateTemp(o.dir, "kept-")
		if err != nil {
			return nil, nil, err
		}
		return io.MultiWriter(file, w), func() error { return errors.Join(file.Sync(), file.Close(), os.Remove(file.Name())) }, nil
	})
}

func throughCopy(publisher, client *http.Client, url string, sink func(io.Writer) (io.Writer, func() error, error)) (float64, error) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := publisher.Get(url)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Length", fmt.Sprint(resp.ContentLength))
		to, done, err := sink(w)
		if err == nil {
			_, err = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{resp.Body}, make([]byte, 128<<10))
			err = errors.Join(err, done())
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}))
	defer s.Close()
	return download(client, s.URL)
}

func setUpRejudge(o options) (stage, error) {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		return stage{}, err
	}
	dirs, err := trustIn(o, key)
	if err != nil {
		return stage{}, err
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		return stage{}, err
	}
	store, err := cache.Open(filepath.Join(o.dir, "rejudge"), cache.Options{})
	if err != nil {
		return stage{}, err
	}
	if err := fill(o, store, key); err != nil {
		return stage{}, errors.Join(err, store.Close())
	}
	fetcher := fetch.New(fetch.Config{Store: store, Keyring: func() *trust.Keyring { return keyring }, Policies: []fetch.Policy{{}}})
	return stage{
		contestants: []contestant{{fmt.Sprintf("%d images, all cores", o.images), func() (float64, error) {
			var found fetch.Rejudged
			took, err := timed(func() error {
				var err error
				found, err = fetcher.Rejudge(context.Background())
				return err
			})
			if err == nil && (found.Images != o.images || found.Quarantined != 0) {
				err = fmt.Errorf("%+v, want %d images, none of them quarantined", found, o.images)
			}
			return float64(o.images) / took, err
		}}},
		close: func() error { return errors.Join(fetcher.Close(), store.Close()) },
	}, nil
}

// fill keeps small images, each with a signature of its own, in the store.
func fill(o options, store *cache.Disk, key *trusttest.Key) error {
	work := make(chan int)
	failed := make(chan error, 64)
	for range 64 {
		// Each ends with the channel, and reports once.
		go func() {
			var first error
			for i := range work {
				if first == nil {
					first = keep(store, key, i)
				}
			}
			failed <- first
		}()
	}
	for i := range o.images {
		work <- i
	}
	close(work)
	var errs []error
	for range 64 {
		errs = append(errs, <-failed)
	}
	return errors.Join(errs...)
}

func keep(store *cache.Disk, key *trusttest.Key, i int) error {
	blob := fmt.Appendf(nil, "stands for image %d", i)
	signature, err := key.Sign(bytes.NewReader(blob), trusttest.SignOptions{})
	if err != nil {
		return err
	}
	hasher, err := trust.NewHasher(signature)
	if err != nil {
		return err
	}
	if _, err := hasher.Write(blob); err != nil {
		return err
	}
	hashed, err := hasher.Hashed()
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%s/%d", benchName, i)
	ref, err := acproxy.NewRef(name, benchLabels)
	if err != nil {
		return err
	}
	ctx := context.Background()
	partial, err := store.Begin(ctx, cache.Arrival{})
	if err != nil {
		return err
	}
	if _, err := partial.Write(blob); err != nil {
		return err
	}
	rec := record(name, blob, signature, hashed)
	return partial.Commit(ctx, rec, []byte("{}"), signature, cache.Resolution{Ref: ref})
}

func record(name string, blob, signature []byte, hashed trust.Hashed) cache.Record {
	return cache.Record{
		Digest: sha256.Sum256(blob), Name: name, Labels: benchLabels, Size: int64(len(blob)), Signed: true,
		SignatureDigest: sha256.Sum256(signature), Hashed: hashed, Inspected: true, ImageID: sha512.Sum512(blob),
	}
}
