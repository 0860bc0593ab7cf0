package main

import (
	"context"
	"errors"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/trust"
)

// carriage is a store that images are carried from and to: that of the running server, which does it, or the store itself if no server has it open.
type carriage struct {
	cfg         *config.Config
	destination airgap.Destination
	choose      func(context.Context, airgap.Choice) (*airgap.Cargo, error)
	receipt     func(context.Context) (*bundle.Receipt, error)
	keyring     func() *trust.Keyring
}

// withCarriage runs a command that carries images.
func (o *options) withCarriage(ctx context.Context, do func(*carriage) error) error {
	cfg, err := o.load()
	if err != nil {
		return err
	}
	client, err := admin.Dial(cfg.Admin.Socket)
	if errors.Is(err, acproxy.ErrNotFound) {
		return o.withParts(func(p *parts) error {
			if err := p.store.Ready(ctx); err != nil {
				return err
			}
			return do(p.carriage())
		})
	}
	if err != nil {
		return err
	}
	keyring, err := trust.Load(trustDirs(cfg))
	if err != nil {
		return err
	}
	return do(&carriage{
		cfg: cfg, destination: client, choose: client.Export, keyring: func() *trust.Keyring { return keyring },
		receipt: func(ctx context.Context) (*bundle.Receipt, error) {
			held, err := client.Holdings(ctx)
			return &bundle.Receipt{Images: held}, err
		},
	})
}

// carriage returns the open store as one that images are carried from and to.
func (p *parts) carriage() *carriage {
	origin := p.origin()
	return &carriage{
		cfg: p.cfg, destination: p.fetcher, keyring: p.keys.Current,
		choose: func(ctx context.Context, choice airgap.Choice) (*airgap.Cargo, error) {
			return airgap.Choose(ctx, origin, choice)
		},
		receipt: func(ctx context.Context) (*bundle.Receipt, error) { return airgap.Receipt(ctx, origin) },
	}
}
