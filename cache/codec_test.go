package cache

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

// rowKind is one kind of row, with what writes it and what reads it.
type rowKind struct {
	name   string
	random func(r *rand.Rand) any
	encode func(v any) []byte
	decode func(row string) (any, bool)
}

func kindOf[T any](name string, encode func([]byte, T) []byte, take func(*decoder) T, unkey func(*T)) rowKind {
	return rowKind{
		name: name,
		random: func(r *rand.Rand) any {
			var v T
			randomize(r, reflect.ValueOf(&v).Elem())
			unkey(&v)
			return v
		},
		encode: func(v any) []byte { return encode(nil, v.(T)) },
		decode: func(row string) (any, bool) {
			d := decoder{left: row}
			v := take(&d)
			return v, d.ok()
		},
	}
}

// rowKinds are all kinds of rows; what a key says is not in the row.
func rowKinds() []rowKind {
	return []rowKind{
		kindOf("records", appendHeld, takeHeld, func(h *held) { h.Digest = acproxy.Digest{} }),
		kindOf("refs", appendResolution, takeResolution, func(r *Resolution) { r.Ref = acproxy.Ref{} }),
		kindOf("known", appendKnown, takeKnown, func(k *Discovered) { k.Name = "" }),
		kindOf("totals", appendTotals, takeTotals, func(*totals) {}),
	}
}

