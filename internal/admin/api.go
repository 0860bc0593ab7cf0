package admin

import (
	"context"
	_ "embed"
	"errors"
	"maps"
	"net/http"
	"reflect"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humamux"
	"github.com/gorilla/mux"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/problem"
	"github.com/acproxy/acproxy/internal/web"
)

const api = "/api/v1/"

// aciType is the media type of an image, as nodes get it.
const aciType = "application/octet-stream"

// document is the API's description in OpenAPI 3.1. A test holds it against what is registered, and what is answered against it.
//
//go:embed openapi.yaml
var document []byte

// A trouble is an error on its way out of the API.
type trouble struct {
	problem.Problem
	header http.Header
}

// Error returns the detail.
func (t *trouble) Error() string { return t.Detail }

// GetStatus returns the status of the answer.
func (t *trouble) GetStatus() int { return t.Status }

// GetHeaders returns what goes into the head of the answer.
func (t *trouble) GetHeaders() http.Header { return t.header }

// ContentType returns that of a problem.
func (t *trouble) ContentType(string) string { return problem.ContentType }

// troubled returns an error as the API says it, nil for none.
func (s *Server) troubled(err error) error {
	if err == nil {
		return nil
	}
	t := &trouble{s.problemOf(err), make(http.Header)}
	challenge(t.header, err)
	return t
}

// asProblem says in our words what the library has found wrong with a request.
func asProblem(_ huma.Context, _ string, v any) (any, error) {
	switch e := v.(type) {
	case *trouble:
		return e.Problem, nil
	case *huma.ErrorModel:
		detail := e.Detail
		for _, why := range e.Errors {
			detail += "; " + why.Error()
		}
		return problem.Problem{Type: problem.Type + "invalid", Title: http.StatusText(e.Status), Status: e.Status, Detail: detail}, nil
	}
	return v, nil
}

// body is an answer in JSON.
type body[T any] struct{ Body T }

// description is what the document says of the API.
const description = `How operators, and acproxy's own commands, look into a running server.

Whoever may open the unix socket (admin.socket) may do everything. At the addresses of admin.listen, access.rules decide: what is about an image
needs a right to its name, and what is about the server as a whole needs admin in the rule for every name. Without any rule everybody may look, and nobody
may change anything there. Listings leave out what the client may not know of.

Errors are RFC 9457 problems; the end of their type is a stable word for programs.`

// The groups that operations are in.
const (
	tagImages     = "images"
	tagStore      = "store"
	tagPublishers = "publishers"
	tagWarm       = "warm"
	tagCarriage   = "carriage"
	tagTrust      = "trust"
	tagEvents     = "events"
	tagServer     = "server"
)

// describe registers the API.
func (s *Server) describe(router *mux.Router) huma.API {
	config := huma.DefaultConfig("acproxy", "1")
	config.Info.Description = description
	config.Info.License = &huma.License{Name: "Apache 2.0", Identifier: "Apache-2.0"}
	config.Servers = []*huma.Server{{URL: "/"}}
	// The document is a file of its own, and answers have no links to it.
	config.OpenAPIPath, config.DocsPath, config.SchemasPath, config.CreateHooks = "", "", "", nil
	config.Transformers = []huma.Transformer{asProblem}
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"basic": {Type: "http", Scheme: "basic"}, "bearer": {Type: "http", Scheme: "bearer"}, "certificate": {Type: "mutualTLS"},
	}
	config.Security = []map[string][]string{{}, {"basic": {}}, {"bearer": {}}, {"certificate": {}}}
	a := humamux.New(router, config)
	a.OpenAPI().Tags = []*huma.Tag{
		{Name: tagImages, Description: "The images that are held, and those that were refused."},
		{Name: tagStore, Description: "The space that they take."},
		{Name: tagPublishers, Description: "Where images come from, and what is being fetched."},
		{Name: tagWarm, Description: "Lists of images that are fetched before anybody asks."},
		{Name: tagCarriage, Description: "Images that are carried where no network goes, and those that come from there."},
		{Name: tagTrust, Description: "Whose signatures count."},
		{Name: tagEvents, Description: "What has happened."},
		{Name: tagServer, Description: "The server as a whole."},
	}
	s.describeImages(a)
	s.describeStore(a)
	s.describePublishers(a)
	s.describeWarm(a)
	s.describeCarriage(a)
	s.describeTrust(a)
	s.describeEvents(a)
	s.describeServer(a)
	amend(a.OpenAPI())
	router.Path(api + "openapi.yaml").Methods(http.MethodGet).HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/yaml")
		_, _ = w.Write(document)
	})
	return a
}

