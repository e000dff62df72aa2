package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// helpWidth is how many columns help has at most.
const helpWidth = 80

// setUsage gives the command line the ways in which it shows its usage, and says what is
// wrong with what was given.
func setUsage(root *cobra.Command) {
	root.SetUsageTemplate(strings.NewReplacer(
		"{{.LocalFlags.FlagUsages ", fmt.Sprintf("{{.LocalFlags.FlagUsagesWrapped %d ", helpWidth),
		"{{.InheritedFlags.FlagUsages ", fmt.Sprintf("{{.InheritedFlags.FlagUsagesWrapped %d ", helpWidth),
	).Replace(root.UsageTemplate()))
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(newHelpCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			cmd.Args = cobra.ArbitraryArgs
			cmd.RunE = onlySubcommands
		}
	}
	foldHelp(root)
}

// foldHelp makes the manuals fit, of the command and those below it.
func foldHelp(cmd *cobra.Command) {
	cmd.Long = fold(cmd.Long, helpWidth)
	for _, sub := range cmd.Commands() {
		foldHelp(sub)
	}
}

// fold fills the paragraphs of a manual again that have a line of more columns. A paragraph is lines with one indentation. That of a table's entry
// begins behind two spaces: the lines that follow stand under its text. A line in
// capitals is a heading.
func fold(text string, width int) string {
	lines := strings.Split(text, "\n")
	var out []string
	for i := 0; i < len(lines); {
		end := i + 1
		first, indent := splitEntry(lines[i])
		if first != "" && !isHeading(lines[i]) {
			for end < len(lines) && isContinuation(lines[end], indent) {
				end++
			}
		}
		block := lines[i:end]
		i = end
		if !slices.ContainsFunc(block, func(line string) bool { return utf8.RuneCountInString(line) > width }) {
			out = append(out, block...)
			continue
		}
		line := block[0][:indent]
		words := strings.Fields(strings.Join(append([]string{block[0][indent:]}, block[1:]...), " "))
		for n, word := range words {
			switch {
			case n == 0:
				line += word
			case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width:
				out = append(out, line)
				line = strings.Repeat(" ", indent) + word
			default:
				line += " " + word
			}
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// splitEntry returns the text of a line, of a table's entry that behind the gap, and
// where it begins.
func splitEntry(line string) (text string, indent int) {
	text = strings.TrimLeft(line, " ")
	if gap := strings.Index(text, "  "); gap >= 0 {
		text = strings.TrimLeft(text[gap:], " ")
	}
	return text, len(line) - len(text)
}

func isContinuation(line string, indent int) bool {
	text, at := splitEntry(line)
	return text != "" && at == indent && strings.TrimLeft(line[:at], " ") == "" && !isHeading(line)
}

func isHeading(line string) bool {
	return line != "" && line == strings.ToUpper(line) && !strings.ContainsAny(line, ".,:;")
}

// onlySubcommands is what a command does that has nothing to do itself.
func onlySubcommands(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		_ = cmd.Help()
		return &exitError{code: exitUsage}
	}
	return &exitError{exitUsage, unknownCommand(cmd, args[0])}
}

// unknownCommand is the error of a command that has no such subcommand.
func unknownCommand(cmd *cobra.Command, name string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() || sub.Name() == "help" {
			names = append(names, sub.Name())
		}
	}
	return fmt.Errorf("unknown command %q for %q%s", name, cmd.CommandPath(), suggestion("", name, names))
}

// newHelpCommand is cobra's, which takes what is not there for a success.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about any command",
		Long:  "Help shows the manual of a command.",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
			if of, _, err := cmd.Root().Find(args); err == nil {
				for _, sub := range of.Commands() {
					if sub.IsAvailableCommand() {
						names = append(names, sub.Name()+"\t"+sub.Short)
					}
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			of := cmd.Root()
			for _, name := range args {
				i := slices.IndexFunc(of.Commands(), func(sub *cobra.Command) bool { return sub.Name() == name || sub.HasAlias(name) })
				if i < 0 {
					return &exitError{exitUsage, unknownCommand(of, name)}
				}
				of = of.Commands()[i]
			}
			of.InitDefaultHelpFlag() // or it would not be shown
			return of.Help()
		},
	}
}

// flagError is an error of the flags, with what may have been meant.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	if !cmd.HasParent() && len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") { // the flag is that of a command
		return unknownCommand(cmd, os.Args[1])
	}
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	return fmt.Errorf("%w%s", err, suggestion("--", unknown.GetSpecifiedName(), names))
}

// suggestion says which of the names may have been meant, if one is near.
func suggestion(prefix, name string, names []string) string {
	best, distance := "", 3
	for _, candidate := range names {
		d := editDistance(strings.ToLower(name), candidate)
		if len(name) > 1 && strings.HasPrefix(candidate, strings.ToLower(name)) {
			d = min(d, 1)
		}
		if d < distance && d < len(name) {
			best, distance = candidate, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %s%s?", prefix, best)
}

// editDistance is how many bytes have to be put in, left out or replaced to make one text
// the other.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// missingArgs is an Args of a command that needs the named ones.
func missingArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if missing := names[min(len(args), len(names)):]; len(missing) > 0 {
			return fmt.Errorf("%s missing", strings.Join(missing, " and ")+map[bool]string{true: " is", false: " are"}[len(missing) == 1])
		}
		return nil
	}
}

// noArguments is the Args of a command that takes none.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q: %s takes only flags", args[0], cmd.CommandPath())
	}
	return nil
}
