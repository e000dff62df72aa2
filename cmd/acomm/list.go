package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// maxList is how many bytes of a list are read.
const maxList = 16 << 20

const listLong = `List prints the tasks that a gateway has providers for, with their number. URL
is the http or https URL of the gateway, as for acomm call.

EXIT STATUS
  0  the list was written
  1  the answer is not a list, or the list could not be written
  2  usage
  3  the gateway could not be asked, or refused
  4  no answer in time`

// taskEntry is a task of a gateway's list.
type taskEntry struct {
	Task      string `json:"task"`
	Providers int    `json:"providers"` // sockets, whether somebody listens or not
}

type taskList struct {
	Tasks []taskEntry `json:"tasks"`
}

type lister struct {
	client  httpClient
	timeout time.Duration
	json    bool
}

func newListCommand() *cobra.Command {
	l := &lister{}
	cmd := &cobra.Command{
		Use:     "list [flags] URL",
		Short:   "List the tasks of a gateway",
		Long:    listLong,
		Example: "  acomm list http://127.0.0.1:8080/",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return fmt.Errorf("unexpected argument %q: list takes only a URL", args[1])
			}
			return missingArgs("URL")(cmd, args)
		},
		RunE:                  func(_ *cobra.Command, args []string) error { return l.run(args[0]) },
		DisableFlagsInUseLine: true,
	}
	flags := cmd.Flags()
	flags.DurationVar(&l.timeout, "timeout", 10*time.Second, "how long to wait for the list")
	flags.BoolVar(&l.json, "json", false, "write the list in JSON, as the gateway sent it")
	l.client.addTo(flags)
	return cmd
}

func (l *lister) run(target string) error {
	u, err := parseTarget(target)
	switch {
	case err != nil:
		return &exitError{exitUsage, err}
	case u.Scheme != "http" && u.Scheme != "https":
		return usageError("URL: list needs an http or https URL, not %s", u.Scheme)
	case l.timeout <= 0:
		return usageError("--timeout %v is not positive", l.timeout)
	}
	transport, err := l.client.transport(u)
	if err != nil {
		return usageError("%w", err)
	}
	ctx, stop := signalContext()
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.JoinPath("tasks").String(), nil)
	if err != nil {
		return usageError("%w", withoutURL(err))
	}
	// ended is why, if a signal or the time-out is the reason for an error.
	ended := func() error {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return &exitError{exitTimeout, fmt.Errorf("no answer from %s within %v", place(u), l.timeout)}
		}
		return context.Cause(ctx)
	}
	answer, err := transport.RoundTrip(req)
	if err != nil {
		return cmp.Or(ended(), error(&exitError{exitNotSent, fmt.Errorf("ask %s: %w", place(u), err)}))
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return &exitError{exitNotSent, fmt.Errorf("%s answered %s", place(u), answer.Status)}
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxList))
	if err != nil {
		return cmp.Or(ended(), error(&exitError{exitTask, fmt.Errorf("read the list of %s: %w", place(u), err)}))
	}
	var list taskList
	if err := json.Unmarshal(text, &list); err != nil {
		return &exitError{exitTask, fmt.Errorf("%s is not a gateway, or an older one: %w", place(u), err)}
	}
	return wrapOutput(l.write(text, list))
}

func (l *lister) write(text []byte, list taskList) error {
	if l.json {
		_, err := os.Stdout.Write(text)
		return err
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "TASK\tPROVIDERS")
	for _, task := range list.Tasks {
		fmt.Fprintf(table, "%s\t%d\n", printable(task.Task), task.Providers)
	}
	return table.Flush()
}
