package airgap

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/bundle"
)

// Outcomes of one image.
const (
	Imported = "imported" // it was taken in
	Verified = "verified" // it would be, in a dry run
	Present  = "held"     // it was here already
	Refused  = "refused"  // keys, policies, rules or limits of this side say no
	Damaged  = "damaged"  // its bytes are not what the bundle says, or not all there
	Missing  = "missing"  // a delta says that it is here already, and it isn't
	Failed   = "failed"   // something went wrong on this side
)

// An Outcome is what became of one image of a bundle.
type Outcome struct {
	Image   string          `json:"image"` // the ref of all its labels
	Digest  acproxy.Digest  `json:"digest"`
	ImageID acproxy.ImageID `json:"imageID"`
	Size    int64           `json:"size"`
	Outcome string          `json:"outcome"`
	Code    string          `json:"code,omitempty"`
	Detail  string          `json:"detail,omitempty"`
	Signers []string        `json:"signers,omitempty"` // fingerprints of the keys of this side that accepted it; those of the bundle count for nothing
	Refs    []acproxy.Ref   `json:"refs,omitempty"`    // that answer it from now on
	Kept    []acproxy.Ref   `json:"kept,omitempty"`    // without a version, that go on answering what was signed later
}

// Good reports whether the image is here, or would be.
func (o Outcome) Good() bool {
	return o.Outcome == Imported || o.Outcome == Present || o.Outcome == Verified
}

// An Intake says how a bundle is taken in.
type Intake struct {
	DryRun     bool
	Pin        bool // keeps what is taken in from being evicted
	AllowOlder bool // lets an old bundle take refs without a version back

	Told     func(Outcome)                            // of each image, in the bundle's order; may be nil
	Key      func(key bundle.Key, armored []byte)     // of each key that the bundle carries; may be nil
	Lacking  func(what string, err error)             // of what else can't be used; may be nil
	Progress func(done, of int64, image bundle.Image) // may be nil
}

// A Summary is what became of a bundle.
type Summary struct {
	Bundle   acproxy.Digest `json:"bundle"`
	Signed   bundle.Signed  `json:"signed"`
	DryRun   bool           `json:"dryRun,omitempty"`
	Images   int            `json:"images"`
	Imported int            `json:"imported"` // in a dry run, those that would be
	Held     int            `json:"held"`
	Refused  int            `json:"refused"`
	Damaged  int            `json:"damaged"`
	Missing  int            `json:"missing"`
	Failed   int            `json:"failed"`
	Names    int            `json:"names"` // whose discovery was learned
	Bytes    int64          `json:"bytes"` // of the images that were imported
	// Damage is what is wrong with the bundle beside its images.
	Damage []string `json:"damage,omitempty"`
}

// Good reports whether everything in the bundle is here now, or would be.
func (s Summary) Good() bool {
	return s.Refused+s.Damaged+s.Missing+s.Failed == 0 && len(s.Damage) == 0
}

// Some reports whether something of it is.
func (s Summary) Some() bool { return s.Imported+s.Held > 0 }

func (s *Summary) count(o Outcome) {
	s.Images++
	switch o.Outcome {
	case Imported, Verified:
		s.Imported++
		s.Bytes += o.Size
	case Present:
		s.Held++
	case Refused:
		s.Refused++
	case Damaged:
		s.Damaged++
	case Missing:
		s.Missing++
	default:
		s.Failed++
	}
}

// Take takes a bundle in, image by image. Each is held whole and verified, or not at all, and one that can't be had keeps none of the others. It returns an error
// only if ctx ends it, with what was done until then.
func (in Intake) Take(ctx context.Context, to Destination, from *bundle.Reader) (Summary, error) {
	t := &taking{Intake: in, to: to, from: from, sum: Summary{Bundle: from.ID, Signed: from.Signed, DryRun: in.DryRun}, good: make(map[string]bool)}
	if t.Told == nil {
		t.Told = func(Outcome) {}
	}
	if t.Progress == nil {
		t.Progress = func(int64, int64, bundle.Image) {}
	}
	for i := range from.Index.Images {
		im := &from.Index.Images[i]
		if im.Absent {
			continue
		}
		t.total += im.Size
	}
	err := t.all(ctx)
	if err == nil && !in.DryRun {
		t.names()
	}
	return t.sum, err
}

type taking struct {
	Intake
	to          Destination
	from        *bundle.Reader
	sum         Summary
	good        map[string]bool // names of which an image is here
	done, total int64

	signature []byte // of the next image
	signedErr error
}

func (t *taking) all(ctx context.Context) error {
	for _, m := range t.from.Members() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch m.Kind {
		case bundle.KindKey:
			armored, err := t.from.ReadSmall(m)
			if err != nil {
				t.damage(m.Name(), err)
			} else if t.Key != nil {
				t.Key(*m.Key, armored)
			}
		case bundle.KindSignature:
			t.signature, t.signedErr = t.from.ReadSmall(m)
		case bundle.KindImage:
			o := t.image(ctx, m)
			if ctx.Err() != nil && !o.Good() {
				return context.Cause(ctx)
			}
			t.tell(o)
			t.signature, t.signedErr = nil, nil
			t.done += m.Size
			t.Progress(t.done, t.total, *m.Image)
		}
	}
	if err := t.from.End(); err != nil {
		t.damage("the end of the bundle", err)
	}
	for _, im := range t.from.Index.Images {
		if !im.Absent {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.tell(t.absent(ctx, im))
	}
	return nil
}

