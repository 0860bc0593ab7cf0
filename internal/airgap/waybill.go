package airgap

import (
	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/bundle"
)

// A Waybill is a [Cargo] without what is in it: what a server says is to be carried, to those who then fetch it.
type Waybill struct {
	Images  []bundle.Image `json:"images"`  // in the order of the bundle
	Keys    []CarriedKey   `json:"keys"`    // of the images' signers
	Names   []Learned      `json:"names"`   // what discovery knows of the images' names
	Lacking []Lack         `json:"lacking"` // what was chosen, or is needed, and can't be carried
}

// A CarriedKey is a key that goes along with the images that it signed.
type CarriedKey struct {
	Fingerprint string   `json:"fingerprint"`        // lower-case hex
	Armored     string   `json:"armored"`            // the key itself
	Prefixes    []string `json:"prefixes,omitempty"` // of image names, for which it is trusted
}

// Learned is what discovery knows of an image name.
type Learned struct {
	Name      string               `json:"name"`
	Templates []discovery.Template `json:"templates"` // in the publisher's order
}

// Waybill returns what is in a cargo. The bytes stay where they are.
func (c *Cargo) Waybill() Waybill {
	// Empty lists, and no nulls.
	w := Waybill{Images: append([]bundle.Image{}, c.Index.Images...), Keys: []CarriedKey{}, Names: []Learned{}, Lacking: append([]Lack{}, c.Lacks...)}
	for _, k := range c.Index.Keys {
		w.Keys = append(w.Keys, CarriedKey{Fingerprint: k.Fingerprint, Armored: string(c.small[k.Digest]), Prefixes: k.Prefixes})
	}
	for _, n := range c.Index.Names {
		learned := Learned{Name: n.Name}
		for _, t := range n.Templates {
			learned.Templates = append(learned.Templates, discovery.Template(t))
		}
		w.Names = append(w.Names, learned)
	}
	return w
}

// Cargo returns the cargo of a waybill, whose images and signatures are read from a source.
func (w Waybill) Cargo(from Source) *Cargo {
	c := &Cargo{Index: &bundle.Index{Images: w.Images}, Lacks: w.Lacking, from: from, small: make(map[acproxy.Digest][]byte)}
	for _, k := range w.Keys {
		armored := []byte(k.Armored)
		digest := digestOf(armored)
		c.small[digest] = armored
		c.Index.Keys = append(c.Index.Keys, bundle.Key{Fingerprint: k.Fingerprint, Digest: digest, Size: int64(len(armored)), Prefixes: k.Prefixes})
	}
	for _, n := range w.Names {
		name := bundle.Name{Name: n.Name}
		for _, t := range n.Templates {
			name.Templates = append(name.Templates, bundle.Template(t))
		}
		c.Index.Names = append(c.Index.Names, name)
	}
	return c
}
