package web

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// maxRetryAfter bounds what a publisher may say about when to come back.
const maxRetryAfter = 24 * time.Hour

// RetryAfter returns for how long, from now on, an answer asks not to be asked again (Retry-After, RFC 9110, section 10.2.3), in seconds or
// until a date. It is 0 if the answer says nothing, nothing that can be read, or a time that is over, and a day at most.
func RetryAfter(resp *http.Response, now time.Time) time.Duration {
	value := strings.TrimSpace(resp.Header.Get("Retry-After"))
	if value != "" && strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseUint(value, 10, 64)
		if err != nil || seconds > uint64(maxRetryAfter/time.Second) {
			return maxRetryAfter // more digits than any number of seconds needs
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}
