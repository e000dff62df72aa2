package main

import (
	"net/url"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
)

// unreadLook is between looks whether somebody waits for the place of a reader that pauses.
const unreadLook = time.Second

// endUnread ends a stream that has stood unread for --unread-duration, and so gives
// its place to the next request: nobody has come for it, or another request waits
// while its reader takes nothing. A program that is silent is waited for.
func (s *service) endUnread(req *acomm.Request, src *programStream, addr *url.URL) {
	src.moved.touch() // from the response on
	for {
		left := s.unread - src.unreadFor()
		if left <= 0 && (!src.isClaimed() || s.waiting.Load() > 0) {
			break
		}
		if left <= 0 {
			left = unreadLook
		}
		timer := time.NewTimer(left)
		select {
		case <-src.closed:
			timer.Stop()
			return
		case <-timer.C:
		}
	}
	logrus.Warnf("request %s: ended its stream, because nobody has read it for %v", printable(req.ID), s.unread)
	_ = src.Close()
	if !src.isClaimed() {
		s.dropStream(req, addr)
	}
}

// unreadFor is how long the stream has had something to read and nobody to read it.
func (s *programStream) unreadFor() time.Duration {
	if s.reading.Load() {
		return 0
	}
	return time.Since(s.moved.born) - time.Duration(s.moved.last.Load())
}
