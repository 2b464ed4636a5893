package daemon

import (
	"fmt"
	"log/slog"
	"net/url"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/socket"
)

// drivers opens each kind of device by the scheme of its address. A new kind
// is one more line here.
var drivers = map[string]func(address string, log *slog.Logger) (hw.Driver, error){
	"unix": func(address string, log *slog.Logger) (hw.Driver, error) {
		return socket.Open(address, log)
	},
}

// openDriver opens the driver of a link. The caller closes it.
func openDriver(address string, log *slog.Logger) (hw.Driver, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("open driver: %w", err)
	}
	open := drivers[u.Scheme]
	if open == nil {
		return nil, fmt.Errorf("open driver %s: no driver for the scheme %q", address, u.Scheme)
	}
	return open(address, log)
}
