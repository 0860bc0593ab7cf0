package config

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/listen"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write the golden files, config.example.yaml and docs/configuration.md")

func TestParseNothing(t *testing.T) {
	for name, text := range map[string]string{
		"empty":                     "",
		"comments alone":            "# nothing\n",
		"the beginning of document": "---\n",
		"a byte order mark":         "\ufeff",
		"sections without lines":    "listen:\nallow:\nca:\nfetch:\n  limits:\ndial:\n  hosts:\npublishers:\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Parse("config.yaml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if want := Default(); !reflect.DeepEqual(*c, want) {
				t.Errorf("Parse = %+v, want the default %+v", *c, want)
			}
		})
	}
}

func TestParse(t *testing.T) {
	const text = "\ufeff" + `--- # everything that has a type of its own
data_dir: '/srv/images'
listen:
- address: 0.0.0.0:8080
- {address: "[::1]:8443", tls: local-ca, proxy: false}
offline: false
allow: [example.com, example.org/app]
proxy:
  hosts: ["*.example.com"]
  tunnel: true
dial:
  allow: [10.0.0.0/8, 192.0.2.7, "fd00::/8"]
  hosts:
    example.com: 10.0.0.5:8443
    example.com:8443: "[fd00::5]:443"
  resolver: 10.0.0.53
  connect_timeout: 1m30s
  max_redirects: 0
  max_connections: 2
  rate: 0
  max_retry_after: 0s
  breaker: {failures: 0, open: 1m}
fetch: {hold_back: 128KiB, max_image_size: 1.5GiB, signature_wait: 0}
freshness:
  ttl: 7d
publishers:
  - prefix: example.com
    templates: ["http://10.0.0.5/{name}-{version}.{ext}"]
    http: true
    ttl: 0s
    legacy: true
    threshold: 2
`
	c, err := Parse("config.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.DataDir = "/srv/images"
	want.Listen = []Listen{{Address: "0.0.0.0:8080", Mode: DefaultMode, TLS: TLSNone, Proxy: true}, {Address: "[::1]:8443", Mode: DefaultMode, TLS: TLSLocalCA}}
	want.Allow = []string{"example.com", "example.org/app"}
	want.Proxy = Proxy{Hosts: []string{"*.example.com"}, Tunnel: true}
	want.Dial.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("fd00::/8")}
	want.Dial.Hosts = map[string]string{"example.com": "10.0.0.5:8443", "example.com:8443": "[fd00::5]:443"}
	want.Dial.Resolver = "10.0.0.53"
	want.Dial.ConnectTimeout = Duration(90 * time.Second)
	want.Dial.MaxRedirects = 0
	want.Dial.MaxConnections, want.Dial.Rate, want.Dial.MaxRetryAfter = 2, 0, 0
	want.Dial.Breaker = Breaker{Failures: 0, Open: minutes(1), MaxOpen: minutes(1)}
	want.Fetch.HoldBack, want.Fetch.MaxImageSize, want.Fetch.SignatureWait = 128*KiB, 1536*MiB, 0
	want.Freshness.TTL = Duration(7 * 24 * time.Hour)
	yes, two, never := true, 2, Duration(0)
	want.Publishers = []Publisher{{Prefix: "example.com", Templates: []string{"http://10.0.0.5/{name}-{version}.{ext}"}, HTTP: true, TTL: &never, Legacy: &yes, Threshold: &two}}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("Parse =\n%+v, want\n%+v", *c, want)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Validate of what Parse accepts = %v", err)
	}
}

