package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// scriptTrust is what the commands of one script share.
type scriptTrust struct {
	keys      map[string]*trusttest.Key
	publisher *publisher.Publisher
}

// trustCommands returns the commands that scripts about trust need:
//
//	key NAME [rsa] [expired|expiring]   makes a key: NAME.asc, and its fingerprint as $NAME
//	revoke NAME                           revokes it, in NAME.asc
//	publisher                             starts a publisher of example.com: acproxy.yaml is the configuration that reaches it
//	publish-key PREFIX FILE…              publishes key files for a prefix, in place of those before
//	publish-page PATH PREFIX=URL…         sets a page with tags for keys
//	publish-file PATH FILE                serves a file at host and path
//	redirect PATH URL                     answers with a redirect
//	sign KEY NAME FILE                    makes an image of that name and signs it: FILE and FILE.asc
func trustCommands() map[string]func(*testscript.TestScript, bool, []string) {
	commands := map[string]func(*testscript.TestScript, *scriptTrust, []string){
		"key": scriptKey, "revoke": scriptRevoke, "publisher": scriptPublisher, "publish-key": scriptPublishKey, "publish-page": scriptPublishPage,
		"publish-file": scriptPublishFile, "redirect": scriptRedirect, "sign": scriptSign, "join": scriptJoin,
	}
	all := make(map[string]func(*testscript.TestScript, bool, []string))
	shared := make(chan map[*testscript.TestScript]*scriptTrust, 1)
	shared <- make(map[*testscript.TestScript]*scriptTrust)
	for name, run := range commands {
		all[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			if neg {
				ts.Fatalf("%s can't be expected to fail", name)
			}
			scripts := <-shared
			s := scripts[ts]
			if s == nil {
				s = &scriptTrust{keys: make(map[string]*trusttest.Key)}
				scripts[ts] = s
			}
			shared <- scripts
			run(ts, s, args)
		}
	}
	return all
}

func scriptKey(ts *testscript.TestScript, s *scriptTrust, args []string) {
	opts := trusttest.Options{Algorithm: trusttest.EdDSA, Name: args[0], Email: args[0] + "@example.com", Created: time.Now().Add(-48 * time.Hour)}
	for _, arg := range args[1:] {
		switch {
		case arg == "rsa":
			opts.Algorithm = trusttest.RSA
		case arg == "expired":
			opts.Expires = time.Now().Add(-time.Hour)
		case arg == "expiring":
			opts.Expires = time.Now().Add(10*24*time.Hour + time.Hour)
		default:
			ts.Fatalf("key: %s?", arg)
		}
	}
	key, err := trusttest.NewKey(opts)
	ts.Check(err)
	s.keys[args[0]] = key
	ts.Setenv(args[0], key.Fingerprint())
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".asc"), key.Armored(), 0o644))
}

func scriptRevoke(ts *testscript.TestScript, s *scriptTrust, args []string) {
	key := s.keys[args[0]]
	ts.Check(key.Revoke())
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".asc"), key.Armored(), 0o644))
}

func scriptPublisher(ts *testscript.TestScript, s *scriptTrust, _ []string) {
	p, err := publisher.Start(publisher.Options{})
	ts.Check(err)
	ts.Defer(func() { ts.Check(p.Close()) })
	s.publisher = p
	ts.Check(os.WriteFile(ts.MkAbs("publisher-ca.pem"), p.CAPEM(), 0o644))
	config := fmt.Sprintf(`dial:
  hosts:
    example.com: %q
    storage.example.com: %q
    example.com:80: %q
publishers:
- prefix: example.com
  ca_file: %s
  http: true
`, p.Addr(), p.Addr(), p.HTTPAddr(), ts.MkAbs("publisher-ca.pem"))
	ts.Check(os.WriteFile(ts.MkAbs("acproxy.yaml"), []byte(config), 0o644))
}

func scriptPublishKey(ts *testscript.TestScript, s *scriptTrust, args []string) {
	s.publisher.RemoveKeys(args[0])
	for _, file := range args[1:] {
		s.publisher.AddKey(args[0], []byte(ts.ReadFile(file)))
	}
}

func scriptPublishPage(_ *testscript.TestScript, s *scriptTrust, args []string) {
	page := publisher.Page{Path: args[0]}
	for _, arg := range args[1:] {
		prefix, url, _ := strings.Cut(arg, "=")
		page.Keys = append(page.Keys, publisher.Tag{Prefix: prefix, URL: url})
	}
	s.publisher.SetPage(page)
}

func scriptPublishFile(ts *testscript.TestScript, s *scriptTrust, args []string) {
	s.publisher.Serve(args[0], "application/pgp-keys", []byte(ts.ReadFile(args[1])))
}

// scriptJoin makes the first file of all the others: join FILE FROM…
func scriptJoin(ts *testscript.TestScript, _ *scriptTrust, args []string) {
	var all strings.Builder
	for _, from := range args[1:] {
		all.WriteString(ts.ReadFile(from))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(all.String()), 0o644))
}

func scriptRedirect(_ *testscript.TestScript, s *scriptTrust, args []string) {
	s.publisher.Misbehave(publisher.URL(args[0]), publisher.Fault{RedirectTo: args[1]})
}

func scriptSign(ts *testscript.TestScript, s *scriptTrust, args []string) {
	image, err := acitest.Build(acitest.Spec{Name: args[1], Labels: map[string]string{"version": "1.0.0"}})
	ts.Check(err)
	signature, err := s.keys[args[0]].Sign(bytes.NewReader(image), trusttest.SignOptions{})
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), image, 0o644))
	ts.Check(os.WriteFile(ts.MkAbs(args[2]+".asc"), signature, 0o644))
}
