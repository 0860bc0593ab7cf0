package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A version is one as semver.org has it, without a v before it.
type version string

var semver = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$`)

// String returns it as it is.
func (v version) String() string { return string(v) }

// Debian returns it as Debian orders versions: what comes before a release has a tilde. A dash would begin Debian's own revision.
func (v version) Debian() string {
	release, build, built := strings.Cut(string(v), "+")
	release = strings.Replace(release, "-", "~", 1)
	release = strings.ReplaceAll(release, "-", ".")
	if built {
		return release + "+" + strings.ReplaceAll(build, "-", ".")
	}
	return release
}

// Tag returns it as the tag of an image, in which there is no plus sign.
func (v version) Tag() string { return strings.ReplaceAll(string(v), "+", "_") }

// versionOf returns the version that was given, else the one that git tells of.
func (r *release) versionOf(ctx context.Context, given string) (version, error) {
	if given != "" {
		if given = strings.TrimPrefix(given, "v"); !semver.MatchString(given) {
			return "", fmt.Errorf("%q is no version: write it as 1.2.3, or 1.2.3-rc.1", given)
		}
		return version(given), nil
	}
	described, err := r.output(ctx, nil, "git", "describe", "--tags", "--match", "v[0-9]*", "--long", "--always", "--dirty", "--abbrev=12")
	if err != nil {
		return "", fmt.Errorf("what version is this? Give one with -version: %w", err)
	}
	commits, err := r.output(ctx, nil, "git", "rev-list", "--count", "HEAD")
	if err != nil {
		return "", err
	}
	return versionFrom(strings.TrimSpace(described), strings.TrimSpace(commits))
}

// versionFrom makes a version of what git describe --long says. After a tag it is one on the way to the next patch; without any tag one on the way to the
// first version, with the number of all commits, so that later ones are greater.
func versionFrom(described, commits string) (version, error) {
	described, dirty := strings.CutSuffix(described, "-dirty")
	v := "0.0.0-dev." + commits + "+g" + described
	if i := strings.LastIndex(described, "-g"); strings.HasPrefix(described, "v") && i > 0 {
		j := strings.LastIndex(described[:i], "-")
		if j < 0 {
			return "", fmt.Errorf("git describe says %q, which isn't TAG-NUMBER-gCOMMIT", described)
		}
		tag, since, commit := described[1:j], described[j+1:i], described[i+1:]
		switch m := semver.FindStringSubmatch(tag); {
		case m == nil:
			return "", fmt.Errorf("the tag v%s is no version as v1.2.3", tag)
		case since == "0":
			v = tag
		case m[4] != "": // after 1.2.3-rc.1 comes 1.2.3-rc.1.dev.5
			v = m[1] + "." + m[2] + "." + m[3] + m[4] + ".dev." + since + "+" + commit
		default:
			patch, err := strconv.Atoi(m[3])
			if err != nil {
				return "", err
			}
			v = fmt.Sprintf("%s.%s.%d-dev.%s+%s", m[1], m[2], patch+1, since, commit)
		}
	}
	if dirty {
		if strings.Contains(v, "+") {
			return version(v + ".dirty"), nil
		}
		return version(v + "+dirty"), nil
	}
	return version(v), nil
}

// dateOf returns SOURCE_DATE_EPOCH (reproducible-builds.org/specs/source-date-epoch), else when the last commit was made.
func (r *release) dateOf(ctx context.Context) (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		var err error
		if text, err = r.output(ctx, nil, "git", "log", "-1", "--format=%ct"); err != nil {
			return time.Time{}, fmt.Errorf("of when is this? Set SOURCE_DATE_EPOCH: %w", err)
		}
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q, and not a number of seconds since 1970", text)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