func TestCacheAtItsEdges(t *testing.T) {
	for _, text := range []string{
		"cache: {max_size: 0}", "cache: {max_size: 16MiB}", "cache: {min_free: 0}", "cache: {high: 100, low: 100}", "cache: {high: 1, low: 1}", "cache: {high: 90}",
		"cache: {grace: 0s}", "scrub: {every: 0s}", "scrub: {rate: 1B}",
	} {
		if _, err := Parse("config.yaml", []byte(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestCollectorWhileOffline: who is offline may still speak to this machine.
func TestCollectorWhileOffline(t *testing.T) {
	for _, tt := range []struct {
		host string
		good bool
	}{
		{"127.0.0.1:4318", true}, {"127.9.9.9", true}, {"[::1]:4318", true}, {"[::ffff:127.0.0.1]:4318", true}, {"localhost:4318", true},
		{"192.0.2.7:4318", false}, {"collector.example.com", false}, {"localhost.example.com", false}, {"0.0.0.0:4318", false},
	} {
		for _, offline := range []string{"true", "false"} {
			_, err := Parse("config.yaml", []byte("offline: "+offline+"\ntraces: {endpoint: 'http://"+tt.host+"'}"))
			if good := tt.good || offline == "false"; (err == nil) != good {
				t.Errorf("offline %s, a collector at %s: %v", offline, tt.host, err)
			}
		}
	}
}

func TestPublisherFor(t *testing.T) {
	c, err := Parse("config.yaml", []byte(`
offline: false
dial: {allow: [10.0.0.0/8], timeout: 20s}
trust: {legacy: true}
publishers:
  - {prefix: example.com, signature: optional, ttl: 0s, allow_addresses: [192.0.2.0/24]}
  - {prefix: example.com/app, on_change: follow, legacy: false, offline: true}
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, image, prefix, signature, onChange string
		legacy, offline                          bool
		ttl                                      time.Duration
		addresses                                int
	}{
		{"no publisher", "example.org/app", "", SignatureRequired, OnChangeRefuse, true, false, 5 * time.Minute, 1},
		{"the prefix itself", "example.com", "example.com", SignatureOptional, OnChangeRefuse, true, false, 0, 2},
		{"a neighbour of the longer prefix", "example.com/apple", "example.com", SignatureOptional, OnChangeRefuse, true, false, 0, 2},
		{"the longer prefix decides alone", "example.com/app/web", "example.com/app", SignatureRequired, OnChangeFollow, false, true, 5 * time.Minute, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := c.PublisherFor(tt.image)
			if p.Prefix != tt.prefix || p.Signature != tt.signature || p.OnChange != tt.onChange || *p.Legacy != tt.legacy || *p.Offline != tt.offline ||
				time.Duration(*p.TTL) != tt.ttl || len(p.AllowAddresses) != tt.addresses {
				t.Errorf("PublisherFor(%s) = %+v, want %+v", tt.image, p, tt)
			}
			if *p.Threshold != 1 || *p.Timeout != seconds(20) || p.Expired != ExpiredRefuse || p.Delivery != DeliveryCutThrough {
				t.Errorf("PublisherFor(%s) = %+v: what nobody set is not the default", tt.image, p)
			}
			*p.Threshold = 9
			if c.Trust.Threshold != 1 {
				t.Error("changing what PublisherFor returns changes the configuration")
			}
		})
	}
}

// Each file of testdata/mistakes is a configuration and the error it gives, as a person reads it. A comment at its top says what it is.
func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/mistakes/*.txtar")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d files of mistakes, %v; want at least 15", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			wanted := slices.IndexFunc(archive.Files, func(f txtar.File) bool { return f.Name == "error" })
			if wanted < 0 {
				archive.Files = append(archive.Files, txtar.File{Name: "error"})
				wanted = len(archive.Files) - 1
			}
			for _, f := range archive.Files {
				if f.Name != "error" {
					if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			_, err = Load(filepath.Join(dir, "config.yaml"))
			if !errors.Is(err, acproxy.ErrInvalid) {
				t.Fatalf("Load = %v, want one that matches ErrInvalid", err)
			}
			var mistakes Mistakes
			if !errors.As(err, &mistakes) {
				t.Fatalf("Load = %T, want Mistakes", err)
			}
			for _, m := range mistakes {
				if m.Line < 1 || m.Column < 1 {
					t.Errorf("%q has no place", m.Message)
				}
			}
			got := strings.ReplaceAll(err.Error(), dir+string(filepath.Separator), "") + "\n"
			if *update {
				archive.Files[wanted].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := string(archive.Files[wanted].Data); got != want {
				t.Errorf("the error is\n%s\nwant\n%s\n(go test ./internal/config -update writes it)", got, want)
			}
		})
	}
}

func TestPasswordsAreNotShown(t *testing.T) {
	for _, line := range []string{"proxy: ftp://me:hunter2@proxy.example.com", "proxy: http://me:hunter2@proxy.example.com/a/b", "proxy: http://me:hunter2@:x", "prxy: http://me:hun@hunter2@proxy.example.com"} {
		_, err := Parse("config.yaml", []byte("publishers:\n- prefix: example.com\n  "+line+"\n"))
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Parse of %q = %v, want an error without the password", line, err)
		}
	}
}

func TestLoadResolvesPaths(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte("data_dir: data\nca: {dir: /srv/ca}\ntrust: {local_dir: ../keys}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	c, err := Load("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != filepath.Join(dir, "data") || c.CA.Dir != "/srv/ca" || c.Trust.LocalDir != filepath.Join(filepath.Dir(dir), "keys") || c.Admin.Socket != "" {
		t.Errorf("data_dir %q, ca.dir %q, trust.local_dir %q, admin.socket %q", c.DataDir, c.CA.Dir, c.Trust.LocalDir, c.Admin.Socket)
	}
	if _, err := Load("none.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Load without a file = %v, want ErrNotExist", err)
	}
}

func TestLoadLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	for size, good := range map[int]bool{maxFile: true, maxFile + 1: false} {
		text := "#" + strings.Repeat(" ", size-2) + "\n"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); (err == nil) != good {
			t.Errorf("Load of %d bytes = %v, want good = %v", size, err, good)
		}
	}
	socket := func(n int) string {
		const head = "/run/"
		return "admin: {socket: " + head + strings.Repeat("s", n-len(head)) + "}\n"
	}
	for n, good := range map[int]bool{listen.MaxPath: true, listen.MaxPath + 1: false} {
		if err := os.WriteFile(path, []byte(socket(n)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); (err == nil) != good {
			t.Errorf("Load with a socket of %d bytes = %v, want good = %v", n, err, good)
		}
	}
}

// What Parse would not have accepted, Validate doesn't either, though there is no line to point to.
func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(c *Config)
		key    string
	}{
		{"a word that is not known", func(c *Config) { c.Fetch.Delivery = "later" }, "fetch.delivery"},
		{"a word of a publisher", func(c *Config) { c.Publishers = []Publisher{{Prefix: "example.com", OnChange: "cry"}} }, "publishers[0].on_change"},
		{"an empty word", func(c *Config) { c.Log.Level = "" }, "log.level"},
		{"a negative time", func(c *Config) { c.Freshness.TTL = -1 }, "freshness.ttl"},
		{"an address without a port", func(c *Config) { c.Listen[0].Address = "localhost" }, "listen[0].address"},
		{"no address", func(c *Config) { c.Listen = nil }, "listen"},
		{"a size of nothing", func(c *Config) { c.Fetch.MaxImageSize = 0 }, "fetch.max_image_size"},
		{"a publisher without a prefix", func(c *Config) { c.Publishers = []Publisher{{}} }, "publishers[0].prefix"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Default()
			if err := c.Validate(); err != nil {
				t.Fatalf("the default is not valid: %v", err)
			}
			tt.change(&c)
			var mistakes Mistakes
			if err := c.Validate(); !errors.As(err, &mistakes) || mistakes[0].Key != tt.key || !errors.Is(err, acproxy.ErrInvalid) {
				t.Fatalf("Validate = %v, want a mistake at %s", err, tt.key)
			}
			if text := mistakes[0].Error(); !strings.HasPrefix(text, tt.key+": ") || strings.Contains(text, "\n") {
				t.Errorf("the mistake reads %q, want the key and no line", text)
			}
		})
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1": 1, "512": 512, "64KiB": 65536, "100MiB": 100 << 20, "20GB": 20e9, "1.5GiB": 3 << 29, "1 TiB": TiB, "7kB": 7000, "7KB": 7000, "9B": 9,
		"9223372036854775807": 1<<63 - 1, "8388607TiB": 8388607 * TiB, "0.5KiB": 512,
	} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "write a number and a unit", "KiB": "write a number and a unit", "-1KiB": "write a number and a unit", "1.2.3MiB": "write a number and a unit", "１KiB": "write a number and a unit",
		"64K": "write 64KiB (multiples of 1024) or 64KB (of 1000)", "64kib": "write 64KiB", "64mb": "write 64MB", "1Mbit": "write KiB", "0.3KiB": "smaller unit",
		"8388608TiB": "the most is", "9223372036854775808": "the most is", "99999999999999.9TiB": "the most is", "1e3": "write a number and a unit",
	} {
		if got, err := ParseSize(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseSize(%q) = %d, %v; want an error that says %q", text, got, err, want)
		}
	}
	for size, want := range map[Size]string{0: "0B", 1: "1B", 1000: "1kB", 1024: "1KiB", 1536: "1536B", 20 * GiB: "20GiB", 20e9: "20GB", -1: "-1B"} {
		if got := size.String(); got != want {
			t.Errorf("Size(%d) = %s, want %s", int64(size), got, want)
		}
	}
}

func TestDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "30s": 30 * time.Second, "10m": 10 * time.Minute, "24h": 24 * time.Hour, "7d": 7 * day, "1h30m": 90 * time.Minute, "1d12h": 36 * time.Hour,
		"250ms": 250 * time.Millisecond, "1.5h": 90 * time.Minute, "106751d": 106751 * day, "106751d23h47m16s": 106751*day + 23*time.Hour + 47*time.Minute + 16*time.Second,
	} {
		if got, err := ParseDuration(text); err != nil || time.Duration(got) != want {
			t.Errorf("ParseDuration(%q) = %v, %v; want %v", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "write a number and a unit", "30": "write 30s for seconds", "-5m": "negative", "5 minutes": "write a number", "1.5d": "write a number", "d": "write a number", "1d-1h": "write a number",
		"1d+1h": "write a number", "106752d": "the most is", "106751d23h47m17s": "the most is", "5y": "write a number", "+5m": "write a number",
	} {
		if got, err := ParseDuration(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseDuration(%q) = %v, %v; want an error that says %q", text, got, err, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0s", 30 * time.Second: "30s", 10 * time.Minute: "10m", 24 * time.Hour: "1d", 36 * time.Hour: "1d12h", 90 * time.Second: "1m30s", 250 * time.Millisecond: "250ms", -time.Second: "-1s",
	} {
		if got := Duration(d).String(); got != want {
			t.Errorf("Duration(%d) = %s, want %s", d, got, want)
		}
	}
}

func TestEditDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"listen", "listen", 0}, {"lisen", "listen", 1}, {"litsen", "listen", 1}, {"kitten", "sitting", 3}, {"ca", "abc", 3},
	} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	example, err := os.ReadFile("../../config.example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(example))
	files, err := filepath.Glob("testdata/mistakes/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(archive.Files[0].Data))
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("config.yaml", []byte(text))
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Errorf("Parse accepts what Validate does not: %v", err)
			}
			c.PublisherFor("example.com/app")
			return
		}
		var mistakes Mistakes
		if !errors.As(err, &mistakes) || len(mistakes) == 0 {
			t.Fatalf("Parse = %v, want Mistakes", err)
		}
		lines := strings.Split(text, "\n")
		for _, m := range mistakes {
			if m.Line < 1 || m.Line > len(lines) || m.Column < 1 || m.Column > utf8.RuneCountInString(lines[m.Line-1])+1 {
				t.Errorf("a mistake is at %d:%d, which the file does not have: %v", m.Line, m.Column, m)
			}
		}
		if !utf8.ValidString(err.Error()) {
			t.Errorf("the error is not text: %q", err.Error())
		}
	})
}
