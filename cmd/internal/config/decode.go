package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// decoder fills a Site from YAML nodes. The library's own strict decoding
// knows lines but neither the path of a key nor which keys would be right, and
// it cannot tell a rule that our validation finds later where the key stood.
type decoder struct {
	name   string         // file name, as given
	dir    string         // its folder, absolute: relative paths count from here
	lines  map[string]int // key path to line
	faults []Fault
}

func newDecoder(name string) *decoder {
	dir, err := filepath.Abs(filepath.Dir(name))
	if err != nil { // no working directory: paths stay as they are
		dir = filepath.Dir(name)
	}
	return &decoder{name: name, dir: dir, lines: map[string]int{"": 1}}
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// document parses the bytes as exactly one YAML mapping.
func (d *decoder) document(data []byte) *yaml.Node {
	if len(data) > maxFile {
		d.fault("", "%d bytes, at most %d are read", len(data), maxFile)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		d.fault("", "the file is empty; start from docs/examples/site-tokyo.yaml")
		return nil
	} else if err != nil {
		d.syntax(err)
		return nil
	}
	if err := dec.Decode(&more); err == nil {
		d.lines[""] = more.Line
		d.fault("", "a second document begins here; a site is one document")
		return nil
	} else if !errors.Is(err, io.EOF) {
		d.syntax(err)
		return nil
	}
	return doc.Content[0]
}

func (d *decoder) syntax(err error) {
	text := err.Error()
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		text = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			d.lines[""] = n
		}
	}
	// The library counts some lines from 0 and some from 1.
	d.fault("", "not YAML, here or in the next line: %s", text)
}

func (d *decoder) decode(root *yaml.Node, site *Site) {
	d.value(root, reflect.ValueOf(site).Elem(), "", "")
}

// value fills v from n. The checks are those of the field that holds v.
func (d *decoder) value(n *yaml.Node, v reflect.Value, key, checks string) {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		d.fault(key, "anchors and aliases are not supported; write the value out")
		return
	}
	switch {
	case isText(v) || v.Type() == durationType:
		d.scalar(n, v, key, checks)
	case v.Kind() == reflect.Pointer:
		if n.Tag == "!!null" {
			d.fault(key, "is empty; expected a group of keys, or leave the key out")
			return
		}
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem(), key, checks)
	case v.Kind() == reflect.Struct:
		d.mapping(n, v, key)
	case v.Kind() == reflect.Slice:
		d.list(n, v, key, checks)
	default:
		d.scalar(n, v, key, checks)
	}
}

func (d *decoder) mapping(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.MappingNode {
		d.fault(key, "is %s; expected a group of keys", describe(n))
		return
	}
	fields := fieldsOf(v.Type())
	seen := make(map[string]bool)
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		path := join(key, name.Value)
		f := slices.IndexFunc(fields, func(f field) bool { return f.name == name.Value })
		switch {
		case name.Kind != yaml.ScalarNode || f < 0:
			d.lines[path] = name.Line
			d.fault(path, "unknown key; known here: %s", names(fields))
		case seen[name.Value]:
			d.faults = append(d.faults, Fault{name.Line, path,
				fmt.Sprintf("stands a second time; the first is in line %d", d.lines[path])})
		default:
			seen[name.Value] = true
			d.lines[path] = name.Line
			d.value(value, v.Field(fields[f].index), path, fields[f].checks)
		}
	}
	for _, f := range fields {
		if !seen[f.name] && has(f.checks, "required") {
			d.fault(join(key, f.name), "is missing; it is required")
		}
	}
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, key, checks string) {
	if n.Kind != yaml.SequenceNode {
		d.fault(key, "is %s; expected a list", describe(n))
		return
	}
	if len(n.Content) == 0 {
		if has(checks, "required") {
			d.fault(key, "is empty; at least one entry is required")
		}
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		path := fmt.Sprintf("%s[%d]", key, i)
		d.lines[path] = item.Line
		d.value(item, v.Index(i), path, checks)
	}
}

// scalar fills a text, number, truth value or duration and runs the checks of
// the field on it.
func (d *decoder) scalar(n *yaml.Node, v reflect.Value, key, checks string) {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Tag == "!!binary" {
		d.fault(key, "is %s; expected %s", describe(n), kindName(v))
		return
	}
	if err := setScalar(n, v); err != nil {
		d.fault(key, "%q is not %s%s", n.Value, kindName(v), reason(err))
		return
	}
	if v.Kind() != reflect.String {
		return
	}
	for check := range strings.SplitSeq(checks, ",") {
		if rule := rules[check]; rule != nil {
			text, err := rule(d, n.Value)
			if err != nil {
				d.fault(key, "%q %v", n.Value, err)
				return
			}
			v.SetString(text)
		}
	}
}

// errKind marks a value of the wrong kind, about which there is no more to say.
var errKind = errors.New("")

func setScalar(n *yaml.Node, v reflect.Value) error {
	if v.Type() == durationType {
		t, err := time.ParseDuration(n.Value)
		if err != nil {
			return errKind
		}
		v.SetInt(int64(t))
		return nil
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if n.Value == "" { // netip reads nothing as its zero value
			return errKind
		}
		return u.UnmarshalText([]byte(n.Value))
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(n.Value)
	case reflect.Bool:
		if n.Tag != "!!bool" {
			return errKind
		}
		return n.Decode(v.Addr().Interface())
	case reflect.Int:
		i, err := strconv.Atoi(n.Value)
		if err != nil || n.Style != 0 {
			return errKind
		}
		v.SetInt(int64(i))
	case reflect.Float64:
		f, err := strconv.ParseFloat(n.Value, 64)
		if err != nil || n.Style != 0 {
			return errKind
		}
		v.SetFloat(f)
	default:
		return fmt.Errorf("decode %s: no rule", v.Type())
	}
	return nil
}

type field struct {
	name, checks string
	index        int
}

func fieldsOf(t reflect.Type) []field {
	var list []field
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		list = append(list, field{name: name, checks: f.Tag.Get("check"), index: i})
	}
	return list
}

func names(fields []field) string {
	var list []string
	for _, f := range fields {
		list = append(list, f.name)
	}
	return strings.Join(list, ", ")
}

var durationType = reflect.TypeFor[time.Duration]()

func isText(v reflect.Value) bool {
	_, ok := v.Addr().Interface().(encoding.TextUnmarshaler)
	return ok
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

func has(checks, want string) bool {
	return slices.Contains(strings.Split(checks, ","), want)
}

func reason(err error) string {
	if errors.Is(err, errKind) {
		return ""
	}
	return ": " + err.Error()
}

// describe says what a node is, for a person.
func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a group of keys"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!null":
		return "empty"
	}
	return strconv.Quote(n.Value)
}

// kindName says what is expected, for a person.
func kindName(v reflect.Value) string {
	switch v.Type().String() {
	case "time.Duration":
		return `a duration such as "10s" or "5m"`
	case "netip.AddrPort":
		return "an IP address with port, such as 192.0.2.1:4500 or [2001:db8::1]:4500"
	case "netip.Prefix":
		return "an IP address with prefix length, such as 10.9.0.1/30"
	}
	switch v.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	}
	return "a text"
}