func (t *taking) tell(o Outcome) {
	t.sum.count(o)
	t.Told(o)
}

func (t *taking) damage(what string, err error) {
	t.sum.Damage = append(t.sum.Damage, what+": "+err.Error())
	if t.Lacking != nil {
		t.Lacking(what, err)
	}
}

// carried returns what is said of an image.
func (t *taking) carried(im bundle.Image) fetch.Carried {
	return fetch.Carried{
		Name: im.Name, Labels: im.Labels, Refs: im.Refs, Digest: im.Digest, ImageID: im.ImageID, Size: im.Size, Signature: t.signature, Modified: im.Modified,
		Source: "bundle " + t.from.ID.String(), Pin: t.Pin, AllowOlder: t.AllowOlder,
	}
}

func outcomeOf(im bundle.Image) Outcome {
	return Outcome{Image: im.Ref().String(), Digest: im.Digest, ImageID: im.ImageID, Size: im.Size}
}

// image takes one image in.
func (t *taking) image(ctx context.Context, m bundle.Member) Outcome {
	im, c, o := *m.Image, t.carried(*m.Image), outcomeOf(*m.Image)
	if t.signedErr != nil {
		// What is held needs no signature from here.
		if held, err := t.to.Examine(c); err != nil || !held {
			return failed(o, fmt.Errorf("its signature: %w", t.signedErr))
		}
	}
	open := func() (io.Reader, error) {
		body, err := t.from.Open(m)
		if err != nil {
			return nil, err
		}
		return &counted{Reader: body, told: func(n int64) { t.Progress(t.done+n, t.total, im) }}, nil
	}
	if t.DryRun {
		return t.verify(ctx, c, o, open)
	}
	taken, err := t.to.Take(ctx, c, open)
	if err != nil {
		return failed(o, err)
	}
	return t.taken(o, im, taken)
}

func (t *taking) taken(o Outcome, im bundle.Image, taken fetch.Taken) Outcome {
	t.good[im.Name] = true
	o.Outcome, o.Refs, o.Kept = Imported, taken.Moved, taken.Kept
	if taken.Held {
		o.Outcome = Present
	}
	for _, s := range taken.Record.Signers {
		o.Signers = append(o.Signers, s.Fingerprint)
	}
	return o
}

// verify says what would become of an image.
func (t *taking) verify(ctx context.Context, c fetch.Carried, o Outcome, open func() (io.Reader, error)) Outcome {
	held, err := t.to.Examine(c)
	if err != nil {
		return failed(o, err)
	}
	body, err := open()
	if err == nil {
		if held {
			// Its bytes are not needed, but whether the bundle is whole is what was asked.
			err = sameBytes(body, c.Digest)
		} else {
			err = t.to.Verify(ctx, c, body)
		}
	}
	if err != nil {
		return failed(o, err)
	}
	o.Outcome = Verified
	if held {
		o.Outcome = Present
	}
	return o
}

// absent lets an image that should be here already answer what it answers on the other side.
func (t *taking) absent(ctx context.Context, im bundle.Image) Outcome {
	c, o := t.carried(im), outcomeOf(im)
	held, err := t.to.Examine(c)
	if !held {
		o.Outcome, o.Code, o.Detail = Missing, "not-held", "the bundle goes on from an earlier one, which had it, and it is not held here"
		// Without its signature nothing else can be said of it.
		var refused *acproxy.Error
		if errors.As(err, &refused) && errors.Is(err, acproxy.ErrRefused) && refused.Code == "name-not-allowed" {
			return failed(o, err)
		}
		return o
	}
	if t.DryRun {
		o.Outcome = Present
		return o
	}
	taken, err := t.to.Take(ctx, c, func() (io.Reader, error) { return nil, errors.New("it is not held any more") })
	if err != nil {
		return failed(o, err)
	}
	return t.taken(o, im, taken)
}

// failed says why an image isn't here.
func failed(o Outcome, err error) Outcome {
	o.Code, o.Detail = acproxy.Code(err), err.Error()
	switch {
	case o.Code == bundle.CodeDamaged || o.Code == bundle.CodeIncomplete || o.Code == bundle.CodeTooLarge:
		o.Outcome = Damaged
	case errors.Is(err, acproxy.ErrRefused), errors.Is(err, acproxy.ErrPublisher), errors.Is(err, acproxy.ErrInvalid):
		o.Outcome = Refused
	default:
		o.Outcome = Failed
	}
	return o
}

// names teaches what the bundle says of the names of images that are here.
func (t *taking) names() {
	for _, n := range t.from.Index.Names {
		if !t.good[n.Name] {
			continue
		}
		var templates []discovery.Template
		for _, template := range n.Templates {
			templates = append(templates, discovery.Template(template))
		}
		learned, err := t.to.Teach(n.Name, templates)
		if err != nil {
			t.damage("what is known of "+n.Name, err)
		}
		if learned {
			t.sum.Names++
		}
	}
}

// counted tells how much was read.
type counted struct {
	io.Reader
	n    int64
	told func(int64)
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	c.told(c.n)
	return n, err
}

func sameBytes(body io.Reader, want acproxy.Digest) error {
	sum := sha256.New()
	if _, err := io.Copy(sum, body); err != nil {
		return err
	}
	if is := acproxy.Digest(sum.Sum(nil)); is != want {
		return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: bundle.CodeDamaged, Detail: fmt.Sprintf("it has other bytes than the index says: their digest is %v, not %v", is, want)}
	}
	return nil
}
