package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The manual pages are made of the commands themselves. cobra/doc would need
// go-md2man, and takes the help for Markdown: it runs its tables into paragraphs.

func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the manual pages to a directory",
		Hidden: true, // for install.sh
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, c := range append([]*cobra.Command{cmd.Root()}, manCommands(cmd.Root())...) {
				if err := os.WriteFile(filepath.Join(args[0], manName(c)+".1"), manPage(c), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// manCommands are the commands that have a page beside the root's.
func manCommands(root *cobra.Command) (commands []*cobra.Command) {
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" && c.Name() != "completion" {
			commands = append(commands, c)
		}
	}
	return commands
}

func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// manPage is the page of a command, in the macros of man(7).
func manPage(c *cobra.Command) []byte {
	var b bytes.Buffer
	name := manName(c)
	fmt.Fprintf(&b, ".TH %s 1 \"\" acomm \"acomm manual\"\n", roff(strings.ToUpper(name)))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n", roff(c.UseLine()))
	b.WriteString(".SH DESCRIPTION\n")
	manText(&b, c.Long)
	if flags := c.NonInheritedFlags(); flags.HasAvailableFlags() {
		b.WriteString(".SH OPTIONS\n")
		flags.VisitAll(func(f *pflag.Flag) { manFlag(&b, f) })
	}
	if c.Example != "" {
		b.WriteString(".SH EXAMPLES\n")
		manBlock(&b, strings.Split(c.Example, "\n"))
	}
	b.WriteString(".SH SEE ALSO\n")
	var others []string
	for _, other := range append([]*cobra.Command{c.Root()}, manCommands(c.Root())...) {
		if other != c {
			others = append(others, fmt.Sprintf("\\fB%s\\fR(1)", roff(manName(other))))
		}
	}
	b.WriteString(strings.Join(others, ", ") + "\n")
	return b.Bytes()
}

// manHeading is a line of a help text that begins a section.
var manHeading = regexp.MustCompile(`^[A-Z][A-Z ]+$`)

// manText writes a help text: headings, paragraphs, and what is indented as it is.
func manText(b *bytes.Buffer, text string) {
	var section []string
	for line := range strings.Lines(text + "\n") {
		line = strings.TrimRight(line, "\n")
		if !manHeading.MatchString(line) {
			section = append(section, line)
			continue
		}
		manSection(b, section)
		section = nil
		fmt.Fprintf(b, ".SH %s\n", roff(line))
	}
	manSection(b, section)
}

// manSection writes the lines between two headings, without what they are all
// indented by.
func manSection(b *bytes.Buffer, lines []string) {
	common := 80
	for _, line := range lines {
		if line != "" {
			common = min(common, len(line)-len(strings.TrimLeft(line, " ")))
		}
	}
	var block []string
	flush := func() {
		for len(block) > 0 && block[len(block)-1] == "" {
			block = block[:len(block)-1]
		}
		manBlock(b, block)
		block = nil
	}
	for _, line := range lines {
		if line != "" {
			line = line[common:]
		}
		switch {
		case strings.HasPrefix(line, " "), strings.Contains(line, "  "), line == "" && block != nil: // of a table
			block = append(block, line)
		case line == "":
			b.WriteString(".PP\n")
		default:
			if block != nil {
				flush()
				b.WriteString(".PP\n")
			}
			b.WriteString(roff(line) + "\n")
		}
	}
	flush()
}

// manBlock writes lines as they are.
func manBlock(b *bytes.Buffer, lines []string) {
	if len(lines) == 0 {
		return
	}
	b.WriteString(".PP\n.nf\n")
	for _, line := range lines {
		b.WriteString(roff(line) + "\n")
	}
	b.WriteString(".fi\n")
}

// manDefaults are those that depend on the machine, which need not be the reader's.
var manDefaults = map[string]string{"concurrency": "the number of processors"}

func manFlag(b *bytes.Buffer, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	value, usage := pflag.UnquoteUsage(f)
	b.WriteString(".TP\n")
	if f.Shorthand != "" {
		fmt.Fprintf(b, "\\fB\\-%s\\fR, ", roff(f.Shorthand))
	}
	fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", roff(f.Name))
	if value != "" {
		fmt.Fprintf(b, " \\fI%s\\fR", roff(value))
	}
	def := f.DefValue
	if text, ok := manDefaults[f.Name]; ok {
		def = text
	}
	switch def {
	case "", "false", "0", "0s", "[]":
	default:
		usage += fmt.Sprintf(" (default %s)", def)
	}
	b.WriteString("\n" + roff(usage) + "\n")
}

// roffSpecial are the characters that troff would read as something else.
var roffSpecial = strings.NewReplacer(`\`, `\e`, `-`, `\-`, `'`, `\(aq`, "`", `\(ga`, `^`, `\(ha`, `~`, `\(ti`)

// roff is a line of text for troff.
func roff(line string) string {
	if line = roffSpecial.Replace(line); strings.HasPrefix(line, ".") {
		return `\&` + line
	}
	return line
}
