package acomm

import (
	"context"
	"net/url"
	"time"
)

// What the tests reach behind the documented surface: the times, so that no test
// has to wait for a minute, and nothing else.

const (
	SendTimeout = sendTimeout
	MaxPayload  = maxPayload
	MaxAnswer   = maxAnswer
	MaxPath     = maxSocketPath
	StreamEnd   = streamEnd
)

// SendContext is Send with another time than a minute.
func SendContext(ctx context.Context, addr *url.URL, payload any) error {
	return send(ctx, addr, payload)
}

// SetExchangeTimeout sets what bounds the reading of a response. Call it before
// Start, as the others.
func (t *Tracker) SetExchangeTimeout(d time.Duration) { t.exchangeTimeout = d }

func (t *Tracker) SetStreamClaim(d time.Duration) { t.streamClaim = d }

func (t *Tracker) SetStreamEnd(d time.Duration) { t.streamEnd = d }

func (t *Tracker) SetStreamStall(d time.Duration) { t.streamStall = d }
