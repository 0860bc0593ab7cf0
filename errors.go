package acproxy

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"
)

// The kinds of failure. Every error that leaves a package of acproxy matches at most one of them by [errors.Is]; one that matches none is
// a fault of this machine or of acproxy itself.
var (
	ErrInvalid   = errors.New("not valid")                    // what was asked can't be meant: a bad name, label or image ID
	ErrNotFound  = errors.New("not found")                    // neither the publisher nor the store has it
	ErrRefused   = errors.New("refused")                      // trust or policy says no
	ErrPublisher = errors.New("the publisher is at fault")    // it answered, but not properly, or can't be reached
	ErrTimeout   = errors.New("the publisher is too slow")    // no answer, or no progress, in the time allowed
	ErrNoSpace   = errors.New("no space")                     // the store has no room for it
	ErrOffline   = errors.New("offline")                      // it isn't held here, and this side dials nobody
	ErrBusy      = errors.New("too much in progress already") // try again later
)

// An Error is a failure with what a person, and a program, needs to act on it.
type Error struct {
	Kind       error         // one of the sentinels
	Code       string        // a stable word for programs: "unknown-key"; it ends the problem type of RFC 9457
	Detail     string        // one sentence: what was wrong, where, and what to do
	Trace      Trace         // what was tried, in order
	RetryAfter time.Duration // when it is worth asking again; 0 says nothing
	Err        error         // the cause, if there is one
}

// Error returns the detail and the cause.
func (e *Error) Error() string {
	switch {
	case e.Err == nil:
		return e.Detail
	case e.Detail == "":
		return e.Err.Error()
	}
	return e.Detail + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is the error's kind.
func (e *Error) Is(target error) bool { return target == e.Kind }

// Code returns the stable word of an error: the Code of an [*Error], or what the error's own method Code() string says. It returns "" if the
// error has none.
func Code(err error) string {
	var coded interface{ Code() string }
	if errors.As(err, &coded) {
		return coded.Code()
	}
	var e *Error
	if errors.As(err, &e) && e.Code != "" {
		return e.Code
	}
	return ""
}

// KindOf returns the sentinel that an error matches, nil if it matches none.
func KindOf(err error) error {
	for _, kind := range []error{ErrInvalid, ErrNotFound, ErrRefused, ErrPublisher, ErrTimeout, ErrNoSpace, ErrOffline, ErrBusy} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return nil
}

// CodeShortage is the code of what failed because this process or its machine has run out of something that others may give back.
const CodeShortage = "out-of-resources"

// Shortage reports whether an error is that this process or its machine has run out of something: descriptors, memory for the network, local ports. Then it says nothing of
// what was asked, nor of who was.
func Shortage(err error) bool {
	for _, of := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, of) {
			return true
		}
	}
	return false
}

// Invalid returns an error matching [ErrInvalid].
func Invalid(format string, args ...any) error {
	return &Error{Kind: ErrInvalid, Code: "invalid", Detail: fmt.Sprintf(format, args...)}
}

// An Attempt is one thing that was tried on the way to an image.
type Attempt struct {
	What   string        `json:"what"`             // "discovery", "key", "signature" or "image"
	URL    string        `json:"url"`              // what was asked for, without credentials
	Status int           `json:"status,omitempty"` // the HTTP status, 0 if there was no answer
	Note   string        `json:"note,omitempty"`   // what it gave: the tags found, the template chosen, where it redirected, that it came from the cache
	Err    string        `json:"error,omitempty"`  // why it was not enough
	Took   time.Duration `json:"took,omitempty"`   // nanoseconds
}

// String returns the attempt on one line.
func (a Attempt) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", a.What, a.URL)
	if a.Status != 0 {
		fmt.Fprintf(&b, " → %d", a.Status)
	}
	if a.Note != "" {
		b.WriteString(": " + a.Note)
	}
	if a.Err != "" {
		b.WriteString(": " + a.Err)
	}
	return b.String()
}

// A Trace is what was tried, in order.
type Trace []Attempt
