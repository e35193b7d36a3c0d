.PHONY: mutants

mutants: install  ## Break the program in a few hundred places, one at a time, and see a test notice; MUTANTS_ARGS="--help"
	$(BIN)/python -m tests.mutants $(MUTANTS_ARGS)
