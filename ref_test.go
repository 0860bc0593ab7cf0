package acproxy

import (
	"errors"
	"strings"
	"testing"

	"github.com/appc/spec/schema/types"
)

func TestParseRef(t *testing.T) {
	for _, tt := range []struct {
		name, in, want string
	}{
		{"a name alone", "example.com/app", "example.com/app"},
		{"a version", "example.com/app:1.0", "example.com/app:1.0"},
		{"latest is no version", "example.com/app:latest", "example.com/app"},
		{"labels are sorted", "example.com/app:1.0,os=linux,arch=amd64", "example.com/app:1.0,arch=amd64,os=linux"},
		{"the version may be a label", "example.com/app,version=1.0", "example.com/app:1.0"},
		{"an empty os is none", "example.com/app,os=,arch=amd64", "example.com/app,arch=amd64"},
		{"other labels may be empty", "example.com/app,channel=", "example.com/app,channel="},
		{"a colon in a label's value", "example.com/app,channel=beta:1.2", "example.com/app,channel=beta:1.2"},
		{"hostile versions are values", "example.com/app:../../../etc/passwd", "example.com/app:../../../etc/passwd"},
		{"a comma is written as %2C", "example.com/app:1%2C2", "example.com/app:1%2C2"},
		{"a user's name, as in the specification", "example.com/~user/app_v1", "example.com/~user/app_v1"},
		{"a plus is a plus", "example.com/app:1.0+git", "example.com/app:1.0+git"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref, err := ParseRef(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if got := ref.String(); got != tt.want {
				t.Errorf("String = %q, want %q", got, tt.want)
			}
			again, err := ParseRef(ref.String())
			if err != nil || again != ref {
				t.Errorf("ParseRef(String) = %v, %v, want the same ref", again, err)
			}
		})
	}
}

func TestRefAppendsItsText(t *testing.T) {
	for _, text := range []string{"example.com/app", "example.com/app:1.0", "example.com/app:a%2Cb%20c", "example.com/app,os=linux", "example.com/app:1,arch=amd64,os=linux"} {
		ref, err := ParseRef(text)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := ref.AppendText([]byte("ref=")); err != nil || string(b) != "ref="+text || ref.String() != text {
			t.Errorf("AppendText = %q, %v, String = %q, want %q", b, err, ref, text)
		}
	}
}

func TestParseRefRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, in, says string
	}{
		{"nothing", "", "not an AC identifier"},
		{"upper case", "Example.com/app", "not an AC identifier"},
		{"a port", "example.com:8080/app", "not an AC identifier"}, // the colon begins a version, which then isn't the problem
		{"two separators", "example.com//app", "not an AC identifier"},
		{"a step up", "example.com/../app", "not an AC identifier"},
		{"a hidden segment", "example.com/.acproxy/app", "not an AC identifier"},
		{"an empty version", "example.com/app:", "empty"},
		{"no value", "example.com/app,os", "not label=value"},
		{"a label twice", "example.com/app,a=1,a=2", "given twice"},
		{"two versions", "example.com/app:1,version=2", "given twice"},
		{"a label called name", "example.com/app,name=x", "template variable"},
		{"a label called ext", "example.com/app,ext=x", "template variable"},
		{"a label name that is none", "example.com/app,A=x", "not an AC identifier"},
		{"a control character", "example.com/app:1%0A2", "not printable"},
		{"not UTF-8", "example.com/app:%ff", "not printable"},
		{"a broken escape", "example.com/app:%zz", "percent-encoded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref, err := ParseRef(tt.in)
			if tt.name == "a port" {
				// "8080/app" is a version as good as any; the name is a host alone.
				if err != nil || ref.Name() != "example.com" {
					t.Errorf("ParseRef = %v, %v", ref, err)
				}
				return
			}
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("ParseRef = %v, %v, want an ErrInvalid that says %q", ref, err, tt.says)
			}
		})
	}
}

func TestRefLimits(t *testing.T) {
	name := func(n int) string { return "example.com/" + strings.Repeat("a", n-len("example.com/")) }
	labels := func(n int) map[string]string {
		out := make(map[string]string)
		for i := range n {
			out["l"+strings.Repeat("x", i)] = "v"
		}
		return out
	}
	for _, tt := range []struct {
		name   string
		ref    string
		labels map[string]string
		ok     bool
	}{
		{"a name at the limit", name(MaxNameLength), nil, true},
		{"a name over the limit", name(MaxNameLength + 1), nil, false},
		{"a value at the limit", "example.com/app", map[string]string{"version": strings.Repeat("1", MaxLabelLength)}, true},
		{"a value over the limit", "example.com/app", map[string]string{"version": strings.Repeat("1", MaxLabelLength+1)}, false},
		{"as many labels as allowed", "example.com/app", labels(MaxLabels), true},
		{"one label too many", "example.com/app", labels(MaxLabels + 1), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := NewRef(tt.ref, tt.labels); (err == nil) != tt.ok {
				t.Errorf("NewRef = %v, want success: %v", err, tt.ok)
			}
		})
	}
}

