package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"reflect"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humamux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
)

// Export returns what of a choice is to be carried away. That takes as much memory as all that is held may need, so it is for who administers the server.
func (v View) Export(ctx context.Context, choice airgap.Choice) (airgap.Waybill, error) {
	if err := v.administer("export images"); err != nil {
		return airgap.Waybill{}, err
	}
	cargo, err := airgap.Choose(ctx, v.s.o.Origin, choice)
	if err != nil {
		return airgap.Waybill{}, err
	}
	return cargo.Waybill(), nil
}

// Holdings are the images that a store holds and would serve.
type Holdings struct {
	Images []bundle.Held `json:"images"`
}

// Holdings returns what the store holds, for who administers the server.
func (v View) Holdings(ctx context.Context) (Holdings, error) {
	if err := v.administer("list all that is held"); err != nil {
		return Holdings{}, err
	}
	r, err := airgap.Receipt(ctx, v.s.o.Origin)
	if err != nil {
		return Holdings{}, err
	}
	return Holdings{append([]bundle.Held{}, r.Images...)}, nil
}

// A Destination is where carried images go to.
type Destination interface {
	airgap.Destination
	// TakeSent is Take for bytes that come over a network, as slowly as whoever sends them likes.
	TakeSent(ctx context.Context, c fetch.Carried, open func() (io.Reader, error)) (fetch.Taken, error)
}

var _ Destination = (*fetch.Fetcher)(nil)

// brings returns why the client may not bring an image, nil if it may.
func (v View) brings(c fetch.Carried) error {
	switch {
	case !v.May(access.Push, c.Name):
		return v.refuse("bring images of " + c.Name)
	case c.Pin && !v.May(access.Pin, c.Name):
		return v.refuse("pin images of " + c.Name)
	case c.AllowOlder && !v.May(access.Admin, c.Name):
		return v.refuse("let refs of " + c.Name + " go back to images that were signed earlier")
	}
	return nil
}

// Examine is [fetch.Fetcher.Examine] in the name of the client.
func (v View) Examine(c fetch.Carried) (held bool, err error) {
	if err := v.brings(c); err != nil {
		return false, err
	}
	return v.s.o.Destination.Examine(c)
}

// TakeIn is [fetch.Fetcher.TakeSent] in the name of the client.
func (v View) TakeIn(ctx context.Context, c fetch.Carried, open func() (io.Reader, error)) (fetch.Taken, error) {
	if err := v.brings(c); err != nil {
		return fetch.Taken{}, err
	}
	c.Client = v.who.name()
	taken, err := v.s.o.Destination.TakeSent(ctx, c, open)
	taken.Record.Hashed = ""
	return taken, err
}

// VerifyCarried is [fetch.Fetcher.Verify] in the name of the client.
func (v View) VerifyCarried(ctx context.Context, c fetch.Carried, body io.Reader) error {
	if err := v.brings(c); err != nil {
		return err
	}
	return v.s.o.Destination.Verify(ctx, c, body)
}

// Teach is [fetch.Fetcher.Teach] in the name of the client.
func (v View) Teach(l airgap.Learned) (bool, error) {
	if err := v.brings(fetch.Carried{Name: l.Name}); err != nil {
		return false, err
	}
	return v.s.o.Destination.Teach(l.Name, l.Templates)
}

// Examined is what a server says of an image without its bytes.
type Examined struct {
	Held bool `json:"held"` // it is here and may be served, so that its bytes are not needed
}

// Taught says whether what is known of a name was taken over.
type Taught struct {
	Wanted bool `json:"wanted"`
}

// maxCarried bounds what is said of an image that is brought, in bytes: its signature is the largest part of it.
const maxCarried = 8 << 20

// The parts of the body that an image is brought in.
const (
	partCarried = "carried"
	partImage   = "image"
)

// codeBytesNeeded says that an image was brought without bytes, and isn't held.
const codeBytesNeeded = "bytes-needed"

