package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

func newVerify(o *options) *cobra.Command {
	var signatureFile string
	cmd := &cobra.Command{
		Use:   "verify FILE.aci",
		Short: "Decide about an image file as the server would",
		Long: `verify reads an image file, checks its tar and its manifest, and decides whether a key that is trusted for the manifest's name signed it, by the
keys and the policy of this acproxy. The signature is FILE.aci.asc unless --signature names another. It exits 0 only if the image is accepted.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			return verifyFile(cmd.OutOrStdout(), cfg, args[0], signatureFile)
		},
	}
	cmd.Flags().StringVar(&signatureFile, "signature", "", "the signature (default FILE.aci.asc)")
	return cmd
}

func verifyFile(w io.Writer, cfg *config.Config, imageFile, signatureFile string) error {
	signature, err := readSignature(imageFile, signatureFile)
	if err != nil {
		return err
	}
	keyring, err := trust.Load(trustDirs(cfg))
	if err != nil {
		return err
	}
	image, err := os.Open(imageFile)
	if err != nil {
		return err
	}
	defer image.Close()
	read := io.Reader(image)
	var hasher *trust.Hasher
	if signature != nil {
		if hasher, err = trust.NewHasher(signature); err != nil {
			return fmt.Errorf("%s: %w", imageFile, err)
		}
		read = io.TeeReader(image, hasher)
	}
	found, err := aci.Inspect(read, limits(cfg), func(aci.Manifest) error { return nil })
	if err != nil {
		return fmt.Errorf("%s: %w", imageFile, err)
	}
	// The inspection may end before the file does; the signature is over all of it.
	if _, err := io.Copy(io.Discard, read); err != nil {
		return err
	}
	var hashed trust.Hashed
	if hasher != nil {
		if hashed, err = hasher.Hashed(); err != nil {
			return err
		}
	}
	name := found.Manifest.Name
	accepted, err := keyring.Judge(trust.Question{
		Name: name, Signature: signature, Hashed: hashed, Policy: trustPolicy(cfg.PublisherFor(name)), Now: time.Now(),
	})
	p := newPrinter(w)
	p.printf("image      %s\nlabels     %s\nimage ID   %v\nformat     %s, %s of tar\n", name, labelsText(found.Manifest.Labels), found.ID, found.Compression, bytesText(found.Size))
	for _, problem := range keyring.Problems() {
		p.printf("key file   skipped: %v\n", problem)
	}
	if err != nil {
		p.printf("verdict    REFUSED\n")
		return errors.Join(err, p.err)
	}
	p.printf("verdict    %v\n", accepted.Outcome)
	for _, s := range accepted.Signers {
		p.printf("signed by  %s %s, %s, %s, trusted for %s\n", s.Fingerprint, s.UserID, s.Algorithm, s.Signed.UTC().Format(time.RFC3339), prefixText(s.Prefix))
	}
	if accepted.RktWarning != "" {
		p.printf("warning    %s\n", accepted.RktWarning)
	}
	return p.err
}

// readSignature returns the signature beside an image, nil if there is none and none was named.
func readSignature(imageFile, signatureFile string) ([]byte, error) {
	named := signatureFile != ""
	if !named {
		signatureFile = imageFile + ".asc"
	}
	f, err := os.Open(signatureFile)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	signature, err := io.ReadAll(io.LimitReader(f, trust.MaxSignature+1))
	if err != nil {
		return nil, err
	}
	if len(signature) > trust.MaxSignature {
		return nil, fmt.Errorf("%s is longer than %d bytes: that is no signature", signatureFile, trust.MaxSignature)
	}
	return signature, nil
}

func prefixText(prefix string) string {
	if prefix == "" {
		return "every name"
	}
	return prefix
}
