package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// A Size is a number of bytes. As text it is a number and a unit, "64KiB" or "20GB"; without a unit it is bytes.
type Size int64

// Multiples of a byte.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

// sizeUnits are the units of a Size, the largest first.
var sizeUnits = []struct {
	name  string
	bytes Size
}{
	{"TiB", TiB}, {"TB", 1e12}, {"GiB", GiB}, {"GB", 1e9}, {"MiB", MiB}, {"MB", 1e6}, {"KiB", KiB}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

// ParseSize reads a size as [Size.String] prints it; a fraction is allowed if it comes to whole bytes ("1.5GiB"). The error says what to
// write instead.
func ParseSize(s string) (Size, error) {
	number := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := s[len(number):]
	number = strings.TrimSpace(number)
	if number == "" || strings.Trim(number, "0123456789.") != "" {
		return 0, fmt.Errorf("%q is not a size: write a number and a unit, as in 64KiB or 20GB", clip(s))
	}
	multiple := Size(1)
	if unit != "" {
		multiple = 0
		for _, u := range sizeUnits {
			if u.name == unit {
				multiple = u.bytes
			}
		}
	}
	if multiple == 0 {
		for _, u := range sizeUnits {
			if len(unit) == 1 && strings.EqualFold(u.name, unit+"iB") {
				return 0, fmt.Errorf("the unit %q may mean two things: write %s%s (multiples of 1024) or %s%s (of 1000)", unit, number, u.name, number, strings.Replace(u.name, "i", "", 1))
			}
			if strings.EqualFold(u.name, unit) {
				return 0, fmt.Errorf("the unit %q is not known: write %s%s", unit, number, u.name)
			}
		}
		return 0, fmt.Errorf("the unit %q is not known: write KiB, MiB, GiB, TiB (multiples of 1024) or kB, MB, GB, TB (of 1000)", clip(unit))
	}
	if whole, err := strconv.ParseInt(number, 10, 64); err == nil {
		if whole > math.MaxInt64/int64(multiple) {
			return 0, fmt.Errorf("%s is larger than any size can be: the most is %s", clip(s), Size(math.MaxInt64))
		}
		return Size(whole) * multiple, nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size: write a number and a unit, as in 64KiB or 20GB", clip(s))
	}
	f *= float64(multiple)
	switch {
	case f >= math.MaxInt64:
		return 0, fmt.Errorf("%s is larger than any size can be: the most is %s", clip(s), Size(math.MaxInt64))
	case f != math.Trunc(f):
		return 0, fmt.Errorf("%s is not a whole number of bytes: write it in a smaller unit", clip(s))
	}
	return Size(f), nil
}

// String returns the size in the unit that makes it shortest without rounding.
func (s Size) String() string {
	if s <= 0 {
		return strconv.FormatInt(int64(s), 10) + "B"
	}
	shortest := ""
	for _, u := range sizeUnits {
		if s%u.bytes != 0 {
			continue
		}
		if text := strconv.FormatInt(int64(s/u.bytes), 10) + u.name; shortest == "" || len(text) < len(shortest) {
			shortest = text
		}
	}
	return shortest
}

// MarshalText returns the size as String does.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the size as ParseSize does.
func (s *Size) UnmarshalText(text []byte) error {
	parsed, err := ParseSize(string(text))
	if err != nil {
		return err
	}
	*s = parsed
	return nil
}

// A Duration is a time that is never negative. As text it is numbers and units, "30s", "1h30m" or "7d"; a day has 24 hours.
type Duration time.Duration

const day = 24 * time.Hour

// ParseDuration reads a duration as [Duration.String] prints it. The error says what to write instead.
func ParseDuration(s string) (Duration, error) {
	text := strings.TrimSpace(s)
	if text == "0" {
		return 0, nil
	}
	if strings.HasPrefix(text, "-") {
		return 0, fmt.Errorf("%s is negative: write a time to come, or 0s for none", clip(s))
	}
	if text != "" && strings.Trim(text, "0123456789.") == "" {
		return 0, fmt.Errorf("%s has no unit: write %ss for seconds, %sm for minutes, %sh for hours or %sd for days", clip(s), clip(text), clip(text), clip(text), clip(text))
	}
	var days time.Duration
	if before, after, ok := strings.Cut(text, "d"); ok {
		n, err := strconv.ParseUint(before, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%q is not a time: write a number and a unit, as in 30s, 10m, 24h or 7d", clip(s))
		}
		if n > uint64(math.MaxInt64/day) {
			return 0, fmt.Errorf("%s is longer than any time can be: the most is %dd", clip(s), math.MaxInt64/day)
		}
		days, text = time.Duration(n)*day, after
		if text == "" {
			return Duration(days), nil
		}
	}
	rest, err := time.ParseDuration(text)
	if err != nil || rest < 0 || strings.HasPrefix(text, "+") {
		return 0, fmt.Errorf("%q is not a time: write a number and a unit, as in 30s, 10m, 24h or 7d", clip(s))
	}
	if rest > math.MaxInt64-days {
		return 0, fmt.Errorf("%s is longer than any time can be: the most is %dd", clip(s), math.MaxInt64/day)
	}
	return Duration(days + rest), nil
}

// String returns the duration in days, hours, minutes and seconds, those that are 0 left out: "30s", "1h30m", "7d".
func (d Duration) String() string {
	if d <= 0 {
		return time.Duration(d).String()
	}
	var b strings.Builder
	rest := time.Duration(d)
	for _, u := range []struct {
		name string
		unit time.Duration
	}{{"d", day}, {"h", time.Hour}, {"m", time.Minute}} {
		if n := rest / u.unit; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			rest %= u.unit
		}
	}
	if rest > 0 {
		b.WriteString(rest.String())
	}
	return b.String()
}

// MarshalText returns the duration as String does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the duration as ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := ParseDuration(string(text))
	if err != nil {
		return err
	}
	*d = parsed
	return nil
}

// A Mode is the permissions of a file. As text it is an octal number, "0660".
type Mode uint32

// ParseMode reads permissions as [Mode.String] prints them. The error says what to write instead.
func ParseMode(s string) (Mode, error) {
	digits := strings.TrimPrefix(s, "0o")
	n, err := strconv.ParseUint(digits, 8, 32)
	if err != nil || len(digits) < 3 || len(digits) > 4 || n > 0o777 {
		return 0, fmt.Errorf("%q is not a file's permissions: write three or four octal digits, as in 0660", clip(s))
	}
	return Mode(n), nil
}

// String returns the permissions in four octal digits.
func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// MarshalText returns the permissions as String does.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads the permissions as ParseMode does.
func (m *Mode) UnmarshalText(text []byte) error {
	parsed, err := ParseMode(string(text))
	if err != nil {
		return err
	}
	*m = parsed
	return nil
}

// clip cuts a stranger's text to a length fit for an error message.
func clip(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
