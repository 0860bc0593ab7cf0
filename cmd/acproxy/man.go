package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newMan makes the manual pages that packages ship. It is hidden: who has a package has the pages.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages, one for each command, into a directory",
		Long: `man writes a page for section 1 of the manual for each command. Their date is that of SOURCE_DATE_EPOCH, in seconds since 1970, else today's, so that
whoever builds them again gets the same bytes.`,
		Hidden: true,
		Args:   args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			date, err := sourceDate()
			if err != nil {
				return err
			}
			return writePages(cmd.Root(), args[0], date)
		},
	}
}

// sourceDate is the date that reproducible builds agree on: reproducible-builds.org/specs/source-date-epoch.
func sourceDate() (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return time.Now().UTC(), nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, usagef("SOURCE_DATE_EPOCH is %q, and not a number of seconds since 1970", text)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// writePages writes the pages of a command and of all below it.
func writePages(cmd *cobra.Command, dir string, date time.Time) error {
	name := filepath.Join(dir, pageName(cmd)+".1")
	if err := os.WriteFile(name, manPage(cmd, date), 0o644); err != nil {
		return err
	}
	for _, c := range shownCommands(cmd) {
		if err := writePages(c, dir, date); err != nil {
			return err
		}
	}
	return nil
}

// shownCommands returns the commands right below one that its help lists, without help itself.
func shownCommands(cmd *cobra.Command) []*cobra.Command {
	var out []*cobra.Command
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			out = append(out, c)
		}
	}
	return out
}

// pageName is what the page of a command is called: acproxy-trust-add.
func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manPage returns the manual page of one command, in the macros of man(7). What its help says is put where manual pages say it; cobra's own generator
// takes that for Markdown, which it isn't.
func manPage(cmd *cobra.Command, date time.Time) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, ".TH %s 1 %s \"acproxy %s\" \"acproxy manual\"\n", roff(strings.ToUpper(pageName(cmd))), date.Format(time.DateOnly), roff(buildVersion()))
	short := cmd.Short
	if first, rest, ok := strings.Cut(short, " "); ok && first != "An" {
		short = strings.ToLower(first) + " " + rest
	}
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(pageName(cmd)), roff(short))
	b.WriteString(".SH SYNOPSIS\n")
	flags := ""
	if cmd.HasAvailableFlags() {
		flags = " [\\fIflags\\fR]"
	}
	if below := shownCommands(cmd); len(below) > 0 {
		fmt.Fprintf(&b, "\\fB%s\\fR \\fIcommand\\fR%s\n", roff(cmd.CommandPath()), flags)
	} else {
		_, arguments, found := strings.Cut(cmd.Use, " ")
		if found {
			arguments = " " + arguments
		}
		fmt.Fprintf(&b, "\\fB%s\\fR%s%s\n", roff(cmd.CommandPath()), roff(arguments), flags)
	}
	b.WriteString(".SH DESCRIPTION\n")
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	writeText(&b, long)
	if below := shownCommands(cmd); len(below) > 0 {
		b.WriteString(".SH COMMANDS\n")
		for _, c := range below {
			fmt.Fprintf(&b, ".TP\n\\fB%s\\fR\n%s. See \\fB%s\\fR(1).\n", roff(c.Name()), roff(c.Short), roff(pageName(c)))
		}
	}
	writeFlags(&b, "OPTIONS", cmd.NonInheritedFlags())
	writeFlags(&b, "OPTIONS OF EVERY COMMAND", cmd.InheritedFlags())
	if cmd.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n")
		writeText(&b, cmd.Example)
	}
	b.WriteString(".SH EXIT STATUS\n0 if what was asked for was done, 1 if it could not be or the answer is no, 2 if it could not be understood.\n")
	if !cmd.HasParent() {
		b.WriteString(".SH FILES\n" +
			".TP\n\\fI/etc/acproxy/config.yaml\\fR\nThe configuration that packages bring, for the service. Commands read the one that \\fB\\-\\-config\\fR names.\n" +
			".TP\n\\fI/var/lib/acproxy\\fR\nWhat the service keeps.\n")
	}
	var also []string
	if cmd.HasParent() {
		also = append(also, pageName(cmd.Parent()))
	}
	for _, c := range shownCommands(cmd) {
		also = append(also, pageName(c))
	}
	b.WriteString(".SH SEE ALSO\n")
	for i, name := range also {
		end := ",\n"
		if i == len(also)-1 {
			end = "\n"
		}
		fmt.Fprintf(&b, ".BR %s (1)%s", roff(name), end)
	}
	return b.Bytes()
}

// writeText writes paragraphs. Lines that are indented stand as they are.
func writeText(b *bytes.Buffer, text string) {
	for i, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		lines := strings.Split(paragraph, "\n")
		for j, line := range lines {
			asIs, before := indented(line), j > 0 && indented(lines[j-1])
			switch {
			case asIs && !before:
				b.WriteString(".PP\n.in +4n\n.nf\n")
			case before && !asIs:
				b.WriteString(".fi\n.in\n.PP\n")
			case i > 0 && j == 0:
				b.WriteString(".PP\n")
			}
			fmt.Fprintf(b, "%s\n", roff(strings.TrimSpace(line)))
		}
		if indented(lines[len(lines)-1]) {
			b.WriteString(".fi\n.in\n")
		}
	}
}

func indented(line string) bool { return strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") }

func writeFlags(b *bytes.Buffer, title string, flags *pflag.FlagSet) {
	if !flags.HasAvailableFlags() {
		return
	}
	fmt.Fprintf(b, ".SH %s\n", title)
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "\\fB\\-%s\\fR, ", roff(f.Shorthand))
		}
		kind, usage := pflag.UnquoteUsage(f)
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", roff(f.Name))
		if kind != "" {
			fmt.Fprintf(b, " \\fI%s\\fR", roff(kind))
		}
		fmt.Fprintf(b, "\n%s\n", roff(usage))
	})
}

// roff escapes text for a line of its own, or for the inside of one.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", "\\(ga", `"`, `\(dq`, "^", `\(ha`, "~", `\(ti`).Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
