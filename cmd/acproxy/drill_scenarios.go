package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// scenario is something that can go wrong.
type scenario struct {
	name, title string
	play        func(ctx context.Context, a *act) error // an error is that it couldn't be played, not that a promise is broken
}

// scenarios returns them in the order in which they are played.
func scenarios() []scenario {
	return []scenario{
		{"publisher-down", "The publisher goes away, and comes back", publisherDown},
		{"offline", "This side dials nobody", offline},
		{"corrupt-blob", "The disk changes a byte of a held image", corruptBlob},
		{"full-disk", "The disk is full", fullDisk},
		{"expired-key", "The only trusted key comes to its end", expiredKey},
	}
}

func scenarioNames() []string {
	var names []string
	for _, s := range scenarios() {
		names = append(names, s.name)
	}
	return names
}

// The alerts that the scenarios lead to. A test holds them against deploy/prometheus/alerts.yaml.
var (
	alarmPublisherDown = alarm{"AcproxyPublisherDown", "warning", "15 minutes", "acproxy_publisher_breaker_open", ""}
	alarmDamage        = alarm{"AcproxyDiskDamagesImages", "critical", "", "acproxy_decisions_total", `event="damaged"`}
	alarmNoRoom        = alarm{"AcproxyNoRoom", "critical", "", "acproxy_requests_total", `code="507"`}
	alarmRefused       = alarm{"AcproxyImageRefused", "warning", "", "acproxy_decisions_total", `event="refused"`}
	alarmDistrusted    = alarm{"AcproxyHeldImagesDistrusted", "warning", "10 minutes", "acproxy_images_distrusted", ""}
)

// The images that every scenario has: one that is held, and one that isn't.
const (
	heldImage = "hello"
	coldImage = "cold"
	heldSize  = 256 << 10 // bytes of incompressible content
	coldSize  = 3 << 20
)

// publishForDrill publishes them.
func (s *scene) publishForDrill() error {
	return s.publish([]image{
		{name: heldImage, signer: s.key, spec: acitest.Spec{RootfsSize: heldSize}},
		{name: coldImage, signer: s.key, spec: acitest.Spec{RootfsSize: coldSize, Seed: 2}},
	})
}

// open starts a server that trusts the publisher's key and holds one of its images.
func (a *act) open(ctx context.Context, change func(*config.Config)) error {
	if err := a.configure(change); err != nil {
		return err
	}
	if err := a.trust(a.key); err != nil {
		return err
	}
	if err := a.serve(ctx, nil); err != nil {
		return err
	}
	return a.hold(ctx, heldImage)
}

// hold has an image fetched, so that it is held.
func (a *act) hold(ctx context.Context, name string) error {

	a.get(ctx, name, name+", to be held from now on", expect{status: http.StatusOK, sum: a.sum(name)})
	return a.happens(ctx)
}

// happens begins the situation: what is in the log until now isn't shown, and metrics are compared with those of now.
func (a *act) happens(ctx context.Context) (err error) {
	a.server.unseen()
	a.before, err = a.metrics(ctx)
	return err
}

// broughtAbout says that the situation is there.
func (a *act) broughtAbout() error {
	if a.meddle == nil {
		return nil
	}
	return a.meddle(a.scenario.name, a.dataDir)
}

