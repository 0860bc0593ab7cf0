package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/acpush"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/trust"
)

// pushing is one run of acproxy push.
type pushing struct {
	cmd        *cobra.Command
	o          *options
	server     string
	user       string
	secretFile string
	caFile     string
	asJSON     bool

	file      string
	size      int64
	ref       acproxy.Ref
	manifest  aci.Manifest
	signature []byte // nil if there is none
}

func newPush(o *options) *cobra.Command {
	p := &pushing{o: o}
	cmd := &cobra.Command{
		Use:   "push FILE.aci [FILE.aci.asc]",
		Short: "Publish an image here, or at another acproxy",
		Long: `push publishes an image under a prefix that has publisher: local in the configuration. The name and the labels are those of the image's manifest. The signature is
the second file, or the one beside the image whose name ends in .asc; an image that policy accepts without one needs none.

The image goes to the server that runs on the data directory, by its socket; where none runs, straight into the store. With --server it goes to the one at that
URL by acpush, as whoever --user and --secret-file say, who needs the right push for the prefix (access.rules).

Either way it goes through the check of an image that is fetched, and is there as a whole or not at all. A version that was published with another image is
refused, unless on_change: follow says otherwise; the same image again is no error. An image without a version asked for is the one that was signed last.

The exit code is 0 if the image is published now, also if it was before, and 1 if not.`,
		Args: args(cobra.RangeArgs(1, 2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			p.cmd = cmd
			if err := p.check(); err != nil {
				return err
			}
			if err := p.read(args); err != nil {
				return err
			}
			details, err := p.push()
			if err != nil {
				return p.advised(err)
			}
			return p.print(details)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&p.server, "server", "", "URL of the acproxy to push to, such as https://images.example.net:8443 (default: the one on the data directory)")
	flags.StringVar(&p.user, "user", "", "with --server: user to show, whose password is in --secret-file")
	flags.StringVar(&p.secretFile, "secret-file", "", "with --server: file with the password of --user, or without that with a token")
	flags.StringVar(&p.caFile, "ca-file", "", "with --server: certificates in PEM that are trusted beside the system's")
	flags.BoolVar(&p.asJSON, "json", false, "print JSON")
	return cmd
}

// check returns what is wrong with the command line.
func (p *pushing) check() error {
	if p.server == "" {
		if p.user != "" || p.secretFile != "" || p.caFile != "" {
			return usagef("--user, --secret-file and --ca-file are for --server")
		}
		return nil
	}
	u, err := url.Parse(p.server)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.RawQuery != "" || strings.Trim(u.Path, "/") != "":
		return usagef("--server %s: this is not a scheme and a host, as in https://images.example.net:8443", p.server)
	case p.user != "" && p.secretFile == "":
		return usagef("--user needs --secret-file with the password")
	case p.secretFile != "" && u.Scheme == "http" && !isLoopback(u.Hostname()):
		return usagef("--server %s: what is in --secret-file would cross the network in clear; use https", p.server)
	}
	p.server = u.Scheme + "://" + u.Host
	return nil
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// errManifest ends the reading of an image after its manifest.
var errManifest = errors.New("that is enough")

// read finds out what there is to be pushed.
func (p *pushing) read(args []string) error {
	p.file = args[0]
	f, err := os.Open(p.file)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", p.file)
	}
	p.size = fi.Size()
	_, err = aci.Inspect(f, aci.Limits{}, func(m aci.Manifest) error {
		p.manifest = m
		return errManifest
	})
	if !errors.Is(err, errManifest) {
		if err == nil {
			err = errors.New("it has no manifest")
		}
		return fmt.Errorf("%s is no image: %w", p.file, err)
	}
	if p.ref, err = acproxy.NewRef(p.manifest.Name, p.manifest.Labels); err != nil {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	signature := p.file + ".asc"
	if len(args) == 2 {
		signature = args[1]
	}
	p.signature, err = readAtMost(signature, trust.MaxSignature)
	if errors.Is(err, fs.ErrNotExist) && len(args) == 1 {
		return nil
	}
	return err
}

// readAtMost reads a file that may not be longer than so many bytes.
func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return text, err
}

func (p *pushing) push() (acpush.Details, error) {
	ctx := p.cmd.Context()
	if p.server != "" {
		client, err := p.remote()
		if err != nil {
			return acpush.Details{}, err
		}
		return p.upload(ctx, client)
	}
	cfg, err := p.o.load()
	if err != nil {
		return acpush.Details{}, err
	}
	socket, err := admin.Dial(cfg.Admin.Socket)
	if err == nil {
		return p.upload(ctx, &acpush.Client{Base: "http://acproxy", HTTP: socket.HTTP()})
	}
	if !errors.Is(err, acproxy.ErrNotFound) {
		return acpush.Details{}, err
	}
	var details acpush.Details
	err = p.o.withParts(func(parts *parts) error {
		details, err = p.straight(ctx, parts)
		return err
	})
	return details, err
}

// remote returns a client of the server that was named.
func (p *pushing) remote() (*acpush.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if p.caFile != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if config.RootCAs, err = rootsOf(pool, p.caFile); err != nil {
			return nil, err
		}
	}
	client := &acpush.Client{Base: p.server, HTTP: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{}).DialContext},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if p.secretFile == "" {
		return client, nil
	}
	text, err := readAtMost(p.secretFile, 64<<10)
	if err != nil {
		return nil, err
	}
	secret := strings.TrimRight(string(text), "\r\n")
	client.Authorize = func(r *http.Request) {
		if p.user != "" {
			r.SetBasicAuth(p.user, secret)
			return
		}
		r.Header.Set("Authorization", "Bearer "+secret)
	}
	return client, nil
}

