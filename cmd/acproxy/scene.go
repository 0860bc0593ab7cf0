package main

import (
	"errors"
	"maps"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// sceneHost is where the images of demo and drill are published.
const sceneHost = "apps.example.com"

var sceneLabels = map[string]string{"version": "1.0.0", "os": "linux", "arch": "amd64"}

// scene is what demo and drill play on: a directory, and a publisher in this process with a key of its own.
type scene struct {
	dir       string
	publisher *publisher.Publisher
	key       *trusttest.Key
}

// start starts the publisher, without images. close ends it.
func (s *scene) start() (err error) {
	if s.publisher, err = publisher.Start(publisher.Options{}); err != nil {
		return err
	}
	if s.key, err = trusttest.NewKey(trusttest.Options{Name: "Demo Publisher", Email: "images@" + sceneHost}); err != nil {
		return err
	}
	s.publisher.AddKey(sceneHost, s.key.Armored())
	return os.WriteFile(s.caFile(), s.publisher.CAPEM(), 0o600)
}

func (s *scene) close() error {
	if s.publisher == nil {
		return nil
	}
	return s.publisher.Close()
}

func (s *scene) caFile() string { return filepath.Join(s.dir, "publisher-ca.pem") }

// configure returns a configuration that keeps everything in a directory, answers nodes at a free port, and leads to the publisher and nowhere else.
func (s *scene) configure(dataDir string) (*config.Config, error) {
	cfg := config.Default()
	cfg.DataDir = dataDir
	cfg.Listen = []config.Listen{{Address: "127.0.0.1:0", TLS: config.TLSNone, Proxy: true}}
	cfg.Admin.Listen = nil
	cfg.Dial.Hosts = map[string]string{sceneHost: s.publisher.Addr(), "storage." + sceneHost: s.publisher.Addr()}
	cfg.Publishers = []config.Publisher{{Prefix: sceneHost, CAFile: s.caFile()}}
	return &cfg, fillDirs(&cfg)
}

// image is one that is published.
type image struct {
	name   string
	spec   acitest.Spec
	signer *trusttest.Key // nil leaves it unsigned
	tamper bool
}

// publish makes images and their signatures, two at a time.
func (s *scene) publish(images []image) error {
	var group errgroup.Group
	group.SetLimit(2)
	for _, im := range images {
		group.Go(func() error { return s.publishOne(im) })
	}
	return group.Wait()
}

// published is where the bytes of an image are that was published.
func (s *scene) published(name string) string { return filepath.Join(s.dir, name+".aci") }

func (s *scene) publishOne(im image) error {
	im.spec.Name, im.spec.Labels = sceneHost+"/"+im.name, maps.Clone(sceneLabels)
	file := s.published(im.name)
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = acitest.Write(out, im.spec)
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	published := publisher.Image{Name: im.spec.Name, Labels: im.spec.Labels, File: file}
	if im.signer != nil {
		signed, err := os.Open(file)
		if err != nil {
			return err
		}
		published.Signature, err = im.signer.Sign(signed, trusttest.SignOptions{})
		if err = errors.Join(err, signed.Close()); err != nil {
			return err
		}
	}
	if im.tamper {
		if err := flipByte(file); err != nil {
			return err
		}
	}
	_, err = s.publisher.Add(published)
	return err
}

// flipByte changes one byte in the middle of a file.
func flipByte(file string) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		b := make([]byte, 1)
		if _, err = f.ReadAt(b, info.Size()/2); err == nil {
			b[0] ^= 0xff
			_, err = f.WriteAt(b, info.Size()/2)
		}
	}
	return errors.Join(err, f.Close())
}
