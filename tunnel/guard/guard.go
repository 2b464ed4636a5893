// Package guard keeps packets for the networks behind a line from leaving on
// any other way, also when no process of the line runs.
//
// [Install] puts two things into the kernel, and nothing of them goes when the
// process ends, however it ends:
//
//   - for each network an "unreachable" route of the worst metric: while the
//     line's device is there its own route wins; without the device, packets
//     find this one rather than the default route;
//   - a table of nftables, quietline_<line>, that drops packets to these
//     networks on every interface but the line's, and packets that claim to
//     come from them on any other: more exact routes, policy routing or a
//     peer's mistake do not lead around it.
//
// A caller must keep in mind that both stay until [Remove]: a network guarded
// is not to be reached without its line. Both act in the network namespace of
// the calling thread.
package guard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config says what to guard.
type Config struct {
	Line      string         // its name: letters, digits, dot, dash, underscore
	Interface string         // the line's device
	Networks  []netip.Prefix // behind the other end
	// Outer is where the other end receives the line's own datagrams: they may
	// leave, though Outer lies in one of Networks. Zero = nothing may.
	Outer netip.AddrPort
}

// ErrConfig refuses a configuration that cannot be guarded.
var ErrConfig = errors.New("bad guard configuration")

// ErrRules says that the rules could not be set or removed; the routes were.
// The text says why: nft is not installed, or the kernel has no nftables.
var ErrRules = errors.New("no nftables rules")

// Metric is that of the unreachable routes: the worst there is, so that every
// other route to the network comes first.
const Metric = 1<<32 - 1

// routeProtocol marks our routes (rtm_protocol): one that no daemon of
// /etc/iproute2/rt_protos has.
const routeProtocol = 0x71

var nameForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)

func (c *Config) check() error {
	switch {
	case !nameForm.MatchString(c.Line) || !nameForm.MatchString(c.Interface):
		return fmt.Errorf("%w: line %q on %q", ErrConfig, c.Line, c.Interface)
	case slices.ContainsFunc(c.Networks, func(p netip.Prefix) bool { return !p.IsValid() }):
		return fmt.Errorf("%w: a network is not valid", ErrConfig)
	}
	return nil
}

// table is the name of the line's table: nft takes no dots and dashes there.
func (c *Config) table() string {
	return "quietline_" + strings.NewReplacer(".", "_2e_", "-", "_2d_").Replace(c.Line)
}

// Install sets routes and rules, in the place of older ones of the line. An
// error that is [ErrRules] means that the routes alone guard; any other, that
// nothing may be relied on.
func Install(c Config) error {
	if err := c.check(); err != nil {
		return fmt.Errorf("install guard: %w", err)
	}
	// The rules first: with them in place no route can be too late.
	rules := run(c.rules())
	if err := c.routes(); err != nil {
		return fmt.Errorf("install guard: %w", err)
	}
	if rules != nil {
		return fmt.Errorf("install guard: %w: %w", ErrRules, rules)
	}
	return nil
}

// Remove takes the line's routes and rules away. What is not there is no error.
func Remove(c Config) error {
	if err := c.check(); err != nil {
		return fmt.Errorf("remove guard: %w", err)
	}
	rules := run(c.empty())
	for _, p := range c.Networks {
		if err := netlink.RouteDel(route(p)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove guard: route to %s: %w", p, err)
		}
	}
	if rules != nil {
		return fmt.Errorf("remove guard: %w: %w", ErrRules, rules)
	}
	return nil
}

// Check tells whether routes and rules stand. Rules that are missing are
// [ErrRules].
func Check(c Config) error {
	if err := c.check(); err != nil {
		return fmt.Errorf("check guard: %w", err)
	}
	for _, p := range c.Networks {
		want := route(p)
		found, err := netlink.RouteListFiltered(family(p), want,
			netlink.RT_FILTER_DST|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return fmt.Errorf("check guard: list routes: %w", err)
		}
		if len(found) == 0 {
			return fmt.Errorf("check guard: no unreachable route to %s", p)
		}
	}
	if err := run("list table inet " + c.table()); err != nil {
		return fmt.Errorf("check guard: %w: %w", ErrRules, err)
	}
	return nil
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func route(p netip.Prefix) *netlink.Route {
	p = p.Masked()
	metric := uint32(Metric)
	return &netlink.Route{Type: unix.RTN_UNREACHABLE, Protocol: routeProtocol, Priority: int(metric),
		Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
}

func (c *Config) routes() error {
	for _, p := range c.Networks {
		if err := netlink.RouteReplace(route(p)); err != nil {
			return fmt.Errorf("route to %s: %w", p, err)
		}
	}
	return nil
}

// empty makes sure that the table is there and then removes it: "delete" alone
// fails for one that is not.
func (c *Config) empty() string {
	return fmt.Sprintf("table inet %[1]s {}\ndelete table inet %[1]s\n", c.table())
}

// rules is one transaction of nft: there is no moment without them.
func (c *Config) rules() string {
	var b strings.Builder
	b.WriteString(c.empty())
	fmt.Fprintf(&b, "table inet %s {\n", c.table())
	for _, chain := range []string{"output", "forward"} {
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype filter hook %[1]s priority -300; policy accept;\n", chain)
		fmt.Fprintf(&b, "\t\toifname %q accept\n", c.Interface)
		if a := c.Outer; a.IsValid() && chain == "output" {
			fmt.Fprintf(&b, "\t\t%s daddr %s udp dport %d accept\n", words(a.Addr()), a.Addr(), a.Port())
		}
		c.match(&b, "daddr", "drop")
		b.WriteString("\t}\n")
	}
	b.WriteString("\tchain input {\n\t\ttype filter hook prerouting priority -300; policy accept;\n")
	fmt.Fprintf(&b, "\t\tiifname { %q, \"lo\" } accept\n", c.Interface)
	if a := c.Outer; a.IsValid() {
		fmt.Fprintf(&b, "\t\t%s saddr %s udp sport %d accept\n", words(a.Addr()), a.Addr(), a.Port())
	}
	c.match(&b, "saddr", "drop")
	b.WriteString("\t}\n}\n")
	return b.String()
}

// match writes the rules for all networks.
func (c *Config) match(b *strings.Builder, field, verdict string) {
	for _, p := range c.Networks {
		fmt.Fprintf(b, "\t\t%s %s %s counter %s\n", words(p.Addr()), field, p.Masked(), verdict)
	}
}

func words(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

// run gives a script to nft.
func run(script string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if text := strings.TrimSpace(string(out)); text != "" {
		first, _, _ := strings.Cut(text, "\n")
		return fmt.Errorf("%w: %s", err, first)
	}
	return err
}
