# Operating: what CI runs in short forms, at length. Included by the Makefile.

.PHONY: docs cli-docs wheels load fuzz fuzz-requests fuzz-records audit sbom

sbom: install  ## What is installed in .venv, as CycloneDX JSON on standard output
	@$(BIN)/python tools/sbom.py

docs: cli-docs  ## Write docs/api.md from the docstrings, and what cli-docs writes
	@$(BIN)/python tools/api_docs.py > docs/api.md

cli-docs: install  ## Write docs/cli.md and docs/kvstored.1 from the commands
	@PYTHONPATH=.:daemon:client $(BIN)/python -m kvstored.cli.manual > docs/cli.md
	@PYTHONPATH=.:daemon:client $(BIN)/python -m kvstored.cli.manual man > docs/kvstored.1

wheels: install  ## dist/: the source archives and wheels of kvstored and of its kernel
	@tools/wheels.sh $(BIN)/python dist

load: install  ## 64 clients x 8 streams for ten minutes (LOAD_ARGS)
	PYTHONPATH=.:daemon:client $(BIN)/python bench/load.py $(LOAD_ARGS)

fuzz: .venv-fuzz/.installed  ## Fuzz the parsers, FUZZ_S seconds each (60)
	@for target in frames record safetensors tokens; do \
	  PYTHONPATH=.:daemon:client .venv-fuzz/bin/python tests/fuzz/fuzz.py $$target --seconds $${FUZZ_S:-60} || exit 1; \
	done

fuzz-requests: install  ## FUZZ_COUNT (a million) fuzzed requests through both doors of a daemon, and its memory
	PYTHONPATH=.:daemon:client $(BIN)/python -m tests.fuzz requests --count $${FUZZ_COUNT:-1000000}

fuzz-records: install  ## FUZZ_COUNT (a million) mutated records through reads, imports and parsers
	PYTHONPATH=.:daemon:client $(BIN)/python -m tests.fuzz records --count $${FUZZ_COUNT:-1000000}

# A venv of its own: atheris instruments what it imports, and has wheels for fewer Pythons than we support.
.venv-fuzz/.installed: tools/venv.sh constraints.txt
	@tools/venv.sh --bare $(PYTHON) .venv-fuzz --constraint constraints.txt atheris pip-audit torch numpy ml_dtypes \
	  xxhash protobuf lmdb zstandard safetensors grpcio
	@touch $@

audit: .venv-fuzz/.installed  ## Known vulnerabilities of the pinned versions
# --strict: a package that could not be looked up is no clean one. AUDIT_ARGS: --vulnerability-service osv, ...
	.venv-fuzz/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt --progress-spinner off \
	  $(AUDIT_ARGS) || { echo "kvstored: a finding above, or a database that was not reached: then nothing is known"; exit 1; }

.PHONY: new-user
new-user: install  ## Play a new user with the built wheels: install, quick start, TLS, metrics, service (NEW_USER_ARGS)
	@$(BIN)/python tools/new_user.py $(NEW_USER_ARGS)
