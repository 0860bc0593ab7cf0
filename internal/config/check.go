package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/appc/spec/schema/types"
	"github.com/robfig/cron/v3"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/listen"
)

// check notes whatever is wrong with the values, all that can be told without opening a file. What could not be read has its default here,
// and is not judged a second time.
func (c *Config) check(r *report) {
	c.checkWords(r, reflect.ValueOf(c).Elem(), "")
	c.checkListen(r)
	c.checkACME(r)
	c.checkFrontDoors(r)
	c.checkClients(r)
	c.checkDial(r)
	c.checkDiscovery(r)
	c.checkTrust(r)
	c.checkFetch(r)
	c.checkFreshness(r)
	c.checkCache(r)
	c.checkWarm(r)
	c.checkAccess(r)
	c.checkCredentials(r)
	if at := c.Admin.Metrics; at != "" && !r.broken("admin.metrics") {
		if problem := checkListenAddress(at); problem != "" {
			r.value("admin.metrics", "%s", problem)
		} else {
			checkFree(r, "admin.metrics", at, c.listeners())
		}
	}
	c.checkPublishers(r)
	positive(r, "push.max_uploads", c.Push.MaxUploads, Default().Push.MaxUploads)
	positive(r, "push.timeout", c.Push.Timeout, Default().Push.Timeout)
	c.checkOCI(r)
	c.checkPaths(r)
	notNegative(r, "stop_grace", c.StopGrace)
	notNegative(r, "log.access_flush", c.Log.AccessFlush)
	if c.Traces.Endpoint != "" && !r.broken("traces.endpoint") {
		if problem := checkCollector(c.Traces.Endpoint); problem != "" {
			r.value("traces.endpoint", "%s", problem)
		} else if c.Offline && !onThisMachine(c.Traces.Endpoint) {
			r.value("traces.endpoint", "acproxy is offline and dials nobody elsewhere: name a collector on this machine, as in http://127.0.0.1:4318, or remove this")
		}
	}
	percent(r, "traces.sample", c.Traces.Sample)
	for i, prefix := range c.Allow {
		checkPrefix(r, index("allow", i), prefix)
	}
	if r.broken("allow") || len(c.Allow) == 0 {
		return
	}
	for i, p := range c.Publishers {
		if path := index("publishers", i) + ".prefix"; !r.broken(path) && !c.allows(p.Prefix) {
			r.value(path, "no image under %s may be asked for: allow leaves it out; add it there, or remove this publisher", p.Prefix)
		}
	}
}

// allows reports whether an image under prefix may be asked for.
func (c *Config) allows(prefix string) bool {
	return slices.ContainsFunc(c.Allow, func(allowed string) bool {
		return acproxy.HasPrefix(prefix, allowed) || acproxy.HasPrefix(allowed, prefix)
	})
}

// checkWords checks what may be one of a few words. Parse has seen to it before; a Config made by hand has not been through that.
func (c *Config) checkWords(r *report, v reflect.Value, path string) {
	for _, field := range reflect.VisibleFields(v.Type()) {
		at, value := join(path, key(field)), v.FieldByIndex(field.Index)
		switch {
		case field.Tag.Get("oneof") != "" && value.Kind() == reflect.Slice:
			words := strings.Fields(field.Tag.Get("oneof"))
			for i := range value.Len() {
				if word := value.Index(i).String(); !slices.Contains(words, word) && !r.broken(index(at, i)) {
					r.value(index(at, i), "%s", notAWord(word, words))
				}
			}
		case field.Tag.Get("oneof") != "":
			words := strings.Fields(field.Tag.Get("oneof"))
			inherits := v.Type() == reflect.TypeFor[Publisher]() && value.String() == ""
			if !inherits && !slices.Contains(words, value.String()) && !r.broken(at) {
				r.value(at, "%s", notAWord(value.String(), words))
			}
		case value.Kind() == reflect.Struct && value.Type().PkgPath() == v.Type().PkgPath():
			c.checkWords(r, value, at)
		case value.Kind() == reflect.Slice && value.Type().Elem().Kind() == reflect.Struct && value.Type().Elem().PkgPath() == v.Type().PkgPath():
			for i := range value.Len() {
				c.checkWords(r, value.Index(i), index(at, i))
			}
		}
	}
}

func (c *Config) checkListen(r *report) {
	if len(c.Listen) == 0 && !r.broken("listen") {
		r.value("listen", "there is no address to serve at: write one, as in - address: 127.0.0.1:8080, or remove the key for that default")
	}
	all := c.listeners()
	for i, l := range all {
		path := l.path
		if r.broken(path) {
			continue
		}
		if problem := checkListenAddress(l.Address); problem != "" {
			r.value(path+".address", "%s", problem)
			continue
		}
		checkFree(r, path+".address", l.Address, all[:i])
		switch {
		case l.TLS == TLSFiles && l.CertFile == "" && l.KeyFile == "":
			r.value(path+".tls", "tls: files needs cert_file and key_file: add them, or write tls: local-ca for certificates made here")
		case l.certificates() && l.CertFile == "" && l.KeyFile != "":
			r.key(path+".key_file", "there is a key_file without a cert_file: add the certificate that it belongs to")
		case l.certificates() && l.KeyFile == "" && l.CertFile != "":
			r.key(path+".cert_file", "there is a cert_file without a key_file: add the key that it belongs to")
		case !l.certificates() && l.CertFile != "":
			r.key(path+".cert_file", "a cert_file is used with tls: files only, and this is tls: %s: write tls: files, or remove it", l.TLS)
		case !l.certificates() && l.KeyFile != "":
			r.key(path+".key_file", "a key_file is used with tls: files only, and this is tls: %s: write tls: files, or remove it", l.TLS)
		}
		c.checkAuth(r, path, l.Listen)
	}
}

