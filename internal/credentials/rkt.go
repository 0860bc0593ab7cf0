package credentials

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/reread"
)

// A Dir is a directory of credentials as rkt has them: auth.d, with files that end in .json. It is read again when a file came or went, or was put into the place
// of another one.
type Dir struct {
	files *reread.Files[map[string]Credential]
}

// OpenDir reads a directory. One that isn't there has no credentials; a file that can't be understood is an error with its name. Files of another kind than
// auth, such as dockerAuth, are none of ours. Once it was read, trouble is for the log, and what it said before goes on counting.
func OpenDir(path string, log *slog.Logger) (*Dir, error) {
	files, err := reread.Open([]string{path}, func() (map[string]Credential, error) { return readDir(path) }, func(err error) {
		log.Error("credentials have changed and can't be read; they are those that there were before", "dir", path, "err", err)
	})
	return &Dir{files}, err
}

func readDir(path string) (map[string]Credential, error) {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := make(map[string]Credential)
	for _, entry := range entries {
		if filepath.Ext(entry.Name()) != ".json" {
			continue
		}
		name := filepath.Join(path, entry.Name())
		content, err := readSmall(name)
		if err != nil {
			return nil, err
		}
		found, err := parseRkt(content)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, c := range found {
			if _, twice := all[c.Host]; twice {
				return nil, acproxy.Invalid("%s: there are credentials for %s in this directory already", name, c.Host)
			}
			all[c.Host] = c
		}
	}
	return all, nil
}

// maxFile bounds a file of credentials, or with a secret, in bytes.
const maxFile = 1 << 20

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = acproxy.Invalid("%s is longer than %d bytes", path, maxFile)
	}
	return content, err
}

// rktAuth is a file of rkt's credentials (rkt, Documentation/configuration.md, "rktKind: auth").
type rktAuth struct {
	Kind        string   `json:"rktKind"`
	Version     string   `json:"rktVersion"`
	Domains     []string `json:"domains"`
	Type        string   `json:"type"`
	Credentials struct {
		User            string `json:"user"`
		Password        Secret `json:"password"`
		Token           Secret `json:"token"`
		AccessKeyID     string `json:"accessKeyID"`
		SecretAccessKey Secret `json:"secretAccessKey"`
		Region          string `json:"awsRegion"`
		Service         string `json:"awsService"`
	} `json:"credentials"`
}

// parseRkt reads a file of rkt's credentials. The error matches [acproxy.ErrInvalid], and has nothing of what is secret in it.
func parseRkt(content []byte) ([]Credential, error) {
	var a rktAuth
	if err := json.NewDecoder(bytes.NewReader(content)).Decode(&a); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return nil, acproxy.Invalid("it is not JSON: byte %d can't be there", syntax.Offset)
		}
		return nil, acproxy.Invalid("it is not JSON as rkt has it for credentials")
	}
	if a.Kind != "auth" {
		return nil, nil
	}
	if a.Version != "v1" {
		return nil, acproxy.Invalid("rktVersion is %.20q, and v1 is known", a.Version)
	}
	c := Credential{User: a.Credentials.User}
	secret := a.Credentials.Password
	switch a.Type {
	case "basic":
		c.Type = Basic
		if c.User == "" || secret == "" {
			return nil, acproxy.Invalid("basic credentials have user and password, and one of them is missing or empty")
		}
	case "oauth":
		c.Type, secret = Bearer, a.Credentials.Token
		if secret == "" {
			return nil, acproxy.Invalid("oauth credentials have a token, and it is missing or empty")
		}
	case "aws":
		c.Type, c.User, secret, c.Region, c.Service = AWS, a.Credentials.AccessKeyID, a.Credentials.SecretAccessKey, a.Credentials.Region, a.Credentials.Service
		if c.User == "" || secret == "" {
			return nil, acproxy.Invalid("aws credentials have accessKeyID and secretAccessKey, and one of them is missing or empty")
		}
	default:
		return nil, acproxy.Invalid("the type %.20q is not basic, oauth or aws", a.Type)
	}
	c.Secret = func() (Secret, error) { return secret, nil }
	if len(a.Domains) == 0 {
		return nil, acproxy.Invalid("there are no domains that it is for")
	}
	var all []Credential
	for _, domain := range a.Domains {
		host := NormalHost(domain)
		if host == "" || strings.ContainsAny(host, "/@ ") {
			return nil, acproxy.Invalid("%.100q is not a host", domain)
		}
		if slices.ContainsFunc(all, func(c Credential) bool { return c.Host == host }) {
			return nil, acproxy.Invalid("the domain %s is there twice", host)
		}
		c.Host = host
		all = append(all, c)
	}
	return all, nil
}

// NormalHost returns a host as [Credential.Host] has it.
func NormalHost(host string) string { return strings.TrimSuffix(strings.ToLower(host), ":443") }

// FromFile returns the secret that a file holds, without a line break at its end. The file is read again when it has changed.
func FromFile(path string) (func() (Secret, error), error) {
	file, err := reread.Open([]string{path}, func() (Secret, error) {
		content, err := readSmall(path)
		if err != nil {
			return "", err
		}
		secret := strings.TrimRight(string(content), "\r\n")
		if secret == "" || strings.ContainsAny(secret, "\r\n") {
			return "", acproxy.Invalid("%s has to hold one line, which is the secret", path)
		}
		return Secret(secret), nil
	}, nil)
	if err != nil {
		return nil, err
	}
	return func() (Secret, error) { return file.Get(), nil }, nil
}

// FromEnvironment returns the secret that a variable of the environment holds. One that isn't set is an error.
func FromEnvironment(name string) (func() (Secret, error), error) {
	secret := os.Getenv(name)
	if secret == "" {
		return nil, acproxy.Invalid("the variable %s of the environment is not set, or empty", name)
	}
	return func() (Secret, error) { return Secret(secret), nil }, nil
}
