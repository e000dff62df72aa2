package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
)

// logFormat is the flag that says how a server logs.
type logFormat string

const (
	logText logFormat = "text"
	logJSON logFormat = "json"
)

// addTo adds the flag, with text as its default.
func (f *logFormat) addTo(flags *pflag.FlagSet) {
	*f = logText
	flags.Var(f, "log-format", "how to log on standard error: text or json")
}

func (f *logFormat) Type() string   { return "FORMAT" }
func (f *logFormat) String() string { return string(*f) }

func (f *logFormat) Set(text string) error {
	switch logFormat(text) {
	case logText, logJSON:
		*f = logFormat(text)
		return nil
	}
	return fmt.Errorf("%q is neither text nor json", text)
}

// logTime is in lines of the log; in local time, with the offset.
const logTime = "2006-01-02T15:04:05.000Z07:00"

// use has all that is logged in the format.
func (f *logFormat) use() {
	logrus.SetOutput(os.Stderr)
	if *f == logJSON {
		logrus.SetFormatter(&logrus.JSONFormatter{TimestampFormat: logTime, DisableHTMLEscape: true})
		return
	}
	logrus.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, TimestampFormat: logTime, DisableColors: true})
}

// logged logs the error a server ends with, if what it says is read as JSON. Then
// nothing else is said of it.
func (f *logFormat) logged(err error) error {
	if err == nil || *f != logJSON {
		return err
	}
	code := exitTask
	if exit := (*exitError)(nil); errors.As(err, &exit) {
		code = exit.code
	}
	logrus.Error(printable(err.Error()))
	return &exitError{code: code}
}
