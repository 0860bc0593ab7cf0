package airgap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/bundle"
)

// A Choice says which images are carried. What several of its fields choose is carried once.
type Choice struct {
	Refs     []acproxy.Ref `json:"refs,omitempty"`     // what each answers, or else every held image that it fits
	Prefixes []string      `json:"prefixes,omitempty"` // of names, by whole segments
	Pinned   bool          `json:"pinned,omitempty"`   // all images that are pinned
	All      bool          `json:"all,omitempty"`      // all images
	// Alone leaves out the images that the chosen ones depend on.
	Alone bool `json:"alone,omitempty"`
}

// A Lack is something that was chosen, or is needed, and can't be carried.
type Lack struct {
	What   string `json:"what"`         // a ref, or a prefix
	By     string `json:"by,omitempty"` // the image that needs it
	Code   string `json:"code"`         // a word for programs
	Detail string `json:"detail"`       // why it can't be carried
	// Note says that it concerns nothing that was asked for by name.
	Note bool `json:"note,omitempty"`
}

// String returns it on one line.
func (l Lack) String() string {
	if l.By != "" {
		return fmt.Sprintf("%s, needed by %s: %s", l.What, l.By, l.Detail)
	}
	return fmt.Sprintf("%s: %s", l.What, l.Detail)
}

// A Cargo is what was chosen, ready to be written.
type Cargo struct {
	Index *bundle.Index
	Lacks []Lack

	from  Source
	small map[acproxy.Digest][]byte // keys
}

// A Source is where the members of a bundle are read from.
type Source interface {
	// Signature returns an image's signature as published.
	Signature(digest acproxy.Digest) ([]byte, error)
	// Open opens the exact bytes of an image. The caller closes them.
	Open(digest acproxy.Digest) (io.ReadCloser, error)
}

// Leave leaves out images that the other side has, by what since says of them: the digest of an image → of its signature. They are named, and not carried.
// id is that of where this was read.
func (c *Cargo) Leave(since map[acproxy.Digest]acproxy.Digest, id acproxy.Digest) {
	c.Index.Since = id
	for i := range c.Index.Images {
		im := &c.Index.Images[i]
		var signature acproxy.Digest
		if im.Signature != nil {
			signature = im.Signature.Digest
		}
		held, ok := since[im.Digest]
		im.Absent = ok && held == signature
	}
}

// Choose finds what a choice means. What is lacking is in the cargo, and no error.
func Choose(ctx context.Context, o Origin, choice Choice) (*Cargo, error) {
	c := &choosing{
		Cargo: &Cargo{Index: new(bundle.Index), from: o, small: make(map[acproxy.Digest][]byte)},
		o:     o, choice: choice, taken: make(map[acproxy.Digest]bool), lacking: make(map[Lack]bool),
	}
	if err := o.Ready(ctx); err != nil {
		return nil, err
	}
	if err := c.chosen(ctx); err != nil {
		return nil, err
	}
	for i := 0; i < len(c.queue); i++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := c.add(c.queue[i]); err != nil {
			return nil, err
		}
		if choice.Alone {
			continue
		}
		if err := c.needs(ctx, c.queue[i]); err != nil {
			return nil, err
		}
	}
	c.keysAndNames()
	return c.Cargo, nil
}

type choosing struct {
	*Cargo
	o       Origin
	choice  Choice
	queue   []cache.Record
	taken   map[acproxy.Digest]bool
	lacking map[Lack]bool
}

func (c *choosing) chosen(ctx context.Context) error {
	for _, ref := range c.choice.Refs {
		records, err := c.answer(ctx, ref)
		if err != nil {
			return err
		}
		c.want(ref.String(), "", records)
	}
	for _, prefix := range c.choice.Prefixes {
		found := false
		err := each(ctx, c.o, cache.Filter{Prefix: prefix}, func(rec cache.Record) error {
			found = true
			c.take(rec, "", true)
			return nil
		})
		if err != nil {
			return err
		}
		if !found {
			c.lack(Lack{What: prefix, Code: "not-held", Detail: "no image under this prefix is held"})
		}
	}
	if !c.choice.All && !c.choice.Pinned {
		return nil
	}
	return each(ctx, c.o, cache.Filter{}, func(rec cache.Record) error {
		if c.choice.All || rec.Pinned {
			c.take(rec, "", true)
		}
		return nil
	})
}

// answer returns what a ref answers, or else every image that it fits.
func (c *choosing) answer(ctx context.Context, ref acproxy.Ref) ([]cache.Record, error) {
	_, rec, err := c.o.Resolve(ctx, ref)
	if err == nil {
		return []cache.Record{rec}, nil
	}
	if !errors.Is(err, acproxy.ErrNotFound) {
		return nil, err
	}
	return c.o.Match(ref)
}

// want takes the images of a ref.
func (c *choosing) want(what, by string, records []cache.Record) {
	if len(records) == 0 {
		c.lack(Lack{What: what, By: by, Code: "not-held", Detail: "it is not held here"})
	}
	for _, rec := range records {
		c.take(rec, by, false)
	}
}

