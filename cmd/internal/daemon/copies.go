package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// copying are file systems that do not overwrite in place: the sector that held
// an old epoch key keeps it until it is used again (linux/magic.h and, for
// those that the kernel does not carry, their own sources).
var copying = map[int64]string{
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	0x2fc12fc1:                 "zfs",
	unix.BCACHEFS_SUPER_MAGIC:  "bcachefs",
	unix.NILFS_SUPER_MAGIC:     "nilfs2",
	unix.F2FS_SUPER_MAGIC:      "f2fs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
}

// remote are file systems whose disk is somebody else's.
var remote = map[int64]string{
	unix.NFS_SUPER_MAGIC:  "nfs",
	unix.SMB2_SUPER_MAGIC: "smb",
	unix.CIFS_SUPER_MAGIC: "cifs",
	unix.FUSE_SUPER_MAGIC: "fuse",
	unix.V9FS_MAGIC:       "9p",
	unix.CEPH_SUPER_MAGIC: "ceph",
}

// meaning ends each warning.
const meaning = "old epoch keys may survive there, and with the root key open keys that were " +
	"delivered; see \"Erasure\" in docs/operations.md"

// keepsCopies tells what under a folder may keep what was overwritten: the file
// system, its journal, a snapshot of its device. It sees what the kernel shows
// here; a snapshot outside of this machine it cannot see. root is "/" but in
// tests.
func keepsCopies(root, dir string) (warnings []string) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return []string{fmt.Sprintf("state folder %s: its file system cannot be asked whether it "+
			"overwrites in place: %v", dir, err)}
	}
	if name := copying[int64(fs.Type)]; name == "overlayfs" {
		warnings = append(warnings, fmt.Sprintf("state folder %s is on overlayfs, on the upper "+
			"folder's file system, which cannot be seen from here: %s", dir, meaning))
	} else if name != "" {
		warnings = append(warnings, fmt.Sprintf("state folder %s is on %s, which does not overwrite "+
			"in place: %s", dir, name, meaning))
	}
	if name := remote[int64(fs.Type)]; name != "" {
		warnings = append(warnings, fmt.Sprintf("state folder %s is on %s: whether it overwrites in "+
			"place is another machine's or program's matter: %s", dir, name, meaning))
	}
	for _, w := range mounted(root, dir) {
		warnings = append(warnings, fmt.Sprintf("state folder %s is on %s: %s", dir, w, meaning))
	}
	return warnings
}

// mount is what a line of mountinfo says, proc_pid_mountinfo(5).
type mount struct {
	device, point, kind string
	options             []string // of the super block
}

// mounted looks at the mount that a folder lies on.
func mounted(root, dir string) (found []string) {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	text, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return nil
	}
	m := mountOf(string(text), dir)
	if slices.Contains(m.options, "data=journal") {
		found = append(found, m.kind+" with data=journal, whose journal keeps what was written")
	}
	return append(found, snapshots(root, m.device, 0)...)
}

// mountOf finds the last mount over a folder.
func mountOf(mountinfo, dir string) (m mount) {
	for line := range strings.Lines(mountinfo) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 {
			continue
		}
		point := unescape(l[4])
		if dir != point && !strings.HasPrefix(dir, strings.TrimSuffix(point, "/")+"/") ||
			len(point) < len(m.point) {
			continue
		}
		m = mount{device: l[2], point: point, kind: r[0], options: strings.Split(r[2], ",")}
	}
	return m
}

// unescape undoes what the kernel does to blanks in mount points.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// deepest bounds the devices under devices that are looked at.
const deepest = 8

// snapshots looks for snapshots of a block device (major:minor): LVM puts a
// device "-real" under an origin that has one, and a pool "-tpool" under thin
// volumes; a loop device lies on a file.
func snapshots(root, device string, depth int) (found []string) {
	sys := filepath.Join(root, "sys/dev/block", device)
	name := func(dir string) string {
		b, _ := os.ReadFile(filepath.Join(dir, "dm/name"))
		return strings.TrimSpace(string(b))
	}
	if file, err := os.ReadFile(filepath.Join(sys, "loop/backing_file")); err == nil && depth < deepest {
		path := strings.TrimSpace(string(file))
		found = append(found, keepsCopies(root, filepath.Dir(path))...)
	}
	slaves, _ := filepath.Glob(filepath.Join(sys, "slaves/*"))
	for _, s := range slaves {
		switch n := name(s); {
		case strings.HasSuffix(n, "-real"):
			found = append(found, "a volume that has a snapshot ("+strings.TrimSuffix(n, "-real")+")")
		case strings.HasSuffix(n, "-tpool"):
			found = append(found, "a thin volume, whose pool may keep old blocks ("+n+")")
		}
		dev, err := os.ReadFile(filepath.Join(s, "dev"))
		if err == nil && depth < deepest {
			found = append(found, snapshots(root, strings.TrimSpace(string(dev)), depth+1)...)
		}
	}
	return found
}
