// Package config reads acproxy's configuration.
package config

import (
	"net/netip"
	"time"

	"github.com/acproxy/acproxy"
)

//go:generate go test -run TestDocuments -update

// Values of [Listen.TLS].
const (
	TLSNone    = "none"
	TLSLocalCA = "local-ca"
	TLSFiles   = "files"
	TLSACME    = "acme"
)

// Values of [ACME.Challenges].
const (
	ChallengeTLSALPN01 = "tls-alpn-01"
	ChallengeHTTP01    = "http-01"
)

// Values of [HostCredentials.Type].
const (
	CredentialsBasic  = "basic"
	CredentialsBearer = "bearer"
	CredentialsAWS    = "aws"
)

// Values of [Listen.Auth].
const (
	AuthAnonymous   = "anonymous"
	AuthBasic       = "basic"
	AuthBearer      = "bearer"
	AuthCertificate = "certificate"
)

// Values of [Fetch.Delivery].
const (
	DeliveryCutThrough  = "cut-through"
	DeliveryVerifyFirst = "verify-first"
)

// Values of [Trust.Signature].
const (
	SignatureRequired = "required"
	SignatureOptional = "optional"
)

// Values of [Trust.Expired].
const (
	ExpiredRefuse               = "refuse"
	ExpiredAcceptIfSignedBefore = "accept-if-signed-before"
)

// Values of [Trust.Publish].
const (
	PublishRktReadable = "rkt-readable"
	PublishAll         = "all"
)

// Values of [Freshness.OnChange].
const (
	OnChangeRefuse = "refuse"
	OnChangeFollow = "follow"
)

// Values of [Cache.OnFull].
const (
	OnFullRefuse = "refuse"
	OnFullStream = "stream"
)

// Values of [Publisher.Publisher].
const (
	PublisherWeb   = "web"
	PublisherLocal = "local"
)

// Values of [Log.Format].
const (
	LogText = "text"
	LogJSON = "json"
)

// A Config is everything that can be configured. What [Default] and [Load] return has passed [Config.Validate].
//
// The comments of the fields, here and below, are the words of config.example.yaml and docs/configuration.md: both are made from them, by
// go generate, and a test fails when they differ.
type Config struct {
	// Directory for everything acproxy keeps. Empty: /var/lib/acproxy for root, else $XDG_DATA_HOME/acproxy or ~/.local/share/acproxy.
	DataDir string `yaml:"data_dir"`

	// Addresses that acproxy serves nodes at. The list replaces the default as a whole.
	Listen []Listen `yaml:"listen"`

	// Where the tags of discovery pages point, as scheme and host: https://images.example.com:8443. Empty: the scheme and host that the
	// node itself used. Plain http here while nodes discover over TLS is the fast path: the small pages need TLS, the large bytes do not,
	// as nodes check their signatures.
	PublicURL string `yaml:"public_url"`

	// Who may have what. Without rules, whoever reaches an address above may have every image.
	Access Access `yaml:"access"`

	// The socket that acproxy's own commands use to speak to the server.
	Admin Admin `yaml:"admin"`

	// Serve only what is held here already, and dial nobody. Images without a version are then served however old they are.
	Offline bool `yaml:"offline"`

	// Prefixes of the image names that may be asked for at all, by whole segments: example.com/app covers example.com/app/web, but not
	// example.com/apple. Empty: any name.
	Allow []string `yaml:"allow"`

	// The local certificate authority, made by: acproxy ca init.
	CA CA `yaml:"ca"`

	// Certificates for this server's own names from an ACME server, such as Let's Encrypt or one of your own, for addresses with tls: acme. They are renewed in
	// time. With offline nobody is asked for any.
	ACME ACME `yaml:"acme"`

	// The proxy front door: what nodes reach by HTTP_PROXY and HTTPS_PROXY.
	Proxy Proxy `yaml:"proxy"`

	// How long nodes, and whoever else connects, may keep a connection busy without doing anything with it.
	Clients Clients `yaml:"clients"`

	// How publishers are reached.
	Dial Dial `yaml:"dial"`

	// What publishers want to see before they give something away. It is shown to the very host that it is for, over https, and to nobody else.
	Credentials Credentials `yaml:"credentials"`

	// Answers of publishers about where their images are (appc meta-discovery).
	Discovery Discovery `yaml:"discovery"`

	// Whose signatures count.
	Trust Trust `yaml:"trust"`

	// How images are brought here.
	Fetch Fetch `yaml:"fetch"`

	// When an image that is held here is asked for again at its publisher. An image asked for with a version never is.
	Freshness Freshness `yaml:"freshness"`

	// How images are received that are published here, under prefixes with publisher: local.
	Push Push `yaml:"push"`

	// How containerd, CRI-O and podman have the images as OCI images, at the same addresses.
	OCI OCI `yaml:"oci"`

	// How much is kept, and what goes when there is too little space.
	Cache Cache `yaml:"cache"`

	// How what is kept is read again, to find what the disk has lost.
	Scrub Scrub `yaml:"scrub"`

	// Lists of images that are fetched before anybody asks for them.
	Warm Warm `yaml:"warm"`

	// What acproxy tells about its work, on standard error.
	Log Log `yaml:"log"`

	// Where traces go, for OpenTelemetry. Which trace a request belongs to stands in the log's lines with or without them, if it says so (traceparent).
	Traces Traces `yaml:"traces"`

	// How long requests and downloads in progress may take to end when the server is told to stop. What has arrived of an image by then is kept, and
	// gone on with at the next start. A second signal does not wait.
	StopGrace Duration `yaml:"stop_grace"`

	// The file of decisions: which image was accepted or refused, when, by which key and policy, and who asked.
	Audit Audit `yaml:"audit"`

	// Settings for the images of some publishers, by prefix of the image name. The longest prefix that covers a name decides alone; what it
	// leaves out is as set for everybody above, not as for a shorter prefix.
	Publishers []Publisher `yaml:"publishers"`
}

