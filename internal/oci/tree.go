package oci

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
)

// Bounds of what one image may be made of.
const (
	maxPieces = 127 // layers that today's runtimes take
	maxDepth  = 32  // of images that need images
)

// tree is the gathering of the images that one is rendered from.
type tree struct {
	b     *Bridge
	q     Query
	all   []gathered
	depth int
}

// gathered is a piece whose place among the others, and those of the images above it, will be known when all are there.
type gathered struct {
	piece
	within []*int
}

// gather returns the images that the one is rendered from that the first of some refs asks for that has an answer, held and accepted, and how that one came to be here. The layers aren't set.
func (b *Bridge) gather(ctx context.Context, q Query, refs []acproxy.Ref, platform Platform) ([]piece, fetch.Status, error) {
	t := &tree{b: b, q: q}
	status, err := t.add(ctx, need{refs: refs, platform: platform}, nil)
	if err != nil {
		return nil, 0, err
	}
	pieces := make([]piece, len(t.all))
	for i, g := range t.all {
		pieces[i] = g.piece
		for _, place := range g.within {
			pieces[i].Within = append(pieces[i].Within, *place)
		}
	}
	return pieces, status, nil
}

// need is an image that is needed.
type need struct {
	refs     []acproxy.Ref // what it may be asked for as
	as       acproxy.Ref   // what its manifest has to fit; zero if it is what it is asked for as
	id       acproxy.ImageID
	platform Platform
}

// add adds an image, after those that it needs, in the order in which they are extracted (appc specification, "Dependency Matching"): the dependencies in their
// order, each with its own before it, the image itself last. within are the places of the images above it that have a whitelist.
func (t *tree) add(ctx context.Context, n need, within []*int) (fetch.Status, error) {
	if t.depth++; t.depth > maxDepth {
		return 0, unconvertible("images that need images are more than %d deep: %v is one too many", maxDepth, n.refs[0])
	}
	defer func() { t.depth-- }()
	rec, status, err := t.image(ctx, n)
	if err != nil {
		return 0, err
	}
	r, err := t.b.rendered(rec.Digest)
	if err != nil {
		return 0, err
	}
	place := new(int)
	if r.own != nil {
		within = append(slices.Clip(within), place)
	}
	for _, dep := range rec.Dependencies {
		below, err := t.b.needOf(ctx, rec, dep, n.platform)
		if err == nil {
			_, err = t.add(ctx, below, within)
		}
		if err != nil {
			return 0, fmt.Errorf("%s needs %s: %w", rec.Name, dep.Name, err)
		}
	}
	*place = len(t.all)
	t.all = append(t.all, gathered{piece{Digest: rec.Digest, ImageID: rec.ImageID, Name: rec.Name, Labels: rec.Labels, Size: rec.Size}, within})
	if len(t.all) > maxPieces {
		return 0, unconvertible("it is rendered from more than %d images, and today's runtimes take no more layers", maxPieces)
	}
	return status, nil
}

// image has an image be held, accepted and inspected.
func (t *tree) image(ctx context.Context, n need) (rec cache.Record, status fetch.Status, err error) {
	var first error
	for _, ref := range n.refs {
		if err := t.q.May(ref.Name()); err != nil {
			return rec, 0, err
		}
		rec, status, err = t.asked(ctx, ref)
		if err == nil && !n.platform.fits(rec.Labels) {
			err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "another-platform", Detail: fmt.Sprintf("what there is of %v is for %s/%s, asked for was %v", ref, rec.Labels[acproxy.LabelOS], rec.Labels[acproxy.LabelArch], n.platform)}
		}
		if err == nil {
			break
		}
		if first == nil {
			first = err
		}
		if !absent(err) {
			break
		}
	}
	if err != nil {
		return rec, 0, first
	}
	if !n.id.IsZero() && rec.ImageID != n.id {
		if rec, err = t.b.withID(n, rec); err != nil {
			return rec, 0, err
		}
	}
	if !n.as.IsZero() {
		if err := n.as.Matches(rec.Name, rec.Labels); err != nil {
			return rec, 0, err
		}
	}
	return rec, status, nil
}

// absent reports whether an error says that there is no such image, or none here.
func absent(err error) bool {
	return errors.Is(err, acproxy.ErrNotFound) || errors.Is(err, acproxy.ErrOffline)
}

func (t *tree) asked(ctx context.Context, ref acproxy.Ref) (rec cache.Record, status fetch.Status, err error) {
	im, err := t.b.cfg.Fetcher.Image(ctx, fetch.Request{Ref: ref, Client: t.q.Client})
	if err != nil {
		return rec, 0, err
	}
	defer im.Close()
	if err := im.Inspected(ctx); err != nil {
		return rec, 0, err
	}
	return *im.Record, im.Status, nil
}

// withID returns the held image that has the image ID that is needed, where what its name and labels stand for is another one.
func (b *Bridge) withID(n need, other cache.Record) (cache.Record, error) {
	all, err := b.cfg.Store.ByImageID(strings.TrimPrefix(n.id.String(), "sha512-"))
	if err != nil {
		return other, err
	}
	for _, rec := range all {
		if rec.Name == other.Name && rec.Inspected && b.cfg.Fetcher.Acceptable(rec) == nil {
			return rec, nil
		}
	}
	return other, &acproxy.Error{
		Kind: acproxy.ErrPublisher, Code: "wrong-image-id", Detail: fmt.Sprintf("it has to be the image %s, and what its name and labels stand for is %s", n.id.Short(), other.ImageID.Short()),
	}
}