// randomize gives v and everything in it some value, the zero value among others. Maps and slices are nil or hold something.
func randomize(r *rand.Rand, v reflect.Value) {
	if r.IntN(8) == 0 {
		v.SetZero()
		return
	}
	if v.Type() == reflect.TypeFor[time.Time]() {
		v.Set(reflect.ValueOf(time.Unix(r.Int64N(1<<36)-1<<35, r.Int64N(1e9)).UTC()))
		return
	}
	switch v.Type() {
	case reflect.TypeFor[acproxy.Ref]():
		return
	case reflect.TypeFor[Hashes]():
		v.Set(reflect.ValueOf(HashesOf(randomMap[[]byte](r))))
		return
	case reflect.TypeFor[Validators]():
		v.Set(reflect.ValueOf(ValidatorsOf(randomMap[string](r))))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			randomize(r, v.Field(i))
		}
	case reflect.Array:
		for i := range v.Len() {
			randomize(r, v.Index(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+r.IntN(3), 8))
		for i := range v.Len() {
			randomize(r, v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 1 + r.IntN(12) {
			key, elem := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			randomize(r, key)
			randomize(r, elem)
			v.SetMapIndex(key, elem)
		}
	case reflect.String:
		b := make([]byte, r.IntN(200))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		v.SetString(string(b))
	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.Int64:
		v.SetInt(int64(r.Uint64() >> r.IntN(64)))
	case reflect.Uint8:
		v.SetUint(uint64(r.Uint32() & 0xff))
	default:
		panic("a field of a kind that is new: " + v.Type().String())
	}
}

func randomMap[V any](r *rand.Rand) map[string]V {
	m := make(map[string]V)
	randomize(r, reflect.ValueOf(&m).Elem())
	return m
}

// TestPackedMapsAreWhatTheyWere: hash states and validators come back as they were put in, from rows and from JSON.
func TestPackedMapsAreWhatTheyWere(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		hashes, validators := randomMap[[]byte](r), randomMap[string](r)
		h, v := HashesOf(hashes), ValidatorsOf(validators)
		if got := h.Map(); !reflect.DeepEqual(got, hashes) && len(got)+len(hashes) > 0 {
			t.Fatalf("%v became %v", hashes, got)
		}
		if got := v.Map(); !reflect.DeepEqual(got, validators) && len(got)+len(validators) > 0 {
			t.Fatalf("%v became %v", validators, got)
		}
		for name, want := range validators {
			if got := v.Get(name); got != want {
				t.Fatalf("%q is %q, want %q", name, got, want)
			}
		}
		if got := v.Get("no such validator"); got != "" {
			t.Fatalf("what isn't there is %q", got)
		}
	}
	for _, tt := range []struct{ name, json, want string }{
		{"none", `{}`, `{}`},
		{"null is none", `{"Hashed":null,"Validators":null}`, `{}`},
		{"empty is none", `{"Hashed":{},"Validators":{}}`, `{}`},
		{"some", `{"Validators":{"b":"2","a":""},"Hashed":{"SHA-512":"AQI=","empty":"","nil":null}}`,
			`{"Hashed":{"SHA-512":"AQI=","empty":"","nil":null},"Validators":{"a":"","b":"2"}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var v struct {
				Hashed     Hashes     `json:",omitempty"`
				Validators Validators `json:",omitempty"`
			}
			if err := json.Unmarshal([]byte(tt.json), &v); err != nil {
				t.Fatal(err)
			}
			if b, err := json.Marshal(v); err != nil || string(b) != tt.want {
				t.Errorf("it became %s, %v, want %s", b, err, tt.want)
			}
		})
	}
	for _, bad := range []string{`[]`, `"x"`, `{"a":1}`} {
		var h Hashes
		var v Validators
		if h.UnmarshalJSON([]byte(bad)) == nil || v.UnmarshalJSON([]byte(bad)) == nil {
			t.Errorf("%s was taken for one", bad)
		}
	}
}

// TestRowsKeepEveryField finds a field that was forgotten, because every field of a record and of what is in it has some value at some time.
func TestRowsKeepEveryField(t *testing.T) {
	for _, kind := range rowKinds() {
		t.Run(kind.name, func(t *testing.T) {
			for seed := range uint64(300) {
				want := kind.random(rand.New(rand.NewPCG(seed, 0)))
				got, ok := kind.decode(string(kind.encode(want)))
				if !ok || !reflect.DeepEqual(got, want) {
					t.Fatalf("seed %d: %v\n%+v became\n%+v", seed, ok, want, got)
				}
			}
		})
	}
}

// TestRowsAreReadToTheEnd: a row that ends early, or goes on, is not one.
func TestRowsAreReadToTheEnd(t *testing.T) {
	for _, kind := range rowKinds() {
		t.Run(kind.name, func(t *testing.T) {
			row := string(kind.encode(kind.random(rand.New(rand.NewPCG(1, 0)))))
			for n := range len(row) {
				if got, ok := kind.decode(row[:n]); ok {
					t.Fatalf("%d bytes of %d read as %+v", n, len(row), got)
				}
			}
			if got, ok := kind.decode(row + "\x00"); ok {
				t.Errorf("with one byte more it reads as %+v", got)
			}
		})
	}
}

func TestEdgesOfRows(t *testing.T) {
	east := time.FixedZone("east", 3600)
	when := time.Date(2026, 3, 1, 12, 0, 0, 999_999_999, time.UTC)
	for _, tt := range []struct {
		name      string
		put, want Record
	}{
		{"nothing", Record{}, Record{}},
		{"empty is nil", Record{
			Labels: map[string]string{}, Dependencies: []Dependency{}, Signers: []Signer{}, Hashed: HashesOf(map[string][]byte{}),
		}, Record{}},
		{"but not inside of a map", Record{
			Labels: map[string]string{"": ""}, Hashed: HashesOf(map[string][]byte{"nil": nil, "empty": {}}),
		}, Record{
			Labels: map[string]string{"": ""}, Hashed: HashesOf(map[string][]byte{"nil": nil, "empty": {}}),
		}},
		{"a time zone is not kept, the moment is", Record{Used: when.In(east)}, Record{Used: when}},
		{"the zero time of another zone is the zero time", Record{Used: time.Time{}.In(east)}, Record{}},
		{"the clock's own reading is not kept", Record{Used: when.Add(time.Until(time.Now()) * 0)}, Record{Used: when}},
		{"before 1970", Record{Modified: time.Date(1, 1, 1, 0, 0, 0, 1, time.UTC)}, Record{Modified: time.Date(1, 1, 1, 0, 0, 0, 1, time.UTC)}},
		{"far ahead", Record{Modified: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}, Record{Modified: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}},
		{"the largest numbers", Record{Size: math.MaxInt64, Uncompressed: math.MinInt64}, Record{Size: math.MaxInt64, Uncompressed: math.MinInt64}},
		{"text that is none", Record{ETag: "\xff\x00"}, Record{ETag: "\xff\x00"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeRow(bucketRecords, nil, appendHeld(nil, held{Record: tt.put, Sidecar: 7}), takeHeld)
			if err != nil || !reflect.DeepEqual(got, held{Record: tt.want, Sidecar: 7}) {
				t.Errorf("it became %+v, %v, want %+v", got.Record, err, tt.want)
			}
		})
	}
}

// FuzzRows reads what is not a row. Whatever it is, reading it ends; and what can be read, can be written and read again.
func FuzzRows(f *testing.F) {
	kinds := rowKinds()
	for i, kind := range kinds {
		for seed := range uint64(3) {
			f.Add(byte(i), kind.encode(kind.random(rand.New(rand.NewPCG(seed, 0)))))
		}
		f.Add(byte(i), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	}
	f.Fuzz(func(t *testing.T, i byte, row []byte) {
		kind := kinds[int(i)%len(kinds)]
		v, ok := kind.decode(string(row))
		if !ok {
			return
		}
		again, ok := kind.decode(string(kind.encode(v)))
		if !ok || !reflect.DeepEqual(v, again) {
			t.Errorf("%+v became %v %+v", v, ok, again)
		}
	})
}