// A Listen is an address that nodes are served at.
type Listen struct {
	// Address and port. An address left out, as in :8080, is every address of the machine; port 0 is a free one. unix:PATH is a unix socket, and systemd:NAME a
	// socket that systemd opens and hands over under that name (FileDescriptorName= of a socket unit).
	Address string `yaml:"address" required:"127.0.0.1:8080"`

	// Permissions of a unix socket, in octal. Whoever may write to it can connect. Of no other address.
	Mode Mode `yaml:"mode"`

	// Whether and with which certificates TLS is spoken: none, local-ca (made for each host by the local CA), files, or acme (issued for the names of
	// acme.hosts; for all others cert_file if there is one, else the local CA).
	TLS string `yaml:"tls" oneof:"none local-ca files acme"`

	// The certificate and the chain above it in PEM, for tls: files, and for tls: acme if wanted. It is read again when it, or the key, has changed.
	CertFile string `yaml:"cert_file"`

	// The certificate's private key in PEM.
	KeyFile string `yaml:"key_file"`

	// Whether nodes may use this address as their HTTP proxy (CONNECT, and requests for whole URLs).
	Proxy bool `yaml:"proxy"`

	// Certificate authorities in PEM whose certificates clients may show (mutual TLS). The name of such a client is the common name of its certificate, else
	// its first DNS name. Not with tls: none.
	ClientCAFile string `yaml:"client_ca_file"`

	// How clients may show who they are here: anonymous (not at all), basic (user and password), bearer (token), certificate. Without anonymous nobody is
	// answered who doesn't. Empty: all of them.
	Auth []string `yaml:"auth" oneof:"anonymous basic bearer certificate"`
}

// Access is who may have what.
type Access struct {
	// File of users and their passwords as htpasswd -B writes it: a line of user:hash for each, by bcrypt. It is read again when it has changed. Empty: no
	// users.
	UsersFile string `yaml:"users_file"`

	// File of bearer tokens, which acproxy token writes. It is read again when it has changed. Empty: tokens in data_dir.
	TokensFile string `yaml:"tokens_file"`

	// Who may have what. The longest prefix that covers a name decides alone. What none covers nobody may have, and without any rule everybody may have
	// everything.
	Rules []AccessRule `yaml:"rules"`
}

// An AccessRule says who may have the images under a prefix.
type AccessRule struct {
	// The image names this is about, by whole segments, as in allow. "" is every name.
	Prefix string `yaml:"prefix"`

	// Who may have these images, and know that there are any: names of users, of clients with tokens and of certificates, known for whoever has shown who he
	// is, or anyone.
	Read []string `yaml:"read" required:"known"`

	// Who may have them be fetched, by the API: acproxy warm. Whoever may read them has them fetched too, one at a time.
	Warm []string `yaml:"warm"`

	// Who may keep them from being evicted, and let them be again, by the API. Whoever may use admin.socket may do everything.
	Pin []string `yaml:"pin"`

	// Who may publish images here, under prefixes with publisher: local. Without a rule nobody may but by admin.socket.
	Push []string `yaml:"push"`

	// Who may remove them, by the API.
	Delete []string `yaml:"delete"`

	// Who may do all of that. In the rule for every name: who may see and change what is about the server as a whole, too.
	Admin []string `yaml:"admin"`
}

// Rights returns the lists of names by the keys that they stand under.
func (r AccessRule) Rights() map[string][]string {
	return map[string][]string{"read": r.Read, "warm": r.Warm, "pin": r.Pin, "push": r.Push, "delete": r.Delete, "admin": r.Admin}
}

// Admin is how operators, and acproxy's own commands, look into a running server.
type Admin struct {
	// Addresses that have the API (/api/v1), and the page for operators. What is here must not be at an address of listen. What is about an image needs a right to
	// it, and what is about the server as a whole needs admin in the rule for every name, once there is a rule in access.rules. Without any rule everybody may
	// look, and nobody may change anything here. Empty: the socket alone.
	Listen []AdminListen `yaml:"listen"`

	// Path of the unix socket, at most 107 bytes. Empty: admin.sock in data_dir.
	Socket string `yaml:"socket"`

	// Address at which Prometheus gets the metrics (/metrics), and probes /healthz and /readyz, such as 127.0.0.1:9404; unix:PATH and systemd:NAME as in listen.
	// Nothing else is there, and nobody is asked who he is. Empty: on the socket alone.
	Metrics string `yaml:"metrics"`
}

