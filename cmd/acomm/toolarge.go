package main

import (
	"errors"
	"fmt"
	"net/url"
	"syscall"

	"github.com/mistifyio/acomm"
)

// isTooLarge reports whether the error of sending a response says that it is too
// large for its hook: one of NATS takes less than what a response can have come by.
// From an HTTP hook it can be about the hook's answer, and the response was taken.
func isTooLarge(hook *url.URL, resp *acomm.Response, err error) bool {
	overHTTP := hook.Scheme == "http" || hook.Scheme == "https"
	mustBe := resp.Result != nil && len(*resp.Result) > maxOutput
	return errors.Is(err, syscall.EMSGSIZE) && (mustBe || !overHTTP)
}

// tooLarge takes the place of a response that is.
func tooLarge(resp *acomm.Response) *acomm.Response {
	err := errors.New("the response is too large for the hook")
	if resp.Result != nil {
		err = fmt.Errorf("the result of %d bytes is too large for the hook; use a stream", len(*resp.Result))
	}
	return &acomm.Response{ID: resp.ID, Error: err}
}
