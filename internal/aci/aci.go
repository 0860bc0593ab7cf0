// Package aci reads appc images: what they are called, what they are, and whether their tar keeps the rules.
package aci

import (
	"fmt"

	"github.com/acproxy/acproxy"
)

// Limits bound what reading an image may cost. A field that is zero has its default.
type Limits struct {
	// MaxManifest is the most bytes an image manifest may have; 1 MiB.
	MaxManifest int64
	// MaxEntries is the most entries the tar may have, the manifest and rootfs among them; 1,000,000. The names already seen are kept in
	// memory as 16 bytes each, so that a million cost about 40 MB.
	MaxEntries int
	// MaxUncompressed is the most bytes the uncompressed tar may have, padding included; 64 GiB.
	MaxUncompressed int64
	// MaxRatio is how many uncompressed bytes may come out for each compressed one that went in, counted over everything read so far; 200.
	// Root file systems compress 2 to 5 times; runs of zeros, gzip's 1000 times and the others' 10,000.
	MaxRatio float64
	// RatioFrom is the uncompressed size from which on MaxRatio counts; 10 MiB. Below it a ratio harms nobody, and small images of empty
	// files do compress well.
	RatioFrom int64
	// MaxDictionary is the most bytes of dictionary that an xz stream may ask for; 128 MiB. xz -9 uses 64 MiB, the format allows 4 GiB, and a
	// reader has to allocate it before it has seen a byte of content.
	MaxDictionary int64
}

func (l Limits) withDefaults() Limits {
	if l.MaxManifest == 0 {
		l.MaxManifest = defaultMaxManifest
	}
	if l.MaxEntries == 0 {
		l.MaxEntries = 1_000_000
	}
	if l.MaxUncompressed == 0 {
		l.MaxUncompressed = 64 << 30
	}
	if l.MaxRatio == 0 {
		l.MaxRatio = 200
	}
	if l.RatioFrom == 0 {
		l.RatioFrom = 10 << 20
	}
	if l.MaxDictionary == 0 {
		l.MaxDictionary = 128 << 20
	}
	return l
}

const defaultMaxManifest = 1 << 20

// The rules a [Violation] can name.
const (
	RuleNotAnImage       = "not-an-image"           // neither a tar nor something that gzip, bzip2 or xz made
	RuleTruncated        = "truncated"              // it ends before its format says that it does
	RuleCorrupt          = "corrupt"                // the compressed stream contradicts itself: a checksum, a length, a code
	RuleUnsupported      = "unsupported"            // a feature of xz or tar that images have no use for
	RuleDictionary       = "dictionary-too-large"   // xz asks for more memory than Limits.MaxDictionary
	RuleBombRatio        = "bomb-ratio"             // more comes out than Limits.MaxRatio allows
	RuleTooLarge         = "too-large"              // more than Limits.MaxUncompressed
	RuleTooManyEntries   = "too-many-entries"       // more than Limits.MaxEntries
	RuleTrailingBytes    = "trailing-bytes"         // something follows the end of the compressed stream or of the tar
	RuleBadTar           = "bad-tar"                // a tar header that can't be read
	RuleNoManifest       = "no-manifest"            // no manifest in the whole tar
	RuleSecondManifest   = "second-manifest"        // more than one
	RuleManifestFile     = "manifest-not-a-file"    // it is a link, a directory or a device
	RuleManifestTooLarge = "manifest-too-large"     // more than Limits.MaxManifest
	RuleBadManifest      = "bad-manifest"           // what it says isn't an image manifest
	RuleNoRootfs         = "no-rootfs"              // no entry for the rootfs directory
	RuleRootfsDirectory  = "rootfs-not-a-directory" // it is a file, a link or a device
	RuleOutsideRootfs    = "outside-rootfs"         // an entry, or the target of a hard link, that is neither the manifest nor in rootfs
	RuleDuplicateEntry   = "duplicate-entry"        // two entries of one name
	RuleAbsolutePath     = "absolute-path"          // a name that begins with a slash
	RuleDotDot           = "dot-dot"                // a name with .. in it
)

// A Violation is a rule that an image breaks. It matches [acproxy.ErrPublisher].
type Violation struct {
	Rule   string // a stable word, one of the Rule constants
	Entry  string // the tar entry that breaks it, cut to a length fit for a message; "" if it is none in particular
	Detail string // one clause: what was found, and what was expected
}

// Error returns the rule, the entry and the detail.
func (v *Violation) Error() string {
	if v.Entry == "" {
		return fmt.Sprintf("the image breaks a rule (%s): %s", v.Rule, v.Detail)
	}
	return fmt.Sprintf("the image breaks a rule (%s) at %q: %s", v.Rule, v.Entry, v.Detail)
}

// Is reports whether target is [acproxy.ErrPublisher]: who made the image is at fault.
func (v *Violation) Is(target error) bool { return target == acproxy.ErrPublisher }

// Code returns the rule.
func (v *Violation) Code() string { return v.Rule }

func violation(rule, format string, args ...any) *Violation {
	return &Violation{Rule: rule, Detail: fmt.Sprintf(format, args...)}
}

func violationAt(entry, rule, format string, args ...any) *Violation {
	return &Violation{Rule: rule, Entry: clip(entry), Detail: fmt.Sprintf(format, args...)}
}

// clip cuts a stranger's text to a length fit for an error message.
func clip(s string) string {
	const most = 160
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