// sum returns the SHA-256 of an image as it was published, in hexadecimal digits.
func (a *act) sum(name string) string {
	f, err := os.Open(a.published(name))
	if err != nil {
		return err.Error() // which no answer has
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err.Error()
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// held is what a node gets of an image that is held: all of it, from here.
func (a *act) held(ctx context.Context) {
	a.get(ctx, heldImage, heldImage+", which is held", expect{status: http.StatusOK, cache: "acproxy; hit", sum: a.sum(heldImage)})
}

// sleep waits, for less if ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func publisherDown(ctx context.Context, a *act) error {
	err := a.open(ctx, func(cfg *config.Config) {
		// Shorter than the defaults, so that one needn't wait for what they do.
		cfg.Dial.Breaker.Open, cfg.Freshness.TTL, cfg.Freshness.Jitter = config.Duration(time.Second), config.Duration(100*time.Millisecond), 0
	})
	if err != nil {
		return err
	}
	latest := url.Values{"os": {"linux"}, "arch": {"amd64"}}
	a.ask(ctx, heldImage, heldImage+" without a version, to be held", latest, expect{status: http.StatusOK, sum: a.sum(heldImage)})
	if err := errors.Join(sleep(ctx, 150*time.Millisecond), a.happens(ctx)); err != nil {
		return err
	}
	a.publisher.Stop()
	if err := a.broughtAbout(); err != nil {
		return err
	}
	a.did("The publisher is stopped: connections to it are refused.")
	a.held(ctx)
	a.ask(ctx, heldImage, heldImage+" without a version, past its time", latest, expect{status: http.StatusOK, cache: "acproxy; hit; detail=STALE", sum: a.sum(heldImage)})
	a.get(ctx, coldImage, coldImage+", which isn't held", expect{status: http.StatusBadGateway, problem: "publisher-unreachable"})
	breaker := a.cfg.Dial.Breaker.Failures
	for range breaker {
		a.node.Get(ctx, a.report.Steps[len(a.report.Steps)-1].Answer.URL, nil, nil)
	}
	a.did("Nodes ask for it %d more times; then the publisher isn't asked any more.", breaker)
	got := a.get(ctx, coldImage, coldImage+", once more", expect{status: http.StatusBadGateway, problem: "publisher-down"})
	wait, err := strconv.Atoi(got.Header.Get("Retry-After"))
	a.promise(err == nil && wait >= 1, "the answer says when it is worth asking again (Retry-After)")
	if err := a.command(ctx, exitOK, "down since", "publishers"); err != nil {
		return err
	}
	if err := a.eventually(ctx, "publisher-down", "events", "--kind", "publisher-down,publisher-up"); err != nil {
		return err
	}
	a.logged("refresh failed")
	changes, err := a.moved(ctx, "acproxy_publisher_breaker_open", "acproxy_publisher_failures_total", "acproxy_requests_total")
	if err != nil {
		return err
	}
	a.alert(changes, alarmPublisherDown)
	if err := a.publisher.Resume(); err != nil {
		return err
	}
	a.did("The publisher is back, and a node asks again when Retry-After says (%d s).", wait)
	if err := sleep(ctx, time.Duration(wait)*time.Second+100*time.Millisecond); err != nil {
		return err
	}
	a.get(ctx, coldImage, coldImage+", again", expect{status: http.StatusOK, sum: a.sum(coldImage)})
	return nil
}

func offline(ctx context.Context, a *act) error {
	if err := a.open(ctx, nil); err != nil {
		return err
	}
	if err := a.restart(ctx, func(cfg *config.Config) { cfg.Offline = true }); err != nil {
		return err
	}
	if err := a.happens(ctx); err != nil {
		return err
	}
	if err := a.broughtAbout(); err != nil {
		return err
	}
	asked := a.publisher.Count("")
	a.did("The server is started again with offline: true. The publisher is up.")
	a.held(ctx)
	a.get(ctx, coldImage, coldImage+", which isn't held", expect{status: http.StatusNotFound, problem: "offline"})
	a.promise(a.publisher.Count("") == asked, "nobody is dialled: the publisher was asked for nothing")
	if err := a.command(ctx, exitOK, "^0 hosts", "publishers"); err != nil {
		return err
	}
	if err := a.command(ctx, exitOK, heldImage, "images"); err != nil {
		return err
	}
	a.logged("")
	if _, err := a.moved(ctx, "acproxy_requests_total", "acproxy_publisher_requests_total"); err != nil {
		return err
	}
	return a.command(ctx, exitOK, "ready", "healthcheck")
}

func corruptBlob(ctx context.Context, a *act) error {
	if err := a.open(ctx, nil); err != nil {
		return err
	}
	digits := a.sum(heldImage)
	blob := filepath.Join(storeDir(a.cfg), "blobs", digits[:2], digits)
	if err := flipByte(blob); err != nil {
		return err
	}
	if err := a.broughtAbout(); err != nil {
		return err
	}
	a.did("One byte in the middle of %s is changed, as a bad disk does. Nobody has noticed yet, and a node gets what is on the disk:", "blobs/"+digits[:2]+"/"+digits[:12]+"…")
	if err := a.damaged(ctx); err != nil {
		return err
	}
	a.did("The disk is read, as it is by itself within scrub.every (30d).")
	if err := a.command(ctx, exitFailed, "blob-corrupt", "scrub"); err != nil {
		return err
	}
	a.get(ctx, heldImage, heldImage+", which is fetched again", expect{status: http.StatusOK, sum: a.sum(heldImage)})
	if err := a.command(ctx, exitOK, "damaged", "events", "--last", "3"); err != nil {
		return err
	}
	a.logged("bytes are lost")
	changes, err := a.moved(ctx, "acproxy_decisions_total", "acproxy_scrub_findings_total")
	if err != nil {
		return err
	}
	a.alert(changes, alarmDamage)
	return a.command(ctx, exitOK, "0 problems", "scrub")
}

// damaged has a node fetch an image that the disk has damaged, and check it as nodes do.
func (a *act) damaged(ctx context.Context) error {
	file := filepath.Join(a.dir, "fetched.aci")
	got := a.get(ctx, heldImage, heldImage+", damaged", expect{status: http.StatusOK})
	signature := a.node.Get(ctx, strings.Replace(got.URL, ".aci?", ".aci.asc?", 1), nil, nil)
	if err := errors.Join(os.WriteFile(file, got.Body, 0o600), os.WriteFile(file+".asc", signature.Body, 0o600)); err != nil {
		return err
	}
	a.did("The node checks it before it runs anything; acproxy verify does the same:")
	return a.command(ctx, exitFailed, "corrupt|bad-signature", "verify", filepath.Base(file))
}

// The small disk holds the image that is held, and not the other one beside what others write to it.
const (
	diskSize   = "8m"
	diskFiller = 5 << 20
)

func fullDisk(ctx context.Context, a *act) error {
	if err := a.configure(func(cfg *config.Config) { cfg.Cache.MinFree = 1 << 20 }); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(a.dataDir, 0o700), a.trust(a.key)); err != nil {
		return err
	}
	if err := a.onSmallDisk(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return a.fullByLimit(ctx, err)
	}
	filler, err := a.fill(ctx)
	if err != nil {
		return err
	}
	a.did("The store is on a file system of 8 MiB, mounted in a namespace of the server's own, and others have filled it up to cache.min_free (1 MiB).")
	if err := a.fullIs(ctx); err != nil {
		return err
	}
	if err := os.Remove(filler); err != nil {
		return err
	}
	a.did("What others wrote is removed.")
	a.get(ctx, coldImage, coldImage+", again", expect{status: http.StatusOK, sum: a.sum(coldImage)})
	return a.fullMidway(ctx)
}