// listener is an address that is listened at, for nodes or for operators.
type listener struct {
	path string
	Listen
}

// certificates reports whether it may have a certificate of its own.
func (l listener) certificates() bool { return l.TLS == TLSFiles || l.TLS == TLSACME }

// listeners returns all of them.
func (c *Config) listeners() []listener {
	var all []listener
	for i, l := range c.Listen {
		all = append(all, listener{index("listen", i), l})
	}
	for i, l := range c.Admin.Listen {
		all = append(all, listener{index("admin.listen", i), l.Front()})
	}
	return all
}

// checkAuth checks how clients are to show who they are at one address.
func (c *Config) checkAuth(r *report, path string, l Listen) {
	if l.TLS == TLSNone && l.ClientCAFile != "" {
		r.key(path+".client_ca_file", "certificates of clients need TLS, and this is tls: none: write tls: files or tls: local-ca, or remove it")
	}
	if len(l.Auth) == 0 || r.broken(path+".auth") {
		return
	}
	if slices.Contains(l.Auth, AuthBasic) && c.Access.UsersFile == "" {
		r.value(path+".auth", "basic needs users: name a file as access.users_file, or leave it out")
	}
	if slices.Contains(l.Auth, AuthCertificate) && l.ClientCAFile == "" {
		r.value(path+".auth", "certificate needs to know whose certificates count: name a client_ca_file, or leave it out")
	}
}

// checkAccess checks who may have what.
func (c *Config) checkAccess(r *report) {
	seen := make(map[string]int)
	for i, rule := range c.Access.Rules {
		path := index("access.rules", i)
		if r.broken(path) {
			continue
		}
		prefix := strings.TrimSuffix(rule.Prefix, "/")
		if prefix != "" {
			if err := acproxy.CheckName(prefix); err != nil {
				r.value(path+".prefix", "%v", err)
			}
		}
		if earlier, twice := seen[prefix]; twice {
			r.value(path+".prefix", "access.rules[%d] is about this prefix already: put both into one", earlier)
		}
		seen[prefix] = i
		for right, names := range rule.Rights() {
			for j, name := range names {
				if name == "" || strings.ContainsAny(name, " :") {
					r.value(index(path+"."+right, j), "%q is no name: write that of a user, of a client with a token or of a certificate, known, or anyone", clip(name))
				}
			}
		}
	}
}

// checkCredentials checks what publishers want to see.
func (c *Config) checkCredentials(r *report) {
	type subject struct{ host, prefix string }
	seen := make(map[subject]int)
	for i, h := range c.Credentials.Hosts {
		path := index("credentials.hosts", i)
		if r.broken(path) {
			continue
		}
		if problem := checkHostPort(h.Host); problem != "" {
			r.value(path+".host", "%s", problem)
		}
		prefix := strings.TrimSuffix(h.Prefix, "/")
		if prefix != "" {
			if err := acproxy.CheckName(prefix); err != nil {
				r.value(path+".prefix", "%v", err)
			}
		}
		about := subject{strings.TrimSuffix(strings.ToLower(h.Host), ":443"), prefix}
		if earlier, twice := seen[about]; twice {
			r.value(path+".host", "credentials.hosts[%d] is about this host and prefix already: remove one", earlier)
		}
		seen[about] = i
		switch {
		case h.SecretFile == "" && h.SecretEnv == "":
			r.value(path+".host", "there is no secret: name a file as secret_file, or a variable of the environment as secret_env")
		case h.SecretFile != "" && h.SecretEnv != "":
			r.key(path+".secret_env", "there is a secret_file as well: remove one of them")
		}
		switch {
		case h.Type == CredentialsBearer && h.User != "":
			r.key(path+".user", "a token has no user: remove it, or write type: basic")
		case h.Type != CredentialsBearer && h.User == "":
			r.value(path+".host", "type: %s needs a user: write it, for aws the ID of the access key", h.Type)
		}
		if h.Type != CredentialsAWS && (h.Region != "" || h.Service != "") {
			r.value(path+".type", "region and service are for type: aws: remove them, or write that")
		}
	}
}

// checkListenAddress says what is wrong with an address to listen at, "" if nothing is.
func checkListenAddress(address string) string {
	if path, ok := listen.UnixPath(address); ok {
		return checkUnixPath(path)
	}
	if name, ok := listen.SystemdName(address); ok {
		return checkSystemdName(name)
	}
	if strings.Contains(address, "://") {
		return fmt.Sprintf("%q is a URL: write address and port alone, as in 127.0.0.1:8080, and TLS as the key tls", clip(address))
	}
	if _, err := netip.ParseAddr(address); err == nil {
		return fmt.Sprintf("%q has no port: write %s", address, net.JoinHostPort(address, "8080"))
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		if n, err := strconv.ParseUint(address, 10, 16); err == nil {
			return fmt.Sprintf("%q has no address: write 127.0.0.1:%d for this machine alone, or \":%d\" for every address", address, n, n)
		}
		return fmt.Sprintf("%q is not an address with a port: write it as in 127.0.0.1:8080 or [::1]:8080", clip(address))
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Sprintf("%q is not a port: write a number from 0 to 65535", clip(port))
	}
	if host == "" {
		return ""
	}
	if _, err := netip.ParseAddr(host); err != nil {
		if problem := checkHost(host); problem != "" {
			return problem
		}
	}
	return ""
}

