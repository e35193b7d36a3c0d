TORTURE ?= 20
SOAK_MINUTES ?= 5

.PHONY: torture
torture: install  ## Crash tests and a Cluster's failovers, TORTURE times as long; a million damaged tensors; every float; SOAK_MINUTES of bench/soak.py
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/crash -s --timeout 36000 $(PYTEST_ARGS)
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/kvstore/shared/engines/test_failover.py \
		tests/e2e/test_shared_down.py -s --timeout 36000 $(PYTEST_ARGS)
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/kvstore/codecs/test_fuzzed.py --timeout 36000
	KVSTORED_TORTURE=1 $(BIN)/python -m pytest tests/kvstore/kernels/test_cpu.py -k every_float_in --timeout 36000
	$(BIN)/python bench/soak.py --minutes $(SOAK_MINUTES)