// onSmallDisk starts the server on a file system of its own. Whatever was on it is gone when the server ends.
func (a *act) onSmallDisk(ctx context.Context) error {
	err := a.serve(ctx, func(cmd *exec.Cmd) { onSmallDisk(cmd, a.dataDir, diskSize) })
	if err != nil {
		return err
	}
	return a.hold(ctx, heldImage)
}

// fill has others fill the small file system, and returns the file with which they do.
func (a *act) fill(ctx context.Context) (string, error) {
	filler := filepath.Join(inside(a.server.cmd.Process.Pid, a.dataDir), "of-others")
	return filler, errors.Join(writeRandom(filler, diskFiller), a.broughtAbout(), ctx.Err())
}

// fullMidway fills a disk of which nothing is left to others, so that it runs full while an image arrives.
func (a *act) fullMidway(ctx context.Context) error {
	if err := a.stop(); err != nil {
		return err
	}
	if err := a.configure(nil); err != nil {
		return err
	}
	if err := a.onSmallDisk(ctx); err != nil {
		return err
	}
	if _, err := a.fill(ctx); err != nil {
		return err
	}
	a.did("The same with cache.min_free: 0, so that the disk runs full while an image arrives.")
	got := a.node.Get(ctx, a.imageURL(coldImage, imageLabels()), nil, nil)
	a.promise(got.Err != nil || got.Status != http.StatusOK, "%s doesn't end as a whole image: the connection is cut (%v)", coldImage, got.Err)
	a.held(ctx)
	a.logged("no space left on device")
	return nil
}

