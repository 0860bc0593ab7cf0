package memo

import "testing"

func TestMemo(t *testing.T) {
	m := New[int, string](2)
	want := func(key int, want string) {
		t.Helper()
		if got, ok := m.Get(key); got != want || ok != (want != "") {
			t.Errorf("Get(%d) = %q, %v, want %q", key, got, ok, want)
		}
	}
	want(1, "")
	m.Put(1, "one")
	m.Put(2, "two")
	m.Put(1, "another")
	want(1, "another")
	want(2, "two")
	m.Put(3, "three")
	want(1, "")
	want(2, "")
	want(3, "three")
}

func BenchmarkGet(b *testing.B) {
	m := New[string, int](10)
	m.Put("key", 1)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, ok := m.Get("key"); !ok {
				b.Error("it is forgotten")
			}
		}
	})
}
