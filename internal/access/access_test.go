package access

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/acproxy/acproxy"
)

// aWhile is after what time a changed file has been read again.
const aWhile = 1100 * time.Millisecond

func hashed(t testing.TB, password string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(hash)
}

func usersFile(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openTokens(t testing.TB) *Tokens {
	t.Helper()
	tokens, err := OpenTokens(filepath.Join(t.TempDir(), "tokens"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func reads(names ...string) map[Right][]string { return map[Right][]string{Read: names} }

func TestMayRead(t *testing.T) {
	rules := []Rule{
		{"", reads(Known)},
		{"example.com/open", reads(Anyone)},
		{"example.com/secret", reads("alice", "ci")},
		{"example.com/secret/most", reads("alice")},
		{"example.com/none", nil},
	}
	nobody, alice, bob := Identity{}, Identity{"alice", Basic}, Identity{"bob", Bearer}
	for _, tt := range []struct {
		what  string
		rules []Rule
		who   Identity
		name  string
		want  bool
	}{
		{"without rules, everybody everything", nil, nobody, "example.com/app", true},
		{"the rule for all names", rules, nobody, "example.com/app", false},
		{"known", rules, bob, "example.com/app", true},
		{"anyone", rules, nobody, "example.com/open/app", true},
		{"anyone, who is known", rules, bob, "example.com/open", true},
		{"by name", rules, alice, "example.com/secret/app", true},
		{"another name", rules, bob, "example.com/secret/app", false},
		{"by whole segments", rules, bob, "example.com/secretary", true},
		{"the longest prefix decides alone", rules, Identity{"ci", Bearer}, "example.com/secret/most/app", false},
		{"a rule that names nobody", rules, alice, "example.com/none", false},
		{"no rule covers it", rules[1:], alice, "example.org/app", false},
		{"a client called anyone is nobody's wildcard", []Rule{{"", reads("alice")}}, Identity{Anyone, Certificate}, "example.com/app", false},
	} {
		if got := New(Config{Rules: tt.rules}).May(tt.who, Read, tt.name); got != tt.want {
			t.Errorf("%s: May(%v, %s) = %v, want %v", tt.what, tt.who, tt.name, got, tt.want)
		}
	}
}

func TestPublic(t *testing.T) {
	read := func(names ...string) map[Right][]string { return map[Right][]string{Read: names} }
	for _, tt := range []struct {
		name  string
		rules []Rule
		want  bool
	}{
		{"no rules", nil, true},
		{"anyone", []Rule{{"", read(Anyone)}}, true},
		{"anyone, as administrators", []Rule{{"", map[Right][]string{Admin: {Anyone}}}}, true},
		{"anyone, everywhere", []Rule{{"", read(Anyone)}, {"example.com", read("alice", Anyone)}}, true},
		{"anyone, but for a prefix", []Rule{{"", read(Anyone)}, {"example.com/secret", read("alice")}}, false},
		{"anyone, for a prefix", []Rule{{"example.com", read(Anyone)}}, false},
		{"whoever is known", []Rule{{"", read(Known)}}, false},
	} {
		if got := New(Config{Rules: tt.rules}).Public(); got != tt.want {
			t.Errorf("%s: Public = %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestMayOtherThings(t *testing.T) {
	all := []Rule{
		{"", map[Right][]string{Read: {Anyone}, Pin: {"ci"}, Admin: {"root"}}},
		{"example.com/team", map[Right][]string{Read: {Known}, Pin: {Known}, Delete: {"lead"}}},
	}
	for _, tt := range []struct {
		what  string
		rules []Rule
		who   string
		right Right
		name  string
		want  bool
	}{
		{"without rules nobody changes anything", nil, "root", Pin, "example.com/app", false},
		{"without rules nobody administers", nil, "root", Admin, "", false},
		{"without rules anybody may look at the server", nil, "", Read, "", true},
		{"a right of one's own", all, "ci", Pin, "example.com/app", true},
		{"which is no other one", all, "ci", Delete, "example.com/app", false},
		{"nor for the server", all, "ci", Admin, "", false},
		{"who administers may do everything", all, "root", Delete, "example.com/app", true},
		{"and all of the server", all, "root", Admin, "", true},
		{"but where a longer prefix decides", all, "root", Delete, "example.com/team/app", false},
		{"known", all, "ci", Pin, "example.com/team/app", true},
		{"by name", all, "lead", Delete, "example.com/team/app", true},
		{"a rule for a prefix is none for the server", all[1:], "lead", Read, "", false},
	} {
		who := Identity{}
		if tt.who != "" {
			who = Identity{tt.who, Bearer}
		}
		if got := New(Config{Rules: tt.rules}).May(who, tt.right, tt.name); got != tt.want {
			t.Errorf("%s: May(%v, %s, %q) = %v, want %v", tt.what, who, tt.right, tt.name, got, tt.want)
		}
	}
}

func TestIdentify(t *testing.T) {
	users, err := OpenUsers(usersFile(t, "# people\nalice:"+hashed(t, "s3cret:with colon")+"\r\n\nbob:"+hashed(t, "")+"\n"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	tokens := openTokens(t)
	now := time.Now()
	token, _, err := tokens.Add("ci", time.Time{})
	late, _, lateErr := tokens.Add("late", now.Add(time.Hour))
	if err := errors.Join(err, lateErr); err != nil {
		t.Fatal(err)
	}
	g := New(Config{Users: users, Tokens: tokens, Now: func() time.Time { return now }})
	cert := func(cn string, dns ...string) []*x509.Certificate {
		return []*x509.Certificate{{Subject: pkix.Name{CommonName: cn}, DNSNames: dns}, {Subject: pkix.Name{CommonName: "the CA"}}}
	}
	for _, tt := range []struct {
		name    string
		shown   Credentials
		methods Method
		want    Identity
		wrong   bool
	}{
		{"nothing", Credentials{}, AllMethods, Identity{}, false},
		{"a password", Credentials{Authorization: basic("alice", "s3cret:with colon")}, AllMethods, Identity{"alice", Basic}, false},
		{"the same again", Credentials{Authorization: basic("alice", "s3cret:with colon")}, AllMethods, Identity{"alice", Basic}, false},
		{"an empty one", Credentials{Authorization: basic("bob", "")}, AllMethods, Identity{"bob", Basic}, false},
		{"another one's", Credentials{Authorization: basic("bob", "s3cret:with colon")}, AllMethods, Identity{}, true},
		{"a wrong one", Credentials{Authorization: basic("alice", "secret")}, AllMethods, Identity{}, true},
		{"of nobody", Credentials{Authorization: basic("eve", "s3cret")}, AllMethods, Identity{}, true},
		{"of anyone", Credentials{Authorization: basic(Anyone, "")}, AllMethods, Identity{}, true},
		{"no base64", Credentials{Authorization: "Basic %%%"}, AllMethods, Identity{}, true},
		{"where none is taken", Credentials{Authorization: basic("alice", "s3cret:with colon")}, Bearer, Identity{}, true},
		{"a token", Credentials{Authorization: "Bearer " + token}, AllMethods, Identity{"ci", Bearer}, false},
		{"by the scheme's name in another case", Credentials{Authorization: "bearer  " + token}, AllMethods, Identity{"ci", Bearer}, false},
		{"as a password", Credentials{Authorization: basic("ci", token)}, AllMethods, Identity{"ci", Bearer}, false},
		{"as somebody else's password", Credentials{Authorization: basic("alice", token)}, AllMethods, Identity{}, true},
		{"cut", Credentials{Authorization: "Bearer " + token[:len(token)-1]}, AllMethods, Identity{}, true},
		{"its ID alone", Credentials{Authorization: "Bearer " + token[:strings.LastIndexByte(token, '_')]}, AllMethods, Identity{}, true},
		{"one that will end", Credentials{Authorization: "Bearer " + late}, AllMethods, Identity{"late", Bearer}, false},
		{"another scheme", Credentials{Authorization: "Digest x"}, AllMethods, Identity{}, true},
		{"a certificate", Credentials{Certificates: cert("node1")}, AllMethods, Identity{"node1", Certificate}, false},
		{"one with a DNS name only", Credentials{Certificates: cert("", "node2.example.net")}, AllMethods, Identity{"node2.example.net", Certificate}, false},
		{"one without a name", Credentials{Certificates: cert("")}, AllMethods, Identity{}, true},
		{"one where none is taken", Credentials{Certificates: cert("node1")}, Basic, Identity{}, false},
		{"before a password", Credentials{Certificates: cert("node1"), Authorization: basic("bob", "")}, AllMethods, Identity{"node1", Certificate}, false},
	} {
		got, err := g.Identify(t.Context(), tt.shown, tt.methods)
		if got != tt.want || (err != nil) != tt.wrong {
			t.Errorf("%s: Identify = %v, %v; want %v, wrong: %v", tt.name, got, err, tt.want, tt.wrong)
		}
		if err != nil && (strings.Contains(err.Error(), token) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("%s: the error tells a secret: %v", tt.name, err)
		}
	}
	now = now.Add(2 * time.Hour)
	if got, err := g.Identify(t.Context(), Credentials{Authorization: "Bearer " + late}, AllMethods); got.Name != "" || err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end a token gives %v, %v", got, err)
	}
}

// TestNothingIsKnown: without files there are neither users nor tokens.
func TestNothingIsKnown(t *testing.T) {
	g := New(Config{})
	for _, shown := range []string{basic("alice", ""), "Bearer " + tokenPrefix + "x_y", basic("alice", tokenPrefix+"x_y")} {
		if got, err := g.Identify(t.Context(), Credentials{Authorization: shown}, AllMethods); got.Name != "" || err == nil {
			t.Errorf("Identify(%s) = %v, %v", shown, got, err)
		}
	}
}

// TestFilesAreReadAgain: a password that was changed counts at once, the old one no more, and a file that can't be read changes nothing.
func TestFilesAreReadAgain(t *testing.T) {
	path := usersFile(t, "alice:"+hashed(t, "one")+"\n")
	var log strings.Builder
	users, err := OpenUsers(path, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	g := New(Config{Users: users})
	knows := func(password string) bool {
		who, _ := g.Identify(t.Context(), Credentials{Authorization: basic("alice", password)}, AllMethods)
		return who.Name == "alice"
	}
	if !knows("one") || knows("two") {
		t.Fatal("the password is not one")
	}
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(aWhile)
	}
	write("alice:" + hashed(t, "two") + "\n")
	if knows("one") || !knows("two") {
		t.Error("the password that was changed doesn't count, or the old one still does")
	}
	write("alice:{SHA}nTw7WcNbnqwW+9gsWmxVsXlEZBc=\n")
	if !knows("two") || !strings.Contains(log.String(), "users:1") || !strings.Contains(log.String(), "htpasswd -B") {
		t.Errorf("a file that can't be read has changed something; the log says %s", log.String())
	}
	write("bob:" + hashed(t, "three") + "\n")
	if knows("two") {
		t.Error("a user that is there no more is still known")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	time.Sleep(aWhile)
	if who, _ := g.Identify(t.Context(), Credentials{Authorization: basic("bob", "three")}, AllMethods); who.Name != "" {
		t.Error("the file is gone, and its users are not")
	}
}

func TestUsersThatAreWrong(t *testing.T) {
	good := hashed(t, "x")
	for content, want := range map[string]string{
		"alice":                   "users:1: this is not user:hash",
		"\n\nalice:$apr1$abc$def": "users:3: the hash of alice is not one by bcrypt",
		"alice:" + good + "\nalice:" + good + "\n": "users:2: the user alice is here twice",
		"anyone:" + good:                      "users:1: a client can't be called anyone",
		"a b:" + good:                         "must not have spaces",
		":" + good:                            "1 to 255 bytes",
		strings.Repeat("x", 256) + ":" + good: "1 to 255 bytes",
		"alice:" + good + strings.Repeat("\n", maxFile): "longer than",
	} {
		if _, err := OpenUsers(usersFile(t, content), nil); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("%.40q: %v, want an ErrInvalid about %q", content, err, want)
		}
	}
	if _, err := OpenUsers(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestTokens(t *testing.T) {
	tokens := openTokens(t)
	path := tokens.path
	secret, token, err := tokens.Add("ci", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := tokens.find(secret); !ok || !strings.HasPrefix(secret, "acproxy_"+token.ID+"_") {
		t.Errorf("the token %s of %+v is not known", secret, token)
	}
	content, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(content), secret) || strings.Contains(string(content), secret[strings.LastIndexByte(secret, '_')+1:]) {
		t.Errorf("the file has the token in it: %v\n%s", err, content)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the file's mode is %v, %v", fi.Mode(), err)
	}
	// Another process.
	other, err := OpenTokens(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if got := other.List(); len(got) != 1 || got[0].ID != token.ID || got[0].Name != "ci" {
		t.Errorf("List = %+v", got)
	}
	if err := other.Revoke("nothing"); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Revoke of what isn't there = %v", err)
	}
	if err := other.Revoke(token.ID, "nothing"); !errors.Is(err, acproxy.ErrNotFound) || len(other.List()) != 1 {
		t.Errorf("Revoke of one that is there and one that isn't = %v, and %d are left", err, len(other.List()))
	}
	if err := other.Revoke(token.ID); err != nil {
		t.Fatal(err)
	}
	time.Sleep(aWhile)
	if _, ok := tokens.find(secret); ok {
		t.Error("a token that was revoked by somebody else still counts")
	}
	for _, name := range []string{"", "anyone", "known", "a b", "a:b", "a\nb"} {
		if _, _, err := tokens.Add(name, time.Time{}); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("Add(%q) = %v", name, err)
		}
	}
}

// TestTokensByMany: what several processes add at once is all there.
func TestTokensByMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	var adding sync.WaitGroup
	for i := range 8 {
		adding.Go(func() {
			tokens, err := OpenTokens(path, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			for j := range 5 {
				if _, _, err := tokens.Add(fmt.Sprintf("client-%d-%d", i, j), time.Time{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	adding.Wait()
	tokens, err := OpenTokens(path, slog.New(slog.DiscardHandler))
	if err != nil || len(tokens.List()) != 40 {
		t.Errorf("%d tokens are there, want 40: %v", len(tokens.List()), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(left) != 1 {
		t.Errorf("left over: %v", left)
	}
}

func FuzzTokens(f *testing.F) {
	f.Add("abc ci " + strings.Repeat("0", 64) + " 2026-01-01T00:00:00Z -\n")
	f.Add("# x\n\nabc ci " + strings.Repeat("f", 64) + " 2026-01-01T00:00:00Z 2027-01-01T00:00:00Z")
	f.Fuzz(func(t *testing.T, content string) {
		tokens, err := parseTokens("tokens", []byte(content))
		if err != nil {
			if !errors.Is(err, acproxy.ErrInvalid) {
				t.Fatalf("parseTokens = %v, want an ErrInvalid", err)
			}
			return
		}
		for id, token := range tokens {
			if token.ID != id || CheckName(token.Name) != nil {
				t.Errorf("%q stands for %+v", id, token)
			}
		}
	})
}