// checkUnixPath says what is wrong with the path of a unix socket, "" if nothing is.
func checkUnixPath(path string) string {
	switch {
	case path == "":
		return `"unix:" lacks the path of the socket: write it right behind, as in unix:/run/acproxy/nodes.sock`
	case strings.HasPrefix(path, "//"):
		return fmt.Sprintf("%q is a URL: write the path right behind unix:, as in unix:/run/acproxy/nodes.sock", clip(listen.UnixAddress(path)))
	case strings.HasPrefix(path, "@"):
		return fmt.Sprintf("%q would be an abstract socket, which everybody on the machine can connect to: write the path of a file", clip(path))
	case strings.HasSuffix(path, "/"):
		return fmt.Sprintf("%q is a directory: write the path of the socket itself", clip(path))
	case len(path) > listen.MaxPath:
		return fmt.Sprintf("%s is %d bytes long, a socket's path may have %d: write a shorter one", clip(path), len(path), listen.MaxPath)
	}
	return badPath(path)
}

// checkSystemdName says what is wrong with the name of a socket of systemd, "" if nothing is (systemd.socket(5), FileDescriptorName=).
func checkSystemdName(name string) string {
	switch {
	case name == "":
		return `"systemd:" lacks the name of a socket: write what FileDescriptorName= in its unit says, as in systemd:http`
	case len(name) > 255 || strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c >= 0x7f || c == ':' }):
		return fmt.Sprintf("%q can't be the name of a socket: write up to 255 letters, digits and signs without spaces and colons, as FileDescriptorName= has it", clip(name))
	}
	return ""
}

// checkFree checks that an address isn't that of any of some listeners.
func checkFree(r *report, path, address string, others []listener) {
	for _, other := range others {
		if checkListenAddress(other.Address) != "" || !overlap(address, other.Address) {
			continue
		}
		another := "port"
		if _, ok := listen.UnixPath(address); ok {
			another = "path"
		} else if _, ok := listen.SystemdName(address); ok {
			another = "socket"
		}
		r.value(path, "%s is taken by %s (%s) already: give another %s, or remove one", address, other.path, other.Address, another)
		return
	}
}

// overlap reports whether two addresses can't both be listened at.
func overlap(a, b string) bool {
	pathA, unixA := listen.UnixPath(a)
	pathB, unixB := listen.UnixPath(b)
	_, systemdA := listen.SystemdName(a)
	_, systemdB := listen.SystemdName(b)
	if unixA || unixB || systemdA || systemdB {
		return a == b || unixA && unixB && filepath.Clean(pathA) == filepath.Clean(pathB)
	}
	hostA, portA, _ := net.SplitHostPort(a)
	hostB, portB, _ := net.SplitHostPort(b)
	numberA, _ := strconv.ParseUint(portA, 10, 16)
	numberB, _ := strconv.ParseUint(portB, 10, 16)
	if numberA != numberB || numberA == 0 {
		return false
	}
	every := func(host string) bool {
		addr, err := netip.ParseAddr(host)
		return host == "" || err == nil && addr.IsUnspecified()
	}
	return every(hostA) || every(hostB) || strings.EqualFold(hostA, hostB)
}

// checkFrontDoors checks what goes with listening: the public URL and the proxy.
func (c *Config) checkFrontDoors(r *report) {
	if c.PublicURL != "" && !r.broken("public_url") {
		if problem := checkPublicURL(c.PublicURL); problem != "" {
			r.value("public_url", "%s", problem)
		}
	}
	for i, pattern := range c.Proxy.Hosts {
		path := index("proxy.hosts", i)
		if r.broken(path) {
			continue
		}
		if problem := checkHost(strings.TrimPrefix(pattern, "*.")); problem != "" {
			r.value(path, "%s", problem)
		}
	}
	if r.broken("listen") || r.broken("proxy") || slices.ContainsFunc(c.Listen, func(l Listen) bool { return l.Proxy }) {
		return
	}
	const noDoor = "no address lets nodes in as a proxy, so this does nothing: write proxy: true at one of listen, or remove this"
	if c.Proxy.Tunnel {
		r.key("proxy.tunnel", noDoor)
	}
	if len(c.Proxy.Hosts) > 0 {
		r.key("proxy.hosts", noDoor)
	}
}

// checkCollector says what is wrong with the URL of a collector, "" if nothing is.
func checkCollector(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		if checkHostPort(text) == "" {
			return fmt.Sprintf("%q has no scheme: write http://%s", text, text)
		}
		return "this is not the URL of a collector: write it as in http://127.0.0.1:4318"
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "a collector's URL has neither user nor query: secrets go into OTEL_EXPORTER_OTLP_HEADERS in the environment"
	}
	return checkHostPort(u.Host)
}

// onThisMachine reports whether the host of a URL is this machine, without asking anybody.
func onThisMachine(text string) bool {
	u, err := url.Parse(text)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return err == nil && ip.Unmap().IsLoopback() || u.Hostname() == "localhost"
}

func checkPublicURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		if checkHostPort(text) == "" {
			return fmt.Sprintf("%q has no scheme: write https://%s, or http://%s for the fast path", text, text, text)
		}
		return fmt.Sprintf("%q is not a URL of a web server: write scheme and host, as in https://images.example.com", clip(text))
	}
	if problem := checkHostPort(u.Host); problem != "" {
		return problem
	}
	if bare := u.Scheme + "://" + u.Host; bare != text {
		return fmt.Sprintf("%q has more than scheme and host: write %s", clip(text), bare)
	}
	return ""
}

func (c *Config) checkClients(r *report) {
	defaults := Default().Clients
	positive(r, "clients.header_timeout", c.Clients.HeaderTimeout, defaults.HeaderTimeout)
	positive(r, "clients.idle_timeout", c.Clients.IdleTimeout, defaults.IdleTimeout)
	positive(r, "clients.stall_timeout", c.Clients.StallTimeout, defaults.StallTimeout)
	atMost(r, "clients.rate", c.Clients.Rate, 1_000_000)
	atMost(r, "clients.burst", c.Clients.Burst, 1_000_000)
	atMost(r, "clients.max_connections", c.Clients.MaxConnections, 1_000_000)
	atMost(r, "clients.max_connections_per_client", c.Clients.MaxConnectionsPerClient, 1_000_000)
	if c.Clients.Burst > 0 && c.Clients.Rate == 0 && !r.broken("clients") {
		r.key("clients.burst", "without a rate there is no limit to go beyond: write a rate, or remove it")
	}
}