type importInput struct {
	Verify bool `query:"verify" doc:"Only say what would become of the image, and keep nothing."`
}

func (s *Server) describeCarriage(a huma.API) {
	register(s, a, huma.Operation{
		OperationID: "export", Method: http.MethodPost, Path: "export", Tags: []string{tagCarriage}, Summary: "Say what an export carries", MaxBodyBytes: maxWarmBody,
		Description: "What is chosen, and what it depends on. The bytes and signatures are those of the images. What can't be carried is in the answer, and no error. Needs the right admin.",
	}, func(v View, ctx context.Context, in *struct{ Body airgap.Choice }) (airgap.Waybill, error) {
		ctx, done := s.listening(ctx)
		defer done()
		return v.Export(ctx, in.Body)
	})
	register(s, a, huma.Operation{
		OperationID: "show-holdings", Method: http.MethodGet, Path: "holdings", Tags: []string{tagCarriage}, Summary: "Say what is held and would be served", Description: "What a receipt is made of. Needs the right admin.",
	}, func(v View, ctx context.Context, _ *nothing) (Holdings, error) {
		ctx, done := s.listening(ctx)
		defer done()
		return v.Holdings(ctx)
	})
	register(s, a, huma.Operation{
		OperationID: "examine-carried", Method: http.MethodPost, Path: "import/examine", Tags: []string{tagCarriage}, Summary: "Judge an image without its bytes", MaxBodyBytes: maxCarried,
		Description: "By its name, its signature and the keys and policies here. Needs the right push for the name, pin if it is to be pinned, and admin if it may take refs back to what was signed earlier.",
	}, func(v View, _ context.Context, in *struct{ Body fetch.Carried }) (Examined, error) {
		held, err := v.Examine(in.Body)
		return Examined{held}, err
	})
	register(s, a, huma.Operation{
		OperationID: "teach", Method: http.MethodPost, Path: "import/names", Tags: []string{tagCarriage}, Summary: "Say what discovery knows of a name",
		Description: "It is taken over where nothing is known of the name, or nobody may be asked. Needs the right push for the name.",
	}, func(v View, _ context.Context, in *struct{ Body airgap.Learned }) (Taught, error) {
		wanted, err := v.Teach(in.Body)
		return Taught{wanted}, err
	})
	huma.Register(a, huma.Operation{
		OperationID: "import-image", Method: http.MethodPost, Path: api + "import/images", Tags: []string{tagCarriage}, Summary: "Bring an image",
		Description: "Nothing that is said of it is believed: it goes through the check and the commit of an image that is fetched. The part image may be left out for an image that is held. Needs the right push for the name, pin if it is to be pinned, and admin if it may take refs back to what was signed earlier.",
		Responses: map[string]*huma.Response{"200": {
			Description: "OK", Content: map[string]*huma.MediaType{"application/json": {Schema: a.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[fetch.Taken](), true, "Taken")}},
		}},
	}, func(_ context.Context, in *importInput) (*huma.StreamResponse, error) {
		return &huma.StreamResponse{Body: func(ctx huma.Context) {
			r, w := humamux.Unwrap(ctx)
			taken, err := s.importImage(w, r, in.Verify)
			if err != nil {
				s.fail(w, r, err)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(taken) // who has left isn't told
		}}, nil
	})
	// Only now: the library reads a body that it knows of into memory.
	a.OpenAPI().Paths[api+"import/images"].Post.RequestBody = &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{"multipart/form-data": {Schema: &huma.Schema{
		Type: huma.TypeObject, Required: []string{partCarried}, Properties: map[string]*huma.Schema{
			partCarried: a.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[fetch.Carried](), true, "Carried"), partImage: {Type: huma.TypeString, Format: "binary"},
		},
	}}}}
}