// An AdminListen is an address that has the API and the page for operators.
type AdminListen struct {
	// Address and port, unix:PATH or systemd:NAME, as in listen.
	Address string `yaml:"address" required:"127.0.0.1:8081"`

	// Permissions of a unix socket, as in listen. Unlike at socket, who connects has the rights that access gives him.
	Mode Mode `yaml:"mode"`

	// Whether and with which certificates TLS is spoken, as in listen.
	TLS string `yaml:"tls" oneof:"none local-ca files acme"`

	// The certificate and the chain above it, as in listen.
	CertFile string `yaml:"cert_file"`

	// The certificate's private key, as in listen.
	KeyFile string `yaml:"key_file"`

	// Certificate authorities whose certificates clients may show, as in listen.
	ClientCAFile string `yaml:"client_ca_file"`

	// How clients may show who they are, as in listen.
	Auth []string `yaml:"auth" oneof:"anonymous basic bearer certificate"`
}

// Front returns it as an address like any other.
func (l AdminListen) Front() Listen {
	return Listen{Address: l.Address, Mode: l.Mode, TLS: l.TLS, CertFile: l.CertFile, KeyFile: l.KeyFile, ClientCAFile: l.ClientCAFile, Auth: l.Auth}
}

// CA is where the local certificate authority is.
type CA struct {
	// Directory of ca.pem and ca-key.pem. Empty: ca in data_dir.
	Dir string `yaml:"dir"`
}

// ACME is how certificates are had from an ACME server (RFC 8555).
type ACME struct {
	// URL of the server's directory. It may be at any address, and what it leads to elsewhere is within the rules of dial. The default is Let's Encrypt, which
	// has https://acme-staging-v02.api.letsencrypt.org/directory to try things with.
	Directory string `yaml:"directory"`

	// Certificates in PEM that the ACME server itself is trusted by, beside the system's.
	CAFile string `yaml:"ca_file"`

	// Whether you agree to the terms of service of the server. Without that nobody is asked for anything.
	AcceptTerms bool `yaml:"accept_terms"`

	// E-mail address that the server may write to. Empty: none.
	Email string `yaml:"email"`

	// This server's own names, by which nodes and operators reach it, at most 100. For each a certificate is had, and for no other name, whatever clients ask
	// for: publishers' names are for the local CA.
	Hosts []string `yaml:"hosts"`

	// How the ACME server is shown that a name is ours, in the order in which it is tried: tls-alpn-01 at the addresses with tls: acme, which it has to reach at
	// port 443 of the name; http-01 at those of listen with tls: none, at port 80. Empty: tls-alpn-01, then http-01 if there is such an address.
	Challenges []string `yaml:"challenges" oneof:"tls-alpn-01 http-01"`

	// ID of the account that the server wants to be shown (external account binding). Empty: none.
	EABKeyID string `yaml:"eab_key_id"`

	// File with that account's key, in base64url, as the server's owner gives it.
	EABKeyFile string `yaml:"eab_key_file"`

	// Directory for the account's key, the certificates and theirs. Empty: acme in data_dir.
	Dir string `yaml:"dir"`
}

// Proxy is the proxy front door.
type Proxy struct {
	// Image hosts for which CONNECT ends here, with a certificate of the local CA, so that their images are served from here.
	// *.example.com covers the subdomains of example.com. Empty: the hosts that the local CA was made for.
	Hosts []string `yaml:"hosts"`

	// Pass CONNECT for any other host through as it is. Otherwise it is refused.
	Tunnel bool `yaml:"tunnel"`
}

// Clients is how long whoever connects may take for what he does.
type Clients struct {
	// For the head of a request, and for the TLS handshake before the first one.
	HeaderTimeout Duration `yaml:"header_timeout"`

	// Until the next request.
	IdleTimeout Duration `yaml:"idle_timeout"`

	// Without taking anything of an answer that waits for it. However slowly one takes it, it is not cut off. For connections as a whole the kernel sees
	// to that, on Linux; within HTTP/2, where many answers share one, it is the time for 32KiB.
	StallTimeout Duration `yaml:"stall_timeout"`

	// Requests that one client, which is an IPv4 address or an IPv6 network of 64 bits, may make in a second. Further ones are answered with 429. 0 is no
	// limit.
	Rate int `yaml:"rate"`

	// Requests that a client may make at once when it made none for a while. 0 is as many as in a second.
	Burst int `yaml:"burst"`

	// Connections that each address of listen has at once. Further ones wait. 0 is no limit.
	MaxConnections int `yaml:"max_connections"`

	// How many of these may be one client's. Further ones are closed. 0 is no limit.
	MaxConnectionsPerClient int `yaml:"max_connections_per_client"`
}

