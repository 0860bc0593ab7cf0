package access

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/crypto/bcrypt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/reread"
)

// Users are the users of a file as Apache's htpasswd -B writes it: a line of user:hash for each, with hashes by bcrypt. It is read again when it has
// changed; one that can't be read then is told to the log, and what it said before goes on counting.
type Users struct {
	file *reread.Files[map[string][]byte]
}

// OpenUsers reads a file of users. A file that isn't there, or a line of it that isn't as it should be, is an error with the line's number.
func OpenUsers(path string, log *slog.Logger) (*Users, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	file, err := reread.Open([]string{path}, func() (map[string][]byte, error) {
		content, err := readIfThere(path)
		if err != nil {
			return nil, err
		}
		return parseUsers(path, content)
	}, func(err error) {
		log.Error("the file of users has changed and can't be read; the users are those that it had before", "err", err)
	})
	return &Users{file}, err
}

// Reload reads the file again, now.
func (u *Users) Reload() error { return u.file.Reload() }

// hash returns the hash of a user's password, nil if there is no such user.
func (u *Users) hash(user string) []byte {
	if u == nil {
		return nil
	}
	return u.file.Get()[user]
}

// some returns a hash of a user, whoever it is.
func (u *Users) some() []byte {
	if u != nil {
		for _, hash := range u.file.Get() {
			return hash
		}
	}
	return nobody
}

func parseUsers(path string, content []byte) (map[string][]byte, error) {
	users := make(map[string][]byte)
	for i, line := range strings.Split(string(content), "\n") {
		line = strings.TrimSuffix(line, "\r")
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at := fmt.Sprintf("%s:%d", path, i+1)
		user, hash, ok := strings.Cut(line, ":")
		if !ok {
			return nil, acproxy.Invalid("%s: this is not user:hash, as htpasswd -B writes it", at)
		}
		if err := CheckName(user); err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		if users[user] != nil {
			return nil, acproxy.Invalid("%s: the user %s is here twice", at, user)
		}
		if _, err := bcrypt.Cost([]byte(hash)); err != nil {
			return nil, acproxy.Invalid("%s: the hash of %s is not one by bcrypt, which alone is taken: write it with htpasswd -B", at, user)
		}
		users[user] = []byte(hash)
	}
	return users, nil
}

// maxFile bounds a file of users or tokens, in bytes.
const maxFile = 16 << 20

// readIfThere reads a file. One that isn't there is as good as an empty one.
func readIfThere(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(content) > maxFile:
		return nil, acproxy.Invalid("%s is longer than %d bytes", path, maxFile)
	}
	return content, nil
}
