package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"acproxy": main, "meddled-drill": meddledDrill})
}

// meddledDrill is acproxy drill with somebody who breaks what is promised: the images that are held disappear, and a damaged byte is mended in secret.
func meddledDrill() {
	d := &drill{out: newDrillPrinter(os.Stdout, false), only: os.Args[1:], meddle: func(scenario, dataDir string) error {
		blobs, err := filepath.Glob(filepath.Join(dataDir, "store", "blobs", "*", "*"))
		for _, blob := range blobs {
			switch {
			case filepath.Ext(blob) == ".json":
			case scenario == "corrupt-blob":
				err = errors.Join(err, flipByte(blob))
			default:
				err = errors.Join(err, os.Remove(blob))
			}
		}
		return err
	}}
	if err := d.run(context.Background(), os.Stderr); err != nil {
		if !isSilent(err) {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(exitFailed)
	}
}

// TestScript runs the scripts in testdata/script. Besides testscript's own commands they have:
//
//	key NAME [ALGORITHM | expired | revoked]   makes a key; NAME.asc is its public part, NAME-secret.asc both parts, $NAME its fingerprint
//	image FILE NAME VERSION [KEY]              makes an image file, and FILE.asc if there is a key to sign it
//	publisher start                            starts a publisher; publisher.yaml is a configuration that leads there
//	publisher add FILE NAME VERSION            has it publish an image file and the signature beside it
//	publisher key PREFIX NAME                  has it publish a key
//	publisher stop                             takes it down
//	serve CONFIG                               starts acproxy serve, and waits until it serves
//	get PATH                                   asks the server for a path and wants 200
//	inspected CONFIG                           waits until the image IDs of all that the server holds are known, which may come after their bytes
//	halt                                       stops the server (stop is a word of testscript: it ends the script)
//	exit CODE COMMAND…                         runs a command, which has to end with that exit code
//	flip FILE                                  changes one bit in the middle of a file
//	mode MODE FILE                             checks a file's permissions
//	digest NAME FILE                           makes $NAME the digest of a file
//	blob NAME FILE                             makes $NAME the place of an image file's bytes in the store under data
//	append FILE FROM                           adds the content of one file to the end of another
func TestScript(t *testing.T) {
	runScripts(t, func(name string) bool { return !strings.HasPrefix(name, "trust_") }, testscript.Params{
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"key": cmdKey, "image": cmdImage, "publisher": cmdPublisher, "serve": cmdServe, "get": cmdGet, "inspected": cmdInspected, "halt": cmdHalt,
			"digest": cmdDigest, "blob": cmdBlob, "append": cmdAppend, "exit": cmdExit, "flip": cmdFlip, "mode": cmdMode,
		},
	})
}

// TestTrustScripts runs the scripts about keys, testdata/script/trust_*.txtar, which have commands of their own.
func TestTrustScripts(t *testing.T) {
	runScripts(t, func(name string) bool { return strings.HasPrefix(name, "trust_") }, testscript.Params{Cmds: trustCommands()})
}

// runScripts runs the scripts in testdata/script with names that are asked for.
func runScripts(t *testing.T, wanted func(name string) bool, params testscript.Params) {
	t.Helper()
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if wanted(filepath.Base(file)) {
			params.Files = append(params.Files, file)
		}
	}
	if len(params.Files) == 0 {
		t.Fatal("there are no scripts")
	}
	params.Setup = func(env *testscript.Env) error {
		env.Values[stageKey{}] = &stage{keys: make(map[string]*trusttest.Key)}
		env.Setenv("XDG_DATA_HOME", filepath.Join(env.WorkDir, "home"))
		// Whom this machine trusts is nothing that a script may depend on.
		env.Setenv("SSL_CERT_FILE", os.DevNull)
		env.Setenv("SSL_CERT_DIR", os.DevNull)
		// A binary that looks for races sleeps for a second before it ends, unless it is told not to.
		env.Setenv("GORACE", "atexit_sleep_ms=20")
		return nil
	}
	testscript.Run(t, params)
}

type stageKey struct{}

// stage is what a script's commands work with.
type stage struct {
	keys      map[string]*trusttest.Key
	publisher *publisher.Publisher
	server    *exec.Cmd
	ended     chan struct{} // closed when the server is over
}

func stageOf(ts *testscript.TestScript) *stage { return ts.Value(stageKey{}).(*stage) }

