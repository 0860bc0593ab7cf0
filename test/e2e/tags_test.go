package e2e

import (
	"bytes"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/net/html"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
)

const (
	sigterm = syscall.SIGTERM
	sigkill = syscall.SIGKILL
	sigint  = syscall.SIGINT
)

func lookPath(name string) (string, error) { return exec.LookPath(name) }

// publisherImage returns what a publisher needs to publish an image.
func publisherImage(spec acitest.Spec, aci, signature []byte) publisher.Image {
	return publisher.Image{Name: spec.Name, Labels: spec.Labels, ACI: aci, Signature: signature}
}

// tagsOf returns the contents of a page's meta tags by their name, in order.
func tagsOf(t testing.TB, page []byte) map[string][]string {
	t.Helper()
	tags := make(map[string][]string)
	for z := html.NewTokenizer(bytes.NewReader(page)); z.Next() != html.ErrorToken; {
		token := z.Token()
		if token.Data != "meta" || token.Type != html.StartTagToken && token.Type != html.SelfClosingTagToken {
			continue
		}
		attributes := make(map[string]string)
		for _, a := range token.Attr {
			attributes[a.Key] = a.Val
		}
		if name := attributes["name"]; name != "" {
			tags[name] = append(tags[name], attributes["content"])
		}
	}
	return tags
}