func TestMatches(t *testing.T) {
	ref, err := ParseRef("example.com/app:1.0,os=linux")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		image  string
		labels map[string]string
		code   string
	}{
		{"as asked", "example.com/app", map[string]string{"version": "1.0", "os": "linux"}, ""},
		{"more labels than asked", "example.com/app", map[string]string{"version": "1.0", "os": "linux", "arch": "amd64"}, ""},
		{"another name", "example.com/apple", map[string]string{"version": "1.0", "os": "linux"}, "wrong-name"},
		{"another version", "example.com/app", map[string]string{"version": "1.1", "os": "linux"}, "wrong-labels"},
		{"a label missing, as in a noarch image", "example.com/app", map[string]string{"version": "1.0"}, "wrong-labels"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := ref.Matches(tt.image, tt.labels)
			if got := Code(err); got != tt.code {
				t.Errorf("Matches = %v (%q), want code %q", err, got, tt.code)
			}
			if err != nil && !errors.Is(err, ErrPublisher) {
				t.Errorf("Matches = %v, want an ErrPublisher", err)
			}
		})
	}
}

func TestHasPrefix(t *testing.T) {
	for _, tt := range []struct {
		name, prefix string
		want         bool
	}{
		{"example.com/app", "example.com/app", true},
		{"example.com/app/web", "example.com/app", true},
		{"example.com/app/web", "example.com/app/", true},
		{"example.com/apple", "example.com/app", false},
		{"example.com/app", "example.com", true},
		{"example.com.evil/app", "example.com", false},
		{"example.com", "example.com/app", false},
		{"anything", "", true},
	} {
		if got := HasPrefix(tt.name, tt.prefix); got != tt.want {
			t.Errorf("HasPrefix(%q, %q) = %v, want %v", tt.name, tt.prefix, got, tt.want)
		}
	}
}

// TestACIdentifiers compares what is taken for an AC identifier with what the reference library takes, for every short text of characters that matter.
func TestACIdentifiers(t *testing.T) {
	const characters = "a9-._~/A %"
	var every func(s string, left int)
	every = func(s string, left int) {
		checkACIdentifier(t, s)
		for i := 0; left > 0 && i < len(characters); i++ {
			every(s+characters[i:i+1], left-1)
		}
	}
	every("", 5)
	for _, s := range []string{"example.com/~user/app_v1", "example.com/app\n", "é", "a\x00b", "a/é"} {
		checkACIdentifier(t, s)
	}
}

func FuzzACIdentifier(f *testing.F) {
	f.Add("example.com/app")
	f.Fuzz(checkACIdentifier)
}

func checkACIdentifier(t *testing.T, s string) {
	t.Helper()
	_, err := types.NewACIdentifier(s)
	if got, want := isACIdentifier(s), err == nil && !strings.Contains(s, "//") && !strings.Contains(s, "/."); got != want {
		t.Errorf("isACIdentifier(%q) = %v, want %v", s, got, want)
	}
}

func TestImageIDs(t *testing.T) {
	digits := strings.Repeat("0123456789abcdef", 8)
	id, err := ParseImageID("sha512-" + digits)
	if err != nil || id.String() != "sha512-"+digits || id.Short() != "sha512-0123456789ab" {
		t.Fatalf("ParseImageID = %v, %v", id, err)
	}
	for _, bad := range []string{"", digits, "sha512-" + digits[1:], "sha512-" + strings.ToUpper(digits), "sha256-" + digits} {
		if _, err := ParseImageID(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseImageID(%q) = %v, want ErrInvalid", bad, err)
		}
	}
	for n, ok := range map[int]bool{MinImageIDPrefix - 1: false, MinImageIDPrefix: true, 128: true} {
		if _, err := ParseImageIDPrefix("sha512-" + digits[:n]); (err == nil) != ok {
			t.Errorf("ParseImageIDPrefix of %d digits = %v, want success: %v", n, err, ok)
		}
	}
	if _, err := ParseImageIDPrefix("sha512-" + digits + "0"); err == nil {
		t.Error("ParseImageIDPrefix took 129 digits")
	}
}

func FuzzParseRef(f *testing.F) {
	for _, seed := range []string{"example.com/app", "example.com/app:1.0,os=linux,arch=amd64", "a,b=%2C%25", "a:%20", "a,version=latest"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := ParseRef(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("ParseRef(%q) = %v, want an ErrInvalid", s, err)
			}
			return
		}
		again, err := ParseRef(ref.String())
		if err != nil || again != ref {
			t.Fatalf("ParseRef(%q) = %v, but its String gives %v, %v", s, ref, again, err)
		}
		rebuilt, err := NewRef(ref.Name(), ref.Labels())
		if err != nil || rebuilt != ref {
			t.Fatalf("NewRef of the parts of %v = %v, %v", ref, rebuilt, err)
		}
	})
}
