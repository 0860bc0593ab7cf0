// Command soak runs the real server for a while under everything at once: nodes that fetch, leave midway and crawl, a publisher that misbehaves,
// versions that move on, keys that are taken away and given back, a quota that is too small, blobs that go away, and kills. It fails if a byte was served that nobody
// published, if an image was served whose key was not trusted, if the quota was exceeded at any sample, if fsck finds anything after a kill or in the end that
// nobody spoiled, if an image doesn't come any more when all is well, or if memory or descriptors grew.
//
//	go run ./test/soak -duration 10m -out dist/soak
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	duration time.Duration
	images   int
	size     int64
	maxSize  int64
	nodes    int
	seed     uint64
	binary   string
	out      string
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	flags.DurationVar(&o.duration, "duration", 2*time.Minute, "how long to go on")
	flags.IntVar(&o.images, "images", 60, "names that are published, three versions each")
	flags.Int64Var(&o.size, "size", 300<<10, "bytes of an image, about")
	flags.Int64Var(&o.maxSize, "max-size", 16<<20, "the server's quota, in bytes")
	flags.IntVar(&o.nodes, "nodes", 12, "nodes that ask at a time")
	flags.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "where chance begins")
	flags.StringVar(&o.binary, "binary", "", "the acproxy to run; built if it is not given")
	flags.StringVar(&o.out, "out", "", "where to write what was seen: with .svg, a plot, and with .txt, a table")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	fmt.Fprintf(stdout, "soak: %v, seed %d\n", o.duration, o.seed)
	s, err := newSoak(o, stdout)
	if err != nil {
		fmt.Fprintln(stderr, "soak:", err)
		return 1
	}
	err = s.run(ctx)
	if closed := s.close(); err == nil {
		err = closed
	}
	if err != nil {
		s.failf("%v", err)
	}
	report := s.report()
	fmt.Fprint(stdout, report)
	if o.out != "" {
		err := os.MkdirAll(filepath.Dir(o.out), 0o755)
		if err == nil {
			err = os.WriteFile(o.out+".txt", []byte(report), 0o644)
		}
		if err == nil {
			err = os.WriteFile(o.out+".svg", []byte(plot(s.samples, s.o.maxSize, s.began)), 0o644)
		}
		if err != nil {
			fmt.Fprintln(stderr, "soak:", err)
			return 1
		}
	}
	if len(s.failures) > 0 {
		return 1
	}
	return 0
}

// soak is all that goes on.
type soak struct {
	o      options
	stdout io.Writer
	stage  *stage
	began  time.Time

	mu       sync.Mutex
	failures []string
	failed   int
	counts   map[string]int64
	samples  []sample
}

// sample is what was seen of the server at a moment.
type sample struct {
	at          time.Time
	anon, cache int64  // bytes
	descriptors int    // open
	note        string // what was done since the last one
	idle        bool   // nobody asks
}

func newSoak(o options, stdout io.Writer) (*soak, error) {
	s := &soak{o: o, stdout: stdout, counts: make(map[string]int64), began: time.Now()}
	var err error
	s.stage, err = newStage(o)
	return s, err
}

func (s *soak) close() error { return s.stage.close() }

// failf notes that a promise was broken.
func (s *soak) failf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed++
	if len(s.failures) < 20 {
		s.failures = append(s.failures, fmt.Sprintf("%7.1fs  ", time.Since(s.began).Seconds())+fmt.Sprintf(format, args...))
	}
}

func (s *soak) count(what string, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what] += n
}

// run goes on for as long as was asked, and then looks whether everything is as it should be.
func (s *soak) run(ctx context.Context) error {
	if err := s.stage.start(); err != nil {
		return err
	}
	if err := s.sample("start", true); err != nil {
		return err
	}
	busy, done := context.WithTimeout(ctx, s.o.duration)
	defer done()
	var all sync.WaitGroup
	for i := range s.o.nodes {
		// Ends with busy; waited for below.
		all.Go(func() { s.node(busy, rand.New(rand.NewPCG(s.o.seed, uint64(i)))) })
	}
	// The same.
	all.Go(func() { s.sampler(busy) })
	err := s.trouble(busy, rand.New(rand.NewPCG(s.o.seed, 1<<32)))
	all.Wait()
	if err != nil {
		return err
	}
	return s.reckon(ctx)
}

// sampler looks at the server every now and then.
func (s *soak) sampler(ctx context.Context) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			// While it is restarted there is nothing to see.
			_ = s.sample("", false)
		case <-ctx.Done():
			return
		}
	}
}

func (s *soak) sample(note string, idle bool) error {
	seen, err := s.stage.look()
	if err != nil {
		return err
	}
	seen.at, seen.note, seen.idle = time.Now(), note, idle
	if seen.cache > s.o.maxSize {
		s.failf("the store takes %d bytes, and its quota is %d", seen.cache, s.o.maxSize)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.samples = append(s.samples, seen)
	return nil
}

// trouble disturbs everything in turn.
func (s *soak) trouble(ctx context.Context, random *rand.Rand) error {
	for {
		select {
		case <-time.After(time.Duration(500+random.IntN(2500)) * time.Millisecond):
		case <-ctx.Done():
			s.stage.publisher.Behave()
			return nil
		}
		what, err := s.stage.disturb(ctx, random)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		s.count("did: "+what, 1)
		if err := s.sample(what, false); err != nil {
			return err
		}
	}
}

// reckon has everything again when all is well, and looks for what was left.
func (s *soak) reckon(ctx context.Context) error {
	st := s.stage
	st.publisher.Behave()
	if err := st.trustAll(); err != nil {
		return err
	}
	for _, im := range st.images {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.fetchUntilWell(ctx, im)
	}
	if err := st.idle(); err != nil {
		return err
	}
	if err := s.sample("end", true); err != nil {
		return err
	}
	var first, last sample
	s.mu.Lock()
	for _, seen := range s.samples {
		if seen.idle && first.at.IsZero() {
			first = seen
		}
		last = seen
	}
	s.mu.Unlock()
	if last.descriptors > first.descriptors+8 {
		s.failf("%d descriptors are open in the end, and %d were in the beginning", last.descriptors, first.descriptors)
	}
	if most := int64(160 << 20); last.anon > most {
		s.failf("%d MB of memory are in use in the end", last.anon>>20)
	}
	if err := st.end(syscall.SIGTERM); err != nil {
		return err
	}
	return st.check()
}

// report says what was seen.
func (s *soak) report() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	var keys []string
	for key := range s.counts {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		fmt.Fprintf(&b, "%12d  %s\n", s.counts[key], key)
	}
	if n := len(s.samples); n > 0 {
		var anon, cache []int64
		var descriptors []int
		for _, seen := range s.samples {
			anon, cache, descriptors = append(anon, seen.anon), append(cache, seen.cache), append(descriptors, seen.descriptors)
		}
		fmt.Fprintf(&b, "%12.1f  MB of memory at most, %.1f in the end\n", float64(slices.Max(anon))/1e6, float64(anon[n-1])/1e6)
		fmt.Fprintf(&b, "%12d  descriptors at most, %d in the end\n", slices.Max(descriptors), descriptors[n-1])
		fmt.Fprintf(&b, "%12.1f  MB in the store at most, of %.1f\n", float64(slices.Max(cache))/1e6, float64(s.o.maxSize)/1e6)
	}
	if s.failed == 0 {
		b.WriteString("soak: passed\n")
		return b.String()
	}
	fmt.Fprintf(&b, "soak: FAILED, %d times\n", s.failed)
	for _, f := range s.failures {
		b.WriteString(f + "\n")
	}
	return b.String()
}
