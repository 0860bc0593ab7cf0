package acme

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/acproxy/acproxy/internal/durable"
)

// What is kept of each server, all of it readable by its owner alone:
//
//	DIR/acme.example.com-ab12cd34/    a directory for each server: what a test server has issued is of no use at another
//	    account.json                  the account's URL and key
//	    images.example.com.pem        key and certificates of a name, in one file, so that they always belong together
//	    images.example.com.key        the key of a certificate that is being ordered
const (
	accountFile = "account.json"
	fileMode    = 0o600
	dirMode     = 0o700
	maxFile     = 1 << 20 // bytes of a file that are read
)

// An account is what is known of ours at the server.
type account struct {
	Directory string   `json:"directory"`
	URL       string   `json:"url,omitempty"` // "" until the server has given one
	Contact   []string `json:"contact,omitempty"`
	Key       string   `json:"key"` // in PKCS #8 and PEM

	key *ecdsa.PrivateKey
}

// dir returns where things of this server are kept.
func (c *Client) dir() string {
	sum := sha256.Sum256([]byte(c.opts.Directory))
	name := hex.EncodeToString(sum[:4])
	if u, err := url.Parse(c.opts.Directory); err == nil && u.Hostname() != "" {
		// What stands in a URL becomes a name of a file only as far as it is a host.
		host := strings.Map(func(r rune) rune {
			if strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-.", r) {
				return r
			}
			return '_'
		}, strings.ToLower(u.Hostname()))
		name = strings.TrimLeft(host, ".") + "-" + name
	}
	return filepath.Join(c.opts.Dir, name)
}

// loadAccount reads the account, or makes the key of a new one and writes it down.
func (c *Client) loadAccount() (*account, error) {
	file := filepath.Join(c.dir(), accountFile)
	text, err := c.read(file)
	if errors.Is(err, fs.ErrNotExist) {
		return c.newAccount()
	}
	if err != nil {
		return nil, err
	}
	a := &account{}
	if err := json.Unmarshal(text, a); err != nil {
		return nil, fmt.Errorf("reading %s: %w; move it away to have another account made", file, err)
	}
	block, _ := pem.Decode([]byte(a.Key))
	if block == nil {
		return nil, fmt.Errorf("%s has no key in PEM; move it away to have another account made", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading the key in %s: %w; move it away to have another account made", file, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the key in %s is a %T, not one of ours; move it away to have another account made", file, key)
	}
	a.key = ec
	return a, nil
}

func (c *Client) newAccount() (*account, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	a := &account{Directory: c.opts.Directory, Key: string(text), key: key}
	return a, c.saveAccount(a)
}

func (c *Client) saveAccount(a *account) error {
	text, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return c.write(accountFile, append(text, '\n'))
}

// load reads the certificate of a host, nil if there is none.
func (c *Client) load(host string) (*tls.Certificate, error) {
	file := filepath.Join(c.dir(), host+".pem")
	text, err := c.read(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	cert, err := c.parse(host, text)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return cert, nil
}

func (c *Client) saveCertificate(host string, text []byte) error {
	if err := c.write(host+".pem", text); err != nil {
		return err
	}
	// It stands in the other file now. What is left of it is written over by the next order.
	_ = c.opts.FS.Remove(filepath.Join(c.dir(), host+".key"))
	return nil
}

// saveKey writes down the key that a certificate is ordered for.
func (c *Client) saveKey(host string, key *ecdsa.PrivateKey) error {
	text, err := keyPEM(key)
	if err != nil {
		return err
	}
	return c.write(host+".key", text)
}

func (c *Client) write(name string, text []byte) error {
	// Each time: they may be there because making them has failed only just before.
	for _, dir := range []string{c.opts.Dir, c.dir()} {
		if err := c.opts.FS.MkdirAll(dir, dirMode); err != nil {
			return err
		}
		if err := c.opts.FS.SyncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
			return err
		}
	}
	file := filepath.Join(c.dir(), name)
	// One name for what isn't whole yet: a key that a killed process has left there goes with the next writing.
	unfinished := file + ".new"
	if err := c.opts.FS.Remove(unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Replace(c.opts.FS, unfinished, file, text, fileMode)
}

// read reads a file, and warns if others may, too.
func (c *Client) read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", file, maxFile)
	}
	if mode := st.Mode().Perm(); mode&0o077 != 0 {
		c.log.Warn("a private key may be read by others than its owner; run: chmod 600 "+file, "file", file, "mode", fmt.Sprintf("%04o", mode))
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