// needOf returns what an image needs that depends on another one, for the platform that it is for: a node that renders it asks for it so.
func (b *Bridge) needOf(ctx context.Context, by cache.Record, dep cache.Dependency, platform Platform) (need, error) {
	if os := by.Labels[acproxy.LabelOS]; os != "" {
		platform.OS = os
	}
	if arch := by.Labels[acproxy.LabelArch]; arch != "" {
		platform.Arch = arch
	}
	if os := dep.Labels[acproxy.LabelOS]; os != "" {
		platform.OS = os
	}
	if arch := dep.Labels[acproxy.LabelArch]; arch != "" {
		platform.Arch = arch
	}
	as, err := acproxy.NewRef(dep.Name, dep.Labels)
	if err != nil {
		return need{}, err
	}
	refs, err := b.refs(ctx, dep.Name, dep.Labels, platform)
	return need{refs: refs, as: as, id: dep.ImageID, platform: platform}, err
}

// refs returns what an image may be asked for as: with all of its labels and the platform's, or without the platform's, because there are images for every
// one, if either is held, so that nobody has to be asked; else with those that its publisher's first template that can be filled in has variables for. A node
// does the same with the template that it is told. Where nothing can be found out about the name, what is asked for is the former.
func (b *Bridge) refs(ctx context.Context, name string, labels map[string]string, platform Platform) ([]acproxy.Ref, error) {
	full := map[string]string{acproxy.LabelOS: platform.OS, acproxy.LabelArch: platform.Arch}
	maps.Copy(full, labels)
	both, err := distinct(name, full, labels)
	if err != nil {
		return nil, err
	}
	for _, ref := range both {
		if _, rec, err := b.cfg.Store.Resolve(ctx, ref); err == nil && platform.fits(rec.Labels) {
			return []acproxy.Ref{ref}, nil
		}
	}
	found, err := b.cfg.Fetcher.Discover(ctx, name)
	if err != nil {
		return both, nil //nolint:nilerr // asking for them says what is wrong
	}
	for _, t := range found.Templates {
		asked, fits := make(map[string]string), true
		for _, v := range t.Variables() {
			value, ok := full[v]
			switch {
			case v == "ext" || v == "name":
			case ok:
				asked[v] = value
			case v != acproxy.LabelVersion: // without one it is the latest
				fits = false
			}
		}
		if fits {
			// An image that is held answers with its version whatever the template says of it.
			if version := full[acproxy.LabelVersion]; version != "" {
				asked[acproxy.LabelVersion] = version
			}
			return distinct(name, asked)
		}
	}
	return both, nil
}

// distinct returns the refs of a name with some labels, each once.
func distinct(name string, sets ...map[string]string) ([]acproxy.Ref, error) {
	var out []acproxy.Ref
	for _, labels := range sets {
		ref, err := acproxy.NewRef(name, labels)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(out, ref) {
			out = append(out, ref)
		}
	}
	return out, nil
}

// tagPattern is what a tag looks like (OCI distribution specification 1.1, "Pulling manifests").
var tagPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// latest is the tag of what has no version, and the version that is the same as none.
const latest = "latest"

// versions returns the versions that a tag of a name may stand for: itself, and since a tag has no plus sign, what it is with one for each underscore; of
// what is held, what fits.
func (b *Bridge) versions(name, tag string) ([]string, error) {
	if !tagPattern.MatchString(tag) {
		return nil, acproxy.Invalid("%.128q is no tag: one has up to 128 letters, digits, dots, dashes and underscores, and begins with none of the first two", tag)
	}
	if !strings.Contains(tag, "_") {
		return []string{tag}, nil
	}
	held, err := b.held(name)
	if err != nil {
		return nil, err
	}
	// What is held is rather meant than what may be somewhere, and what is exactly so rather than what only looks so as a tag.
	var out []string
	for _, rec := range held {
		switch version := rec.Labels[acproxy.LabelVersion]; {
		case version == tag:
			return []string{tag}, nil
		case tagOf(version) == tag && !slices.Contains(out, version):
			out = append(out, version)
		}
	}
	slices.Sort(out)
	out = append(out, tag)
	if plus := strings.ReplaceAll(tag, "_", "+"); !slices.Contains(out, plus) {
		out = append(out, plus)
	}
	return out, nil
}

// tagOf returns the tag of a version, "" if there is none.
func tagOf(version string) string {
	if version == "" {
		return latest
	}
	tag := strings.ReplaceAll(version, "+", "_")
	if !tagPattern.MatchString(tag) {
		return ""
	}
	return tag
}

// held returns the images of a name that may be served.
func (b *Bridge) held(name string) ([]cache.Record, error) {
	ref, err := acproxy.NewRef(name, nil)
	if err != nil {
		return nil, err
	}
	all, err := b.cfg.Store.Match(ref)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(all), func(rec cache.Record) bool { return b.cfg.Fetcher.Acceptable(rec) != nil }), nil
}

// Tags returns the tags of what is held of a name, sorted: what else its publisher has is not known here. It returns an error matching
// [acproxy.ErrNotFound] if nothing is held.
func (b *Bridge) Tags(q Query) ([]string, error) {
	if err := q.May(q.Name); err != nil {
		return nil, err
	}
	held, err := b.held(q.Name)
	if err != nil {
		return nil, err
	}
	if len(held) == 0 {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "not-held", Detail: "no image of " + q.Name + " is held; which others its publisher has, a tag asks"}
	}
	var tags []string
	for _, rec := range held {
		if tag := tagOf(rec.Labels[acproxy.LabelVersion]); tag != "" {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	return slices.Compact(tags), nil
}