// amend has a document say what the library can't know: that errors are problems, that lists are never null, and what is never told.
func amend(doc *huma.OpenAPI) {
	schemas := doc.Components.Schemas
	for _, schema := range schemas.Map() {
		for _, property := range schema.Properties {
			property.Nullable = property.Nullable && property.Type != huma.TypeArray
		}
	}
	delete(schemas.Map()["Record"].Properties, "hashed")
	said := &huma.Response{Description: "Why not", Content: map[string]*huma.MediaType{problem.ContentType: {Schema: schemas.Schema(reflect.TypeFor[problem.Problem](), true, "Problem")}}}
	for _, path := range doc.Paths {
		for _, op := range []*huma.Operation{path.Get, path.Put, path.Post, path.Delete} {
			if op == nil {
				continue
			}
			if ok := op.Responses["200"]; ok != nil && ok.Content["application/json"] != nil {
				ok.Content["application/json"].Schema.Nullable = false
			}
			maps.DeleteFunc(op.Responses, func(status string, _ *huma.Response) bool { return status[0] != '2' })
			op.Responses["default"] = said
		}
	}
	delete(schemas.Map(), "ErrorModel")
	delete(schemas.Map(), "ErrorDetail")
}

// register adds an operation. do answers in the name of whoever asks.
func register[I, O any](s *Server, a huma.API, op huma.Operation, do func(v View, ctx context.Context, in *I) (O, error)) {
	op.Path = api + op.Path
	huma.Register(a, op, func(ctx context.Context, in *I) (*body[O], error) {
		out, err := do(s.ViewOf(ctx), ctx, in)
		if err != nil {
			return nil, s.troubled(err)
		}
		return &body[O]{out}, nil
	})
}

// file is an answer that is sent as it is.
type file struct {
	ContentType string `header:"Content-Type"`
	Body        []byte
}

// registerFile adds an operation whose answer is a file.
func registerFile[I any](s *Server, a huma.API, op huma.Operation, mediaType string, do func(v View, in *I) ([]byte, error)) {
	op.Method, op.Path = http.MethodGet, api+op.Path
	op.Responses = map[string]*huma.Response{"200": {
		Description: "OK", Content: map[string]*huma.MediaType{mediaType: {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}}},
	}}
	if mediaType == "application/json" {
		op.Responses["200"].Content[mediaType].Schema = &huma.Schema{Type: huma.TypeObject}
	}
	huma.Register(a, op, func(ctx context.Context, in *I) (*file, error) {
		text, err := do(s.ViewOf(ctx), in)
		if err != nil {
			return nil, s.troubled(err)
		}
		return &file{mediaType, text}, nil
	})
}

// nothing is a request without parameters.
type nothing struct{}

type digestInput struct {
	Digest string `path:"digest" doc:"SHA-256 of the blob." example:"sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"`
}

func (in *digestInput) digest() (acproxy.Digest, error) { return acproxy.ParseDigest(in.Digest) }

type imagesInput struct {
	Prefix   string `query:"prefix" doc:"Only images whose name lies under this prefix, by whole segments."`
	Contains string `query:"contains" doc:"Only images of which this is part of the name with its labels, or of a signer's user ID, or with which the image ID, the digest or a signer's fingerprint begins. Case doesn't matter."`
	State    string `query:"state" enum:"ok,quarantined" doc:"Only images that may be served, or only those that may not."`
	Pinned   bool   `query:"pinned" doc:"Only images that are pinned."`
	Sort     string `query:"sort" enum:"name,size,fetched,used" default:"name" doc:"The order, the smallest or oldest first. Other orders than by name look at every image for each page."`
	Reverse  bool   `query:"reverse" doc:"The other way round."`
	After    string `query:"after" doc:"Where to go on: next of the page before, with the same other parameters."`
	Limit    int    `query:"limit" minimum:"1" maximum:"1000" default:"100" doc:"How many images a page has at most."`
}

func (in *imagesInput) filter() cache.Filter {
	f := cache.Filter{Prefix: in.Prefix, Contains: in.Contains, State: cache.State(in.State), Pinned: in.Pinned, Sort: cache.Sort(in.Sort), Reverse: in.Reverse}
	if in.Sort == "name" {
		f.Sort = cache.ByName
	}
	return f
}

// ImagePage is a part of a listing of images.
type ImagePage struct {
	Images []cache.Record `json:"images"`         // not more than limit; fewer, and even none, if some are not for the client
	Next   string         `json:"next,omitempty"` // where the next page begins, "" after the last
}