// Dial is how publishers are reached.
type Dial struct {
	// Networks that may be dialled beyond public addresses, such as 10.0.0.0/8 or 192.0.2.7. Without them, private, loopback, link-local
	// and metadata addresses are refused, after looking names up and after every redirect.
	Allow []netip.Prefix `yaml:"allow"`

	// Where to connect for a host, or for one port of it, in place of what DNS says, which may well be acproxy itself; for example
	// {example.com: 192.0.2.7, "example.org:443": 10.0.0.5:8443}. TLS still asks for the name. What stands here needs no allow.
	Hosts map[string]string `yaml:"hosts"`

	// DNS server to ask, as an IP address with or without a port (53). Empty: those of the system.
	Resolver string `yaml:"resolver"`

	// How long connecting to one address may take.
	ConnectTimeout Duration `yaml:"connect_timeout"`

	// How long a publisher may take from the request to the head of its answer, redirects included.
	Timeout Duration `yaml:"timeout"`

	// How long a download may take for its next 4KiB, or for the rest if that is less. A publisher that sends a byte now and then isn't waited for
	// without end.
	StallTimeout Duration `yaml:"stall_timeout"`

	// Redirects followed for one request. 0 follows none.
	MaxRedirects int `yaml:"max_redirects"`

	// User-Agent sent to publishers. Empty: acproxy and its version.
	UserAgent string `yaml:"user_agent"`

	// Requests to one host (scheme, host and port) at a time, from before the connection until the body has come. Further ones wait for their
	// turn, for as long as timeout says, then they are answered with 503. A quarter is kept free of images, so that signatures and discovery
	// don't wait for downloads; that is why 1 is too little. 0 is no limit.
	MaxConnections int `yaml:"max_connections"`

	// Requests to one host that may begin in a second. Further ones wait, as above. 0 is no limit.
	Rate int `yaml:"rate"`

	// Requests to one host that may begin at once when there were none for a while.
	Burst int `yaml:"burst"`

	// How long a host that answers 429 or 503 with Retry-After is left alone at most. Until then nothing is asked of it. 0s ignores what it
	// says.
	MaxRetryAfter Duration `yaml:"max_retry_after"`

	// When a host that is down isn't asked any more.
	Breaker Breaker `yaml:"breaker"`
}

// Breaker is when a host that is down isn't asked any more.
type Breaker struct {
	// Requests in a row that have to fail: no connection, no TLS, no answer in time, 5xx other than 501, a body that breaks off. An answer in
	// between begins anew. A file that breaks off, or gives 500, counts once however often it is asked for. 0 always asks.
	Failures int `yaml:"failures"`

	// How long the host isn't asked then. Requests for what isn't held here fail at once. After that one request is let through: if it is
	// answered, all are, else the time doubles. It is up to a quarter shorter, by chance, so that not every acproxy asks at once.
	Open Duration `yaml:"open"`

	// How long that gets at most.
	MaxOpen Duration `yaml:"max_open"`
}

// Credentials are what publishers want to see.
type Credentials struct {
	// Directories of credentials as rkt has them (files of rktKind: auth with types basic, oauth and aws), such as /etc/rkt/auth.d; later ones go before
	// earlier ones. They are read again when files come, go or are replaced.
	RktDirs []string `yaml:"rkt_dirs"`

	// Credentials for single hosts. They go before those in the directories.
	Hosts []HostCredentials `yaml:"hosts"`
}

// HostCredentials are what one host wants to see.
type HostCredentials struct {
	// The host, with its port unless that is 443.
	Host string `yaml:"host" required:"storage.example.com"`

	// The image names that they are used for, by whole segments, as in allow; the longest prefix that covers a name counts. "" is every name.
	Prefix string `yaml:"prefix"`

	// basic is user and password, bearer a token, aws an access key that each request is signed with (AWS Signature Version 4).
	Type string `yaml:"type" oneof:"basic bearer aws"`

	// The user, or the ID of the access key.
	User string `yaml:"user"`

	// File whose only line is the password, the token or the secret access key. It is read again when it has changed.
	SecretFile string `yaml:"secret_file"`

	// Variable of the environment that has it, in place of a file.
	SecretEnv string `yaml:"secret_env"`

	// Region that requests are signed for. Empty: what the host's name says, else us-east-1.
	Region string `yaml:"region"`

	// Service that requests are signed for. Empty: s3.
	Service string `yaml:"service"`
}

// Discovery is how long answers to meta-discovery are kept.
type Discovery struct {
	// How long a page that has tags is believed. 0s asks every time.
	PositiveTTL Duration `yaml:"positive_ttl"`

	// How long it is believed that a page is not there or has no tags. Failures (401, 403, 429, 5xx, timeouts) are never kept.
	NegativeTTL Duration `yaml:"negative_ttl"`

	// Pages kept in memory at most.
	MaxPages int `yaml:"max_pages"`

	// Size of a page at most. What goes beyond is an error of the publisher.
	MaxPageSize Size `yaml:"max_page_size"`

	// Pages that publishers are asked for at once, and half of that for the names of one host. Asking for a page ends when everybody who waited for it
	// has left.
	MaxRequests int `yaml:"max_requests"`

	// Pages that wait for their turn beyond that, for fetch.queue_wait at most. As with fetch.max_queue, clients take turns, and the one with the most waiting
	// goes short when it is full.
	MaxQueue int `yaml:"max_queue"`
}

