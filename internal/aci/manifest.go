package aci

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"unicode"

	"github.com/appc/spec/schema"
	"github.com/appc/spec/schema/types"

	"github.com/acproxy/acproxy"
)

// A Manifest is what an image says of itself.
type Manifest struct {
	Raw          []byte            // the exact JSON
	Name         string            // the image name
	Labels       map[string]string // never nil
	Dependencies []Dependency      // the images it needs below it, in the manifest's order
}

// A Dependency is an image that another one needs.
type Dependency struct {
	Name    string
	Labels  map[string]string // the labels it must carry; never nil
	ImageID acproxy.ImageID   // what its ID must be; zero if any image of that name and those labels will do
	Size    int64             // how many bytes its blob should have; 0 if the manifest doesn't say
}

// ReadManifest reads an image manifest (appc specification, "Image Manifest Schema"). It returns a [*Violation] if data is longer than
// 1 MiB or not a valid image manifest: by the rules of appc's own schema package, and some more. No label may come twice; a dependency's
// imageID must be a whole image ID; and no key of the manifest, of a label or of a dependency may come twice, in any mixture of upper and
// lower case, because readers differ in which of the two they take (Go takes the last, and ignores case).
func ReadManifest(data []byte) (Manifest, error) {
	if len(data) > defaultMaxManifest {
		return Manifest{}, violationAt(manifestName, RuleManifestTooLarge, "it has %d bytes, the limit is %d", len(data), defaultMaxManifest)
	}
	return readManifest(data)
}

func readManifest(data []byte) (Manifest, error) {
	m, err := parseManifest(data)
	if err != nil {
		return Manifest{}, violationAt(manifestName, RuleBadManifest, "%s", clip(err.Error()))
	}
	return m, nil
}

func parseManifest(data []byte) (Manifest, error) {
	// The schema package draws a picture of a syntax error, over several lines.
	var value json.RawMessage
	if err := json.Unmarshal(data, &value); err != nil {
		return Manifest{}, fmt.Errorf("it is not JSON: %w", err)
	}
	var im schema.ImageManifest
	if err := im.UnmarshalJSON(data); err != nil {
		return Manifest{}, err
	}
	// A null or an empty object in a list gets past the schema package when it reads, but not when it writes; and rkt's store writes what it
	// has read.
	if _, err := json.Marshal(im); err != nil {
		return Manifest{}, err
	}
	// Only now is it known that data isn't nested so deeply that looking at it again costs too much.
	if err := uniqueKeys(json.NewDecoder(bytes.NewReader(data)), "", "labels", "dependencies"); err != nil {
		return Manifest{}, err
	}
	m := Manifest{Raw: data, Name: im.Name.String(), Labels: labelMap(im.Labels)}
	if err := acproxy.CheckName(m.Name); err != nil {
		return Manifest{}, err
	}
	for _, d := range im.Dependencies {
		dep, err := readDependency(d)
		if err != nil {
			return Manifest{}, fmt.Errorf("dependency %q: %w", clip(d.ImageName.String()), err)
		}
		m.Dependencies = append(m.Dependencies, dep)
	}
	return m, nil
}

func readDependency(d types.Dependency) (Dependency, error) {
	dep := Dependency{Name: d.ImageName.String(), Labels: labelMap(d.Labels)}
	if err := acproxy.CheckName(dep.Name); err != nil {
		return Dependency{}, err
	}
	if d.Size > math.MaxInt64 {
		return Dependency{}, fmt.Errorf("size %d is out of range", d.Size)
	}
	dep.Size = int64(d.Size)
	if d.ImageID != nil {
		var err error
		if dep.ImageID, err = acproxy.ParseImageID(d.ImageID.String()); err != nil {
			return Dependency{}, err
		}
	}
	return dep, nil
}

// labelMap returns labels as a map. The schema package has refused duplicates.
func labelMap(labels types.Labels) map[string]string {
	m := make(map[string]string, len(labels))
	for _, l := range labels {
		m[l.Name.String()] = l.Value
	}
	return m
}

// uniqueKeys reads one JSON value and returns an error if an object in it has a key twice. Where only names keys, those values alone are
// looked into: annotations and the app hold what is nobody's business here.
func uniqueKeys(dec *json.Decoder, where string, only ...string) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	switch tok {
	case json.Delim('['):
		for dec.More() {
			if err := uniqueKeys(dec, where); err != nil {
				return err
			}
		}
	case json.Delim('{'):
		seen := make(map[string]bool)
		for dec.More() {
			tok, err := dec.Token()
			if err != nil {
				return err
			}
			key := fold(fmt.Sprint(tok))
			if seen[key] {
				return fmt.Errorf("key %q comes twice %s", clip(key), where)
			}
			seen[key] = true
			if err := uniqueKeysBelow(dec, key, only); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	_, err = dec.Token() // the closing bracket
	return err
}

func uniqueKeysBelow(dec *json.Decoder, key string, only []string) error {
	if only == nil {
		return uniqueKeys(dec, "in "+clip(key))
	}
	for _, o := range only {
		if key == fold(o) {
			return uniqueKeys(dec, "in one of its "+o)
		}
	}
	var skipped json.RawMessage
	return dec.Decode(&skipped)
}

// fold returns s such that two keys which encoding/json takes for the same field fold to the same string.
func fold(s string) string {
	return strings.ToLower(strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r {
				return next
			}
			r = next
		}
	}, s))
}
