package access

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/reread"
)

// tokenPrefix begins every token, so that people and scanners know one when they see it.
const tokenPrefix = "acproxy_"

// A Token is what is known of a bearer token. The token itself is known to whoever it was given to, alone.
type Token struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"` // of the client
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"` // zero means never

	hash [sha256.Size]byte // of the token; it is random enough that nothing slower is called for
}

// Tokens are the bearer tokens of a file. It is read again when it has changed; one that can't be read then is told to the log, and what it said before
// goes on counting.
type Tokens struct {
	path string
	file *reread.Files[map[string]Token]
}

// OpenTokens reads a file of tokens. One that isn't there has none. A line of it that isn't as it should be is an error with the line's number.
func OpenTokens(path string, log *slog.Logger) (*Tokens, error) {
	file, err := reread.Open([]string{path}, func() (map[string]Token, error) {
		content, err := readIfThere(path)
		if err != nil {
			return nil, err
		}
		return parseTokens(path, content)
	}, func(err error) {
		log.Error("the file of tokens has changed and can't be read; the tokens are those that it had before", "err", err)
	})
	return &Tokens{path, file}, err
}

// Reload reads the file again, now.
func (t *Tokens) Reload() error { return t.file.Reload() }

// List returns all tokens, the oldest first.
func (t *Tokens) List() []Token {
	var list []Token
	for _, token := range t.file.Get() {
		list = append(list, token)
	}
	slices.SortFunc(list, func(a, b Token) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return list
}

// find returns what is known of a token.
func (t *Tokens) find(token string) (Token, bool) {
	if t == nil {
		return Token{}, false
	}
	id, _, _ := strings.Cut(strings.TrimPrefix(token, tokenPrefix), "_")
	known, ok := t.file.Get()[id]
	hash := sha256.Sum256([]byte(token))
	return known, ok && subtle.ConstantTimeCompare(hash[:], known.hash[:]) == 1
}

// Add makes a token for a client, and returns it with what is known of it. Expires is when it ends, zero for never.
func (t *Tokens) Add(name string, expires time.Time) (string, Token, error) {
	if err := CheckName(name); err != nil {
		return "", Token{}, err
	}
	token := Token{ID: strings.ToLower(rand.Text()[:10]), Name: name, Created: time.Now().UTC().Truncate(time.Second), Expires: expires.UTC().Truncate(time.Second)}
	if expires.IsZero() {
		token.Expires = time.Time{}
	}
	secret := tokenPrefix + token.ID + "_" + rand.Text()
	token.hash = sha256.Sum256([]byte(secret))
	err := t.change(func(tokens []Token) ([]Token, error) { return append(tokens, token), nil })
	return secret, token, err
}

// Revoke ends tokens, by their IDs. It returns an error matching [acproxy.ErrNotFound], and ends none, if one of them is not there.
func (t *Tokens) Revoke(ids ...string) error {
	return t.change(func(tokens []Token) ([]Token, error) {
		for _, id := range ids {
			i := slices.IndexFunc(tokens, func(token Token) bool { return token.ID == id })
			if i < 0 {
				return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-token", Detail: "there is no token " + id + "; acproxy token list shows them"}
			}
			tokens = slices.Delete(tokens, i, i+1)
		}
		return tokens, nil
	})
}

// change writes the file anew, while nobody else does.
func (t *Tokens) change(change func([]Token) ([]Token, error)) error {
	path := t.path
	lock, err := lockFile(path)
	if err != nil {
		return fmt.Errorf("locking %s: %w", path, err)
	}
	defer lock.Close()
	if err := t.file.Reload(); err != nil {
		return err
	}
	tokens, err := change(t.List())
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString("# Bearer tokens of acproxy: ID, client, SHA-256 of the token, created, expires. Written by acproxy token.\n")
	for _, token := range tokens {
		expires := "-"
		if !token.Expires.IsZero() {
			expires = token.Expires.Format(time.RFC3339)
		}
		fmt.Fprintf(&b, "%s %s %x %s %s\n", token.ID, token.Name, token.hash, token.Created.Format(time.RFC3339), expires)
	}
	if err := durable.WriteFile(nil, path, []byte(b.String()), 0o600); err != nil {
		return err
	}
	return t.file.Reload()
}

// lockFile opens a file, which is made if it isn't there, and keeps others from locking it until it is closed. It is the one that has the name now.
func lockFile(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		ours, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(ours, there) {
			return f, nil
		}
		// Somebody has put another file into its place in between.
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

func parseTokens(path string, content []byte) (map[string]Token, error) {
	tokens := make(map[string]Token)
	for i, line := range strings.Split(string(content), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		token, err := parseToken(line)
		if err == nil && tokens[token.ID].ID != "" {
			err = acproxy.Invalid("the token %s is here twice", token.ID)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, i+1, err)
		}
		tokens[token.ID] = token
	}
	return tokens, nil
}

func parseToken(line string) (Token, error) {
	fields := strings.Fields(line)
	if len(fields) != 5 {
		return Token{}, acproxy.Invalid("a token has 5 fields and this line %d: ID, client, SHA-256, created, expires", len(fields))
	}
	token := Token{ID: fields[0], Name: fields[1]}
	if err := CheckName(token.Name); err != nil {
		return Token{}, err
	}
	hash, err := hex.DecodeString(fields[2])
	if err != nil || len(hash) != len(token.hash) {
		return Token{}, acproxy.Invalid("%.80q is not a SHA-256 in hex", fields[2])
	}
	copy(token.hash[:], hash)
	if token.Created, err = time.Parse(time.RFC3339, fields[3]); err != nil {
		return Token{}, acproxy.Invalid("%.40q is not a time as in 2006-01-02T15:04:05Z", fields[3])
	}
	if fields[4] != "-" {
		if token.Expires, err = time.Parse(time.RFC3339, fields[4]); err != nil {
			return Token{}, acproxy.Invalid("%.40q is neither a time as in 2006-01-02T15:04:05Z nor -", fields[4])
		}
	}
	return token, nil
}
