// Package warm fetches lists of images before anybody asks for them.
package warm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/robfig/cron/v3"

	"github.com/acproxy/acproxy"
)

// An Entry is an image of a list.
type Entry struct {
	// Image is name[:version][,label=value…]. The version may be a pattern as of [path.Match]: it stands for those that the publisher lists.
	Image string `json:"image" doc:"name[:version][,label=value…]; the version may be a pattern such as 1.*, which stands for those that the publisher lists" example:"example.com/app:1.0"`
	// Pin keeps it from being evicted. What it depends on is kept for as long as it is.
	Pin bool `json:"pin,omitempty" doc:"Pin it"`
	// Alone leaves out the images that it depends on.
	Alone bool `json:"alone,omitempty" doc:"Leave out the images that it depends on"`
	// Platforms are asked for if the image's labels don't say; none means those of the job.
	Platforms []Platform `json:"platforms,omitempty" doc:"Platforms that it is wanted for, if its labels don't say"`
	// Where is the place in a list, as FILE:LINE, for people.
	Where string `json:"where,omitempty" doc:"Where that is written, for people" example:"images.txt:3"`
}

// ref returns the ref of an entry. If its version is a pattern the ref has none, and the pattern is returned.
func (e Entry) ref() (ref acproxy.Ref, pattern string, err error) {
	if ref, err = acproxy.ParseRef(e.Image); err != nil {
		return ref, "", err
	}
	version := ref.Version()
	if !strings.ContainsAny(version, "*?[") {
		return ref, "", nil
	}
	if _, err := path.Match(version, ""); err != nil {
		return ref, "", acproxy.Invalid("%s: %q is no pattern: a bracket is not closed", e.Image, version)
	}
	ref, err = withLabels(ref, map[string]string{acproxy.LabelVersion: ""})
	return ref, version, err
}

// withLabels returns a ref with some labels set.
func withLabels(ref acproxy.Ref, set map[string]string) (acproxy.Ref, error) {
	labels := ref.Labels()
	maps.Copy(labels, set)
	return acproxy.NewRef(ref.Name(), labels)
}

// A Platform is an operating system and an architecture as appc names them, as os/arch: linux/amd64, linux/aarch64. The Platform [AsWritten] adds nothing to
// what a list says.
type Platform string

// AsWritten asks for images by the labels that a list gives them, and no others.
const AsWritten Platform = "none"

// DefaultPlatform is what rkt asks for on most machines.
const DefaultPlatform Platform = "linux/amd64"

// ParsePlatform reads a platform.
func ParsePlatform(s string) (Platform, error) {
	os, arch, ok := strings.Cut(s, "/")
	if Platform(s) != AsWritten && (!ok || os == "" || arch == "" || strings.Contains(arch, "/")) {
		return "", acproxy.Invalid("%.64q is no platform: name it as os/arch in appc's words, such as linux/amd64 or linux/aarch64, or %s to ask for nothing but what the list says", s, AsWritten)
	}
	return Platform(s), nil
}

// apply returns a ref for the platform. Labels that the ref has stay.
func (p Platform) apply(ref acproxy.Ref) (acproxy.Ref, error) {
	if p == AsWritten {
		return ref, nil
	}
	os, arch, _ := strings.Cut(string(p), "/")
	set := make(map[string]string)
	for label, value := range map[string]string{acproxy.LabelOS: os, acproxy.LabelArch: arch} {
		if _, ok := ref.Label(label); !ok {
			set[label] = value
		}
	}
	return withLabels(ref, set)
}

// A Group is images of a list that belong together.
type Group struct {
	Name     string // "" for the images of a list without groups
	Schedule string // when the server fetches them, in cron's syntax; "" means when the list is
	Images   []Entry
}

// A List is what a file says.
type List struct{ Groups []Group }

// Images returns the images of some groups, or of all of them.
func (l List) Images(groups ...string) ([]Entry, error) {
	for _, name := range groups {
		if !slices.ContainsFunc(l.Groups, func(g Group) bool { return g.Name == name }) {
			return nil, acproxy.Invalid("there is no group %q in the list", name)
		}
	}
	var out []Entry
	for _, g := range l.Groups {
		if len(groups) == 0 || slices.Contains(groups, g.Name) {
			out = append(out, g.Images...)
		}
	}
	return out, nil
}

// maxList bounds a list, in bytes.
const maxList = 16 << 20

// ReadList reads a list. It is YAML if the name of the file ends with .yaml or .yml, else text with an image on each line:
//
//	example.com/app:1.0                          # what follows a # is a comment
//	example.com/db:2.*,arch=aarch64  pin no-deps
//
// Errors match [acproxy.ErrInvalid] and name the file and line of everything that is wrong.
func ReadList(r io.Reader, file string) (List, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxList+1))
	if err != nil {
		return List{}, err
	}
	if len(text) > maxList {
		return List{}, acproxy.Invalid("%s is larger than %d bytes", file, maxList)
	}
	if ext := path.Ext(file); ext == ".yaml" || ext == ".yml" {
		return readYAML(text, file)
	}
	return readText(text, file)
}

