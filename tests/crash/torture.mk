TORTURE ?= 20
SOAK_MINUTES ?= 5

.PHONY: torture
torture: install  ## The cold tier's crash tests and a Cluster's failovers, TORTURE times as long; SOAK_MINUTES of bench/soak.py
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/crash -s --timeout 36000 $(PYTEST_ARGS)
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/kvstore/shared/engines/test_failover.py \
		tests/e2e/test_shared_down.py -s --timeout 36000 $(PYTEST_ARGS)
	$(BIN)/python bench/soak.py --minutes $(SOAK_MINUTES)