// importImage takes in the image that is in the body of a request.
func (s *Server) importImage(w http.ResponseWriter, r *http.Request, verify bool) (taken fetch.Taken, err error) {
	ctx, done := s.listening(r.Context())
	defer done()
	body := &patientBody{r.Body, http.NewResponseController(w), s.o.Stall}
	r.Body = body
	defer func() {
		// After an error there may be more to read, which isn't waited for without end either.
		if err == nil {
			body.patience(0)
		}
	}()
	parts, err := r.MultipartReader()
	if err != nil {
		return taken, invalidBody(err)
	}
	c, err := readCarried(parts)
	if err != nil {
		return taken, err
	}
	v := s.ViewOf(ctx)
	if err := v.brings(c); err != nil {
		return taken, err
	}
	open := func() (io.Reader, error) {
		part, err := parts.NextPart()
		switch {
		case errors.Is(err, io.EOF):
			return nil, &acproxy.Error{Kind: acproxy.ErrBusy, Code: codeBytesNeeded, Detail: c.Name + " is not held here (any more), and came without its bytes"}
		case err != nil:
			return nil, invalidBody(err)
		case part.FormName() != partImage:
			return nil, invalidBody(fmt.Errorf("its second part is %q, and not %q", part.FormName(), partImage))
		}
		return part, nil
	}
	if verify {
		body, err := open()
		if err == nil {
			err = v.VerifyCarried(ctx, c, body)
		}
		drain(ctx, r, err)
		return taken, err
	}
	taken, err = v.TakeIn(ctx, c, open)
	drain(ctx, r, err)
	return taken, err
}

// patientBody is what a client sends, within the patience for one that does nothing.
type patientBody struct {
	io.ReadCloser
	c     *http.ResponseController
	stall time.Duration
}

// Read implements io.Reader.
func (b *patientBody) Read(p []byte) (int, error) {
	b.patience(b.stall)
	return b.ReadCloser.Read(p)
}

// patience is how long the next bytes may take from now on; 0 is as long as they like.
func (b *patientBody) patience(d time.Duration) {
	var deadline time.Time
	if d > 0 {
		deadline = time.Now().Add(d)
	}
	_ = b.c.SetReadDeadline(deadline) // what can't have one, as in a test, has none
}

// drain reads what a client still sends, so that it gets to reading why that isn't wanted.
func drain(ctx context.Context, r *http.Request, why error) {
	if why != nil && ctx.Err() == nil {
		_, _ = io.Copy(io.Discard, r.Body)
	}
}

// readCarried reads what is said of an image that is brought.
func readCarried(parts *multipart.Reader) (c fetch.Carried, err error) {
	part, err := parts.NextPart()
	if err == nil && part.FormName() != partCarried {
		err = fmt.Errorf("its first part is %q, and not %q", part.FormName(), partCarried)
	}
	if err != nil {
		return c, invalidBody(err)
	}
	text, err := io.ReadAll(io.LimitReader(part, maxCarried+1))
	if err == nil && len(text) > maxCarried {
		err = fmt.Errorf("its part %s has more than %d bytes", partCarried, maxCarried)
	}
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		return c, invalidBody(err)
	}
	return c, nil
}

func invalidBody(err error) error {
	return &acproxy.Error{Kind: acproxy.ErrInvalid, Code: "invalid", Detail: "the body of the request: " + err.Error(), Err: err}
}

var _ airgap.Destination = (*Client)(nil)

// Export returns what the server would have carried, with images and signatures that are read from it.
func (c *Client) Export(ctx context.Context, choice airgap.Choice) (*airgap.Cargo, error) {
	var w airgap.Waybill
	if err := c.patient().post(ctx, "export", choice, &w); err != nil {
		return nil, err
	}
	return w.Cargo(c), nil
}

// Open implements [airgap.Source].
func (c *Client) Open(digest acproxy.Digest) (io.ReadCloser, error) { return c.Blob(digest) }

// Holdings returns what the server holds and would serve.
func (c *Client) Holdings(ctx context.Context) ([]bundle.Held, error) {
	var h Holdings
	err := c.patient().do(ctx, http.MethodGet, "holdings", &h)
	return h.Images, err
}