func (c *Config) checkDial(r *report) {
	for _, name := range sortedKeys(c.Dial.Hosts) {
		path := join("dial.hosts", name)
		if r.broken(path) {
			continue
		}
		if problem := checkHostPort(name); problem != "" {
			r.key(path, "%s", problem)
			continue
		}
		if problem := checkHostPort(c.Dial.Hosts[name]); problem != "" {
			r.value(path, "%s", problem)
		}
	}
	if text := c.Dial.Resolver; text != "" && !r.broken("dial.resolver") {
		_, errAddr := netip.ParseAddr(text)
		_, errPort := netip.ParseAddrPort(text)
		if errAddr != nil && errPort != nil {
			r.value("dial.resolver", "%q is not an IP address: write that of a DNS server, as in 10.0.0.53 or 10.0.0.53:53", clip(text))
		}
	}
	positive(r, "dial.connect_timeout", c.Dial.ConnectTimeout, Default().Dial.ConnectTimeout)
	positive(r, "dial.timeout", c.Dial.Timeout, Default().Dial.Timeout)
	positive(r, "dial.stall_timeout", c.Dial.StallTimeout, Default().Dial.StallTimeout)
	atMost(r, "dial.max_redirects", c.Dial.MaxRedirects, 100)
	if strings.ContainsFunc(c.Dial.UserAgent, func(c rune) bool { return c < ' ' || c > '~' }) {
		r.value("dial.user_agent", "%q can't go into a header: write it in one line of ASCII", clip(c.Dial.UserAgent))
	}
	c.checkLimits(r)
}

// checkLimits checks how publishers are spared.
func (c *Config) checkLimits(r *report) {
	d, defaults := c.Dial, Default().Dial
	if d.MaxConnections == 1 && !r.broken("dial.max_connections") {
		r.value("dial.max_connections", "with 1, the signature of an image would wait for the end of another image: write 2 or more, or 0 for no limit")
	}
	for _, number := range []struct {
		path string
		got  int
	}{{"dial.max_connections", d.MaxConnections}, {"dial.rate", d.Rate}, {"dial.breaker.failures", d.Breaker.Failures}} {
		if number.got < 0 && !r.broken(number.path) {
			r.value(number.path, "%d is negative: write a number, or 0 for none", number.got)
		}
	}
	positive(r, "dial.burst", d.Burst, defaults.Burst)
	notNegative(r, "dial.max_retry_after", d.MaxRetryAfter)
	positive(r, "dial.breaker.open", d.Breaker.Open, defaults.Breaker.Open)
	positive(r, "dial.breaker.max_open", d.Breaker.MaxOpen, defaults.Breaker.MaxOpen)
	if d.Breaker.MaxOpen < d.Breaker.Open && d.Breaker.MaxOpen > 0 && !r.broken("dial.breaker") {
		path := "dial.breaker.max_open"
		if _, given := r.keys[path]; !given {
			path = "dial.breaker.open"
		}
		r.value(path, "open (%v) is more than max_open (%v): raise the one or lower the other", d.Breaker.Open, d.Breaker.MaxOpen)
	}
}

func (c *Config) checkDiscovery(r *report) {
	notNegative(r, "discovery.positive_ttl", c.Discovery.PositiveTTL)
	notNegative(r, "discovery.negative_ttl", c.Discovery.NegativeTTL)
	positive(r, "discovery.max_pages", c.Discovery.MaxPages, Default().Discovery.MaxPages)
	// Pages are held in memory while they are read.
	between(r, "discovery.max_page_size", c.Discovery.MaxPageSize, 1, 64*MiB)
	positive(r, "discovery.max_requests", c.Discovery.MaxRequests, Default().Discovery.MaxRequests)
	atMost(r, "discovery.max_queue", c.Discovery.MaxQueue, 1_000_000)
}

func (c *Config) checkTrust(r *report) {
	positive(r, "trust.threshold", c.Trust.Threshold, Default().Trust.Threshold)
	if c.Trust.Threshold > 1 && c.Trust.Signature == SignatureOptional && !r.broken("trust") {
		r.value("trust.threshold", "it asks for %d signatures while signature: optional asks for none: write signature: required, or remove the threshold", c.Trust.Threshold)
	}
}

