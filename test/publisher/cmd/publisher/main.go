// Command publisher runs the test publisher by hand, to try a proxy, rkt or curl against it. Nothing it serves is real.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("publisher", flag.ContinueOnError)
	flags.SetOutput(stderr)
	listen := flags.String("listen", "127.0.0.1:8443", "address of the TLS listener")
	plain := flags.String("http", "127.0.0.1:8480", "address of the plain http listener")
	dir := flags.String("dir", "", "publish the *.aci of this directory, each with the .aci.asc beside it; without it, images made for the occasion")
	caFile := flags.String("ca", "", "write the CA's certificate to this file")
	var faults []func(*publisher.Publisher)
	flags.Func("fault", "misbehave on requests: '[METHOD] HOST/PATH WORD...', with * for any text in the second; may be given several times", func(text string) error {
		put, err := parseFault(text)
		faults = append(faults, put)
		return err
	})
	flags.Func("tls-fault", "misbehave on TLS connections: 'HOST WORD...'; may be given several times", func(text string) error {
		host, words, _ := strings.Cut(strings.TrimSpace(text), " ")
		f, err := publisher.ParseConnFault(words)
		faults = append(faults, func(p *publisher.Publisher) { p.MisbehaveTLS(host, f) })
		return err
	})
	flags.Usage = func() {
		fmt.Fprintf(stderr, "publisher publishes appc images for a try, under any host name, with certificates of its own CA.\n\nUsage: publisher [flags]\n\n")
		flags.PrintDefaults()
		fmt.Fprintf(stderr, "\nThe words of -fault are\n  %s\nand those of -tls-fault\n  %s\nwhich the types Fault and ConnFault of package test/publisher explain. For example\n"+
			"  -fault 'storage.example.com/*.aci truncate-after=1000 times=1' -tls-fault 'example.com expired'\n",
			strings.Join(publisher.FaultWords(), "\n  "), strings.Join(publisher.ConnFaultWords(), "\n  "))
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "publisher takes no arguments, only flags: %q\n", flags.Args())
		return 2
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupted)
	if err := publish(stdout, *listen, *plain, *dir, *caFile, faults, interrupted); err != nil {
		fmt.Fprintln(stderr, "publisher:", err)
		return 1
	}
	return 0
}

// parseFault reads what -fault is given, and returns what puts it into effect.
func parseFault(text string) (func(*publisher.Publisher), error) {
	pattern, words, _ := strings.Cut(strings.TrimSpace(text), " ")
	method := ""
	if pattern != "" && strings.Trim(pattern, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == "" {
		method = pattern
		pattern, words, _ = strings.Cut(strings.TrimLeft(words, " "), " ")
	}
	f, err := publisher.ParseFault(words)
	match := publisher.URL(pattern)
	if method != "" {
		match = publisher.Method(method, match)
	}
	return func(p *publisher.Publisher) { p.Misbehave(match, f) }, err
}

func publish(stdout io.Writer, listen, plain, dir, caFile string, faults []func(*publisher.Publisher), until <-chan os.Signal) (err error) {
	p, err := publisher.Start(publisher.Options{Listen: listen, ListenHTTP: plain})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	if caFile != "" {
		if err := os.WriteFile(caFile, p.CAPEM(), 0o644); err != nil {
			return err
		}
	}
	var images []image
	if dir != "" {
		images, err = addDirectory(p, dir)
	} else {
		images, err = addDemo(p)
	}
	if err != nil {
		return err
	}
	for _, put := range faults {
		put(p)
	}
	tell(stdout, p, images, caFile)
	<-until
	fmt.Fprintln(stdout)
	for _, r := range p.Requests() {
		fmt.Fprintln(stdout, r)
	}
	return nil
}

// image is one that is published, and what there is to say of it.
type image struct {
	name, version, note string
	at                  publisher.Published
}

func addDirectory(p *publisher.Publisher, dir string) ([]image, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.aci"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s holds no *.aci", dir)
	}
	var images []image
	for _, file := range files {
		im, err := addFile(p, file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		images = append(images, im)
	}
	return images, nil
}

func addFile(p *publisher.Publisher, file string) (image, error) {
	f, err := os.Open(file)
	if err != nil {
		return image{}, err
	}
	defer f.Close()
	m, err := acitest.Manifest(f)
	if err != nil {
		return image{}, err
	}
	fi, err := f.Stat()
	if err != nil {
		return image{}, err
	}
	note := "signed"
	signature, err := os.ReadFile(file + ".asc")
	if errors.Is(err, fs.ErrNotExist) {
		note, err = "unsigned", nil
	}
	if err != nil {
		return image{}, err
	}
	labels := acitest.Labels(m.Labels)
	at, err := p.Add(publisher.Image{Name: m.Name.String(), Labels: labels, File: file, Signature: signature, LastModified: fi.ModTime()})
	return image{m.Name.String(), labels["version"], note, at}, err
}

