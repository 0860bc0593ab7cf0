package main

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/config"
)

func newToken(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Manage the tokens that clients show who they are with",
		Long: `token manages bearer tokens. A client sends one as Authorization: Bearer TOKEN, or in the place of a password with its name as the user. Which images it
may have then, access.rules in the configuration says. A running server takes up changes within a second.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newTokenAdd(o), newTokenList(o), newTokenRevoke(o))
	return cmd
}

// openTokens opens the tokens that the configuration names.
func openTokens(o *options, stderr io.Writer) (*access.Tokens, error) {
	cfg, err := o.load()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Access.TokensFile), 0o750); err != nil {
		return nil, err
	}
	return access.OpenTokens(cfg.Access.TokensFile, slog.New(slog.NewTextHandler(stderr, nil)))
}

func newTokenAdd(o *options) *cobra.Command {
	var expires string
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a token for a client and print it",
		Long:  `add makes a token for the client NAME and prints it, once: what is kept of it is a hash.`,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			var until time.Time
			if expires != "" {
				after, err := config.ParseDuration(expires)
				if err != nil || after <= 0 {
					return usagef("--expires: %q is not a time to come, such as 24h or 90d", expires)
				}
				until = time.Now().Add(time.Duration(after))
			}
			tokens, err := openTokens(o, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			token, _, err := tokens.Add(names[0], until)
			if err != nil {
				return err
			}
			p := newPrinter(cmd.OutOrStdout())
			p.printf("%s\n", token)
			return p.err
		},
	}
	cmd.Flags().StringVar(&expires, "expires", "", "when it ends, from now on, such as 24h or 90d (default: never)")
	return cmd
}

func newTokenList(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the tokens that there are",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			tokens, err := openTokens(o, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			list := tokens.List()
			if asJSON {
				return printJSON(cmd.OutOrStdout(), append([]access.Token{}, list...))
			}
			p := newPrinter(cmd.OutOrStdout())
			if len(list) > 0 {
				t := p.table("ID", "CLIENT", "CREATED", "EXPIRES")
				for _, token := range list {
					t.row(token.ID, token.Name, timeText(token.Created), expiryText(token.Expires))
				}
				t.flush()
			}
			p.printf("%s\n", count(len(list), "token"))
			return p.err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newTokenRevoke(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke ID...",
		Short: "End tokens",
		Args:  args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, ids []string) error {
			tokens, err := openTokens(o, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return tokens.Revoke(ids...)
		},
	}
}
