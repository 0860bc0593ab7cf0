package main

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// A ground is what all contestants of a run stand on: files to serve, a key that signed them, a certificate, acproxy itself. What isn't asked for
// isn't made.
type ground struct {
	o       options
	key     *trusttest.Key
	program string // acproxy, built
	images  map[int64]*image
	cert    string // file of the certificate for 127.0.0.1, and its key beside it
}

// An image is one that is published.
type image struct {
	name      string
	path      string // of its URL and of its file below the root; the signature is path + ".asc"
	size      int64
	signature int64 // its size
	crc       string
	sha256    string
	blobs     map[string]string // by OCI digest: path of the file below the root
	manifest  string            // OCI digest of a manifest, which is as long as a discovery page
	layer     string            // OCI digest of the image
	sigBlob   string            // OCI digest of the signature
}

const (
	// pageSize is how long the publisher's discovery page is.
	pageSize        = 1024
	ociManifestType = "application/vnd.oci.image.manifest.v1+json"
	ociRepository   = "bench"
)

func (g *ground) root() string { return filepath.Join(g.o.dir, "root") }

// build builds acproxy from the source as it is.
func (g *ground) build() (string, error) {
	if g.program == "" {
		program := filepath.Join(g.o.dir, "acproxy")
		if err := quiet(exec.Command("go", "build", "-o", program, "github.com/acproxy/acproxy/cmd/acproxy")); err != nil {
			return "", err
		}
		g.program = program
	}
	return g.program, nil
}

func (g *ground) signingKey() (key *trusttest.Key, err error) {
	if g.key == nil {
		g.key, err = trusttest.NewKey(trusttest.Options{})
	}
	return g.key, err
}

// image returns the published image of about some size.
func (g *ground) image(size int64) (*image, error) {
	if im := g.images[size]; im != nil {
		return im, nil
	}
	im, err := g.publish(size)
	if err != nil {
		return nil, fmt.Errorf("making an image: %w", err)
	}
	if g.images == nil {
		g.images = make(map[int64]*image)
	}
	g.images[size] = im
	return im, nil
}

func (g *ground) publish(size int64) (*image, error) {
	key, err := g.signingKey()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%s-%d", benchName, size)
	im := &image{name: name, path: fmt.Sprintf("/images/%s-%s-%s-%s.aci", name, benchLabels["version"], benchLabels["os"], benchLabels["arch"])}
	file := filepath.Join(g.root(), im.path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	if err := g.writeImage(file, name, size); err != nil {
		return nil, err
	}
	digest, crc := sha256.New(), crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if im.size, err = hashFile(file, digest, crc); err != nil {
		return nil, err
	}
	im.sha256, im.crc = hex.EncodeToString(digest.Sum(nil)), hex.EncodeToString(crc.Sum(nil))
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	signature, err := key.Sign(in, trusttest.SignOptions{})
	if err != nil {
		return nil, err
	}
	im.signature = int64(len(signature))
	if err := os.WriteFile(file+".asc", signature, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(g.root(), discoveryFile), discoveryPage(), 0o644); err != nil {
		return nil, err
	}
	return im, g.describe(im, signature)
}

// describe makes the OCI manifest, for the registry.
func (g *ground) describe(im *image, signature []byte) error {
	im.layer, im.sigBlob = im.sha256, hexSHA256(signature)
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
	}
	manifest := struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        descriptor        `json:"config"`
		Layers        []descriptor      `json:"layers"`
		Annotations   map[string]string `json:"annotations"`
	}{
		2, ociManifestType, descriptor{"application/vnd.oci.image.config.v1+json", "sha256:" + im.sigBlob, im.signature},
		[]descriptor{{"application/octet-stream", "sha256:" + im.layer, im.size}}, map[string]string{"padding": ""},
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	manifest.Annotations["padding"] = strings.Repeat("-", pageSize-len(text))
	if text, err = json.Marshal(manifest); err != nil {
		return err
	}
	im.manifest = hexSHA256(text)
	manifestPath := im.path + ".json"
	im.blobs = map[string]string{im.layer: im.path, im.sigBlob: im.path + ".asc", im.manifest: manifestPath}
	return os.WriteFile(filepath.Join(g.root(), manifestPath), text, 0o644)
}

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// hashFile hashes a file and returns its size.
func hashFile(file string, hashes ...hash.Hash) (int64, error) {
	in, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	var to []io.Writer
	for _, h := range hashes {
		to = append(to, h)
	}
	return io.Copy(io.MultiWriter(to...), in)
}

// discoveryPage is the page that says where the images are. It holds nothing that acproxy would not read.
func discoveryPage() []byte {
	const page = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Image discovery</title>
<meta name="ac-discovery" content="%s http://bench.example.com/images/{name}-{version}-{os}-{arch}.{ext}">
</head><body><p>%s</p></body></html>
`
	prefix := "bench.example.com"
	return fmt.Appendf(nil, page, prefix, strings.Repeat("-", pageSize-len(fmt.Sprintf(page, prefix, ""))))
}

// writeImage writes an image whose file is at least as long as asked. Its rootfs is a program again and again, which is compressed and has to be
// decompressed as real images are: gzip finds nothing again that is further away than 32 KiB.
func (g *ground) writeImage(file, name string, size int64) error {
	program, err := g.build()
	if err != nil {
		return err
	}
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	written := &counter{to: out}
	z := gzip.NewWriter(written)
	t := tar.NewWriter(z)
	put := func(name string, kind byte, body []byte) error {
		err := t.WriteHeader(&tar.Header{Typeflag: kind, Name: name, Mode: 0o755, ModTime: acitest.Epoch, Size: int64(len(body))})
		if err == nil {
			_, err = t.Write(body)
		}
		return err
	}
	err = errors.Join(put("manifest", tar.TypeReg, acitest.Spec{Name: name, Labels: benchLabels}.ManifestJSON()), put("rootfs", tar.TypeDir, nil))
	// Pieces of a length that leaves some for small images too.
	piece := int(min(1<<20, max(size/4, 1<<10)))
	for i := 0; written.n < size && err == nil; i++ {
		from := i * piece % (len(content) - piece)
		err = put(fmt.Sprintf("rootfs/%d", i), tar.TypeReg, content[from:from+piece])
		if err == nil && size < 1<<20 {
			err = z.Flush() // otherwise nothing would be written before much more than that has come
		}
	}
	return errors.Join(err, t.Close(), z.Close(), out.Close())
}

// counter counts what is written.
type counter struct {
	to io.Writer
	n  int64
}

// Write is [io.Writer]'s.
func (c *counter) Write(p []byte) (int, error) {
	n, err := c.to.Write(p)
	c.n += int64(n)
	return n, err
}

// certificate returns the files of a certificate for 127.0.0.1, ECDSA over P-256, and of its key, which is the same for all.
func (g *ground) certificate() (cert, key string, err error) {
	cert = filepath.Join(g.o.dir, "cert.pem")
	key = filepath.Join(g.o.dir, "cert-key.pem")
	if g.cert != "" {
		return cert, key, nil
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return "", "", err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", err
	}
	encode := func(kind string, der []byte) []byte {
		var b bytes.Buffer
		_ = pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}) // to memory
		return b.Bytes()
	}
	err = errors.Join(os.WriteFile(cert, encode("CERTIFICATE", der), 0o644), os.WriteFile(key, encode("PRIVATE KEY", secret), 0o600))
	g.cert = cert
	return cert, key, err
}