func (c *Config) checkFetch(r *report) {
	f, defaults := c.Fetch, Default().Fetch
	positive(r, "fetch.hold_back", f.HoldBack, defaults.HoldBack)
	positive(r, "fetch.max_image_size", f.MaxImageSize, defaults.MaxImageSize)
	// What is longer, package trust does not read: it would cost the OpenPGP libraries many times its size in memory.
	between(r, "fetch.max_signature_size", f.MaxSignatureSize, 1, 1*MiB)
	notNegative(r, "fetch.signature_wait", f.SignatureWait)
	atMost(r, "fetch.retries", f.Retries, 10_000)
	positive(r, "fetch.retry_for", f.RetryFor, defaults.RetryFor)
	positive(r, "fetch.retry_wait", f.RetryWait, defaults.RetryWait)
	positive(r, "fetch.max_flights", f.MaxFlights, defaults.MaxFlights)
	atMost(r, "fetch.max_queue", f.MaxQueue, 1_000_000)
	positive(r, "fetch.queue_wait", f.QueueWait, defaults.QueueWait)
	positive(r, "fetch.limits.max_uncompressed", f.Limits.MaxUncompressed, defaults.Limits.MaxUncompressed)
	positive(r, "fetch.limits.max_ratio", f.Limits.MaxRatio, defaults.Limits.MaxRatio)
	positive(r, "audit.max_size", c.Audit.MaxSize, Default().Audit.MaxSize)
	positive(r, "audit.max_files", c.Audit.MaxFiles, Default().Audit.MaxFiles)
	positive(r, "fetch.limits.max_entries", f.Limits.MaxEntries, defaults.Limits.MaxEntries)
	between(r, "fetch.limits.max_manifest", f.Limits.MaxManifest, 1, 64*MiB)
	if r.broken("fetch") {
		return
	}
	if f.HoldBack >= f.MaxImageSize {
		r.value("fetch.hold_back", "%v is no less than max_image_size (%v), so nothing would be delivered before the end: write delivery: verify-first for that, or less", f.HoldBack, f.MaxImageSize)
	}
	if f.Limits.MaxUncompressed < f.MaxImageSize {
		path := "fetch.limits.max_uncompressed"
		if _, given := r.keys[path]; !given {
			path = "fetch.max_image_size"
		}
		r.value(path, "limits.max_uncompressed (%v) is less than max_image_size (%v), which no image could then reach: raise the one or lower the other", f.Limits.MaxUncompressed, f.MaxImageSize)
	}
}

func (c *Config) checkFreshness(r *report) {
	notNegative(r, "freshness.ttl", c.Freshness.TTL)
	atMost(r, "freshness.jitter", c.Freshness.Jitter, 100)
	notNegative(r, "freshness.max_stale", c.Freshness.MaxStale)
	notNegative(r, "freshness.max_age", c.Freshness.MaxAge)
}

// checkWarm checks the lists of images that are fetched before anybody asks.
func (c *Config) checkWarm(r *report) {
	defaults := Default().Warm
	positive(r, "warm.concurrency", c.Warm.Concurrency, defaults.Concurrency)
	positive(r, "warm.max_images", c.Warm.MaxImages, defaults.MaxImages)
	positive(r, "warm.max_depth", c.Warm.MaxDepth, defaults.MaxDepth)
	positive(r, "warm.keep_jobs", c.Warm.KeepJobs, defaults.KeepJobs)
	if len(c.Warm.Platforms) == 0 && !r.broken("warm.platforms") {
		r.value("warm.platforms", "there is no platform: write those of the nodes, as in [linux/amd64], or [none] to ask for nothing but what lists say")
	}
	for i, platform := range c.Warm.Platforms {
		os, arch, ok := strings.Cut(platform, "/")
		if platform != "none" && (!ok || os == "" || arch == "" || strings.Contains(arch, "/")) {
			r.value(index("warm.platforms", i), "%q is no platform: write os/arch in appc's words, as in linux/amd64 or linux/aarch64, or none", clip(platform))
		}
	}
	for i, l := range c.Warm.Lists {
		path := index("warm.lists", i)
		if r.broken(path) {
			continue
		}
		if l.Schedule != "" {
			if _, err := cron.ParseStandard(l.Schedule); err != nil {
				r.value(path+".schedule", "%q is no schedule (%v): write minute, hour, day of the month, month and day of the week, as in \"30 3 * * *\"", clip(l.Schedule), err)
			}
		}
		notNegative(r, path+".jitter", l.Jitter)
	}
}

// checkOCI checks how images are had as OCI images.
func (c *Config) checkOCI(r *report) {
	positive(r, "oci.wait", c.OCI.Wait, Default().OCI.Wait)
	notNegative(r, "oci.keep", c.OCI.Keep)
	if c.OCI.Parallel < 0 && !r.broken("oci.parallel") {
		r.value("oci.parallel", "%d is no number of images: write how many are read at once, or 0 for half as many as there are processors", c.OCI.Parallel)
	}
	if len(c.OCI.Platforms) == 0 && !r.broken("oci.platforms") {
		r.value("oci.platforms", "there is no platform: write those of the nodes, as in [linux/amd64]")
	}
	for i, platform := range c.OCI.Platforms {
		os, arch, _ := strings.Cut(platform, "/")
		if !slices.Contains(types.ValidOSArch[os], arch) {
			r.value(index("oci.platforms", i), "%q is no platform: write os/arch in appc's words, as in linux/amd64 or linux/aarch64", clip(platform))
		}
	}
}

func (c *Config) checkCache(r *report) {
	k, defaults := c.Cache, Default()
	positive(r, "cache.access_flush", k.AccessFlush, defaults.Cache.AccessFlush)
	notNegative(r, "cache.keep_partials", k.KeepPartials)
	if k.MaxSize != 0 && k.MaxSize < leastCache && !r.broken("cache.max_size") {
		r.value("cache.max_size", "%v is too little to hold anything: write at least %v, or 0 for no limit", k.MaxSize, leastCache)
	}
	if k.MinFree < 0 && !r.broken("cache.min_free") {
		r.value("cache.min_free", "%v is negative: write a size, or 0 to let the file system be filled", k.MinFree)
	}
	percent(r, "cache.high", k.High)
	percent(r, "cache.low", k.Low)
	notNegative(r, "cache.grace", k.Grace)
	if k.Low > k.High && !r.broken("cache.low") && !r.broken("cache.high") {
		at := "cache.low"
		if _, given := r.keys[at]; !given {
			at = "cache.high"
		}
		r.value(at, "low (%d) is above high (%d), so that nothing would be evicted: lower the one or raise the other", k.Low, k.High)
	}
	notNegative(r, "scrub.every", c.Scrub.Every)
	positive(r, "scrub.rate", c.Scrub.Rate, defaults.Scrub.Rate)
}