// usage ends a script that uses one of its commands wrongly.
func usage(ts *testscript.TestScript, ok bool, text string) {
	if !ok {
		ts.Fatalf("usage: %s", text)
	}
}

func write(ts *testscript.TestScript, name string, content []byte) {
	ts.Check(os.WriteFile(ts.MkAbs(name), content, 0o600))
}

func cmdKey(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) >= 1 && len(args) <= 2, "key NAME [ALGORITHM | expired | revoked]")
	opts := trusttest.Options{Name: "Key " + args[0]}
	kind := ""
	if len(args) == 2 {
		kind = args[1]
	}
	switch kind {
	case "expired":
		opts.Created, opts.Expires = time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)
	case "", "revoked":
	default:
		opts.Algorithm = trusttest.Algorithm(kind)
	}
	key, err := trusttest.NewKey(opts)
	ts.Check(err)
	if kind == "revoked" {
		ts.Check(key.Revoke())
	}
	stageOf(ts).keys[args[0]] = key
	write(ts, args[0]+".asc", key.Armored())
	write(ts, args[0]+"-secret.asc", key.SecretArmored())
	ts.Setenv(args[0], key.Fingerprint())
}

func cmdDigest(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 2, "digest NAME FILE")
	ts.Setenv(args[0], acproxy.Digest(sha256.Sum256([]byte(ts.ReadFile(args[1])))).String())
}

func cmdBlob(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 2, "blob NAME FILE")
	digits := acproxy.Digest(sha256.Sum256([]byte(ts.ReadFile(args[1])))).Hex()
	ts.Setenv(args[0], filepath.Join("data", "store", "blobs", digits[:2], digits))
}

func cmdAppend(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 2, "append FILE FROM")
	write(ts, args[0], []byte(ts.ReadFile(args[0])+ts.ReadFile(args[1])))
}

func labelsOf(version string) map[string]string {
	return map[string]string{"version": version, "os": "linux", "arch": "amd64"}
}

func cmdImage(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) >= 3 && len(args) <= 4, "image FILE NAME VERSION [KEY]")
	image, err := acitest.Build(acitest.Spec{Name: args[1], Labels: labelsOf(args[2]), Files: map[string]string{"hello.txt": "hello\n"}})
	ts.Check(err)
	write(ts, args[0], image)
	if len(args) < 4 {
		return
	}
	key := stageOf(ts).keys[args[3]]
	if key == nil {
		ts.Fatalf("there is no key %s", args[3])
	}
	signature, err := key.Sign(bytes.NewReader(image), trusttest.SignOptions{})
	ts.Check(err)
	write(ts, args[0]+".asc", signature)
}

// publisherConfig leads to the publisher and nowhere else: nobody answers where names are looked up.
const publisherConfig = `data_dir: %[1]s
listen: [{address: "127.0.0.1:0", tls: none}]
dial:
  resolver: 127.0.0.1:1
  hosts: {example.com: %[2]q, storage.example.com: %[2]q}
log: {format: json}
publishers: [{prefix: example.com, ca_file: %[3]s}]
`

func cmdPublisher(ts *testscript.TestScript, neg bool, args []string) {
	s := stageOf(ts)
	const text = "publisher start | stop | add FILE NAME VERSION | key PREFIX NAME"
	usage(ts, !neg && len(args) >= 1 && (args[0] == "start" || s.publisher != nil), text)
	switch {
	case args[0] == "start" && len(args) == 1:
		p, err := publisher.Start(publisher.Options{})
		ts.Check(err)
		ts.Defer(func() { _ = p.Close() })
		s.publisher = p
		write(ts, "publisher-ca.pem", p.CAPEM())
		write(ts, "publisher.yaml", fmt.Appendf(nil, publisherConfig, ts.MkAbs("data"), p.Addr(), ts.MkAbs("publisher-ca.pem")))
	case args[0] == "stop" && len(args) == 1:
		s.publisher.Stop()
	case args[0] == "add" && len(args) == 4:
		image, err := os.ReadFile(ts.MkAbs(args[1]))
		ts.Check(err)
		signature, err := os.ReadFile(ts.MkAbs(args[1] + ".asc"))
		if !errors.Is(err, os.ErrNotExist) {
			ts.Check(err)
		}
		_, err = s.publisher.Add(publisher.Image{Name: args[2], Labels: labelsOf(args[3]), ACI: image, Signature: signature})
		ts.Check(err)
	case args[0] == "key" && len(args) == 3:
		s.publisher.AddKey(args[1], []byte(ts.ReadFile(args[2]+".asc")))
	default:
		usage(ts, false, text)
	}
}

