package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/tunnel/lab"
)

// application makes the client of one of the site's applications, with its
// sockets in the site's namespace.
func (s *site) application(sae string) (*etsi014.Client, error) {
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: s.path(sae + ".pem"), Key: s.path(sae + ".key")}},
		CA:    s.path("sae-ca.pem"),
	})
	if err != nil {
		return nil, err
	}
	return etsi014.NewClient(etsi014.ClientConfig{
		URLs: []string{"https://" + s.door()}, TLS: live.Client, Dial: s.ns.Dial,
	})
}

// keep joins both ETSI doors to the caller's loopback, prints lines to paste,
// and stays until the context ends.
func (d *demo) keep(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	doors := map[*site]string{}
	for _, s := range []*site{d.a, d.b} {
		l, err := lab.ListenOutside("tcp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		doors[s] = l.Addr().String()
		wg.Go(func() { join(ctx, l, s) })
	}
	pid, err := lab.OutsidePID()
	if err != nil {
		return err
	}
	if err := d.stocked(ctx); err != nil {
		return err
	}
	d.pasteable(pid, doors)
	<-ctx.Done()
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	return ctx.Err()
}

// stocked waits until the lines to paste find keys, which after the cut come
// again within some seconds; on a slow machine it lets them be printed all the
// same after a minute.
func (d *demo) stocked(ctx context.Context) error {
	const enough, wait, poll = 4, time.Minute, 200 * time.Millisecond
	c, err := d.a.application(d.a.recordsSAE())
	if err != nil {
		return err
	}
	defer c.Close()
	for until := time.Now().Add(wait); time.Now().Before(until) && ctx.Err() == nil; {
		if st, err := c.Status(ctx, etsi014.SAEID(d.b.recordsSAE())); err == nil &&
			st.StoredKeys >= enough {
			return nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(poll):
		}
	}
	return nil
}

// pasteable prints curl lines that work as they stand in another shell of the
// same user. The certificates are in a folder that only this run's processes
// see, so the path leads through one of them.
func (d *demo) pasteable(pid int, doors map[*site]string) {
	curl := func(s *site, sae string) string {
		return fmt.Sprintf(`curl -s -w ' %%{http_code}\n' --cacert $Q/%[1]s/sae-ca.pem --cert $Q/%[1]s/%[2]s.pem --key $Q/%[1]s/%[2]s.key`,
			s.name, sae)
	}
	url := func(s *site, peer, call string) string {
		return fmt.Sprintf("https://%s/api/v1/keys/%s/%s", doors[s], peer, call)
	}
	tokyo, kochi := curl(d.a, d.a.recordsSAE()), curl(d.b, d.b.recordsSAE())
	draw := url(d.a, d.b.recordsSAE(), "enc_keys")
	collect := `"` + url(d.b, d.a.recordsSAE(), "dec_keys") + `?key_ID=$ID"`
	const id = `ID=$(echo "$KEY" | sed 's/.*"key_ID":"\([^"]*\)".*/\1/')`
	fmt.Fprintf(d.opt.Out, `
The ETSI GS QKD 014 doors stay open. Paste into another shell of this user; Ctrl-C here ends all.

Q=/proc/%d/root%s
# what tokyo can draw for kochi
%s %s
# tokyo draws a key
KEY=$(%s %s); echo "$KEY"; %s
# kochi collects the same bytes by key_ID; a second time it is gone: 400
%s %s
%s %s
# another application of kochi asks for a key that is not its own: 401
KEY=$(%s %s); %s
%s %s
# HEAD draws nothing: 405
%s -I %s
`,
		pid, d.dir,
		tokyo, url(d.a, d.b.recordsSAE(), "status"),
		tokyo, draw, id,
		kochi, collect, kochi, collect,
		tokyo, draw, id, curl(d.b, d.b.lineSAE()), collect,
		tokyo, draw)
}

// join hands each connection on to the site's door until the context ends.
func join(ctx context.Context, l net.Listener, s *site) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() { splice(ctx, c, s) })
	}
}

func splice(ctx context.Context, c net.Conn, s *site) {
	defer c.Close()
	door, err := s.ns.Dial(ctx, "tcp", s.door())
	if err != nil {
		return // curl shows a closed connection; the door's log tells why
	}
	defer door.Close()
	stop := context.AfterFunc(ctx, func() { c.Close(); door.Close() })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(door, c)
		door.Close()
	}()
	_, _ = io.Copy(c, door)
	c.Close()
	<-done
}
