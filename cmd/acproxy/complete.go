package main

import (
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/trust"
)

// maxCompletions bounds how many images a shell is told of: more than anybody reads, and few enough to be there at once.
const maxCompletions = 1000

// completeArguments says what shells offer for the arguments and flags of every command: what is held and trusted here where that is what is meant, and
// files only where a file is.
func (o *options) completeArguments(root *cobra.Command) {
	arguments := map[string]cobra.CompletionFunc{
		"images show":   o.completeImages,
		"pin":           o.completeImages,
		"unpin":         o.completeImages,
		"discover":      o.completeNames,
		"trust check":   o.completeNames,
		"trust refresh": o.completeNames,
		"trust show":    o.completeKeys,
		"trust rm":      o.completeKeys,
		"trust mask":    o.completeKeys,
		"trust unmask":  o.completeKeys,
		"token revoke":  o.completeTokens,
		"trust add":     cobra.FixedCompletions([]cobra.Completion{"asc", "gpg", "pub"}, cobra.ShellCompDirectiveFilterFileExt),
		"verify":        cobra.FixedCompletions([]cobra.Completion{"aci"}, cobra.ShellCompDirectiveFilterFileExt),
		"man":           cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs),
	}
	// cobra adds its command when it runs, unless it is there: then what can't be understood would not be a usage error like any other.
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Args = args(cobra.NoArgs)
		for _, shell := range completion.Commands() {
			shell.Args = args(cobra.NoArgs)
		}
	}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.ValidArgsFunction = arguments[strings.TrimPrefix(cmd.CommandPath(), root.Name()+" ")]
		if cmd.ValidArgsFunction == nil {
			cmd.ValidArgsFunction = cobra.NoFileCompletions
		}
		for name, complete := range map[string]cobra.CompletionFunc{"prefix": o.completeNames, "fingerprint": o.completeKeys} {
			if cmd.LocalNonPersistentFlags().Lookup(name) != nil {
				must(cmd.RegisterFlagCompletionFunc(name, complete))
			}
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(root)
	must(root.MarkPersistentFlagFilename("config", "yaml", "yml"))
	must(root.MarkPersistentFlagDirname("data-dir"))
}

// must is for what fails only for a flag that isn't there.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// held returns some of the images of the running server. Shells wait for it, so nothing is said without one: opening the store takes longer.
func (o *options) held() []cache.Record {
	cfg, err := o.load()
	if err != nil {
		return nil
	}
	server, err := admin.Dial(cfg.Admin.Socket)
	if err != nil {
		return nil
	}
	var all []cache.Record
	for after, more := "", true; more && len(all) < maxCompletions; more = after != "" {
		page, next, err := server.Images(cache.Filter{}, after, listPage)
		if err != nil {
			break
		}
		all, after = append(all, page...), next
	}
	return all
}

func (o *options) completeImages(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, rec := range o.held() {
		out = append(out, cobra.CompletionWithDesc(rec.ImageID.String(), recordRef(rec)))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

func (o *options) completeNames(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := make(map[string]bool)
	for _, rec := range o.held() {
		names[rec.Name] = true
	}
	for _, k := range o.trusted() {
		if k.Prefix != "" {
			names[k.Prefix] = true
		}
	}
	return slices.Sorted(maps.Keys(names)), cobra.ShellCompDirectiveNoFileComp
}

func (o *options) completeKeys(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, k := range o.trusted() {
		out = append(out, cobra.CompletionWithDesc(string(k.Fingerprint), prefixText(k.Prefix)+" "+strings.Join(k.UserIDs, ", ")))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// trusted returns the keys that are trusted here.
func (o *options) trusted() []trust.Key {
	cfg, err := o.load()
	if err != nil {
		return nil
	}
	keyring, err := trust.Load(trustDirs(cfg))
	if err != nil {
		return nil
	}
	return keyring.All()
}

func (o *options) completeTokens(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	cfg, err := o.load()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	tokens, err := access.OpenTokens(cfg.Access.TokensFile, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, token := range tokens.List() {
		out = append(out, cobra.CompletionWithDesc(token.ID, token.Name))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