// fullByLimit is the same where no file system of its own can be had, for a reason.
func (a *act) fullByLimit(ctx context.Context, why error) error {
	// It didn't start, and its exit code says only that.
	_ = a.stop()
	if err := a.configure(nil); err != nil {
		return err
	}
	if err := a.serve(ctx, nil); err != nil {
		return err
	}
	if err := a.hold(ctx, heldImage); err != nil {
		return err
	}
	if err := a.restart(ctx, func(cfg *config.Config) { cfg.Cache.MinFree = 1 << 50 }); err != nil {
		return err
	}
	if err := errors.Join(a.happens(ctx), a.broughtAbout()); err != nil {
		return err
	}
	a.did("The kernel gives users no file system of their own here (%v). So cache.min_free is 1024 TiB, more than this disk has left.", why)
	if err := a.fullIs(ctx); err != nil {
		return err
	}
	if err := a.restart(ctx, nil); err != nil {
		return err
	}
	a.did("cache.min_free is less again.")
	a.get(ctx, coldImage, coldImage+", again", expect{status: http.StatusOK, sum: a.sum(coldImage)})
	return nil
}

// fullIs shows what it is like when there is no room.
func (a *act) fullIs(ctx context.Context) error {
	a.held(ctx)
	a.get(ctx, coldImage, coldImage+", for which there is no room", expect{status: http.StatusInsufficientStorage, problem: "min-free"})
	a.held(ctx)
	if err := a.command(ctx, exitOK, "together", "usage"); err != nil {
		return err
	}
	a.logged("")
	changes, err := a.moved(ctx, "acproxy_requests_total", "acproxy_cache_free_bytes")
	if err != nil {
		return err
	}
	a.alert(changes, alarmNoRoom)
	return nil
}

// writeRandom writes what no file system can make smaller.
func writeRandom(file string, n int64) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.Reader, n)
	return errors.Join(err, f.Close())
}

// keyLasts is how long the key that expires is good at first: long enough to fetch an image.
const keyLasts = 3 * time.Second

func expiredKey(ctx context.Context, a *act) error {
	if err := a.configure(nil); err != nil {
		return err
	}
	if err := a.serve(ctx, nil); err != nil {
		return err
	}
	// Nothing is held yet. Once something is, the key may expire at any time.
	began, err := a.metrics(ctx)
	if err != nil {
		return err
	}
	ends, err := a.trustShortly(ctx)
	if err != nil {
		return err
	}
	if err := a.hold(ctx, "signed"); err != nil {
		return err
	}
	if err := sleep(ctx, time.Until(ends)+time.Second); err != nil {
		return err
	}
	if err := a.broughtAbout(); err != nil {
		return err
	}
	a.did("The key that signed it was made to expire at %s. That is over now.", ends.Format("15:04:05"))
	a.get(ctx, "signed", "signed, which is held", expect{status: http.StatusForbidden, problem: "key-expired"})
	a.get(ctx, "signed-too", "signed-too, by the same key", expect{status: http.StatusForbidden, problem: "key-expired"})
	if err := a.command(ctx, exitOK, "EXPIRED", "trust", "list"); err != nil {
		return err
	}
	if err := a.command(ctx, exitOK, "key-expired", "refusals"); err != nil {
		return err
	}
	a.logged("")
	changes, err := a.moved(ctx, "acproxy_decisions_total", "acproxy_requests_total")
	if err != nil {
		return err
	}
	a.alert(changes, alarmRefused)
	return errors.Join(a.judgedAgain(ctx, began), a.withPolicy(ctx))
}