func cmdServe(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 1, "serve CONFIG")
	s := stageOf(ts)
	cmd := exec.Command("acproxy", "serve", "--config", ts.MkAbs(args[0]))
	cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+os.DevNull, "SSL_CERT_DIR="+os.DevNull, "GORACE=atexit_sleep_ms=20", "HTTPS_PROXY=", "https_proxy=")
	stderr, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	s.server, s.ended = cmd, make(chan struct{})
	serving := make(chan string, 1)
	var log bytes.Buffer
	// Ends with the server, which the script or its end stops; both wait for it.
	go func() {
		defer close(s.ended)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			log.Write(append(lines.Bytes(), '\n'))
			var line struct {
				Msg       string
				Addresses []string
			}
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "serving" && len(line.Addresses) > 0 {
				serving <- line.Addresses[0]
			}
		}
		_ = cmd.Wait() // how it ended is in ProcessState
	}()
	ts.Defer(func() {
		_ = cmd.Process.Kill()
		<-s.ended
	})
	select {
	case url := <-serving:
		ts.Setenv("SERVER", url)
	case <-s.ended:
		ts.Fatalf("the server ended: %v\n%s", cmd.ProcessState, log.String())
	case <-time.After(time.Minute):
		ts.Fatalf("the server doesn't serve")
	}
}

func cmdGet(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, len(args) == 1, "[!] get PATH")
	resp, err := http.Get(ts.Getenv("SERVER") + args[0])
	ts.Check(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if ok := err == nil && resp.StatusCode == http.StatusOK; ok == neg {
		ts.Fatalf("%s: %s, %v\n%.1000s", args[0], resp.Status, err, body)
	}
}

func cmdInspected(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 1, "inspected CONFIG")
	waiting := regexp.MustCompile(`"inspected": ?false`)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		ts.Check(ts.Exec("acproxy", "images", "--json", "--config", args[0]))
		out := ts.ReadFile("stdout")
		if !waiting.MatchString(out) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("not inspected yet: %s", out)
		}
	}
}

func cmdHalt(ts *testscript.TestScript, neg bool, args []string) {
	s := stageOf(ts)
	usage(ts, !neg && len(args) == 0 && s.server != nil, "halt")
	ts.Check(s.server.Process.Signal(syscall.SIGTERM))
	<-s.ended
	if code := s.server.ProcessState.ExitCode(); code != 0 {
		ts.Fatalf("the server ended with %d", code)
	}
}

func cmdExit(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) >= 2, "exit CODE COMMAND…")
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	code := 0
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	default:
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

func cmdFlip(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 1, "flip FILE")
	content := []byte(ts.ReadFile(args[0]))
	content[len(content)/2] ^= 1
	write(ts, args[0], content)
}

func cmdMode(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, !neg && len(args) == 2, "mode MODE FILE")
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// TestHelp holds every command's help against its flags.
func TestHelp(t *testing.T) {
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
			if code := run(args, &stdout, &stderr); code != exitOK || stderr.Len() > 0 {
				t.Errorf("run(%q) = %d, standard error %q", args, code, stderr.String())
			}
			check := func(f *pflag.Flag) {
				if f.Hidden {
					return
				}
				if f.Usage == "" || !strings.Contains(stdout.String(), "--"+f.Name) {
					t.Errorf("the help doesn't tell of --%s:\n%s", f.Name, stdout.String())
				}
			}
			cmd.LocalFlags().VisitAll(check)
			cmd.InheritedFlags().VisitAll(check)
			for _, sub := range cmd.Commands() {
				if sub.IsAvailableCommand() && !strings.Contains(stdout.String(), sub.Short) {
					t.Errorf("the help doesn't tell of the command %s", sub.Name())
				}
			}
			if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
				t.Errorf("the short description is %q: want a phrase without a full stop", cmd.Short)
			}
		})
		for _, sub := range cmd.Commands() {
			if sub.Name() != "help" && sub.Name() != "completion" {
				walk(sub)
			}
		}
	}
	walk(newRoot())
}
