package main

import (
	"reflect"
	"slices"
	"testing"

	"github.com/acproxy/acproxy/internal/config"
)

// TestReloadable changes every key of a configuration that is a plain value: those that are said to take effect without a restart are taken over, and no other.
func TestReloadable(t *testing.T) {
	before, after := config.Default(), config.Default()
	var change func(v reflect.Value)
	change = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				change(v.Field(i))
			}
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Int, reflect.Int64:
			v.SetInt(v.Int() + 1)
		case reflect.Uint32:
			v.SetUint(v.Uint() + 1)
		case reflect.Bool:
			v.SetBool(!v.Bool())
		case reflect.Slice:
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
		}
	}
	change(reflect.ValueOf(&after).Elem())
	all := keysOf(before, after)
	next := before
	take(&next, &after)
	if got := keysOf(before, next); !slices.Equal(got, reloadable()) {
		t.Errorf("taken over are %q, said to be are %q", got, reloadable())
	}
	for _, key := range reloadable() {
		if !slices.Contains(all, key) {
			t.Errorf("there is no key %s", key)
		}
	}
	if len(all) < 60 {
		t.Errorf("only %d keys were changed", len(all))
	}
}

func keysOf(before, after config.Config) []string {
	var keys []string
	for _, c := range differences(&before, &after) {
		keys = append(keys, c.Key)
	}
	slices.Sort(keys)
	return keys
}