// judgedAgain shows that everything that is held is judged again when a key expires, as it is whenever keys or policies change, every hour, and at each start.
func (a *act) judgedAgain(ctx context.Context, began map[string]string) error {
	a.before = began
	a.did("All that is held is judged again when a key expires, so that listings and metrics know without being asked.")
	if err := a.settle(ctx, alarmDistrusted.metric, "1"); err != nil {
		return err
	}
	if err := a.command(ctx, exitOK, "quarantined: ", "images", "--state", "quarantined"); err != nil {
		return err
	}
	changes, err := a.moved(ctx, alarmDistrusted.metric)
	if err != nil {
		return err
	}
	a.alert(changes, alarmDistrusted)
	return nil
}

// trustShortly has the server trust a key with little time left, and returns when that key comes to its end. On a machine so busy that a quarter of the time
// is over by then, it begins anew with more.
func (a *act) trustShortly(ctx context.Context) (ends time.Time, err error) {
	for lasts := keyLasts; ; lasts *= 4 {
		ends = time.Now().Add(lasts)
		if err := a.shortLived(ends); err != nil {
			return ends, err
		}
		switch reloaded, err := a.execute(ctx, []string{"reload"}); {
		case err != nil:
			return ends, err
		case reloaded.Exit != exitOK:
			return ends, fmt.Errorf("%s ended with exit code %d: %s", reloaded.Command, reloaded.Exit, reloaded.Output)
		case time.Until(ends) > lasts*3/4:
			return ends, nil
		case lasts > time.Minute:
			return ends, fmt.Errorf("this machine is too busy: it takes longer than %v to have a new key trusted", lasts/4)
		}
	}
}

// shortLived publishes images that are signed by a key with little time left, and trusts that key.
func (a *act) shortLived(ends time.Time) error {
	key, err := trusttest.NewKey(trusttest.Options{Name: "Short-lived Publisher", Email: "images@" + sceneHost, Expires: ends})
	if err != nil {
		return err
	}
	for _, im := range []image{{name: "signed", spec: acitest.Spec{RootfsSize: 64 << 10, Seed: 3}}, {name: "signed-too", spec: acitest.Spec{RootfsSize: 64 << 10, Seed: 4}}} {
		im.signer = key
		if err := a.publishOne(im); err != nil {
			return err
		}
	}
	return a.trust(key)
}

// withPolicy shows what an operator can do who has made sure that the image is good, until the publisher's new key is there.
func (a *act) withPolicy(ctx context.Context) error {
	if err := a.configure(func(cfg *config.Config) { cfg.Trust.Expired = config.ExpiredAcceptIfSignedBefore }); err != nil {
		return err
	}
	a.did("The configuration gets trust.expired: accept-if-signed-before. It takes effect without a restart.")
	if err := a.command(ctx, exitOK, "trust.expired: ", "reload"); err != nil {
		return err
	}
	a.get(ctx, "signed", "signed, which was signed before", expect{status: http.StatusOK, cache: "acproxy; hit", sum: a.sum("signed")})
	return nil
}

// settle waits for a metric to have a value, for ten seconds.
func (a *act) settle(ctx context.Context, metric, value string) error {
	for range 500 {
		now, err := a.metrics(ctx)
		if err != nil || now[metric] == value {
			return err
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	a.promise(false, "%s is %s", metric, value)
	return nil
}
