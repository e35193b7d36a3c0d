# Operating: what CI runs in short forms, at length. Included by the Makefile.

.PHONY: cli-docs load fuzz audit

cli-docs: install  ## Write docs/cli.md from the commands
	@PYTHONPATH=.:daemon:client $(BIN)/python -m kvstored.cli.manual > docs/cli.md
