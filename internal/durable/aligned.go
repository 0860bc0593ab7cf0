package durable

import "unsafe"

// Alignment is what reading past the page cache asks of memory and offsets: no disk has larger blocks.
const Alignment = 4096

// Aligned returns n bytes of memory that begin at a multiple of [Alignment].
func Aligned(n int) []byte {
	b := make([]byte, n+Alignment)
	skip := 0
	if rest := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % Alignment); rest != 0 {
		skip = Alignment - rest
	}
	return b[skip : skip+n : skip+n]
}
