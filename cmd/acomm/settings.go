package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"
)

// settings are the flags that are not given on the command line, but in the environment
// or in a file.
type settings struct {
	flags *pflag.FlagSet
	from  map[string]string // where a flag was found, by its name
}

// environmentName is what a flag is called in the environment.
func environmentName(flag string) string {
	return "ACOMM_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// loadSettings sets the flags that were not given from the environment and the file,
// whose name is that of the flag config.
func loadSettings(flags *pflag.FlagSet) (*settings, error) {
	s := &settings{flags: flags, from: make(map[string]string)}
	config := flags.Lookup("config")
	if path := os.Getenv(environmentName("config")); path != "" && !config.Changed {
		if err := config.Value.Set(path); err != nil {
			return s, err
		}
	}
	path := config.Value.String()
	file, err := readConfiguration(path)
	if err != nil {
		return s, usageError("read the configuration %s: %w", path, err)
	}
	for key := range file {
		if f := flags.Lookup(key); f == nil || key == "config" || key == "help" {
			return s, usageError("%s: there is no flag %q", path, key)
		}
	}
	flags.VisitAll(func(f *pflag.Flag) {
		if err != nil || f.Changed || f.Name == "help" || f.Name == "config" {
			return
		}
		if text := os.Getenv(environmentName(f.Name)); text != "" {
			err = s.set(f, text, environmentName(f.Name))
		} else if v, ok := file[f.Name]; ok && v.parsed != nil {
			err = s.set(f, v.text(f.Value.Type()), path+": "+f.Name)
		}
	})
	return s, err
}

// set sets the flag to what was found there.
func (s *settings) set(f *pflag.Flag, text, from string) error {
	if err := f.Value.Set(text); err != nil {
		return usageError("%s: %w", from, err)
	}
	f.Changed = true
	s.from[f.Name] = from
	return nil
}

// flagAtStart is a flag that an error begins with.
var flagAtStart = regexp.MustCompile(`^--([a-z-]+)`)

// locate says of an error of usage that begins with a flag where that was found.
func (s *settings) locate(err error) error {
	var exit *exitError
	if !errors.As(err, &exit) || exit.code != exitUsage {
		return err
	}
	text := err.Error()
	found := flagAtStart.FindStringSubmatch(text)
	if found == nil || s.from[found[1]] == "" {
		return err
	}
	return usageError("%s%s", s.from[found[1]], strings.TrimPrefix(text, found[0]))
}

// value is one of a configuration file: as it is written there, where that is known,
// and as it was understood.
type value struct {
	written string
	parsed  any // nil: null
}

// text is the value as a flag of the type takes it. A name is what is written: YAML
// takes 0123 for 83, and JSON 1000000 for 1e+06.
func (v value) text(flagType string) string {
	isNumber := flagType == "int" || flagType == "SIZE"
	switch number := v.parsed.(type) {
	case int, int64, uint64:
		if isNumber && strings.Trim(v.written, "0123456789") != "" || v.written == "" {
			return fmt.Sprint(number)
		}
	case float64:
		if isNumber || v.written == "" {
			return strconv.FormatFloat(number, 'f', -1, 64)
		}
	}
	if list, ok := v.parsed.([]any); ok && len(list) == 0 {
		return ""
	}
	if v.written == "" {
		return fmt.Sprint(v.parsed)
	}
	return v.written
}

// readConfiguration reads a file of YAML, TOML or JSON, as its name says. Without a name
// it is empty.
func readConfiguration(path string) (map[string]value, error) {
	if path == "" {
		return nil, nil
	}
	file := viper.New()
	file.SetConfigFile(path)
	if err := file.ReadInConfig(); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	written := make(map[string]string)
	switch strings.ToLower(filepath.Ext(path)) {
	case ".yaml", ".yml":
		writtenInYAML(data, written)
	case ".json":
		writtenInJSON(data, written)
	}
	values := make(map[string]value)
	for _, key := range file.AllKeys() {
		v := value{written[key], file.Get(key)}
		if list, ok := v.parsed.([]any); ok && v.written == "" {
			texts := make([]string, len(list))
			for i, element := range list {
				texts[i] = value{parsed: element}.text("")
			}
			v.written = strings.Join(texts, ",")
		}
		values[key] = v
	}
	return values, nil
}

// writtenInYAML notes the values at the top of the file, which is valid.
func writtenInYAML(data []byte, written map[string]string) {
	var document yaml.Node
	if yaml.Unmarshal(data, &document) != nil || len(document.Content) == 0 {
		return
	}
	top := document.Content[0].Content
	for i := 0; i+1 < len(top); i += 2 {
		node := top[i+1]
		if node.Kind == yaml.AliasNode {
			node = node.Alias
		}
		nodes := []*yaml.Node{node}
		if node.Kind == yaml.SequenceNode {
			nodes = node.Content
		}
		var texts []string
		for _, n := range nodes {
			if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
				texts = append(texts, n.Value)
			}
		}
		if len(texts) == len(nodes) {
			written[strings.ToLower(top[i].Value)] = strings.Join(texts, ",")
		}
	}
}

// writtenInJSON notes the numbers at the top of the file, which is valid. What is no
// number is as it was understood.
func writtenInJSON(data []byte, written map[string]string) {
	var top map[string]json.RawMessage
	if json.Unmarshal(data, &top) != nil {
		return
	}
	for key, text := range top {
		var number json.Number
		if json.Unmarshal(text, &number) == nil && text[0] != '"' {
			written[strings.ToLower(key)] = number.String()
		}
	}
}
