package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountOf(t *testing.T) {
	const info = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
30 22 8:2 / /var rw shared:2 - ext4 /dev/sda2 rw,data=journal
31 30 253:3 / /var/lib/quiet\040line rw - xfs /dev/mapper/vg-lv rw,attr2
broken line
32 22 0:40 / /varnish rw - tmpfs tmpfs rw
33 31 8:9 / /var/lib/quiet\040line rw - ext4 /dev/sdb rw
`
	for dir, want := range map[string]string{"/": "8:1", "/etc/x": "8:1", "/var/lib": "8:2",
		"/var": "8:2", "/varnish/x": "0:40", "/var/lib/quiet line/kme": "8:9"} {
		if m := mountOf(info, dir); m.device != want {
			t.Errorf("%s is on %s, want %s", dir, m.device, want)
		}
	}
}

// TestKeepsCopies shows it machines made of files.
func TestKeepsCopies(t *testing.T) {
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	here := copying[int64(fs.Type)] + remote[int64(fs.Type)] // what is true of this machine anyway
	for _, tt := range []struct {
		name, options string
		files         map[string]string
		want          string // "" = nothing
	}{
		{"plain", "rw", nil, ""},
		{"journalled data", "rw,data=journal", nil, "ext4 with data=journal"},
		{"ordered data", "rw,data=ordered", nil, ""},
		{"snapshot", "rw", map[string]string{"slaves/dm-7/dm/name": "vg-state-real"},
			"a volume that has a snapshot (vg-state)"},
		{"thin", "rw", map[string]string{"slaves/dm-7/dm/name": "vg-pool-tpool"}, "a thin volume"},
		{"under a crypt device", "rw", map[string]string{"slaves/dm-7/dm/name": "luks",
			"slaves/dm-7/dev": "253:9", "../253:9/slaves/dm-8/dm/name": "vg-state-real"},
			"a volume that has a snapshot"},
		{"a ring of devices", "rw", map[string]string{"slaves/dm-7/dev": "253:1"}, ""},
		{"plain volume", "rw", map[string]string{"slaves/sda/dev": "8:1", "dm/name": "vg-state"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			write := func(name, text string) {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			write("proc/self/mountinfo", "22 1 253:1 / / rw - ext4 /dev/x "+tt.options)
			for name, text := range tt.files {
				write(filepath.Join("sys/dev/block/253:1", name), text)
			}
			var got []string
			for _, w := range keepsCopies(root, dir) {
				if here == "" || !strings.Contains(w, here) {
					got = append(got, w)
				}
			}
			if tt.want == "" && len(got) != 0 || tt.want != "" && (len(got) != 1 ||
				!strings.Contains(got[0], tt.want) || !strings.Contains(got[0], "old epoch keys may survive")) {
				t.Errorf("warnings %q, want %q", got, tt.want)
			}
		})
	}
}

// TestKeepsCopiesOfThisMachine: what the kernel says of the file system of this
// test's folder is what is warned of.
func TestKeepsCopiesOfThisMachine(t *testing.T) {
	dir := t.TempDir()
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	m := mountOf(string(info), dir)
	names := map[string]string{"overlay": "overlayfs"}
	kind := m.kind
	if n, ok := names[kind]; ok {
		kind = n
	}
	known := false
	for _, n := range copying {
		known = known || n == kind
	}
	warned := strings.Contains(strings.Join(keepsCopies("/", dir), "\n"), kind)
	t.Logf("%s is on %s; warned: %v", dir, m.kind, warned)
	if known != warned {
		t.Errorf("%s: warned %v, want %v", m.kind, warned, known)
	}
	if w := keepsCopies("/", filepath.Join(dir, "none")); len(w) != 1 || !strings.Contains(w[0], "cannot be asked") {
		t.Errorf("a folder that is not there: %q", w)
	}
}
