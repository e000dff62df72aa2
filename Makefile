GO          ?= go
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME    ?= 30s
DURATION    ?= 10m
SEED        ?= 0
BENCHTIME   ?= 1s
ROUNDS      ?= 5
MODE        ?= calls
SHAPE       ?= text

# SVG is the file for the chart of a run, in bench/; empty for none. Runs with flags of
# their own do not show all of the table, and leave the chart in the repository as it is.
SVG         ?= $(if $(BENCHFLAGS),,$(if $(findstring calls,$(MODE))$(filter all,$(MODE)),chart.svg))

# Supported are Go 1.26 and 1.27. This is the one that is not installed.
OTHER_GO    ?= $(if $(findstring go1.27,$(shell $(GO) version)),go1.26.8,go1.27.3)

# The modules of the project, those with the longest tests first.
MODULES := $(patsubst %/go.mod,%,$(wildcard go.mod */go.mod cmd/*/go.mod))
MODULES := . cmd/acomm $(filter-out go.mod cmd/acomm,$(MODULES))

# OTHER_JSON is the JSON engine that is not the default of the Go that runs: the
# new one on Go 1.26, the old one on Go 1.27.
OTHER_JSON = $$($(GO) list -f '{{context.ToolTags}}' . | grep -q goexperiment.jsonv2 && echo nojsonv2 || echo jsonv2)

# each runs a command in every module.
each = set -e; for dir in $(MODULES); do echo "== $$dir: $(1)"; (cd $$dir && $(1)); done

# in_modules lists a command for each module, and abreast runs what is listed, two at
# a time: tests wait more than they work.
in_modules = $(foreach dir,$(MODULES),"cd $(dir) && $(1)")
abreast = printf '%s\0' $(1) | xargs -0 -P 2 -I {} sh -c \
	'out=$$(eval "$$0" 2>&1); code=$$?; printf "== %s\n%s\n" "$$0" "$$out"; exit $$code' {}

.DEFAULT_GOAL := help
.PHONY: help build install test releases race lint fuzz soak model long cover demo hosts bench quick

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

build: ## compile everything
	@$(call each,$(GO) build -o /dev/null ./...)

install: ## build acomm and install it with its manual, completions and systemd units; PREFIX (/usr/local), DESTDIR
	@GO="$(GO)" PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" cmd/acomm/install/install.sh

# What two at a time share of the standard library is compiled before, once.
test: ## run the tests; those of messages with both JSON engines of the standard library
	@other=$(OTHER_JSON) && $(GO) build . && GOEXPERIMENT=$$other $(GO) build . && \
		$(call abreast,"GOEXPERIMENT=$$other $(GO) test -skip '^Test(Soak|Fault|Stream|Socket|Hostile)' ." \
		$(call in_modules,$(GO) test ./...))

releases: ## run the tests on the other supported Go release, OTHER_GO
	GOTOOLCHAIN=$(OTHER_GO) $(MAKE) test

race: ## run the tests with the race detector
	@$(GO) build -race . && $(call abreast,$(call in_modules,$(GO) test -race ./...))

lint: ## check format, go vet (also for macOS) and staticcheck
	@out=$$(gofmt -l .); if [ -n "$$out" ]; then echo "not gofmt'ed:"; echo "$$out"; exit 1; fi
	@$(call each,$(GO) vet ./... && $(GO) run $(STATICCHECK) ./...)
	GOOS=darwin $(GO) vet .
	GOOS=freebsd $(GO) vet .

fuzz: ## fuzz what reads from peers, FUZZTIME (30s) each
	@set -e; for f in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(.*/\1/p' *_test.go); do \
		echo "== $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x .; done

soak: ## load with faults for DURATION (10m), with a table at the end
	$(GO) test -count=1 -v -timeout 0 -run '^TestSoak$$' . -soak $(DURATION)

model: ## processes that send to each other under faults, for DURATION (10m); SEED=n begins with that round
	$(GO) test -count=1 -v -timeout 0 -run '^TestModel_' . -model $(DURATION) -seed $(SEED)

long: ## the proofs at full length: hundreds of killed processes, thousands of streams; the model for DURATION, with SEED
	$(GO) test -count=1 -v -timeout 0 . -long -model $(DURATION) -seed $(SEED)

cover: ## show the coverage of the package
	$(GO) test -coverprofile=coverage.out .
	$(GO) tool cover -func=coverage.out | tail -1

demo: ## run a coordinator, a provider and a requester; DEMO=path for another file or directory
	$(GO) run ./examples/demo $(DEMO)

hosts: ## three hosts in network namespaces, with faults; needs root and iproute2, else it says so
	cd hosts && $(GO) run .

bench: ## compare with other libraries; BENCHTIME, ROUNDS, MODE (calls, json, streams, waits, all...), SHAPE (text,rows,tree), JSON=v1|v2; draws the calls in bench/chart.svg, SVG= for none
	cd bench && $(if $(filter v1,$(JSON)),GOEXPERIMENT=nojsonv2 )$(if $(filter v2,$(JSON)),GOEXPERIMENT=jsonv2 )$(GO) run . \
		-benchtime $(BENCHTIME) -rounds $(ROUNDS) -mode $(MODE) -shape $(SHAPE) $(if $(SVG),-svg $(SVG)) $(BENCHFLAGS)

quick: ## the same in under two minutes, without the chart
	@$(MAKE) bench BENCHTIME=100ms ROUNDS=3 SVG=