func (s *Server) describeImages(a huma.API) {
	register(s, a, huma.Operation{OperationID: "list-images", Method: http.MethodGet, Path: "images", Tags: []string{tagImages}, Summary: "List images"},
		func(v View, _ context.Context, in *imagesInput) (ImagePage, error) {
			images, next, err := v.Images(in.filter(), in.After, in.Limit)
			return ImagePage{images, next}, err
		})
	register(s, a, huma.Operation{OperationID: "show-image", Method: http.MethodGet, Path: "images/{digest}", Tags: []string{tagImages}, Summary: "Show an image"},
		func(v View, _ context.Context, in *digestInput) (cache.Record, error) {
			digest, err := in.digest()
			if err != nil {
				return cache.Record{}, err
			}
			return v.Image(digest)
		})
	huma.Register(a, huma.Operation{
		OperationID: "delete-image", Method: http.MethodDelete, Path: api + "images/{digest}", Tags: []string{tagImages}, Summary: "Delete an image", DefaultStatus: http.StatusNoContent,
		Description: "Its bytes, its refs and what is known of it go, pinned or not. The next client that asks for it has it fetched again. Needs the right delete.",
	}, func(ctx context.Context, in *digestInput) (*struct{}, error) {
		digest, err := in.digest()
		if err == nil {
			err = s.ViewOf(ctx).Delete(ctx, digest)
		}
		return nil, s.troubled(err)
	})
	for _, op := range []struct {
		id, path, mediaType, summary, description string
		get                                       func(View, acproxy.Digest) ([]byte, error)
	}{
		{"show-manifest", "manifest", "application/json", "Show an image's manifest", "The image manifest, byte for byte as it is in the image.", View.Manifest},
		{"get-signature", "signature", "application/pgp-signature", "Get an image's signature", "As its publisher published it: armored or binary.", View.Signature},
	} {
		registerFile(s, a, huma.Operation{OperationID: op.id, Path: "images/{digest}/" + op.path, Tags: []string{tagImages}, Summary: op.summary, Description: op.description}, op.mediaType,
			func(v View, in *digestInput) ([]byte, error) {
				digest, err := in.digest()
				if err != nil {
					return nil, err
				}
				return op.get(v, digest)
			})
	}
	huma.Register(a, huma.Operation{
		OperationID: "get-image", Method: http.MethodGet, Path: api + "images/{digest}/image", Tags: []string{tagImages}, Summary: "Get an image", Description: "Its bytes as published. Range requests are answered. One that may not be served isn't here either.",
		Responses: map[string]*huma.Response{"200": {
			Description: "OK", Content: map[string]*huma.MediaType{aciType: {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}}},
		}},
	}, func(ctx context.Context, in *digestInput) (*huma.StreamResponse, error) {
		digest, err := in.digest()
		if err != nil {
			return nil, s.troubled(err)
		}
		blob, rec, err := s.ViewOf(ctx).Blob(digest)
		if err != nil {
			return nil, s.troubled(err)
		}
		return &huma.StreamResponse{Body: func(ctx huma.Context) {
			// What was read was only read: there is nothing that closing it could lose.
			defer func() { _ = blob.Close() }()
			r, w := humamux.Unwrap(ctx)
			w.Header().Set("Content-Type", aciType)
			w.Header().Set("ETag", `"`+digest.String()+`"`)
			http.ServeContent(w, r, "", rec.Modified, blob)
		}}, nil
	})
	register(s, a, huma.Operation{OperationID: "show-dependencies", Method: http.MethodGet, Path: "images/{digest}/dependencies", Tags: []string{tagImages}, Summary: "Show what an image needs", Description: "The images that it depends on, as a tree as far as they are held: up to 16 deep, and up to 500 in all."},
		func(v View, _ context.Context, in *digestInput) ([]Needed, error) {
			digest, err := in.digest()
			if err != nil {
				return nil, err
			}
			return v.Dependencies(digest)
		})
	for _, op := range []struct {
		id, method, summary string
		pinned              bool
	}{
		{"pin-image", http.MethodPut, "Pin an image", true}, {"unpin-image", http.MethodDelete, "Unpin an image", false},
	} {
		register(s, a, huma.Operation{OperationID: op.id, Method: op.method, Path: "images/{digest}/pin", Tags: []string{tagImages}, Summary: op.summary, Description: "A pinned image is never evicted. Needs the right pin."},
			func(v View, ctx context.Context, in *digestInput) (cache.Record, error) {
				digest, err := in.digest()
				if err != nil {
					return cache.Record{}, err
				}
				return v.Pin(ctx, digest, op.pinned)
			})
	}
	register(s, a, huma.Operation{OperationID: "find-image-id", Method: http.MethodGet, Path: "image-ids/{digits}", Tags: []string{tagImages}, Summary: "Find images by image ID"},
		func(v View, _ context.Context, in *struct {
			Digits string `path:"digits" doc:"The first hex digits of the ID, without sha512-."`
		}) ([]cache.Record, error) {
			return v.ByImageID(in.Digits)
		})
	register(s, a, huma.Operation{OperationID: "list-quarantine", Method: http.MethodGet, Path: "quarantine", Tags: []string{tagImages}, Summary: "List images that may not be served", Description: "Images that are held and not served, with the reason: the keys or policies don't accept them any more, they break a rule, or their bytes are lost."},
		func(v View, _ context.Context, in *pageInput) (ImagePage, error) {
			images, next, err := v.Images(cache.Filter{State: cache.Quarantined}, in.After, in.Limit)
			return ImagePage{images, next}, err
		})
	register(s, a, huma.Operation{OperationID: "list-refusals", Method: http.MethodGet, Path: "refusals", Tags: []string{tagImages}, Summary: "List refusals", Description: "The images that were asked for and not accepted, and why, the latest first."},
		func(v View, _ context.Context, _ *nothing) ([]cache.Refused, error) { return v.Refusals() })
	register(s, a, huma.Operation{
		OperationID: "list-missing", Method: http.MethodGet, Path: "missing", Tags: []string{tagImages}, Summary: "List what is missing",
		Description: "What nodes asked for and could not get, because it isn't held and nobody has it, or nobody may be asked. What was asked for most often is first.",
	}, func(v View, _ context.Context, _ *nothing) ([]missing.Missed, error) { return v.Missing() })
	huma.Register(a, huma.Operation{
		OperationID: "forget-missing", Method: http.MethodDelete, Path: api + "missing", Tags: []string{tagImages}, Summary: "Forget what is missing", DefaultStatus: http.StatusNoContent,
		Description: "What is asked for again is listed again. Needs the right admin.",
	}, func(ctx context.Context, _ *nothing) (*struct{}, error) {
		return nil, s.troubled(s.ViewOf(ctx).ForgetMissing())
	})
}