// addDemo publishes one image of every kind that a proxy has to tell apart.
func addDemo(p *publisher.Publisher) ([]image, error) {
	key, err := trusttest.NewKey(trusttest.Options{Name: "Example publisher"})
	if err != nil {
		return nil, err
	}
	stranger, err := trusttest.NewKey(trusttest.Options{Name: "Somebody else"})
	if err != nil {
		return nil, err
	}
	p.AddKey("example.com", key.Armored())
	bz, bzSpec := acitest.Bzip2()
	labels := map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"}
	files := map[string]string{"etc/motd": "hello\n"}
	var images []image
	for _, d := range []struct {
		note string
		spec acitest.Spec
		blob []byte // made of spec if nil
		by   *trusttest.Key
		flip bool
	}{
		{"signed, small", acitest.Spec{Name: "example.com/app", Labels: labels, Files: files}, nil, key, false},
		{"signed, 110 MiB", acitest.Spec{Name: "example.com/big", Labels: labels, RootfsSize: 110 << 20}, nil, key, false},
		{"signed, needs example.com/app", acitest.Spec{Name: "example.com/web", Labels: labels, Dependencies: []acitest.Dependency{{Name: "example.com/app", Labels: labels}}}, nil, key, false},
		{"signed, xz", acitest.Spec{Name: "example.com/xz", Labels: labels, Files: files, Compression: acitest.XZ}, nil, key, false},
		{"signed, bzip2", bzSpec, bz, key, false},
		{"signed, noarch", acitest.Spec{Name: "example.com/noarch", Labels: map[string]string{"version": "1.0.0"}, Files: files}, nil, key, false},
		{"signed, then changed", acitest.Spec{Name: "example.com/tampered", Labels: labels, Files: files}, nil, key, true},
		{"signed by a stranger", acitest.Spec{Name: "example.com/stranger", Labels: labels, Files: files}, nil, stranger, false},
		{"unsigned", acitest.Spec{Name: "example.com/unsigned", Labels: labels, Files: files}, nil, nil, false},
	} {
		if d.blob == nil {
			if d.blob, err = acitest.Build(d.spec); err != nil {
				return nil, err
			}
		}
		im := publisher.Image{Name: d.spec.Name, Labels: d.spec.Labels, ACI: d.blob}
		if d.by != nil {
			if im.Signature, err = d.by.Sign(bytes.NewReader(d.blob), trusttest.SignOptions{}); err != nil {
				return nil, err
			}
		}
		if d.flip {
			im.ACI = bytes.Clone(d.blob)
			im.ACI[len(im.ACI)/2] ^= 1
		}
		at, err := p.Add(im)
		if err != nil {
			return nil, err
		}
		images = append(images, image{d.spec.Name, d.spec.Labels["version"], d.note, at})
	}
	return images, nil
}

func tell(w io.Writer, p *publisher.Publisher, images []image, caFile string) {
	if caFile == "" {
		fmt.Fprintf(w, "%s\nThe certificate above is the CA's; -ca FILE writes it to a file, which the commands below need.\n", p.CAPEM())
		caFile = "FILE"
	}
	_, port, _ := net.SplitHostPort(p.Addr())
	fmt.Fprintf(w, "\nAny host name is answered: TLS at %s, plain http at %s.\n\n", p.Addr(), p.HTTPAddr())
	var hosts []string
	for _, im := range images {
		fmt.Fprintf(w, "  %-24s %-8s %s\n", im.name, im.version, im.note)
		host, _, _ := strings.Cut(im.name, "/")
		hosts = append(hosts, host, "storage."+host)
	}
	slices.Sort(hosts)
	hosts = slices.Compact(hosts)
	connect := fmt.Sprintf("curl --cacert %s --connect-to ::%s", caFile, p.Addr())
	fmt.Fprintf(w, "\nHosts: %s\n\n  %s 'https://%s?ac-discovery=1'\n", strings.Join(hosts, ", "), connect, images[0].name)
	fmt.Fprintf(w, "  %s %s\n  %s -o image.aci %s\n", connect, images[0].at.SignatureURL, connect, images[0].at.URL)
	fmt.Fprintf(w, "\nA host that resolves to this machine works too, with :%s after it. Ctrl-C ends it and prints what was asked.\n", port)
}
