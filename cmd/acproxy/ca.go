package main

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/localca"
)

func newCA(o *options) *cobra.Command {
	ca := &cobra.Command{
		Use:   "ca",
		Short: "Make and show the local certificate authority",
		Long: `The local certificate authority lets acproxy answer nodes under the names of image hosts, over TLS. Its certificate is valid for the hosts it
was made for and nothing else, so that installing it on a node gives this machine no power over other names.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	ca.AddCommand(newCAInit(o), newCAShow(o))
	return ca
}

func newCAInit(o *options) *cobra.Command {
	var hosts []string
	var validFor time.Duration
	var critical bool
	cmd := &cobra.Command{
		Use:   "init --host HOST [--host HOST …]",
		Short: "Make the local certificate authority for some image hosts",
		Long: `init makes the key (ECDSA P-256, mode 0600) and the certificate, name-constrained to the hosts given with --host, or to proxy.hosts of the
configuration. A host covers its subdomains.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			if len(hosts) == 0 {
				hosts = cfg.Proxy.Hosts
			}
			if len(hosts) == 0 {
				return usagef("for which image hosts? Name them with --host, or as proxy.hosts in the configuration")
			}
			made, err := localca.Init(cfg.CA.Dir, hosts, localca.Options{ValidFor: validFor, Critical: critical})
			if err != nil {
				return err
			}
			if err := showCA(cmd, made, cfg.CA.Dir); err != nil {
				return err
			}
			p := newPrinter(cmd.OutOrStdout())
			p.printf("\nA server that is running uses it after a restart.\n")
			return p.err
		},
	}
	cmd.Flags().StringSliceVar(&hosts, "host", nil, "image host that the authority may vouch for; may be given several times")
	cmd.Flags().DurationVar(&validFor, "valid-for", 0, "how long the certificate is valid (default ten years)")
	cmd.Flags().BoolVar(&critical, "critical", false, "mark the name constraints as critical; rkt's old builds then don't accept the certificate")
	return cmd
}

func newCAShow(o *options) *cobra.Command {
	var onlyPEM bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print the local certificate authority's certificate and how nodes install it",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			ca, err := localca.Load(cfg.CA.Dir)
			if errors.Is(err, fs.ErrNotExist) {
				return errors.New("there is no local CA in " + cfg.CA.Dir + "; make one with: acproxy ca init --host HOST")
			}
			if err != nil {
				return err
			}
			if onlyPEM {
				_, err := cmd.OutOrStdout().Write(ca.PEM())
				return err
			}
			return showCA(cmd, ca, cfg.CA.Dir)
		},
	}
	cmd.Flags().BoolVar(&onlyPEM, "pem", false, "print nothing but the certificate")
	return cmd
}

func showCA(cmd *cobra.Command, ca *localca.CA, dir string) error {
	p := newPrinter(cmd.OutOrStdout())
	hosts := ca.Hosts()
	slices.Sort(hosts)
	p.printf("hosts        %s\nvalid until  %s\nSHA-256      %s\nkept in      %s\n\n%s\n", strings.Join(hosts, ", "), ca.NotAfter().Format(time.DateOnly), ca.Fingerprint(), dir, ca.PEM())
	p.printf(`On each node, as root:

  acproxy ca show --pem > /usr/local/share/ca-certificates/acproxy.crt     # or: curl -o … http://ACPROXY:8080/.acproxy/ca.pem
  update-ca-certificates                                                   # Debian, Ubuntu, Flatcar
  # Fedora, RHEL: put it into /etc/pki/ca-trust/source/anchors/ and run update-ca-trust

Check the SHA-256 above against "openssl x509 -noout -fingerprint -sha256 -in FILE" if it went over a network you don't trust.

Then let the image hosts lead here, by DNS or /etc/hosts, to an acproxy that listens with tls: local-ca on port 443:

  echo "ACPROXY-ADDRESS %s" >> /etc/hosts

or make acproxy the nodes' HTTPS proxy:

  HTTPS_PROXY=http://ACPROXY-ADDRESS:8080 rkt fetch %s/IMAGE
`, strings.Join(hosts, " "), hosts[0])
	return p.err
}
