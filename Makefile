# One command each. "make check" is what has to pass before anything is committed; .ci/run does the same on a machine that has nothing.

GO       ?= go
TOOL     := $(GO) tool -modfile=tools/go.mod
FUZZTIME ?= 30s
TIMEOUT  ?= 10m

.DEFAULT_GOAL := help
.PHONY: help fmt lint test race chaos fuzz fuzz-list bench bench-verify bench-peers soak bench-store bench-compare run demo profile generate dist dist-test check

help: ## show what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | column -t -s '	'

fmt: ## format the Go files
	gofmt -w $$(git ls-files --cached --others --exclude-standard '*.go')

lint: ## go vet and golangci-lint, as pinned in tools/go.mod
	$(GO) vet ./...
	$(TOOL) golangci-lint run ./...
	cd deploy/build && $(GO) tool -modfile=../../tools/go.mod golangci-lint run --config ../../.golangci.yml ./...

test: ## the tests, as on a machine that has only Go
	$(GO) test -timeout $(TIMEOUT) ./...

race: ## the tests under the race detector
	$(GO) test -race -timeout $(TIMEOUT) ./...

chaos: ## kill acproxy at every call that changes its files, have each of them fail, and everybody misbehave in every way: ARGS="-run TestKill"
	@ACPROXY_CHAOS=1 ACPROXY_SIM_RUNS=$${ACPROXY_SIM_RUNS:-2000} $(GO) test -p 1 -count 1 -timeout 3h $(ARGS) ./test/chaos ./cache ./fetch ./test/e2e

fuzz-list: ## name the fuzz targets, as package:target
	@grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | \
	 sed -E 's#^\./([^/]*_test\.go):func (.*)#.:\2#; s#^(\./.*)/[^/]*_test\.go:func (.*)#\1:\2#' | sort

fuzz: ## run each fuzz target for FUZZTIME (30s)
	@set -e; for t in $$($(MAKE) -s fuzz-list); do \
		echo "$$t"; $(GO) test -run '^$$' -fuzz "^$${t##*:}$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x "$${t%:*}"; \
	done

bench: ## the benchmarks, six times each: make bench > new.txt
	@$(GO) test -run '^$$' -bench . -benchmem -count 6 ./...

bench-verify: ## verification side by side with gpg and with proxies that verify nothing: ARGS="-rounds 5 verify cold"
	@$(GO) run ./test/bench -group verify $(ARGS)

bench-peers: ## serving side by side with nginx, varnish and others: table, dist/peers.json, dist/peers.svg; ARGS="-rounds 3 page herd/64"
	@mkdir -p dist
	@$(GO) run ./test/bench -group peers -json dist/peers.json -svg dist/peers.svg $(ARGS)

bench-store: ## a store of a million images: start, look-ups, memory; ARGS="-store dir" keeps it
	@$(GO) run ./test/bench -group store $(ARGS)

bench-compare: ## compare two runs of them: make bench-compare OLD=old.txt NEW=new.txt
	$(TOOL) benchstat $(OLD) $(NEW)

soak: ## everything at once for a while, and every byte accounted for: DURATION=10m
	$(GO) run ./test/soak -duration $(or $(DURATION),10m) -out dist/soak $(ARGS)

run: ## run the server with the defaults, keeping everything under ./dist/data
	$(GO) run ./cmd/acproxy serve --data-dir dist/data

demo: ## show the whole job, and stay up for trying things
	$(GO) run ./cmd/acproxy demo

profile: ## CPU and memory profile of the benchmarks of one package: PKG=./trust BENCH=Judge
	@mkdir -p dist
	$(GO) test -run '^$$' -bench '$(or $(BENCH),.)' -benchtime 3s -cpuprofile dist/cpu.prof -memprofile dist/mem.prof -o dist/profile.test $(or $(PKG),./trust)
	$(GO) tool pprof -top -nodecount 25 dist/profile.test dist/cpu.prof

generate: ## make again what is made from the source: config.example.yaml, docs/configuration.md, docs/commands.md
	$(GO) generate ./...
	$(GO) test -count 1 -run '^TestCommandReference$$' . -update

dist: ## what is released, into dist/: binaries, archives, Debian packages, OCI image, SBOMs, SHA256SUMS; ARGS="-version 1.2.3 -arch amd64"
	$(GO) -C deploy/build run . -source "$(CURDIR)" -out "$(CURDIR)/dist" $(ARGS)

# -count 1, because go test doesn't see when files outside of that module change.
dist-test: ## build it twice and compare, install and run the packages, read the manifests; ACPROXY_TEST_COLD=1 builds without any cache
	$(GO) -C deploy/build vet ./...
	$(GO) -C deploy/build test -count 1 -timeout 15m $(ARGS) ./...

check: ## everything that .ci/run checks, with what is installed
	@test -z "$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go'))" || { echo "not formatted: make fmt"; gofmt -l .; exit 1; }
	$(MAKE) lint race dist-test
	$(GO) mod tidy -diff
	$(GO) run ./cmd/acproxy demo --once
