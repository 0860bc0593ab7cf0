//go:build race

package testtools

// Raced says whether this test binary looks for data races, which makes everything several times slower.
const Raced = true
