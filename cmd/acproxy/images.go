package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
)

// openStore returns a look into the store: through the server that runs on the data directory, or directly when none does.
func openStore(cfg *config.Config) (admin.Store, func() error, error) {
	client, err := admin.Dial(cfg.Admin.Socket)
	if err == nil {
		return client, func() error { return nil }, nil
	}
	if !errors.Is(err, acproxy.ErrNotFound) {
		return nil, nil, err
	}
	// Nothing is dialled: all that is wanted of the parts is the store and what they say of its images.
	p, err := newParts(cfg, slog.New(slog.DiscardHandler), true)
	if err != nil {
		return nil, nil, err
	}
	return p.judged(), p.close, nil
}

// withStore runs a command on the store.
func (o *options) withStore(do func(store admin.Store) error) error {
	cfg, err := o.load()
	if err != nil {
		return err
	}
	store, done, err := openStore(cfg)
	if err != nil {
		return err
	}
	return errors.Join(do(store), done())
}

func newImages(o *options) *cobra.Command {
	var asJSON bool
	var filter cache.Filter
	var state, sort string
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List the images that are held, and who signed them",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch filter.State = cache.State(state); filter.State {
			case "", cache.OK, cache.Quarantined:
			default:
				return usagef("--state %s: an image is %s or %s", state, cache.OK, cache.Quarantined)
			}
			if filter.Sort = cache.Sort(sort); sort == "name" {
				filter.Sort = cache.ByName
			} else if !slices.Contains(cache.Sorts(), filter.Sort) {
				return usagef("--sort %s: the orders are name, size, fetched and used", sort)
			}
			return o.withStore(func(store admin.Store) error { return listImages(cmd.OutOrStdout(), store, filter, asJSON) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line")
	cmd.Flags().StringVar(&filter.Prefix, "prefix", "", "only images whose name lies under this prefix")
	cmd.Flags().StringVar(&filter.Contains, "contains", "", "only images that this is part of: of the name with its labels, of who signed it, or the beginning of an ID")
	cmd.Flags().StringVar(&state, "state", "", "only images that may be served (ok), or that may not (quarantined)")
	cmd.Flags().BoolVar(&filter.Pinned, "pinned", false, "only images that are pinned")
	cmd.Flags().StringVar(&sort, "sort", "name", "order: name, size, fetched or used, the smallest or oldest first")
	cmd.Flags().BoolVar(&filter.Reverse, "reverse", false, "the other way round")
	cmd.AddCommand(newImagesShow(o), newImagesDelete(o))
	return cmd
}

// listPage is how many images are read at once.
const listPage = 500

func listImages(w io.Writer, store admin.Store, filter cache.Filter, asJSON bool) error {
	p := newPrinter(w)
	enc := json.NewEncoder(w)
	heading := []string{"IMAGE", "IMAGE ID", "SIZE", "SIGNED BY", "FETCHED", "LAST USED", "STATE"}
	var t *table
	var images int
	var bytes int64
	for after, more := "", true; more; more = after != "" {
		page, next, err := store.Images(filter, after, listPage)
		if err != nil {
			return err
		}
		for _, rec := range page {
			images, bytes = images+1, bytes+rec.Size
			if asJSON {
				if err := enc.Encode(rec); err != nil {
					return err
				}
				continue
			}
			if t == nil {
				t = p.table(heading...)
			}
			t.row(recordRef(rec), rec.ImageID.Short(), bytesText(rec.Size), signersText(rec), ageText(rec.Fetched), ageText(rec.Used), stateText(rec))
		}
		after = next
	}
	if asJSON {
		return nil
	}
	if t != nil {
		t.flush()
	}
	p.printf("%s, %s\n", count(images, "image"), bytesText(bytes))
	return p.err
}

func newImagesShow(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show IMAGE-ID|DIGEST",
		Short: "Show everything that is known of one image",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withStore(func(store admin.Store) error {
				rec, err := findImage(store, args[0])
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), rec)
				}
				manifest, err := store.Manifest(rec.Digest)
				if err != nil {
					return err
				}
				needed, err := store.Dependencies(rec.Digest)
				if err != nil {
					return err
				}
				return showImage(cmd.OutOrStdout(), rec, needed, manifest)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func findImage(store admin.Store, id string) (cache.Record, error) {
	if digest, err := acproxy.ParseDigest(id); err == nil {
		return store.Record(digest)
	}
	digits, err := acproxy.ParseImageIDPrefix(id)
	if err != nil {
		return cache.Record{}, usagef("%q is neither an image ID (sha512-…) nor a digest (sha256:…)", id)
	}
	records, err := store.ByImageID(digits)
	switch {
	case err != nil:
		return cache.Record{}, err
	case len(records) == 0:
		return cache.Record{}, fmt.Errorf("no image with ID %s is held", id)
	case len(records) > 1:
		return cache.Record{}, fmt.Errorf("%d images have an ID that begins with %s; give more digits, or the digest", len(records), id)
	}
	return records[0], nil
}

func showImage(w io.Writer, rec cache.Record, needed []admin.Needed, manifest []byte) error {
	p := newPrinter(w)
	p.printf("name          %s\nlabels        %s\nimage ID      %v\ndigest        %v\nsize          %s as published (%s), %s of tar\n", rec.Name, labelsText(rec.Labels),
		rec.ImageID, rec.Digest, bytesText(rec.Size), rec.Compression, bytesText(rec.Uncompressed))
	p.printf("state         %s\n", stateText(rec))
	for _, s := range rec.Signers {
		p.printf("signed by     %s %s, %s, %s, trusted for %s\n", s.Fingerprint, s.UserID, s.Algorithm, s.Signed.UTC().Format(time.RFC3339), prefixText(s.Prefix))
	}
	if !rec.Signed {
		p.printf("signed by     nobody\n")
	}
	if rec.RktWarning != "" {
		p.printf("warning       %s\n", rec.RktWarning)
	}
	p.printf("source        %s\npublished     %s\nfetched       %s\nverified      %s\nlast used     %s\n", rec.Source, timeText(rec.Modified), timeText(rec.Fetched), timeText(rec.Verified), timeText(rec.Used))
	showNeeded(p, "depends on    ", needed)
	p.printf("manifest      %s\n", manifest)
	return p.err
}

// showNeeded prints what an image needs, as a tree: each line begins with indent.
func showNeeded(p *printer, indent string, needed []admin.Needed) {
	for _, n := range needed {
		id := ""
		if !n.ImageID.IsZero() {
			id = n.ImageID.Short()
		}
		state := "not held"
		switch {
		case n.Cycle:
			state = "held; needs, by way of others, itself"
		case n.More:
			state = "held; what it needs is beyond what is looked at"
		case n.Held != nil:
			state = "held as " + n.Held.ImageID.Short() + ", " + stateText(*n.Held)
		}
		p.printf("%s%s\n", indent, joinNonEmpty("  ", n.Name, labelsText(n.Labels), id, state))
		showNeeded(p, indent+"  ", n.Dependencies)
	}
}

func newImagesDelete(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "delete IMAGE-ID|DIGEST…",
		Short: "Remove images",
		Long: `delete removes images, pinned or not, with their refs and all that is known of them. Nodes that are receiving one get all of it. The next one that asks for it
has it fetched again.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withStore(func(store admin.Store) error {
				for _, id := range args {
					rec, err := findImage(store, id)
					if err == nil {
						err = store.Delete(cmd.Context(), rec.Digest)
					}
					if err != nil {
						return err
					}
					if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s is deleted, %s\n", recordRef(rec), bytesText(rec.Size)); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func newRefusals(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "refusals",
		Short: "List the images that were refused, and why",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withStore(func(store admin.Store) error {
				refusals, err := store.Refusals()
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), refusals)
				}
				p := newPrinter(cmd.OutOrStdout())
				for _, r := range refusals {
					p.printf("%s  %v  %s\n    %s\n", timeText(r.When), r.Ref, r.Code, r.Detail)
				}
				p.printf("%s\n", count(len(refusals), "refusal"))
				return p.err
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// recordRef returns the ref of all the labels of an image.
func recordRef(rec cache.Record) string {
	ref, err := acproxy.NewRef(rec.Name, rec.Labels)
	if err != nil {
		return rec.Name
	}
	return ref.String()
}

func labelsText(labels map[string]string) string {
	var out []string
	for _, label := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, label+"="+labels[label])
	}
	return strings.Join(out, ",")
}

func signersText(rec cache.Record) string {
	if len(rec.Signers) == 0 {
		return "nobody"
	}
	var out []string
	for _, s := range rec.Signers {
		out = append(out, s.UserID)
	}
	return strings.Join(out, ", ")
}

func stateText(rec cache.Record) string {
	text := healthText(rec)
	if rec.Pinned {
		text += ", pinned"
	}
	return text
}

func healthText(rec cache.Record) string {
	switch {
	case rec.Lost():
		return "lost: " + rec.Reason
	case rec.Quarantined():
		return "quarantined: " + rec.Reason
	case !rec.Inspected:
		return "being inspected"
	case rec.RktWarning != "":
		return "ok, but not for rkt"
	}
	return "ok"
}

func ageText(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	switch age := time.Since(t); {
	case age < time.Minute:
		return "just now"
	case age < time.Hour:
		return fmt.Sprintf("%d min ago", int(age.Minutes()))
	case age < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(age.Hours()))
	default:
		return fmt.Sprintf("%d days ago", int(age.Hours()/24))
	}
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}