// Trust is whose signatures count.
type Trust struct {
	// Directory of keys that came with the system, in rkt's layout (root.d, prefix.d); rkt's own is /usr/lib/rkt/trustedkeys.
	// Empty: none.
	SystemDir string `yaml:"system_dir"`

	// Directory of keys that this machine's operator trusts, in the same layout; an empty file in it masks the system's key of that name.
	// Empty: trustedkeys in data_dir.
	LocalDir string `yaml:"local_dir"`

	// Whether an image needs a signature by a trusted key (required), or is served without one too (optional). One with a bad signature or
	// an unknown signer is refused either way.
	Signature string `yaml:"signature" oneof:"required optional"`

	// What becomes of a signature whose key has expired since: refuse, or accept-if-signed-before it did.
	Expired string `yaml:"expired" oneof:"refuse accept-if-signed-before"`

	// Accept SHA-1, DSA and RSA keys below 2048 bits, which old archives are signed with. MD5 is never accepted.
	Legacy bool `yaml:"legacy"`

	// How many different trusted keys must have signed an image.
	Threshold int `yaml:"threshold"`

	// Which trusted keys discovery pages offer to nodes: rkt-readable, or all, with those that rkt can't read last. One that it can't read
	// stops rkt from reading the ones after it, and in a directory of its keys breaks every image under that prefix.
	Publish string `yaml:"publish" oneof:"rkt-readable all"`
}

// Fetch is how images are brought here.
type Fetch struct {
	// When nodes get the bytes of an image that is just being fetched: cut-through sends them as they arrive and holds back the end until
	// the signature is verified; verify-first sends nothing before everything is checked.
	Delivery string `yaml:"delivery" oneof:"cut-through verify-first"`

	// How much of the end is held back in cut-through delivery. A node drops an image whose end does not come.
	HoldBack Size `yaml:"hold_back"`

	// Size of an image at most, as published (compressed).
	MaxImageSize Size `yaml:"max_image_size"`

	// Size of a signature at most. It can't be more than 1MiB.
	MaxSignatureSize Size `yaml:"max_signature_size"`

	// How long to keep asking for a signature that the publisher has not ready yet (202 Accepted). 0s gives up at once.
	SignatureWait Duration `yaml:"signature_wait"`

	// How often the publisher of an image is asked for the rest when it breaks off, stalls or resets the connection. What has arrived by then is
	// kept for the next one who asks. 0 gives up at once.
	Retries int `yaml:"retries"`

	// How long to go on with that while not a byte comes.
	RetryFor Duration `yaml:"retry_for"`

	// The pause before the first of these attempts. It doubles from one to the next, up to 15s, and is as long as the publisher's Retry-After at
	// least.
	RetryWait Duration `yaml:"retry_wait"`

	// Images that publishers are asked for at once, and half of that for the images of one host.
	MaxFlights int `yaml:"max_flights"`

	// Images that wait for their turn beyond that. Clients take turns. When it is full, the last one of the client with the most waiting gives way to
	// a client with fewer, or else what comes is sent away: with 503 and Retry-After.
	MaxQueue int `yaml:"max_queue"`

	// How long an image waits for its turn, and a discovery page for its own.
	QueueWait Duration `yaml:"queue_wait"`

	// What an image may hold once it is decompressed.
	Limits Limits `yaml:"limits"`
}

// Limits is what an image may hold once it is decompressed.
type Limits struct {
	// Size of the tar at most.
	MaxUncompressed Size `yaml:"max_uncompressed"`

	// How many times larger than the image as published the tar may be. Small images are excused.
	MaxRatio int `yaml:"max_ratio"`

	// Files, directories and links in the tar at most.
	MaxEntries int `yaml:"max_entries"`

	// Size of the image's manifest at most.
	MaxManifest Size `yaml:"max_manifest"`
}

// Freshness is when an image is asked for again at its publisher.
type Freshness struct {
	// How long the answer for an image without a version ("latest") is good. 0s asks every time.
	TTL Duration `yaml:"ttl"`

	// By how many per cent this, and discovery.positive_ttl, is shortened at random for each image, so that what was fetched together is not asked for
	// again together.
	Jitter int `yaml:"jitter"`

	// How long after that it is still served at once, said to be stale, and asked for again behind. Later than that a node waits for the
	// publisher, and gets what is held here only if that gives no answer. 0s always waits.
	MaxStale Duration `yaml:"max_stale"`

	// What becomes of a version whose bytes have changed at the publisher: refuse keeps serving the one held here and tells the operator;
	// follow takes the new one.
	OnChange string `yaml:"on_change" oneof:"refuse follow"`

	// How long a node may use what it got without asking here again (max-age of Cache-Control). Without a version it is never more than is
	// left of ttl. 0s lets it ask every time, which costs a few hundred bytes.
	MaxAge Duration `yaml:"max_age"`
}