// leastCache is the least that a store may be limited to: what it needs for itself, and something to keep.
const leastCache = 16 * MiB

func (c *Config) checkPublishers(r *report) {
	seen := make(map[string]int)
	for i, p := range c.Publishers {
		path := index("publishers", i)
		if r.broken(path) {
			continue
		}
		checkPrefix(r, path+".prefix", p.Prefix)
		if first, twice := seen[p.Prefix]; twice {
			r.value(path+".prefix", "%s is the prefix of publishers[%d] already: put the keys of both under one", p.Prefix, first)
		} else {
			seen[p.Prefix] = i
		}
		p.checkLocal(r, path)
		p.checkSource(r, path)
		p.checkReach(r, path)
		p.checkPolicy(r, path, c)
	}
}

// checkLocal checks that nothing is said of how to reach a publisher that is this acproxy.
func (p *Publisher) checkLocal(r *report, path string) {
	if p.Publisher != PublisherLocal {
		return
	}
	for _, k := range []struct {
		key   string
		given bool
	}{
		{"templates", len(p.Templates) > 0}, {"discovery_host", p.DiscoveryHost != ""}, {"simple_discovery", p.SimpleDiscovery}, {"http", p.HTTP},
		{"ca_file", p.CAFile != ""}, {"proxy", p.Proxy != ""},
	} {
		if k.given {
			r.key(path+"."+k.key, "with publisher: local nobody is asked for these images: remove this, or write publisher: web")
		}
	}
}

// checkSource checks where a publisher's images are found.
func (p *Publisher) checkSource(r *report, path string) {
	for j, template := range p.Templates {
		if problem := checkTemplate(template, p.HTTP); problem != "" {
			r.value(index(path+".templates", j), "%s", problem)
		}
	}
	if len(p.Templates) > 0 && p.DiscoveryHost != "" {
		r.key(path+".discovery_host", "templates are given, so nobody is asked for discovery: remove this or the templates")
	}
	if len(p.Templates) > 0 && p.SimpleDiscovery {
		r.key(path+".simple_discovery", "templates are given, so nothing else is tried: remove this, and add the template %q if it is wanted",
			"https://{name}-{version}-{os}-{arch}.{ext}")
	}
	if p.Listing != "" {
		if problem := checkListing(p.Listing, p.HTTP); problem != "" {
			r.value(path+".listing", "%s", problem)
		}
	}
	if p.DiscoveryHost != "" {
		if problem := checkHostPort(p.DiscoveryHost); problem != "" {
			r.value(path+".discovery_host", "%s", problem)
		}
	}
}

// checkReach checks how a publisher is reached.
func (p *Publisher) checkReach(r *report, path string) {
	if p.Timeout != nil {
		positive(r, path+".timeout", *p.Timeout, Default().Dial.Timeout)
	}
	if p.Proxy != "" {
		if problem := checkProxyURL(p.Proxy); problem != "" {
			r.value(path+".proxy", "%s", problem)
		}
	}
}

// checkPolicy checks what is asked of a publisher's images, together with what is asked of everybody's.
func (p *Publisher) checkPolicy(r *report, path string, c *Config) {
	if p.TTL != nil {
		notNegative(r, path+".ttl", *p.TTL)
	}
	if p.MaxStale != nil {
		notNegative(r, path+".max_stale", *p.MaxStale)
	}
	if p.Threshold != nil {
		positive(r, path+".threshold", *p.Threshold, 1)
	}
	if p.Offline != nil && !*p.Offline && c.Offline {
		r.value(path+".offline", "acproxy as a whole is offline: remove this, or write offline: false there and true at every other publisher")
	}
	if r.broken("trust") || p.Threshold == nil && p.Signature == "" {
		return
	}
	if all := c.Inherit(*p); *all.Threshold > 1 && all.Signature == SignatureOptional {
		at := path + ".signature"
		if p.Threshold != nil {
			at = path + ".threshold"
		}
		r.value(at, "%d signatures are asked for here (threshold) while signature: optional asks for none: write signature: required or threshold: 1", *all.Threshold)
	}
}

// checkTemplate says what is wrong with a template of image URLs, "" if nothing is.
func checkTemplate(template string, plain bool) string {
	scheme, rest, ok := strings.Cut(template, "://")
	switch {
	case !ok || scheme != "https" && scheme != "http" || rest == "" || rest[0] == '/':
		return fmt.Sprintf("%q is not a template of a URL: write one as in https://example.com/{name}-{version}-{os}-{arch}.{ext}", clip(template))
	case scheme == "http" && !plain:
		return fmt.Sprintf("%q is plain http, which is refused unless this publisher has http: true: add that, or write https", clip(template))
	case !strings.Contains(template, "{ext}"):
		return fmt.Sprintf("%q lacks {ext}, which becomes aci for the image and aci.asc for its signature: put it at the end", clip(template))
	case strings.ContainsFunc(template, func(c rune) bool { return c <= ' ' || c == 0x7f }):
		return fmt.Sprintf("%q has a space in it: a template is one URL", clip(template))
	}
	for rest != "" {
		open := strings.IndexAny(rest, "{}")
		if open < 0 {
			break
		}
		end := strings.IndexAny(rest[open+1:], "{}")
		if rest[open] == '}' || end < 0 || rest[open+1+end] == '{' {
			return fmt.Sprintf("%q has a brace without its other half: variables are written as {name}", clip(template))
		}
		if variable := rest[open+1 : open+1+end]; acproxy.CheckName(variable) != nil {
			return fmt.Sprintf("%q has the variable {%s}, which is not the name of a label: write {name}, {version}, {os}, {arch}, {ext} or another label", clip(template), clip(variable))
		}
		rest = rest[open+end+2:]
	}
	return ""
}

