package node

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// bad is a pair to which something bad happens.
type bad struct {
	a, b *site
	t    *testing.T
	seen map[string]bool
}

// deliver draws two keys at a and fetches them at b: they are equal, and new.
func (p *bad) deliver() {
	p.t.Helper()
	p.a.stored(p.t, "sae-a", "sae-b", 2)
	got, err := p.a.KME().Keys(p.t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 2})
	if err != nil {
		p.t.Fatalf("draw: %v", err)
	}
	twin, err := p.b.KME().KeysByID(p.t.Context(), etsi014.Caller{SAE: "sae-b"},
		etsi014.IDRequest{Initiator: "sae-a", IDs: []etsi014.KeyID{got.Keys[0].ID, got.Keys[1].ID}})
	if err != nil {
		p.t.Fatalf("fetch: %v", err)
	}
	for i, k := range got.Keys {
		bits := string(k.Bits.Expose())
		if p.seen[bits] || p.seen[k.ID.String()] || bits != string(twin.Keys[i].Bits.Expose()) {
			p.t.Errorf("key %s came before, or differs between the ends", k.ID)
		}
		p.seen[bits], p.seen[k.ID.String()] = true, true
	}
}

// open opens a anew and returns why it does not.
func (p *bad) open() string {
	p.t.Helper()
	p.a.cfg.Links[0].Driver = newStream(1, 9, 4096)
	n, err := Open(p.a.cfg)
	if err == nil {
		n.Close()
		return "it opens"
	}
	return err.Error()
}

// alarm waits for an alarm of a site and returns it.
func (p *bad) alarm(s *site, part string) (line string) {
	p.t.Helper()
	eventually(p.t, "alarm", func() bool {
		for _, line = range s.Stats().Alarms {
			if strings.Contains(line, part) {
				return true
			}
		}
		return false
	})
	return line
}

