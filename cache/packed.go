package cache

import (
	"encoding/json"
	"fmt"
)

// Hashes are hash states by the names of the hashes. They are as the index has them, and are taken apart for those only who ask for them: most who look
// an image up don't. The zero value holds none; those that hold the same are equal. As JSON they are an object.
type Hashes string

// HashesOf returns the hash states that are in a map, which may be nil.
func HashesOf(m map[string][]byte) Hashes {
	if len(m) == 0 {
		return ""
	}
	return Hashes(appendBytesMap(nil, m))
}

// Map returns the hash states as a new map, nil if there are none.
func (h Hashes) Map() map[string][]byte {
	d := decoder{left: string(h)}
	if h == "" {
		return nil
	}
	return d.bytesMap()
}

// MarshalJSON returns an object.
func (h Hashes) MarshalJSON() ([]byte, error) { return json.Marshal(h.Map()) }

// UnmarshalJSON reads an object, or null.
func (h *Hashes) UnmarshalJSON(b []byte) error {
	var m map[string][]byte
	if err := json.Unmarshal(b, &m); err != nil {
		return fmt.Errorf("reading hash states: %w", err)
	}
	*h = HashesOf(m)
	return nil
}

// Validators are what a publisher sent to compare with later, by names that the fetching side chooses. Like [Hashes] they are taken apart for those only
// who ask. The zero value holds none; those that hold the same are equal. As JSON they are an object.
type Validators string

// ValidatorsOf returns the validators that are in a map, which may be nil.
func ValidatorsOf(m map[string]string) Validators {
	if len(m) == 0 {
		return ""
	}
	return Validators(appendStringMap(nil, m))
}

// Get returns a validator, "" if there is none of the name.
func (v Validators) Get(name string) string { return v.Map()[name] }

// Map returns the validators as a new map, nil if there are none.
func (v Validators) Map() map[string]string {
	d := decoder{left: string(v)}
	if v == "" {
		return nil
	}
	return d.stringMap()
}

// MarshalJSON returns an object.
func (v Validators) MarshalJSON() ([]byte, error) { return json.Marshal(v.Map()) }

// UnmarshalJSON reads an object, or null.
func (v *Validators) UnmarshalJSON(b []byte) error {
	var m map[string]string
	if err := json.Unmarshal(b, &m); err != nil {
		return fmt.Errorf("reading validators: %w", err)
	}
	*v = ValidatorsOf(m)
	return nil
}

// appendPacked appends what [Hashes] and [Validators] are as a row has it.
func appendPacked[T ~string](b []byte, packed T) []byte {
	if packed == "" {
		return append(b, 0)
	}
	return append(b, packed...)
}

// packed returns what skip skips, "" if that holds nothing.
func (d *decoder) packed(skip func(*decoder)) string {
	before := d.left
	skip(d)
	n := len(before) - len(d.left)
	if d.bad || n <= 1 {
		return ""
	}
	return before[:n]
}

func (d *decoder) skipBytesMap() {
	for range d.count(2) {
		d.string()
		size := d.uvarint()
		if size > uint64(len(d.left))+1 {
			d.fail()
			return
		}
		if size > 0 {
			d.bytes(int(size - 1))
		}
	}
}
