package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// Client speaks to one daemon. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
}

// Dial names the socket of a daemon; nothing is opened before the first call.
func Dial(path string) *Client {
	return &Client{path: path, http: http.Client{Transport: &http.Transport{
		// A socket costs nothing to open, and a kept one outlives its daemon.
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// Status asks the daemon how it is. Like every call it wraps [ErrDown] when
// nobody answers, and [ErrRefused] when the daemon says no.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.call(ctx, http.MethodGet, "status", nil, &s)
	return s, err
}

// Rekey asks a line to begin a new epoch. It returns once the line has taken
// the wish, not once the epoch stands; Status tells.
func (c *Client) Rekey(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "rekey", struct{}{}, nil)
}

// Fibre cuts (false) or restores (true) the fibre of a simulated link.
func (c *Client) Fibre(ctx context.Context, up bool) error {
	return c.call(ctx, http.MethodPost, "fibre", fibreRequest{&up}, nil)
}

// Eve sets the fraction of pulses, 0 to 1, that an eavesdropper on the fibre
// intercepts and resends.
func (c *Client) Eve(ctx context.Context, fraction float64) error {
	return c.call(ctx, http.MethodPost, "eve", eveRequest{&fraction}, nil)
}

func (c *Client) call(ctx context.Context, method, name string, in, out any) error {
	res, err := c.send(ctx, method, name, in)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxStatus))
	if err != nil {
		return fmt.Errorf("ask %s: %w at %s: %w", name, ErrDown, c.path, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("ask %s: read answer: %w", name, err)
	}
	return nil
}

// send asks, and returns an answer that is no refusal; the caller closes it.
func (c *Client) send(ctx context.Context, method, name string, in any) (*http.Response, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", name, err)
	}
	return c.post(ctx, method, name, bytes.NewReader(body), int64(len(body)))
}

func (c *Client) post(ctx context.Context, method, name string, body io.Reader, size int64,
) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://daemon/v1/"+name, body)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", name, err)
	}
	req.ContentLength = size
	res, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, which is ours and tells nothing
		}
		return nil, fmt.Errorf("ask %s: %w at %s: %w", name, ErrDown, c.path, err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxStatus))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w at %s: %w", name, ErrDown, c.path, err)
	}
	var no refusal
	if json.Unmarshal(data, &no) != nil || no.Message == "" {
		no.Message = res.Status
	}
	return nil, fmt.Errorf("ask %s: %w: %s", name, ErrRefused, no.Message)
}