// take queues an image, unless it can't be carried.
func (c *choosing) take(rec cache.Record, by string, note bool) {
	if c.taken[rec.Digest] {
		return
	}
	what := refOf(rec)
	switch {
	case rec.Lost():
		c.lack(Lack{What: what, By: by, Code: rec.Code, Detail: rec.Reason, Note: note})
	case rec.Quarantined():
		c.lack(Lack{What: what, By: by, Code: rec.Code, Detail: "it is not served: " + rec.Reason, Note: note})
	case !rec.Inspected:
		c.lack(Lack{What: what, By: by, Code: "not-inspected", Detail: "its tar has not been read to the end yet: run the server a moment longer", Note: note})
	default:
		c.taken[rec.Digest] = true
		c.queue = append(c.queue, rec)
	}
}

func (c *choosing) lack(l Lack) {
	if !c.lacking[l] {
		c.lacking[l] = true
		c.Lacks = append(c.Lacks, l)
	}
}

// needs queues what an image depends on.
func (c *choosing) needs(ctx context.Context, rec cache.Record) error {
	for _, dep := range rec.Dependencies {
		ref, err := acproxy.NewRef(dep.Name, dep.Labels)
		if err != nil {
			c.lack(Lack{What: dep.Name, By: refOf(rec), Code: "invalid", Detail: err.Error()})
			continue
		}
		records, err := c.answer(ctx, ref)
		if err == nil && !dep.ImageID.IsZero() {
			if records, err = c.o.Match(ref); err == nil {
				records = slices.DeleteFunc(slices.Clone(records), func(r cache.Record) bool { return r.ImageID != dep.ImageID })
			}
		}
		if err != nil {
			return err
		}
		what := ref.String()
		if !dep.ImageID.IsZero() {
			what += " (" + dep.ImageID.Short() + ")"
		}
		c.want(what, refOf(rec), records)
	}
	return nil
}

// add puts an image into the index.
func (c *choosing) add(rec cache.Record) error {
	im := bundle.Image{Digest: rec.Digest, Size: rec.Size, ImageID: rec.ImageID, Name: rec.Name, Labels: rec.Labels, Modified: rec.Modified}
	if rec.Signed {
		b, err := c.o.Signature(rec.Digest)
		if err != nil {
			return fmt.Errorf("the signature of %s: %w", refOf(rec), err)
		}
		im.Signature = &bundle.Signature{Digest: digestOf(b), Size: int64(len(b))}
	}
	for _, s := range rec.Signers {
		if !slices.Contains(im.Signers, s.Fingerprint) {
			im.Signers = append(im.Signers, s.Fingerprint)
		}
	}
	answers, err := c.o.Answers(rec.Digest)
	if err != nil {
		return fmt.Errorf("what %s answers: %w", refOf(rec), err)
	}
	for _, a := range answers {
		if a.Ref != im.Ref() && a.Ref.Matches(rec.Name, rec.Labels) == nil && !slices.Contains(im.Refs, a.Ref) {
			im.Refs = append(im.Refs, a.Ref)
		}
	}
	c.Index.Images = append(c.Index.Images, im)
	return nil
}

// keysAndNames puts the keys of the images' signers and what discovery knows of their names into the index.
func (c *choosing) keysAndNames() {
	keys, names := make(map[string]bool), make(map[string]bool)
	for _, im := range c.Index.Images {
		for _, fingerprint := range im.Signers {
			if keys[fingerprint] {
				continue
			}
			keys[fingerprint] = true
			armored, prefixes, ok := c.o.Key(fingerprint)
			if !ok || len(armored) > bundle.MaxSignature {
				c.lack(Lack{What: "key " + fingerprint, By: im.Ref().String(), Code: "no-such-key", Detail: "it is not among the trusted keys any more, and not carried", Note: true})
				continue
			}
			digest := digestOf(armored)
			c.small[digest] = armored
			c.Index.Keys = append(c.Index.Keys, bundle.Key{Fingerprint: fingerprint, Digest: digest, Size: int64(len(armored)), Prefixes: slices.Clone(prefixes)})
		}
		if names[im.Name] {
			continue
		}
		names[im.Name] = true
		name := bundle.Name{Name: im.Name}
		known, ok := c.o.Known(im.Name)
		for _, t := range known.Templates {
			if one := (bundle.Name{Name: im.Name, Templates: []bundle.Template{bundle.Template(t)}}); one.Check() == nil && len(name.Templates) < bundle.MaxTemplates {
				name.Templates = append(name.Templates, bundle.Template(t))
			}
		}
		if !ok || len(name.Templates) == 0 {
			c.lack(Lack{What: im.Name, Code: "not-discovered", Detail: "nothing is known of its discovery page, so that the other side can't have one", Note: true})
			continue
		}
		c.Index.Names = append(c.Index.Names, name)
	}
}

// Open opens a member of the bundle.
func (c *Cargo) Open(m bundle.Member) (io.ReadCloser, error) {
	switch m.Kind {
	case bundle.KindKey:
		return io.NopCloser(bytes.NewReader(c.small[m.Digest])), nil
	case bundle.KindSignature:
		b, err := c.from.Signature(m.Image.Digest)
		return io.NopCloser(bytes.NewReader(b)), err
	}
	return c.from.Open(m.Digest)
}

// refOf returns the ref of all the labels of an image.
func refOf(rec cache.Record) string {
	ref, err := acproxy.NewRef(rec.Name, rec.Labels)
	if err != nil {
		return rec.Name
	}
	return ref.String()
}
