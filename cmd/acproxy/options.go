package main

import (
	"os"
	"path/filepath"

	"github.com/acproxy/acproxy/internal/config"
)

const defaultDataDirText = "/var/lib/acproxy for root, $XDG_DATA_HOME/acproxy for others"

// options are the flags that every command has.
type options struct {
	dataDir    string
	configFile string
}

// load returns the configuration with every directory filled in.
func (o *options) load() (*config.Config, error) {
	cfg := config.Default()
	if o.configFile != "" {
		loaded, err := config.Load(o.configFile)
		if err != nil {
			return nil, err
		}
		cfg = *loaded
	}
	if o.dataDir != "" {
		cfg.DataDir = o.dataDir
	}
	if err := fillDirs(&cfg); err != nil {
		return nil, err
	}
	return &cfg, nil
}

// fillDirs gives every path that was left open its place under the data directory.
func fillDirs(cfg *config.Config) error {
	if cfg.DataDir == "" {
		dir, err := defaultDataDir()
		if err != nil {
			return err
		}
		cfg.DataDir = dir
	}
	for _, p := range []struct {
		path *string
		name string
	}{
		{&cfg.CA.Dir, "ca"}, {&cfg.ACME.Dir, "acme"}, {&cfg.Trust.LocalDir, "trustedkeys"}, {&cfg.Admin.Socket, "admin.sock"}, {&cfg.Audit.File, "audit.log"}, {&cfg.Access.TokensFile, "tokens"},
	} {
		if *p.path == "" {
			*p.path = filepath.Join(cfg.DataDir, p.name)
		}
	}
	return nil
}

func defaultDataDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/lib/acproxy", nil
	}
	// The XDG base directory specification: a relative path is not valid and counts as unset.
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "acproxy"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", usagef("there is no home directory to keep things in: name one with --data-dir (%w)", err)
	}
	return filepath.Join(home, ".local", "share", "acproxy"), nil
}

// storeDir is where the image store lies.
func storeDir(cfg *config.Config) string { return filepath.Join(cfg.DataDir, "store") }
