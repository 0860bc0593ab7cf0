package main

import (
	"os/exec"
	"testing"
)

func TestVersionFrom(t *testing.T) {
	for _, test := range []struct {
		name, described, want, debian, tag string
	}{
		{"no tag yet", "88c64a74fd92", "0.0.0-dev.142+g88c64a74fd92", "0.0.0~dev.142+g88c64a74fd92", "0.0.0-dev.142_g88c64a74fd92"},
		{"no tag yet, and changes", "88c64a74fd92-dirty", "0.0.0-dev.142+g88c64a74fd92.dirty", "0.0.0~dev.142+g88c64a74fd92.dirty", "0.0.0-dev.142_g88c64a74fd92.dirty"},
		{"a release", "v1.2.3-0-g88c64a74fd92", "1.2.3", "1.2.3", "1.2.3"},
		{"a release with changes", "v1.2.3-0-g88c64a74fd92-dirty", "1.2.3+dirty", "1.2.3+dirty", "1.2.3_dirty"},
		{"after a release", "v1.2.3-5-g88c64a74fd92", "1.2.4-dev.5+g88c64a74fd92", "1.2.4~dev.5+g88c64a74fd92", "1.2.4-dev.5_g88c64a74fd92"},
		{"a candidate", "v2.0.0-rc.1-0-g88c64a74fd92", "2.0.0-rc.1", "2.0.0~rc.1", "2.0.0-rc.1"},
		{"after a candidate", "v2.0.0-rc.1-7-g88c64a74fd92", "2.0.0-rc.1.dev.7+g88c64a74fd92", "2.0.0~rc.1.dev.7+g88c64a74fd92", "2.0.0-rc.1.dev.7_g88c64a74fd92"},
		{"a tag of another kind", "v1.2-5-g88c64a74fd92", "", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := versionFrom(test.described, "142")
			if (err != nil) != (test.want == "") {
				t.Fatalf("versionFrom = %v, %v", got, err)
			}
			if err != nil {
				return
			}
			if got.String() != test.want || got.Debian() != test.debian || got.Tag() != test.tag {
				t.Errorf("versionFrom = %s, for Debian %s, as a tag %s; want %s, %s, %s", got, got.Debian(), got.Tag(), test.want, test.debian, test.tag)
			}
			if !semver.MatchString(got.String()) {
				t.Errorf("%s is no version as semver.org has it", got)
			}
		})
	}
}

// TestVersionsAscend asks Debian whether what is built later is greater.
func TestVersionsAscend(t *testing.T) {
	need(t, "dpkg")
	ascending := []version{"0.0.0-dev.9+gff", "0.0.0-dev.142+g00", "0.1.0-rc.1", "0.1.0-rc.1.dev.3+gaa", "0.1.0-rc.2", "0.1.0", "0.1.1-dev.1+gaa", "0.1.1-dev.10+gaa", "0.1.1"}
	for i, v := range ascending[1:] {
		if err := exec.Command("dpkg", "--compare-versions", ascending[i].Debian(), "lt", v.Debian()).Run(); err != nil {
			t.Errorf("for Debian %s is not less than %s: %v", ascending[i].Debian(), v.Debian(), err)
		}
	}
}

func TestVersionGiven(t *testing.T) {
	for given, want := range map[string]version{"1.2.3": "1.2.3", "v1.2.3": "1.2.3", "1.2.3-rc.1+x": "1.2.3-rc.1+x", "1.2": "", "latest": "", "01.2.3": ""} {
		got, err := new(release).versionOf(t.Context(), given)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("versionOf(%q) = %q, %v, want %q", given, got, err, want)
		}
	}
}
