# Included by the Makefile: builds and installs the compiled codec kernel where a C++ compiler is present.

CXX ?= c++
KERNEL_SO := kernel/kvstored_kernel/libkvstored_kernel.so
KERNEL_SOURCES := $(wildcard kernel/src/*) kernel/compile.sh kernel/hatch_build.py kernel/pyproject.toml
KERNEL_STAMP := $(VENV)/.kernel

SETUP += $(KERNEL_STAMP)

.PHONY: kernel sanitize

kernel: $(KERNEL_STAMP)  ## Build and install the compiled codec kernel (skipped without a C++ compiler)

$(KERNEL_STAMP): $(KERNEL_SOURCES)
	@if command -v $(CXX) >/dev/null; then \
	  echo "kvstored: compiling the codec kernel"; \
	  $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation \
	    --force-reinstall ./kernel </dev/null && touch $@; \
	else echo "kvstored: no C++ compiler ($(CXX)); codecs run in plain torch, same bytes, more slowly"; fi

sanitize:  ## The kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@kernel/sanitize.sh $(BIN)/python
