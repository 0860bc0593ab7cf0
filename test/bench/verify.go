package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// The metrics of verification.
var (
	hashSpeed = metric{"speed", "MB/s", true}
	decisions = metric{"decisions", "/s", true}
	rejudged  = metric{"images", "/s", true}
)

// verifyBenchmarks measure what it costs to verify, in this process.
func verifyBenchmarks() []benchmark {
	return []benchmark{
		{
			name: "verify", what: "a signature over one file, SHA-512, RSA 2048; the same file for all", groups: []string{groupVerify}, metrics: []metric{hashSpeed},
			goals: []goal{{of: acproxyName, metric: hashSpeed.name, than: gpgName, by: 1.4}}, setUp: setUpVerify,
		},
		{
			name: "decisions", what: "small images: hash, judge by the keyring, rkt's prediction included", groups: []string{groupVerify}, metrics: []metric{decisions},
			setUp: setUpDecisions,
		},
		{
			name: "rejudge", what: "all held images judged again after a change of the keys", groups: []string{groupVerify}, metrics: []metric{rejudged},
			setUp: setUpRejudge,
		},
	}
}

const gpgName = "gpg --verify"

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

func setUpVerify(_ context.Context, o options) (stage, error) {
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
	perSecond := func(do func() error) func(context.Context) (measures, error) {
		return func(context.Context) (measures, error) {
			took, err := timed(do)
			return measures{hashSpeed.name: float64(o.size) / 1e6 / took}, err
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
		s.contestants = append(s.contestants, contestant{gpgName, perSecond(func() error {
			return quiet(exec.Command(gpg, "--homedir", home, "--trust-model", "always", "--verify", signatureFile, file))
		})})
	}
	if sum, err := exec.LookPath("sha512sum"); err == nil {
		s.contestants = append(s.contestants, contestant{"sha512sum", perSecond(func() error { return quiet(exec.Command(sum, file)) })})
	}
	s.contestants = append(s.contestants, contestant{acproxyName, perSecond(func() error {
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

func setUpDecisions(_ context.Context, o options) (stage, error) {
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
	const count = 5000
	decide := func(context.Context) (measures, error) {
		took, err := timed(func() error {
			for range count {
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
		return measures{decisions.name: count / took}, err
	}
	return stage{contestants: []contestant{{"one core", decide}}, close: func() error { return nil }}, nil
}

func setUpRejudge(_ context.Context, o options) (stage, error) {
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
		contestants: []contestant{{fmt.Sprintf("%d images, all cores", o.images), func(ctx context.Context) (measures, error) {
			var found fetch.Rejudged
			took, err := timed(func() error {
				var err error
				found, err = fetcher.Rejudge(ctx)
				return err
			})
			if err == nil && (found.Images != o.images || found.Quarantined != 0) {
				err = fmt.Errorf("%+v, want %d images, none of them quarantined", found, o.images)
			}
			return measures{rejudged.name: float64(o.images) / took}, err
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
		SignatureDigest: sha256.Sum256(signature), Hashed: cache.HashesOf(hashed), Inspected: true, ImageID: sha512.Sum512(blob),
	}
}