type pageInput struct {
	After string `query:"after" doc:"Where to go on: next of the page before."`
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"100" doc:"How many images a page has at most."`
}

type targetInput struct {
	Target int64 `query:"target" minimum:"-1" default:"-1" doc:"Bytes on the disk to come down to; -1 is the low watermark."`
}

func (s *Server) describeStore(a huma.API) {
	register(s, a, huma.Operation{OperationID: "show-usage", Method: http.MethodGet, Path: "usage", Tags: []string{tagStore}, Summary: "Show the space that is taken", Description: "Bytes of whole file system blocks, what limits them, and how far the scrub has come."},
		func(v View, _ context.Context, _ *nothing) (cache.Usage, error) { return v.Usage() })
	register(s, a, huma.Operation{OperationID: "plan-eviction", Method: http.MethodGet, Path: "gc", Tags: []string{tagStore}, Summary: "Say what would be evicted", Description: "And what would be kept, and why."},
		func(v View, ctx context.Context, in *targetInput) (cache.Plan, error) {
			return v.PlanEviction(ctx, in.Target)
		})
	register(s, a, huma.Operation{OperationID: "evict", Method: http.MethodPost, Path: "gc", Tags: []string{tagStore}, Summary: "Evict images now", Description: "It ends when the client leaves. Needs the right admin."},
		func(v View, ctx context.Context, in *targetInput) (cache.Freed, error) {
			return v.Evict(ctx, in.Target)
		})
	s.describeScrub(a)
}

func (s *Server) describePublishers(a huma.API) {
	register(s, a, huma.Operation{OperationID: "list-publishers", Method: http.MethodGet, Path: "publishers", Tags: []string{tagPublishers}, Summary: "List publishers' hosts", Description: "Those that were asked in the last ten minutes, with what they answered and whether they are down."},
		func(v View, _ context.Context, _ *nothing) ([]web.HostState, error) { return v.Publishers() })
	register(s, a, huma.Operation{OperationID: "list-flights", Method: http.MethodGet, Path: "flights", Tags: []string{tagPublishers}, Summary: "List what is being fetched", Description: "The oldest first. /api/v1/flights/live has them as they go on."},
		func(v View, _ context.Context, _ *nothing) ([]fetch.FlightState, error) { return v.Flights(), nil })
	s.describeLiveFlights(a)
	register(s, a, huma.Operation{OperationID: "discover", Method: http.MethodGet, Path: "discover", Tags: []string{tagPublishers}, Summary: "Ask a publisher where an image is", Description: "Meta-discovery, now, with every step that was taken. That nothing was found is said in error, beside what was tried."},
		func(v View, ctx context.Context, in *struct {
			Image string `query:"image" required:"true" doc:"The image as name[:version][,label=value…]." example:"example.com/app:1.0,os=linux,arch=amd64"`
		}) (Discovered, error) {
			ref, err := acproxy.ParseRef(in.Image)
			if err != nil {
				return Discovered{}, err
			}
			found, err := v.Discover(ctx, ref)
			if found.Error != "" {
				err = nil
			}
			return found, err
		})
}

func (s *Server) describeTrust(a huma.API) {
	register(s, a, huma.Operation{OperationID: "list-keys", Method: http.MethodGet, Path: "keys", Tags: []string{tagTrust}, Summary: "List the trusted keys", Description: "And what switches keys off, and the files that can't be used. Keys are for everybody, as for nodes."},
		func(v View, _ context.Context, _ *nothing) (Keys, error) { return v.Keys(), nil })
	huma.Register(a, huma.Operation{
		OperationID: "reload-keys", Method: http.MethodPost, Path: api + "keys/reload", Tags: []string{tagTrust}, Summary: "Read the trusted keys again", Description: "The server sees changes by itself, within a second; once this has answered, it decides by them. Needs the right admin.",
		DefaultStatus: http.StatusNoContent,
	}, func(ctx context.Context, _ *nothing) (*struct{}, error) {
		return nil, s.troubled(s.ViewOf(ctx).ReloadKeys())
	})
}

type eventsInput struct {
	Before int64    `query:"before" minimum:"0" doc:"Only events with smaller IDs; 0 begins with the latest."`
	Limit  int      `query:"limit" minimum:"1" maximum:"1000" default:"100" doc:"How many events there are at most."`
	Kind   []string `query:"kind" doc:"Only events of these kinds, separated by commas."`
}

func (s *Server) describeEvents(a huma.API) {
	register(s, a, huma.Operation{OperationID: "list-events", Method: http.MethodGet, Path: "events", Tags: []string{tagEvents}, Summary: "List what has happened", Description: "Decisions about images, and what happened to the server, the latest first, as far as it remembers: at least 4,500 events, the audit's last ones from before the start among them."},
		func(v View, _ context.Context, in *eventsInput) ([]journal.Event, error) {
			return v.Events(in.Before, in.Limit, in.Kind), nil
		})
	s.describeLiveEvents(a)
}

func (s *Server) describeServer(a huma.API) {
	register(s, a, huma.Operation{OperationID: "about", Method: http.MethodGet, Path: "about", Tags: []string{tagServer}, Summary: "Say which server this is"},
		func(v View, _ context.Context, _ *nothing) (About, error) { return v.About(), nil })
	register(s, a, huma.Operation{OperationID: "show-traffic", Method: http.MethodGet, Path: "traffic", Tags: []string{tagServer}, Summary: "Show what was served and fetched"},
		func(v View, _ context.Context, in *struct {
			Range string `query:"range" enum:"hour,day,week" default:"hour" doc:"The time up to now."`
		}) (Traffic, error) {
			return v.Traffic(in.Range)
		})
	config := huma.Operation{OperationID: "show-config", Path: "config", Tags: []string{tagServer}, Summary: "Show the configuration that counts", Description: "With defaults filled in, and without secrets."}
	registerFile(s, a, config, "application/yaml", func(v View, _ *nothing) ([]byte, error) { return v.Config() })
	register(s, a, huma.Operation{OperationID: "reload", Method: http.MethodPost, Path: "reload", Tags: []string{tagServer}, Summary: "Reload", Description: "Reads the configuration and all that it names again: all of it takes effect, or nothing does. What has changed is said, also what needs a restart. Needs the right admin."},
		func(v View, _ context.Context, _ *nothing) ([]Change, error) { return v.Reload() })
	huma.Register(a, huma.Operation{
		OperationID: "ready", Method: http.MethodGet, Path: api + "ready", Tags: []string{tagServer}, Summary: "Say whether all work can be done", DefaultStatus: http.StatusNoContent, Description: "The error says why not.",
	}, func(context.Context, *nothing) (*struct{}, error) {
		err := s.o.Ready()
		if err != nil && acproxy.KindOf(err) == nil {
			err = &acproxy.Error{Kind: acproxy.ErrBusy, Code: "not-ready", Detail: err.Error(), Err: errors.Unwrap(err)}
		}
		return nil, s.troubled(err)
	})
}