// Push is how images are received that are published here. What an image may be like, fetch says: max_image_size, max_signature_size and limits hold for
// uploads too.
type Push struct {
	// Uploads that may be in progress at once. Further ones are answered with 503.
	MaxUploads int `yaml:"max_uploads"`

	// How long an upload may take, from its start until all of it is here. What has come of it is dropped then. A client that sends nothing for as long as
	// clients.stall_timeout is not waited for.
	Timeout Duration `yaml:"timeout"`
}

// OCI is how images are had as OCI images.
type OCI struct {
	// Whether the OCI distribution API (/v2/) is there at all.
	Enabled bool `yaml:"enabled"`

	// Platforms, as os/arch in appc's words, that an image is looked for under a tag. With several, a tag stands for an index of those that there is an image for.
	Platforms []string `yaml:"platforms"`

	// For how long a client is kept waiting for an image to arrive and to be converted. After that it is told to come back (503); the work goes on.
	Wait Duration `yaml:"wait"`

	// For how long the layer of an image is kept beside the image after a node has asked for it last, for the other nodes of a rollout. It is as large as the files
	// of the image, not compressed; nothing is evicted for it, and it goes before anything else does. 0 keeps none: each is made anew for everybody who asks.
	Keep Duration `yaml:"keep"`

	// Images that are read at once to find out what their layers are called. 0 is half as many as there are processors.
	Parallel int `yaml:"parallel"`
}

// Cache is how much is kept.
type Cache struct {
	// How much space the store may take: images, what is arriving, signatures, index and all. It is never exceeded: space is reserved
	// before an image is received, the least recently used images are evicted for it, and what has no space then is refused (507). An
	// arriving image needs 64KiB beside its bytes. 0 sets no limit; otherwise at least 16MiB.
	MaxSize Size `yaml:"max_size"`

	// How much of the file system is left to others. The store may take the rest, or max_size if that is less. 0 lets it take all.
	MinFree Size `yaml:"min_free"`

	// Above how many per cent of what the store may take images are evicted.
	High int `yaml:"high"`

	// Down to how many per cent they are evicted then.
	Low int `yaml:"low"`

	// For how long after it was fetched or last used an image is not evicted.
	Grace Duration `yaml:"grace"`

	// Whether an image may be evicted that its publisher has no more.
	EvictLastCopies bool `yaml:"evict_last_copies"`

	// How often times of last use are written down. A crash loses at most these.
	AccessFlush Duration `yaml:"access_flush"`

	// What becomes of an image for which there is no room: refuse answers 507; stream passes a signed one on without keeping it, checked as always,
	// at the price of a fetch for each client. Prefixes with delivery: verify-first always refuse.
	OnFull string `yaml:"on_full" oneof:"refuse stream"`

	// How long the beginning of an image is kept whose publisher broke off, or that was arriving when the server ended, for somebody to ask for
	// the rest. 0s drops it at once.
	KeepPartials Duration `yaml:"keep_partials"`
}

// Scrub is how what is kept is read again.
type Scrub struct {
	// Within which time every image is read and checked again: its bytes, its image ID, and what is known of it. One that is damaged is set
	// aside and fetched again. 0s reads none.
	Every Duration `yaml:"every"`

	// How many bytes are read in a second at most. If that is too little for every, it takes longer.
	Rate Size `yaml:"rate"`
}

// Warm is lists of images that are fetched before anybody asks for them.
type Warm struct {
	// Images of all lists together that are asked for at once.
	Concurrency int `yaml:"concurrency"`

	// Platforms, as os/arch in appc's words, that images are asked for whose list doesn't say. none asks for nothing but what the list says.
	Platforms []string `yaml:"platforms"`

	// Images that a list may come to, with those that others depend on.
	MaxImages int `yaml:"max_images"`

	// How many images deep dependencies are followed.
	MaxDepth int `yaml:"max_depth"`

	// Finished jobs that are remembered. The oldest one goes first.
	KeepJobs int `yaml:"keep_jobs"`

	// Lists that the server fetches by itself.
	Lists []WarmList `yaml:"lists"`
}

// WarmList is a list of images that the server fetches by itself.
type WarmList struct {
	// File with the list, as acproxy warm takes it. It is read anew each time.
	File string `yaml:"file" required:"/etc/acproxy/warm.yaml"`

	// Groups of it. Empty: all.
	Groups []string `yaml:"groups"`

	// When: minute, hour, day of the month, month, day of the week, in the server's time zone. Empty: as the list says for each of its groups.
	Schedule string `yaml:"schedule"`

	// By how much later than that it begins at most, at random, so that not all mirrors ask at once.
	Jitter Duration `yaml:"jitter"`
}

// Log is what acproxy tells about its work.
type Log struct {
	// The least that is worth a line: debug, info, warn or error.
	Level string `yaml:"level" oneof:"debug info warn error"`

	// Lines for people (text) or for programs (json).
	Format string `yaml:"format" oneof:"text json"`

	// Whether every request gets a line.
	Access bool `yaml:"access"`

	// How long these lines may wait, to be written together. A crash loses them. 0s writes each at once.
	AccessFlush Duration `yaml:"access_flush"`
}

