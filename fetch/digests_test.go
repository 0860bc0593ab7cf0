package fetch

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"fmt"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// TestDigestAndSignatureOfOneHash: a signature may be over the hash that images are stored by. Then it is computed once, for both, also over an interruption, and for
// what is passed on without being kept.
func TestDigestAndSignatureOfOneHash(t *testing.T) {
	for _, of := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		for _, kept := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v, kept: %v", of, kept), func(t *testing.T) {
				var change []func(*Config)
				if !kept {
					change = append(change, policies(Policy{OnFull: StreamFull}), full)
				}
				s := newScene(t, change...)
				publish := func(version string, spoil bool) (ref acproxy.Ref, blob []byte) {
					t.Helper()
					blob = acitest.Must(t, spec(version, 300_000))
					signature, err := goodKey().Sign(bytes.NewReader(blob), trusttest.SignOptions{Hash: of})
					if spoil {
						blob[len(blob)/2] ^= 1
					}
					if err == nil {
						_, err = s.pub.Add(publisher.Image{Name: "example.com/app", Labels: labels(version), ACI: blob, Signature: signature})
					}
					if err != nil {
						t.Fatal(err)
					}
					return s.app(version), blob
				}
				good, blob := publish("1.0", false)
				bad, _ := publish("2.0", true)
				if !kept {
					if got, status, err := s.pass(good); err != nil || status != Uncached || !bytes.Equal(got, blob) {
						t.Errorf("%d bytes, %v, %v", len(got), status, err)
					}
					if got, _, err := s.pass(bad); acproxy.Code(err) != "bad-signature" {
						t.Errorf("of an image whose signature is over another one: %d bytes, %v", len(got), err)
					}
					return
				}
				s.pub.Misbehave(publisher.URL("*1.0*.aci"), publisher.Fault{TruncateAfter: publisher.At(100_000), Times: 1})
				s.want(good, blob, Miss)
				s.idle()
				if rec := s.record(good); rec.Digest != sha256.Sum256(blob) || len(rec.Signers) != 1 {
					t.Errorf("the record is %+v", rec)
				}
				s.wantError(bad, acproxy.ErrRefused, "bad-signature")
			})
		}
	}
}
