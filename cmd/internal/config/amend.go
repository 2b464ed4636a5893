package config

import (
	"bytes"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// Amend adds the peers, links, SAEs and lines of add to the text of a site
// file, in place of those with the same name, and keeps all else with its
// comments. The result is checked: a text that would be refused is not
// returned. The name is that of [Parse].
func Amend(name string, text []byte, add *Site) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, fmt.Errorf("amend %s: it is not a mapping", name)
	}
	root := doc.Content[0]
	for _, part := range []struct {
		key, id string
		list    any
	}{{"peers", "kme", add.Peers}, {"links", "id", add.Links}, {"saes", "id", add.SAEs},
		{"lines", "id", add.Lines}} {
		var fresh yaml.Node
		if err := fresh.Encode(part.list); err != nil {
			return nil, fmt.Errorf("amend %s: %w", name, err)
		}
		into := sequence(root, part.key)
		for _, item := range fresh.Content {
			into.put(item, part.id)
		}
	}
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	if _, err := Parse(name, out.Bytes()); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// Remove takes the peer with a KME ID out of the text of a site file, with its
// links, its SAEs, and the lines that lead to those SAEs.
func Remove(name string, text []byte, kme string) ([]byte, error) {
	site, err := Parse(name, text)
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	root := doc.Content[0]
	gone := map[string]bool{}
	for _, a := range site.SAEs {
		gone[a.ID] = a.KME == kme
	}
	for i, l := range site.Lines {
		if l.Keys != nil && gone[l.Keys.PeerSAE] {
			sequence(root, "lines").drop("id", site.Lines[i].ID)
		}
	}
	for _, a := range site.SAEs {
		if gone[a.ID] {
			sequence(root, "saes").drop("id", a.ID)
		}
	}
	for _, l := range site.Links {
		if l.Peer == kme {
			sequence(root, "links").drop("id", l.ID)
		}
	}
	sequence(root, "peers").drop("kme", kme)
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	if _, err := Parse(name, out.Bytes()); err != nil {
		return nil, fmt.Errorf("amend %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// list is a sequence of mappings in a document.
type list struct{ *yaml.Node }

// sequence finds or makes the sequence under a key of the root.
func sequence(root *yaml.Node, key string) list {
	for i := 0; i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value != key {
			continue
		}
		n := root.Content[i+1]
		if n.Kind != yaml.SequenceNode { // `peers:` with nothing behind it
			*n = yaml.Node{Kind: yaml.SequenceNode}
		}
		n.Style = 0 // [] becomes a block
		return list{n}
	}
	n := &yaml.Node{Kind: yaml.SequenceNode}
	root.Content = append(root.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: key}, n)
	return list{n}
}

// put adds an item, or replaces the one with the same id.
func (l list) put(item *yaml.Node, id string) {
	if i := l.find(id, value(item, id)); i >= 0 {
		item.HeadComment, item.FootComment = l.Content[i].HeadComment, l.Content[i].FootComment
		l.Content[i] = item
		return
	}
	l.Content = append(l.Content, item)
}

func (l list) drop(id, name string) {
	if i := l.find(id, name); i >= 0 {
		l.Content = append(l.Content[:i:i], l.Content[i+1:]...)
	}
	if len(l.Content) == 0 {
		l.Style = yaml.FlowStyle
	}
}

func (l list) find(id, name string) int {
	for i, item := range l.Content {
		if value(item, id) == name {
			return i
		}
	}
	return -1
}

func value(item *yaml.Node, key string) string {
	for i := 0; i+1 < len(item.Content); i += 2 {
		if item.Content[i].Value == key {
			return item.Content[i+1].Value
		}
	}
	return ""
}
