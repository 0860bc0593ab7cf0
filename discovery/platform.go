package discovery

import (
	"slices"

	"github.com/appc/spec/schema/types"

	"github.com/acproxy/acproxy"
)

// knownPlatform returns 1 for a ref whose os and arch are a pair that the specification lists, 0 for any other.
func knownPlatform(ref acproxy.Ref) int {
	os, _ := ref.Label(acproxy.LabelOS)
	arch, _ := ref.Label(acproxy.LabelArch)
	if slices.Contains(types.ValidOSArch[os], arch) {
		return 1
	}
	return 0
}