// checkListing says what is wrong with the URL of a listing of versions, "" if nothing is.
func checkListing(listing string, plain bool) string {
	u, err := url.Parse(strings.ReplaceAll(listing, "{name}", "name"))
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.ContainsAny(u.String(), " {}"):
		return fmt.Sprintf("%q is not the URL of a listing: write one as in https://example.com/v2/{name}/tags/list; {name} is all that is replaced", clip(listing))
	case u.Scheme == "http" && !plain:
		return fmt.Sprintf("%q is plain http, which is refused unless this publisher has http: true: add that, or write https", clip(listing))
	}
	return ""
}

func checkProxyURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" {
		if checkHostPort(text) == "" {
			return fmt.Sprintf("%q has no scheme: write http://%s", text, text)
		}
		// The parser's own words would repeat the password that may be in it.
		return "this is not the URL of a proxy: write it as in http://proxy.example.com:3128"
	}
	if !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) {
		return fmt.Sprintf("a proxy can't be spoken to by %s: write http://, https:// or socks5://", clip(u.Scheme))
	}
	if u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Sprintf("a proxy has no path: write %s://%s", u.Scheme, u.Host)
	}
	return checkHostPort(u.Host)
}

func checkPrefix(r *report, path, prefix string) {
	if r.broken(path) {
		return
	}
	if short := strings.TrimRight(prefix, "/"); short != prefix && acproxy.CheckName(short) == nil {
		r.value(path, "%q ends in a slash: write %s, which covers everything below it too", clip(prefix), short)
		return
	}
	if _, rest, ok := strings.Cut(prefix, "://"); ok && acproxy.CheckName(rest) == nil {
		r.value(path, "%q is a URL: write the image name alone, %s", clip(prefix), rest)
		return
	}
	if bare := strings.TrimSuffix(strings.TrimSuffix(prefix, "*"), "/"); bare != prefix && acproxy.CheckName(bare) == nil {
		r.value(path, "%q has a wildcard: write %s, which covers everything below it too", clip(prefix), bare)
		return
	}
	if err := acproxy.CheckName(prefix); err != nil {
		r.value(path, "%v", err)
	}
}

// checkHostPort says what is wrong with a host with or without a port, "" if nothing is.
func checkHostPort(text string) string {
	host := text
	if h, port, err := net.SplitHostPort(text); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Sprintf("%q is not a port: write a number from 1 to 65535", clip(port))
		}
		host = h
	}
	if _, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")); err == nil {
		return ""
	}
	return checkHost(host)
}

// checkHost says what is wrong with the name of a host, "" if nothing is (RFC 1123, section 2.1).
func checkHost(host string) string {
	ok := len(host) <= 253
	for label := range strings.SplitSeq(host, ".") {
		ok = ok && label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' &&
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	switch lower := strings.ToLower(host); {
	case ok:
		return ""
	case host == "":
		return "a host is missing: write one, as in example.com"
	case lower != host && checkHost(lower) == "":
		return fmt.Sprintf("%q has capitals: write %s", clip(host), lower)
	case strings.Contains(host, "://"):
		return fmt.Sprintf("%q is a URL: write the host alone, as in example.com", clip(host))
	}
	return fmt.Sprintf("%q is not a host: write one as in example.com", clip(host))
}

// parsePrefix reads a network, or one address as the network that has no other.
func parsePrefix(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not a network: write an address and the length of its prefix, as in 10.0.0.0/8 or fd00::/8, or one address", clip(text))
	}
	if masked := prefix.Masked(); masked != prefix {
		return netip.Prefix{}, fmt.Errorf("%s has bits set behind its prefix: write %s for the network, or %s for the one address", text, masked, prefix.Addr())
	}
	return prefix, nil
}

// between notes a size that is out of bounds.
func between(r *report, path string, got, least, most Size) {
	if (got < least || got > most) && !r.broken(path) {
		r.value(path, "%v is out of range: write a size from %v to %v", got, least, most)
	}
}

// percent notes a number that is none of per cent.
func percent(r *report, path string, got int) {
	if (got < 1 || got > 100) && !r.broken(path) {
		r.value(path, "%d is out of range: write a number from 1 to 100", got)
	}
}

// positive notes a value that is not above zero.
func positive[T int | Size | Duration](r *report, path string, got, example T) {
	if got <= 0 && !r.broken(path) {
		r.value(path, "%v is too little: write more, such as %v", got, example)
	}
}

// atMost notes a number that is not from 0 to most.
func atMost(r *report, path string, got, most int) {
	if (got < 0 || got > most) && !r.broken(path) {
		r.value(path, "%d is out of range: write a number from 0 to %d", got, most)
	}
}

// notNegative notes a time that is below zero, which only a Config made by hand can have.
func notNegative(r *report, path string, got Duration) {
	if got < 0 && !r.broken(path) {
		r.value(path, "%v is negative: write a time to come, or 0s for none", got)
	}
}

func index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// A pathValue is a path of the file system in a configuration, and its key.
type pathValue struct {
	key  string
	path *string
}