// Traces is where traces go.
type Traces struct {
	// URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318. Headers with secrets, certificates and the like are said to it as the variables
	// of the environment have it, OTEL_EXPORTER_OTLP_HEADERS and so on. With offline it has to be on this machine. Empty: no traces are exported, whatever the
	// environment says.
	Endpoint string `yaml:"endpoint"`

	// How many per cent of the requests are exported. Of one that belongs to a trace already, who began it has decided.
	Sample int `yaml:"sample"`

	// Tell publishers which trace a request to them belongs to. It tells them which of their requests come from one node.
	Publishers bool `yaml:"publishers"`
}

// Audit is the file of decisions.
type Audit struct {
	// File that a line of JSON is appended to for each decision. Empty: audit.log in data_dir.
	File string `yaml:"file"`

	// Size at which the file is put aside, as FILE.1, and a new one is begun.
	MaxSize Size `yaml:"max_size"`

	// Files put aside that are kept. The oldest one goes first.
	MaxFiles int `yaml:"max_files"`
}

// A Publisher is what differs for the images under one prefix. A nil pointer, an empty string or an empty list is what [Config.Inherit]
// fills in from the settings for everybody.
type Publisher struct {
	// The image names this is about, by whole segments, as in allow.
	Prefix string `yaml:"prefix" required:"example.com/app"`

	// Who publishes these images: web, whoever discovery leads to, or local, this acproxy. Images of local are pushed here (acproxy push, or any client of
	// acpush), and nobody is ever asked for them.
	Publisher string `yaml:"publisher" oneof:"web local"`

	// URL templates to use without any discovery (of keys neither), as a publisher's ac-discovery tag would give them, tried in order. Not together with
	// discovery_host or simple_discovery.
	Templates []string `yaml:"templates"`

	// Host, with or without a port, that is asked for discovery in place of the name's own.
	DiscoveryHost string `yaml:"discovery_host"`

	// URL with {name} that lists the versions of an image: the tags of an OCI repository, a JSON array, or text with one on each line. It is asked where a
	// list of acproxy warm has a pattern for a version. Empty: there is none.
	Listing string `yaml:"listing"`

	// Also try {name}-{version}-{os}-{arch}.{ext}, as was done before meta-discovery, when no page has a tag.
	SimpleDiscovery bool `yaml:"simple_discovery"`

	// Allow plain http: in templates, in redirects, and for discovery where nothing listens for https. Nobody can then tell who answered:
	// signatures alone protect the images.
	HTTP bool `yaml:"http"`

	// Certificates in PEM that are trusted for this publisher beside the system's.
	CAFile string `yaml:"ca_file"`

	// As dial.timeout.
	Timeout *Duration `yaml:"timeout"`

	// Proxy to reach this publisher by: http://, https:// or socks5://host:port. Empty: as HTTP_PROXY, HTTPS_PROXY and NO_PROXY say.
	Proxy string `yaml:"proxy"`

	// Networks that may be dialled for this publisher, beyond public addresses and dial.allow.
	AllowAddresses []netip.Prefix `yaml:"allow_addresses"`

	// As trust.signature.
	Signature string `yaml:"signature" oneof:"required optional"`

	// As trust.expired.
	Expired string `yaml:"expired" oneof:"refuse accept-if-signed-before"`

	// As trust.legacy.
	Legacy *bool `yaml:"legacy"`

	// As trust.threshold.
	Threshold *int `yaml:"threshold"`

	// As fetch.delivery.
	Delivery string `yaml:"delivery" oneof:"cut-through verify-first"`

	// As freshness.ttl.
	TTL *Duration `yaml:"ttl"`

	// As freshness.max_stale.
	MaxStale *Duration `yaml:"max_stale"`

	// As freshness.on_change.
	OnChange string `yaml:"on_change" oneof:"refuse follow"`

	// As cache.on_full.
	OnFull string `yaml:"on_full" oneof:"refuse stream"`

	// As offline. It can't be false where that is true.
	Offline *bool `yaml:"offline"`
}