// overwrite changes one byte of a file, counted from its end if at is negative.
func overwrite(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if at < 0 {
		at += info.Size()
	}
	if _, err = f.ReadAt(b, at); err == nil {
		b[0] ^= 0x10
		_, err = f.WriteAt(b, at)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// scripted is a device that says what it is told to, and then goes on.
type scripted struct {
	*stream
	say []hw.Block
}

func (s *scripted) ReadBlock(ctx context.Context, b *hw.Block) error {
	s.mu.Lock()
	if len(s.say) > 0 {
		*b, s.say = s.say[0], s.say[1:]
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	return s.stream.ReadBlock(ctx, b)
}

// of makes a block of given bits with a number.
func (s *stream) of(seq, bits uint64) hw.Block {
	return hw.Block{Generation: 1, Seq: seq, Bits: secret.Own(s.block(bits)), Simulated: true}
}

// TestBadInput: whatever is wrong is told in exactly one line that says what to
// do; no key leaves that should not, and what was acknowledged stands: put
// right, the pair goes on and no key comes a second time.
func TestBadInput(t *testing.T) {
	for name, c := range map[string]struct {
		say  func(*site) []hw.Block // a's device, before all else
		do   func(*bad) string
		want string // DIR is a's state folder
		mend func(*bad)
	}{
		"wrong root": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				p.a.cfg.RootKey += ".other"
				if err := keyring.NewRootKey(p.a.cfg.RootKey); err != nil {
					p.t.Fatal(err)
				}
				return p.open()
			},
			want: "open epoch keys DIR/epoch.keys: root key does not fit; give the root key " +
				"that this KME was set up with, or that it was changed to; the stock is as it " +
				"was",
			mend: func(p *bad) { p.a.cfg.RootKey = strings.TrimSuffix(p.a.cfg.RootKey, ".other") },
		},
		"truncated store": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				path := filepath.Join(p.a.cfg.Dir, StoreFile)
				p.keep(path)
				if err := os.Truncate(path, 3*4096); err != nil {
					p.t.Fatal(err)
				}
				return p.open()
			},
			want: "open store DIR/kms.db: stored bytes are damaged: the file has 12288 bytes " +
				"and its head promises N: it was cut short; keep it for inspection and " +
				"start with an empty folder",
			mend: func(p *bad) { p.putBack(StoreFile) },
		},
		"empty store": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				path := filepath.Join(p.a.cfg.Dir, StoreFile)
				p.keep(path)
				if err := os.Truncate(path, 0); err != nil {
					p.t.Fatal(err)
				}
				return p.open()
			},
			want: "open store DIR/kms.db: stored bytes are damaged: it is missing or empty " +
				"while its journal stands in the folder; put it back or start with an empty " +
				"folder",
			mend: func(p *bad) { p.putBack(StoreFile) },
		},
		"flipped byte in the epoch keys": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				path := filepath.Join(p.a.cfg.Dir, epochFile)
				p.keep(path)
				overwrite(p.t, path, 40)
				overwrite(p.t, path, 4096+40)
				return p.open()
			},
			want: "open epoch keys DIR/epoch.keys: stored bytes are damaged: neither slot is " +
				"whole; without one the stock cannot be read: put the file back, or move the " +
				"whole folder away and begin with an empty one",
			mend: func(p *bad) { p.putBack(epochFile) },
		},
		"flipped bytes in the store's heads": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				path := filepath.Join(p.a.cfg.Dir, StoreFile)
				p.keep(path)
				overwrite(p.t, path, 40)
				overwrite(p.t, path, 4096+40)
				return p.open()
			},
			want: "open store DIR/kms.db: stored bytes are damaged: checksum error; restore it " +
				"from its disk or start with an empty folder",
			mend: func(p *bad) { p.putBack(StoreFile) },
		},
		"our own KME ID as peer": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				p.a.cfg.Peers[0].ID, p.a.cfg.Links[0].Peer = "kme-a", "kme-a"
				return p.open()
			},
			want: "open KME: peer has our own KME ID \"kme-a\"; every KME needs its own",
			mend: func(p *bad) { p.a.cfg.Peers[0].ID, p.a.cfg.Links[0].Peer = "kme-b", "kme-b" },
		},
		"peer of another link": {
			do: func(p *bad) string {
				p.a.stop(p.t)
				p.a.cfg.Links[0].ID = "other"
				p.a.cfg.Links[0].Driver = newStream(2, 1, 4096)
				p.a.cfg.Dir += ".other"
				p.a.start(p.t)
				p.a.cfg.Links[0].Driver.(*stream).allow(5)
				line := p.alarm(p.a, "refused")
				if st, err := p.a.KME().Status(p.t.Context(), etsi014.Caller{SAE: "sae-a"},
					"sae-b"); err != nil || st.StoredKeys != 0 {
					p.t.Errorf("stock with a peer of another link: %d, %v", st.StoredKeys, err)
				}
				p.a.stop(p.t)
				return line
			},
			want: "peer is refused: kme-b: peer does not know link other; give the link one " +
				"name in both site files, or take it out of ours",
			mend: func(p *bad) {
				p.a.cfg.Links[0].ID, p.a.cfg.Dir = "link", strings.TrimSuffix(p.a.cfg.Dir, ".other")
			},
		},
		"device repeats a number with other bits": {
			say: func(s *site) []hw.Block { return []hw.Block{s.driver.of(1, 1), s.driver.of(1, 77)} },
			do:  func(p *bad) string { return p.alarm(p.a, "repeated") },
			want: "device repeated a block number with other bits: link: the first block counts " +
				"and the second is dropped; have the device's counter looked at, or give the " +
				"link a new generation",
		},
		"device skips numbers": {
			say: func(s *site) []hw.Block {
				s.driver.next = 6
				return []hw.Block{s.driver.of(1, 1), s.driver.of(2, 2), s.driver.of(5, 5)}
			},
			do: func(p *bad) string { return p.alarm(p.a, "skipped") },
			want: "device skipped block numbers: link: 5 came after 2 of generation 1; what the " +
				"other end has of them becomes void; look why this end lost them: the " +
				"device's buffer, or a consumer beside us",
		},
		"blocks that differ": {
			say: func(s *site) []hw.Block {
				s.driver.next = 3
				return []hw.Block{s.driver.of(1, 1), s.driver.of(2, 77)}
			},
			do: func(p *bad) string { // either end may find it first
				return strings.Replace(p.alarm(p.a, "differ"), "the peer says so, or cannot read its own",
					"tag or terms of the peer's block are others", 1)
			},
			want: "blocks differ: link: tag or terms of the peer's block are others; this block " +
				"is void at both ends; if it goes on, the two devices do not make one key: " +
				"check that they are joined to each other, and their error correction",
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			p := &bad{t: t, seen: map[string]bool{}}
			p.a, p.b = newPair(t, 4096)
			if c.say != nil {
				p.a.cfg.Links[0].Driver = &scripted{p.a.driver, c.say(p.a)}
			}
			startPair(t, p.a, p.b)
			p.a.driver.allow(9)
			p.b.driver.allow(9)
			p.deliver()
			line := c.do(p)
			line = strings.ReplaceAll(line, p.a.cfg.Dir, "DIR")
			line = regexp.MustCompile(`promises \d+`).ReplaceAllString(line, "promises N")
			if line != c.want {
				t.Errorf("it says\n%s\nwant\n%s", line, c.want)
			}
			if c.mend != nil {
				c.mend(p)
				p.a.driver = newStream(1, 9, 4096)
				p.a.cfg.Links[0].Driver = p.a.driver
				p.a.start(t)
			}
			p.a.driver.allow(17)
			p.b.driver.allow(17)
			for range 3 {
				p.deliver()
			}
		})
	}
}

// keep copies a file before it is spoilt; putBack puts it back.
func (p *bad) keep(path string) {
	p.t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path+".kept", data, 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *bad) putBack(name string) {
	p.t.Helper()
	path := filepath.Join(p.a.cfg.Dir, name)
	if err := os.Rename(path+".kept", path); err != nil {
		p.t.Fatal(err)
	}
}
