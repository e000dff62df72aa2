package main

import (
	"net/url"
	"sync"
	"time"
)

// publishedStreams holds the streams that others have been told of, or are being
// told of, until somebody reads them.
type publishedStreams struct {
	unread time.Duration // for somebody to come

	mu    sync.Mutex // guards the fields below
	byKey map[string]*publishedStream
	ended bool
}

type publishedStream struct {
	addr  *url.URL
	timer *time.Timer // nil while others are being told of it
}

// add notes a stream that others are going to be told of.
func (p *publishedStreams) add(published, addr *url.URL) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byKey == nil {
		p.byKey = make(map[string]*publishedStream)
	}
	if key := streamKey(published); p.byKey[key] == nil {
		p.byKey[key] = &publishedStream{addr: addr}
	}
}

// has reports whether the stream is published.
func (p *publishedStreams) has(published *url.URL) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byKey[streamKey(published)] != nil
}

// told gives others the time to come for the stream. After that it is ended.
func (p *publishedStreams) told(published *url.URL) {
	key := streamKey(published)
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.byKey[key]; s != nil && s.timer == nil && !p.ended {
		s.timer = time.AfterFunc(p.unread, func() { p.end(key) })
	}
}

// claimed notes that somebody has come.
func (p *publishedStreams) claimed(published *url.URL) { p.take(streamKey(published)) }

func (p *publishedStreams) take(key string) *publishedStream {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.byKey[key]
	if s != nil && s.timer != nil {
		s.timer.Stop()
	}
	delete(p.byKey, key)
	return s
}

// end ends the stream, unless somebody has come for it. It does no harm to one that
// somebody is about to read: that has one consumer.
func (p *publishedStreams) end(key string) {
	if s := p.take(key); s != nil {
		leaveStream(s.addr)
	}
}

// endAll ends all, and those that are published later.
func (p *publishedStreams) endAll() {
	p.mu.Lock()
	p.ended = true
	keys := make([]string, 0, len(p.byKey))
	for key := range p.byKey {
		keys = append(keys, key)
	}
	p.mu.Unlock()
	for _, key := range keys {
		p.end(key)
	}
}