// Default returns the configuration that an empty file gives.
func Default() Config {
	return Config{
		Listen: []Listen{defaultListen()},
		Admin:  Admin{Listen: []AdminListen{defaultAdminListen()}},
		ACME:   ACME{Directory: "https://acme-v02.api.letsencrypt.org/directory"},
		Clients: Clients{
			HeaderTimeout: seconds(10),
			IdleTimeout:   minutes(2),
			StallTimeout:  minutes(5),
		},
		Dial: Dial{
			ConnectTimeout: seconds(2),
			Timeout:        seconds(30),
			StallTimeout:   seconds(30),
			MaxRedirects:   10,
			MaxConnections: 16,
			Rate:           100,
			Burst:          200,
			MaxRetryAfter:  minutes(5),
			Breaker: Breaker{
				Failures: 5,
				Open:     seconds(5),
				MaxOpen:  minutes(1),
			},
		},
		Discovery: Discovery{
			PositiveTTL: minutes(10),
			NegativeTTL: seconds(30),
			MaxPages:    10_000,
			MaxPageSize: 1 * MiB,
			MaxRequests: 256,
			MaxQueue:    1000,
		},
		Trust: Trust{
			Signature: SignatureRequired,
			Expired:   ExpiredRefuse,
			Threshold: 1,
			Publish:   PublishRktReadable,
		},
		Fetch: Fetch{
			Delivery:         DeliveryCutThrough,
			HoldBack:         64 * KiB,
			MaxImageSize:     20 * GiB,
			MaxSignatureSize: 1 * MiB,
			SignatureWait:    seconds(30),
			Retries:          20,
			RetryFor:         minutes(2),
			RetryWait:        Duration(200 * time.Millisecond),
			MaxFlights:       64,
			MaxQueue:         1000,
			QueueWait:        minutes(1),
			Limits: Limits{
				MaxUncompressed: 64 * GiB,
				MaxRatio:        200,
				MaxEntries:      1_000_000,
				MaxManifest:     1 * MiB,
			},
		},
		Freshness: Freshness{
			TTL:      minutes(5),
			Jitter:   10,
			MaxStale: minutes(60),
			OnChange: OnChangeRefuse,
			MaxAge:   minutes(5),
		},
		Warm: Warm{
			Concurrency: 4,
			Platforms:   []string{"linux/amd64"},
			MaxImages:   100_000,
			MaxDepth:    16,
			KeepJobs:    100,
		},
		Push: Push{
			MaxUploads: 16,
			Timeout:    minutes(60),
		},
		OCI: OCI{
			Enabled:   true,
			Platforms: []string{"linux/amd64"},
			Wait:      minutes(5),
			Keep:      minutes(60),
		},
		Cache: Cache{
			MinFree:      1 * GiB,
			High:         95,
			Low:          90,
			Grace:        minutes(5),
			AccessFlush:  seconds(30),
			KeepPartials: days(1),
			OnFull:       OnFullRefuse,
		},
		Scrub: Scrub{
			Every: days(30),
			Rate:  20 * MiB,
		},
		Log: Log{
			Level:  "info",
			Format: LogText,
			Access: true,

			AccessFlush: seconds(1),
		},
		Traces:    Traces{Sample: 100},
		StopGrace: seconds(10),
		Audit: Audit{
			MaxSize:  100 * MiB,
			MaxFiles: 10,
		},
	}
}

// defaultListen is what an address of the list is unless it says otherwise.
func defaultListen() Listen {
	return Listen{Address: "127.0.0.1:8080", Mode: DefaultMode, TLS: TLSNone, Proxy: true}
}

// DefaultMode has the server's user and group connect to a unix socket.
const DefaultMode Mode = 0o660

// DefaultAdminAddress is where the page for operators is unless the configuration says otherwise.
const DefaultAdminAddress = "127.0.0.1:8081"

func defaultAdminListen() AdminListen {
	return AdminListen{Address: DefaultAdminAddress, Mode: DefaultMode, TLS: TLSNone}
}

// PublisherFor returns the settings for an image name, all of them: those of the longest prefix that covers it, completed by
// [Config.Inherit]. Its Prefix is "" if none does.
func (c *Config) PublisherFor(name string) Publisher {
	var best Publisher
	for _, p := range c.Publishers {
		if len(p.Prefix) > len(best.Prefix) && acproxy.HasPrefix(name, p.Prefix) {
			best = p
		}
	}
	return c.Inherit(best)
}

// Inherit returns p with everything that it leaves out taken from the settings for everybody: no pointer is nil and no word is missing.
// The addresses allowed are those of dial.allow and p's own.
func (c *Config) Inherit(p Publisher) Publisher {
	p.AllowAddresses = append(append([]netip.Prefix(nil), c.Dial.Allow...), p.AllowAddresses...)
	p.Timeout = or(p.Timeout, c.Dial.Timeout)
	p.Legacy = or(p.Legacy, c.Trust.Legacy)
	p.Threshold = or(p.Threshold, c.Trust.Threshold)
	p.TTL = or(p.TTL, c.Freshness.TTL)
	p.MaxStale = or(p.MaxStale, c.Freshness.MaxStale)
	p.Offline = or(p.Offline, c.Offline)
	for _, word := range []struct {
		own       *string
		everybody string
	}{
		{&p.Publisher, PublisherWeb},
		{&p.Signature, c.Trust.Signature},
		{&p.Expired, c.Trust.Expired},
		{&p.Delivery, c.Fetch.Delivery},
		{&p.OnChange, c.Freshness.OnChange},
		{&p.OnFull, c.Cache.OnFull},
	} {
		if *word.own == "" {
			*word.own = word.everybody
		}
	}
	return p
}

// or returns a copy of own, or of everybody's if there is none: callers may change what they get.
func or[T any](own *T, everybody T) *T {
	if own != nil {
		everybody = *own
	}
	return &everybody
}

func seconds(n int) Duration { return Duration(time.Duration(n) * time.Second) }
func minutes(n int) Duration { return Duration(time.Duration(n) * time.Minute) }
func days(n int) Duration    { return Duration(time.Duration(n) * 24 * time.Hour) }