// upload pushes by acpush.
func (p *pushing) upload(ctx context.Context, client *acpush.Client) (acpush.Details, error) {
	client.Path = server.PushPath
	bar := newProgress(p.cmd.ErrOrStderr(), "pushing")
	defer bar.end()
	return client.Push(ctx, acpush.Image{
		Ref: p.ref, Manifest: p.manifest.Raw, Signature: p.signature, Size: p.size,
		Open: func() (io.ReadCloser, error) { return p.open(bar) },
	})
}

// open opens the image, and shows how far it is read.
func (p *pushing) open(bar *progress) (io.ReadCloser, error) {
	f, err := os.Open(p.file)
	if err != nil {
		return nil, err
	}
	return &watched{File: f, told: func(n int64) { bar.set(n, p.size) }}, nil
}

// watched is a file that tells how much of it was read. It is read by one goroutine at a time.
type watched struct {
	*os.File
	n    int64
	told func(int64)
}

// Read is the file's.
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.File.Read(p)
	w.n += int64(n)
	w.told(w.n)
	return n, err
}

// WriteTo is Read to the end: the file's own would tell nothing.
func (w *watched) WriteTo(to io.Writer) (int64, error) {
	return io.Copy(to, struct{ io.Reader }{w})
}

// straight publishes into the store, which no server holds.
func (p *pushing) straight(ctx context.Context, parts *parts) (acpush.Details, error) {
	if err := parts.store.Ready(ctx); err != nil {
		return acpush.Details{}, err
	}
	f, err := os.Open(p.file)
	if err != nil {
		return acpush.Details{}, err
	}
	defer f.Close()
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return acpush.Details{}, err
	}
	bar := newProgress(p.cmd.ErrOrStderr(), "pushing")
	defer bar.end()
	taken, err := parts.fetcher.PublishFile(ctx, fetch.Publication{
		Ref: p.ref, Name: p.manifest.Name, Labels: p.manifest.Labels, Signature: p.signature, Source: "push from command", Client: "command",
	}, acproxy.Digest(sum.Sum(nil)), size, func() (io.Reader, error) {
		_, err := f.Seek(0, io.SeekStart)
		return &watched{File: f, told: func(n int64) { bar.set(n, size) }}, err
	})
	if err != nil {
		return acpush.Details{}, err
	}
	return *server.Published(taken), nil
}

// advised adds to an error what to do about it.
func (p *pushing) advised(err error) error {
	switch acproxy.Code(err) {
	case trust.Unsigned.String():
		return fmt.Errorf("%w\nSign it: gpg --armor --detach-sign --output %s.asc %s", err, p.file, p.file)
	case "credentials-needed":
		return fmt.Errorf("%w\nShow a token with --secret-file, or a password with --user too", err)
	}
	return err
}

func (p *pushing) print(d acpush.Details) error {
	out := p.cmd.OutOrStdout()
	if p.asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(d)
	}
	pr := newPrinter(out)
	how := "published"
	if d.Held {
		how = "published already"
	}
	pr.printf("%s  %s  %s  %s\n", how, d.Image, d.ImageID.Short(), bytesText(d.Size))
	for _, signer := range d.Signers {
		pr.printf("signed by  %s\n", signer)
	}
	for _, ref := range d.Kept {
		pr.printf("%v stays what it is: that was signed later\n", ref)
	}
	if d.Warning != "" {
		pr.printf("warning    %s\n", d.Warning)
	}
	return pr.err
}
