package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms"
)

// statusAnswer is status --json: every daemon that the site file names, in the
// order kme, sims, lines. A daemon that does not answer has error set instead
// of a status.
type statusAnswer struct {
	Site    string         `json:"site,omitempty"`
	Daemons []daemonAnswer `json:"daemons"`
}

type daemonAnswer struct {
	Daemon string          `json:"daemon,omitempty"`
	ID     string          `json:"id,omitempty"`
	Socket string          `json:"socket"`
	Error  string          `json:"error,omitempty"`
	Status *control.Status `json:"status,omitempty"`
}

// patience bounds the wait for one daemon's status.
const patience = 3 * time.Second

func newStatusCommand() *cobra.Command {
	var file, socket string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how every daemon of the site is",
		Long: "status asks every daemon of the site file (--config), or one daemon (--socket).\n" +
			"It exits 1 when a daemon does not answer, after showing those that do.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			answer, err := sockets(cmd, file, socket)
			if err != nil {
				return err
			}
			return status(cmd.Context(), cmd.OutOrStdout(), answer, asJSON)
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().StringVar(&socket, "socket", "", "the control socket of one daemon, a `path`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// sockets lists whom to ask.
func sockets(cmd *cobra.Command, file, socket string) (*statusAnswer, error) {
	switch {
	case (file == "") == (socket == ""):
		return nil, usage(errors.New("expected one of --config and --socket"),
			"quietline status --config FILE")
	case socket != "":
		return &statusAnswer{Daemons: []daemonAnswer{{Socket: socket}}}, nil
	}
	site, err := loadConfig(cmd, file)
	if err != nil {
		return nil, err
	}
	return &statusAnswer{Site: site.Site, Daemons: daemonsOf(site)}, nil
}

// daemonsOf lists the daemons that a site file asks for.
func daemonsOf(s *config.Site) []daemonAnswer {
	list := []daemonAnswer{}
	if s.KME != nil {
		list = append(list, daemonAnswer{Daemon: "kme", ID: s.KME.ID, Socket: s.KME.Control})
	}
	for _, l := range s.Links {
		if l.Simulator != nil {
			list = append(list, daemonAnswer{Daemon: "sim", ID: l.ID, Socket: l.Simulator.Control})
		}
	}
	for _, l := range s.Lines {
		list = append(list, daemonAnswer{Daemon: "line", ID: l.ID, Socket: l.Control})
	}
	return list
}

func status(ctx context.Context, w io.Writer, answer *statusAnswer, asJSON bool) error {
	var g errgroup.Group
	for i := range answer.Daemons {
		g.Go(func() error { ask(ctx, &answer.Daemons[i]); return nil })
	}
	_ = g.Wait()
	if asJSON {
		if err := printJSON(w, answer); err != nil {
			return err
		}
	} else if err := printStatus(w, answer); err != nil {
		return err
	}
	for _, d := range answer.Daemons {
		if d.Error != "" {
			return errReported
		}
	}
	return nil
}

func ask(ctx context.Context, d *daemonAnswer) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := control.Dial(d.Socket).Status(ctx)
	if err != nil {
		d.Error = err.Error()
		return
	}
	d.Daemon, d.ID, d.Status = s.Daemon, s.ID, &s
}

// printStatus shows the answers to a person.
func printStatus(w io.Writer, answer *statusAnswer) error {
	p := &printer{w: w, now: time.Now()}
	if answer.Site != "" {
		p.line("site %s", answer.Site)
	}
	for _, d := range answer.Daemons {
		p.daemon(d)
	}
	return p.err
}

// printer keeps the first error of many small writes.
type printer struct {
	w   io.Writer
	now time.Time
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func (p *printer) daemon(d daemonAnswer) {
	if d.Status == nil {
		p.line("%-5s%s: DOWN: %s", d.Daemon, d.ID, d.Error)
		return
	}
	mark := ""
	if d.Status.Simulated {
		mark = "  (simulated: protects nothing)"
	}
	switch s := d.Status; {
	case s.KME != nil:
		p.line("kme  %s: %s%s", d.ID, state(s.KME.Serving, "serving", s.KME.Reason), mark)
		p.kme(s.KME)
	case s.Line != nil:
		p.line("line %s: %s since %s%s%s", d.ID, s.Line.Level, p.age(s.Line.Since),
			because(s.Line.Reason), mark)
		p.lineDetail(s.Line)
	case s.Sim != nil:
		p.line("sim  %s: %s%s", d.ID, state(s.Sim.Up, "up", s.Sim.Reason), mark)
		p.sim(s.Sim)
	}
	for _, c := range d.Status.Certificates {
		p.certificate(c)
	}
}

func (p *printer) certificate(c control.Certificate) {
	if c.Left == nil {
		p.line("     CERTIFICATE %s: %s", c.File, c.Fault)
		return
	}
	p.line("     certificate %s until %s, renewed from %s on%s", c.Subject,
		c.NotAfter.Local().Format(time.DateOnly), c.Due.Local().Format(time.DateOnly), because(c.Fault))
}

func (p *printer) kme(k *control.KME) {
	for _, w := range k.Warnings {
		p.line("     WARNING %s", w)
	}
	if k.Sealed {
		p.line("     %s since then", count(int(k.Tries), "wrong passphrase"))
		return
	}
	for _, peer := range k.Peers {
		p.line("     peer %s: %s", peer.KME, state(peer.Up, "up", peer.Reason))
	}
	for _, l := range k.Links {
		if l.ID == string(kms.Loopback) {
			p.line("     loopback, keys between SAEs of this KME, no QKD: %d bits stored, %d delivered",
				l.Stored, l.Delivered)
			continue
		}
		p.line("     link %s: %s, QBER %s, %s secret; %d bits stored, %d drawable here", l.ID,
			state(l.Up, "up", l.Reason), percent(l.QBER), rate(l.SecretRate), l.Stored, l.Drawable)
	}
	p.line("     keys: %d drawn, %d fetched, %d calls refused", k.KeysDrawn, k.KeysFetched, k.Refused)
	for _, alarm := range k.Alarms {
		p.line("     ALARM %s", alarm)
	}
}

func (p *printer) lineDetail(l *control.Line) {
	p.line("     policy %s, epoch %d%s, %s; %d rekeys", l.Policy, l.Epoch, seconds(l.Age),
		stock(l.Stock), l.Rekeys)
	if l.Handshake != "" || l.Failure != "" {
		p.line("     handshake: %s%s", cmp.Or(l.Handshake, "none"), because(l.Failure))
	}
	if l.Pad != nil {
		p.pad(l.Pad)
	}
	if l.PeerLevel != "" {
		p.line("     the other end: %s%s", l.PeerLevel, because(l.PeerReason))
	}
	for _, alarm := range l.Standing {
		p.line("     ALARM %s", alarm)
	}
	if l.LastAlarm != "" {
		p.line("     %s, last: %s", count(int(l.Alarms), "alarm"), l.LastAlarm)
	}
	p.line("     sent %d packets, %d bytes; received %d packets, %d bytes", l.Sent.Packets,
		l.Sent.Bytes, l.Received.Packets, l.Received.Bytes)
}

func (p *printer) pad(d *control.Pad) {
	lasts := "does not run out at the present rates"
	if d.LeftFor != nil {
		lasts = "lasts " + (time.Duration(*d.LeftFor) * time.Second).String()
	}
	out, in := d.Out, d.In
	p.line("     one-time pad %s: %d of %d bytes, %s; %s out, %s in", d.Mark, d.Left, d.Hold, lasts,
		rate(&out), rate(&in))
	for _, c := range d.Classes {
		p.line("     class %s: %d packets under pad, %d without, %d without for want of pad, %d refused",
			c.Name, c.Padded, c.Plain, c.Demoted, c.Refused)
	}
	if !d.InformationTheoretic {
		p.line("     not information-theoretic: %s", strings.Join(d.NotBecause, "; "))
	}
}

func (p *printer) sim(s *control.Sim) {
	fibre := "fibre whole"
	if !s.FibreUp {
		fibre = "fibre CUT"
	}
	if s.Eve > 0 {
		fibre += fmt.Sprintf(", EVE on %.0f %% of pulses", 100*s.Eve)
	}
	p.line("     %s, preset %s, %s", s.Role, s.Preset, fibre)
	p.line("     QBER %s, %s sifted, %s secret; %d blocks", percent(s.QBER), rate(s.SiftedRate),
		rate(s.SecretRate), s.Blocks)
}

func (p *printer) age(t time.Time) string {
	return t.Local().Format(time.DateTime) + " (" + p.now.Sub(t).Round(time.Second).String() + ")"
}

func state(good bool, word, reason string) string {
	if good {
		return word
	}
	return "NOT " + word + because(reason)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

func percent(ratio *float64) string {
	if ratio == nil {
		return "not known"
	}
	return fmt.Sprintf("%.2f %%", 100**ratio)
}

func rate(bps *float64) string {
	switch {
	case bps == nil:
		return "unknown rate"
	case *bps >= 1e6:
		return fmt.Sprintf("%.2f Mbit/s", *bps/1e6)
	case *bps >= 1e3:
		return fmt.Sprintf("%.1f kbit/s", *bps/1e3)
	}
	return fmt.Sprintf("%.0f bit/s", *bps)
}

func seconds(s *float64) string {
	if s == nil {
		return ""
	}
	return " (" + time.Duration(*s*float64(time.Second)).Round(time.Second).String() + " old)"
}

func stock(keys *int) string {
	if keys == nil {
		return "stock not known"
	}
	return count(*keys, "key") + " in stock"
}
