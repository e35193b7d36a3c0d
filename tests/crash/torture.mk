TORTURE ?= 20
SOAK_MINUTES ?= 5

.PHONY: torture
torture: install  ## The cold tier's crash tests, TORTURE times as long, and SOAK_MINUTES of bench/soak.py; best as root
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/crash -s --timeout 36000 $(PYTEST_ARGS)
	$(BIN)/python bench/soak.py --minutes $(SOAK_MINUTES)