// paths returns all paths of the file system in a configuration.
func (c *Config) paths() []pathValue {
	all := []pathValue{
		{"data_dir", &c.DataDir},
		{"admin.socket", &c.Admin.Socket},
		{"ca.dir", &c.CA.Dir},
		{"acme.ca_file", &c.ACME.CAFile},
		{"acme.eab_key_file", &c.ACME.EABKeyFile},
		{"acme.dir", &c.ACME.Dir},
		{"trust.system_dir", &c.Trust.SystemDir},
		{"trust.local_dir", &c.Trust.LocalDir},
		{"access.users_file", &c.Access.UsersFile},
		{"access.tokens_file", &c.Access.TokensFile},
	}
	for i := range c.Listen {
		at, l := index("listen", i), &c.Listen[i]
		all = append(all, pathValue{at + ".cert_file", &l.CertFile}, pathValue{at + ".key_file", &l.KeyFile}, pathValue{at + ".client_ca_file", &l.ClientCAFile})
	}
	for i := range c.Admin.Listen {
		at, l := index("admin.listen", i), &c.Admin.Listen[i]
		all = append(all, pathValue{at + ".cert_file", &l.CertFile}, pathValue{at + ".key_file", &l.KeyFile}, pathValue{at + ".client_ca_file", &l.ClientCAFile})
	}
	for i := range c.Credentials.RktDirs {
		all = append(all, pathValue{index("credentials.rkt_dirs", i), &c.Credentials.RktDirs[i]})
	}
	for i := range c.Credentials.Hosts {
		all = append(all, pathValue{index("credentials.hosts", i) + ".secret_file", &c.Credentials.Hosts[i].SecretFile})
	}
	for i := range c.Warm.Lists {
		all = append(all, pathValue{index("warm.lists", i) + ".file", &c.Warm.Lists[i].File})
	}
	for i := range c.Publishers {
		all = append(all, pathValue{index("publishers", i) + ".ca_file", &c.Publishers[i].CAFile})
	}
	return all
}

// checkPaths notes paths that would not be what they look like.
func (c *Config) checkPaths(r *report) {
	for _, p := range c.paths() {
		if problem := badPath(*p.path); problem != "" {
			r.value(p.key, "%s", problem)
		}
	}
	if c.Trust.SystemDir != "" && filepath.Clean(c.Trust.SystemDir) == filepath.Clean(c.Trust.LocalDir) && !r.broken("trust") {
		r.value("trust.local_dir", "it is the same as system_dir: keys that are added or masked here need a directory of their own")
	}
}

// badPath says why a path would not be what it looks like, "" if it is.
func badPath(path string) string {
	switch {
	case path == "~" || strings.HasPrefix(path, "~/"):
		return "the ~ is not replaced by a home directory here: write the whole path"
	case strings.HasPrefix(path, "$"):
		return "variables are not replaced here: write the whole path"
	case strings.ContainsFunc(path, func(c rune) bool { return c < ' ' || c == 0x7f }):
		return fmt.Sprintf("%q is not the name of a file: it has a line break or another control character", clip(path))
	}
	return ""
}

// resolve makes relative paths absolute, from dir.
func (c *Config) resolve(dir string) {
	addresses := []*string{&c.Admin.Metrics}
	for i := range c.Listen {
		addresses = append(addresses, &c.Listen[i].Address)
	}
	for i := range c.Admin.Listen {
		addresses = append(addresses, &c.Admin.Listen[i].Address)
	}
	for _, address := range addresses {
		if path, ok := listen.UnixPath(*address); ok && !filepath.IsAbs(path) {
			*address = listen.UnixAddress(filepath.Join(dir, path))
		}
	}
	for _, p := range c.paths() {
		if *p.path != "" && !filepath.IsAbs(*p.path) {
			*p.path = filepath.Join(dir, *p.path)
		}
	}
}

// checkFiles notes files that are named but can't be used. Nothing of them is kept: whoever uses them reads them again, when they may have
// been renewed.
func (c *Config) checkFiles(r *report) {
	if n := len(c.Admin.Socket); n > listen.MaxPath {
		r.value("admin.socket", "%s is %d bytes long, a socket's path may have %d: write a shorter one", clip(c.Admin.Socket), n, listen.MaxPath)
	}
	for _, l := range c.listeners() {
		// It was relative, or it would have been told before.
		if path, ok := listen.UnixPath(l.Address); ok && len(path) > listen.MaxPath && !r.broken(l.path) {
			r.value(l.path+".address", "%s", checkUnixPath(path))
		}
	}
	for _, l := range c.listeners() {
		if !l.certificates() || l.CertFile == "" || l.KeyFile == "" || r.broken(l.path) {
			continue
		}
		cert, errCert := readPEM(l.CertFile)
		if errCert != nil {
			r.value(l.path+".cert_file", "%v", errCert)
		}
		key, errKey := readPEM(l.KeyFile)
		if errKey != nil {
			r.value(l.path+".key_file", "%v", errKey)
		}
		if errCert != nil || errKey != nil {
			continue
		}
		if _, err := tls.X509KeyPair(cert, key); err != nil {
			r.value(l.path+".key_file", "it does not go with %s: %s; give the key and the certificate, both in PEM", l.CertFile, strings.TrimPrefix(err.Error(), "tls: "))
		}
	}
	for _, l := range c.listeners() {
		checkCAFile(r, l.path+".client_ca_file", l.ClientCAFile)
	}
	c.checkACMEFiles(r)
	for i, p := range c.Publishers {
		checkCAFile(r, index("publishers", i)+".ca_file", p.CAFile)
	}
}

// checkCAFile notes a file of certificates that has none.
func checkCAFile(r *report, path, file string) {
	if file == "" || r.broken(path) {
		return
	}
	text, err := readPEM(file)
	switch {
	case err != nil:
		r.value(path, "%v", err)
	case !x509.NewCertPool().AppendCertsFromPEM(text):
		r.value(path, "%s holds no certificate in PEM: give a file with -----BEGIN CERTIFICATE----- in it", file)
	}
}

// readPEM reads a small file. Its errors say what to do.
func readPEM(path string) ([]byte, error) {
	// A pipe would hang right here, before there is anybody to tell.
	switch st, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("there is no file %s: put it there, or correct the path", path)
	case err != nil:
		return nil, fmt.Errorf("the file can't be read: %w", err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file: give the path of one", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the file can't be read: %w", err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile))
}
