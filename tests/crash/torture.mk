TORTURE ?= 20

.PHONY: torture
torture: install  ## The cold tier's crash tests, TORTURE times as long; root for power cuts and full disks
	KVSTORED_TORTURE=$(TORTURE) $(BIN)/python -m pytest tests/crash -s --timeout 36000 $(PYTEST_ARGS)
