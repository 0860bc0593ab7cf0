package trust_test

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func ExampleKeyring_Judge() {
	dir, err := os.MkdirTemp("", "trustedkeys")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	publisher, err := trusttest.NewKey(trusttest.Options{Name: "Carly Container", Email: "carly@example.com"})
	if err != nil {
		log.Fatal(err)
	}
	dirs := trust.Dirs{Local: dir}
	if _, err := trust.Add(dirs, "example.com/app", publisher.Armored()); err != nil {
		log.Fatal(err)
	}
	keys, err := trust.Load(dirs)
	if err != nil {
		log.Fatal(err)
	}
	const image = "the bytes of an image"
	signature, err := publisher.Sign(strings.NewReader(image), trusttest.SignOptions{})
	if err != nil {
		log.Fatal(err)
	}

	// Before the first byte is asked for: can this signature become acceptable at all?
	_, err = keys.Judge(trust.Question{Name: "example.com/apple", Signature: signature, Now: time.Now()})
	var refusal *trust.Refusal
	fmt.Println(errors.Is(err, acproxy.ErrRefused), errors.As(err, &refusal), refusal.Outcome, refusal.TrustedFor)

	// While the bytes arrive they are hashed as the signature asks; then the decision is made.
	hasher, err := trust.NewHasher(signature)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := io.Copy(hasher, strings.NewReader(image)); err != nil {
		log.Fatal(err)
	}
	hashed, err := hasher.Hashed()
	if err != nil {
		log.Fatal(err)
	}
	answer, err := keys.Judge(trust.Question{Name: "example.com/app", Signature: signature, Hashed: hashed, Now: time.Now()})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Outcome, answer.Signers[0].UserID, answer.Signers[0].Algorithm)
	// Output:
	// true true unknown-key [example.com/app]
	// accepted Carly Container <carly@example.com> RSA 2048, SHA-512
}