func readText(text []byte, file string) (List, error) {
	var images []Entry
	var wrong []error
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, maxList+1)
	for n := 1; lines.Scan(); n++ {
		words := strings.Fields(withoutComment(lines.Text()))
		if len(words) == 0 {
			continue
		}
		e := Entry{Image: words[0], Where: fmt.Sprintf("%s:%d", file, n)}
		err := e.check()
		for _, option := range words[1:] {
			switch option {
			case "pin":
				e.Pin = true
			case "no-deps":
				e.Alone = true
			default:
				err = errors.Join(err, acproxy.Invalid("%.64q is no option: there are pin and no-deps", option))
			}
		}
		if err != nil {
			wrong = append(wrong, at(e.Where, err))
		}
		images = append(images, e)
	}
	wrong = append(wrong, lines.Err())
	return List{[]Group{{Images: images}}}, errors.Join(wrong...)
}

// withoutComment cuts a line where a # begins a word.
func withoutComment(line string) string {
	for i := range len(line) {
		if line[i] == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			return line[:i]
		}
	}
	return line
}

func at(where string, err error) error {
	if where == "" {
		return err
	}
	return fmt.Errorf("%s: %w", where, err)
}

// check returns what is wrong with an entry.
func (e Entry) check() error {
	_, _, err := e.ref()
	for _, p := range e.Platforms {
		_, wrong := ParsePlatform(string(p))
		err = errors.Join(err, wrong)
	}
	return err
}

// file is a list in YAML.
type file struct {
	Platforms    []Platform  `yaml:"platforms"`
	Pin          *bool       `yaml:"pin"`
	Dependencies *bool       `yaml:"dependencies"`
	Images       []fileEntry `yaml:"images"`
	Groups       []fileGroup `yaml:"groups"`
}

type fileGroup struct {
	Name         string      `yaml:"name"`
	Schedule     string      `yaml:"schedule"`
	Platforms    []Platform  `yaml:"platforms"`
	Pin          *bool       `yaml:"pin"`
	Dependencies *bool       `yaml:"dependencies"`
	Images       []fileEntry `yaml:"images"`
}

// fileEntry is an image in YAML: a text, or a mapping.
type fileEntry struct {
	Image        string     `yaml:"image"`
	Pin          *bool      `yaml:"pin"`
	Dependencies *bool      `yaml:"dependencies"`
	Platforms    []Platform `yaml:"platforms"`
}

// UnmarshalYAML implements yaml.InterfaceUnmarshaler.
func (e *fileEntry) UnmarshalYAML(unmarshal func(any) error) error {
	if unmarshal(&e.Image) == nil {
		return nil
	}
	type plain fileEntry
	return unmarshal((*plain)(e))
}

func readYAML(text []byte, name string) (List, error) {
	var f file
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(&f); err != nil && !errors.Is(err, io.EOF) {
		return List{}, &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "invalid", Detail: fmt.Sprintf("%s: %s", name, strings.TrimSpace(yaml.FormatError(err, false, true)))}
	}
	var l List
	var wrong []error
	whole := fileEntry{Pin: f.Pin, Dependencies: f.Dependencies, Platforms: f.Platforms}
	if len(f.Images) > 0 {
		l.Groups = append(l.Groups, Group{Images: entries(f.Images, name, "images", whole)})
	}
	for i, g := range f.Groups {
		where := fmt.Sprintf("%s: groups[%d]", name, i)
		if g.Name == "" {
			wrong = append(wrong, acproxy.Invalid("%s has no name", where))
		}
		if slices.ContainsFunc(l.Groups, func(o Group) bool { return o.Name == g.Name }) {
			wrong = append(wrong, acproxy.Invalid("%s: there is another group %q", where, g.Name))
		}
		if g.Schedule != "" {
			if _, err := ParseSchedule(g.Schedule); err != nil {
				wrong = append(wrong, at(where+".schedule", err))
			}
		}
		group := inherit(fileEntry{Pin: g.Pin, Dependencies: g.Dependencies, Platforms: g.Platforms}, whole)
		l.Groups = append(l.Groups, Group{g.Name, g.Schedule, entries(g.Images, name, fmt.Sprintf("groups[%d].images", i), group)})
	}
	for _, g := range l.Groups {
		for _, e := range g.Images {
			if err := e.check(); err != nil {
				wrong = append(wrong, at(e.Where, err))
			}
		}
	}
	return l, errors.Join(wrong...)
}

// inherit returns an entry with what it leaves open as above.
func inherit(e, above fileEntry) fileEntry {
	if e.Pin == nil {
		e.Pin = above.Pin
	}
	if e.Dependencies == nil {
		e.Dependencies = above.Dependencies
	}
	if e.Platforms == nil {
		e.Platforms = above.Platforms
	}
	return e
}

func entries(in []fileEntry, file, path string, above fileEntry) []Entry {
	out := make([]Entry, len(in))
	for i, e := range in {
		e = inherit(e, above)
		out[i] = Entry{
			Image: e.Image, Pin: e.Pin != nil && *e.Pin, Alone: e.Dependencies != nil && !*e.Dependencies, Platforms: e.Platforms,
			Where: fmt.Sprintf("%s: %s[%d]", file, path, i),
		}
	}
	return out
}

// ParseSchedule reads when something is to be done, in cron's syntax: minute, hour, day of the month, month, day of the week, or one of @hourly, @daily, @weekly,
// @monthly and @every 6h. Times are those of the time zone that the server runs in, unless it begins with CRON_TZ=Europe/Berlin.
func ParseSchedule(s string) (cron.Schedule, error) {
	schedule, err := cron.ParseStandard(s)
	if err != nil {
		return nil, acproxy.Invalid("%.100q is no schedule such as \"30 3 * * *\" (minute, hour, day of the month, month, day of the week): %v", s, err)
	}
	return schedule, nil
}