// Examine implements [airgap.Destination].
func (c *Client) Examine(carried fetch.Carried) (held bool, err error) {
	var e Examined
	err = c.post(context.Background(), "import/examine", carried, &e)
	return e.Held, err
}

// Teach implements [airgap.Destination].
func (c *Client) Teach(name string, templates []discovery.Template) (bool, error) {
	var t Taught
	err := c.post(context.Background(), "import/names", airgap.Learned{Name: name, Templates: append([]discovery.Template{}, templates...)}, &t)
	return t.Wanted, err
}

// Verify implements [airgap.Destination].
func (c *Client) Verify(ctx context.Context, carried fetch.Carried, body io.Reader) error {
	_, err := c.bring(ctx, "?verify=true", carried, body)
	return err
}

// Take implements [airgap.Destination].
func (c *Client) Take(ctx context.Context, carried fetch.Carried, open func() (io.Reader, error)) (fetch.Taken, error) {
	held, err := c.Examine(carried)
	if err == nil && held {
		taken, err := c.bring(ctx, "", carried, nil)
		if acproxy.Code(err) != codeBytesNeeded {
			return taken, err
		}
	}
	// What the server has against it it says, and writes down, once it is brought.
	if err != nil {
		return c.bring(ctx, "", carried, nil)
	}
	body, err := open()
	if err != nil {
		return fetch.Taken{}, err
	}
	return c.bring(ctx, "", carried, body)
}

// bring sends an image. body is nil if its bytes are not needed.
func (c *Client) bring(ctx context.Context, query string, carried fetch.Carried, body io.Reader) (taken fetch.Taken, err error) {
	text, err := json.Marshal(carried)
	if err != nil {
		return taken, err
	}
	var head bytes.Buffer
	form := multipart.NewWriter(&head)
	for _, part := range []struct {
		name, mediaType string
		content         []byte
	}{{partCarried, "application/json", text}, {partImage, aciType, nil}} {
		if part.name == partImage && body == nil {
			break
		}
		w, err := form.CreatePart(textproto.MIMEHeader{"Content-Disposition": {fmt.Sprintf("form-data; name=%q", part.name)}, "Content-Type": {part.mediaType}})
		if err == nil {
			_, err = w.Write(part.content)
		}
		if err != nil {
			return taken, err
		}
	}
	before := bytes.Clone(head.Bytes())
	head.Reset()
	if err := form.Close(); err != nil {
		return taken, err
	}
	sent := newSending(before, body, head.Bytes())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://acproxy"+api+"import/images"+query, sent)
	if err != nil {
		return taken, err
	}
	req.Header.Set("Content-Type", form.FormDataContentType())
	resp, err := c.patient().answered(req)
	if err == nil {
		err = json.NewDecoder(resp.Body).Decode(&taken)
		err = errors.Join(err, resp.Body.Close())
	}
	if wrong := sent.end(); wrong != nil {
		// What is wrong with the bundle counts, and not what becomes of a request that ends in the middle.
		return taken, wrong
	}
	return taken, err
}

// sending is the body of a request around what somebody else reads on when the request is over.
type sending struct {
	io.Reader
	body   io.Reader // nil for none
	err    error     // that reading body ended with, but io.EOF
	closed chan struct{}
	once   sync.Once
}

func newSending(before []byte, body io.Reader, after []byte) *sending {
	s := &sending{body: body, closed: make(chan struct{})}
	if body == nil {
		s.Reader = io.MultiReader(bytes.NewReader(before), bytes.NewReader(after))
		return s
	}
	s.Reader = io.MultiReader(bytes.NewReader(before), readerFunc(s.read), bytes.NewReader(after))
	return s
}

func (s *sending) read(p []byte) (int, error) {
	n, err := s.body.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// Close implements io.Closer. [http.Transport] closes every body, and reads nothing of it any more then.
func (s *sending) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// end waits until nobody reads, and returns what was wrong with what was read.
func (s *sending) end() error {
	<-s.closed
	return s.err
}

// readerFunc is a function as an io.Reader.
type readerFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
